"""Greedy search and sampling: lanes that never mix, each taking its best or a drawn token.

Axes: B batch, K lanes, T capacity, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jax_encdec.decoding.task import SearchOutput, Task, column, gumbel, set_column
from jax_encdec.decoding.top_k import first_largest


class Single(NamedTuple):
    """K lanes per row that never mix."""

    sequences: Array  # int32 [B, K, T]
    parents: Array  # int32 [B, K]: each lane continues itself
    scores: Array  # float32 [B, K]
    lengths: Array  # int32 [B, K]
    stops: Array | None  # int32 [B, K], how much of a stop string has been said
    done: Array  # bool [B, K]


def first(task: Task, sequences: Array, parents: Array, stops: Array | None) -> Single:
    """The lanes before anything is generated; `sequences [B, K, T]` hold the prompts."""
    shape = sequences.shape[:2]
    return Single(
        sequences=sequences,
        parents=parents,
        scores=jnp.zeros(shape, jnp.float32),
        lengths=jnp.broadcast_to(task.prompt_length, shape),
        stops=stops,
        done=jnp.broadcast_to(task.prompt_length >= task.max_length, shape),
    )


def grow(task: Task, now: Single, logits: Array, cur_len: Array) -> tuple[Single, Array]:
    """Decide one token per lane from `logits [B, K, V]`; also return the processed scores."""
    scores = task.processed(logits, now.sequences, cur_len)
    keys = task.rows.keys
    noise = 0.0 if keys is None else gumbel(keys, cur_len, scores.shape[-1])
    token = first_largest(scores + noise)  # [B, K]
    chosen = jnp.take_along_axis(scores, token[..., None], axis=-1)[..., 0]
    total = jax.nn.logsumexp(scores, axis=-1)
    # When everything is banned there is no distribution; the score says so without a NaN.
    gained = jnp.where(jnp.isfinite(total), chosen - total, -jnp.inf)
    held = task.held(now.done, cur_len)
    ended, stops = task.heard(now.stops, token)
    # A lane that is held keeps what stands there: the next token of its prompt, or a pad.
    token = jnp.where(held, column(now.sequences, cur_len), token)
    length = cur_len + 1
    lanes = Single(
        sequences=set_column(now.sequences, token, cur_len),
        parents=now.parents,
        scores=jnp.where(held, now.scores, now.scores + gained),
        lengths=jnp.where(held, now.lengths, length),
        stops=None if now.stops is None or stops is None else jnp.where(held, now.stops, stops),
        done=now.done | (~held & ended) | (length >= task.max_length),
    )
    return lanes, scores


def found(task: Task, last: Single, cur_len: Array) -> SearchOutput:
    """The lanes as they are, finished or not."""
    return SearchOutput(last.sequences, last.scores, last.lengths)


def decided(task: Task, now: Single, cur_len: Array) -> tuple[Array, Array]:
    """What will not change any more: `[B, K, T]`, and how many of its tokens, `[B, K]`."""
    return now.sequences, now.lengths
