"""RoFormer's tensors: BERT's, a projection and a table of sines and cosines."""

from __future__ import annotations

from jax_encdec.config import Role
from jax_encdec.convert import bert
from jax_encdec.convert.rules import Rule, linear
from jax_encdec.convert.table import Standalone, Table
from jax_encdec.families import FamilyConfig


def body(config: FamilyConfig, role: Role) -> tuple[Rule, ...]:
    """Tensors of RoFormerModel."""
    return (
        *bert.body(config, role),
        *linear("embeddings_project", "embedding/project"),
        Rule("encoder.embed_positions.weight", "kept/positions"),
    )


ROFORMER = Table(
    body=body,
    head=bert.bert_head,
    nested="roformer.",
    standalone=lambda config, role: Standalone(("roformer.", "")),
    ignored=(*bert.IGNORED[:-1], ("*pooler.dense.*", "a pooler, which the model has not")),
)

TABLES = {"roformer": ROFORMER}
