"""ELECTRA (Clark et al. 2020): BERT behind narrow embeddings; the generator has BERT's head."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from jax_encdec.config import Embedding, Head, Kept, Role
from jax_encdec.families.bert import BertConfig


@dataclass(frozen=True, kw_only=True)
class ElectraConfig(BertConfig):
    """The published configuration, with the published defaults."""

    model_type: ClassVar[str] = "electra"

    embedding_size: int = 128
    hidden_size: int = 256
    num_attention_heads: int = 4
    intermediate_size: int = 1024

    def __post_init__(self):
        super().__post_init__()
        self.require(embedding_size=self.embedding_size)

    def embedding(self) -> Embedding:
        """Projected to the blocks' width where the two differ."""
        width = self.embedding_size
        return replace(super().embedding(), width=width, project=width != self.hidden_size)

    def head(self) -> Head:
        """The head is always GELU, whatever the blocks use."""
        return replace(super().head(), activation="gelu")

    def kept(self, role: Role) -> tuple[Kept, ...]:
        """No pooler, and one bias only."""
        return ()
