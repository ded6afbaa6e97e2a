"""A configuration cut into the static and the traced half of a search."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np
from jax.typing import ArrayLike

from jax_encdec.decoding import constraints, numbers
from jax_encdec.decoding.config import GenerationConfig
from jax_encdec.decoding.constraints import Constraint
from jax_encdec.decoding.processors import Processor, split, token_table
from jax_encdec.decoding.task import EARLY_STOPPING, SearchSpec, SearchValues
from jax_encdec.errors import InputError


def prepare(
    config: GenerationConfig,
    *,
    vocab_size: int,
    prompt_length: int = 1,
    capacity: int | None = None,
    stops: np.ndarray | None = None,
    arrays: numbers.Arrays | None = None,
    batch: int | None = None,
    constraint: Constraint | None = None,
    logits_processors: tuple[Processor, ...] = (),
) -> tuple[SearchSpec, SearchValues]:
    """Validate a configuration and cut it into the static and the traced half of a search.

    Args:
        config: as the user gave it; defaults are filled in here.
        vocab_size: V, the width of the logits.
        prompt_length: tokens of the decoder prompt, start token included.
        capacity: T; `max_length` when None.  Rounding it up to a few sizes saves compilations.
        stops: int32 `[states, V]`, what `stop_table` made of `stop_strings`.
        arrays: numbers that `numbers.set_aside` took out of a call's options.
        batch: B, to check arrays by.
        constraint: what may follow what, see `constraints`.
        logits_processors: the user's, applied after ours and before what narrows a distribution.

    Raises:
        InputError: a setting that is out of range, contradictory, or does not fit the capacity.
    """
    arrays = arrays or {}
    numbers.check(config, arrays, batch)
    config.validate(vocab_size, prompt_length)
    if arrays:
        numbers.smallest(config, arrays).validate(vocab_size, prompt_length)
    for processor in logits_processors:
        if not (callable(processor) and isinstance(processor, Hashable)):
            raise InputError(
                f"logits_processors must be hashable functions, got {processor!r}; pass numbers "
                "that change through options, and keep one function for all calls"
            )
    if constraint is not None:
        forced = arrays.get("forced_bos_token_id", config.forced_bos_token_id)
        forced = forced if prompt_length == 1 else None
        constraints.check(constraint, vocab_size=vocab_size, batch=batch, forced=forced)
    if config.stop_strings and stops is None:
        raise InputError("stop_strings are texts: pass the target side's tokenizer= along")
    full = config.resolved(prompt_length)
    assert full.max_length is not None
    capacity = full.max_length if capacity is None else capacity
    if full.max_length > capacity:
        raise InputError(
            f"max_length ({full.max_length}) must be at most the capacity of {capacity} tokens; "
            "lower max_length or max_new_tokens"
        )
    processors, processor_values = split(
        config,
        vocab_size=vocab_size,
        arrays=arrays,
        constraint=constraint,
        logits_processors=logits_processors,
    )
    groups = full.num_beam_groups or 1

    def number(name: str) -> ArrayLike:
        return (
            arrays[name].astype(np.float32) if name in arrays else np.float32(getattr(full, name))
        )

    spec = SearchSpec(
        capacity=capacity,
        num_beams=full.num_beams or 1,
        num_beam_groups=groups,
        num_return_sequences=full.num_return_sequences or 1,
        do_sample=bool(full.do_sample),
        num_eos=len(config.eos_token_ids),
        output_scores=bool(full.output_scores),
        output_logits=bool(full.output_logits),
        processors=processors,
    )
    values = SearchValues(
        max_length=numbers.max_length(config, arrays, prompt_length),
        eos=token_table(config.eos_token_ids, vocab_size),
        # Without an end-of-sequence id no sequence ends early and the padding is never looked at.
        pad_token_id=np.int32(full.pad_token_id or 0),
        length_penalty=number("length_penalty"),
        early_stopping=np.int32(EARLY_STOPPING[full.early_stopping or False]),
        processors=processor_values,
        diversity_penalty=number("diversity_penalty") if groups > 1 else None,
        stops=stops,
    )
    return spec, values
