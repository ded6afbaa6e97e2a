"""Attention: masks, positions, and one attention for every use of it.

Axis letters: B batch, Q query positions, S key positions, N heads, G key/value heads, R queries
per key/value head (N = G R), H head_dim, D model.

The same function serves training (Q = target length), prompts and decoding: there, the beams of a
row are its query axis, and keys and values are a pool of S slots (`Cache`) in which a boolean
mask `[B, Q, S]` picks what each query may see. Keys and values of the encoder can be computed
once (`keys_values`) and passed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_encdec.attention_kernels import Visible, fused_attention
from jax_encdec.config import Attention, BucketBias, Learned, RelativeTable, Rotary
from jax_encdec.execution import DEFAULT, Execution, constrain
from jax_encdec.layers import (
    Param,
    Params,
    dense,
    dense_each,
    dense_params,
    dropout,
    norm,
    norm_params,
)


class KV(NamedTuple):
    """Keys and values, `[B, G, S, H]` each."""

    key: jax.Array
    value: jax.Array


class Cache(NamedTuple):
    """Keys and values that few queries at a time read, each laid out for the product it enters.

    Measured on CPU with 4 beams: a third to a quarter of the time that `KV` takes.
    """

    key: jax.Array
    """`[B, G, H, S]`."""
    value: jax.Array
    """`[B, G, S, H]`."""

    @classmethod
    def of(cls, kv: KV) -> Cache:
        """The same keys and values."""
        return cls(jnp.swapaxes(kv.key, 2, 3), kv.value)

    def write(self, new: KV, slot: jax.Array) -> Cache:
        """With `new` keys and values from `slot` on."""
        zero = jnp.zeros((), jnp.int32)  # all of one type, also where integers default to 64 bits
        update = jax.lax.dynamic_update_slice
        return Cache(
            update(self.key, jnp.swapaxes(new.key, 2, 3), (zero, zero, zero, slot)),
            update(self.value, new.value, (zero, zero, slot, zero)),
        )


class Prefix(NamedTuple):
    """How much of a cache holds anything yet: the slots after that need not be touched."""

    sizes: tuple[int, ...]
    """Static: slots of the prefixes there is a program for, ascending, the last being all."""
    chosen: jax.Array
    """int32 scalar: which of `sizes` is the first to hold all."""

    @classmethod
    def of(cls, sizes: tuple[int, ...], used: jax.Array) -> Prefix:
        """The shortest of the prefixes that holds the first `used` slots."""
        used = largest(jnp.asarray(used, jnp.int32))
        return cls(sizes, jnp.sum(used > jnp.asarray(sizes[:-1], jnp.int32), dtype=jnp.int32))


@jax.custom_batching.custom_vmap
def largest(number: jax.Array) -> jax.Array:
    """The number; under `vmap`, the largest of all rows.

    So a branch chosen by it stays a branch, where by a number per row all would be run.
    """
    return number


@largest.def_vmap
def _largest(axis_size: int, in_batched: list[bool], number: jax.Array) -> tuple[jax.Array, bool]:
    return largest(jnp.max(number)), False


# Masks and positions -----------------------------------------------------------------------------


def padding_mask(attention_mask: jax.Array) -> jax.Array:
    """`[B, S]` of 0/1 -> boolean `[B, 1, S]`, for every query alike."""
    return attention_mask.astype(bool)[:, None, :]


def segment_mask(query_segments: jax.Array, key_segments: jax.Array) -> jax.Array:
    """`[B, Q]`, `[B, S]` -> boolean `[B, Q, S]`: a query sees its own segment only (packing)."""
    return query_segments[:, :, None] == key_segments[:, None, :]


def segment_positions(segments: jax.Array) -> jax.Array:
    """`[B, Q]` segment ids -> positions `[B, Q]` that start from zero in each run of one id."""
    order = jnp.arange(segments.shape[1], dtype=jnp.int32)[None, :]
    new = (order == 0) | (segments != jnp.roll(segments, 1, axis=1))
    return order - jax.lax.cummax(jnp.where(new, order, 0), axis=1)


def positional_mask(
    query_positions: jax.Array, key_positions: jax.Array, *, causal: bool, window: int | None
) -> jax.Array | None:
    """`[B|1, Q]`, `[B|1, S]` -> boolean `[B|1, Q, S]`, or None where nothing is hidden."""
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    mask = distance >= 0 if causal else None
    if window is not None:
        near = jnp.abs(distance) <= window
        mask = near if mask is None else mask & near
    return mask


def both(a: jax.Array | None, b: jax.Array | None) -> jax.Array | None:
    """Conjunction of two masks of which either may be absent."""
    if a is None or b is None:
        return a if b is None else b
    return a & b


def visible(
    order: jax.Array,
    key_mask: jax.Array | None,
    query_segments: jax.Array | None,
    key_segments: jax.Array | None,
    causal: bool,
) -> Visible:
    """Who sees whom: tokens of one segment, no pads (`key_mask` `[B, S]` of 0/1), no future.

    `order` is `[1, Q]`, the queries' places in the sequence; segments are `[B, Q]` and `[B, S]`.
    """
    mask, segments = None if key_mask is None else padding_mask(key_mask), None
    if query_segments is not None and key_segments is not None:
        mask = both(mask, segment_mask(query_segments, key_segments))
        segments = (query_segments, key_segments)
    if key_mask is not None:
        same = (jnp.zeros_like(order), jnp.zeros_like(key_mask, jnp.int32))
        queries, keys = same if segments is None else segments
        segments = (queries, jnp.where(key_mask.astype(bool), keys, -1))
    future = positional_mask(order, order, causal=causal, window=None)
    return Visible(both(mask, future), mask, causal, segments)


def learned_positions(config: Learned, input_ids: jax.Array | None, length: int) -> jax.Array:
    """Position ids `[B or 1, length]`, before the table's offset.

    Tables that skip pads (RoBERTa) count the tokens that are not pads and give pads -1.
    """
    if config.pad_token_id is None or input_ids is None:
        return jnp.arange(length, dtype=jnp.int32)[None, :]
    token = (input_ids != config.pad_token_id).astype(jnp.int32)
    return jnp.cumsum(token, axis=1) * token - 1


def rotate(config: Rotary, x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotate `x` `[B, P, heads, H]` by `positions` `[B|1, P]`; angles are float32."""
    half = x.shape[-1] // 2
    frequency = config.theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions.astype(jnp.float32)[:, :, None, None] * frequency
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    # The two numbers of a pair stand along an axis of their own: the last, or the one before it.
    pairs = (half, 2) if config.interleaved else (2, half)
    axis = -1 if config.interleaved else -2
    split = x.astype(jnp.float32).reshape(*x.shape[:-1], *pairs)
    a, b = jnp.take(split, 0, axis=axis), jnp.take(split, 1, axis=axis)
    turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=axis)
    return turned.reshape(x.shape).astype(x.dtype)


def bucket_bias_params(config: BucketBias, heads: int, std: float) -> Param:
    """Declare a table of relative position biases, `[buckets, N]`."""
    return Param((config.buckets, heads), (None, "heads"), std)


def distance_buckets(
    config: BucketBias, query_positions: jax.Array, key_positions: jax.Array
) -> jax.Array:
    """Rows `[B|1, Q, S]` of a table of biases, from `[B|1, Q]` and `[B|1, S]`.

    Half of the (one-sided) buckets are exact distances, the rest grow logarithmically up to
    `max_distance`: Raffel et al. 2020, section 2.1.
    """
    relative = key_positions[:, None, :] - query_positions[:, :, None]
    buckets, bucket = config.buckets, jnp.zeros_like(relative)
    if config.bidirectional:
        buckets //= 2
        bucket = jnp.where(relative > 0, buckets, 0)
        distance = jnp.abs(relative)
    else:
        distance = jnp.maximum(-relative, 0)
    exact = buckets // 2
    ratio = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact)
    far = exact + (ratio / math.log(config.max_distance / exact) * (buckets - exact)).astype(int)
    return bucket + jnp.where(distance < exact, distance, jnp.minimum(far, buckets - 1))


def bucket_bias(table: jax.Array, buckets: jax.Array) -> jax.Array:
    """Biases `[B|1, N, Q, S]`, float32, of buckets `[B|1, Q, S]` in a table `[buckets, N]`."""
    return jnp.moveaxis(jnp.asarray(table, jnp.float32)[buckets], -1, 1)


class Relative(NamedTuple):
    """Relative positions as disentangled attention sees them."""

    table: jax.Array
    """`[2 * span, D]`, normalised."""
    rows: jax.Array
    """`[B|1, Q, S]`: which row stands for a query and a key."""


def relative_rows(
    config: RelativeTable, query_positions: jax.Array, key_positions: jax.Array
) -> jax.Array:
    """Rows `[B|1, Q, S]` of the table of relative positions, from `[B|1, Q]` and `[B|1, S]`.

    With `max_distance`, distances up to half of the span are exact, the rest logarithmic, as in
    the authors' code (He et al. 2021).
    """
    relative = query_positions[:, :, None] - key_positions[:, None, :]
    if config.max_distance is not None:
        exact = config.span // 2
        # Looked up, not computed: a distance on the edge of two rows must not depend on rounding.
        distance = np.arange(1, config.max_distance + 1)
        ratio = np.log(distance / exact) / np.log((config.max_distance - 1) / exact)
        far = np.where(distance <= exact, distance, exact + np.ceil(ratio * (exact - 1)))
        row = jnp.asarray(np.append(0, far), jnp.int32)[jnp.abs(relative)]  # the last for the rest
        relative = jnp.sign(relative) * row
    return jnp.clip(relative + config.span, 0, 2 * config.span - 1)


# Attention ---------------------------------------------------------------------------------------

GLOBAL = ("query", "key", "value")


def attention_params(
    config: Attention, hidden: int, source_hidden: int, std: float, out_std: float
) -> dict[str, Any]:
    """Declare the projections: `query [D, N, H]`, `key`/`value [D, G, H]`, `out [N, H, D]`."""
    heads = {"heads": config.heads, "head_dim": config.head_dim}
    groups = {"kv_heads": config.groups, "head_dim": config.head_dim}
    source = {"embed": source_hidden}
    params: dict[str, Any] = {
        "query": dense_params({"embed": hidden}, heads, bias=config.bias, std=std),
        "key": dense_params(source, groups, bias=config.bias, std=std),
        "value": dense_params(source, groups, bias=config.bias, std=std),
        "out": dense_params(heads, {"embed": hidden}, bias=config.out_bias, std=out_std),
    }
    if config.qk_norm is not None:
        params["query_norm"] = norm_params(config.qk_norm, config.head_dim, "head_dim")
        params["key_norm"] = norm_params(config.qk_norm, config.head_dim, "head_dim")
    if config.global_projections:
        for name in GLOBAL:
            params[f"{name}_global"] = params[name]
    if config.disentangled and not config.shared_positions:
        if "c2p" in config.disentangled:
            params["position_key"] = params["key"]
        if "p2c" in config.disentangled:
            params["position_query"] = params["query"]
    return params


def global_params(params: Params) -> Params:
    """The projections of globally attending tokens under the ordinary names."""
    return {**params, **{name: params[f"{name}_global"] for name in GLOBAL}}


def keys_values(
    config: Attention,
    params: Params,
    states: jax.Array,
    positions: jax.Array | None,
    execution: Execution = DEFAULT,
) -> KV:
    """Project states `[B, S, D]` to keys and values `[B, G, S, H]`."""
    key, value = dense(params["key"], states), dense(params["value"], states)
    return _keys_values(config, params, key, value, positions, execution)


def _keys_values(
    config: Attention,
    params: Params,
    key: jax.Array,
    value: jax.Array,
    positions: jax.Array | None,
    execution: Execution,
) -> KV:
    """Keys and values `[B, G, S, H]` from projections `[B, S, G, H]`."""
    if config.qk_norm is not None:
        key = norm(config.qk_norm, params["key_norm"], key)
    if config.rotary is not None and positions is not None:
        key = rotate(config.rotary, key, positions)
        value = rotate(config.rotary, value, positions) if config.rotary.values else value
    axes = ("act_batch", "act_heads", "act_length", None)
    key, value = (constrain(execution, jnp.swapaxes(x, 1, 2), *axes) for x in (key, value))
    return KV(key, value)


def queries_keys_values(
    config: Attention,
    params: Params,
    states: jax.Array,
    positions: jax.Array | None,
    execution: Execution = DEFAULT,
) -> tuple[jax.Array, KV]:
    """Project states `[B, S, D]` to queries `[B, S, N, H]`, for `attend`, and keys and values."""
    query, key, value = dense_each(params, ("query", "key", "value"), states)
    query = _query(config, params, query, positions)
    return query, _keys_values(config, params, key, value, positions, execution)


def _query(
    config: Attention, params: Params, query: jax.Array, positions: jax.Array | None
) -> jax.Array:
    if config.qk_norm is not None:
        query = norm(config.qk_norm, params["query_norm"], query)
    if config.rotary is not None and positions is not None:
        query = rotate(config.rotary, query, positions)
    return query


def attend(
    config: Attention,
    params: Params,
    x: jax.Array,
    kv: KV | Cache,
    *,
    visible: Visible,
    query: jax.Array | None = None,
    bias: jax.Array | None = None,
    relative: Relative | None = None,
    positions: jax.Array | None = None,
    layer: jax.Array | int = 0,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    kernel: str = "dense",
    prefix: Prefix | None = None,
    execution: Execution = DEFAULT,
) -> tuple[jax.Array, jax.Array | None]:
    """Attend from states `x` `[B, Q, D]` to keys and values.

    Args:
        visible: who may attend to whom. A row that hides everything averages values, so that it
            stays finite.
        query: of `queries_keys_values`, where it is known already.
        bias: added to the scores, broadcastable to `[B, N, Q, S]`.
        relative: for disentangled attention.
        positions: `[B|1, Q]`, for rotary embeddings.
        layer: this layer's number from zero, for `scale_by_layer`.
        kernel: as `resolve_attention` chose.
        prefix: of a `Cache`, what is in use; `visible` hides the rest.

    Returns:
        The output `[B, Q, D]` and the attention weights `[B, N, Q, S]` (float32, before dropout),
        which only the `dense` kernel has, over whole keys.
    """
    if query is None:
        query = _query(config, params, dense(params["query"], x), positions)
    query = constrain(execution, query, "act_batch", "act_length", "act_heads", None)
    scale = config.head_dim**-0.5 if config.scale is None else config.scale
    scale = scale / (layer + 1) if config.scale_by_layer else scale
    if prefix is not None:
        assert isinstance(kv, Cache)
        y, weights = cached_attention(config, query, kv, visible.mask, bias, scale, prefix), None
    elif kernel == "dense":
        mixing = (dropout_rate, dropout_key)
        y, weights = _dense_attention(
            config, params, query, kv, visible.mask, bias, relative, scale, *mixing
        )
    else:
        y, weights = (
            fused_attention(execution, kernel, config, query, *kv, visible, bias=bias, scale=scale),
            None,
        )
    y = constrain(execution, y, "act_batch", "act_length", "act_heads", None)
    return dense(params["out"], y, inputs=2), weights


def _dense_attention(
    config: Attention,
    params: Params,
    query: jax.Array,
    kv: KV | Cache,
    mask: jax.Array | None,
    bias: jax.Array | None,
    relative: Relative | None,
    scale: jax.Array | float,
    dropout_rate: float,
    dropout_key: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Attend from queries `[B, Q, N, H]`: `[B, Q, N, H]` and the weights `[B, N, Q, S]`."""
    b, q, n, h = query.shape
    g = config.groups
    query = query.reshape(b, q, g, n // g, h)
    scores = _scores(query, kv)
    if config.disentangled:
        assert relative is not None
        assert isinstance(kv, KV)
        scores = scores + _position_scores(config, params, query, kv.key, relative)
    scores = scores * scale
    if config.softcap is not None:
        scores = config.softcap * jnp.tanh(scores / config.softcap)
    if bias is not None:
        scores = scores + bias.reshape(bias.shape[0], g, n // g, *bias.shape[2:])
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores, axis=-1)
    mixed = dropout(weights, dropout_rate, dropout_key).astype(kv.value.dtype)
    return _mix(mixed, kv).reshape(b, q, n, h), weights.reshape(b, n, q, -1)


def cached_attention(
    config: Attention,
    query: jax.Array,
    cache: Cache,
    mask: jax.Array | None,
    bias: jax.Array | None,
    scale: jax.Array | float,
    prefix: Prefix,
) -> jax.Array:
    """Attend from queries `[B, Q, N, H]` to the part of a cache that is in use: `[B, Q, N, H]`."""

    def over(size: int) -> Callable[..., jax.Array]:
        def run(
            query: jax.Array, cache: Cache, mask: jax.Array | None, bias: jax.Array | None
        ) -> jax.Array:
            if size == 0:
                return jnp.zeros_like(query)
            part = Cache(cache.key[..., :size], cache.value[:, :, :size])
            mask, bias = (None if x is None else x[..., :size] for x in (mask, bias))
            rest = (mask, bias, None, scale, 0.0, None)
            return _dense_attention(config, {}, query, part, *rest)[0]

        return run

    branches = [over(size) for size in prefix.sizes]
    return jax.lax.switch(prefix.chosen, branches, query, cache, mask, bias)


def _scores(query: jax.Array, kv: KV | Cache) -> jax.Array:
    """Products of queries `[B, Q, G, R, H]` with keys: float32 `[B, G, R, Q, S]`."""
    # Moved before the product, not after it: there are fewer queries than scores. (XLA on CPU went
    # over all scores for it even where R is 1: a tenth of encoding 8 x 512 tokens and decoding 64.)
    query = jnp.moveaxis(query, 1, 3)
    if isinstance(kv, KV):
        return jnp.einsum("bgrqh,bgsh->bgrqs", query, kv.key, preferred_element_type=jnp.float32)
    b, g, r, q, h = query.shape
    rows = query.reshape(b, g, r * q, h)
    scores = jax.lax.dot_general(
        rows, kv.key, (((3,), (2,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32
    )
    return scores.reshape(b, g, r, q, -1)


def _mix(weights: jax.Array, kv: KV | Cache) -> jax.Array:
    """Values averaged by weights `[B, G, R, Q, S]`: `[B, Q, G, R, H]`."""
    if isinstance(kv, KV):
        return jnp.moveaxis(jnp.einsum("bgrqs,bgsh->bgrqh", weights, kv.value), 3, 1)
    b, g, r, q, s = weights.shape
    rows = weights.reshape(b, g, r * q, s)
    y = jax.lax.dot_general(rows, kv.value, (((3,), (2,)), ((0, 1), (0, 1))))
    return jnp.moveaxis(y.reshape(b, g, r, q, -1), 3, 1)


def _position_scores(
    config: Attention, params: Params, query: jax.Array, key: jax.Array, relative: Relative
) -> jax.Array:
    """Scores between contents and relative positions, `[B, G, R, Q, S]`, before the scale.

    Each content meets every row of the table once; a pair's row is then picked. `query` is
    `[B, Q, G, R, H]`, `key` `[B, G, S, H]`; the letter p counts the table's rows.
    """
    own = not config.shared_positions
    table, total = relative.table, jnp.zeros((), jnp.float32)
    rows = relative.rows[:, None, None]
    if "c2p" in config.disentangled:
        keys = dense(params["position_key" if own else "key"], table)
        each = jnp.einsum("bqgrh,pgh->bgrqp", query, keys, preferred_element_type=jnp.float32)
        total = total + jnp.take_along_axis(each, rows, axis=-1)
    if "p2c" in config.disentangled:
        queries = dense(params["position_query" if own else "query"], table)
        queries = queries.reshape(-1, *query.shape[2:])
        each = jnp.einsum("bgsh,pgrh->bgrsp", key, queries, preferred_element_type=jnp.float32)
        total = total + jnp.swapaxes(
            jnp.take_along_axis(each, jnp.swapaxes(rows, -1, -2), axis=-1), -1, -2
        )
    return total
