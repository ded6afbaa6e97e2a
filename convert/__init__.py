"""Published checkpoints to parameter trees and back, without PyTorch."""

from __future__ import annotations

from collections.abc import Mapping

from jax_encdec.convert.bart import BART
from jax_encdec.convert.bert import BERT, ROBERTA
from jax_encdec.convert.gpt2 import GPT2
from jax_encdec.convert.tables import Table

TABLES: Mapping[str, Table] = {
    "bert": BERT,
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
    "camembert": ROBERTA,
    "gpt2": GPT2,
    "bart": BART,
}
"""Each family's table, by its published `model_type`."""
