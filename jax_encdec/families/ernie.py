"""ERNIE (Sun et al. 2019, 2020): BERT, from version 2 on with an embedding of the task."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from jax_encdec.config import Embedding
from jax_encdec.families.bert import BertConfig


@dataclass(frozen=True, kw_only=True)
class ErnieConfig(BertConfig):
    """The published configuration, with the published defaults."""

    model_type: ClassVar[str] = "ernie"
    limits: ClassVar[str] = "task 0 only"

    task_type_vocab_size: int = 3
    use_task_id: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.use_task_id:
            self.require(task_type_vocab_size=self.task_type_vocab_size)

    def embedding(self) -> Embedding:
        """With a table of tasks, of which the first is everyone's default."""
        tasks = self.task_type_vocab_size if self.use_task_id else 0
        return replace(super().embedding(), tasks=tasks)
