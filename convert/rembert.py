"""RemBERT's tensors: BERT's layers, a projection before them, a wide head."""

from __future__ import annotations

from jax_encdec.config import Role
from jax_encdec.convert.bert import EMBEDDINGS, IGNORED, POOLER, blocks
from jax_encdec.convert.rules import Rule, linear, norm
from jax_encdec.convert.table import Standalone, Table
from jax_encdec.families import FamilyConfig


def body(config: FamilyConfig, role: Role) -> tuple[Rule, ...]:
    """Tensors of RemBertModel."""
    project = linear("encoder.embedding_hidden_mapping_in", "embedding/project")
    return (*EMBEDDINGS, *project, *blocks(), *POOLER)


def head(config: FamilyConfig) -> tuple[Rule, ...]:
    """Tensors of RemBertForCausalLM beside the bare model."""
    return (
        *linear("cls.predictions.dense", "head/transform"),
        *norm("cls.predictions.LayerNorm", "head/norm"),
        Rule("cls.predictions.decoder.weight", "head/kernel"),
        Rule("cls.predictions.decoder.bias", "head/bias"),
    )


REMBERT = Table(
    body=body,
    head=head,
    nested="rembert.",
    standalone=lambda config, role: Standalone(("rembert.", "")),
    ignored=IGNORED,
)

TABLES = {"rembert": REMBERT}
