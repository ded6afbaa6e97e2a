"""ELECTRA's tensors: BERT's layers, a projection before them, the generator's head."""

from __future__ import annotations

from jax_encdec.config import Role
from jax_encdec.convert.bert import EMBEDDINGS, IGNORED, blocks
from jax_encdec.convert.rules import Rule, linear, norm
from jax_encdec.convert.table import OTHER_HEAD, Standalone, Table
from jax_encdec.families import FamilyConfig


def body(config: FamilyConfig, role: Role) -> tuple[Rule, ...]:
    """Tensors of ElectraModel."""
    return (*EMBEDDINGS, *linear("embeddings_project", "embedding/project"), *blocks())


def head(config: FamilyConfig) -> tuple[Rule, ...]:
    """Tensors of ElectraForCausalLM, and of the generator, beside the bare model."""
    return (
        *linear("generator_predictions.dense", "head/transform"),
        *norm("generator_predictions.LayerNorm", "head/norm"),
        Rule("generator_lm_head.weight", "head/kernel"),
        Rule("generator_lm_head.bias", "head/bias"),
    )


ELECTRA = Table(
    body=body,
    head=head,
    nested="electra.",
    standalone=lambda config, role: Standalone(("electra.", "")),
    ignored=(
        *IGNORED,
        ("discriminator_predictions.*", OTHER_HEAD),
        ("sequence_summary.*", OTHER_HEAD),
    ),
)

TABLES = {"electra": ELECTRA}
