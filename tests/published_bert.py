"""Tiny published configurations of BERT's kin; see published.py."""

from __future__ import annotations

CONFIGS = {}
MODELS = {}
WHOLE = {}
