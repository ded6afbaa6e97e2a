"""mT5 (Xue et al. 2021) and UMT5 (Chung et al. 2023): T5 v1.1 with a larger vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jax_encdec.families.t5 import T5Config


@dataclass(frozen=True, kw_only=True)
class MT5Config(T5Config):
    """The published configuration, with the published defaults."""

    model_type: ClassVar[str] = "mt5"
    whole_architecture: ClassVar[str | None] = "MT5ForConditionalGeneration"
    scales_tied: ClassVar[bool] = False

    vocab_size: int = 250112
    d_ff: int = 1024
    num_layers: int = 8
    num_heads: int = 6
    feed_forward_proj: str = "gated-gelu"


@dataclass(frozen=True, kw_only=True)
class UMT5Config(MT5Config):
    """UMT5: each layer has biases of its own."""

    model_type: ClassVar[str] = "umt5"
    whole_architecture: ClassVar[str | None] = "UMT5ForConditionalGeneration"
    limits: ClassVar[str] = f"{T5Config.limits}; an untied head is not scaled (Transformers 5 does)"
    scales_tied: ClassVar[bool] = True
    per_layer: ClassVar[bool] = True
