"""Diverse beam search: groups of beams, each shy of what the groups before it have just said.

After Vijayakumar et al. 2016, with Hamming diversity, by the rules of Transformers v4: the beams
form groups of equal size, each a beam search of its own. At every step the groups choose in turn,
and a token loses `diversity_penalty` for each beam of an earlier group that has chosen it at this
step. In the end all groups' hypotheses are ranked together.

Axes: B batch, K beams, G groups, T capacity, V vocabulary; a group has K / G beams.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jax_encdec.decoding import beams
from jax_encdec.decoding.beams import Beams
from jax_encdec.decoding.task import SearchOutput, Task, column
from jax_encdec.decoding.top_k import top_k


class Groups(NamedTuple):
    """The beams of every group, groups first: `[G, B, K / G, ...]`."""

    each: Beams

    @property
    def sequences(self) -> Array:
        """int32 `[B, K, T]`."""
        return _together(self.each.sequences)

    @property
    def parents(self) -> Array:
        """int32 `[B, K]`."""
        G, _, size = self.each.parents.shape
        return _together(self.each.parents + size * jnp.arange(G, dtype=jnp.int32)[:, None, None])

    @property
    def done(self) -> Array:
        """bool `[B, G]`."""
        return _together(self.each.done)


def first(task: Task, sequences: Array, parents: Array, stops: Array | None) -> Groups:
    """The beams before anything is generated; `sequences [B, K, T]` hold the prompts."""
    G = task.spec.num_beam_groups
    size = sequences.shape[1] // G
    parts = (sequences, parents % size, stops)
    parts = jax.tree.map(lambda x: _apart(x, G), parts)
    return Groups(jax.vmap(lambda part: beams.first(task, *part))(parts))


def grow(task: Task, now: Groups, logits: Array, cur_len: Array) -> tuple[Groups, Array]:
    """Advance every row by one token; also return the processed scores `[B, K, V]`."""
    G = task.spec.num_beam_groups
    B, _, V = logits.shape
    penalty = jnp.asarray(task.values.diversity_penalty).reshape(-1, 1, 1)

    def group(chosen: Array, part: tuple[Beams, Array]) -> tuple[Array, tuple[Beams, Array]]:
        own, scores = part
        scores = task.processed(
            jax.nn.log_softmax(scores, axis=-1),
            own.sequences,
            cur_len,
            diversity=penalty * chosen[:, None],
        )
        found = beams.candidates(task, own, scores)
        own = beams.advanced(task, own, found, cur_len, old=True)
        # A group that is done says pads, as there.
        token = column(own.sequences, cur_len)
        return chosen.at[jnp.arange(B)[:, None], token].add(1.0), (own, scores)

    # How many beams of the groups so far have chosen each token in this step.
    chosen = jnp.zeros((B, V), jnp.float32)
    _, (each, scores) = lax.scan(group, chosen, (now.each, _apart(logits, G)))
    return Groups(each), _together(scores)


def found(task: Task, last: Groups, cur_len: Array) -> SearchOutput:
    """The R best hypotheses of every row, of whatever group."""
    finished = jax.vmap(lambda part: beams.settled(task, part, cur_len))(last.each)
    history = finished.history
    if history is not None:
        G, _, size, _ = history.shape
        offset = size * jnp.arange(G, dtype=jnp.int32)[:, None, None, None]
        history = _together(jnp.where(history < 0, history, history + offset))
    _, order = top_k(_together(finished.scores), task.spec.num_return_sequences)
    return SearchOutput(
        sequences=beams.pick(_together(finished.sequences), order),
        sequences_scores=beams.pick(_together(finished.scores), order),
        lengths=beams.pick(_together(finished.lengths), order),
        beam_indices=None if history is None else beams.pick(history, order),
    )


def decided(task: Task, now: Groups, cur_len: Array) -> tuple[Array, Array]:
    """What will not change any more: `[B, 1, T]`, and how many of its tokens, `[B, 1]`."""
    live = jnp.broadcast_to(~now.each.done, now.each.parents.shape)
    finished = jax.tree.map(_together, now.each.finished)
    return beams.agreed(task, now.sequences, _together(live), finished, cur_len)


def _apart(x: Array, groups: int) -> Array:
    """`[B, K, ...]` -> `[G, B, K / G, ...]`."""
    return jnp.moveaxis(x.reshape(x.shape[0], groups, -1, *x.shape[2:]), 1, 0)


def _together(x: Any) -> Array:
    """`[G, B, n, ...]` -> `[B, G * n, ...]`."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])
