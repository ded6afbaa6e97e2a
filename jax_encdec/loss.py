"""Cross-entropy over the vocabulary, for targets whose logits may be too many to hold.

`cross_entropy` compares logits that exist. `head_loss` goes from the decoder's states straight to
the loss: with `chunk`, logits exist for that many positions of each row at a time, and positions
that carry no loss are moved to the end and cost nothing. Both count in nats and return sums, which
are divided once, globally.

The gradients of the chunked loss are made together with it, chunk by chunk: of the three matrix
products that a chunk's training takes none is done twice, and nothing of the size of the
logits waits for a backward pass.

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
from jax_encdec.embedding import head_inputs, logits
from jax_encdec.embedding import scores as scores_of
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
    out = _sums(_Terms.of(scores, labels), 0.0, scores.shape[-1])
    return out.loss_sum, out.loss_weight


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
    if chunk is None or chunk >= labels.shape[1]:
        scores = logits(config, params, states, execution)
        return _sums(_Terms.of(scores, labels), label_smoothing, scores.shape[-1])
    states, kernel, bias = head_inputs(config, params, states)
    groups = _groups(execution, states.shape[0])
    rows = labels.shape[0] // groups
    states, labels = _counted_first(groups, rows * chunk, states, labels)
    # Gathered from the shards of training once, not once per chunk.
    kernel = constrain(execution, kernel, "act_vocab", None)
    spec = _Spec(rows * chunk, float(label_smoothing), config.head.softcap, execution)
    return LossOutput(*_chunked(spec, states, kernel, bias, labels))


def _groups(execution: Execution, batch: int) -> int:
    """How many devices share out the batch, each with whole rows."""
    over, mesh = execution.rule("act_batch"), jax.sharding.get_abstract_mesh()
    axes = None if mesh.empty or over is None else split_over(mesh, over, batch)
    return math.prod(mesh.shape[a] for a in axes or ())


def _counted_first(
    groups: int, multiple: int, states: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Rows `[B, T, ...]` as groups `[G, P, ...]` of positions, those with a label first.

    P is a multiple of `multiple`; what is added carries no loss.
    """
    labels = labels.reshape(groups, -1)
    order = jnp.argsort(labels == IGNORE, axis=1, stable=True)
    states = states.reshape(groups, -1, states.shape[-1])
    states = jnp.take_along_axis(states, order[..., None], axis=1)
    labels = jnp.take_along_axis(labels, order, axis=1)
    more = -labels.shape[1] % multiple
    states = jnp.pad(states, ((0, 0), (0, more), (0, 0)))
    return states, jnp.pad(labels, ((0, 0), (0, more)), constant_values=IGNORE)


# Terms of the loss -------------------------------------------------------------------------------


class _Terms(NamedTuple):
    """Per position, `[...]` of scores `[..., V]`, float32."""

    counted: jax.Array
    normaliser: jax.Array
    """Log of the sum of exponentials."""
    picked: jax.Array
    """The label's score; NaN outside the vocabulary, never another token's."""
    mean: jax.Array
    top: jax.Array

    @classmethod
    def of(cls, scores: jax.Array, labels: jax.Array) -> _Terms:
        counted = labels != IGNORE
        # By comparison and not by index: a vocabulary split over devices stays where it is.
        picked = jnp.sum(jnp.where(_is_label(scores, labels), scores, 0.0), axis=-1)
        inside = (labels >= 0) & (labels < scores.shape[-1])
        return cls(
            counted=counted,
            normaliser=jax.nn.logsumexp(scores, axis=-1),
            picked=jnp.where(inside, picked, jnp.where(counted, jnp.nan, 0.0)),
            mean=jnp.mean(scores, axis=-1),
            top=jax.lax.stop_gradient(jnp.max(scores, axis=-1)),
        )


def _is_label(scores: jax.Array, labels: jax.Array) -> jax.Array:
    places = jax.lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)
    return places == labels[..., None]


def _sums(terms: _Terms, smoothing: float, vocabulary: int) -> LossOutput:
    nll = terms.normaliser - terms.picked
    loss = nll
    if smoothing:
        loss = (1 - smoothing) * nll + smoothing * (terms.normaliser - terms.mean)

    def total(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(terms.counted, x, 0.0).astype(jnp.float32))

    return LossOutput(
        loss_sum=total(loss),
        nll_sum=jax.lax.stop_gradient(total(nll)),
        loss_weight=total(jnp.ones_like(nll)),
        correct=total(terms.picked >= terms.top),
    )


# Chunk by chunk ----------------------------------------------------------------------------------


class _Spec(NamedTuple):
    """What is static about a chunked loss."""

    chunk: int
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
    (groups, _, width), vocabulary = states.shape, kernel.shape[0]
    weights = kernel.astype(states.dtype)

    def sums_of(scores: jax.Array, labels: jax.Array) -> LossOutput:
        return _sums(_Terms.of(scores, labels), spec.smoothing, vocabulary)

    def body(i: jax.Array, carry: Any) -> Any:
        sums, found = carry
        start = i * spec.chunk
        x = jax.lax.dynamic_slice_in_dim(states, start, spec.chunk, axis=1)
        ids = jax.lax.dynamic_slice_in_dim(labels, start, spec.chunk, axis=1)
        y = scores_of(x, weights, bias, spec.softcap)
        y = constrain(spec.execution, y, "act_batch", None, "act_vocab")
        out = sums_of(y, ids)
        sums = tuple(a + b for a, b in zip(sums, _fields(out), strict=True))
        if not slopes:
            return sums, found
        slope = _slope(spec, y, ids)
        if spec.softcap is not None:
            slope = slope * (1.0 - jnp.square(y / spec.softcap))
        d_states, d_kernel, d_bias = found
        if d_bias is not None:
            d_bias = d_bias + jnp.sum(slope, axis=1)
        slope = slope.astype(states.dtype)
        d_x = jnp.einsum("gpv,vw->gpw", slope, weights)
        d_states = jax.lax.dynamic_update_slice_in_dim(d_states, d_x, start, axis=1)
        # Each group adds up its own, so that devices meet once, after the last chunk.
        d_kernel = d_kernel + jnp.einsum(
            "gpv,gpw->gvw", slope, x, preferred_element_type=jnp.float32
        )
        return sums, (d_states, d_kernel, d_bias)

    zero = jnp.zeros((), jnp.float32)
    found: Any = None
    if slopes:
        d_kernel = jnp.zeros((groups, vocabulary, width), jnp.float32)
        d_bias = None if bias is None else jnp.zeros((groups, vocabulary), jnp.float32)
        found = (jnp.zeros_like(states), d_kernel, d_bias)
    # The counted stand first: chunks after the last of them are all pads.
    counted = jnp.max(jnp.sum(labels != IGNORE, axis=1))
    chunks = (counted + spec.chunk - 1) // spec.chunk
    sums, found = jax.lax.fori_loop(0, chunks, body, ((zero,) * 4, found))
    if slopes:
        d_states, d_kernel, d_bias = found
        d_kernel = jnp.sum(d_kernel, axis=0).astype(kernel.dtype)
        d_bias = None if bias is None else jnp.sum(d_bias, axis=0).astype(bias.dtype)
        found = (d_states, d_kernel, d_bias)
    return sums, found


def _fields(out: LossOutput) -> tuple[jax.Array, ...]:
    return out.loss_sum, out.nll_sum, out.loss_weight, out.correct


def _slope(spec: _Spec, scores: jax.Array, labels: jax.Array) -> jax.Array:
    """The slope of the summed loss by each score, `[G, P, V]`."""
    target = (1.0 - spec.smoothing) * _is_label(scores, labels) + spec.smoothing / scores.shape[-1]
    slope = jax.nn.softmax(scores, axis=-1) - target
    return jnp.where((labels != IGNORE)[..., None], slope, 0.0)
