"""Marian's tensors are named as BART's; its whole model publishes no tables of positions."""

from __future__ import annotations

from dataclasses import replace

from jax_encdec.convert import bart
from jax_encdec.convert.rules import Rule
from jax_encdec.convert.table import Table
from jax_encdec.families import FamilyConfig


def whole(config: FamilyConfig) -> tuple[Rule, ...]:
    """Tensors of MarianMTModel; old files do hold the tables."""
    return tuple(
        replace(rule, fallback=rule.fallback or "embed_positions" in rule.tensor)
        for rule in bart.whole(config)
    )


MARIAN: Table = replace(bart.BART, whole=whole)

TABLES = {"marian": MARIAN}
