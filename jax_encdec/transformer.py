"""The trunk: embeddings, blocks scanned over layers, final norm; whole sequences or step by step.

`transformer(config, params, ...)` computes with what `trunk_params.py` declares; both read nothing
but the configuration. Axis letters as in `attention.py`.

Layers come either stacked, as declared (`[repeat, ...]`, one `lax.scan` per segment: compile time
does not grow with depth), or unstacked by `unstack` into a tuple per segment, which runs as
straight-line code: the layout for decoding, where each layer owns a cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_encdec import attention as attn
from jax_encdec.attention import KV
from jax_encdec.config import (
    Attention,
    Block,
    Convolution,
    FeedForward,
    Segment,
    TransformerConfig,
)
from jax_encdec.embedding import embed, logits
from jax_encdec.layers import (
    Params,
    activation,
    dense,
    dropout,
    norm,
)

LayerCache = Mapping[str, KV]
"""Keys and values of one layer, by sublayer name."""


class Trace(NamedTuple):
    """What one layer lets out for inspection; fields not asked for are None."""

    state: jax.Array | None
    self_attention: jax.Array | None
    cross_attention: jax.Array | None


class TransformerOutput(NamedTuple):
    """Result of the trunk."""

    last_hidden_state: jax.Array
    """`[B, Q, D]`, after the final norm."""
    hidden_states: tuple[jax.Array, ...] | None
    """The embeddings, then each layer's output, the last one after the final norm."""
    attentions: tuple[jax.Array, ...] | None
    """Self-attention weights, `[B, N, Q, S]` per layer."""
    cross_attentions: tuple[jax.Array, ...] | None
    caches: tuple[LayerCache, ...] | None
    """The caches passed in, with this call's keys and values written."""


# Whole sequences ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Call:
    """What every layer sees and none changes."""

    config: TransformerConfig
    positions: jax.Array
    """`[B|1, Q]`, of the queries, for rotation."""
    order: jax.Array
    key_order: jax.Array
    """`[1, Q]` and `[1, S]`: places in the sequence, for windows."""
    mask: jax.Array | None
    attention_mask: jax.Array | None
    global_mask: jax.Array | None
    encoder_states: jax.Array | None
    encoder_mask: jax.Array | None
    buckets: jax.Array | None
    """Bucketed distances `[B|1, Q, S]`, for biases."""
    bias: jax.Array | None
    """The bias `[B|1, N, Q, S]` that all layers share."""
    relative: attn.Relative | None
    dropout_key: jax.Array | None
    cache_slot: jax.Array | None
    hidden_states: bool
    attentions: bool

    def key(self, *path: jax.Array | int) -> jax.Array | None:
        key = self.dropout_key
        for part in path:
            key = None if key is None else jax.random.fold_in(key, part)
        return key


@partial(
    jax.jit,
    static_argnames=("config", "dtype", "output_hidden_states", "output_attentions"),
)
def transformer(
    config: TransformerConfig,
    params: Params,
    input_ids: jax.Array | None = None,
    *,
    inputs_embeds: jax.Array | None = None,
    attention_mask: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    token_type_ids: jax.Array | None = None,
    position_ids: jax.Array | None = None,
    encoder_states: jax.Array | None = None,
    encoder_mask: jax.Array | None = None,
    encoder_segment_ids: jax.Array | None = None,
    global_attention_mask: jax.Array | None = None,
    dtype: Any = jnp.float32,
    dropout_key: jax.Array | None = None,
    output_hidden_states: bool = False,
    output_attentions: bool = False,
) -> TransformerOutput:
    """Run whole sequences through the trunk, as one compiled function.

    Args:
        input_ids: tokens `[B, Q]`, or None with `inputs_embeds` `[B, Q, width]`.
        attention_mask: `[B, Q]` of 0/1, 0 for pads.
        segment_ids: `[B, Q]`; tokens see only their own segment (several texts in one row).
        position_ids: `[B|1, Q]`, counted from zero; by default in order, anew in each segment.
        encoder_states: `[B, S, D_encoder]`, for cross-attention; `encoder_mask` `[B, S]`.
        global_attention_mask: `[B, Q]` of 0/1, 1 for tokens that see and are seen by all in
            attentions with global projections.
        dropout_key: None switches dropout off.
    """
    ids = input_ids if inputs_embeds is None else inputs_embeds
    assert ids is not None
    order = jnp.arange(ids.shape[1], dtype=jnp.int32)[None, :]
    mask = None if attention_mask is None else attn.padding_mask(attention_mask)
    cross = None if encoder_mask is None else attn.padding_mask(encoder_mask)
    if segment_ids is not None:
        if position_ids is None:
            position_ids = attn.segment_positions(segment_ids)
        mask = attn.both(mask, attn.segment_mask(segment_ids, segment_ids))
        if encoder_segment_ids is not None:
            cross = attn.both(cross, attn.segment_mask(segment_ids, encoder_segment_ids))
    buckets, bias = _bias(config, params, order, order)
    call = _Call(
        config=config,
        positions=order if position_ids is None else position_ids,
        order=order,
        key_order=order,
        # Windows differ between attentions and are applied there.
        mask=attn.both(mask, attn.positional_mask(order, order, causal=config.causal, window=None)),
        attention_mask=attention_mask,
        global_mask=None if global_attention_mask is None else global_attention_mask.astype(bool),
        encoder_states=encoder_states,
        encoder_mask=cross,
        buckets=buckets,
        bias=bias,
        relative=_relative(config, params, order, dtype),
        dropout_key=dropout_key,
        cache_slot=None,
        hidden_states=output_hidden_states,
        attentions=output_attentions,
    )
    x = embed(
        config,
        params,
        input_ids,
        inputs_embeds=inputs_embeds,
        token_type_ids=token_type_ids,
        positions=position_ids,
        attention_mask=attention_mask,
        dtype=dtype,
        dropout_key=call.key(0),
    )
    return _run(call, params, x, None)


def _bias(
    config: TransformerConfig, params: Params, queries: jax.Array, keys: jax.Array
) -> tuple[jax.Array | None, jax.Array | None]:
    """Bucketed distances and, where all layers share it, the bias."""
    if config.bucket_bias is None:
        return None, None
    buckets = attn.distance_buckets(config.bucket_bias, queries, keys)
    if config.bucket_bias.per_layer:
        return buckets, None
    return buckets, attn.bucket_bias(params["bucket_bias"], buckets)


def _relative(
    config: TransformerConfig, params: Params, order: jax.Array, dtype: Any
) -> attn.Relative | None:
    if config.relative is None:
        return None
    table = jnp.asarray(params["relative"]["table"]).astype(dtype)
    if config.relative.norm is not None:
        table = norm(config.relative.norm, params["relative"]["norm"], table)
    return attn.Relative(table, attn.relative_rows(config.relative, order, order))


def _run(
    call: _Call, params: Params, x: jax.Array, caches: Sequence[LayerCache] | None
) -> TransformerOutput:
    """Run all segments; with caches (one per layer), layers must come unstacked."""
    config, first, traces = call.config, 0, [Trace(x, None, None)]
    new_caches: list[LayerCache] = []
    for i, segment in enumerate(config.segments):
        period, size = params[f"segment_{i}"], len(segment.blocks)
        if isinstance(period, Mapping) and caches is None:

            def body(x, scanned, segment=segment):
                period, number = scanned
                return _period(call, segment, period, x, number)

            numbers = first + size * jnp.arange(segment.repeat, dtype=jnp.int32)
            if segment.share:
                x, ys = jax.lax.scan(lambda x, n, p=period, body=body: body(x, (p, n)), x, numbers)
            else:
                x, ys = jax.lax.scan(body, x, (period, numbers))
            traces += [
                jax.tree.map(lambda leaf, r=r: leaf[r], ys[j])
                for r in range(segment.repeat)
                for j in range(size)
            ]
            first += size * segment.repeat
        else:
            for p in period:
                for j, block in enumerate(segment.blocks):
                    cache = None if caches is None else caches[first]
                    x, trace, cache = _block(call, block, p[f"block_{j}"], x, first, cache)
                    traces.append(trace)
                    new_caches.append(cache)
                    first += 1
    if config.final_norm is not None:
        x = norm(config.final_norm, params["final_norm"], x)
        x = dropout(x, config.dropout.final, call.key(1 + config.layers))
        traces[-1] = traces[-1]._replace(state=x)
    states = tuple(t.state for t in traces if t.state is not None)
    selfs = tuple(t.self_attention for t in traces if t.self_attention is not None)
    crosses = tuple(t.cross_attention for t in traces if t.cross_attention is not None)
    return TransformerOutput(
        last_hidden_state=x,
        hidden_states=states if call.hidden_states else None,
        attentions=selfs if call.attentions else None,
        cross_attentions=crosses if call.attentions and crosses else None,
        caches=tuple(new_caches) if caches is not None else None,
    )


def _period(
    call: _Call, segment: Segment, period: Params, x: jax.Array, number: jax.Array
) -> tuple[jax.Array, tuple[Trace, ...]]:
    traces = []
    for j, block in enumerate(segment.blocks):
        x, trace, _ = _block(call, block, period[f"block_{j}"], x, number + j, None)
        traces.append(trace)
    return x, tuple(traces)


def _block(
    call: _Call,
    block: Block,
    params: Params,
    x: jax.Array,
    number: jax.Array | int,
    cache: LayerCache | None,
) -> tuple[jax.Array, Trace, LayerCache]:
    """Run one block: its output, what it lets out, its cache with this call's entries."""
    weights: dict[str, jax.Array] = {}
    cache, start = dict(cache or {}), x
    for i, sub in enumerate(block.sublayers):
        p = params[sub.name]
        h = x if sub.before is None else norm(sub.before, p["norm_before"], x)
        keys = [call.key(1 + number, 3 * i + j) for j in range(3)]
        if isinstance(sub.f, Attention):
            kv = _keys_values(call, sub.f, p, h, cache.get(sub.name))
            if cache:
                cache[sub.name] = kv
            y, weights[sub.name] = _attend(call, sub.f, p, h, kv, number, keys[1])
        elif isinstance(sub.f, Convolution):
            y = _convolve(call, sub.f, p, start, keys[1])
        else:
            y = _feed_forward(call, sub.f, p, h, keys[1])
        if sub.branch is not None:
            y = norm(sub.branch, p["norm_branch"], y)
        x = x + (dropout(y, call.config.dropout.residual, keys[2]) if sub.dropout else y)
        if sub.after is not None:
            x = norm(sub.after, p["norm_after"], x)
    trace = Trace(
        x if call.hidden_states else None,
        weights.get("self_attention") if call.attentions else None,
        weights.get("cross_attention") if call.attentions else None,
    )
    return x, trace, cache


def _keys_values(
    call: _Call, config: Attention, params: Params, h: jax.Array, cached: KV | None
) -> KV:
    if config.source == "encoder":
        if cached is not None:
            return cached
        assert call.encoder_states is not None
        return attn.keys_values(config, params, call.encoder_states.astype(h.dtype), None)
    if cached is None:
        return attn.keys_values(config, params, h, call.positions)
    new = attn.keys_values(config, params, _rows_of(cached, h), call.positions)
    assert call.cache_slot is not None
    zero = jnp.zeros((), jnp.int32)  # all of one type, also where integers default to 64 bits
    start = (zero, zero, call.cache_slot, zero)
    return KV(
        *(jax.lax.dynamic_update_slice(c, n, start) for c, n in zip(cached, new, strict=True))
    )


def _attend(
    call: _Call,
    config: Attention,
    params: Params,
    h: jax.Array,
    kv: KV,
    number: jax.Array | int,
    key: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    cross = config.source == "encoder"
    mask = call.encoder_mask if cross else call.mask
    chosen = call.global_mask if config.global_projections and not cross else None
    near = mask
    if config.window is not None and not cross:
        window = attn.positional_mask(
            call.order, call.key_order, causal=False, window=config.window
        )
        assert window is not None
        near = attn.both(mask, window if chosen is None else window | chosen[:, None, :])
    bias = call.bias
    if "bucket_bias" in params:
        assert call.buckets is not None
        bias = attn.bucket_bias(params["bucket_bias"], call.buckets)
    relative = call.relative
    if relative is not None and key is not None:
        rate, own = call.config.dropout.residual, jax.random.fold_in(key, 0)
        relative = relative._replace(table=dropout(relative.table, rate, own))

    def attend(params: Params, kv: KV, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        y, weights = attn.attend(
            config,
            params,
            _rows_of(kv, h),
            kv,
            mask=mask,
            bias=bias if config.bucket_bias else None,
            relative=relative,
            positions=None if cross else call.positions,
            layer=number,
            dropout_rate=call.config.dropout.attention,
            dropout_key=key,
        )
        return y.reshape(h.shape), weights

    y, weights = attend(params, kv, near)
    if chosen is None:
        return y, weights
    params = attn.global_params(params)
    everywhere, theirs = attend(params, attn.keys_values(config, params, h, call.positions), mask)
    return (
        jnp.where(chosen[:, :, None], everywhere, y),
        jnp.where(chosen[:, None, :, None], theirs, weights),
    )


def _rows_of(kv: KV, h: jax.Array) -> jax.Array:
    """States `[B, Q, D]` by the rows that own the keys: the same, or `[B * Q, 1, D]` for lanes."""
    return h.reshape(kv.key.shape[0], -1, h.shape[-1])


def _feed_forward(
    call: _Call, config: FeedForward, params: Params, h: jax.Array, key: jax.Array | None
) -> jax.Array:
    up, act = dense(params["up"], h), activation(config.activation)
    y = act(dense(params["gate"], h)) * up if config.gated else act(up)
    return dense(params["down"], dropout(y, call.config.dropout.activation, key))


def _convolve(
    call: _Call, config: Convolution, params: Params, x: jax.Array, key: jax.Array | None
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


# Decoding ----------------------------------------------------------------------------------------


def init_caches(
    config: TransformerConfig,
    params: Params,
    encoder_states: jax.Array,
    *,
    pools: int,
    slots: int,
) -> tuple[LayerCache, ...]:
    """Caches for decoding from encoder states `[B, S, D_encoder]`, one per layer.

    Self-attention gets `pools` empty pools of `slots` keys and values each: one per source, which
    its beams share, or one per lane. Cross-attention gets the keys and values of the source,
    projected here, once, however many lanes read them.
    """
    dtype = encoder_states.dtype
    caches = []
    for i, segment in enumerate(config.segments):
        for period in params[f"segment_{i}"]:
            for j, block in enumerate(segment.blocks):
                cache = {}
                for sub in block.sublayers:
                    if not isinstance(sub.f, Attention):
                        continue
                    if sub.f.source == "encoder":
                        p = period[f"block_{j}"][sub.name]
                        cache[sub.name] = attn.keys_values(sub.f, p, encoder_states, None)
                    else:
                        empty = jnp.zeros((pools, sub.f.groups, slots, sub.f.head_dim), dtype)
                        cache[sub.name] = KV(empty, empty)
                caches.append(cache)
    return tuple(caches)


def decode_step(
    config: TransformerConfig,
    params: Params,
    tokens: jax.Array,
    caches: tuple[LayerCache, ...],
    *,
    position: jax.Array,
    token_positions: jax.Array,
    visible: jax.Array,
    encoder_mask: jax.Array | None,
    dtype: Any,
) -> tuple[jax.Array, tuple[LayerCache, ...]]:
    """Feed one token per lane, `tokens` `[B, K]`: float32 logits `[B, K, V]` and the new caches.

    Lanes are beams that share a source's pool of P = K lanes, slot `t * P + k` being beam k's at
    step t; or they never mix and each has a pool of its own, P = 1.

    Args:
        params: a trunk's parameters, unstacked.
        position: scalar int32, the step t.
        token_positions: `[B, K]`, the tokens' positions for the embedding table.
        visible: boolean `[B, K, slots]` for shared pools or `[B * K, 1, slots]` for own ones: the
            slots on each lane's path, this step's included.
        encoder_mask: `[B, S]` of 0/1.
    """
    _, lanes, slots = visible.shape
    queries = jnp.full((1, lanes), position, jnp.int32)
    keys = (jnp.arange(slots, dtype=jnp.int32) // lanes)[None, :]
    buckets, bias = _bias(config, params, queries, keys)
    call = _Call(
        config=config,
        positions=queries,
        order=queries,
        key_order=keys,
        mask=visible,
        attention_mask=None,
        global_mask=None,
        encoder_states=None,
        encoder_mask=None if encoder_mask is None else attn.padding_mask(encoder_mask),
        buckets=buckets,
        bias=bias,
        relative=None,
        dropout_key=None,
        cache_slot=position * lanes,
        hidden_states=False,
        attentions=False,
    )
    x = embed(config, params, tokens, positions=token_positions, dtype=dtype)
    out = _run(call, params, x, caches)
    assert out.caches is not None
    return logits(config, params, out.last_hidden_state), out.caches
