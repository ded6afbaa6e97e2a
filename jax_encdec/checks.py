"""What comes in from outside, as arrays: shapes, integers, ranges, each refused in one sentence.

Shapes are checked always, values where they are known: under a trace they are not, and an id
outside its table then turns its row into NaN.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jax_encdec.config import TransformerConfig
from jax_encdec.errors import InputError


def check_ids(name: str, ids: Any, size: int, also: int | None = None) -> jax.Array:
    """Token ids `[batch, length]` as an array; those outside the vocabulary are refused.

    Under a trace values are unknown; an id outside then turns its row into NaN, not into somebody
    else's embedding.
    """
    values = check_array(name, ids)
    if values.ndim != 2 or 0 in values.shape:
        raise InputError(f"{name} must have shape [batch, length]; got {list(values.shape)}")
    if not jnp.issubdtype(values.dtype, jnp.integer):
        raise InputError(f"{name} must be integers; got {values.dtype}")
    if not isinstance(values, Tracer):
        _check_range(name, np.asarray(values), size, also)
    return values


def _check_range(name: str, values: np.ndarray, size: int, also: int | None = None) -> None:
    bad = (values < 0) | (values >= size)
    if also is not None:
        bad &= values != also
    if bad.any():
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        raise InputError(f"{name}{list(where)} is {values[where]}; expected 0..{size - 1}")


def check_array(name: str, x: Any) -> Any:
    """`x` as an array (a list of equal rows will do)."""
    try:
        # Not `jnp.asarray`, which compiles something for each shape it has not seen.
        return x if isinstance(x, jax.Array) else jax.device_put(np.asarray(x))
    except (TypeError, ValueError):
        raise InputError(f"{name} must be an array, with rows of one length") from None


def check_shape(name: str, x: Any, shape: tuple[int, ...]) -> Any:
    """`x` as an array of exactly this shape; None stays None."""
    if x is None:
        return None
    x = check_array(name, x)
    if x.shape != tuple(shape):
        raise InputError(f"{name} must have shape {list(shape)}; got {list(x.shape)}")
    return x


def check_inputs(
    name: str, ids: Any, embeds: Any, trunk: TransformerConfig
) -> tuple[jax.Array | None, tuple[int, int]]:
    """Token ids (or None, with embeddings) and their shape `[batch, length]`."""
    if (ids is None) == (embeds is None):
        given = "neither" if ids is None else "both"
        embeds_name = name.replace("input_ids", "inputs_embeds")
        raise InputError(f"give exactly one of {name} and {embeds_name}; got {given}")
    if ids is None:
        width = trunk.embedding.width
        if jnp.ndim(embeds) != 3 or jnp.shape(embeds)[2] != width:
            raise InputError(
                f"{name.replace('input_ids', 'inputs_embeds')} must have shape [batch, length, "
                f"{width}]; got {list(jnp.shape(embeds))}"
            )
    else:
        ids = check_ids(name, ids, trunk.embedding.vocab)
    batch, length = jnp.shape(embeds if ids is None else ids)[:2]
    if trunk.max_length is not None and length > trunk.max_length:
        raise InputError(
            f"{name} is {length} tokens long, but the model has positions for {trunk.max_length}; "
            f"truncate it"
        )
    return ids, (batch, length)


def check_states(states: Any, width: int) -> jax.Array:
    """Encoder states `[batch, length, D_encoder]`."""
    states = check_array("encoder_outputs", states)
    if states.ndim != 3 or states.shape[2] != width:
        raise InputError(
            f"encoder_outputs must have shape [batch, length, {width}]; got {list(states.shape)}"
        )
    return states


def check_types(types: Any, shape: tuple[int, int], trunk: TransformerConfig) -> Any:
    """Token types that the trunk has rows for; None stays None."""
    if types is None:
        return None
    if not trunk.embedding.types:
        raise InputError("this encoder has no token types; leave token_type_ids out")
    types = check_shape("token_type_ids", types, shape)
    return check_ids("token_type_ids", types, trunk.embedding.types)


def check_global(mask: Any, shape: tuple[int, int], trunk: TransformerConfig) -> Any:
    """Which tokens attend globally, for an encoder that can tell; None stays None."""
    if mask is None:
        return None
    if not any(attention.global_projections for attention in trunk.attentions()):
        raise InputError("this encoder has no global attention; leave global_attention_mask out")
    mask = check_shape("global_attention_mask", mask, shape)
    return check_ids("global_attention_mask", mask, 2)


def check_segments(ids: Any, shape: tuple[int, int], trunk: TransformerConfig) -> Any:
    """Which text each token belongs to; None stays None."""
    if ids is not None and trunk.convolves:
        raise InputError(
            "this encoder has a convolution, which would mix the segments; encode the texts in "
            "rows of their own"
        )
    return check_shape("segment_ids", ids, shape)


def check_positions(
    name: str, ids: Any, shape: tuple[int, int], trunk: TransformerConfig
) -> jax.Array | None:
    """Position ids as published models take them -> as the trunk counts them, from zero.

    Models that skip pads (RoBERTa) number the rows of their table.
    """
    if ids is None:
        return None
    ids = check_array(name, ids)
    if ids.shape not in (shape, (1, shape[1])):
        raise InputError(f"{name} must have shape {list(shape)}; got {list(ids.shape)}")
    table = trunk.embedding.position
    if table is None:
        if not any(attention.rotary for attention in trunk.attentions()):
            side = "decoder" if name.startswith("decoder") else "encoder"
            raise InputError(f"this {side} has no position ids; leave {name} out")
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            raise InputError(f"{name} must be integers; got {ids.dtype}")
        return ids
    rows = table.pad_token_id is not None
    ids = check_ids(name, ids, table.length if rows else table.usable)
    return ids - table.offset if rows else ids
