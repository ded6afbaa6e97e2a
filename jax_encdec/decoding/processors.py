"""Logits processors: what may not, must, or should less often come next.

`split` cuts a GenerationConfig in two: a static `ProcessorSpec` (which processors exist, and the
few sizes that shape the program) and traced `ProcessorValues` (every number and token id).
`process` is the pure function that applies them, in Transformers' order, to one step's scores.  So
changing a temperature, a penalty, a length or a list of ids does not compile anything again;
switching a processor on or off does, once.

Axes: B batch, K beams, T target capacity, S source length, V vocabulary.  A banned token scores
-inf.  A traced number is a scalar or one value per row, `[B]`.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jax_encdec.decoding.config import GenerationConfig

_WILDCARD = -1  # in the table of bad words: matches whatever was generated, or nothing at all


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessorSpec:
    """Which processors exist, in the order they run, and the sizes that shape the program.

    The n-gram fields are upper bounds of the n-gram size, `top_k` of the number of candidates: the
    values are traced and may be anything up to the bound.  0 means absent.
    """

    repetition_penalty: bool = False
    no_repeat_ngram: int = 0
    encoder_no_repeat_ngram: int = 0
    bad_words: bool = False
    min_length: bool = False
    forced_bos: bool = False
    forced_eos: bool = False
    suppress: bool = False
    begin_suppress: bool = False
    temperature: bool = False
    top_k: int = 0
    top_p: bool = False


class ProcessorValues(NamedTuple):
    """The numbers of the processors: arrays, None where `ProcessorSpec` says absent.

    Scalars may also be given per row as `[B]`, the boolean `[V]` tables as `[B, V]`.
    """

    repetition_penalty: ArrayLike | None = None  # float32
    no_repeat_ngram_size: ArrayLike | None = None  # int32
    encoder_no_repeat_ngram_size: ArrayLike | None = None  # int32
    bad_words: ArrayLike | None = None  # int32 [words, width], right-aligned, -1 before the word
    min_length: ArrayLike | None = None  # int32, prompt included
    min_new_tokens: ArrayLike | None = None  # int32
    eos: ArrayLike | None = None  # bool [V]
    forced_bos: ArrayLike | None = None  # bool [V]
    forced_eos: ArrayLike | None = None  # bool [V]
    suppress: ArrayLike | None = None  # bool [V]
    begin_suppress: ArrayLike | None = None  # bool [V]
    temperature: ArrayLike | None = None  # float32
    top_k: ArrayLike | None = None  # int32, already at least min_tokens_to_keep
    top_p_tail: ArrayLike | None = None  # float32, the probability mass to cut: 1 - top_p
    min_tokens_to_keep: ArrayLike | None = None  # int32


class Context(NamedTuple):
    """What has been generated so far, and from what."""

    sequences: Array  # int32 [B, K, T], meaningful up to cur_len
    cur_len: Array  # int32 scalar: tokens so far, prompt included
    prompt_length: Array  # int32 scalar
    max_length: Array  # int32, prompt included
    source_ids: Array | None = None  # int32 [B, S]
    source_mask: Array | None = None  # [B, S], 0 or False at padding


def bucket(size: int, smallest: int) -> int:
    """Return the smallest power-of-two multiple of `smallest` that is at least `size`."""
    while smallest < size:
        smallest *= 2
    return smallest


def token_table(ids: tuple[int, ...], vocab_size: int) -> np.ndarray:
    """Return bool `[vocab_size]`, true at `ids`."""
    table = np.zeros(vocab_size, bool)
    table[list(ids)] = True
    return table


def split(config: GenerationConfig, *, vocab_size: int) -> tuple[ProcessorSpec, ProcessorValues]:
    """Cut a configuration into its static and its traced half; `validate` it first.

    With beams, sampling keeps one token more than there are end-of-sequence ids, so that a beam can
    always continue.
    """
    full = config.resolved()
    eos = config.eos_token_ids
    sample = bool(full.do_sample)
    top_p = 1.0 if full.top_p is None else full.top_p
    keep = 1 if full.num_beams == 1 else max(2, len(eos) + 1)
    # A single-token "bad word" that is an end-of-sequence id is dropped, as Transformers does.
    words = [w for w in config.bad_words_ids or () if not (len(w) == 1 and w[0] in eos)]
    wanted = {
        "repetition_penalty": full.repetition_penalty != 1.0,
        "bad_words": bool(words),
        "min_length": bool(eos) and bool(config.min_length or config.min_new_tokens),
        "forced_bos": config.forced_bos_token_id is not None,
        "forced_eos": config.forced_eos_token_id is not None,
        "suppress": bool(config.suppress_tokens),
        "begin_suppress": bool(config.begin_suppress_tokens),
        "temperature": sample,
        "top_p": sample and top_p < 1.0,
    }
    top_k = min(max(full.top_k, keep), vocab_size) if sample and full.top_k else 0
    ngram, encoder_ngram = full.no_repeat_ngram_size, full.encoder_no_repeat_ngram_size
    spec = ProcessorSpec(
        no_repeat_ngram=bucket(ngram, 4) if ngram else 0,
        encoder_no_repeat_ngram=bucket(encoder_ngram, 4) if encoder_ngram else 0,
        top_k=min(bucket(top_k, 64), vocab_size) if top_k else 0,
        **wanted,
    )
    new_tokens_rule = config.min_new_tokens is not None

    def table(present: bool, ids: int | tuple[int, ...] | None) -> np.ndarray | None:
        if not present or ids is None:
            return None
        return token_table(ids if isinstance(ids, tuple) else (ids,), vocab_size)

    def number(present: bool, value: float | int | None, dtype: type) -> np.ndarray | None:
        return np.asarray(value, dtype) if present else None

    i32, f32 = np.int32, np.float32
    values = ProcessorValues(
        repetition_penalty=number(spec.repetition_penalty, full.repetition_penalty, f32),
        no_repeat_ngram_size=number(bool(ngram), ngram, i32),
        encoder_no_repeat_ngram_size=number(bool(encoder_ngram), encoder_ngram, i32),
        bad_words=_word_table(words) if words else None,
        min_length=number(spec.min_length, 0 if new_tokens_rule else config.min_length, i32),
        min_new_tokens=number(spec.min_length, config.min_new_tokens or 0, i32),
        eos=table(spec.min_length, eos),
        forced_bos=table(spec.forced_bos, config.forced_bos_token_id),
        forced_eos=table(spec.forced_eos, config.forced_eos_token_id),
        suppress=table(spec.suppress, config.suppress_tokens),
        begin_suppress=table(spec.begin_suppress, config.begin_suppress_tokens),
        temperature=number(spec.temperature, full.temperature, f32),
        top_k=number(bool(top_k), top_k, i32),
        top_p_tail=number(spec.top_p, 1.0 - top_p, f32),
        min_tokens_to_keep=number(spec.top_p, keep, i32),
    )
    return spec, values


def process(spec: ProcessorSpec, values: ProcessorValues, scores: Array, context: Context) -> Array:
    """Apply the processors of `spec` to one step's scores.

    Args:
        spec: static; which processors run.
        values: traced; their numbers.
        scores: `[B, K, V]` float32, logits (greedy, sampling) or log-probabilities (beams).
        context: the sequences so far and the source.

    Returns:
        `[B, K, V]` float32, -inf at what is banned; free of NaN when `scores` is.
    """
    v = values
    if spec.repetition_penalty:
        scores = _repetition_penalty(scores, context, v.repetition_penalty)
    if spec.no_repeat_ngram:
        scores = _no_repeat_ngram(scores, context, v.no_repeat_ngram_size, spec.no_repeat_ngram)
    if spec.encoder_no_repeat_ngram:
        scores = _encoder_no_repeat_ngram(
            scores, context, v.encoder_no_repeat_ngram_size, spec.encoder_no_repeat_ngram
        )
    if spec.bad_words:
        scores = _bad_words(scores, context, v.bad_words)
    if spec.min_length:
        short = context.cur_len < _rows(v.min_length)
        short |= context.cur_len - context.prompt_length < _rows(v.min_new_tokens)
        scores = jnp.where(short & _table(v.eos), -jnp.inf, scores)
    if spec.forced_bos:
        scores = _force(scores, context.cur_len == 1, v.forced_bos)
    if spec.forced_eos:
        scores = _force(scores, context.cur_len == _rows(context.max_length) - 1, v.forced_eos)
    if spec.suppress:
        scores = jnp.where(_table(v.suppress), -jnp.inf, scores)
    if spec.begin_suppress:
        # After a lone start token a forced token comes first, and the ban falls on the one after.
        forced_first = (context.prompt_length == 1) if spec.forced_bos else False
        begin = context.prompt_length + jnp.where(forced_first, 1, 0)
        banned = (context.cur_len == begin) & _table(v.begin_suppress)
        scores = jnp.where(banned, -jnp.inf, scores)
    if spec.temperature:
        scores = scores / _rows(v.temperature)
    if spec.top_p:
        scores = _top_k_top_p(scores, v.top_k, v.top_p_tail, v.min_tokens_to_keep, spec.top_k)
    elif spec.top_k:
        best, _ = _best(scores, spec.top_k)
        scores = jnp.where(scores < _kth(best, v.top_k), -jnp.inf, scores)
    return scores


def _rows(value: ArrayLike | None) -> Array:
    """Shape a scalar or `[B]` so that it broadcasts against `[B, K, V]`."""
    return jnp.asarray(value).reshape(-1, 1, 1)


def _table(table: ArrayLike | None) -> Array:
    """Shape a `[V]` or `[B, V]` table so that it broadcasts against `[B, K, V]`."""
    table = jnp.asarray(table)
    return table.reshape(-1, 1, table.shape[-1])


def _ban(scores: Array, tokens: Array, banned: Array) -> Array:
    """Give -inf to `tokens [B, K, n]` where `banned`; ids outside the vocabulary are dropped."""
    B, K, V = scores.shape
    b, k = jnp.arange(B)[:, None, None], jnp.arange(K)[None, :, None]
    where = jnp.where(banned, tokens, V)
    return scores.at[b, k, where].set(-jnp.inf, mode="drop")


def _latest(context: Context, back: int) -> Array:
    """Return `[B, K, 1]`, the token `back` places before the next one (clamped to the first)."""
    position = jnp.maximum(context.cur_len - back, 0)
    return jax.lax.dynamic_slice_in_dim(context.sequences, position, 1, axis=2)


def _repetition_penalty(scores: Array, context: Context, penalty: ArrayLike | None) -> Array:
    B, K, V = scores.shape
    T = context.sequences.shape[2]
    seen = jnp.where(jnp.arange(T) < context.cur_len, context.sequences, V)  # [B, K, T]
    old = jnp.take_along_axis(scores, jnp.minimum(seen, V - 1), axis=2)
    new = jnp.where(old < 0, old * _rows(penalty), old / _rows(penalty))
    b, k = jnp.arange(B)[:, None, None], jnp.arange(K)[None, :, None]
    # A token seen twice is written twice with the same value: penalised once.
    return scores.at[b, k, seen].set(new, mode="drop")


def _shift(x: Array, by: int) -> Array:
    """Move `x` right along its last axis, zeros (False) coming in."""
    width = min(by, x.shape[-1])
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(width, 0)])[..., : x.shape[-1]]


def _no_repeat_ngram(scores: Array, context: Context, size: ArrayLike | None, bound: int) -> Array:
    """Ban what followed, earlier in the sequence, the last `size - 1` tokens."""
    T = context.sequences.shape[2]
    n = _rows(size)
    written = jnp.arange(T) < context.cur_len
    matches = jnp.broadcast_to(written & (n > 0), context.sequences.shape)
    for back in range(1, bound):
        same = _shift(context.sequences, back) == _latest(context, back)
        same &= (jnp.arange(T) >= back) & (context.cur_len >= back)
        matches &= same | (back >= n)
    return _ban(scores, context.sequences, matches)


def _encoder_no_repeat_ngram(
    scores: Array, context: Context, size: ArrayLike | None, bound: int
) -> Array:
    """Ban what, in the source, follows the last `size - 1` tokens of the sequence.

    Padding never takes part in an n-gram, so that a row does not depend on how far its batch was
    padded (Transformers lets it take part).
    """
    assert context.source_ids is not None
    source = context.source_ids[:, None, :]  # [B, 1, S]
    real = jnp.ones_like(source, bool)
    if context.source_mask is not None:
        real = context.source_mask[:, None, :] != 0
    K, n = context.sequences.shape[1], _rows(size)
    shape = (source.shape[0], K, source.shape[2])
    matches = jnp.broadcast_to(real & (n > 0), shape)
    for back in range(1, bound):
        same = (_shift(source, back) == _latest(context, back)) & _shift(real, back)
        same &= context.cur_len >= back
        matches &= same | (back >= n)
    return _ban(scores, jnp.broadcast_to(source, shape), matches)


def _word_table(words: list[tuple[int, ...]]) -> np.ndarray:
    """Right-align words in an int32 table whose two sizes are powers of two."""
    width = bucket(max(len(word) for word in words), 2)
    table = np.full((bucket(len(words), 8), width), _WILDCARD, np.int32)
    for row, word in zip(table, words, strict=False):
        row[width - len(word) :] = word
    return table


def _bad_words(scores: Array, context: Context, table: ArrayLike | None) -> Array:
    """Ban the last token of every word whose other tokens are the latest of the sequence."""
    words = jnp.asarray(table)  # [words, width]
    B, K, _ = scores.shape
    last = words[:, -1]
    matches = jnp.broadcast_to(last != _WILDCARD, (B, K, *last.shape))
    for back in range(1, words.shape[1]):
        token = words[:, -1 - back]
        same = (token == _latest(context, back)) & (context.cur_len >= back)
        matches &= same | (token == _WILDCARD)
    return _ban(scores, jnp.broadcast_to(last, matches.shape), matches)


def _force(scores: Array, active: ArrayLike, table: ArrayLike | None) -> Array:
    """Where `active`, leave only the tokens of `table`, with score 0."""
    return jnp.where(active, jnp.where(_table(table), 0.0, -jnp.inf), scores)


def _best(scores: Array, n: int) -> tuple[Array, Array]:
    """Return the `n` best scores, descending, and their ids, both `[B, K, n]`."""
    # The barrier keeps XLA from merging later slices into top_k, which would turn it into a sort of
    # the whole vocabulary: 70 times slower on CPU.
    return jax.lax.optimization_barrier(tuple(jax.lax.top_k(scores, n)))


def _kth(best: Array, k: ArrayLike | None) -> Array:
    """Return `[B, K, 1]`, the k-th of the descending `best [B, K, n]`, counted from 1."""
    index = jnp.broadcast_to(_rows(k) - 1, (*best.shape[:2], 1))
    return jnp.take_along_axis(best, index, axis=2)


def _top_k_top_p(
    scores: Array,
    k: ArrayLike | None,
    tail: ArrayLike | None,
    keep: ArrayLike | None,
    candidates: int,
) -> Array:
    """Keep the `k` best, and of these the fewest whose probabilities exceed `1 - tail`.

    Transformers sorts the whole vocabulary; with top_k on, the few `candidates` hold the same
    answer.  Of equal scores at the cut the lower ids stay (Transformers' sort leaves open which);
    only scores equal to the k-th one that overflow the candidates stay or go together.
    """
    V = scores.shape[-1]
    n = candidates or V
    # top_k ranks -0.0 below 0.0, the comparisons below do not: let there be one zero.
    scores = jnp.where(scores == 0.0, 0.0, scores)
    best, index = _best(scores, n)  # [B, K, n]
    floor = _kth(best, k) if candidates else jnp.full((1, 1, 1), -jnp.inf)
    inside = best >= floor
    top = jnp.where(jnp.isfinite(best[..., :1]), best[..., :1], 0.0)
    mass = jnp.where(inside, jnp.exp(best - top), 0.0)
    overflow = jnp.sum(scores >= floor, -1, keepdims=True) - jnp.sum(inside, -1, keepdims=True)
    rest = overflow * jnp.exp(floor - top)
    # Probability of a candidate together with everything that ranks below it.
    below = jnp.cumsum(mass[..., ::-1], axis=-1)[..., ::-1] + rest
    total = jnp.maximum(below[..., :1], jnp.finfo(scores.dtype).tiny)
    kept = (below / total > _rows(tail)) | (jnp.arange(n) < _rows(keep))
    count = jnp.sum(kept, -1, keepdims=True)  # [B, K, 1]; what is kept comes first
    last = jnp.take_along_axis(best, count - 1, axis=-1)
    last_index = jnp.take_along_axis(index, count - 1, axis=-1)
    last_index = jnp.where(count == n, V, last_index)
    survives = (scores > last) | ((scores == last) & (jnp.arange(V) <= last_index))
    return jnp.where(survives, scores, -jnp.inf)
