"""BART (Lewis et al. 2020): learned positions from row 2, post-norm blocks, both halves alike.

Its many descendants are the same trunk with other positions and with norms elsewhere: `BartKin` is
what they share.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from jax_encdec.config import (
    Attention,
    Dropout,
    Embedding,
    FeedForward,
    Head,
    Kept,
    Learned,
    Norm,
    Role,
    Source,
    Sublayer,
    TransformerConfig,
)
from jax_encdec.families.base import FamilyConfig, usual_segment

_POSITION_OFFSET = 2  # The position table has two rows more than positions, and starts after them.


@dataclass(frozen=True, kw_only=True)
class BartKin(FamilyConfig):
    """Fields and trunk of BART's descendants; what differs between them is a method."""

    limits: ClassVar[str] = "layerdrop is not applied in training"
    pre_norm: ClassVar[bool] = False
    """Blocks normalise their inputs, and the trunk its output; else blocks normalise outputs."""

    max_position_embeddings: int = 1024
    activation_function: str = "gelu"
    d_model: int = 1024
    dropout: float = 0.1
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    init_std: float = 0.02
    scale_embedding: bool = False
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 2
    decoder_start_token_id: int | None = 2
    tie_word_embeddings: bool = True

    def sizes(self, role: Role) -> tuple[int, int, int]:
        """Number of layers, number of heads, width of the feed-forward."""
        raise AssertionError(f"{type(self).__name__} defines no sizes")  # pragma: no cover

    def position_table(self) -> Learned:
        """BART's table of learned positions."""
        return Learned(
            length=self.max_position_embeddings + _POSITION_OFFSET, offset=_POSITION_OFFSET
        )

    def embedding(self, role: Role) -> Embedding:
        """BART's embeddings, normalised once positions are added."""
        return Embedding(
            vocab=self.vocabulary(role),
            width=self.d_model,
            scale=math.sqrt(self.d_model) if self.scale_embedding else 1.0,
            position=self.position_table(),
            norm=Norm(eps=1e-5),
        )

    def to_trunk(self, role: Role) -> TransformerConfig:
        """Translate into the trunk's configuration."""
        norm, pre = Norm(eps=1e-5), self.pre_norm
        layers, heads, width = self.sizes(role)
        before, after = (norm, None) if pre else (None, norm)

        def attention(source: Source) -> Sublayer:
            f = Attention(source=source, heads=heads, head_dim=self.d_model // heads)
            return Sublayer(f=f, before=before, after=after)

        mlp = FeedForward(width=width, activation=self.activation_function)
        sublayer = Sublayer(f=mlp, before=before, after=after)
        return TransformerConfig(
            hidden=self.d_model,
            causal=role == "decoder",
            embedding=self.embedding(role),
            segments=(usual_segment(role, attention, sublayer, layers),),
            final_norm=norm if pre else None,
            head=Head(tied=self.tie_word_embeddings) if role == "decoder" else None,
            dropout=Dropout(
                embedding=self.dropout,
                residual=self.dropout,
                attention=self.attention_dropout,
                activation=self.activation_dropout,
            ),
            init_std=self.init_std,
        )


@dataclass(frozen=True, kw_only=True)
class BartConfig(BartKin):
    """The published configuration, with the published defaults."""

    model_type: ClassVar[str] = "bart"
    whole_architecture: ClassVar[str | None] = "BartForConditionalGeneration"

    vocab_size: int = 50265
    encoder_layers: int = 12
    encoder_ffn_dim: int = 4096
    encoder_attention_heads: int = 16
    decoder_layers: int = 12
    decoder_ffn_dim: int = 4096
    decoder_attention_heads: int = 16
    forced_eos_token_id: int | tuple[int, ...] | None = 2

    def __post_init__(self):
        super().__post_init__()
        names = ("vocab_size", "max_position_embeddings", "encoder_layers", "decoder_layers")
        for name in (*names, "encoder_ffn_dim", "decoder_ffn_dim"):
            self.require(**{name: getattr(self, name)})
        for name in ("encoder_attention_heads", "decoder_attention_heads"):
            self.require_heads("d_model", self.d_model, name, getattr(self, name))

    def layers_field(self, role: Role) -> str:
        """Name of the field that holds the number of layers."""
        return f"{role}_layers"

    def sizes(self, role: Role) -> tuple[int, int, int]:
        """Number of layers, number of heads, width of the feed-forward."""
        if role == "decoder":
            return self.decoder_layers, self.decoder_attention_heads, self.decoder_ffn_dim
        return self.encoder_layers, self.encoder_attention_heads, self.encoder_ffn_dim

    def whole_trunk(self, role: Role) -> TransformerConfig:
        """A half of the whole published model, which adds a fixed bias to the logits."""
        trunk = self.to_trunk(role)
        if trunk.head is not None:
            return replace(trunk, head=replace(trunk.head, bias="fixed"))
        if self.shares_embeddings or not self.publishes_shared:
            return trunk
        # Untied, the published model still carries the embedding that nobody shares.
        return replace(trunk, kept=(Kept(name="shared", shape=(self.vocab_size, self.d_model)),))

    @property
    def publishes_shared(self) -> bool:
        """Whether the whole published model has an embedding beside those of its halves."""
        return True
