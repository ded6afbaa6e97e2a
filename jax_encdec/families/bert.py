"""BERT (Devlin et al. 2019): learned positions, post-norm blocks, a head with a transform.

Its kin differ in a part or two: `BertKin` makes the trunk of parts that they override.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from jax_encdec.config import (
    Attention,
    BucketBias,
    Dropout,
    Embedding,
    FeedForward,
    Head,
    Kept,
    Learned,
    Norm,
    RelativeTable,
    Role,
    Segment,
    Source,
    Sublayer,
    TransformerConfig,
)
from jax_encdec.families.base import FamilyConfig, usual_segment


@dataclass(frozen=True, kw_only=True)
class BertKin(FamilyConfig):
    """The published keys that all of BERT's kin have, and the trunk that follows from them."""

    pre_norm: ClassVar[bool] = False
    """Normalise before each sublayer, and once more at the end."""
    drops_mlp: ClassVar[bool] = True
    """Dropout after the feed-forward."""
    bucket_bias: ClassVar[BucketBias | None] = None

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
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

    @property
    def norm(self) -> Norm:
        """Every norm of the model."""
        return Norm(eps=self.layer_norm_eps)

    def position_table(self) -> Learned:
        """The table of learned positions."""
        return Learned(length=self.max_position_embeddings)

    def embedding(self) -> Embedding:
        """What tokens enter through."""
        return Embedding(
            vocab=self.vocab_size,
            width=self.hidden_size,
            position=self.position_table(),
            norm=self.norm,
        )

    def head(self) -> Head:
        """The decoder's language model head."""
        act, tied = self.hidden_act, self.ties_head
        return Head(transform=self.norm, activation=act, bias="trained", tied=tied)

    def kept(self, role: Role) -> tuple[Kept, ...]:
        """Tensors that are published and not read."""
        if role == "decoder":
            # The bias is published twice; untied, only the other one is used.
            return () if self.ties_head else (Kept(name="head_bias", shape=(self.vocab_size,)),)
        n = self.hidden_size
        return Kept(name="pooler_kernel", shape=(n, n)), Kept(name="pooler_bias", shape=(n,))

    def relative(self) -> RelativeTable | None:
        """The table of relative positions, where attention reads one."""
        return None

    def segments(self, role: Role) -> tuple[Segment, ...]:
        """The blocks."""
        size, heads = self.hidden_size, self.num_attention_heads
        before, after = (self.norm, None) if self.pre_norm else (None, self.norm)

        def attention(source: Source) -> Sublayer:
            biased = self.bucket_bias is not None and source == "self"
            f = Attention(source=source, heads=heads, head_dim=size // heads, bucket_bias=biased)
            return Sublayer(f=f, before=before, after=after)

        f = FeedForward(width=self.intermediate_size, activation=self.hidden_act)
        mlp = Sublayer(f=f, before=before, after=after, dropout=self.drops_mlp)
        return (usual_segment(role, attention, mlp, self.num_hidden_layers),)

    def to_trunk(self, role: Role) -> TransformerConfig:
        """Translate into the trunk's configuration."""
        return TransformerConfig(
            hidden=self.hidden_size,
            causal=role == "decoder",
            embedding=self.embedding(),
            segments=self.segments(role),
            bucket_bias=self.bucket_bias,
            relative=self.relative(),
            final_norm=self.norm if self.pre_norm else None,
            head=self.head() if role == "decoder" else None,
            kept=self.kept(role),
            dropout=Dropout(
                embedding=self.hidden_dropout_prob,
                residual=self.hidden_dropout_prob,
                attention=self.attention_probs_dropout_prob,
            ),
            init_std=self.initializer_range,
        )


@dataclass(frozen=True, kw_only=True)
class BertConfig(BertKin):
    """The published configuration, with the published defaults."""

    model_type: ClassVar[str] = "bert"

    type_vocab_size: int = 2

    def embedding(self) -> Embedding:
        """With a table of token types."""
        return replace(super().embedding(), types=self.type_vocab_size)
