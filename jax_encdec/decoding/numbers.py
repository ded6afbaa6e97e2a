"""Options as arrays: other numbers for every row, or numbers that are only known inside a `jit`.

A number given as a NumPy or JAX array, scalar or `[B]`, is *set aside*: its processor is always
there, its values are traced, and one compiled program serves them all.  The configuration, which is
hashable Python values, holds the largest of them in its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jax_encdec.decoding.config import GenerationConfig
from jax_encdec.decoding.fields import KINDS
from jax_encdec.errors import InputError

INTEGERS = frozenset(
    (
        "max_length",
        "max_new_tokens",
        "min_length",
        "min_new_tokens",
        "top_k",
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
        "forced_bos_token_id",
        "decoder_start_token_id",
    )
)
NUMBERS = INTEGERS | frozenset(
    (
        "length_penalty",
        "diversity_penalty",
        "temperature",
        "top_h",
        "top_p",
        "min_p",
        "typical_p",
        "epsilon_cutoff",
        "eta_cutoff",
        "repetition_penalty",
        "encoder_repetition_penalty",
    )
)
"""The options that may be arrays."""

Arrays = Mapping[str, Any]
"""Numbers set aside, by option: arrays, scalar or `[B]`."""


def set_aside(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Part the options of a call into Python values and arrays.

    Returns:
        The options for `GenerationConfig.replace`, in which the largest value of an array stands
        for it, and the arrays.  Arrays of ids are Python values.

    Raises:
        InputError: an array that is traced, or of a type or shape, that its option cannot use.
    """
    values, arrays = {}, {}
    for name, value in options.items():
        if name == "decoder_start_token_id" and isinstance(value, list | tuple):
            value = np.asarray(value)  # As Transformers takes a start of each row's own.
        if not isinstance(value, np.ndarray | jax.Array):
            values[name] = value
            continue
        if name not in NUMBERS:
            if isinstance(value, Tracer) and name in KINDS:
                raise InputError(
                    f"{name} shapes the compiled program: it must be a Python value, got an array "
                    "traced by jax.jit or jax.vmap"
                )
            values[name] = value.tolist()
            continue
        integer = jnp.issubdtype(value.dtype, jnp.integer)
        if not integer and (name in INTEGERS or not jnp.issubdtype(value.dtype, jnp.floating)):
            kind = "integers" if name in INTEGERS else "numbers"
            raise InputError(f"{name} must be an array of {kind}, got {value.dtype}")
        if value.ndim > 1 or not value.size:
            raise InputError(
                f"{name} must be a scalar or one number per row, [batch], got the shape "
                f"{list(value.shape)}"
            )
        if isinstance(value, Tracer):
            if name == "min_length":
                values[name] = 0  # so that it goes before a min_new_tokens of the file
        else:
            # On the host, where nothing is compiled for it.
            value = np.asarray(value)
            values[name] = value.max().item()
        arrays[name] = value
    return values, arrays


def check(config: GenerationConfig, arrays: Arrays, batch: int | None) -> None:
    """Check shapes, and where numbers are traced, that something bounds the length.

    Raises:
        InputError: one sentence with the option's name.
    """
    for name, value in arrays.items():
        if value.ndim and batch is not None and value.shape != (batch,):
            raise InputError(
                f"{name} must hold one number for each of the {batch} rows, got {value.shape[0]}"
            )
    for name in ("max_length", "max_new_tokens"):
        unbounded = config.max_length is None and config.max_new_tokens is None
        if isinstance(arrays.get(name), Tracer) and unbounded:
            raise InputError(
                f"{name} is traced, and memory must be set aside for the longest sequence: bound "
                f"it by a max_length in the generation config"
            )


def smallest(config: GenerationConfig, arrays: Arrays) -> GenerationConfig:
    """The configuration with the smallest of every array in its place, to be validated too."""
    known = {k: v for k, v in arrays.items() if isinstance(v, np.ndarray)}
    return config.replace(**{name: value.min().item() for name, value in known.items()})


def max_length(config: GenerationConfig, arrays: Arrays, prompt_length: int) -> Any:
    """Return int32, scalar or `[B]`: how long each sequence may become, prompt included.

    Args:
        config: its own maximum bounds what the arrays say.
    """
    bound = config.resolved(prompt_length).max_length
    assert bound is not None
    if "max_new_tokens" in arrays:
        asked = arrays["max_new_tokens"] + prompt_length
    elif "max_length" in arrays:
        asked = arrays["max_length"]
    else:
        return np.int32(bound)
    least = jnp.minimum if isinstance(asked, jax.Array) else np.minimum
    return least(asked, bound).astype(np.int32)
