"""`generate`: a model bound to a search, compiled whole.

One jitted function encodes the source, projects the decoder's cross-attention keys and values,
and runs the search. Static are the model and the search's structure; every number is traced, and
lengths are rounded up a ladder, so that a changed option or a longer text rarely compiles anew.

Beams of a source share one pool of keys and values: step t of beam k writes slot `t * K + k`,
which never moves. What a beam may see is its own path through the pool, K numbers per step, and
reordering beams touches nothing else.

Axis letters: B batch, S source length, T capacity in target tokens, K beams, R returned sequences.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jax_encdec.block import LayerCache
from jax_encdec.decoding.arguments import (
    Source,
    bucketed,
    checked_name,
    decoder_prompt,
    random_key,
    source_arrays,
    widened,
    with_ids,
    with_room,
)
from jax_encdec.decoding.config import GenerationConfig
from jax_encdec.decoding.search import SearchSpec, SearchValues, prepare, search
from jax_encdec.encoder_decoder import EncoderOutput, project
from jax_encdec.encoder_decoder_config import EncoderDecoderConfig
from jax_encdec.errors import InputError
from jax_encdec.layers import flatten
from jax_encdec.pair_params import check_tree, plain_params, with_aliases
from jax_encdec.tokenization import bucket_length
from jax_encdec.transformer import decode_step, init_caches, transformer
from jax_encdec.trunk_params import unstack

if TYPE_CHECKING:
    from jax_encdec.encoder_decoder import EncoderDecoderModel


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
    generation_config: GenerationConfig | None = None,
    key: jax.Array | None = None,
    **options: Any,
) -> GenerationOutput:
    """Generate target sequences, greedily, by sampling, or with beams.

    Outside a trace, arguments are checked, lengths are rounded up a ladder of sizes, and the result
    is cropped to the longest sequence. Under a trace (inside somebody's `jit`, `vmap`, ...) shapes
    stay fixed: the result is as long as `max_length` allows.

    Args:
        params: the model's parameters.
        input_ids: source tokens `[B, S]`.
        attention_mask: `[B, S]` of 0/1; by default nothing is hidden.
        token_type_ids, position_ids, global_attention_mask: `[B, S]`, for the encoder.
        encoder_outputs: of an earlier `encode`, instead of `input_ids`.
        decoder_input_ids: what every target begins with, `[B, P]`; the start token is put before
            it unless all rows begin with it. By default the start token alone.
        generation_config: instead of the model's own.
        key: a random key, needed for `do_sample=True`; row i draws from `fold_in(key, i)`.
        **options: fields of `GenerationConfig`, over the configuration's.

    Raises:
        InputError: an option or input that cannot be used, with what was expected and got.
        ConfigError: the start token is nowhere defined.
    """
    config, params = model.config, plain_params(params)
    check_tree(config, flatten(params))
    trunk = config.decoder_trunk
    settings = (generation_config or model.generation_config).replace(
        **{checked_name(name): value for name, value in options.items()}
    )
    settings = with_ids(settings, config)
    source = source_arrays(
        model,
        input_ids,
        attention_mask,
        token_type_ids,
        position_ids,
        global_attention_mask,
        encoder_outputs,
    )
    assert source.mask is not None
    batch = source.mask.shape[0]
    prompt = decoder_prompt(decoder_input_ids, settings, batch, trunk)
    traced = any(
        isinstance(leaf, Tracer) for leaf in jax.tree.leaves((params, source, prompt, key))
    )
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
    capacity = full.max_length
    if not traced:
        capacity = bucket_length(full.max_length)
        source = bucketed(source, config.encoder_trunk)
        if length > 1:
            prompt = widened(prompt, bucket_length(length) - length)
            capacity = max(capacity, prompt.shape[1])
    spec, values = prepare(
        settings,
        vocab_size=trunk.embedding.vocab,
        prompt_length=length,
        capacity=capacity,
    )
    out = _generate(
        config,
        model.dtype,
        spec,
        params,
        source,
        prompt,
        jnp.int32(length),
        values,
        random_key(key),
    )
    if traced:
        return out
    # Cropped on the host, where a new length compiles nothing.
    longest = int(np.max(out.lengths))
    return out.replace(sequences=jnp.asarray(np.asarray(out.sequences)[:, :longest]))


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
    params = with_aliases(config, params)
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
    decoder = unstack(trunk, params["decoder"])
    beams = spec.num_beams
    lanes = beams if beams > 1 else spec.num_return_sequences
    batch, capacity = states.shape[0], spec.capacity
    position_table = trunk.embedding.position
    skipped = None if position_table is None else position_table.pad_token_id
    pads = jnp.zeros(batch, jnp.int32)
    if skipped is not None:
        real = jnp.arange(prompt.shape[1]) < prompt_length
        pads = jnp.sum((prompt == skipped) & real, axis=1, dtype=jnp.int32)

    def step(
        state: _State, tokens: jax.Array, parents: jax.Array, position: jax.Array
    ) -> tuple[jax.Array, _State]:
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
            encoder_mask=source.mask,
            dtype=dtype,
        )
        return scores, _State(caches, path, state.pads)

    shared = beams > 1
    state = _State(
        caches=init_caches(
            trunk,
            decoder,
            states,
            pools=batch if shared else batch * lanes,
            slots=capacity * lanes if shared else capacity,
        ),
        path=jnp.zeros((batch, lanes, capacity), jnp.int32) if shared else None,
        pads=pads,
    )
    found = search(
        step,
        state,
        prompt,
        spec=spec,
        values=values,
        prompt_length=prompt_length if prompt.shape[1] > 1 else None,
        source_ids=source.input_ids,
        source_mask=source.mask,
        key=key,
    )
    return GenerationOutput(*(x.reshape(-1, *x.shape[2:]) for x in found))
