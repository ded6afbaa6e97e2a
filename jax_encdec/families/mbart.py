"""mBART (Liu et al. 2020): BART with pre-norm blocks; the target's language code opens it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jax_encdec.families.bart import BartConfig


@dataclass(frozen=True, kw_only=True)
class MBartConfig(BartConfig):
    """The published configuration, with the published defaults."""

    model_type: ClassVar[str] = "mbart"
    whole_architecture: ClassVar[str | None] = "MBartForConditionalGeneration"
    wraps_labels: ClassVar[bool] = True
    pre_norm: ClassVar[bool] = True

    decoder_start_token_id: int | None = None
