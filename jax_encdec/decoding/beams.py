"""Beam search and beam sampling, by the rules of Transformers v5, row by row.

A step ranks the continuations of a row's K live beams. The best K that do not end live on; of the
first K, those that end compete with the finished hypotheses. A row is done when nothing that lives
can still beat the worst of K finished ones.

Axes: B batch, K beams, T capacity, V vocabulary, C candidates per row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jax_encdec.decoding.task import (
    EARLY_STOPPING,
    NEVER_FINISHED,
    SearchOutput,
    Task,
    gumbel,
    keep,
    set_column,
)
from jax_encdec.decoding.top_k import top_k


class Running(NamedTuple):
    """The K live beams of every row, best first."""

    sequences: Array  # int32 [B, K, T]
    scores: Array  # float32 [B, K], sums of log-probabilities
    parents: Array  # int32 [B, K], which beam of the step before each one continues
    stops: Array | None  # int32 [B, K], how much of a stop string has been said
    history: Array | None  # int32 [B, K, T], which beam decided the token at t


class Finished(NamedTuple):
    """The K best finished hypotheses of every row, best first."""

    sequences: Array  # int32 [B, K, T]
    scores: Array  # float32 [B, K], length-normalised
    lengths: Array  # int32 [B, K]
    filled: Array  # bool [B, K], false: an empty slot
    history: Array | None  # int32 [B, K, T]


class Beams(NamedTuple):
    """Live beams and finished hypotheses; nothing more can finish in a row that is done."""

    running: Running
    finished: Finished
    done: Array  # bool [B, 1]

    @property
    def sequences(self) -> Array:
        """int32 `[B, K, T]`."""
        return self.running.sequences

    @property
    def parents(self) -> Array:
        """int32 `[B, K]`."""
        return self.running.parents


def first(task: Task, sequences: Array, parents: Array, stops: Array | None) -> Beams:
    """The beams before anything is generated; `sequences [B, K, T]` hold the prompts."""
    shape = sequences.shape[:2]
    empty = jnp.full(shape, NEVER_FINISHED, jnp.float32)
    history = jnp.full(sequences.shape, -1, jnp.int32) if task.traced_back else None
    finished = Finished(
        sequences=sequences,
        scores=empty,
        lengths=jnp.broadcast_to(task.prompt_length, shape),
        filled=jnp.zeros(shape, bool),
        history=history,
    )
    # All beams are the same prompt: only the first may speak, or all would say the same.
    running = Running(sequences, empty.at[:, 0].set(0.0), parents, stops, history)
    full = task.prompt_length >= task.max_length
    return Beams(running, finished, jnp.broadcast_to(full, (shape[0], 1)))


def grow(task: Task, now: Beams, logits: Array, cur_len: Array) -> tuple[Beams, Array]:
    """Advance every row by one token; also return the processed scores `[B, K, V]`."""
    keys, count = task.rows.keys, _count(task, now)
    if keys is None and task.unprocessed:
        # Only the candidates' log-probabilities are needed, not those of the whole vocabulary.
        best, token = top_k(logits, min(count, logits.shape[-1]))
        top = jnp.max(logits, axis=-1, keepdims=True)
        best = best - top - jnp.log(jnp.sum(jnp.exp(logits - top), axis=-1, keepdims=True))
        return advanced(task, now, _merged(now, best, best, token, count), cur_len), logits
    scores = task.processed(jax.nn.log_softmax(logits, axis=-1), now.sequences, cur_len)
    noise = None if keys is None else gumbel(keys, cur_len, scores.shape[-1])
    return advanced(task, now, candidates(task, now, scores, noise), cur_len), scores


class Candidates(NamedTuple):
    """The best continuations of a row's beams, best first, or in the order drawn."""

    scores: Array  # float32 [B, C], sums of log-probabilities
    beam: Array  # int32 [B, C], which beam is continued
    token: Array  # int32 [B, C]


def candidates(task: Task, now: Beams, scores: Array, noise: Array | None = None) -> Candidates:
    """The best of the `K * V` continuations, given the processed scores `[B, K, V]`.

    With Gumbel noise of that shape a draw without replacement from their softmax.
    """
    count = _count(task, now)
    ranked = scores if noise is None else scores + noise
    ranked, token = top_k(ranked, min(count, scores.shape[-1]))
    own = ranked if noise is None else jnp.take_along_axis(scores, token, axis=-1)
    return _merged(now, ranked, own, token, count)


def _count(task: Task, now: Beams) -> int:
    return max(2, 1 + task.spec.num_eos) * now.running.scores.shape[1]


def _merged(now: Beams, ranked: Array, own: Array, token: Array, count: int) -> Candidates:
    """Of the best of every beam, `[B, K, n]`, the best of the row, by `ranked`.

    This gives the order, ties included, that ranking all continuations at once would give.
    """
    B, K, n = token.shape
    before = now.running.scores[:, :, None]
    _, flat = top_k((ranked + before).reshape(B, K * n), min(count, K * n))
    scores, token = (
        jnp.take_along_axis(x.reshape(B, K * n), flat, axis=1) for x in (own + before, token)
    )
    return Candidates(scores, (flat // n).astype(jnp.int32), token)


def advanced(
    task: Task, now: Beams, found: Candidates, cur_len: Array, *, old: bool = False
) -> Beams:
    """Advance every row by one token, given the candidates for it.

    Args:
        old: by the rules that Transformers v4 has for groups: at the maximum length nothing
            finishes by itself (`settled` sees to that), and the best candidate, be it one that has
            just ended, stands for what the row may still find.
    """
    running, finished = now.running, now.finished
    K = running.scores.shape[1]
    early = jnp.asarray(task.values.early_stopping).reshape(-1, 1)
    penalty = jnp.asarray(task.values.length_penalty).reshape(-1, 1)
    ranked, beam, token = found
    length = cur_len + 1
    full_length = length >= task.max_length  # [1 or B, 1]
    stops = None if running.stops is None else jnp.take_along_axis(running.stops, beam, axis=1)
    hit, stops = task.heard(stops, token)  # [B, C]
    hit = hit if old else hit | full_length

    # Running: the K best that did not end.
    live, order = top_k(ranked + jnp.where(hit, NEVER_FINISHED, 0.0), K)
    parents = jnp.take_along_axis(beam, order, axis=1)
    new_running = Running(
        sequences=_extend(running.sequences, parents, pick(token, order), cur_len),
        scores=live,
        parents=parents,
        stops=None if stops is None else pick(stops, order),
        history=_extend(running.history, parents, parents, cur_len),
    )

    # Finished: of the first K candidates, those that ended, merged with the ones we had.
    best, ended = beam[:, :K], hit[:, :K]
    new_finished = _merge(
        finished,
        Finished(
            sequences=_extend(running.sequences, best, token[:, :K], cur_len),
            scores=_closed(ended, _normalised(task, ranked[:, :K], length)),
            lengths=jnp.full(ended.shape, length, jnp.int32),
            filled=ended,
            history=_extend(running.history, best, best, cur_len),
        ),
    )

    # Done: nothing that still runs can beat the worst finished hypothesis, or no room is left.
    # With early_stopping "never" the best case is judged at full length, which can only be
    # better than now when longer means cheaper.
    hopeful = (early == EARLY_STOPPING["never"]) & (penalty > 0.0)
    hope = ranked[:, :1] if old else live[:, :1]
    hope = _normalised(task, hope, jnp.where(hopeful, task.max_length, length))
    worst = jnp.min(new_finished.scores, axis=1, keepdims=True)
    worst = jnp.where(new_finished.filled, worst, NEVER_FINISHED)
    done = ~jnp.any(hope > worst, axis=1, keepdims=True)
    full = jnp.all(new_finished.filled, axis=1, keepdims=True)
    done |= full & (early == EARLY_STOPPING[True])
    if not old:
        done |= full_length

    held = task.held(now.done, cur_len)
    running, finished = keep(held, (running, finished), (new_running, new_finished))
    itself = jnp.broadcast_to(jnp.arange(K, dtype=jnp.int32), parents.shape)
    return Beams(
        running=running._replace(parents=jnp.where(held, itself, parents)),
        finished=finished,
        done=now.done | (done & ~held),
    )


def found(task: Task, last: Beams, cur_len: Array) -> SearchOutput:
    """The R best hypotheses of every row."""
    best = settled(task, last, cur_len)
    R = task.spec.num_return_sequences
    return SearchOutput(
        best.sequences[:, :R],
        best.scores[:, :R],
        best.lengths[:, :R],
        beam_indices=None if best.history is None else best.history[:, :R],
    )


def settled(task: Task, last: Beams, cur_len: Array) -> Finished:
    """The finished hypotheses; where a row is not done, its live beams are taken as they are."""
    running = last.running
    length = jnp.maximum(jnp.minimum(cur_len, task.max_length), task.prompt_length)  # [1 or B, 1]
    open_ = jnp.broadcast_to(~last.done, running.scores.shape)
    return _merge(
        last.finished,
        Finished(
            sequences=running.sequences,
            scores=_closed(open_, _normalised(task, running.scores, length)),
            lengths=jnp.broadcast_to(length, open_.shape),
            filled=open_,
            history=running.history,
        ),
    )


def decided(task: Task, now: Beams, cur_len: Array) -> tuple[Array, Array]:
    """What will not change any more: `[B, 1, T]`, and how many of its tokens, `[B, 1]`."""
    live = jnp.broadcast_to(~now.done, now.parents.shape)
    return agreed(task, now.sequences, live, now.finished, cur_len)


def agreed(
    task: Task, sequences: Array, live: Array, finished: Finished, cur_len: Array
) -> tuple[Array, Array]:
    """The beginning shared by all that can still become a row's best hypothesis.

    These are the live beams, `sequences [B, n, T]` where `live [B, n]`, and the best of the
    `finished`; the others can only lose.

    Returns:
        int32 `[B, 1, T]` and `[B, 1]`, how many of its tokens are agreed on.
    """
    T = sequences.shape[2]
    best = jnp.argmax(jnp.where(finished.filled, finished.scores, -jnp.inf), axis=1)[:, None]
    ended = pick(finished.sequences, best)  # [B, 1, T]
    length = pick(finished.lengths, best)
    none_live = ~jnp.any(live, axis=1, keepdims=True)
    shared = pick(sequences, jnp.argmax(live, axis=1)[:, None])
    shared = jnp.where(none_live[:, :, None], ended, shared)
    place = jnp.arange(T)
    same = (sequences == shared) & (place < cur_len) | ~live[:, :, None]
    same_ended = (ended == shared) & (place < length[:, :, None])
    same_ended |= ~pick(finished.filled, best)[:, :, None]
    same = jnp.all(same, axis=1, keepdims=True) & same_ended
    count = jnp.sum(jnp.cumprod(same.astype(jnp.int32), axis=2), axis=2)
    return shared, jnp.maximum(jnp.where(none_live, length, count), task.prompt_length)


def _normalised(task: Task, scores: Array, length: Array) -> Array:
    """Divide sums of log-probabilities by (generated tokens) ** length_penalty."""
    penalty = jnp.asarray(task.values.length_penalty).reshape(-1, 1)
    generated = jnp.maximum(length - task.prompt_length, 1)
    return scores / generated.astype(jnp.float32) ** penalty


def _closed(ended: Array, scores: Array) -> Array:
    return jnp.where(ended, scores, scores + NEVER_FINISHED)


def pick(x: Array, order: Array) -> Array:
    """Take entries `order [B, n]` along axis 1 of `x [B, m, ...]`."""
    return jnp.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), axis=1)


def _extend(sequences: Any, parents: Array, entry: Array, cur_len: Array) -> Any:
    """Return `[B, n, T]`: the sequences of `parents [B, n]`, with `entry [B, n]` at `cur_len`."""
    if sequences is None:
        return None
    return set_column(pick(sequences, parents), entry, cur_len)


def _merge(old: Finished, new: Finished) -> Finished:
    """Keep the K best of both; of equal scores the older one."""
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), old, new)
    _, order = top_k(both.scores, old.scores.shape[1])
    return jax.tree.map(lambda x: pick(x, order), both)
