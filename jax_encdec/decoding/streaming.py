"""Generation that can be watched, and cut short: the search run a few steps at a time.

`stream` yields tokens as they are decided and ends with what `generate` would have returned; both
run the same search. It is compiled as three programs, the beginning, a chunk of steps (whose end is
a number, and whose state is reused in place) and the end, whatever the lengths are.

Axes: B batch, R returned sequences.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_encdec.decoding import search, sharded
from jax_encdec.decoding.arguments import Inputs, processors_of, settings_of
from jax_encdec.decoding.engine import (
    GenerationOutput,
    Request,
    check_reached,
    cropped,
    first_state,
    flattened,
    request,
    step_function,
)
from jax_encdec.decoding.programs import Program, note
from jax_encdec.decoding.task import SearchSpec
from jax_encdec.errors import InputError
from jax_encdec.execution import Execution, constrain

if TYPE_CHECKING:
    from jax_encdec.decoding.config import GenerationConfig
    from jax_encdec.decoding.constraints import Allowed, Constraint
    from jax_encdec.decoding.processors import Processor
    from jax_encdec.encoder_decoder import EncoderDecoderModel, EncoderOutput
    from jax_encdec.tokenization import Tokenizer

CHUNK = 8  # steps between two looks at what has been decided, or at the clock


class StreamPiece(NamedTuple):
    """What a few steps of a search have decided."""

    tokens: tuple[np.ndarray, ...]
    """`B * R` arrays int32: the tokens that are new in each sequence, often none."""
    output: GenerationOutput | None
    """With the last piece, all that `generate` would have returned."""


def stream(
    model: EncoderDecoderModel,
    params: Any,
    input_ids: Any = None,
    *,
    chunk: int = CHUNK,
    attention_mask: Any = None,
    token_type_ids: Any = None,
    position_ids: Any = None,
    global_attention_mask: Any = None,
    encoder_outputs: EncoderOutput | jax.Array | None = None,
    decoder_input_ids: Any = None,
    decoder_attention_mask: Any = None,
    tokenizer: Tokenizer | None = None,
    generation_config: GenerationConfig | None = None,
    key: jax.Array | None = None,
    prefix_allowed_tokens_fn: Constraint | Allowed | None = None,
    logits_processors: Sequence[Processor] = (),
    **options: Any,
) -> Iterator[StreamPiece]:
    """Generate as `generate` does, and yield the tokens as soon as they are decided.

    Greedy search and sampling decide a token with every step. Beams have decided what all beams
    that can still win have in common, and nothing that was yielded is ever taken back. The pieces
    of a sequence, put together, are what `generate` returns of it after the decoder prompt, up to
    its length.

    Args:
        chunk: steps between two pieces; fewer bring tokens sooner and cost a little more.
        others: as of `generate`.

    Raises:
        InputError: also for several returned sequences with beams, of which none is decided before
            the end, and inside `jit`, where nothing can be yielded.
    """
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise InputError(f"chunk must be a positive integer; got {chunk!r}")
    settings, arrays = settings_of(model, generation_config, options)
    if (settings.num_beams or 1) > 1 and (settings.num_return_sequences or 1) > 1:
        raise InputError("streaming with beams needs num_return_sequences=1, the best sequence")
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(settings, name):
            raise InputError(f"streaming has no {name}; use generate")
    inputs = Inputs(
        input_ids,
        attention_mask,
        token_type_ids,
        position_ids,
        global_attention_mask,
        encoder_outputs,
        decoder_input_ids,
        decoder_attention_mask,
    )
    asked, traced, source_length = request(
        model,
        params,
        settings,
        inputs,
        arrays=arrays,
        tokenizer=tokenizer,
        key=key,
        allowed=prefix_allowed_tokens_fn,
        logits_processors=processors_of(logits_processors),
    )
    if traced:
        raise InputError("stream cannot run inside jit or vmap; use generate there")
    return _pieces(asked, chunk, settings.max_time, source_length)


def generate_until(asked: Request, max_time: float) -> GenerationOutput:
    """Generate for at most `max_time` seconds, seen after every few steps; then as things stand."""
    steps = _chunks(asked, CHUNK, max_time)
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value


def _pieces(
    asked: Request, chunk: int, max_time: float | None, source_length: int
) -> Iterator[StreamPiece]:
    rows = asked.spec.num_return_sequences
    start = np.repeat(np.broadcast_to(asked.prompt_length, len(asked.prompt)), rows)
    told = start.copy()
    steps = _chunks(asked, chunk, max_time)
    while True:
        try:
            sequences, lengths = next(steps)
            check_reached(asked, sequences, lengths)
        except StopIteration as stop:
            out = cropped(stop.value, source_length)
            check_reached(asked, out.sequences, out.lengths)
            yield StreamPiece(_new(np.asarray(out.sequences), told, np.asarray(out.lengths)), out)
            return
        yield StreamPiece(_new(sequences, told, lengths), None)
        told = np.maximum(told, lengths)


def _new(sequences: np.ndarray, told: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, ...]:
    return tuple(row[a:b] for row, a, b in zip(sequences, told, lengths, strict=True))


def _chunks(
    asked: Request, chunk: int, max_time: float | None
) -> Generator[tuple[np.ndarray, np.ndarray], None, GenerationOutput]:
    """Yield what is decided, `[B * R, T]` and its lengths `[B * R]`; return the whole."""
    began = time.monotonic()
    static, (params, source, *_) = asked[:3], asked[3:]
    with sharded.running(params):
        carry = _begin(*asked)
    now, until = carry.now, int(np.min(asked.prompt_length))
    while True:
        until += chunk
        with sharded.running(params):
            now, sequences, lengths, more = _proceed(
                *static, params, source.mask, asked.values, carry.rows, now, np.int32(until)
            )
        late = max_time is not None and time.monotonic() - began > max_time
        if not more or (max_time is not None and sharded.agreed(params, late)):
            break
        sequences, lengths = sharded.whole((sequences, lengths))
        yield np.asarray(sequences), np.asarray(lengths)
    with sharded.running(params):
        return sharded.whole(_end(asked.spec, asked.values, carry.rows, now))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _begin(config, dtype, spec, params, source, prompt, prompt_length, values, key) -> search.Carry:
    _count("beginning", spec, source.mask)
    carry = search.start(
        step_function(config, dtype, spec, params, source.mask),
        first_state(config, dtype, spec, params, source, prompt, prompt_length),
        prompt,
        spec=spec,
        values=values,
        prompt_length=prompt_length,
        source_ids=source.input_ids,
        source_mask=source.mask,
        key=key,
    )
    now = carry.now
    return carry._replace(now=now._replace(state=_laid(now.state), lanes=_laid(now.lanes)))


# What belongs to the rows may be the caller's own arrays: only the rest is reused in place.
@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnames="now")
def _proceed(config, dtype, spec, params, source_mask, values, rows, now, until):
    _count("steps", spec, source_mask)
    carry = search.advance(
        step_function(config, dtype, spec, params, source_mask),
        search.Carry(rows, now),
        until,
        spec=spec,
        values=values,
    )
    sequences, lengths = search.decided(carry, spec=spec, values=values)
    more = search.unfinished(carry, spec=spec, values=values)
    return carry.now, sequences.reshape(-1, sequences.shape[-1]), jnp.ravel(lengths), more


@partial(jax.jit, static_argnums=0)
def _end(spec, values, rows, now) -> GenerationOutput:
    _count("end", spec, rows.source_mask)
    return flattened(search.finish(search.Carry(rows, now), spec=spec, values=values))


def _laid(tree: Any) -> Any:
    """Arrays of rows as the steps leave them on a mesh, if there is one.

    Of what begins as zeros the compiler would give every device the whole, and the steps would
    need one program for that and another for what they return.
    """
    execution = Execution(activation_rules=sharded.GENERATION_RULES.activations)

    def lay(x: jax.Array) -> jax.Array:
        axes = ("act_batch", "act_heads" if x.ndim == 4 else None, None, None)  # 4: a cache
        return constrain(execution, x, *axes[: x.ndim])

    return jax.tree.map(lay, tree)


def _count(part: str, spec: SearchSpec, source_mask: jax.Array) -> None:
    """Note the program that is being traced, of a source `[B, S]`."""
    batch, length = source_mask.shape
    note(Program(batch, length, spec.capacity, spec.num_beams, part))
