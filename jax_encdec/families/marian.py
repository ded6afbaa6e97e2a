"""Marian (Junczys-Dowmunt et al. 2018): BART with bare embeddings and fixed sinusoidal positions.

Of its whole models, some give each half a vocabulary of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from jax_encdec.config import Embedding, Learned, Role
from jax_encdec.errors import ConfigError
from jax_encdec.families.bart import BartConfig


@dataclass(frozen=True, kw_only=True)
class MarianConfig(BartConfig):
    """The published configuration, with the published defaults."""

    model_type: ClassVar[str] = "marian"
    whole_architecture: ClassVar[str | None] = "MarianMTModel"
    limits: ClassVar[str] = (
        f"{BartConfig.limits}; PyTorch opens a pair's decoder only if decoder_vocab_size is "
        f"vocab_size"
    )

    vocab_size: int = 58101
    decoder_vocab_size: int | None = None
    """None: as the encoder's."""
    share_encoder_decoder_embeddings: bool = True
    pad_token_id: int | None = 58100
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = 0
    decoder_start_token_id: int | None = 58100
    forced_eos_token_id: int | tuple[int, ...] | None = 0

    def __post_init__(self):
        super().__post_init__()
        own = self.vocabulary("decoder")
        self.require(decoder_vocab_size=own)
        if self.share_encoder_decoder_embeddings and own != self.vocab_size:
            raise ConfigError(
                f"decoder_vocab_size must equal vocab_size where "
                f"share_encoder_decoder_embeddings is true; got {own} and {self.vocab_size}"
            )

    def vocabulary(self, role: Role) -> int:
        """Number of tokens that a half knows."""
        other = self.decoder_vocab_size
        return other if role == "decoder" and other is not None else self.vocab_size

    def position_table(self) -> Learned:
        """A table of sines and cosines."""
        return Learned(length=self.max_position_embeddings, fixed=True)

    def embedding(self, role: Role) -> Embedding:
        """Tokens and positions, not normalised."""
        return replace(super().embedding(role), norm=None)

    @property
    def shares_embeddings(self) -> bool:
        """Whether the halves of the whole model read one token embedding."""
        return self.ties_head and self.share_encoder_decoder_embeddings

    @property
    def publishes_shared(self) -> bool:
        """Whether the whole published model has an embedding beside those of its halves."""
        return self.share_encoder_decoder_embeddings
