"""Megatron-BERT (Shoeybi et al. 2019): BERT with norms before its sublayers, none at first."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from jax_encdec.config import Embedding
from jax_encdec.families.bert import BertConfig


@dataclass(frozen=True, kw_only=True)
class MegatronBertConfig(BertConfig):
    """The published configuration, with the published defaults."""

    model_type: ClassVar[str] = "megatron-bert"
    pre_norm: ClassVar[bool] = True

    vocab_size: int = 29056
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int = 4096

    def embedding(self) -> Embedding:
        """The sum as it is: the first block normalises it."""
        return replace(super().embedding(), norm=None)
