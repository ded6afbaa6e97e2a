"""Longformer's tensors: RoBERTa's, and projections for tokens that attend globally."""

from __future__ import annotations

from jax_encdec.config import Role
from jax_encdec.convert import bert
from jax_encdec.convert.rules import Rule, linear
from jax_encdec.convert.table import NO_HEAD, Standalone, Table
from jax_encdec.families import FamilyConfig


def body(config: FamilyConfig, role: Role) -> tuple[Rule, ...]:
    """Tensors of LongformerModel."""
    own, leaf = "encoder.layer.{}.attention.self", "{}/self_attention"
    return (
        *bert.body(config, role),
        *linear(f"{own}.query_global", f"{leaf}/query_global"),
        *linear(f"{own}.key_global", f"{leaf}/key_global"),
        *linear(f"{own}.value_global", f"{leaf}/value_global"),
    )


LONGFORMER = Table(
    body=body,
    head=lambda config: (),
    nested="longformer.",
    standalone=lambda config, role: Standalone(("longformer.", "")),
    ignored=(*bert.IGNORED, ("lm_head.*", NO_HEAD)),
)

TABLES = {"longformer": LONGFORMER}
