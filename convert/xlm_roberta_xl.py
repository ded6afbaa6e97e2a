"""XLM-RoBERTa-XL's tensors: RoBERTa's, the norms elsewhere."""

from __future__ import annotations

from dataclasses import replace

from jax_encdec.config import Role
from jax_encdec.convert.bert import EMBEDDINGS, POOLER, blocks
from jax_encdec.convert.roberta import ROBERTA
from jax_encdec.convert.rules import Rule, norm
from jax_encdec.families import FamilyConfig


def body(config: FamilyConfig, role: Role) -> tuple[Rule, ...]:
    """Tensors of XLMRobertaXLModel."""
    layers = blocks("self_attn_layer_norm", "LayerNorm", "norm_before")
    return (*EMBEDDINGS, *layers, *norm("encoder.LayerNorm", "final_norm"), *POOLER)


XLM_ROBERTA_XL = replace(ROBERTA, body=body)

TABLES = {"xlm-roberta-xl": XLM_ROBERTA_XL}
