"""mT5's and UMT5's tensors, which are T5's."""

from __future__ import annotations

from jax_encdec.convert.t5 import T5

TABLES = {"mt5": T5, "umt5": T5}
