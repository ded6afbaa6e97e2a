"""Tiny published configurations of other families (T5, DeBERTa, ...); see published.py."""

from __future__ import annotations

CONFIGS = {}
MODELS = {}
WHOLE = {}
