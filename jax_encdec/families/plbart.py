"""PLBART (Ahmad et al. 2021): BART for programs; the target's language code opens it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jax_encdec.families.bart import BartConfig


@dataclass(frozen=True, kw_only=True)
class PLBartConfig(BartConfig):
    """The published configuration, with the published defaults."""

    model_type: ClassVar[str] = "plbart"
    whole_architecture: ClassVar[str | None] = "PLBartForConditionalGeneration"
    wraps_labels: ClassVar[bool] = True

    vocab_size: int = 50005
    encoder_layers: int = 6
    encoder_ffn_dim: int = 3072
    encoder_attention_heads: int = 12
    decoder_layers: int = 6
    decoder_ffn_dim: int = 3072
    decoder_attention_heads: int = 12
    d_model: int = 768
    attention_dropout: float = 0.1
    scale_embedding: bool = True
    decoder_start_token_id: int | None = None
