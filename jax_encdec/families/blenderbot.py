"""Blenderbot (Roller et al. 2021): BART with pre-norm blocks and bare embeddings."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from jax_encdec.config import Embedding, Learned, Role
from jax_encdec.families.bart import BartConfig


@dataclass(frozen=True, kw_only=True)
class BlenderbotConfig(BartConfig):
    """The published configuration, with the published defaults."""

    model_type: ClassVar[str] = "blenderbot"
    whole_architecture: ClassVar[str | None] = "BlenderbotForConditionalGeneration"
    pre_norm: ClassVar[bool] = True

    vocab_size: int = 8008
    max_position_embeddings: int = 128
    encoder_layers: int = 2
    encoder_ffn_dim: int = 10240
    encoder_attention_heads: int = 32
    decoder_layers: int = 24
    decoder_ffn_dim: int = 10240
    decoder_attention_heads: int = 32
    d_model: int = 2560
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    decoder_start_token_id: int | None = 1
    encoder_no_repeat_ngram_size: int = 3

    def position_table(self) -> Learned:
        """A table whose first row is the first position's."""
        return Learned(length=self.max_position_embeddings)

    def embedding(self, role: Role) -> Embedding:
        """Tokens and positions, not normalised."""
        return replace(super().embedding(role), norm=None)
