"""Blenderbot's smallest model (Roller et al. 2021): BART, its decoder's tokens normalised alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from jax_encdec.config import Embedding, Learned, Role
from jax_encdec.families.bart import BartConfig


@dataclass(frozen=True, kw_only=True)
class BlenderbotSmallConfig(BartConfig):
    """The published configuration, with the published defaults."""

    model_type: ClassVar[str] = "blenderbot-small"
    whole_architecture: ClassVar[str | None] = "BlenderbotSmallForConditionalGeneration"

    max_position_embeddings: int = 512
    encoder_layers: int = 8
    encoder_ffn_dim: int = 2048
    decoder_layers: int = 8
    decoder_ffn_dim: int = 2048
    d_model: int = 512
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    decoder_start_token_id: int | None = 1

    def position_table(self) -> Learned:
        """A table whose first row is the first position's."""
        return Learned(length=self.max_position_embeddings)

    def embedding(self, role: Role) -> Embedding:
        """BART's, but the decoder adds positions after the norm."""
        return replace(super().embedding(role), norm_first=role == "decoder")
