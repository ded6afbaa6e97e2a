"""DistilBERT (Sanh et al. 2019): BERT without token types and pooler, under names of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from jax_encdec.config import (
    Attention,
    Dropout,
    Embedding,
    FeedForward,
    Learned,
    Norm,
    Role,
    Source,
    Sublayer,
    TransformerConfig,
)
from jax_encdec.families.base import FamilyConfig, usual_segment

_SYNONYMS = {
    "hidden_size": "dim",
    "num_attention_heads": "n_heads",
    "num_hidden_layers": "n_layers",
}


@dataclass(frozen=True, kw_only=True)
class DistilBertConfig(FamilyConfig):
    """The published configuration, with the published defaults.

    `sinusoidal_pos_embds` only says what the position table was filled with: it is published.
    """

    model_type: ClassVar[str] = "distilbert"
    roles: ClassVar[tuple[Role, ...]] = ("encoder",)

    vocab_size: int = 30522
    max_position_embeddings: int = 512
    sinusoidal_pos_embds: bool = False
    n_layers: int = 6
    n_heads: int = 12
    dim: int = 768
    hidden_dim: int = 3072
    dropout: float = 0.1
    attention_dropout: float = 0.1
    activation: str = "gelu"
    initializer_range: float = 0.02
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = True

    def __post_init__(self):
        super().__post_init__()
        self.require(
            vocab_size=self.vocab_size,
            max_position_embeddings=self.max_position_embeddings,
            n_layers=self.n_layers,
            hidden_dim=self.hidden_dim,
        )
        self.require_heads("dim", self.dim, "n_heads", self.n_heads)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "config") -> Self:
        """Read a published configuration, in which sizes may have BERT's names."""
        return super().from_dict({_SYNONYMS.get(k, k): v for k, v in data.items()}, where)

    def layers_field(self, role: Role) -> str:
        """Name of the field that holds the number of layers."""
        return "n_layers"

    def to_trunk(self, role: Role) -> TransformerConfig:
        """Translate into the trunk's configuration."""
        norm = Norm(eps=1e-12)

        def attention(source: Source) -> Sublayer:
            f = Attention(source=source, heads=self.n_heads, head_dim=self.dim // self.n_heads)
            return Sublayer(f=f, after=norm, dropout=False)

        mlp = FeedForward(width=self.hidden_dim, activation=self.activation)
        return TransformerConfig(
            hidden=self.dim,
            embedding=Embedding(
                vocab=self.vocab_size,
                width=self.dim,
                position=Learned(length=self.max_position_embeddings),
                norm=norm,
            ),
            segments=(usual_segment(role, attention, Sublayer(f=mlp, after=norm), self.n_layers),),
            dropout=Dropout(
                embedding=self.dropout, residual=self.dropout, attention=self.attention_dropout
            ),
            init_std=self.initializer_range,
        )
