"""Logits processors that look at what was said: repetitions, n-grams, words, lengths.

Each takes scores `[B, K, V]` float32 and gives them back changed; a banned token scores -inf.  A
number is a scalar or `[B]`.  Token ids outside the vocabulary are passed over.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from jax_encdec.decoding.context import Context, lanes, rows, table

_WILDCARD = -1  # in a table of words: matches whatever was generated, or nothing at all


# What was said already ---------------------------------------------------------------------------


def repetition(scores: Array, context: Context, penalty: ArrayLike | None) -> Array:
    """Make the tokens of the sequence less probable (`penalty` above 1) or more."""
    T = context.sequences.shape[2]
    seen = jnp.where(jnp.arange(T) < context.cur_len, context.sequences, scores.shape[2])
    return _penalised(scores, seen, rows(penalty))


def encoder_repetition(scores: Array, context: Context, penalty: ArrayLike | None) -> Array:
    """Make the tokens of the source more probable (`penalty` above 1) or less; padding is none."""
    source, real = _source(context)
    source = jnp.where(real, source, scores.shape[2])
    seen = jnp.broadcast_to(source, (*scores.shape[:2], source.shape[2]))
    return _penalised(scores, seen, 1.0 / rows(penalty))


def _penalised(scores: Array, seen: Array, penalty: Array) -> Array:
    old = jnp.take_along_axis(scores, jnp.clip(seen, 0, scores.shape[2] - 1), axis=2)
    new = jnp.where(old < 0, old * penalty, old / penalty)
    # A token seen twice is written twice with the same value: penalised once.
    return scores.at[*lanes(scores), seen].set(new, mode="drop")


def _source(context: Context) -> tuple[Array, Array]:
    """Return the source ids `[B, 1, S]` and which of them are real."""
    assert context.source_ids is not None
    source = context.source_ids[:, None, :]
    if context.source_mask is None:
        return source, jnp.ones_like(source, bool)
    return source, context.source_mask[:, None, :] != 0


def no_repeat_ngram(scores: Array, context: Context, size: ArrayLike | None) -> Array:
    """Ban what followed, earlier in the sequence, the last `size - 1` tokens; 0: ban nothing."""
    n, place = rows(size), jnp.arange(context.sequences.shape[2])

    def narrowed(back, matches):
        same = _shift(context.sequences, back) == _latest(context, back)
        same &= (place >= back) & (context.cur_len >= back)
        return matches & (same | (back >= n))

    matches = (place < context.cur_len) & (n > 0)
    matches = jnp.broadcast_to(matches, context.sequences.shape)
    return _ban(scores, context.sequences, lax.fori_loop(1, jnp.max(n), narrowed, matches))


def encoder_no_repeat_ngram(scores: Array, context: Context, size: ArrayLike | None) -> Array:
    """Ban what, in the source, follows the last `size - 1` tokens of the sequence.

    Padding never takes part in an n-gram, so that a row does not depend on how far its batch was
    padded (Transformers lets it take part).
    """
    (source, real), n = _source(context), rows(size)

    def narrowed(back, matches):
        same = (_shift(source, back) == _latest(context, back)) & _shift(real, back)
        return matches & ((same & (context.cur_len >= back)) | (back >= n))

    shape = (source.shape[0], scores.shape[1], source.shape[2])
    matches = jnp.broadcast_to(real & (n > 0), shape)
    matches = lax.fori_loop(1, jnp.max(n), narrowed, matches)
    return _ban(scores, jnp.broadcast_to(source, shape), matches)


def _ban(scores: Array, tokens: Array, banned: Array) -> Array:
    """Give -inf to `tokens [B, K, n]` where `banned`."""
    tokens = jnp.where(banned, tokens, scores.shape[2])
    return scores.at[*lanes(scores), tokens].set(-jnp.inf, mode="drop")


def _latest(context: Context, back: ArrayLike) -> Array:
    """Return `[B, K, 1]`, the token `back` places before the next one (clamped to the first)."""
    position = jnp.maximum(context.cur_len - back, 0)
    return lax.dynamic_slice_in_dim(context.sequences, position, 1, axis=2)


def _shift(x: Array, by: ArrayLike) -> Array:
    """Move `x` right along its last axis, zeros (False) coming in."""
    width = x.shape[-1]
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(width, 0)])
    return lax.dynamic_slice_in_dim(padded, width - by, width, axis=-1)


# Words -------------------------------------------------------------------------------------------


def word_table(words: list[tuple[int, ...]]) -> np.ndarray:
    """Right-align words in int32 `[words, width]`, both sizes rounded up to powers of two."""
    width = bucket(max(len(word) for word in words), 2)
    found = np.full((bucket(len(words), 8), width), _WILDCARD, np.int32)
    for row, word in zip(found, words, strict=False):
        row[width - len(word) :] = word
    return found


def bucket(size: int, smallest: int) -> int:
    """Return the smallest power-of-two multiple of `smallest` that is at least `size`."""
    while smallest < size:
        smallest *= 2
    return smallest


def bad_words(scores: Array, context: Context, words: ArrayLike | None) -> Array:
    """Ban the last token of every word of which the sequence ends with all the others."""
    last, completed = _completed(scores, context, jnp.asarray(words))
    return _ban(scores, last, completed)


def sequence_bias(
    scores: Array, context: Context, words: ArrayLike | None, bias: ArrayLike | None
) -> Array:
    """Add `bias [words]` to the last token of every word that it would complete."""
    last, completed = _completed(scores, context, jnp.asarray(words))
    added = jnp.where(completed, jnp.asarray(bias), 0.0)
    last = jnp.where(completed, last, scores.shape[2])
    return scores.at[*lanes(scores), last].add(added, mode="drop")


def _completed(scores: Array, context: Context, words: Array) -> tuple[Array, Array]:
    """Return `[B, K, words]`: the last tokens of the words, and which would complete their word."""
    last = words[:, -1]
    matches = jnp.broadcast_to(last != _WILDCARD, (*scores.shape[:2], *last.shape))
    for back in range(1, words.shape[1]):
        token = words[:, -1 - back]
        same = (token == _latest(context, back)) & (context.cur_len >= back)
        matches &= same | (token == _WILDCARD)
    return jnp.broadcast_to(last, matches.shape), matches


# Lengths and other rules -------------------------------------------------------------------------


def force(scores: Array, active: ArrayLike, tokens: ArrayLike | None) -> Array:
    """Where `active`, leave only the `tokens` (bool `[V]` or `[B, V]`), with score 0."""
    return jnp.where(active, jnp.where(table(tokens), 0.0, -jnp.inf), scores)


def exponential_decay(
    scores: Array, context: Context, start: ArrayLike | None, factor: ArrayLike | None, eos: Array
) -> Array:
    """From `start` generated tokens on, raise the end tokens by ever more of their own size."""
    beyond = context.cur_len - rows(context.prompt_length) - rows(start)
    growth = rows(factor) ** jnp.maximum(beyond, 0).astype(jnp.float32) - 1.0
    raised = eos & (beyond > 0) & jnp.isfinite(scores)
    return jnp.where(raised, scores + jnp.abs(scores) * growth, scores)


def remove_invalid(scores: Array) -> Array:
    """Turn NaN into 0 and infinite scores into the largest finite ones."""
    limit = jnp.finfo(scores.dtype).max
    return jnp.nan_to_num(scores, nan=0.0, posinf=limit, neginf=-limit)
