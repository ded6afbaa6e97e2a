"""MPNet (Song et al. 2020): BERT with a bucketed relative position bias, positions from row 2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jax_encdec.config import BucketBias, Learned, Role
from jax_encdec.errors import ConfigError
from jax_encdec.families.bert import BertKin

_PAD = 1  # whatever the configuration says
_BUCKETS = 32


@dataclass(frozen=True, kw_only=True)
class MPNetConfig(BertKin):
    """The published configuration, with the published defaults."""

    model_type: ClassVar[str] = "mpnet"
    roles: ClassVar[tuple[Role, ...]] = ("encoder",)
    bucket_bias: ClassVar[BucketBias | None] = BucketBias(buckets=_BUCKETS, max_distance=128)

    vocab_size: int = 30527
    relative_attention_num_buckets: int = _BUCKETS
    pad_token_id: int | None = _PAD
    bos_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 2

    def __post_init__(self):
        super().__post_init__()
        if self.relative_attention_num_buckets != _BUCKETS:
            raise ConfigError(
                f"relative_attention_num_buckets must be {_BUCKETS}, which the published model "
                f"computes with whatever its table's size; got "
                f"{self.relative_attention_num_buckets}"
            )
        if self.max_position_embeddings <= _PAD + 1:
            raise ConfigError(
                f"max_position_embeddings must exceed the {_PAD + 1} rows that no token reads; "
                f"got {self.max_position_embeddings}"
            )

    def position_table(self) -> Learned:
        """Pads do not advance positions, as in RoBERTa."""
        length = self.max_position_embeddings
        return Learned(length=length, offset=_PAD + 1, pad_token_id=_PAD)
