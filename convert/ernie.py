"""ERNIE's tensors: BERT's, and a table of tasks."""

from __future__ import annotations

from dataclasses import replace

from jax_encdec.config import Role
from jax_encdec.convert.bert import BERT
from jax_encdec.convert.bert import body as bert_body
from jax_encdec.convert.rules import Rule
from jax_encdec.convert.table import Standalone
from jax_encdec.families import FamilyConfig

_TASKS = "embeddings.task_type_embeddings.weight"


def body(config: FamilyConfig, role: Role) -> tuple[Rule, ...]:
    """Tensors of ErnieModel."""
    return (*bert_body(config, role), Rule(_TASKS, "embedding/task"))


ERNIE = replace(
    BERT,
    body=body,
    nested="ernie.",
    standalone=lambda config, role: Standalone(("ernie.", "")),
    ignored=(*BERT.ignored, (f"*{_TASKS}", "a table that use_task_id=false does not read")),
)

TABLES = {"ernie": ERNIE}
