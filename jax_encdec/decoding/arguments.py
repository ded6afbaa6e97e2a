"""The arguments of `generate`: checked, completed, and brought to a few shapes, on the host.

What `generate` was called with becomes a `Source`, a decoder prompt and a complete configuration,
or an error that names the argument.

Axis letters: B batch, S source length, P prompt length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from jax_encdec.decoding import numbers
from jax_encdec.decoding.config import DEFAULT_NEW_TOKENS, GenerationConfig
from jax_encdec.decoding.fields import KINDS, NO_INFLUENCE, REFUSED
from jax_encdec.encoder_decoder import EncoderOutput
from jax_encdec.encoder_decoder_config import EncoderDecoderConfig
from jax_encdec.errors import ConfigError, InputError, nearest
from jax_encdec.token_ids import resolve_ids
from jax_encdec.tokenization import bucket_length

if TYPE_CHECKING:
    from jax_encdec.encoder_decoder import EncoderDecoderModel


class Inputs(NamedTuple):
    """What `generate`, `stream` or `score` was given to decode from, unchecked; the sources'
    `[B, S]`, the decoder prompts' `[B, P]`."""

    input_ids: Any
    attention_mask: Any = None
    token_type_ids: Any = None
    position_ids: Any = None
    global_attention_mask: Any = None
    encoder_outputs: Any = None
    decoder_input_ids: Any = None
    decoder_attention_mask: Any = None


class Source(NamedTuple):
    """What is decoded from; either tokens or ready states are given."""

    input_ids: jax.Array | None
    mask: jax.Array | None
    token_type_ids: jax.Array | None
    position_ids: jax.Array | None
    global_mask: jax.Array | None
    states: jax.Array | None


_ARGUMENTS = ("prefix_allowed_tokens_fn", "logits_processors",
              "attention_mask", "token_type_ids", "position_ids", "global_attention_mask",
              "encoder_outputs", "key", "decoder_input_ids", "decoder_attention_mask",
              "generation_config", "tokenizer")  # fmt: skip
# Arguments of Transformers' generate, and what takes their place.
_ELSEWHERE = {
    "assistant_model": "there is no assisted generation",
    "custom_generate": "code is not run from a repository",
    "inputs": "pass input_ids",
    "inputs_embeds": "pass encoder_outputs, of model.apply(..., inputs_embeds=..., "
    "method='encode')",
    "logits_processor": "pass logits_processors, pure functions (scores, context) -> scores",
    "negative_prompt_ids": "there is no guidance_scale",
    "negative_prompt_attention_mask": "there is no guidance_scale",
    "stopping_criteria": "eos_token_id, stop_strings, max_new_tokens and max_time say when to stop",
    "streamer": "call model.stream, which yields tokens as they are decided",
    "synced_gpus": "leave it out",
    "use_model_defaults": "pass a generation_config",
}


def checked_name(name: str) -> str:
    """The name of an option, or an error when it is a misspelt argument of `generate`."""
    if name in KINDS or name in REFUSED or name in NO_INFLUENCE:
        return name
    if name in _ELSEWHERE:
        raise InputError(f"generate has no argument {name!r}: {_ELSEWHERE[name]}")
    # `nearest` in GenerationConfig knows options only.
    if hint := nearest(name, _ARGUMENTS):
        raise InputError(f"generate has no argument {name!r}{hint}")
    return name


def processors_of(given: Any) -> tuple[Any, ...]:
    """`logits_processors` as a tuple."""
    if callable(given) or not isinstance(given, Sequence):
        raise InputError(
            f"logits_processors must be a list or tuple of functions; got {given!r}"
            + ("; put it into a tuple, (f,)" if callable(given) else "")
        )
    return tuple(given)


def settings_of(
    model: EncoderDecoderModel, config: GenerationConfig | None, options: dict[str, Any]
) -> tuple[GenerationConfig, dict[str, Any]]:
    """A call's configuration, with the special ids from wherever they are defined, and the numbers
    that it holds as arrays."""
    named, arrays = numbers.set_aside({checked_name(k): value for k, value in options.items()})
    return with_ids(config_of(model, config).replace(**named), model.config), arrays


def config_of(model: EncoderDecoderModel, given: GenerationConfig | None) -> GenerationConfig:
    """A call's configuration, the model's own where none is given."""
    if given is None:
        return model.generation_config
    if not isinstance(given, GenerationConfig):
        raise InputError(
            f"generation_config must be a GenerationConfig; got {given!r}"
            + ("; make one by GenerationConfig(**it)" if isinstance(given, Mapping) else "")
        )
    return given


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


def source_arrays(model: EncoderDecoderModel, given: Inputs) -> Source:
    """Check what is decoded from; without a mask, one that hides nothing."""
    trunk = model.config.encoder_trunk
    states: Any = given.encoder_outputs
    if states is None:
        input_ids, shape = check_inputs("input_ids", given.input_ids, None, trunk)
    else:
        states = states.last_hidden_state if isinstance(states, EncoderOutput) else states
        states = check_states(states, trunk.hidden)
        shape = states.shape[:2]
        input_ids = check_shape("input_ids", given.input_ids, shape)
    mask = check_shape("attention_mask", given.attention_mask, shape)
    return Source(
        input_ids=None if input_ids is None else _int32(input_ids),
        # From the host, so that no shape compiles anything.
        mask=jax.device_put(np.ones(shape, np.int32)) if mask is None else _int32(mask),
        token_type_ids=check_types(given.token_type_ids, shape, trunk),
        position_ids=check_positions("position_ids", given.position_ids, shape, trunk),
        global_mask=check_global(given.global_attention_mask, shape, trunk),
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
    padded = np.pad(np.asarray(x), ((0, 0), (0, extra)), constant_values=value)
    return jax.device_put(padded)


def decoder_prompt(
    ids: Any, mask: Any, start: Any, batch: int, trunk: TransformerConfig
) -> tuple[Any, Any]:
    """The decoder prompts, start token first, and how long they are.

    Args:
        start: the start token, or `[B]`, each row's.
        ids: `[B, P]`; None: the start token alone.
        mask: `[B, P]` of 0/1, 0 at pads, which may stand on either side; None: no pads.

    Returns:
        int32 `[B, P]`, each row from its first column on, and the lengths: an int where they are
        all the same, else int32 `[B]`.
    """
    if ids is None:
        if mask is not None:
            raise InputError("decoder_attention_mask without decoder_input_ids says nothing")
        if isinstance(start, Tracer):
            return jnp.broadcast_to(start, batch).reshape(-1, 1).astype(jnp.int32), 1
        return np.broadcast_to(np.asarray(start, np.int32), batch).reshape(-1, 1).copy(), 1
    given, shape = check_inputs("decoder_input_ids", ids, None, trunk)
    assert given is not None
    if shape[0] != batch:
        raise InputError(f"decoder_input_ids must have the source's {batch} rows; got {shape[0]}")
    mask = check_shape("decoder_attention_mask", mask, shape)
    given = _int32(given)
    if any(isinstance(x, Tracer) for x in (given, mask, start)):
        # The values are unknown: they are taken as they are.
        if mask is None:
            return given, shape[1]
        order = jnp.argsort(jnp.asarray(mask) == 0, axis=1, stable=True)
        lengths = jnp.maximum(jnp.sum(jnp.asarray(mask) != 0, axis=1, dtype=jnp.int32), 1)
        return jnp.take_along_axis(given, order, axis=1), lengths
    if mask is None:
        return _opened(np.asarray(given), np.full(batch, shape[1], np.int32), start)
    shown = np.asarray(mask) != 0
    if (np.abs(np.diff(shown, axis=1, prepend=False, append=False)).sum(1) > 2).any():
        raise InputError("decoder_attention_mask may hide the ends of a row, not what lies between")
    order = np.argsort(~shown, axis=1, kind="stable")
    lengths = shown.sum(1).astype(np.int32)
    return _opened(np.take_along_axis(np.asarray(given), order, axis=1), lengths, start)


def _opened(prompt: np.ndarray, lengths: np.ndarray, start: Any) -> tuple[np.ndarray, Any]:
    """Prompts `[B, P]`, `lengths [B]` of which count, that begin with the start token, or with
    their own out of `start [B]`."""
    told, start = lengths > 0, np.broadcast_to(start, len(prompt))
    begins = (prompt[:, 0] == start) & told
    if begins.any() and (begins == told).all():
        prompt = np.where(told[:, None], prompt, start[:, None])  # A row that was told nothing.
        lengths = np.maximum(lengths, 1)
    elif begins.any():
        raise InputError(
            f"some rows of decoder_input_ids begin with the start token "
            f"{start[int(np.argmax(begins))]} and some do not; begin all rows with it, or none"
        )
    else:
        prompt = np.insert(prompt, 0, start, axis=1)
        lengths = lengths + 1
    longest = int(lengths.max())
    same = (lengths == longest).all()
    return np.ascontiguousarray(prompt[:, :longest]), longest if same else lengths


def _int32(x: Any) -> Any:
    """`x` as int32; where it is already, nothing is done or compiled."""
    return x if x.dtype == jnp.int32 else x.astype(jnp.int32)


def told(prompt: Any, lengths: Any) -> list[list[int]]:
    """The decoder prompts `[B, P]` as lists, each as long as it is told to be."""
    if isinstance(prompt, Tracer) or isinstance(lengths, Tracer):
        raise InputError(
            "prefix_allowed_tokens_fn as a Python function cannot be asked about traced prompts; "
            "make tables of it before, by jax_encdec.decoding.constraints.explored"
        )
    each = np.broadcast_to(np.asarray(lengths), len(prompt))
    return [row[:length].tolist() for row, length in zip(np.asarray(prompt), each, strict=True)]
