"""Tiny published configurations of BART's kin; see published.py."""

from __future__ import annotations

CONFIGS = {}
MODELS = {}
WHOLE = {}
