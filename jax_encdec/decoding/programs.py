"""Compiled programs of searches: how many there are, and having them before they are needed.

A program is compiled for a search's structure and for sizes: batch, source length, capacity. Source
length and capacity are rounded up a ladder (`tokenization.LADDER`), so that a stream of texts of
any lengths compiles no more programs than the ladder has rungs; numbers never compile anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jax_encdec.errors import InputError

if TYPE_CHECKING:
    from jax_encdec.encoder_decoder import EncoderDecoderModel


class Program(NamedTuple):
    """One compiled program of `generate` or `stream`."""

    batch: int
    source_length: int
    capacity: int
    """Target tokens, prompt included, that it has room for."""
    num_beams: int
    part: str = "whole"
    """`whole`: a search from beginning to end. One that is watched, by `stream` or for `max_time`,
    has three programs: `beginning`, `steps` and `end`."""


_compiled: list[Program] = []


def note(program: Program) -> None:
    """Count a program; called where one is traced, which happens once for each."""
    _compiled.append(program)


def compiled_programs() -> tuple[Program, ...]:
    """The searches that `generate` and `stream` have compiled in this process, in order.

    Calls inside somebody's `jit` are part of their program and not counted.
    """
    return tuple(_compiled)


def warmup(
    model: EncoderDecoderModel,
    params: Any,
    shapes: Iterable[tuple[int, int]],
    *,
    stream: bool = False,
    **options: Any,
) -> tuple[Program, ...]:
    """Compile what `generate` will need for sources of these shapes, by generating once from each.

    Args:
        params: as `generate` will get them.
        shapes: pairs of batch and source length; lengths are rounded up as `generate` does.
        stream: compile what `stream` will need instead.
        **options: as `generate` will get them. Numbers may differ later, except that the room for
            a target follows from `max_length` or `max_new_tokens`.

    Returns:
        The programs that were compiled; those that existed already are not among them.

    Raises:
        InputError: a shape that is no pair of positive numbers, or as `generate`.
    """
    before = len(_compiled)
    for shape in shapes if isinstance(shapes, Iterable) else [shapes]:
        pair = isinstance(shape, Sequence) and len(shape) == 2
        if not pair or any(not isinstance(n, int) or n < 1 for n in shape):
            raise InputError(
                f"shapes are a list of pairs (batch, source length); got {shape!r} among them"
            )
        ids = np.zeros(shape, np.int32)
        mask = np.ones_like(ids)
        if stream:
            list(model.stream(params, ids, attention_mask=mask, **options))
        else:
            model.generate(params, ids, attention_mask=mask, **options)
    return tuple(_compiled[before:])
