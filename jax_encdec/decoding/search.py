"""Greedy search, sampling, beam search and beam sampling over any `step` function.

`search` knows no model: it calls `step(state, tokens, parents, position)` and gets back logits and
the next state.  A search is `start`, then `advance` as often as one likes, each up to a position,
then `finish`: `search` is the three in one, a single `lax.while_loop` over positions with fixed
shapes, so it can be jitted, vmapped and exported.  Every number is traced (`SearchValues`), only
structure is static (`SearchSpec`).  The rules are those of Transformers, row by row: a row never
depends on the other rows of its batch, and a row that is done stays as it is.

Prompts may differ in length: position t is the same for all rows, and a row whose prompt is
longer waits there, its prompt being fed, and searches from its own end on, as if alone.

Axes: B batch, K lanes (beams, or independent samples), R returned sequences, T capacity, V
vocabulary.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jax_encdec.decoding import beams, groups, single
from jax_encdec.decoding.prepare import prepare
from jax_encdec.decoding.task import (
    Rows,
    SearchOutput,
    SearchSpec,
    SearchValues,
    State,
    StepFn,
    Task,
    column,
)
from jax_encdec.errors import InputError

__all__ = (
    "Carry", "SearchOutput", "SearchSpec", "SearchValues", "State", "StepFn",
    "advance", "decided", "finish", "prepare", "search", "start", "unfinished",
)  # fmt: skip


class Now(NamedTuple):
    """What changes from step to step."""

    cur_len: Array
    """int32 scalar: where the next token goes."""
    state: State
    """The model's."""
    lanes: Any
    """`Single`, `Beams` or `Groups`."""
    scores: Array | None
    """`[T, B, K, V]` float32."""
    logits: Array | None
    """`[T, B, K, V]` float32."""


class Carry(NamedTuple):
    """A search that has begun: arrays alone, so it can be donated, stored or sent."""

    rows: Rows
    now: Now


def search(
    step: StepFn,
    state: State,
    prompt: Array,
    *,
    spec: SearchSpec,
    values: SearchValues,
    prompt_length: ArrayLike | None = None,
    source_ids: Array | None = None,
    source_mask: Array | None = None,
    key: Array | None = None,
) -> SearchOutput:
    """Decode from `prompt` with the algorithm that `spec` describes.

    Args:
        step: one step of the model, see `StepFn`.  Prompt tokens are fed through it one by one.
        state: the model's state before the first prompt token, any pytree.
        prompt: `[B, P]` int32, P at least 1 and at most the capacity.
        spec: static.
        values: traced.
        prompt_length: int32, scalar or `[B]`, at least 1: how many of the P columns count; P when
            None.  Traced, so that prompts of several lengths can share one program.
        source_ids: `[B, S]` int32, for the processors that look at the source.
        source_mask: `[B, S]`, 0 at padding; None when there is no padding.
        key: needed when sampling: one key, from which row i draws with `fold_in(key, i)`, or one
            key per row, `[B]`.  Either way a row's draws do not depend on the other rows.

    Raises:
        InputError: sampling without a key, or shapes that do not fit the spec.
    """
    carry = start(
        step,
        state,
        prompt,
        spec=spec,
        values=values,
        prompt_length=prompt_length,
        source_ids=source_ids,
        source_mask=source_mask,
        key=key,
    )
    return finish(advance(step, carry, spec=spec, values=values), spec=spec, values=values)


def start(
    step: StepFn,
    state: State,
    prompt: Array,
    *,
    spec: SearchSpec,
    values: SearchValues,
    prompt_length: ArrayLike | None = None,
    source_ids: Array | None = None,
    source_mask: Array | None = None,
    key: Array | None = None,
) -> Carry:
    """Feed what is common to all prompts; arguments and errors as of `search`."""
    B, P = prompt.shape
    lanes = spec.lanes
    if spec.capacity < P:
        raise InputError(f"the prompt of {P} tokens exceeds the capacity of {spec.capacity}")
    if spec.do_sample and key is None:
        raise InputError("sampling (do_sample=True) needs a random key, got key=None")
    if spec.processors.reads_source and source_ids is None:
        raise InputError(
            "encoder_no_repeat_ngram_size and encoder_repetition_penalty need the source's token "
            "ids, source_ids, got None"
        )
    rows = Rows(
        prompt_length=jnp.asarray(P if prompt_length is None else prompt_length, jnp.int32),
        keys=_row_keys(key, B, lanes) if spec.do_sample and key is not None else None,
        source_ids=source_ids,
        source_mask=source_mask,
    )
    task = Task(spec, values, rows)
    common = jnp.min(rows.prompt_length)
    pad = jnp.broadcast_to(jnp.asarray(values.pad_token_id, jnp.int32), (B,))[:, None]
    rest = jnp.broadcast_to(pad, (B, spec.capacity - P))
    sequences = jnp.concatenate([prompt.astype(jnp.int32), rest], axis=1)
    sequences = jnp.where(jnp.arange(spec.capacity) < task.prompt_length, sequences, pad)
    sequences = jnp.broadcast_to(sequences[:, None], (B, lanes, spec.capacity))
    itself = jnp.broadcast_to(jnp.arange(lanes, dtype=jnp.int32), (B, lanes))

    def feed(position, state):
        return step(state, column(sequences, position), itself, position)[1]

    if P > 1:
        state = lax.fori_loop(jnp.int32(0), common - 1, feed, state)
    stops = _heard_in_prompt(task, sequences[:, :, :P])
    # One entry per column, so that what decided `sequences[..., t]` stands at t.
    shape = (spec.capacity, B, lanes, jnp.asarray(values.eos).shape[-1])
    now = Now(
        cur_len=common,
        state=state,
        lanes=_algorithm(spec).first(task, sequences, itself, stops),
        scores=jnp.zeros(shape, jnp.float32) if spec.output_scores else None,
        logits=jnp.zeros(shape, jnp.float32) if spec.output_logits else None,
    )
    return Carry(rows, now)


def advance(
    step: StepFn,
    carry: Carry,
    until: ArrayLike | None = None,
    *,
    spec: SearchSpec,
    values: SearchValues,
) -> Carry:
    """Search on, until every row is done or `until` tokens stand (int32, prompt included)."""
    task = Task(spec, values, carry.rows)
    grow = _algorithm(spec).grow

    def goes_on(now: Now) -> Array:
        more = _open(task, now)
        return more if until is None else more & (now.cur_len < until)

    def body(now: Now) -> Now:
        position = now.cur_len - 1
        tokens = column(now.lanes.sequences, position)
        logits, state = step(now.state, tokens, now.lanes.parents, position)
        logits = logits.astype(jnp.float32)
        held = task.held(now.lanes.done, now.cur_len)  # of a lane, a row, or a group
        lanes, scores = grow(task, now.lanes, logits, now.cur_len)

        held = jnp.repeat(held, logits.shape[1] // held.shape[1], axis=1)  # [B, K]

        def noted(log: Array | None, entry: Array) -> Array | None:
            if log is None:
                return None
            entry = jnp.where(held[:, :, None], 0.0, entry)
            return lax.dynamic_update_index_in_dim(log, entry, now.cur_len, axis=0)

        return Now(
            cur_len=now.cur_len + 1,
            state=state,
            lanes=lanes,
            scores=noted(now.scores, scores),
            logits=noted(now.logits, logits),
        )

    return Carry(carry.rows, lax.while_loop(goes_on, body, carry.now))


def finish(carry: Carry, *, spec: SearchSpec, values: SearchValues) -> SearchOutput:
    """What has been found; a row that is not done yet is taken as it is."""
    task = Task(spec, values, carry.rows)
    now = carry.now
    out = _algorithm(spec).found(task, now.lanes, now.cur_len)
    scores, logits = (
        None if log is None else jnp.moveaxis(log, 0, 2) for log in (now.scores, now.logits)
    )
    return out._replace(scores=scores, logits=logits)


def decided(carry: Carry, *, spec: SearchSpec, values: SearchValues) -> tuple[Array, Array]:
    """What of the answers will not change any more, however the search goes on.

    Greedy search and sampling decide with every step; beams have decided what all beams that can
    still win have in common.

    Returns:
        `sequences` int32 `[B, n, T]` and `lengths` int32 `[B, n]`, prompt included; n is K
        without beams, and 1, for the best sequence, with beams.
    """
    task = Task(spec, values, carry.rows)
    return _algorithm(spec).decided(task, carry.now.lanes, carry.now.cur_len)


def unfinished(carry: Carry, *, spec: SearchSpec, values: SearchValues) -> Array:
    """bool scalar: whether `advance` would do anything."""
    return _open(Task(spec, values, carry.rows), carry.now)


def _open(task: Task, now: Now) -> Array:
    return jnp.any(~now.lanes.done & (now.cur_len < task.max_length))


def _algorithm(spec: SearchSpec) -> ModuleType:
    if spec.num_beams == 1:
        return single
    return beams if spec.num_beam_groups == 1 else groups


def _heard_in_prompt(task: Task, prompt: Array) -> Array | None:
    """int32 `[B, K]`: how much of a stop string the ends of `prompt [B, K, P]` have said."""
    if task.values.stops is None:
        return None

    def hear(position, stops):
        _, after = task.heard(stops, column(prompt, position))
        assert after is not None
        return jnp.where(position < task.prompt_length, after, stops)

    nothing = jnp.zeros(prompt.shape[:2], jnp.int32)
    return lax.fori_loop(0, prompt.shape[2], hear, nothing)


def _row_keys(key: Array, rows: int, lanes: int) -> Array:
    """Return keys `[rows, lanes]`, each a function of its row's key and its lane alone."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.ndim == 0:
        key = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))
    if key.shape != (rows,):
        raise InputError(f"key must be one key or one per row, [{rows}], got {list(key.shape)}")
    lane = jnp.arange(lanes)
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(key, lane)
