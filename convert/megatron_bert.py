"""Megatron-BERT's tensors: BERT's, the norms elsewhere."""

from __future__ import annotations

from dataclasses import replace

from jax_encdec.config import Role
from jax_encdec.convert.bert import BERT, EMBEDDINGS, POOLER, blocks
from jax_encdec.convert.rules import Rule, norm
from jax_encdec.families import FamilyConfig


def body(config: FamilyConfig, role: Role) -> tuple[Rule, ...]:
    """Tensors of MegatronBertModel."""
    layers = blocks("ln", "ln", "norm_before")
    return (*EMBEDDINGS, *layers, *norm("encoder.ln", "final_norm"), *POOLER)


MEGATRON_BERT = replace(BERT, body=body)

TABLES = {"megatron-bert": MEGATRON_BERT}
