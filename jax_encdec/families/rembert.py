"""RemBERT (Chung et al. 2021): BERT with narrow embeddings going in and wide ones coming out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from jax_encdec.config import Embedding, Head, Kept, Role
from jax_encdec.families.bert import BertConfig


@dataclass(frozen=True, kw_only=True)
class RemBertConfig(BertConfig):
    """The published configuration, with the published defaults."""

    model_type: ClassVar[str] = "rembert"

    vocab_size: int = 250300
    hidden_size: int = 1152
    num_hidden_layers: int = 32
    num_attention_heads: int = 18
    input_embedding_size: int = 256
    output_embedding_size: int = 1664
    intermediate_size: int = 4608
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    bos_token_id: int | None = 312
    eos_token_id: int | tuple[int, ...] | None = 313
    tie_word_embeddings: bool = False

    def __post_init__(self):
        super().__post_init__()
        self.require(
            input_embedding_size=self.input_embedding_size,
            output_embedding_size=self.output_embedding_size,
        )

    @property
    def ties_head(self) -> bool:
        """Never: going in and coming out are decoupled, whatever `tie_word_embeddings` says."""
        return False

    def embedding(self) -> Embedding:
        """Always projected, also to the same width."""
        return replace(super().embedding(), width=self.input_embedding_size, project=True)

    def head(self) -> Head:
        """The transform leads to the output embeddings' width."""
        return replace(super().head(), width=self.output_embedding_size)

    def kept(self, role: Role) -> tuple[Kept, ...]:
        """The bias of the logits is published once."""
        return super().kept(role) if role == "encoder" else ()
