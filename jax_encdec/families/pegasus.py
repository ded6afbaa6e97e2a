"""Pegasus (Zhang et al. 2020): BART with pre-norm blocks and fixed sinusoidal positions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from jax_encdec.config import Embedding, Learned, Role
from jax_encdec.families.bart import BartConfig


@dataclass(frozen=True, kw_only=True)
class PegasusConfig(BartConfig):
    """The published configuration, with the published defaults."""

    model_type: ClassVar[str] = "pegasus"
    whole_architecture: ClassVar[str | None] = "PegasusForConditionalGeneration"
    pre_norm: ClassVar[bool] = True

    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = 1
    decoder_start_token_id: int | None = 0
    forced_eos_token_id: int | tuple[int, ...] | None = 1

    def position_table(self) -> Learned:
        """A table of sines and cosines."""
        return Learned(length=self.max_position_embeddings, fixed=True)

    def embedding(self, role: Role) -> Embedding:
        """Tokens and positions, not normalised."""
        return replace(super().embedding(role), norm=None)
