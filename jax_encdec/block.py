"""One block of the trunk: its sublayers in order, their residual branches, what they let out.

`run_block(call, block, params, x, number, cache)` is all that `transformer.py` asks for. Axis
letters as in `attention.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_encdec import attention as attn
from jax_encdec.attention import KV, Cache
from jax_encdec.attention_kernels import Visible, platform, resolve_attention
from jax_encdec.config import Attention, Block, Convolution, FeedForward, TransformerConfig
from jax_encdec.execution import Execution, constrain
from jax_encdec.layers import Params, activation, dense, dense_each, dropout, norm

LayerCache = Mapping[str, Cache]
"""Keys and values of one layer, by sublayer name."""


class Trace(NamedTuple):
    """What one layer lets out for inspection; fields not asked for are None."""

    state: jax.Array | None
    self_attention: jax.Array | None
    cross_attention: jax.Array | None


@dataclass(frozen=True, kw_only=True)
class Call:
    """What every layer sees and none changes."""

    config: TransformerConfig
    execution: Execution
    positions: jax.Array
    """`[B|1, Q]`, of the queries, for rotation."""
    order: jax.Array
    key_order: jax.Array
    """`[1, Q]` and `[1, S]`: places in the sequence, for windows."""
    visible: Visible
    encoder_visible: Visible
    attention_mask: jax.Array | None
    global_mask: jax.Array | None
    encoder_states: jax.Array | None
    buckets: jax.Array | None
    """Bucketed distances `[B|1, Q, S]`, for biases."""
    bias: jax.Array | None
    """The bias `[B|1, N, Q, S]` that all layers share."""
    relative: attn.Relative | None
    dropout_key: jax.Array | None
    cache_slot: jax.Array | None
    cache_prefix: attn.Prefix | None
    """How much of each self-attention's cache is in use; None: look at all of it."""
    hidden_states: bool
    attentions: bool

    def key(self, *path: jax.Array | int) -> jax.Array | None:
        """The dropout key of one place; None without dropout."""
        key = self.dropout_key
        for part in path:
            key = None if key is None else jax.random.fold_in(key, part)
        return key


def run_block(
    call: Call,
    block: Block,
    params: Params,
    x: jax.Array,
    number: jax.Array | int,
    cache: LayerCache | None,
) -> tuple[jax.Array, Trace, LayerCache]:
    """Run one block: its output, what it lets out, its cache with this call's entries."""
    weights: dict[str, jax.Array | None] = {}
    cache, start = dict(cache or {}), x
    for i, sub in enumerate(block.sublayers):
        p = params[sub.name]
        h = x if sub.before is None else norm(sub.before, p["norm_before"], x)
        keys = [call.key(1 + number, 3 * i + j) for j in range(3)]
        if isinstance(sub.f, Attention):
            query, kv = _project(call, sub.f, p, h, cache.get(sub.name))
            if isinstance(kv, Cache):
                cache[sub.name] = kv
            y, weights[sub.name] = _attend(call, sub.f, p, h, query, kv, number, keys[1])
        elif isinstance(sub.f, Convolution):
            y = _convolve(call, sub.f, p, start, keys[1])
        else:
            y = _feed_forward(call, sub.f, p, h, keys[1])
        if sub.branch is not None:
            y = norm(sub.branch, p["norm_branch"], y)
        x = x + (dropout(y, call.config.dropout.residual, keys[2]) if sub.dropout else y)
        if sub.after is not None:
            x = norm(sub.after, p["norm_after"], x)
    x = constrain(call.execution, x, "act_batch", "act_length", "act_embed")
    trace = Trace(
        x if call.hidden_states else None,
        weights.get("self_attention") if call.attentions else None,
        weights.get("cross_attention") if call.attentions else None,
    )
    return x, trace, cache


def _project(
    call: Call, config: Attention, params: Params, h: jax.Array, cached: Cache | None
) -> tuple[jax.Array | None, KV | Cache]:
    """Queries, where they come of the same states as keys and values; keys and values."""
    if config.source == "encoder":
        if cached is not None:
            return None, cached
        assert call.encoder_states is not None
        states = call.encoder_states.astype(h.dtype)
        return None, attn.keys_values(config, params, states, None, call.execution)
    h = h if cached is None else _rows_of(cached, h)
    query, new = attn.queries_keys_values(config, params, h, call.positions, call.execution)
    if cached is None:
        return query, new
    assert call.cache_slot is not None
    return query, cached.write(new, call.cache_slot)


def _attend(
    call: Call,
    config: Attention,
    params: Params,
    h: jax.Array,
    query: jax.Array | None,
    kv: KV | Cache,
    number: jax.Array | int,
    key: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None]:
    cross = config.source == "encoder"
    seen = call.encoder_visible if cross else call.visible
    chosen = call.global_mask if config.global_projections and not cross else None
    near = seen
    if config.window is not None and not cross:
        window = attn.positional_mask(
            call.order, call.key_order, causal=False, window=config.window
        )
        assert window is not None
        window = window if chosen is None else window | chosen[:, None, :]
        masks = {"mask": attn.both(seen.mask, window), "rest": attn.both(seen.rest, window)}
        near = seen._replace(**masks)
    bias = call.bias
    if "bucket_bias" in params:
        assert call.buckets is not None
        bias = attn.bucket_bias(params["bucket_bias"], call.buckets)
    relative = call.relative
    if relative is not None and key is not None:
        rate, own = call.config.dropout.residual, jax.random.fold_in(key, 0)
        relative = relative._replace(table=dropout(relative.table, rate, own))
    kernel = _kernel(call, config, h, kv, key)

    def attend(
        params: Params, query: jax.Array | None, kv: KV | Cache, visible: Visible
    ) -> tuple[jax.Array, jax.Array | None]:
        y, weights = attn.attend(
            config,
            params,
            _rows_of(kv, h),
            kv,
            visible=visible,
            query=query,
            bias=bias if config.bucket_bias else None,
            relative=relative,
            positions=None if cross else call.positions,
            layer=number,
            dropout_rate=call.config.dropout.attention,
            dropout_key=key,
            kernel=kernel,
            prefix=None if cross else call.cache_prefix,
            execution=call.execution,
        )
        return y.reshape(h.shape), weights

    y, weights = attend(params, query, kv, near)
    if chosen is None:
        return y, weights
    params = attn.global_params(params)
    own = attn.keys_values(config, params, h, call.positions, call.execution)
    everywhere, theirs = attend(params, None, own, seen)
    if weights is not None and theirs is not None:
        weights = jnp.where(chosen[:, None, :, None], theirs, weights)
    return jnp.where(chosen[:, :, None], everywhere, y), weights


def _kernel(
    call: Call, config: Attention, h: jax.Array, kv: KV | Cache, key: jax.Array | None
) -> str:
    """The attention kernel for queries from `h` `[B, Q, D]`."""
    if call.cache_slot is not None:
        return "dense"  # few queries against a pool of slots
    return resolve_attention(
        call.execution,
        config,
        platform(),
        dtype=h.dtype,
        query_length=h.shape[1],
        key_length=kv.key.shape[2],
        dropout=0.0 if key is None else call.config.dropout.attention,
        weights=call.attentions,
        batch=h.shape[0],
    ).name


def _rows_of(kv: KV | Cache, h: jax.Array) -> jax.Array:
    """States `[B, Q, D]` by the rows that own the keys: the same, or `[B * Q, 1, D]` for lanes."""
    return h.reshape(kv.key.shape[0], -1, h.shape[-1])


def _feed_forward(
    call: Call, config: FeedForward, params: Params, h: jax.Array, key: jax.Array | None
) -> jax.Array:
    act = activation(config.activation)
    if config.gated:
        gate, up = dense_each(params, ("gate", "up"), h)
        y = act(gate) * up
    else:
        y = act(dense(params["up"], h))
    y = constrain(call.execution, y, "act_batch", "act_length", "act_mlp")
    return dense(params["down"], dropout(y, call.config.dropout.activation, key))


def _convolve(
    call: Call, config: Convolution, params: Params, x: jax.Array, key: jax.Array | None
) -> jax.Array:
    """Convolve `x` `[B, Q, D]` along its length; pads are zero going in and coming out."""
    shown = None
    if call.attention_mask is not None:
        shown = call.attention_mask.astype(x.dtype)[..., None]
        x = x * shown
    y = jax.lax.conv_general_dilated(
        x,
        params["kernel"].astype(x.dtype),
        window_strides=(1,),
        padding=[(config.width // 2, config.width // 2)],
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=config.groups,
    )
    y = y + params["bias"].astype(x.dtype)
    y = dropout(y if shown is None else y * shown, call.config.dropout.residual, key)
    return activation(config.activation)(y)
