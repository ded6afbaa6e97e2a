"""TrOCR's decoder (Li et al. 2021): BART's, its positions learned or computed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from jax_encdec.config import Embedding, Learned, Role, Sinusoidal, TransformerConfig
from jax_encdec.errors import ConfigError
from jax_encdec.families.bart import BartKin


@dataclass(frozen=True, kw_only=True)
class TrOCRConfig(BartKin):
    """The published configuration, with the published defaults."""

    model_type: ClassVar[str] = "trocr"
    roles: ClassVar[tuple[Role, ...]] = ("decoder",)
    limits: ClassVar[str] = f"{BartKin.limits}; without its image encoder"

    vocab_size: int = 50265
    max_position_embeddings: int = 512
    decoder_layers: int = 12
    decoder_attention_heads: int = 16
    decoder_ffn_dim: int = 4096
    use_learned_position_embeddings: bool = True
    layernorm_embedding: bool = True
    cross_attention_hidden_size: int | None = None

    def __post_init__(self):
        super().__post_init__()
        self.require(
            vocab_size=self.vocab_size,
            max_position_embeddings=self.max_position_embeddings,
            decoder_layers=self.decoder_layers,
            decoder_ffn_dim=self.decoder_ffn_dim,
        )
        if self.cross_attention_hidden_size is not None:
            self.require(cross_attention_hidden_size=self.cross_attention_hidden_size)
        heads = self.decoder_attention_heads
        self.require_heads("d_model", self.d_model, "decoder_attention_heads", heads)
        pad, rows = self.pad_token_id, self.max_position_embeddings
        if not self.use_learned_position_embeddings and (pad is None or not 0 <= pad < rows):
            raise ConfigError(
                f"pad_token_id is a row of the position table; expected 0..{rows - 1}, got {pad}"
            )

    def layers_field(self, role: Role) -> str:
        """Name of the field that holds the number of layers."""
        return "decoder_layers"

    def sizes(self, role: Role) -> tuple[int, int, int]:
        """Number of layers, number of heads, width of the feed-forward."""
        return self.decoder_layers, self.decoder_attention_heads, self.decoder_ffn_dim

    def position_table(self) -> Learned:
        """BART's table; or sinusoids that skip pads, as RoBERTa's table does."""
        if self.use_learned_position_embeddings:
            return super().position_table()
        pad = self.pad_token_id
        assert pad is not None
        offset = pad + 1
        return Sinusoidal(
            length=self.max_position_embeddings + offset,
            offset=offset,
            pad_token_id=pad,
            zero_row=pad,
        )

    def embedding(self, role: Role) -> Embedding:
        """BART's, with or without the norm."""
        made = super().embedding(role)
        return made if self.layernorm_embedding else replace(made, norm=None)

    def to_trunk(self, role: Role) -> TransformerConfig:
        """Translate into the trunk's configuration."""
        return replace(super().to_trunk(role), encoder_hidden=self.cross_attention_hidden_size)
