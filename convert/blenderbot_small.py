"""Blenderbot-small's tensors are named as BART's."""

from __future__ import annotations

from jax_encdec.convert.bart import BART

TABLES = {"blenderbot-small": BART}
