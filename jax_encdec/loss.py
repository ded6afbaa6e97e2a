"""Cross-entropy over the vocabulary, for targets whose logits may be too many to hold.

`cross_entropy` compares logits that exist. `head_loss` goes from the decoder's states straight to
the loss: with `chunk`, logits exist for that many positions of each row at a time, and positions
that carry no loss are moved to the end and cost nothing. Both count in nats and return sums, which
are divided once, globally.

The gradients of `head_loss` are made together with it, chunk by chunk: of the three matrix
products of a chunk none is done twice, and nothing of the logits' size waits for a backward pass.
So it can be differentiated backwards only, and once.

Axis letters: B batch, T target length, V vocabulary, W width of the head; G groups of rows (one
per device that shares out the batch), P positions of a group.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from jax_encdec.config import TransformerConfig
from jax_encdec.embedding import head_inputs
from jax_encdec.execution import Execution, constrain, split_over
from jax_encdec.layers import Params

IGNORE = -100
"""Label of positions that carry no loss."""


@flax.struct.dataclass
class LossOutput:
    """Sums over the labels that count, float32 scalars; only `loss_sum` has a gradient."""

    loss_sum: jax.Array
    """Cross-entropy in nats, smoothed as asked: what training minimises."""
    nll_sum: jax.Array
    """Cross-entropy in nats, not smoothed: what is reported."""
    loss_weight: jax.Array
    """Number of labels that count."""
    correct: jax.Array
    """How many of them have the highest score."""


def shift_right(
    labels: jax.Array, start: int | jax.Array, pad: int, segment_ids: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Labels `[B, T]` -> decoder inputs and mask, `[B, T]`: `start`, then all labels but the last.

    Each segment starts anew. The mask is 0 at pads, but never at a start.
    """
    opens = jnp.arange(labels.shape[1])[None, :] == 0
    if segment_ids is not None:
        opens = opens | (segment_ids != jnp.roll(segment_ids, 1, axis=1))
    shifted = jnp.roll(labels, 1, axis=1)
    shifted = jnp.where(opens, start, jnp.where(shifted == IGNORE, pad, shifted))
    return shifted, (shifted != pad) | opens


def cross_entropy(scores: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logits `[B, T, V]`, labels `[B, T]` -> summed loss in nats and number of labels counted."""
    counted = labels != IGNORE
    loss = jax.nn.logsumexp(scores, axis=-1) - _picked(scores, labels)
    return jnp.sum(jnp.where(counted, loss, 0.0)), jnp.sum(counted.astype(jnp.float32))


def _picked(scores: jax.Array, labels: jax.Array) -> jax.Array:
    """The scores of the labels; NaN outside the vocabulary, never another token's."""
    safe = jnp.where(labels == IGNORE, 0, labels)
    safe = jnp.where(safe < 0, scores.shape[-1], safe)
    return jnp.take_along_axis(scores, safe[..., None], axis=-1, mode="fill")[..., 0]


def head_loss(
    config: TransformerConfig,
    params: Params,
    states: jax.Array,
    labels: jax.Array,
    *,
    label_smoothing: float = 0.0,
    chunk: int | None = None,
    execution: Execution,
) -> LossOutput:
    """The loss of a trunk's language model head on states `[B, T, D]`.

    Args:
        labels: `[B, T]`, -100 where nothing is to be predicted; one outside the vocabulary makes
            the loss NaN.
        label_smoothing: the share of each label's weight that is spread over the whole vocabulary,
            as in `torch.nn.functional.cross_entropy`.
        chunk: how many positions of each row have logits at one time; None for all.
    """
    assert config.head is not None
    states, kernel, bias = head_inputs(config, params, states)
    groups = _groups(execution, states.shape[0])
    rows, length = labels.shape[0] // groups, labels.shape[1]
    size = rows * (length if chunk is None else min(chunk, length))
    states, labels = states.reshape(groups, -1, states.shape[-1]), labels.reshape(groups, -1)
    if size < labels.shape[1]:
        states, labels = _counted_first(size, states, labels)
    # Gathered from the shards of training once, not once per chunk.
    kernel = constrain(execution, kernel, "act_vocab", None)
    spec = _Spec(size, float(label_smoothing), config.head.softcap, execution)
    sums: Any = _chunked(spec, states, kernel, bias, labels)
    return LossOutput(*sums)


def _groups(execution: Execution, batch: int) -> int:
    """How many devices share out the batch, each with whole rows."""
    over, mesh = execution.rule("act_batch"), jax.sharding.get_abstract_mesh()
    axes = None if mesh.empty or over is None else split_over(mesh, over, batch)
    return math.prod(mesh.shape[a] for a in axes or ())


def _counted_first(size: int, states: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """States `[G, P, W]` and labels `[G, P]`, those that count first.

    P becomes a multiple of `size`; what is added carries no loss.
    """
    order = jnp.argsort(labels == IGNORE, axis=1, stable=True)
    states = jnp.take_along_axis(states, order[..., None], axis=1)
    labels = jnp.take_along_axis(labels, order, axis=1)
    more = -labels.shape[1] % size
    states = jnp.pad(states, ((0, 0), (0, more), (0, 0)))
    return states, jnp.pad(labels, ((0, 0), (0, more)), constant_values=IGNORE)


# Chunk by chunk ----------------------------------------------------------------------------------


class _Spec(NamedTuple):
    """What is static about the loss of a head."""

    size: int
    """Positions of a group at one time."""
    smoothing: float
    softcap: float | None
    execution: Execution


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(
    spec: _Spec, states: jax.Array, kernel: jax.Array, bias: jax.Array | None, labels: jax.Array
) -> tuple[jax.Array, ...]:
    """The fields of a `LossOutput`, of `[G, P, W]`, `[V, W]`, `[V]` and `[G, P]`."""
    return _loop(spec, states, kernel, bias, labels, slopes=False)[0]


def _chunked_forward(spec: _Spec, *args: Any) -> tuple[Any, Any]:
    sums, slopes = _loop(spec, *args, slopes=True)
    return sums, slopes


def _chunked_backward(spec: _Spec, slopes: Any, cotangents: Any) -> tuple[Any, ...]:
    # What is reported, and not minimised, has no gradient.
    return *jax.tree.map(lambda s: s * cotangents[0].astype(s.dtype), slopes), None


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _loop(
    spec: _Spec,
    states: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    labels: jax.Array,
    *,
    slopes: bool,
) -> tuple[tuple[jax.Array, ...], Any]:
    """Sums over all chunks and, if asked for, their slopes by states, kernel and bias."""
    (groups, positions, width), vocabulary = states.shape, kernel.shape[0]
    weights = kernel.astype(states.dtype)

    def body(i: jax.Array | int, carry: Any) -> Any:
        sums, found = carry
        start = i * spec.size
        x = jax.lax.dynamic_slice_in_dim(states, start, spec.size, axis=1)
        ids = jax.lax.dynamic_slice_in_dim(labels, start, spec.size, axis=1)
        scores = _product(x, weights, 1)
        scores = scores if bias is None else scores + bias.astype(jnp.float32)
        if spec.softcap is not None:
            scores = spec.softcap * jnp.tanh(scores / spec.softcap)
        scores = constrain(spec.execution, scores, "act_batch", None, "act_vocab")
        parts, slope = _terms(spec, scores, ids)
        sums = tuple(a + b for a, b in zip(sums, parts, strict=True))
        if not slopes:
            return sums, found
        d_states, d_kernel, d_bias = found
        ones = (ids != IGNORE).astype(states.dtype)
        # Written once for its three products: on a CPU, XLA would else make it anew for each, and
        # transposed as slowly as can be.
        slope = jax.lax.optimization_barrier(slope.astype(states.dtype))
        if d_bias is not None:  # a product and no sum: the slopes are there for products already
            d_bias = d_bias + jnp.einsum(
                "gpv,gp->gv", slope, ones, preferred_element_type=jnp.float32
            )
        d_x = (_product(slope, weights, 0) * ones[..., None]).astype(states.dtype)
        d_states = jax.lax.dynamic_update_slice_in_dim(d_states, d_x, start, axis=1)
        # Each group adds up its own, so that devices meet once, after the last chunk.
        d_kernel = d_kernel + jnp.einsum(
            "gpv,gpw->gvw", slope, x * ones[..., None], preferred_element_type=jnp.float32
        )
        return sums, (d_states, d_kernel, d_bias)

    found: Any = None
    if slopes:
        d_kernel = jnp.zeros((groups, vocabulary, width), jnp.float32)
        d_bias = None if bias is None else jnp.zeros((groups, vocabulary), jnp.float32)
        found = (jnp.zeros_like(states), d_kernel, d_bias)
    start = ((jnp.zeros((), jnp.float32),) * 4, found)
    if spec.size == positions:
        sums, found = body(0, start)
    else:
        # The counted stand first: chunks after the last of them have nothing to do.
        counted = jnp.max(jnp.sum(labels != IGNORE, axis=1))
        sums, found = jax.lax.fori_loop(0, (counted + spec.size - 1) // spec.size, body, start)
    if slopes:
        d_states, d_kernel, d_bias = found
        d_kernel = jnp.sum(d_kernel, axis=0).astype(kernel.dtype)
        if bias is not None:
            d_bias = jnp.sum(d_bias, axis=0).astype(bias.dtype)
        found = (d_states, d_kernel, d_bias)
    return sums, found


def _product(a: jax.Array, b: jax.Array, over: int) -> jax.Array:
    """The product over the last axis of `a` and axis `over` of `b`, float32."""
    axes = (((a.ndim - 1,), (over,)), ((), ()))
    return jax.lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)


def _terms(
    spec: _Spec, scores: jax.Array, labels: jax.Array
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """What scores `[G, P, V]` add to the fields of a `LossOutput`, and the loss's slope by what
    the cap was put on: also of positions that do not count, which whoever uses it leaves out."""
    counted, share = labels != IGNORE, spec.smoothing
    is_label = jnp.arange(scores.shape[-1]) == labels[..., None]
    top = jnp.max(scores, axis=-1)
    exponential = jnp.exp(scores - top[..., None])
    partition = jnp.sum(exponential, axis=-1)
    normaliser = top + jnp.log(partition)
    if _split_vocabulary(spec.execution, scores.shape[-1]):
        # By comparison and not by index: each device keeps its part of the vocabulary.
        inside = jnp.any(is_label, axis=-1)
        picked = jnp.sum(jnp.where(is_label, scores, 0.0), axis=-1)
        picked = jnp.where(inside | ~counted, picked, jnp.nan)
    else:
        picked = _picked(scores, labels)
    loss = nll = normaliser - picked
    if share:
        loss = (1 - share) * nll + share * (normaliser - jnp.mean(scores, axis=-1))

    def total(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(counted, x, 0.0).astype(jnp.float32))

    sums = total(loss), total(nll), total(jnp.ones_like(nll)), total(picked >= top)
    slope = exponential * (1.0 / partition)[..., None] - (1.0 - share) * is_label
    slope = slope - share / scores.shape[-1] if share else slope
    if spec.softcap is not None:
        slope = slope * (1.0 - jnp.square(scores / spec.softcap))
    return sums, slope


def _split_vocabulary(execution: Execution, vocabulary: int) -> bool:
    over, mesh = execution.rule("act_vocab"), jax.sharding.get_abstract_mesh()
    return not mesh.empty and over is not None and bool(split_over(mesh, over, vocabulary))
