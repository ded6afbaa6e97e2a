"""BERT for sequence generation (Rothe et al. 2020): no token types, a head without a transform."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from jax_encdec.config import Head, Kept, Role
from jax_encdec.families.bert import BertKin


@dataclass(frozen=True, kw_only=True)
class BertGenerationConfig(BertKin):
    """The published configuration, with the published defaults."""

    model_type: ClassVar[str] = "bert-generation"

    vocab_size: int = 50358
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    bos_token_id: int | None = 2
    eos_token_id: int | tuple[int, ...] | None = 1

    def head(self) -> Head:
        """Logits are read off the last states."""
        return replace(super().head(), transform=None)

    def kept(self, role: Role) -> tuple[Kept, ...]:
        """No pooler."""
        return super().kept(role) if role == "decoder" else ()
