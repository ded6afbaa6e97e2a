"""RoBERTa (Liu et al. 2019) and its namesakes: BERT whose positions start after the pad's row."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from jax_encdec.config import Head, Learned
from jax_encdec.errors import ConfigError
from jax_encdec.families.bert import BertConfig


@dataclass(frozen=True, kw_only=True)
class RobertaConfig(BertConfig):
    """The published configuration, with the published defaults."""

    model_type: ClassVar[str] = "roberta"

    vocab_size: int = 50265
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 2

    def __post_init__(self):
        super().__post_init__()
        pad, rows = self.pad_token_id, self.max_position_embeddings
        if pad is None or not 0 <= pad < rows - 1:
            raise ConfigError(
                f"pad_token_id is a row of the position table; expected 0..{rows - 2}, got {pad}"
            )

    def position_table(self) -> Learned:
        """Row `pad_token_id` belongs to pads; the first token reads the row after it."""
        assert self.pad_token_id is not None
        return Learned(
            length=self.max_position_embeddings,
            offset=self.pad_token_id + 1,
            pad_token_id=self.pad_token_id,
        )

    def head(self) -> Head:
        """RoBERTa's head is always GELU, whatever the blocks use."""
        return replace(super().head(), activation="gelu")


@dataclass(frozen=True, kw_only=True)
class XLMRobertaConfig(RobertaConfig):
    """XLM-RoBERTa (Conneau et al. 2020): RoBERTa's architecture under another name."""

    model_type: ClassVar[str] = "xlm-roberta"
    vocab_size: int = 30522


@dataclass(frozen=True, kw_only=True)
class CamembertConfig(RobertaConfig):
    """CamemBERT (Martin et al. 2020): RoBERTa's architecture under another name."""

    model_type: ClassVar[str] = "camembert"
    vocab_size: int = 30522
