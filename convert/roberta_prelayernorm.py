"""Tensors of RoBERTa with norms before: RoBERTa's, the norms elsewhere."""

from __future__ import annotations

from dataclasses import replace

from jax_encdec.config import Role
from jax_encdec.convert.bert import EMBEDDINGS, POOLER, blocks
from jax_encdec.convert.roberta import ROBERTA
from jax_encdec.convert.rules import Rule, norm
from jax_encdec.convert.table import Standalone
from jax_encdec.families import FamilyConfig


def body(config: FamilyConfig, role: Role) -> tuple[Rule, ...]:
    """Tensors of RobertaPreLayerNormModel."""
    layers = blocks("LayerNorm", "intermediate.LayerNorm", "norm_before")
    return (*EMBEDDINGS, *layers, *norm("LayerNorm", "final_norm"), *POOLER)


ROBERTA_PRELAYERNORM = replace(
    ROBERTA,
    body=body,
    nested="roberta_prelayernorm.",
    standalone=lambda config, role: Standalone(("roberta_prelayernorm.", "")),
)

TABLES = {"roberta-prelayernorm": ROBERTA_PRELAYERNORM}
