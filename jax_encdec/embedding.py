"""The two ends of the trunk: token embeddings in, logits over the vocabulary out.

They stand together because they share parameters where a model ties them. Axis letters as in
`attention.py`, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_encdec.attention import learned_positions
from jax_encdec.config import Sinusoidal, TransformerConfig
from jax_encdec.dense_kernels import Kernel
from jax_encdec.execution import DEFAULT, Execution, constrain
from jax_encdec.layers import (
    Param,
    Params,
    activation,
    dense,
    dense_params,
    dropout,
    norm,
    norm_params,
)


def embedding_params(config: TransformerConfig) -> dict[str, Any]:
    """Declare the embeddings of a trunk."""
    embedding = config.embedding
    std, width = config.init_std, embedding.width
    params: dict[str, Any] = {"token": Param((embedding.vocab, width), ("vocab", "embed"), std)}
    position = embedding.position
    if position is not None and not isinstance(position, Sinusoidal):
        init = "sinusoidal" if position.fixed else std
        shape, axes = (position.length, width), (None, "embed")
        params["position"] = Param(shape, axes, init, trained=not position.fixed)
    if embedding.types:
        params["type"] = Param((embedding.types, width), (None, "embed"), std)
    if embedding.tasks:
        params["task"] = Param((embedding.tasks, width), (None, "embed"), std)
    if embedding.norm is not None:
        params["norm"] = norm_params(embedding.norm, width)
    if embedding.project:
        inputs, outputs = {"embed_in": width}, {"embed": config.hidden}
        params["project"] = dense_params(inputs, outputs, bias=True, std=std)
    return params


def embed(
    config: TransformerConfig,
    params: Params,
    input_ids: jax.Array | None,
    *,
    inputs_embeds: jax.Array | None = None,
    token_type_ids: jax.Array | None = None,
    positions: jax.Array | None = None,
    attention_mask: jax.Array | None = None,
    dtype: Any = jnp.float32,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Embed tokens `[B, Q]` (or embeddings `[B, Q, width]`) as states `[B, Q, D]` in `dtype`."""
    embedding, p = config.embedding, params["embedding"]
    if inputs_embeds is None:
        assert input_ids is not None
        x = _rows(p["token"], input_ids).astype(dtype) * jnp.asarray(embedding.scale, dtype)
    else:
        x = inputs_embeds.astype(dtype)  # scaled already, as most published models take them
    if embedding.norm is not None and embedding.norm_first:
        x = norm(embedding.norm, p["norm"], x)
    if embedding.types:
        types = jnp.zeros(x.shape[:2], jnp.int32) if token_type_ids is None else token_type_ids
        x = x + _rows(p["type"], types).astype(dtype)
    if embedding.tasks:
        x = x + p["task"][0].astype(dtype)
    if embedding.position is not None:
        if positions is None:
            positions = learned_positions(embedding.position, input_ids, x.shape[1])
        rows = positions + embedding.position.offset
        if isinstance(embedding.position, Sinusoidal):
            x = x + _sinusoids(embedding.position, rows, embedding.width).astype(dtype)
        else:
            table = p["position"]
            if embedding.position.fixed:
                table = jax.lax.stop_gradient(table)
            x = x + _rows(table, rows).astype(dtype)
    if embedding.norm is not None and not embedding.norm_first:
        x = norm(embedding.norm, p["norm"], x)
    if embedding.mask_pads and attention_mask is not None:
        x = x * attention_mask.astype(dtype)[..., None]
    x = dropout(x, config.dropout.embedding, dropout_key)
    return dense(p["project"], x) if embedding.project else x


def _rows(table: jax.Array, ids: jax.Array) -> jax.Array:
    # An id outside the table is NaN, never another row: JAX's default would clamp it.
    rows = jnp.asarray(table).at[ids]
    return rows.get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def _sinusoids(config: Sinusoidal, rows: jax.Array, width: int) -> jax.Array:
    """Sines, then cosines, of `rows` `[B|1, Q]`: float32 `[B|1, Q, width]`."""
    half = width // 2
    # Rounded as the published float32 ones are: far positions magnify the last bit.
    exponent = np.arange(half, dtype=np.float32) * np.float32(-math.log(10_000.0) / (half - 1))
    frequency = np.exp(exponent.astype(np.float64)).astype(np.float32)
    angle = rows.astype(jnp.float32)[..., None] * frequency
    parts = [jnp.sin(angle), jnp.cos(angle)]
    if width % 2:
        parts.append(jnp.zeros_like(angle[..., :1]))
    table = jnp.concatenate(parts, axis=-1)
    if config.zero_row is None:
        return table
    return jnp.where((rows == config.zero_row)[..., None], 0.0, table)


def head_params(config: TransformerConfig) -> dict[str, Any]:
    """Declare the language model head of a trunk; what is tied has no leaf of its own."""
    head = config.head
    assert head is not None
    width = config.embedding.width if head.width is None else head.width
    params: dict[str, Any] = {}
    if head.transform is not None:
        inputs, outputs = {"embed": config.hidden}, {"embed_out": width}
        params["transform"] = dense_params(inputs, outputs, bias=True, std=config.init_std)
        params["norm"] = norm_params(head.transform, width)
    if not head.tied:
        # Laid out like the embedding that it replaces, so that tying is mere sharing.
        shape = (config.embedding.vocab, width)
        params["kernel"] = Param(shape, ("vocab", "embed"), config.init_std)
    if head.bias != "none":
        trained = head.bias == "trained"
        params["bias"] = Param((config.embedding.vocab,), ("vocab",), trained=trained)
    return params


def logits(
    config: TransformerConfig, params: Params, states: jax.Array, execution: Execution = DEFAULT
) -> jax.Array:
    """The language model head: states `[B, Q, D]` -> float32 logits `[B, Q, V]`."""
    assert config.head is not None
    states, kernel, bias = head_inputs(config, params, states)
    if isinstance(kernel, Kernel):
        (y,) = kernel.product(states, dtype=jnp.float32)
    else:
        kernel = kernel.astype(states.dtype)
        y = jnp.einsum("bqd,vd->bqv", states, kernel, preferred_element_type=jnp.float32)
    y = y if bias is None else y + bias.astype(jnp.float32)
    y = (
        y
        if config.head.softcap is None
        else config.head.softcap * jnp.tanh(y / config.head.softcap)
    )
    return constrain(execution, y, "act_batch", "act_length", "act_vocab")


def head_inputs(
    config: TransformerConfig, params: Params, states: jax.Array
) -> tuple[jax.Array, Any, jax.Array | None]:
    """What meets in the head: transformed states `[B, Q, W]`, a kernel `[V, W]`, a bias `[V]`.

    In the layout of inference the kernel may be a `Kernel` from W to V.
    """
    head, p = config.head, params.get("head", {})
    assert head is not None
    if head.transform is not None:
        states = activation(head.activation)(dense(p["transform"], states))
        states = norm(head.transform, p["norm"], states)
    states = states * jnp.asarray(head.scale, states.dtype)
    bias = p["bias"] if head.bias != "none" else None
    bias = jax.lax.stop_gradient(bias) if head.bias == "fixed" else bias
    kernel = params["embedding"]["token"] if head.tied else p.get("kernel")
    return states, p.get("logits", kernel), bias
