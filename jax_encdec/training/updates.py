"""The three optimizers, a leaf at a time: gradient and statistics in, direction and statistics out.

A leaf may be stacked `[layers, ...]`, and an attention's kernel has its heads apart; what acts per
tensor (Adafactor) acts per *published* tensor, one layer's, with heads and head_dim as one
dimension. That follows from the leaf's logical axes, never from its rank. Everything is
elementwise or a reduction, so that a compiler makes one pass over a leaf of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from jax_encdec.layers import Param

Statistics = Mapping[str, jax.Array]
"""A leaf's statistics by name, float32."""

MIN_FACTORED = 128
"""Adafactor factors matrices whose sides are both at least this long."""
_MIN_SCALE = 1e-3
_DECAY_EXPONENT = 0.8
_HEADS = ("heads", "kv_heads")


@dataclass(frozen=True)
class Clock:
    """What of the step an update needs, float32 scalars."""

    number: jax.Array
    """Updates since the leaf thawed, this one included."""
    thawed: jax.Array | None
    """Boolean scalar, False while the leaf is frozen; None: never frozen."""
    b1: float
    b2: float
    eps: float


# The published shape of a leaf --------------------------------------------------------------------


def dimensions(param: Param) -> tuple[tuple[int, ...], ...]:
    """The published tensor's dimensions, each the indices of the leaf's axes that make it up."""
    out: list[tuple[int, ...]] = []
    for i, axis in enumerate(param.axes):
        if i == 0 and axis == "layers":
            continue
        if axis == "head_dim" and i and param.axes[i - 1] in _HEADS:
            out[-1] = (i - 1, i)
        else:
            out.append((i,))
    return tuple(out)


def decays(path: tuple[str, ...], param: Param) -> bool:
    """Whether weight decay applies: to matrices and tables, not to biases and norms."""
    return len(dimensions(param)) > 1 and "bucket_bias" not in path


def factored(param: Param) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The axes of the two longest dimensions, if Adafactor factors the leaf, shorter one first."""
    size = {axes: math.prod(param.shape[i] for i in axes) for axes in dimensions(param)}
    longest = sorted(size, key=lambda axes: size[axes])[-2:]
    if len(longest) < 2 or size[longest[0]] < MIN_FACTORED:
        return None
    return longest[0], longest[1]


def declare(name: str, param: Param) -> dict[str, Param]:
    """The statistics that optimizer `name` keeps for a leaf, with their shapes and axes."""
    zeros = replace(param, init="zeros")
    if name == "lion":
        return {"mu": zeros}
    if name == "adamw":
        return {"mu": zeros, "nu": zeros}
    if (pair := factored(param)) is None:
        return {"nu": zeros}
    return {"row": _without(zeros, pair[1]), "column": _without(zeros, pair[0])}


def _without(param: Param, dropped: tuple[int, ...]) -> Param:
    kept = [i for i in range(len(param.shape)) if i not in dropped]
    shape = tuple(param.shape[i] for i in kept)
    return replace(param, shape=shape, axes=tuple(param.axes[i] for i in kept))


# Directions ---------------------------------------------------------------------------------------


def direction(
    name: str, param: Param, clock: Clock, g: jax.Array, p: jax.Array, old: Statistics
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Where a leaf should go, before the rate and weight decay, and its new statistics.

    Args:
        name: adamw, adafactor or lion.
        param: the leaf's declaration.
        clock: of the leaf's group.
        g, p: gradient and parameter, float32, of the leaf's shape.
        old: statistics as `declare` has them.
    """
    if name == "adamw":
        return _adamw(clock, g, old)
    if name == "lion":
        return _lion(clock, g, old)
    return _adafactor(param, clock, g, p, old)


def _adamw(c: Clock, g: jax.Array, old: Statistics) -> tuple[jax.Array, dict[str, jax.Array]]:
    mu = _kept(c, c.b1 * old["mu"] + (1.0 - c.b1) * g, old["mu"])
    # Not as square(g), which the norm has already: XLA would store it to share it.
    nu = _kept(c, c.b2 * old["nu"] + ((1.0 - c.b2) * g) * g, old["nu"])
    first = 1.0 / (1.0 - c.b1**c.number)
    second = 1.0 / (1.0 - c.b2**c.number)
    return first * mu / (jnp.sqrt(second * nu) + c.eps), {"mu": mu, "nu": nu}


def _lion(c: Clock, g: jax.Array, old: Statistics) -> tuple[jax.Array, dict[str, jax.Array]]:
    way = jnp.sign(c.b1 * old["mu"] + (1.0 - c.b1) * g)
    return way, {"mu": _kept(c, c.b2 * old["mu"] + (1.0 - c.b2) * g, old["mu"])}


def _kept(c: Clock, new: jax.Array, old: jax.Array) -> jax.Array:
    """What a statistic becomes: as it was while the leaf is frozen."""
    return new if c.thawed is None else jnp.where(c.thawed, new, old)


def _adafactor(
    param: Param, c: Clock, g: jax.Array, p: jax.Array, old: Statistics
) -> tuple[jax.Array, dict[str, jax.Array]]:
    keep = 1.0 - c.number**-_DECAY_EXPONENT
    square = (1.0 * g) * g + c.eps
    whole = tuple(i for axes in dimensions(param) for i in axes)  # of one layer

    def mean(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
        return jnp.mean(x, axis=axes, keepdims=True)

    if (pair := factored(param)) is None:
        nu = _kept(c, keep * old["nu"] + (1.0 - keep) * square, old["nu"])
        new = {"nu": nu}
        way = g * jax.lax.rsqrt(nu)
    else:
        short, long = pair
        row, column = jnp.expand_dims(old["row"], long), jnp.expand_dims(old["column"], short)
        row = _kept(c, keep * row + (1.0 - keep) * mean(square, long), row)
        column = _kept(c, keep * column + (1.0 - keep) * mean(square, short), column)
        new = {"row": jnp.squeeze(row, long), "column": jnp.squeeze(column, short)}
        way = g * jax.lax.rsqrt(row / mean(row, short)) * jax.lax.rsqrt(column)
    way = way / jnp.maximum(1.0, jnp.sqrt(mean(jnp.square(way), whole)))
    return way * jnp.maximum(_MIN_SCALE, jnp.sqrt(mean(jnp.square(p), whole))), new
