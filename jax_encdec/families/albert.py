"""ALBERT (Lan et al. 2020): BERT behind narrow embeddings, whose layers share parameters.

Layers fall into `num_hidden_groups`; those of one group are the same `inner_group_num` blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from jax_encdec.config import Embedding, Role, Segment
from jax_encdec.errors import ConfigError
from jax_encdec.families.bert import BertConfig

_MAX_INNER = 100
"""Published are groups of one."""


@dataclass(frozen=True, kw_only=True)
class AlbertConfig(BertConfig):
    """The published configuration, with the published defaults."""

    model_type: ClassVar[str] = "albert"
    roles: ClassVar[tuple[Role, ...]] = ("encoder",)
    drops_mlp: ClassVar[bool] = False

    vocab_size: int = 30000
    embedding_size: int = 128
    hidden_size: int = 4096
    num_hidden_groups: int = 1
    num_attention_heads: int = 64
    intermediate_size: int = 16384
    inner_group_num: int = 1
    hidden_act: str = "gelu_new"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    bos_token_id: int | None = 2
    eos_token_id: int | tuple[int, ...] | None = 3

    def __post_init__(self):
        super().__post_init__()
        self.require(
            embedding_size=self.embedding_size,
            num_hidden_groups=self.num_hidden_groups,
            inner_group_num=self.inner_group_num,
        )
        if self.num_hidden_groups > self.num_hidden_layers:
            raise ConfigError(
                f"num_hidden_groups must be at most num_hidden_layers; got "
                f"{self.num_hidden_groups} groups of {self.num_hidden_layers} layers"
            )
        if self.inner_group_num > _MAX_INNER:
            raise ConfigError(
                f"inner_group_num must be at most {_MAX_INNER}; got {self.inner_group_num}"
            )

    def embedding(self) -> Embedding:
        """Always projected, also to the same width."""
        return replace(super().embedding(), width=self.embedding_size, project=True)

    def segments(self, role: Role) -> tuple[Segment, ...]:
        """One segment per group."""
        layers, groups = self.num_hidden_layers, self.num_hidden_groups
        # Uneven groups end where this rounding of the authors puts them.
        of = [int(layer / (layers / groups)) for layer in range(layers)]
        blocks = super().segments(role)[0].blocks * self.inner_group_num
        return tuple(
            Segment(blocks=blocks, repeat=of.count(group), share=True) for group in range(groups)
        )
