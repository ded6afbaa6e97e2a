"""RoBERTa with norms before its sublayers (Ott et al. 2019; Wettig et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jax_encdec.families.roberta import RobertaConfig


@dataclass(frozen=True, kw_only=True)
class RobertaPreLayerNormConfig(RobertaConfig):
    """The published configuration, with the published defaults."""

    model_type: ClassVar[str] = "roberta-prelayernorm"
    pre_norm: ClassVar[bool] = True
