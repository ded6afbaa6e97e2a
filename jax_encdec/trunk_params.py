"""The trunk's parameters: declared from the configuration, stacked layer by layer.

`transformer_params(config)` is a nested dict of `Param`, one entry per part of the trunk; a
segment's leaves are stacked `[repeat, ...]`. `unstack` gives every layer a tree of its own, which
runs as straight-line code.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jax_encdec import attention as attn
from jax_encdec.config import (
    Attention,
    Block,
    Convolution,
    Kept,
    Segment,
    Sublayer,
    TransformerConfig,
)
from jax_encdec.embedding import embedding_params, head_params
from jax_encdec.host_arrays import HostArray
from jax_encdec.layers import (
    Param,
    Params,
    dense_params,
    norm_params,
    stack,
)


def transformer_params(config: TransformerConfig) -> dict[str, Any]:
    """Declare every parameter of a trunk, as a nested dict of `Param`."""
    params: dict[str, Any] = {"embedding": embedding_params(config)}
    if config.relative is not None:
        shape = (2 * config.relative.span, config.hidden)
        relative: dict[str, Any] = {"table": Param(shape, (None, "embed"), config.init_std)}
        if config.relative.norm is not None:
            relative["norm"] = norm_params(config.relative.norm, config.hidden)
        params["relative"] = relative
    if config.bucket_bias is not None and not config.bucket_bias.per_layer:
        heads = next(a.heads for a in config.attentions() if a.bucket_bias)
        params["bucket_bias"] = attn.bucket_bias_params(config.bucket_bias, heads, config.init_std)
    for i, segment in enumerate(config.segments):
        period = {f"block_{j}": _block_params(config, b) for j, b in enumerate(segment.blocks)}
        params[f"segment_{i}"] = period if segment.share else stack(period, segment.repeat)
    if config.final_norm is not None:
        params["final_norm"] = norm_params(config.final_norm, config.hidden)
    if config.head is not None:
        head = head_params(config)
        if head:
            params["head"] = head
    if config.kept:
        params["kept"] = {kept.name: _kept_param(config, kept) for kept in config.kept}
    return params


def _kept_param(config: TransformerConfig, kept: Kept) -> Param:
    init = "sinusoidal" if kept.sinusoidal else config.init_std if len(kept.shape) > 1 else "zeros"
    return Param(kept.shape, (None,) * len(kept.shape), init, trained=False)


def _block_params(config: TransformerConfig, block: Block) -> dict[str, Any]:
    return {sub.name: _sublayer_params(config, sub) for sub in block.sublayers}


def _sublayer_params(config: TransformerConfig, sub: Sublayer) -> dict[str, Any]:
    params: dict[str, Any]
    std = config.init_std
    out_std = std if config.residual_init_std is None else config.residual_init_std
    if isinstance(sub.f, Attention):
        source = config.encoder_hidden if sub.f.source == "encoder" else None
        params = attn.attention_params(sub.f, config.hidden, source or config.hidden, std, out_std)
        if sub.f.bucket_bias and config.bucket_bias is not None and config.bucket_bias.per_layer:
            heads = sub.f.heads
            params["bucket_bias"] = attn.bucket_bias_params(config.bucket_bias, heads, std)
    elif isinstance(sub.f, Convolution):
        shape = (sub.f.width, config.hidden // sub.f.groups, config.hidden)
        params = {
            "kernel": Param(shape, (None, "embed_in", "embed"), std),
            "bias": Param((config.hidden,), ("embed",)),
        }
    else:
        embed, mlp, bias = {"embed": config.hidden}, {"mlp": sub.f.width}, sub.f.bias
        params = {
            "up": dense_params(embed, mlp, bias=bias, std=std),
            "down": dense_params(mlp, embed, bias=bias, std=out_std),
        }
        if sub.f.gated:
            params["gate"] = dense_params(embed, mlp, bias=bias, std=std)
    for place in ("before", "branch", "after"):
        if (rule := getattr(sub, place)) is not None:
            params[f"norm_{place}"] = norm_params(rule, config.hidden)
    return params


def unstack(config: TransformerConfig, params: Params) -> dict[str, Any]:
    """Turn each segment's stacked leaves into a tuple of per-repeat trees, where they are not."""
    out = dict(params)
    for i, segment in enumerate(config.segments):
        period = params[f"segment_{i}"]
        out[f"segment_{i}"] = period if isinstance(period, tuple) else split_layers(segment, period)
    return out


def split_layers(segment: Segment, period: Any) -> tuple[Any, ...]:
    """A segment's stacked leaves `[repeat, ...]` as one tree per repeat.

    All at once, so that the gradient of a leaf is its layers' gradients stacked once, where
    indexing layer by layer would add up as many zero-padded copies of the whole.
    """
    if segment.share:
        return (period,) * segment.repeat
    leaves, treedef = jax.tree.flatten(period)
    if leaves and isinstance(leaves[0], HostArray):
        each = ([leaf[i] for leaf in leaves] for i in range(segment.repeat))
        return tuple(jax.tree.unflatten(treedef, layer) for layer in each)
    sizes = (1,) * segment.repeat
    split = (jax.lax.split(jnp.asarray(leaf), sizes, axis=0) for leaf in leaves)
    layers = zip(*([jnp.squeeze(part, 0) for part in parts] for parts in split), strict=True)
    return tuple(jax.tree.unflatten(treedef, layer) for layer in layers)
