"""XLM-RoBERTa-XL (Goyal et al. 2021): RoBERTa with norms before its sublayers, none at first."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from jax_encdec.config import Embedding
from jax_encdec.families.roberta import RobertaConfig


@dataclass(frozen=True, kw_only=True)
class XLMRobertaXLConfig(RobertaConfig):
    """The published configuration, with the published defaults."""

    model_type: ClassVar[str] = "xlm-roberta-xl"
    pre_norm: ClassVar[bool] = True
    drops_mlp: ClassVar[bool] = False

    vocab_size: int = 250880
    hidden_size: int = 2560
    num_hidden_layers: int = 36
    num_attention_heads: int = 32
    intermediate_size: int = 10240
    max_position_embeddings: int = 514
    type_vocab_size: int = 1
    layer_norm_eps: float = 1e-5

    def embedding(self) -> Embedding:
        """The sum as it is: the first block normalises it."""
        return replace(super().embedding(), norm=None)
