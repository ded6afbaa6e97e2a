"""The arguments of `generate`: checked, completed, and brought to a few shapes, on the host.

What `generate` was called with becomes a `Source`, a decoder prompt and a complete configuration,
or an error that names the argument.

Axis letters: B batch, S source length, P prompt length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jax_encdec.checks import (
    check_global,
    check_inputs,
    check_positions,
    check_shape,
    check_states,
    check_types,
)
from jax_encdec.config import TransformerConfig
from jax_encdec.decoding.config import DEFAULT_NEW_TOKENS, GenerationConfig
from jax_encdec.encoder_decoder import EncoderOutput
from jax_encdec.encoder_decoder_config import EncoderDecoderConfig
from jax_encdec.errors import ConfigError, InputError, nearest
from jax_encdec.token_ids import resolve_ids
from jax_encdec.tokenization import bucket_length

if TYPE_CHECKING:
    from jax_encdec.encoder_decoder import EncoderDecoderModel


class Source(NamedTuple):
    """What is decoded from; either tokens or ready states are given."""

    input_ids: jax.Array | None
    mask: jax.Array | None
    token_type_ids: jax.Array | None
    position_ids: jax.Array | None
    global_mask: jax.Array | None
    states: jax.Array | None


_ARGUMENTS = ("attention_mask", "token_type_ids", "position_ids", "global_attention_mask",
              "encoder_outputs", "key", "decoder_input_ids", "generation_config")  # fmt: skip


def checked_name(name: str) -> str:
    """The name of an option, or an error when it is a misspelt argument of `generate`."""
    # `nearest` in GenerationConfig knows options only.
    hint = nearest(name, _ARGUMENTS)
    if name not in GenerationConfig.__dataclass_fields__ and hint:
        raise InputError(f"generate has no argument {name!r}{hint}")
    return name


def with_ids(settings: GenerationConfig, config: EncoderDecoderConfig) -> GenerationConfig:
    """Fill in the special ids from wherever they are defined; only the start is indispensable."""
    found = {}
    for name in ("decoder_start_token_id", "eos_token_id", "pad_token_id"):
        if getattr(settings, name) is not None:
            continue
        try:
            ids = resolve_ids(name, settings, config)
        except ConfigError:
            if name == "decoder_start_token_id":
                raise
            continue
        found[name] = ids[0] if len(ids) == 1 else ids
    return settings.replace(**found)


def with_room(
    settings: GenerationConfig, trunk: TransformerConfig, prompt_length: int
) -> GenerationConfig:
    """Where nobody asked for a length, do not ask for more than the decoder has positions."""
    if settings.max_length is None and settings.max_new_tokens is None and trunk.max_length:
        room = trunk.max_length + 1 - prompt_length
        return settings.replace(max_new_tokens=max(1, min(DEFAULT_NEW_TOKENS, room)))
    return settings


def random_key(key: Any) -> jax.Array | None:
    """A random key, old style or new, one or one per row."""
    if key is None or jnp.issubdtype(getattr(key, "dtype", None) or float, jax.dtypes.prng_key):
        return key
    if getattr(key, "dtype", None) == jnp.uint32:
        return key
    raise InputError(f"key must be a random key such as jax.random.key(0); got {key!r}")


def source_arrays(
    model: EncoderDecoderModel,
    input_ids: Any,
    mask: Any,
    token_type_ids: Any,
    position_ids: Any,
    global_mask: Any,
    states: Any,
) -> Source:
    """Check what is decoded from; without a mask, one that hides nothing."""
    trunk = model.config.encoder_trunk
    if states is None:
        input_ids, shape = check_inputs("input_ids", input_ids, None, trunk)
    else:
        states = states.last_hidden_state if isinstance(states, EncoderOutput) else states
        states = check_states(states, trunk.hidden)
        shape = states.shape[:2]
        input_ids = check_shape("input_ids", input_ids, shape)
    mask = check_shape("attention_mask", mask, shape)
    return Source(
        input_ids=None if input_ids is None else input_ids.astype(jnp.int32),
        # From the host, so that no shape compiles anything.
        mask=jnp.asarray(np.ones(shape, np.int32)) if mask is None else mask.astype(jnp.int32),
        token_type_ids=check_types(token_type_ids, shape, trunk),
        position_ids=check_positions("position_ids", position_ids, shape, trunk),
        global_mask=check_global(global_mask, shape, trunk),
        states=states,
    )


def bucketed(source: Source, trunk: TransformerConfig) -> Source:
    """Pad the source on the right, hidden, up to a length of the ladder."""
    assert source.mask is not None
    length = source.mask.shape[1]
    extra = bucket_length(length, limit=trunk.max_length) - length
    if extra <= 0:
        return source
    position = trunk.embedding.position
    pad = position.pad_token_id if position is not None else None
    return Source(
        input_ids=widened(source.input_ids, extra, pad or 0),
        mask=widened(source.mask, extra),
        token_type_ids=widened(source.token_type_ids, extra),
        position_ids=widened(source.position_ids, extra),
        global_mask=widened(source.global_mask, extra),
        # States stay on their device, as they are sharded.
        states=None
        if source.states is None
        else jnp.pad(source.states, ((0, 0), (0, extra), (0, 0))),
    )


def widened(x: Any, extra: int, value: int = 0) -> Any:
    """`[B, length]` -> `[B, length + extra]`, on the host, where a new length compiles nothing."""
    if x is None:
        return None
    return jnp.asarray(np.pad(np.asarray(x), ((0, 0), (0, extra)), constant_values=value))


def decoder_prompt(
    decoder_input_ids: Any, settings: GenerationConfig, batch: int, trunk: TransformerConfig
) -> jax.Array:
    """The decoder prompt `[B, P]`, start token first."""
    start = settings.decoder_start_token_id
    assert start is not None
    opening = jnp.full((batch, 1), start, jnp.int32)
    if decoder_input_ids is None:
        return opening
    given, (rows, _) = check_inputs("decoder_input_ids", decoder_input_ids, None, trunk)
    assert given is not None
    if rows != batch:
        raise InputError(f"decoder_input_ids must have the source's {batch} rows; got {rows}")
    given = given.astype(jnp.int32)
    if isinstance(given, Tracer):
        return given  # Its values are unknown: it is taken as it is.
    begins = np.asarray(given[:, 0]) == start
    if begins.all():
        return given
    if begins.any():
        raise InputError(
            f"some rows of decoder_input_ids begin with the start token {start} and some do not; "
            f"begin all rows with it, or none"
        )
    return jnp.concatenate([opening, given], axis=1)
