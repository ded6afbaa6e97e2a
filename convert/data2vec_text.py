"""data2vec's tensors: RoBERTa's."""

from __future__ import annotations

from dataclasses import replace

from jax_encdec.convert.roberta import ROBERTA
from jax_encdec.convert.table import Standalone

DATA2VEC_TEXT = replace(
    ROBERTA,
    nested="data2vec_text.",
    standalone=lambda config, role: Standalone(("data2vec_text.", "")),
)

TABLES = {"data2vec-text": DATA2VEC_TEXT}
