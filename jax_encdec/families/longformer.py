"""Longformer (Beltagy et al. 2020): RoBERTa whose tokens see a window, but for chosen ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

from jax_encdec.config import Attention, Block, Role, Segment
from jax_encdec.errors import ConfigError
from jax_encdec.families.base import periodic_segments
from jax_encdec.families.roberta import RobertaConfig


@dataclass(frozen=True, kw_only=True)
class LongformerConfig(RobertaConfig):
    """The published configuration, with the published defaults."""

    model_type: ClassVar[str] = "longformer"
    roles: ClassVar[tuple[Role, ...]] = ("encoder",)
    limits: ClassVar[str] = "memory grows with the square of the length, as in dense attention"

    vocab_size: int = 30522
    attention_window: int | tuple[int, ...] = 512
    """Width of the window in tokens, half of it on either side; one for all layers or one each."""

    def __post_init__(self):
        super().__post_init__()
        if len(self.windows) != self.num_hidden_layers:
            raise ConfigError(
                f"attention_window must be one integer or one for each of the "
                f"{self.num_hidden_layers} layers; got {len(self.windows)}"
            )
        if bad := [w for w in self.windows if w <= 0 or w % 2]:
            raise ConfigError(f"attention_window must be even and positive; got {bad[0]}")

    @property
    def windows(self) -> tuple[int, ...]:
        """The window of each layer."""
        given = self.attention_window
        return (given,) * self.num_hidden_layers if isinstance(given, int) else given

    def with_layers(self, role: Role, taken: tuple[int, ...]) -> Self:
        """A layer's window goes with it."""
        windows = tuple(self.windows[i] for i in taken)
        return self.replace(num_hidden_layers=len(taken), attention_window=windows)

    def segments(self, role: Role) -> tuple[Segment, ...]:
        """RoBERTa's blocks, each with its window."""
        own, mlp = super().segments(role)[0].blocks[0].sublayers
        attention = own.f
        assert isinstance(attention, Attention)

        def block(window: int) -> Block:
            f = replace(attention, window=window // 2, global_projections=True)
            return Block(sublayers=(replace(own, f=f), mlp))

        return periodic_segments([block(window) for window in self.windows])
