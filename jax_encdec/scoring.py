"""How probable a model finds given targets: `model.score(params, source_ids, target_ids)`.

Log-probabilities of every target token and of whole sequences, under the model's own distribution,
differentiable. With `chunk`, logits exist for that many positions of each row at a time, forwards
and backwards.

Axis letters: B batch, S source length, T target length, V vocabulary, W width of the head.
"""

from __future__ import annotations

from functools import partial
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jax_encdec.checks import check_ids, check_shape
from jax_encdec.config import TransformerConfig
from jax_encdec.decoding.arguments import Inputs, Source, bucketed, source_arrays, widened
from jax_encdec.embedding import head_inputs
from jax_encdec.errors import InputError
from jax_encdec.layers import Params
from jax_encdec.loss import IGNORE
from jax_encdec.pair_params import plain_params, with_aliases
from jax_encdec.tokenization import bucket_length

if TYPE_CHECKING:
    from jax_encdec.encoder_decoder import EncoderDecoderModel


class ScoreOutput(NamedTuple):
    """Natural logarithms of probabilities, float32."""

    token_log_probs: jax.Array
    """`[B, T]`, of each target token given the source and the tokens before it; 0 where
    `target_mask` is 0 or the target is -100."""
    log_probs: jax.Array
    """`[B]`, of the targets: their sums, over `number of tokens ** length_penalty`."""


def score(
    model: EncoderDecoderModel,
    params: Any,
    source_ids: Any = None,
    target_ids: Any = None,
    *,
    attention_mask: Any = None,
    target_mask: Any = None,
    token_type_ids: Any = None,
    position_ids: Any = None,
    global_attention_mask: Any = None,
    encoder_outputs: Any = None,
    length_penalty: float | jax.Array = 0.0,
    chunk: int | None = None,
) -> ScoreOutput:
    """Log-probabilities of targets given sources, with dropout off.

    What `generate` found, greedily or with beams, gets the score that it was reported with, given
    the same `length_penalty` (0 for the greedy) and as long as no processor changed the
    distribution: `score(params, source, out.sequences[:, 1:], target_mask=...)` with a mask that
    ends where `out.lengths - 1` says.

    Args:
        params: the model's parameters.
        source_ids: `[B, S]`; or `encoder_outputs` of an earlier `encode`.
        target_ids: `[B, T]`, as labels of the forward pass: without the start token, -100 where
            nothing is to be scored. Pads count unless the mask hides them.
        attention_mask: `[B, S]` of 0/1; by default nothing is hidden.
        target_mask: `[B, T]` of 0/1: which target tokens there are. The decoder sees exactly
            those; without a mask it sees what is neither a pad nor -100, as in the forward pass.
        token_type_ids, position_ids, global_attention_mask: `[B, S]`, for the encoder.
        length_penalty: exponent on the number of tokens that divides a target's sum; 0: the sum,
            1: the mean.
        chunk: a positive number; None: all positions at once.

    Raises:
        InputError: inputs missing, of other shapes, or outside the vocabulary.
    """
    if target_ids is None:
        raise InputError("score needs target_ids [batch, length]; got none")
    if chunk is not None and (not isinstance(chunk, int) or chunk < 1):
        raise InputError(f"chunk must be a positive number or None; got {chunk!r}")
    if not isinstance(length_penalty, Real | np.ndarray | jax.Array):
        raise InputError(f"length_penalty must be a number; got {length_penalty!r}")
    inputs = Inputs(
        source_ids,
        attention_mask,
        token_type_ids,
        position_ids,
        global_attention_mask,
        encoder_outputs,
    )
    source = source_arrays(model, inputs)
    assert source.mask is not None
    targets = check_ids("target_ids", target_ids, model.config.target_vocabulary, also=IGNORE)
    if targets.shape[0] != source.mask.shape[0]:
        raise InputError(
            f"source and target must have as many rows; got {source.mask.shape[0]} and "
            f"{targets.shape[0]}"
        )
    shown = check_shape("target_mask", target_mask, targets.shape)
    length = targets.shape[1]
    limit = model.config.decoder_trunk.max_length
    if limit is not None and length > limit:
        raise InputError(f"target_ids have {length} tokens; the decoder takes at most {limit}")
    leaves = jax.tree.leaves((plain_params(params), source, targets, shown))
    if not any(isinstance(leaf, Tracer) for leaf in leaves):
        source = bucketed(source, model.config.encoder_trunk)
        extra = bucket_length(length, limit=limit) - length
        targets, shown = widened(targets, extra, IGNORE), widened(shown, extra)
    tokens, sums, count = _score(model, chunk, plain_params(params), source, targets, shown)
    return ScoreOutput(tokens[:, :length], sums / jnp.maximum(count, 1.0) ** length_penalty)


@partial(jax.jit, static_argnums=(0, 1))
def _score(
    model: EncoderDecoderModel,
    chunk: int | None,
    params: Any,
    source: Source,
    targets: jax.Array,
    shown: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probabilities `[B, T]`, their sums `[B]`, and how many count `[B]`."""
    labels = targets if shown is None else jnp.where(shown != 0, targets, IGNORE)

    def states(module: EncoderDecoderModel) -> jax.Array:
        inputs, visible = module._inputs_of(labels, None)
        if shown is not None:  # A pad in the midst of a target is a token as any other.
            visible = jnp.roll(shown != 0, 1, axis=1).at[:, 0].set(True)
        encoded = source.states
        if encoded is None:
            encoded = module.encode(
                source.input_ids,
                source.mask,
                token_type_ids=source.token_type_ids,
                position_ids=source.position_ids,
                global_attention_mask=source.global_mask,
            ).last_hidden_state
        return module._decoder_states(
            inputs,
            encoded,
            source.mask,
            visible,
            decoder_segment_ids=None,
            encoder_segment_ids=None,
            deterministic=True,
        ).last_hidden_state

    found: Any = model.apply({"params": params}, method=states)
    trunk = model.config.decoder_trunk
    tokens = head_log_probs(trunk, with_aliases(model.config, params)["decoder"], found, labels,
                            chunk=chunk)  # fmt: skip
    count = jnp.sum(labels != IGNORE, axis=1).astype(jnp.float32)
    return tokens, jnp.sum(tokens, axis=1), count


def head_log_probs(
    config: TransformerConfig,
    params: Params,
    states: jax.Array,
    labels: jax.Array,
    *,
    chunk: int | None = None,
) -> jax.Array:
    """Log-probabilities `[B, T]`, float32, of labels under a trunk's head on states `[B, T, D]`.

    Args:
        labels: `[B, T]`; 0 comes out for -100, NaN for what is outside the vocabulary.
        chunk: how many positions of each row have logits at one time; None for all.
    """
    assert config.head is not None
    states, kernel, bias = head_inputs(config, params, states)
    softcap, (batch, length) = config.head.softcap, labels.shape

    # Logits are made again for the backward pass rather than kept.
    @jax.checkpoint
    def part(x: jax.Array, ids: jax.Array) -> jax.Array:
        y = jnp.einsum("btw,vw->btv", x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
        y = y if bias is None else y + bias.astype(jnp.float32)
        y = y if softcap is None else softcap * jnp.tanh(y / softcap)
        # An id outside the vocabulary is NaN, never another token's.
        safe = jnp.where(ids == IGNORE, 0, jnp.where(ids < 0, y.shape[-1], ids))
        picked = jnp.take_along_axis(y, safe[..., None], axis=-1, mode="fill")[..., 0]
        found = picked - jax.nn.logsumexp(y, axis=-1)
        return jnp.where(ids == IGNORE, 0.0, found)

    if chunk is None or chunk >= length:
        return part(states, labels)
    extra = -length % chunk
    states = jnp.pad(states, ((0, 0), (0, extra), (0, 0)))
    labels = jnp.pad(labels, ((0, 0), (0, extra)), constant_values=IGNORE)
    count = (length + extra) // chunk
    pieces = (
        jnp.moveaxis(states.reshape(batch, count, chunk, -1), 1, 0),
        jnp.moveaxis(labels.reshape(batch, count, chunk), 1, 0),
    )
    found = jax.lax.map(lambda piece: part(*piece), pieces)  # [count, B, chunk]
    return jnp.moveaxis(found, 0, 1).reshape(batch, -1)[:, :length]
