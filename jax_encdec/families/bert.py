"""BERT (Devlin et al. 2019): learned positions, post-norm blocks, a head with a transform."""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True, kw_only=True)
class BertConfig(FamilyConfig):
    """The published configuration, with the published defaults."""

    model_type: ClassVar[str] = "bert"

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self):
        super().__post_init__()
        self.require(
            vocab_size=self.vocab_size,
            num_hidden_layers=self.num_hidden_layers,
            intermediate_size=self.intermediate_size,
            max_position_embeddings=self.max_position_embeddings,
            layer_norm_eps=self.layer_norm_eps,
        )
        self.require_heads(
            "hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads
        )

    def position_table(self) -> Learned:
        """The table of learned positions."""
        return Learned(length=self.max_position_embeddings)

    def head_activation(self) -> str:
        """The activation inside the language model head."""
        return self.hidden_act

    def to_trunk(self, role: Role) -> TransformerConfig:
        """Translate into the trunk's configuration."""
        norm = Norm(eps=self.layer_norm_eps)
        size, heads = self.hidden_size, self.num_attention_heads

        def attention(source: Source) -> Sublayer:
            f = Attention(source=source, heads=heads, head_dim=size // heads)
            return Sublayer(f=f, after=norm)

        mlp = Sublayer(
            f=FeedForward(width=self.intermediate_size, activation=self.hidden_act), after=norm
        )
        # The pooler is published with every BERT, and nothing here reads it.
        head = None
        kept = (
            Kept(name="pooler_kernel", shape=(size, size)),
            Kept(name="pooler_bias", shape=(size,)),
        )
        if role == "decoder":
            tied = self.tie_word_embeddings
            head = Head(
                transform=norm, activation=self.head_activation(), bias="trained", tied=tied
            )
            # Published twice when untied, and only the other one is used.
            kept = () if tied else (Kept(name="head_bias", shape=(self.vocab_size,)),)
        layers = self.num_hidden_layers
        return TransformerConfig(
            hidden=size,
            causal=role == "decoder",
            embedding=Embedding(
                vocab=self.vocab_size,
                width=size,
                types=self.type_vocab_size,
                position=self.position_table(),
                norm=norm,
            ),
            segments=(usual_segment(role, attention, mlp, layers),),
            head=head,
            kept=kept,
            dropout=Dropout(
                embedding=self.hidden_dropout_prob,
                residual=self.hidden_dropout_prob,
                attention=self.attention_probs_dropout_prob,
            ),
            init_std=self.initializer_range,
        )
