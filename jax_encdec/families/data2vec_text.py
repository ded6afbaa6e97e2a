"""data2vec for text (Baevski et al. 2022): RoBERTa's architecture, trained otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jax_encdec.families.roberta import RobertaConfig


@dataclass(frozen=True, kw_only=True)
class Data2VecTextConfig(RobertaConfig):
    """The published configuration, with the published defaults."""

    model_type: ClassVar[str] = "data2vec-text"
    vocab_size: int = 30522
