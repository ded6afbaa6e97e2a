"""ModernBERT (Warner et al. 2024): rotary positions; a window, but for every third layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from jax_encdec.config import (
    Attention,
    Block,
    Dropout,
    Embedding,
    FeedForward,
    Norm,
    Role,
    Rotary,
    Segment,
    Sublayer,
    TransformerConfig,
)
from jax_encdec.errors import ConfigError
from jax_encdec.families.base import FamilyConfig, periodic_segments

_KINDS = {"full_attention": "global_rope_theta", "sliding_attention": "local_rope_theta"}
_POSITIVE = (
    "vocab_size", "intermediate_size", "num_hidden_layers", "norm_eps", "global_rope_theta",
    "local_attention", "global_attn_every_n_layers",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ModernBertConfig(FamilyConfig):
    """The published configuration, with the published defaults."""

    model_type: ClassVar[str] = "modernbert"
    roles: ClassVar[tuple[Role, ...]] = ("encoder",)

    vocab_size: int = 50368
    hidden_size: int = 768
    intermediate_size: int = 1152
    num_hidden_layers: int = 22
    num_attention_heads: int = 12
    hidden_activation: str = "gelu"
    initializer_range: float = 0.02
    norm_eps: float = 1e-5
    norm_bias: bool = False
    pad_token_id: int | None = 50283
    eos_token_id: int | tuple[int, ...] | None = 50282
    bos_token_id: int | None = 50281
    attention_bias: bool = False
    attention_dropout: float = 0.0
    local_attention: int = 128
    """Width of the window, half of it on either side."""
    global_attn_every_n_layers: int = 3
    layer_types: tuple[str, ...] | None = None
    """Which layers see everything; None: the first of every `global_attn_every_n_layers`."""
    global_rope_theta: float = 160_000.0
    local_rope_theta: float | None = 10_000.0
    """None: as `global_rope_theta`."""
    embedding_dropout: float = 0.0
    mlp_bias: bool = False
    mlp_dropout: float = 0.0

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "config") -> Self:
        """Read either spelling of the rotary bases: two keys, or one object for both."""
        data = dict(data)
        rope = data.pop("rope_parameters", None) or {}
        if data.pop("rope_scaling", None) or not isinstance(rope, Mapping):
            raise ConfigError(f"{where}: scaled rotary positions (rope_scaling) are not supported")
        for kind, values in rope.items():
            known = kind in _KINDS and (values is None or isinstance(values, Mapping))
            values = dict(values or {}) if known else {}
            theta = values.pop("rope_theta", None)
            if not known or values.pop("rope_type", "default") != "default" or values:
                raise ConfigError(
                    f"{where}: rope_parameters must give 'full_attention' and 'sliding_attention' "
                    f"a rope_theta with rope_type 'default'; got {kind!r}: {rope[kind]!r}"
                )
            if theta is not None:
                data[_KINDS[kind]] = theta
        return super().from_dict(data, where)

    def __post_init__(self):
        super().__post_init__()
        self.require(**{name: getattr(self, name) for name in _POSITIVE})
        if self.local_rope_theta is not None:
            self.require(local_rope_theta=self.local_rope_theta)
        size, heads = self.hidden_size, self.num_attention_heads
        self.require_heads("hidden_size", size, "num_attention_heads", heads)
        if len(self.kinds) != self.num_hidden_layers or set(self.kinds) - set(_KINDS):
            raise ConfigError(
                f"layer_types must be {' or '.join(_KINDS)} for each of the "
                f"{self.num_hidden_layers} layers; got {list(self.kinds)}"
            )

    @property
    def kinds(self) -> tuple[str, ...]:
        """What each layer sees."""
        if self.layer_types is not None:
            return self.layer_types
        far, near = _KINDS
        every = self.global_attn_every_n_layers
        return tuple(near if i % every else far for i in range(self.num_hidden_layers))

    def with_layers(self, role: Role, taken: tuple[int, ...]) -> Self:
        """What a layer sees goes with it; the first, which lacks a norm, must stay the first."""
        if taken[0] != 0 or 0 in taken[1:]:
            raise ConfigError(f"layer 0 has no norm: choose it, once, first; got {list(taken)}")
        kinds = tuple(self.kinds[i] for i in taken)
        return self.replace(num_hidden_layers=len(kinds), layer_types=kinds)

    def to_trunk(self, role: Role) -> TransformerConfig:
        """Translate into the trunk's configuration."""
        rule = Norm(eps=self.norm_eps, bias=self.norm_bias)
        width, name = self.intermediate_size, self.hidden_activation
        mlp = FeedForward(width=width, activation=name, gated=True, bias=self.mlp_bias)

        def block(kind: str, first: bool) -> Block:
            near = kind == "sliding_attention"
            local = self.local_rope_theta if near else None
            attention = Attention(
                heads=self.num_attention_heads,
                head_dim=self.hidden_size // self.num_attention_heads,
                bias=self.attention_bias,
                out_bias=self.attention_bias,
                rotary=Rotary(theta=self.global_rope_theta if local is None else local),
                window=self.local_attention // 2 if near else None,
            )
            # The embeddings come normalised to the first block.
            own = Sublayer(f=attention, before=None if first else rule)
            return Block(sublayers=(own, Sublayer(f=mlp, before=rule, dropout=False)))

        first, *rest = [block(kind, i == 0) for i, kind in enumerate(self.kinds)]
        return TransformerConfig(
            hidden=self.hidden_size,
            embedding=Embedding(vocab=self.vocab_size, width=self.hidden_size, norm=rule),
            segments=(Segment(blocks=(first,), repeat=1), *periodic_segments(rest)),
            final_norm=rule,
            dropout=Dropout(
                embedding=self.embedding_dropout,
                residual=self.attention_dropout,
                attention=self.attention_dropout,
                activation=self.mlp_dropout,
            ),
            init_std=self.initializer_range,
            residual_init_std=self.initializer_range / math.sqrt(2 * self.num_hidden_layers),
        )
