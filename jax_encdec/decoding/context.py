"""What a logits processor may look at, and how numbers meet scores.

Axes: B batch, K beams, T target capacity, S source length, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike


class Context(NamedTuple):
    """What has been generated so far, and from what.

    Attributes:
        sequences: int32 `[B, K, T]`, decoder prompt first; meaningful up to `cur_len`.
        cur_len: int32 scalar, tokens so far, prompt included: the place of the token to choose.
        prompt_length: int32, scalar or `[B]`.
        max_length: int32, scalar or `[B]`, prompt included.
        source_ids: int32 `[B, S]`, None where ready encoder states are decoded from.
        source_mask: `[B, S]`, 0 or False at padding; None when nothing is padded.
    """

    sequences: Array
    cur_len: Array
    prompt_length: Array
    max_length: Array
    source_ids: Array | None = None
    source_mask: Array | None = None


def rows(value: ArrayLike | None) -> Array:
    """Shape a scalar or `[B]` so that it broadcasts against `[B, K, V]`."""
    return jnp.asarray(value).reshape(-1, 1, 1)


def table(tokens: ArrayLike | None) -> Array:
    """Shape a `[V]` or `[B, V]` table so that it broadcasts against `[B, K, V]`."""
    tokens = jnp.asarray(tokens)
    return tokens.reshape(-1, 1, tokens.shape[-1])


def lanes(scores: Array) -> tuple[Array, Array]:
    """Return indices `[B, 1, 1]` and `[1, K, 1]` that go with token ids `[B, K, n]`."""
    B, K, _ = scores.shape
    return jnp.arange(B)[:, None, None], jnp.arange(K)[None, :, None]
