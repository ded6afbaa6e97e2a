"""`generate`: a model bound to a search, compiled whole.

One jitted function encodes the source, projects the decoder's cross-attention keys and values,
and runs the search. Static are the model and the search's structure; every number is traced, and
lengths are rounded up a ladder, so that a changed option or a longer text rarely compiles anew.

Beams of a source share one pool of keys and values: step t of beam k writes slot `t * K + k`,
which never moves. What a beam may see is its own path through the pool, K numbers per step, and
reordering beams touches nothing else. (A cache per beam, gathered by parents at every step, took
1.8 to 4.3 times as long on a CPU: `benchmarks/decode_caches.py`.) Of a long pool a step reads only
a prefix that holds all there is, see `live_prefixes`.

Axis letters: B batch, S source length, T capacity in target tokens, K beams, R returned sequences.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jax_encdec.attention_kernels import platform
from jax_encdec.block import LayerCache
from jax_encdec.decoding import numbers, sharded
from jax_encdec.decoding.arguments import (
    Inputs,
    Source,
    bucketed,
    decoder_prompt,
    processors_of,
    random_key,
    settings_of,
    source_arrays,
    told,
    widened,
    with_room,
)
from jax_encdec.decoding.config import GenerationConfig
from jax_encdec.decoding.constraints import Allowed, Constraint, check_found, explored
from jax_encdec.decoding.layout import LastPrepared, Layout, PreparedParams, checked, tree_of
from jax_encdec.decoding.prepare import prepare
from jax_encdec.decoding.processors import Processor
from jax_encdec.decoding.programs import Program, note
from jax_encdec.decoding.search import search
from jax_encdec.decoding.stop_strings import stop_table
from jax_encdec.decoding.task import SearchOutput, SearchSpec, SearchValues, StepFn
from jax_encdec.encoder_decoder import EncoderOutput, project
from jax_encdec.encoder_decoder_config import EncoderDecoderConfig
from jax_encdec.errors import InputError
from jax_encdec.pair_params import plain_params
from jax_encdec.tokenization import bucket_length
from jax_encdec.transformer import decode_step, init_caches, transformer
from jax_encdec.trunk_params import unstack

if TYPE_CHECKING:
    from jax_encdec.encoder_decoder import EncoderDecoderModel
    from jax_encdec.tokenization import Tokenizer

LONG = 128  # steps from which on it pays to compile attention to less than the whole cache


@flax.struct.dataclass
class GenerationOutput:
    """Generated sequences; the R sequences of one source stand together, best first."""

    sequences: jax.Array
    """`[B * R, length]` int32: the decoder prompt, what was generated, then pads."""
    sequences_scores: jax.Array
    """`[B * R]` float32. Beams: sum of log-probabilities over `generated length **
    length_penalty`; greedy and samples: sum of log-probabilities."""
    lengths: jax.Array
    """`[B * R]` int32: tokens before the pads, prompt and end token included."""
    scores: jax.Array | None = None
    """`[B * K, length, V]` float32, with `output_scores`: at t, the scores after all processors
    that decided the tokens at t (Transformers' `scores[t - prompt length]`); beams:
    log-probabilities, before what a beam had already is added. 0 in prompts and where a row is
    done. K is the number of beams, or of samples. Takes `capacity * B * K * V * 4` bytes."""
    logits: jax.Array | None = None
    """The same before any processor, with `output_logits`."""
    beam_indices: jax.Array | None = None
    """`[B * R, length]` int32, with either of them and beams: the row of `scores` that decided the
    token at t; -1 in the prompt and after the end."""
    encoder_hidden_states: tuple[jax.Array, ...] | None = None
    """With `output_hidden_states`, as `encode` gives them: `[B, S, D_encoder]` each."""
    encoder_attentions: tuple[jax.Array, ...] | None = None
    """With `output_attentions`, as `encode` gives them: `[B, N, S, S]` each."""
    decoder_hidden_states: tuple[jax.Array, ...] | None = None
    """With `output_hidden_states`: `[B * R, length - 1, D]` each, of the returned sequences: at t,
    what token t was fed to predict token t + 1. (Transformers gives those of every beam that was
    running, to be picked by `beam_indices`.)"""
    decoder_attentions: tuple[jax.Array, ...] | None = None
    """With `output_attentions`: `[B * R, N, length - 1, length - 1]` each."""
    cross_attentions: tuple[jax.Array, ...] | None = None
    """With `output_attentions`: `[B * R, N, length - 1, S]` each."""


class Request(NamedTuple):
    """What `generate` was asked for, checked and in few shapes; the first three are static."""

    config: EncoderDecoderConfig
    dtype: Any
    spec: SearchSpec
    params: Any
    source: Source
    prompt: Any
    prompt_length: Any
    values: SearchValues
    key: jax.Array | None


class _State(NamedTuple):
    """The decoder's state between steps."""

    caches: tuple[LayerCache, ...]
    path: jax.Array | None
    """`[B, K, T]` int32: which of the K slots of step t lies on beam k's path; None for lanes that
    never mix and so have a pool each."""
    pads: jax.Array
    """`[B]` int32: pads in the decoder prompt, which take no position in tables that skip them."""


def generate(
    model: EncoderDecoderModel,
    params: Any,
    input_ids: Any = None,
    *,
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
) -> GenerationOutput:
    """Generate target sequences, greedily, by sampling, or with beams.

    Outside a trace, arguments are checked, lengths are rounded up a ladder of sizes, and the result
    is cropped to the longest sequence. Under a trace (inside somebody's `jit`, `vmap`, ...) shapes
    stay fixed: the result is as long as `max_length` allows.

    Args:
        params: the model's parameters, or what `model.prepare` made of them. The former are brought
            into the layout of inference by the first call, which is kept until other parameters
            come or these are gone.
        input_ids: source tokens `[B, S]`.
        attention_mask: `[B, S]` of 0/1; by default nothing is hidden.
        token_type_ids, position_ids, global_attention_mask: `[B, S]`, for the encoder.
        encoder_outputs: of an earlier `encode`, instead of `input_ids`.
        decoder_input_ids: what every target begins with, `[B, P]`; the start token is put before
            it unless all rows begin with it. By default the start token alone.
        decoder_attention_mask: `[B, P]` of 0/1, 0 at pads, on either side: prompts of different
            lengths. Every row is generated as if alone; lengths count its own prompt.
        tokenizer: the target side's, needed for `stop_strings`: a sequence ends with the token that
            completes one of them.
        generation_config: instead of the model's own.
        key: a random key, needed for `do_sample=True`; row i draws from `fold_in(key, i)`.
        prefix_allowed_tokens_fn: what may follow what: a `Constraint` of
            `jax_encdec.decoding.constraints`, or a function `(row, ids) -> allowed ids`, which is
            asked beforehand about every prefix that can come up.
        logits_processors: pure functions `(scores [B, K, V], context) -> scores`, see
            `jax_encdec.decoding.context.Context`; applied after the options' and before what
            narrows a distribution to draw from. The same function must be passed again, not one
            made anew, or it is compiled anew.
        **options: fields of `GenerationConfig`, over the configuration's. A number may be an
            array, scalar or `[B]` (see `jax_encdec.decoding.numbers`): a value per row, or one
            that is traced; no value of it compiles anything.

    Raises:
        InputError: an option or input that cannot be used, with what was expected and got.
        ConfigError: the start token is nowhere defined.
    """
    settings, arrays = settings_of(model, generation_config, options)
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
    if settings.max_time is None:
        with sharded.running(asked.params):
            # Inside somebody's trace it is a part of their program.
            out = cast(Any, _generate).__wrapped__(*asked) if traced else _generate(*asked)
    elif traced:
        raise InputError("max_time needs a clock, which jit and vmap do not have; leave it out")
    else:
        from jax_encdec.decoding.streaming import generate_until

        out = generate_until(asked, settings.max_time)
    if not traced:
        out = sharded.whole(out)
        check_reached(asked, out.sequences, out.lengths)
    if settings.output_hidden_states or settings.output_attentions:
        from jax_encdec.decoding.inspection import inspect

        if isinstance(params, PreparedParams):
            raise InputError(
                "output_hidden_states and output_attentions need the parameters themselves, not "
                "what model.prepare made of them"
            )
        seen = inspect(
            *(asked.config, asked.dtype, plain_params(params), asked.source, out.sequences),
            hidden_states=bool(settings.output_hidden_states),
            attentions=bool(settings.output_attentions),
        )
        out = dataclasses.replace(out, **(seen if traced else sharded.whole(seen)))
    return out if traced else cropped(out, source_length)


_LAST = LastPrepared()


def request(
    model: EncoderDecoderModel,
    params: Any,
    settings: GenerationConfig,
    inputs: Inputs,
    *,
    arrays: numbers.Arrays | None = None,
    tokenizer: Tokenizer | None = None,
    key: jax.Array | None = None,
    allowed: Constraint | Allowed | None = None,
    logits_processors: tuple[Processor, ...] = (),
) -> tuple[Request, bool, int]:
    """Arguments of `generate` as a request; whether any is a tracer; and S as it was given."""
    config = model.config
    trunk = config.decoder_trunk
    source = source_arrays(model, inputs)
    assert source.mask is not None
    batch, source_length = source.mask.shape
    arrays = arrays or {}
    numbers.check(settings, arrays, batch)
    prompt, lengths = decoder_prompt(
        inputs.decoder_input_ids,
        inputs.decoder_attention_mask,
        arrays.get("decoder_start_token_id", settings.decoder_start_token_id),
        batch,
        trunk,
    )
    leaves = jax.tree.leaves((params, source, prompt, lengths, key, arrays, allowed))
    traced = any(isinstance(leaf, Tracer) for leaf in leaves)
    length = prompt.shape[1]
    settings = with_room(settings, trunk, length)
    full = settings.resolved(length)
    assert full.max_length is not None
    # The last token is never fed back, so it needs no position.
    if trunk.max_length is not None and full.max_length - 1 > trunk.max_length:
        raise InputError(
            f"max_length is {full.max_length}, but the decoder has positions for "
            f"{trunk.max_length + 1} tokens; lower max_length or max_new_tokens"
        )
    if allowed is None or isinstance(allowed, Constraint):
        constraint = allowed
    else:
        constraint = explored(
            allowed,
            told(prompt, lengths),
            eos_token_id=settings.eos_token_ids,
            max_length=full.max_length,
            forced_bos_token_id=arrays.get("forced_bos_token_id", settings.forced_bos_token_id),
        )
    capacity = full.max_length
    if not traced:
        capacity = bucket_length(full.max_length)
        source = bucketed(source, config.encoder_trunk)
        if length > 1:
            prompt = widened(prompt, bucket_length(length) - length)
            capacity = max(capacity, prompt.shape[1])
    vocab = trunk.embedding.vocab
    stops = None
    if settings.stop_strings and tokenizer is not None:
        stops = stop_table(tokenizer, settings.stop_strings, vocab)
    spec, values = prepare(
        settings,
        vocab_size=vocab,
        prompt_length=length,
        capacity=capacity,
        stops=stops,
        arrays=arrays,
        batch=batch,
        constraint=constraint,
        logits_processors=logits_processors,
    )
    new_tokens = settings.max_new_tokens is not None or "max_new_tokens" in arrays
    absolute = not new_tokens and settings.max_length is not None
    if not (isinstance(lengths, int) or absolute):
        values = values._replace(max_length=values.max_length + (lengths - length))
    if traced:
        params = checked(config, params)
    else:
        params = _LAST.get(config, params, Layout.choose(batch * spec.lanes))
    prompt_length = np.int32(lengths) if isinstance(lengths, int) else lengths
    asked = Request(
        config, model.dtype, spec, params, source, prompt, prompt_length, values, random_key(key)
    )
    return asked if traced else sharded.placed(asked), traced, source_length


def check_reached(asked: Request, sequences: Any, lengths: Any) -> None:
    """Refuse sequences that came to where `prefix_allowed_tokens_fn` allows nothing."""
    begins = np.broadcast_to(asked.prompt_length, len(asked.prompt))
    check_found(asked.values.processors.constraint, sequences, lengths, begins)


def cropped(out: GenerationOutput, length: int) -> GenerationOutput:
    """The same, only as long as the longest sequence, and sources `length` long.

    On the host, where no length compiles.
    """
    longest = int(np.max(np.asarray(out.lengths)))

    def crop(*axes: int | None) -> Any:
        where = tuple(slice(axis) for axis in axes)
        return lambda x: jax.device_put(np.asarray(x)[where])

    seen = {
        "sequences": (None, longest),
        "scores": (None, longest),
        "logits": (None, longest),
        "beam_indices": (None, longest),
        "encoder_hidden_states": (None, length),
        "encoder_attentions": (None, None, length, length),
        "decoder_hidden_states": (None, longest - 1),
        "decoder_attentions": (None, None, longest - 1, longest - 1),
        "cross_attentions": (None, None, longest - 1, length),
    }
    return dataclasses.replace(
        out, **{name: jax.tree.map(crop(*axes), getattr(out, name)) for name, axes in seen.items()}
    )


@partial(jax.jit, static_argnums=(0, 1, 2))
def _generate(
    config: EncoderDecoderConfig,
    dtype: Any,
    spec: SearchSpec,
    params: Any,
    source: Source,
    prompt: jax.Array,
    prompt_length: jax.Array,
    values: SearchValues,
    key: jax.Array | None,
) -> GenerationOutput:
    mask = source.mask
    assert mask is not None
    batch, length = mask.shape
    note(Program(batch, length, spec.capacity, spec.num_beams))
    found = search(
        step_function(config, dtype, spec, params, source.mask),
        first_state(config, dtype, spec, params, source, prompt, prompt_length),
        prompt,
        spec=spec,
        values=values,
        prompt_length=prompt_length if prompt.shape[1] > 1 else None,
        source_ids=source.input_ids,
        source_mask=source.mask,
        key=key,
    )
    return flattened(found)


def flattened(found: SearchOutput) -> GenerationOutput:
    """`[B, R, ...]` -> `[B * R, ...]`; indices of beams become rows of the scores."""
    indices = found.beam_indices
    if indices is not None and found.sequences is not None:
        scores = found.scores if found.logits is None else found.logits
        assert scores is not None
        first = jnp.arange(indices.shape[0], dtype=jnp.int32)[:, None, None] * scores.shape[1]
        indices = jnp.where(indices < 0, indices, indices + first)
    found = found._replace(beam_indices=indices)
    return GenerationOutput(*jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found))


def first_state(
    config: EncoderDecoderConfig,
    dtype: Any,
    spec: SearchSpec,
    params: Any,
    source: Source,
    prompt: jax.Array,
    prompt_length: jax.Array,
) -> _State:
    """The decoder's state before the first token: the source encoded, caches empty."""
    params = tree_of(config, params)
    states = source.states
    if states is None:
        states = transformer(
            config.encoder_trunk,
            params["encoder"],
            source.input_ids,
            attention_mask=source.mask,
            token_type_ids=source.token_type_ids,
            position_ids=source.position_ids,
            global_attention_mask=source.global_mask,
            dtype=dtype,
        ).last_hidden_state
    states = project(params, states.astype(dtype))
    trunk = config.decoder_trunk
    lanes, shared = spec.lanes, spec.num_beams > 1
    batch, capacity = states.shape[0], spec.capacity
    position_table = trunk.embedding.position
    skipped = None if position_table is None else position_table.pad_token_id
    pads = jnp.zeros(batch, jnp.int32)
    if skipped is not None:
        real = jnp.arange(prompt.shape[1]) < prompt_length.reshape(-1, 1)
        pads = jnp.sum((prompt == skipped) & real, axis=1, dtype=jnp.int32)
    return _State(
        caches=init_caches(
            trunk,
            unstack(trunk, params["decoder"]),
            states,
            pools=batch if shared else batch * lanes,
            slots=capacity * lanes if shared else capacity,
        ),
        path=jnp.zeros((batch, lanes, capacity), jnp.int32) if shared else None,
        pads=pads,
    )


def live_prefixes(platform: str, rows: int, capacity: int) -> tuple[int, ...]:
    """Prefixes of the cache, in steps, of which a step of so many rows reads the shortest that
    holds something; none: it always reads all.

    Each costs time to compile and, but for the whole, a copy, so that there is none between a
    quarter and all (CPU; measured by `benchmarks/decode_caches.py`). On accelerators a choice
    would wait for the host in every layer.
    """
    if platform != "cpu":
        return ()
    if capacity < LONG:
        # With one row, XLA would fuse a write into the products that read it, and copy the whole
        # cache to do so, twice a step: not if they are a branch, even of a choice of one.
        return (0, capacity) if rows == 1 else ()
    parts = (4, 1) if capacity < 2 * LONG else (8, 4, 1)
    return tuple(capacity // part for part in parts)


def step_function(
    config: EncoderDecoderConfig,
    dtype: Any,
    spec: SearchSpec,
    params: Any,
    source_mask: jax.Array | None,
) -> StepFn:
    """One step of the decoder, as a search wants it."""
    trunk = config.decoder_trunk
    decoder = unstack(trunk, tree_of(config, params)["decoder"])
    lanes, capacity = spec.lanes, spec.capacity
    where = params.layout.platform if isinstance(params, PreparedParams) else platform()
    position_table = trunk.embedding.position
    skipped = None if position_table is None else position_table.pad_token_id

    def step(
        state: _State, tokens: jax.Array, parents: jax.Array, position: jax.Array
    ) -> tuple[jax.Array, _State]:
        batch = tokens.shape[0]
        prefixes = live_prefixes(where, batch * lanes, capacity)
        live, path = jnp.arange(capacity) <= position, None
        if state.path is None:
            visible = jnp.broadcast_to(live, (batch * lanes, 1, capacity))
        else:
            slots = jnp.arange(lanes, dtype=jnp.int32)
            path = jnp.take_along_axis(state.path, parents[:, :, None], axis=1)
            own = jnp.broadcast_to(slots, (batch, lanes))
            path = jax.lax.dynamic_update_index_in_dim(path, own, position, axis=2)
            visible = (path[..., None] == slots) & live[:, None]  # [B, K, T, K]
            visible = visible.reshape(batch, lanes, capacity * lanes)
        places = jnp.broadcast_to(position, tokens.shape)
        if skipped is not None:
            places = jnp.where(tokens == skipped, -1, position - state.pads[:, None])
        scores, caches = decode_step(
            trunk,
            decoder,
            tokens,
            state.caches,
            position=position,
            token_positions=places,
            visible=visible,
            encoder_mask=source_mask,
            dtype=dtype,
            prefixes=prefixes,
        )
        return scores, _State(caches, path, state.pads)

    return step
