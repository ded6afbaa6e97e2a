"""Hidden states and attentions of what was generated: one forward pass over the found sequences.

The search keeps no states but its caches. What the decoder thought while it wrote a sequence is
what it thinks when the sequence is fed to it whole, up to rounding, so it is computed afterwards,
once, and only for what is returned.

Axes: B batch, S source length, R returned sequences, T capacity, N heads, D model.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jax_encdec.decoding.layout import tree_of
from jax_encdec.encoder_decoder import project
from jax_encdec.transformer import transformer


@partial(jax.jit, static_argnames=("config", "dtype", "hidden_states", "attentions"))
def inspect(
    config: Any,
    dtype: Any,
    params: Any,
    source: Any,
    sequences: jax.Array,
    *,
    hidden_states: bool,
    attentions: bool,
) -> dict[str, Any]:
    """Feed `sequences [B * R, T]` to the decoder, and the source to the encoder.

    Returns:
        The fields of `GenerationOutput` from `encoder_hidden_states` on; None for what was not
        asked for, and for the encoder's where ready states were given.
    """
    params = tree_of(config, params)
    wanted: dict[str, Any] = {
        "output_hidden_states": hidden_states,
        "output_attentions": attentions,
    }
    states, encoder = source.states, None
    if states is None:
        encoder = transformer(
            config.encoder_trunk,
            params["encoder"],
            source.input_ids,
            attention_mask=source.mask,
            token_type_ids=source.token_type_ids,
            position_ids=source.position_ids,
            global_attention_mask=source.global_mask,
            dtype=dtype,
            **wanted,
        )
        states = encoder.last_hidden_state
    returned = sequences.shape[0] // states.shape[0]
    decoder = transformer(
        config.decoder_trunk,
        params["decoder"],
        sequences[:, :-1],
        encoder_states=jnp.repeat(project(params, states.astype(dtype)), returned, axis=0),
        encoder_mask=jnp.repeat(source.mask, returned, axis=0),
        dtype=dtype,
        **wanted,
    )
    return {
        "encoder_hidden_states": None if encoder is None else encoder.hidden_states,
        "encoder_attentions": None if encoder is None else encoder.attentions,
        "decoder_hidden_states": decoder.hidden_states,
        "decoder_attentions": decoder.attentions,
        "cross_attentions": decoder.cross_attentions,
    }
