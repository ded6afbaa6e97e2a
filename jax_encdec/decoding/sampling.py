"""What narrows or reshapes the distribution that a token is drawn from.

Each function takes scores `[B, K, V]` float32 and gives -inf to what may not be drawn.  None of
them sorts the vocabulary, which takes 50 ms for 8 rows of 30522 on two CPU cores: a cut is a
threshold, and `smallest` finds it in 32 halvings, exactly, in 2 ms.  A number is a scalar or `[B]`.
`keep` many tokens always stay.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jax_encdec.decoding.context import lanes, rows
from jax_encdec.decoding.top_k import top_k as largest

TOP_H_CANDIDATES = 100  # Transformers looks at the entropy of no more


def ordered(x: Array) -> Array:
    """Return int32 that compare as the float32 `x` do; -0.0 counts as 0.0."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0.0, 0.0, x), jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def smallest(keys: Array, enough: Callable[[Array], Array]) -> Array:
    """Return the smallest int32 t for which `enough(keys <= t)` is true, int32 `[B, K, 1]`.

    Args:
        keys: int32 `[B, K, V]`.
        enough: bool `[B, K, V] -> [B, K, 1]`, monotonic: false, then true as t grows.  Where it
            never is true, the answer is the largest int32.
    """
    limits = jnp.iinfo(jnp.int32)
    low = jnp.full((*keys.shape[:2], 1), limits.min)

    def halve(_, bounds):
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, without overflow
        found = enough(keys <= middle)
        return jnp.where(found, low, middle + 1), jnp.where(found, middle, high)

    return lax.fori_loop(0, 32, halve, (low, jnp.full_like(low, limits.max)))[1]


def best(scores: Array, n: int) -> tuple[Array, Array]:
    """Return the `n` best scores, descending, and their ids, both `[B, K, n]`."""
    # The barrier keeps XLA from merging later slices into top_k, which would turn it into a sort of
    # the whole vocabulary: 70 times slower on CPU.
    # One for each output: XLA fails on a barrier of both where the program is split over a mesh.
    values, ids = largest(scores, n)
    return lax.optimization_barrier(values), lax.optimization_barrier(ids)


def _kth(ranked: Array, k: ArrayLike | None) -> Array:
    """Return `[B, K, 1]`, the k-th of the descending `ranked [B, K, n]`, counted from 1."""
    index = jnp.broadcast_to(rows(k) - 1, (*ranked.shape[:2], 1))
    return jnp.take_along_axis(ranked, index, axis=2)


def _count(mask: Array) -> Array:
    return jnp.sum(mask, axis=-1, keepdims=True, dtype=jnp.int32)


def _cut(scores: Array, removed: Array) -> Array:
    return jnp.where(removed, -jnp.inf, scores)


def _floor(scores: Array, keep: int) -> Array:
    """Return `[B, K, 1]`, the `keep`-th best score."""
    if keep == 1:
        return jnp.max(scores, axis=-1, keepdims=True)
    return best(scores, min(keep, scores.shape[-1]))[0][..., -1:]


def _spare(removed: Array, priority: Array, keep: int) -> Array:
    """Take the `keep` tokens of highest `priority` out of `removed`."""
    _, index = best(priority, min(keep, priority.shape[-1]))
    return removed.at[*lanes(removed), index].set(False)


# By rank and probability -------------------------------------------------------------------------


def top_k(scores: Array, k: ArrayLike | None, candidates: int = 0) -> Array:
    """Keep the `k` best and all that equal the last of them.

    Args:
        candidates: a bound of `k`; 0: any k, found by halving.
    """
    if candidates:
        return _cut(scores, scores < _kth(best(scores, candidates)[0], k))
    keys = ~ordered(scores)
    return _cut(scores, keys > smallest(keys, lambda mask: _count(mask) >= rows(k)))


def top_p(scores: Array, tail: ArrayLike | None, keep: int) -> Array:
    """Cut the least probable tokens whose probabilities together do not exceed `tail`.

    Of equal scores at the cut the lower ids stay (Transformers' sort leaves open which).
    """
    V = scores.shape[-1]
    keys, probability, tail = ordered(scores), _softmax(scores), rows(tail)

    def mass(mask: Array) -> Array:
        return jnp.sum(jnp.where(mask, probability, 0.0), axis=-1, keepdims=True)

    threshold = smallest(keys, lambda mask: mass(mask) > tail)
    threshold = jnp.minimum(threshold, ordered(_floor(scores, keep)))
    equal = keys == threshold
    # How many of the equals fit into what is left of the tail.
    each = jnp.max(jnp.where(equal, probability, 0.0), axis=-1, keepdims=True)
    room = (tail - mass(keys < threshold)) / jnp.maximum(each, jnp.finfo(each.dtype).tiny)
    stay = _count(equal) - jnp.clip(jnp.floor(room), 0, V).astype(jnp.int32)
    stay = jnp.maximum(stay, jnp.maximum(1, keep - _count(keys > threshold)))
    ids = jnp.where(equal, jnp.arange(V), V)
    last = lax.cond(
        jnp.any(_count(equal) > stay),  # else, as nearly always, all of them stay
        lambda: smallest(ids, lambda mask: _count(mask) >= stay),
        lambda: jnp.full_like(stay, V),
    )
    survives = (keys > threshold) | (equal & (ids <= last))
    return _cut(scores, ~survives & (tail > 0.0))


def top_k_top_p(
    scores: Array, k: ArrayLike | None, tail: ArrayLike | None, keep: int, n: int
) -> Array:
    """Keep the `k` best, of at most `n`, and of these the fewest whose mass exceeds `1 - tail`.

    Scores equal to the k-th one that overflow the `n` candidates stay or go together.
    """
    V = scores.shape[-1]
    # top_k ranks -0.0 below 0.0, the comparisons below do not: let there be one zero.
    scores = jnp.where(scores == 0.0, 0.0, scores)
    ranked, index = best(scores, n)  # [B, K, n]
    floor = _kth(ranked, k)
    inside = ranked >= floor
    top = jnp.where(jnp.isfinite(ranked[..., :1]), ranked[..., :1], 0.0)
    mass = jnp.where(inside, jnp.exp(ranked - top), 0.0)
    rest = (_count(scores >= floor) - _count(inside)) * jnp.exp(floor - top)
    # Probability of a candidate together with everything that ranks below it.
    below = jnp.cumsum(mass[..., ::-1], axis=-1)[..., ::-1] + rest
    total = jnp.maximum(below[..., :1], jnp.finfo(scores.dtype).tiny)
    kept = (below / total > rows(tail)) | (jnp.arange(n) < keep)
    count = _count(kept)  # what is kept comes first
    last = jnp.take_along_axis(ranked, count - 1, axis=-1)
    last_index = jnp.take_along_axis(index, count - 1, axis=-1)
    last_index = jnp.where(count == n, V, last_index)
    survives = (scores > last) | ((scores == last) & (jnp.arange(V) <= last_index))
    return _cut(scores, ~survives)


def min_p(scores: Array, share: ArrayLike | None, keep: int) -> Array:
    """Cut what is less probable than `share` of the most probable."""
    removed = jnp.exp(scores - _top(scores)) < rows(share)
    return _cut(scores, _spare(removed, scores, keep) if keep > 1 else removed)


# By entropy --------------------------------------------------------------------------------------


def top_h(scores: Array, share: ArrayLike | None) -> Array:
    """Keep the best, of a hundred, whose summed entropy stays within `share` of the hundred's."""
    ranked, index = best(scores, min(TOP_H_CANDIDATES, scores.shape[-1]))
    probability = _softmax(ranked)
    terms = _entropy_terms(probability)
    within = jnp.cumsum(terms, axis=-1) <= rows(share) * jnp.sum(terms, axis=-1, keepdims=True)
    within = (within & (probability > 0.0)) | (jnp.arange(ranked.shape[-1]) == 0)
    kept = jnp.zeros(scores.shape, bool).at[*lanes(scores), index].set(within)
    return _cut(scores, ~kept)


def typical_p(scores: Array, mass: ArrayLike | None, keep: int) -> Array:
    """Keep the tokens whose surprise is nearest to the expected one, until they hold `mass`."""
    probability, mass = _softmax(scores), rows(mass)
    surprise = -_log_softmax(scores)
    distance = jnp.abs(surprise - _entropy(probability))
    keys = ordered(distance)

    def enough(mask: Array) -> Array:
        held = jnp.sum(jnp.where(mask, probability, 0.0), axis=-1, keepdims=True)
        return (held >= mass) & (mass < 1.0)

    removed = keys > smallest(keys, enough)
    return _cut(scores, _spare(removed, -distance, keep) if keep > 1 else removed)


def epsilon_cutoff(scores: Array, epsilon: ArrayLike | None, keep: int) -> Array:
    """Cut what is less probable than `epsilon`."""
    return _below(scores, _softmax(scores), rows(epsilon), keep)


def eta_cutoff(scores: Array, epsilon: ArrayLike | None, keep: int) -> Array:
    """Cut what is less probable than `epsilon`, or than `sqrt(epsilon) * exp(-entropy)`."""
    probability, epsilon = _softmax(scores), rows(epsilon)
    eta = jnp.minimum(epsilon, jnp.sqrt(epsilon) * jnp.exp(-_entropy(probability)))
    return _below(scores, probability, eta, keep)


def _below(scores: Array, probability: Array, limit: Array, keep: int) -> Array:
    return _cut(scores, (probability < limit) & (scores < _floor(scores, keep)))


# Distributions of rows where everything may be banned --------------------------------------------


def _top(scores: Array) -> Array:
    top = jnp.max(scores, axis=-1, keepdims=True)
    return jnp.where(jnp.isfinite(top), top, 0.0)


def _log_softmax(scores: Array) -> Array:
    shifted = scores - _top(scores)
    total = jnp.sum(jnp.exp(shifted), axis=-1, keepdims=True)
    return shifted - jnp.log(jnp.where(total > 0.0, total, 1.0))


def _softmax(scores: Array) -> Array:
    mass = jnp.exp(scores - _top(scores))
    total = jnp.sum(mass, axis=-1, keepdims=True)
    return mass / jnp.where(total > 0.0, total, 1.0)


def _entropy_terms(probability: Array) -> Array:
    some = probability > 0.0
    return jnp.where(some, -probability * jnp.log(jnp.where(some, probability, 1.0)), 0.0)


def _entropy(probability: Array) -> Array:
    return jnp.sum(_entropy_terms(probability), axis=-1, keepdims=True)


def renormalized(scores: Array) -> Array:
    """Return log-probabilities; -inf stays where everything is banned."""
    return _log_softmax(scores)
