"""The trunk: embeddings, blocks scanned over layers, final norm; whole sequences or step by step.

`transformer(config, params, ...)` computes with what `trunk_params.py` declares; both read nothing
but the configuration. Axis letters as in `attention.py`.

Layers come stacked, as declared (`[repeat, ...]`), and run as one `lax.scan` per segment, so that
compile time does not grow with depth; or, as `execution` says, as straight-line code. Unstacked by
`unstack` into a tuple per segment they always run straight: the layout for decoding, where each
layer owns a cache. What one layer does is in `block.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_encdec import attention as attn
from jax_encdec.attention import KV, Cache
from jax_encdec.attention_kernels import Visible
from jax_encdec.block import Call, LayerCache, Trace, run_block
from jax_encdec.config import Attention, Block, Segment, TransformerConfig
from jax_encdec.embedding import embed, logits
from jax_encdec.execution import DEFAULT, Execution, constrain, remat
from jax_encdec.layers import Params, dropout, norm
from jax_encdec.trunk_params import split_layers


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


@partial(
    jax.jit,
    static_argnames=("config", "dtype", "execution", "output_hidden_states", "output_attentions"),
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
    execution: Execution = DEFAULT,
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
        execution: how it is computed; the result is the same up to rounding.
    """
    ids = input_ids if inputs_embeds is None else inputs_embeds
    assert ids is not None
    order = jnp.arange(ids.shape[1], dtype=jnp.int32)[None, :]
    if segment_ids is not None and position_ids is None:
        position_ids = attn.segment_positions(segment_ids)
    cross = (segment_ids, encoder_segment_ids) if encoder_segment_ids is not None else (None, None)
    buckets, bias = _bias(config, params, order, order)
    call = Call(
        config=config,
        execution=execution,
        positions=order if position_ids is None else position_ids,
        order=order,
        key_order=order,
        # Windows differ between attentions and are applied there.
        visible=attn.visible(order, attention_mask, segment_ids, segment_ids, config.causal),
        encoder_visible=attn.visible(order, encoder_mask, *cross, causal=False),
        attention_mask=attention_mask,
        global_mask=None if global_attention_mask is None else global_attention_mask.astype(bool),
        encoder_states=encoder_states,
        buckets=buckets,
        bias=bias,
        relative=_relative(config, params, order, dtype),
        dropout_key=dropout_key,
        cache_slot=None,
        cache_prefix=None,
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
    x = constrain(execution, x, "act_batch", "act_length", "act_embed")
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
    call: Call, params: Params, x: jax.Array, caches: Sequence[LayerCache] | None
) -> TransformerOutput:
    """Run all segments; with caches (one per layer), layers must come unstacked."""
    config, first, traces = call.config, 0, [Trace(x, None, None)]
    new_caches: list[LayerCache] = []
    for i, segment in enumerate(config.segments):
        period, size = params[f"segment_{i}"], len(segment.blocks)
        stacked = isinstance(period, Mapping)
        if stacked and call.execution.scan_layers and caches is None:
            x, ys = _scan(call, segment, period, x, first)
            traces += [
                jax.tree.map(lambda leaf, r=r: leaf[r], ys[j])
                for r in range(segment.repeat)
                for j in range(size)
            ]
            first += size * segment.repeat
            continue
        for p in split_layers(segment, period) if stacked else period:
            for j, block in enumerate(segment.blocks):
                if caches is None:
                    x, trace = _layer(call, block, scanned=False)(p[f"block_{j}"], x, first)
                else:
                    x, trace, cache = run_block(
                        call, block, p[f"block_{j}"], x, first, caches[first]
                    )
                    new_caches.append(cache)
                traces.append(trace)
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


def _scan(
    call: Call, segment: Segment, period: Params, x: jax.Array, first: int
) -> tuple[jax.Array, Any]:
    """Run a segment's stacked layers, numbered from `first`, as a loop."""
    layers = [_layer(call, block, scanned=True) for block in segment.blocks]

    def body(x: jax.Array, scanned: Any) -> tuple[jax.Array, Any]:
        own, number = scanned
        traces = []
        for j, layer in enumerate(layers):
            x, trace = layer((period if segment.share else own)[f"block_{j}"], x, number + j)
            traces.append(trace)
        return x, tuple(traces)

    numbers = first + len(layers) * jnp.arange(segment.repeat, dtype=jnp.int32)
    return jax.lax.scan(body, x, (None if segment.share else period, numbers))


def _layer(call: Call, block: Block, *, scanned: bool) -> Callable[..., tuple[jax.Array, Trace]]:
    """A block as a function of its parameters, its input and its number."""

    def layer(params: Params, x: jax.Array, number: Any) -> tuple[jax.Array, Trace]:
        return run_block(call, block, params, x, number, None)[:2]

    return remat(call.execution, layer, scanned=scanned)


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
                        cache[sub.name] = Cache.of(attn.keys_values(sub.f, p, encoder_states, None))
                    else:
                        empty = jnp.zeros((pools, sub.f.groups, slots, sub.f.head_dim), dtype)
                        cache[sub.name] = Cache.of(KV(empty, empty))
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
    prefixes: tuple[int, ...] = (),
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
        prefixes: static, in steps, ascending, all of them last: each gets a program of its own,
            and the shortest that holds every step so far is run; none: all slots are looked at.
    """
    _, lanes, slots = visible.shape
    queries = jnp.full((1, lanes), position, jnp.int32)
    keys = (jnp.arange(slots, dtype=jnp.int32) // lanes)[None, :]
    buckets, bias = _bias(config, params, queries[:, :1], keys)  # all lanes are at one place
    sizes = tuple(steps * lanes for steps in prefixes)
    call = Call(
        config=config,
        execution=DEFAULT,
        positions=queries,
        order=queries,
        key_order=keys,
        visible=Visible(visible),
        encoder_visible=attn.visible(queries, encoder_mask, None, None, causal=False),
        attention_mask=None,
        global_mask=None,
        encoder_states=None,
        buckets=buckets,
        bias=bias,
        relative=None,
        dropout_key=None,
        cache_slot=position * lanes,
        cache_prefix=attn.Prefix.of(sizes, (position + 1) * lanes) if sizes else None,
        hidden_states=False,
        attentions=False,
    )
    x = embed(config, params, tokens, positions=token_positions, dtype=dtype)
    out = _run(call, params, x, caches)
    assert out.caches is not None
    return logits(config, params, out.last_hidden_state), out.caches
