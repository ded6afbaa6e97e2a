"""T5 (Raffel et al. 2020), mT5 and UMT5: distances in buckets, RMS norms, nothing but kernels.

T5 v1.1, Flan-T5 and mT5 differ from T5 in their options only: a gated feed-forward and a head of
their own. The token embedding is always one for both halves of the whole model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jax_encdec.config import (
    Attention,
    BucketBias,
    Dropout,
    Embedding,
    FeedForward,
    Head,
    Norm,
    Role,
    Source,
    Sublayer,
    TransformerConfig,
)
from jax_encdec.errors import ConfigError
from jax_encdec.families.base import FamilyConfig, usual_segment


@dataclass(frozen=True, kw_only=True)
class T5Config(FamilyConfig):
    """The published configuration, with the published defaults."""

    model_type: ClassVar[str] = "t5"
    whole_architecture: ClassVar[str | None] = "T5ForConditionalGeneration"
    limits: ClassVar[str] = "random weights of one scale; float16 overflows where bfloat16 does not"
    scales_tied: ClassVar[bool] = True
    """A tied head reads states scaled by `d_model ** -0.5`."""
    per_layer: ClassVar[bool] = False
    """Each layer has biases of its own."""

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: int | None = None
    """None: as many as `num_layers`."""
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    initializer_factor: float = 1.0
    feed_forward_proj: str = "relu"
    """An activation, after "gated-" where the feed-forward is."""
    pad_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 1
    decoder_start_token_id: int | None = 0
    tie_word_embeddings: bool = True
    scale_decoder_outputs: bool | None = None
    """Scale the states before the head; None: where `tie_word_embeddings` says so. Files written
    by Transformers 5 call every head tied, so that this alone tells the models apart."""

    def __post_init__(self):
        super().__post_init__()
        if self.scale_decoder_outputs is None:
            scale = self.scales_tied and self.tie_word_embeddings
            object.__setattr__(self, "scale_decoder_outputs", scale)
        for name in ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads"):
            self.require(**{name: getattr(self, name)})
        self.require(num_decoder_layers=self.layer_count("decoder"))
        self.require(layer_norm_epsilon=self.layer_norm_epsilon)
        # Half of the one-sided buckets are exact; the rest must have distances to share.
        buckets = self.relative_attention_num_buckets
        distance = self.relative_attention_max_distance
        if buckets < 4 or distance <= buckets // 2:
            raise ConfigError(
                f"relative_attention_num_buckets must be at least 4, and half of it less than "
                f"relative_attention_max_distance; got {buckets} and {distance}"
            )
        _ = self.feed_forward

    @property
    def feed_forward(self) -> FeedForward:
        """The feed-forward that `feed_forward_proj` names."""
        gated, dash, name = self.feed_forward_proj.rpartition("-")
        if gated != ("gated" if dash else ""):
            raise ConfigError(
                f"feed_forward_proj must be an activation such as 'relu', or 'gated-' and one; "
                f"got {self.feed_forward_proj!r}"
            )
        # By this name the authors meant the approximation.
        name = "gelu_new" if self.feed_forward_proj == "gated-gelu" else name
        return FeedForward(width=self.d_ff, activation=name, gated=bool(gated), bias=False)

    def layers_field(self, role: Role) -> str:
        """Name of the field that holds the number of layers."""
        return "num_layers" if role == "encoder" else "num_decoder_layers"

    def layer_count(self, role: Role) -> int:
        """Number of layers."""
        own = self.num_decoder_layers
        return own if role == "decoder" and own is not None else self.num_layers

    @property
    def shares_embeddings(self) -> bool:
        """Whatever the head, both halves read one token embedding."""
        return True

    def to_trunk(self, role: Role) -> TransformerConfig:
        """Translate into the trunk's configuration."""
        rule, decoder = Norm(kind="rms", eps=self.layer_norm_epsilon), role == "decoder"

        def attention(source: Source) -> Sublayer:
            f = Attention(
                source=source,
                heads=self.num_heads,
                head_dim=self.d_kv,
                bias=False,
                out_bias=False,
                scale=1.0,
                bucket_bias=source == "self",
            )
            return Sublayer(f=f, before=rule)

        mlp = Sublayer(f=self.feed_forward, before=rule)
        layers = self.layer_count(role)
        scale = self.d_model**-0.5 if self.scale_decoder_outputs else 1.0
        return TransformerConfig(
            hidden=self.d_model,
            causal=decoder,
            embedding=Embedding(vocab=self.vocab_size, width=self.d_model),
            segments=(usual_segment(role, attention, mlp, layers),),
            bucket_bias=BucketBias(
                buckets=self.relative_attention_num_buckets,
                max_distance=self.relative_attention_max_distance,
                bidirectional=not decoder,
                per_layer=self.per_layer,
            ),
            final_norm=rule,
            head=Head(tied=self.tie_word_embeddings, scale=scale) if decoder else None,
            dropout=Dropout.everywhere(self.dropout_rate),
            # Scores are not scaled: queries and keys start small enough to make them of order one.
            init_std=self.initializer_factor * self.d_model**-0.5 * self.d_kv**-0.25,
        )

    def whole_trunk(self, role: Role) -> TransformerConfig:
        """A half of the whole published model is the same."""
        return self.to_trunk(role)
