"""XGLM (Lin et al. 2022): a causal language model of mBART's blocks, its positions computed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from jax_encdec.config import Embedding, Learned, Role, Sinusoidal, TransformerConfig
from jax_encdec.families.bart import BartKin

_POSITION_OFFSET = 2


@dataclass(frozen=True, kw_only=True)
class XGLMConfig(BartKin):
    """The published configuration, with the published defaults."""

    model_type: ClassVar[str] = "xglm"
    limits: ClassVar[str] = f"{BartKin.limits}; as an encoder, causal as it was trained"
    pre_norm: ClassVar[bool] = True

    vocab_size: int = 256008
    max_position_embeddings: int = 2048
    ffn_dim: int = 4096
    num_layers: int = 24
    attention_heads: int = 16
    attention_dropout: float = 0.1
    scale_embedding: bool = True

    def __post_init__(self):
        super().__post_init__()
        self.require(
            vocab_size=self.vocab_size,
            max_position_embeddings=self.max_position_embeddings,
            num_layers=self.num_layers,
            ffn_dim=self.ffn_dim,
        )
        heads = self.attention_heads
        self.require_heads("d_model", self.d_model, "attention_heads", heads)

    def layers_field(self, role: Role) -> str:
        """Name of the field that holds the number of layers."""
        return "num_layers"

    def sizes(self, role: Role) -> tuple[int, int, int]:
        """Number of layers, number of heads, width of the feed-forward."""
        return self.num_layers, self.attention_heads, self.ffn_dim

    def position_table(self) -> Learned:
        """Sinusoids from row 2 on; the row of the pad's id is zero, whatever token is there."""
        return Sinusoidal(
            length=self.max_position_embeddings + _POSITION_OFFSET,
            offset=_POSITION_OFFSET,
            zero_row=self.pad_token_id,
        )

    def embedding(self, role: Role) -> Embedding:
        """Tokens and positions, not normalised."""
        return replace(super().embedding(role), norm=None)

    def to_trunk(self, role: Role) -> TransformerConfig:
        """Translate into the trunk's configuration; as an encoder, too, it is causal."""
        return replace(super().to_trunk(role), causal=True)
