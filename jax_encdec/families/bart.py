"""BART (Lewis et al. 2020): learned positions from row 2, post-norm blocks, both halves alike."""

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
class BartConfig(FamilyConfig):
    """The published configuration, with the published defaults."""

    model_type: ClassVar[str] = "bart"
    whole_architecture: ClassVar[str | None] = "BartForConditionalGeneration"

    vocab_size: int = 50265
    max_position_embeddings: int = 1024
    encoder_layers: int = 12
    encoder_ffn_dim: int = 4096
    encoder_attention_heads: int = 16
    decoder_layers: int = 12
    decoder_ffn_dim: int = 4096
    decoder_attention_heads: int = 16
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

    def __post_init__(self):
        super().__post_init__()
        self.require(
            vocab_size=self.vocab_size,
            max_position_embeddings=self.max_position_embeddings,
            encoder_layers=self.encoder_layers,
            encoder_ffn_dim=self.encoder_ffn_dim,
            decoder_layers=self.decoder_layers,
            decoder_ffn_dim=self.decoder_ffn_dim,
        )
        for name in ("encoder_attention_heads", "decoder_attention_heads"):
            self.require_heads("d_model", self.d_model, name, getattr(self, name))

    def layers_field(self, role: Role) -> str:
        """Name of the field that holds the number of layers."""
        return f"{role}_layers"

    def to_trunk(self, role: Role) -> TransformerConfig:
        """Translate into the trunk's configuration."""
        norm = Norm(eps=1e-5)
        decoder = role == "decoder"
        heads = self.decoder_attention_heads if decoder else self.encoder_attention_heads

        def attention(source: Source) -> Sublayer:
            f = Attention(source=source, heads=heads, head_dim=self.d_model // heads)
            return Sublayer(f=f, after=norm)

        mlp = Sublayer(
            f=FeedForward(
                width=self.decoder_ffn_dim if decoder else self.encoder_ffn_dim,
                activation=self.activation_function,
            ),
            after=norm,
        )
        layers = self.decoder_layers if decoder else self.encoder_layers
        return TransformerConfig(
            hidden=self.d_model,
            causal=decoder,
            embedding=Embedding(
                vocab=self.vocab_size,
                width=self.d_model,
                scale=math.sqrt(self.d_model) if self.scale_embedding else 1.0,
                position=Learned(
                    length=self.max_position_embeddings + _POSITION_OFFSET,
                    offset=_POSITION_OFFSET,
                ),
                norm=norm,
            ),
            segments=(usual_segment(role, attention, mlp, layers),),
            head=Head(tied=self.tie_word_embeddings) if decoder else None,
            dropout=Dropout(
                embedding=self.dropout,
                residual=self.dropout,
                attention=self.attention_dropout,
                activation=self.activation_dropout,
            ),
            init_std=self.init_std,
        )

    def whole_trunk(self, role: Role) -> TransformerConfig:
        """A half of BartForConditionalGeneration, which adds a fixed bias to the logits."""
        trunk = self.to_trunk(role)
        if trunk.head is not None:
            return replace(trunk, head=replace(trunk.head, bias="fixed"))
        if self.tie_word_embeddings:
            return trunk
        # Untied, the published model still carries the embedding that nobody shares.
        return replace(trunk, kept=(Kept(name="shared", shape=(self.vocab_size, self.d_model)),))
