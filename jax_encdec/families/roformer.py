"""RoFormer (Su et al. 2021): BERT with rotated queries and keys, behind embeddings of any width."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from jax_encdec.config import (
    Attention,
    Convolution,
    Embedding,
    FeedForward,
    Kept,
    Role,
    Rotary,
    Segment,
)
from jax_encdec.families.bert import BertConfig


@dataclass(frozen=True, kw_only=True)
class RoFormerConfig(BertConfig):
    """The published configuration, with the published defaults."""

    model_type: ClassVar[str] = "roformer"

    vocab_size: int = 50000
    embedding_size: int | None = None
    """None: as `hidden_size`."""
    max_position_embeddings: int = 1536
    rotary_value: bool = False

    def __post_init__(self):
        super().__post_init__()
        self.require(embedding_size=self.embedding().width)

    def embedding(self) -> Embedding:
        """Tokens and types, widened where they are narrower than the trunk."""
        width = self.hidden_size if self.embedding_size is None else self.embedding_size
        project = width != self.hidden_size
        return replace(super().embedding(), width=width, project=project, position=None)

    def kept(self, role: Role) -> tuple[Kept, ...]:
        """The sines and cosines, which are computed here, are published with the weights."""
        # A pooler is no part of this model, but an untied head's second bias is.
        usual = super().kept(role) if role == "decoder" else ()
        shape = self.max_position_embeddings, self.hidden_size // self.num_attention_heads
        return *usual, Kept(name="positions", shape=shape, sinusoidal=True)

    def segments(self, role: Role) -> tuple[Segment, ...]:
        """BERT's blocks, whose self-attention sees positions."""
        rotary = Rotary(interleaved=True, values=self.rotary_value)

        def rotated(f: Attention | FeedForward | Convolution):
            own = isinstance(f, Attention) and f.source == "self"
            return replace(f, rotary=rotary) if own else f

        (segment,) = super().segments(role)
        (block,) = segment.blocks
        sublayers = tuple(replace(sub, f=rotated(sub.f)) for sub in block.sublayers)
        return (replace(segment, blocks=(replace(block, sublayers=sublayers),)),)
