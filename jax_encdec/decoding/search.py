"""Greedy search, sampling, beam search and beam sampling over any `step` function.

`search` knows no model: it calls `step(state, tokens, parents, position)` and gets back logits and
the next state.  Each algorithm is one `lax.while_loop` over positions with fixed shapes, so it can
be jitted, vmapped and exported; every number is traced (`SearchValues`), only structure is static
(`SearchSpec`).  The rules are those of Transformers v5, row by row: a row never depends on the
other rows of its batch, and a row that is done stays as it is.

Axes: B batch, K beams (or independent samples), R returned sequences, T capacity, V vocabulary, C
candidates per row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from jax_encdec.decoding.config import GenerationConfig
from jax_encdec.decoding.processors import (
    Context,
    ProcessorSpec,
    ProcessorValues,
    process,
    split,
    token_table,
)
from jax_encdec.errors import InputError

State = Any
StepFn = Callable[[State, Array, Array, Array], tuple[Array, State]]
"""`step(state, tokens, parents, position) -> (logits, state)`.

Feeds `tokens [B, K]` int32, which stand at `position` (int32 scalar).  Beam k continues what was
beam `parents[b, k]` at the previous call, so the model reorders or relabels its cache by `parents
[B, K]` int32.  Returns the logits `[B, K, V]` of position + 1.
"""

_NEVER_FINISHED = -1e9  # score of an empty slot, and what closes a beam; Transformers' constant
_EARLY_STOPPING = {False: 0, True: 1, "never": 2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchSpec:
    """What shapes the compiled program.

    Attributes:
        capacity: T, the length of the sequence arrays, at least any `max_length`.
        num_beams: K; 1 means greedy search or plain sampling.
        num_return_sequences: R; at most K with beams; with plain sampling the R samples of a row
            are R beams that never mix, so they share the row's encoder state.
        do_sample: draw instead of taking the best.
        num_eos: number of end-of-sequence ids; a beam step looks at `max(2, 1 + num_eos) * K`
            candidates.
        processors: which logits processors run.
    """

    capacity: int
    num_beams: int = 1
    num_return_sequences: int = 1
    do_sample: bool = False
    num_eos: int = 1
    processors: ProcessorSpec = dataclasses.field(default_factory=ProcessorSpec)


class SearchValues(NamedTuple):
    """Every number of a search, traced.  Scalars may also be given per row, `[B]`."""

    max_length: ArrayLike  # int32, prompt included, at most capacity
    eos: ArrayLike  # bool [V], true at the end-of-sequence ids
    pad_token_id: ArrayLike  # int32
    length_penalty: ArrayLike  # float32
    early_stopping: ArrayLike  # int32: 0 False, 1 True, 2 "never"
    processors: ProcessorValues


class SearchOutput(NamedTuple):
    """What a search returns, best sequence of a row first (samples in the order drawn).

    Attributes:
        sequences: `[B, R, T]` int32, prompt included, padded after the end of the sequence.
        sequences_scores: `[B, R]` float32.  Beams: sum of the processed log-probabilities divided
            by `(generated length) ** length_penalty`.  Greedy and samples: log-probability of the
            generated tokens under the processed distribution.  When forced and banned tokens
            leave a row fewer hypotheses than R, the surplus ones score about -1e9.
        lengths: `[B, R]` int32, tokens of a sequence, prompt and end-of-sequence token included.
    """

    sequences: Array
    sequences_scores: Array
    lengths: Array


def prepare(
    config: GenerationConfig,
    *,
    vocab_size: int,
    prompt_length: int = 1,
    capacity: int | None = None,
) -> tuple[SearchSpec, SearchValues]:
    """Validate a configuration and cut it into the static and the traced half of a search.

    Args:
        config: as the user gave it; defaults are filled in here.
        vocab_size: V, the width of the logits.
        prompt_length: tokens of the decoder prompt, start token included.
        capacity: T; `max_length` when None.  Rounding it up to a few sizes saves compilations.

    Raises:
        InputError: a setting that is out of range, contradictory, or does not fit the capacity.
    """
    config.validate(vocab_size, prompt_length)
    full = config.resolved(prompt_length)
    assert full.max_length is not None
    capacity = full.max_length if capacity is None else capacity
    if full.max_length > capacity:
        raise InputError(
            f"max_length ({full.max_length}) must be at most the capacity of {capacity} tokens; "
            "lower max_length or max_new_tokens"
        )
    processors, processor_values = split(config, vocab_size=vocab_size)
    spec = SearchSpec(
        capacity=capacity,
        num_beams=full.num_beams or 1,
        num_return_sequences=full.num_return_sequences or 1,
        do_sample=bool(full.do_sample),
        num_eos=len(config.eos_token_ids),
        processors=processors,
    )
    values = SearchValues(
        max_length=np.int32(full.max_length),
        eos=token_table(config.eos_token_ids, vocab_size),
        # Without an end-of-sequence id no sequence ends early and the padding is never looked at.
        pad_token_id=np.int32(full.pad_token_id or 0),
        length_penalty=np.float32(full.length_penalty),
        early_stopping=np.int32(_EARLY_STOPPING[full.early_stopping or False]),
        processors=processor_values,
    )
    return spec, values


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
        prompt_length: int32 scalar, how many of the P columns count; P when None.  Traced, so that
            prompts of several lengths can share one program.
        source_ids: `[B, S]` int32, needed by `encoder_no_repeat_ngram_size` only.
        source_mask: `[B, S]`, 0 at padding; None when there is no padding.
        key: needed when sampling: one key, from which row i draws with `fold_in(key, i)`, or one
            key per row, `[B]`.  Either way a row's draws do not depend on the other rows.

    Raises:
        InputError: sampling without a key, or shapes that do not fit the spec.
    """
    B, P = prompt.shape
    beams = spec.num_beams
    if spec.capacity < P:
        raise InputError(f"the prompt of {P} tokens exceeds the capacity of {spec.capacity}")
    if spec.do_sample and key is None:
        raise InputError("sampling (do_sample=True) needs a random key, got key=None")
    if spec.processors.encoder_no_repeat_ngram and source_ids is None:
        raise InputError("encoder_no_repeat_ngram_size needs source_ids, got None")
    lanes = beams if beams > 1 else spec.num_return_sequences
    keys = _row_keys(key, B, lanes) if spec.do_sample and key is not None else None
    start = jnp.asarray(P if prompt_length is None else prompt_length, jnp.int32)
    pad = jnp.broadcast_to(jnp.asarray(values.pad_token_id, jnp.int32), (B,))

    rest = jnp.broadcast_to(pad[:, None], (B, spec.capacity - P))
    sequences = jnp.concatenate([prompt.astype(jnp.int32), rest], axis=1)
    sequences = jnp.where(jnp.arange(spec.capacity) < start, sequences, pad[:, None])
    sequences = jnp.broadcast_to(sequences[:, None], (B, lanes, spec.capacity))
    identity = jnp.broadcast_to(jnp.arange(lanes, dtype=jnp.int32), (B, lanes))

    def feed(position, state):
        return step(state, _column(sequences, position), identity, position)[1]

    if P > 1:
        state = lax.fori_loop(jnp.int32(0), start - 1, feed, state)

    def score(state, sequences, parents, cur_len):
        position = cur_len - 1
        logits, state = step(state, _column(sequences, position), parents, position)
        logits = logits.astype(jnp.float32)
        if beams > 1:
            logits = jax.nn.log_softmax(logits, axis=-1)
        context = Context(
            sequences, cur_len, start, jnp.asarray(values.max_length), source_ids, source_mask
        )
        return process(spec.processors, values.processors, logits, context), state

    run = _beams if beams > 1 else _single
    return run(spec, values, score, state, sequences, identity, start, pad, keys)


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


def _gumbel(keys: Array, position: Array, vocab_size: int) -> Array:
    """Return Gumbel noise `[B, K, V]` for one position from keys `[B, K]`."""

    def draw(key):
        return jax.random.gumbel(jax.random.fold_in(key, position), (vocab_size,), jnp.float32)

    return jax.vmap(jax.vmap(draw))(keys)


def _column(sequences: Array, position: Array) -> Array:
    """Return `[B, K]`, the tokens of `sequences [B, K, T]` at `position`."""
    return lax.dynamic_index_in_dim(sequences, position, axis=2, keepdims=False)


def _set_column(sequences: Array, tokens: Array, position: Array) -> Array:
    return lax.dynamic_update_index_in_dim(sequences, tokens, position, axis=2)


def _keep_done(done: Array, old: Any, new: Any) -> Any:
    """Take `new`, but `old` in the rows that are `done [B]`."""

    def select(a, b):
        return jnp.where(done.reshape(-1, *(1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(select, old, new)


class _Single(NamedTuple):
    """Greedy search and sampling: K lanes per row that never mix."""

    cur_len: Array  # int32 scalar
    state: State
    sequences: Array  # int32 [B, K, T]
    scores: Array  # float32 [B, K]
    lengths: Array  # int32 [B, K]
    done: Array  # bool [B, K]


def _single(spec, values, score, state, sequences, identity, start, pad, keys) -> SearchOutput:
    eos = jnp.asarray(values.eos)
    max_length = jnp.asarray(values.max_length).reshape(-1, 1)  # [1 or B, 1]

    def body(now: _Single) -> _Single:
        scores, state = score(now.state, now.sequences, identity, now.cur_len)
        noise = 0.0 if keys is None else _gumbel(keys, now.cur_len, scores.shape[-1])
        token = jnp.argmax(scores + noise, axis=-1).astype(jnp.int32)  # [B, K]
        chosen = jnp.take_along_axis(scores, token[..., None], axis=-1)[..., 0]
        total = jax.nn.logsumexp(scores, axis=-1)
        # When everything is banned there is no distribution; the score says so without a NaN.
        gained = jnp.where(jnp.isfinite(total), chosen - total, -jnp.inf)
        token = jnp.where(now.done, pad[:, None], token)
        length = now.cur_len + 1
        return _Single(
            cur_len=length,
            state=state,
            sequences=_set_column(now.sequences, token, now.cur_len),
            scores=jnp.where(now.done, now.scores, now.scores + gained),
            lengths=jnp.where(now.done, now.lengths, length),
            done=now.done | eos[token] | (length >= max_length),
        )

    first = _Single(
        cur_len=start,
        state=state,
        sequences=sequences,
        scores=jnp.zeros(sequences.shape[:2], jnp.float32),
        lengths=jnp.full(sequences.shape[:2], start, jnp.int32),
        done=jnp.broadcast_to(start >= max_length, sequences.shape[:2]),
    )
    last = lax.while_loop(lambda now: ~jnp.all(now.done), body, first)
    return SearchOutput(last.sequences, last.scores, last.lengths)


class _Running(NamedTuple):
    """The K live beams of every row, best first."""

    sequences: Array  # int32 [B, K, T]
    scores: Array  # float32 [B, K], sums of log-probabilities
    parents: Array  # int32 [B, K], which beam of the step before each one continues


class _Finished(NamedTuple):
    """The K best finished hypotheses of every row, best first."""

    sequences: Array  # int32 [B, K, T]
    scores: Array  # float32 [B, K], length-normalised
    lengths: Array  # int32 [B, K]
    filled: Array  # bool [B, K], false: an empty slot


class _BeamState(NamedTuple):
    cur_len: Array  # int32 scalar
    state: State
    running: _Running
    finished: _Finished
    done: Array  # bool [B]


def _beams(spec, values, score, state, sequences, identity, start, pad, keys) -> SearchOutput:
    K = spec.num_beams
    B = sequences.shape[0]
    eos = jnp.asarray(values.eos)
    max_length = jnp.asarray(values.max_length).reshape(-1, 1)  # [1 or B, 1]
    penalty = jnp.asarray(values.length_penalty).reshape(-1, 1)
    early = jnp.asarray(values.early_stopping).reshape(-1, 1)

    def normalise(scores, length):
        """Divide sums of log-probabilities by (generated tokens) ** length_penalty."""
        return scores / (length - start).astype(jnp.float32) ** penalty

    def body(now: _BeamState) -> _BeamState:
        running, finished = now.running, now.finished
        scores, state = score(now.state, running.sequences, running.parents, now.cur_len)
        scores = scores + running.scores[:, :, None]
        noise = None if keys is None else _gumbel(keys, now.cur_len, scores.shape[-1])
        candidates, beam, token = _candidates(scores, noise, max(2, 1 + spec.num_eos) * K)
        length = now.cur_len + 1
        hit = eos[token] | (length >= max_length)  # [B, C]

        # Running: the K best that did not end.
        live, order = lax.top_k(candidates + jnp.where(hit, _NEVER_FINISHED, 0.0), K)
        parents = jnp.take_along_axis(beam, order, axis=1)
        new_running = _Running(
            sequences=_extend(running.sequences, beam, token, order, now.cur_len),
            scores=live,
            parents=parents,
        )

        # Finished: of the first K candidates, those that ended, merged with the ones we had.
        ended = hit[:, :K]
        ended_scores = normalise(candidates[:, :K], length)
        new_finished = _merge(
            finished,
            _Finished(
                sequences=_extend(running.sequences, beam, token, identity, now.cur_len),
                scores=jnp.where(ended, ended_scores, ended_scores + _NEVER_FINISHED),
                lengths=jnp.full((B, K), length, jnp.int32),
                filled=ended,
            ),
        )

        # Done: nothing that still runs can beat the worst finished hypothesis, or no room is left.
        # With early_stopping "never" the best case is judged at full length, which can only be
        # better than now when longer means cheaper.
        hopeful = (early == _EARLY_STOPPING["never"]) & (penalty > 0.0)
        best = normalise(live[:, :1], jnp.where(hopeful, max_length, length))
        worst = jnp.min(new_finished.scores, axis=1, keepdims=True)
        worst = jnp.where(new_finished.filled, worst, _NEVER_FINISHED)
        improvable = jnp.any(best > worst, axis=1)
        full = jnp.all(new_finished.filled, axis=1)
        closed = full & (early == _EARLY_STOPPING[True])[:, 0]
        out_of_room = (length >= max_length)[:, 0]
        old = (running, finished)
        running, finished = _keep_done(now.done, old, (new_running, new_finished))
        return _BeamState(
            cur_len=length,
            state=state,
            running=running._replace(parents=jnp.where(now.done[:, None], identity, parents)),
            finished=finished,
            done=now.done | ~improvable | closed | out_of_room,
        )

    empty = jnp.full((B, K), _NEVER_FINISHED, jnp.float32)
    first = _BeamState(
        cur_len=start,
        state=state,
        # All beams are the same prompt: only the first may speak, or all would say the same.
        running=_Running(sequences, empty.at[:, 0].set(0.0), identity),
        finished=_Finished(
            sequences=sequences,
            scores=empty,
            lengths=jnp.full((B, K), start, jnp.int32),
            filled=jnp.zeros((B, K), bool),
        ),
        done=jnp.broadcast_to((start >= max_length)[:, 0], (B,)),
    )
    last = lax.while_loop(lambda now: ~jnp.all(now.done), body, first).finished
    R = spec.num_return_sequences
    return SearchOutput(last.sequences[:, :R], last.scores[:, :R], last.lengths[:, :R])


def _candidates(scores: Array, noise: Array | None, count: int) -> tuple[Array, Array, Array]:
    """Return scores, beams and tokens `[B, C]` of the next candidates of every row.

    Without noise the best of the `K * V` continuations, best first.  With Gumbel noise a draw
    without replacement from their softmax, in the order drawn.  The best of every beam are
    found first and merged after, which gives the same order, ties included, as sorting all.
    """
    B, K, V = scores.shape
    each = min(count, V)
    ranked = scores if noise is None else scores + noise
    best, token = lax.top_k(ranked, each)  # [B, K, each]
    _, flat = lax.top_k(best.reshape(B, K * each), min(count, K * each))
    beam = (flat // each).astype(jnp.int32)
    token = jnp.take_along_axis(token.reshape(B, K * each), flat, axis=1).astype(jnp.int32)
    chosen = jnp.take_along_axis(scores.reshape(B, K * V), beam * V + token, axis=1)
    return chosen, beam, token


def _extend(sequences: Array, beam: Array, token: Array, order: Array, cur_len: Array) -> Array:
    """Return `[B, K, T]`: the sequences of the candidates that `order [B, K]` picks."""
    parents = jnp.take_along_axis(beam, order, axis=1)
    sequences = jnp.take_along_axis(sequences, parents[:, :, None], axis=1)
    return _set_column(sequences, jnp.take_along_axis(token, order, axis=1), cur_len)


def _merge(old: _Finished, new: _Finished) -> _Finished:
    """Keep the K best of both; of equal scores the older one."""
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), old, new)
    _, order = lax.top_k(both.scores, old.scores.shape[1])

    def pick(x):
        return jnp.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), axis=1)

    return jax.tree.map(pick, both)
