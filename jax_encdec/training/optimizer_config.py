"""What the optimizer is to do: `OptimizerConfig`, and a `Group` of parameters that differ from it.

Plain data, checked when made; `optimizer.make_optimizer` turns it into arithmetic. None means "as
the preset has it, else as is usual"; `presets.resolve` fills it in. A group takes the parameters
that its pattern names; the first group that matches has them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal, get_args

from jax_encdec.errors import ConfigError, nearest

Name = Literal["adamw", "adafactor", "lion"]
Schedule = Literal["constant", "linear", "cosine", "inverse_sqrt", "noam"]

NAMES: tuple[str, ...] = get_args(Name)
SCHEDULES: tuple[str, ...] = get_args(Schedule)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Parameters with a rate, warm-up, schedule or decay of their own, or frozen for a while.

    Patterns match paths such as `decoder/segment_0/block_0/cross_attention/query/kernel`, or a
    folder above them: `encoder` is all of the encoder. `*` stands for any characters, `/` among
    them, `?` for one. A leaf that two sides share has two paths, and both must fall into one group.
    """

    pattern: str
    """Paths that belong to the group; several patterns are separated by commas."""
    name: str | None = None
    """What logs call it. None: the pattern."""
    learning_rate: float | None = None
    """Peak rate. None: the optimizer's."""
    factor: float = 1.0
    """Multiplies the rate, its own or the optimizer's."""
    warmup_steps: int | None = None
    """Steps over which the rate rises. None: the optimizer's."""
    schedule: Schedule | None = None
    """How the rate changes with the step. None: the optimizer's."""
    weight_decay: float | None = None
    """Decoupled weight decay. None: the optimizer's."""
    frozen_steps: int = 0
    """No update before this step, and the group's clock (warm-up, schedule, moments) starts there;
    -1: never trained."""
    required: bool = True
    """A pattern that matches nothing is an error."""

    def __post_init__(self):
        where = f"optimizer group {self.pattern!r}"
        if not self.patterns:
            raise ConfigError("an optimizer group needs a pattern such as 'encoder/*'; got ''")
        _at_least(where, "learning_rate", self.learning_rate, 0)
        _at_least(where, "factor", self.factor, 0)
        _whole(where, "warmup_steps", self.warmup_steps, 0)
        _one_of(where, "schedule", self.schedule, SCHEDULES)
        _at_least(where, "weight_decay", self.weight_decay, 0)
        _whole(where, "frozen_steps", self.frozen_steps, -1)

    @property
    def patterns(self) -> tuple[str, ...]:
        """The patterns, one by one."""
        return tuple(part.strip().strip("/") for part in self.pattern.split(",") if part.strip())

    @property
    def label(self) -> str:
        """What logs call the group."""
        return self.name or self.pattern


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, Adafactor or Lion, with a schedule and groups of parameters."""

    preset: str | None = None
    """A published recipe, by name, that fills in what is not given: liu-lapata, rothe,
    warm-starting, fresh-cross-attention. None: none."""
    name: Name | None = None
    """adamw (Loshchilov & Hutter 2019), adafactor (Shazeer & Stern 2018) or lion (Chen et al.
    2023). None: adamw."""
    learning_rate: float | None = None
    """Peak rate; Adafactor's is relative to each tensor's size. None: 5e-5; Adafactor 1e-3, Lion
    1e-5."""
    schedule: Schedule | None = None
    """How the rate changes after the warm-up, as PyTorch Transformers has it: constant; linear or
    cosine, which would reach zero one step after the last; inverse_sqrt, by the inverse square
    root. Or noam, learning_rate * min(n^-0.5, n * warmup_steps^-1.5) at step n. None: linear."""
    warmup_steps: int | None = None
    """Steps over which the rate rises linearly: from zero, the first step's, to the peak, that of
    the step after them. None: 0."""
    weight_decay: float | None = None
    """Decoupled weight decay of matrices and tables, never of biases and norms. None: 0."""
    b1: float | None = None
    """Decay of the first moment. None: 0.9; Adafactor keeps none."""
    b2: float | None = None
    """Decay of the second moment (Lion: of its only one). None: 0.999; Lion 0.99; Adafactor's
    follows from the step."""
    eps: float | None = None
    """Added to the root of the second moment, or to Adafactor's squares. None: 1e-8; Adafactor
    1e-30."""
    clip_norm: float | None = None
    """Largest norm of the gradient of all trained parameters together. 0: no clipping. None: 1."""
    divide_by_sqrt_hidden: bool | None = None
    """Divide every rate by the square root of the decoder's hidden size (Vaswani et al. 2017).
    None: no."""
    ema_decay: float | None = None
    """Decay of an average of the parameters, kept beside them and evaluated in their place.
    None or 0: no average."""
    groups: tuple[Group, ...] = ()
    """Parameters that are treated differently; the first group that matches has them."""

    def __post_init__(self):
        from jax_encdec.training.presets import PRESETS

        where = "optimizer"
        _one_of(where, "preset", self.preset, PRESETS)
        _one_of(where, "name", self.name, NAMES)
        _one_of(where, "schedule", self.schedule, SCHEDULES)
        _at_least(where, "learning_rate", self.learning_rate, 0)
        _whole(where, "warmup_steps", self.warmup_steps, 0)
        _at_least(where, "weight_decay", self.weight_decay, 0)
        for name in ("b1", "b2", "ema_decay"):
            _at_least(where, name, getattr(self, name), 0, below=1)
        _at_least(where, "eps", self.eps, 0)
        _at_least(where, "clip_norm", self.clip_norm, 0)
        object.__setattr__(self, "groups", tuple(self.groups))
        for group in self.groups:
            if not isinstance(group, Group):
                raise ConfigError(f"optimizer.groups must hold Groups; got {type(group).__name__}")
        labels = [group.label for group in self.groups]
        for label in labels:
            if labels.count(label) > 1:
                raise ConfigError(
                    f"two optimizer groups are called {label!r}; give each a name of its own"
                )


def filled(config: OptimizerConfig, other: OptimizerConfig) -> OptimizerConfig:
    """`config`, with what it leaves open taken from `other`, and other's groups after its own."""
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    taken = {group.label for group in config.groups}
    for name, value in values.items():
        if value is None:
            values[name] = getattr(other, name)
    values["groups"] = config.groups + tuple(g for g in other.groups if g.label not in taken)
    values["preset"] = None
    return OptimizerConfig(**values)


def _one_of(where: str, name: str, value: object, known: object) -> None:
    names = list(known)  # type: ignore[call-overload]
    if value is not None and value not in names:
        raise ConfigError(
            f"{where}: {name} must be one of {', '.join(names)}; got {value!r}"
            f"{nearest(str(value), names)}"
        )


def _at_least(
    where: str, name: str, value: object, least: float, below: float | None = None
) -> None:
    if value is None:
        return
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < least or (below and value >= below):  # type: ignore[arg-type, operator]
        bound = f" and below {below}" if below else ""
        raise ConfigError(f"{where}: {name} must be at least {least}{bound}; got {value!r}")


def _whole(where: str, name: str, value: object, least: int) -> None:
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(
            f"{where}: {name} must be a whole number of at least {least}; got {value!r}"
        )
