"""The parameters of a pair: two trunks' and a projection's, tied leaves once.

`model_params(config)` declares them; the rest checks and arranges trees of arrays laid out so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
from flax.traverse_util import unflatten_dict

from jax_encdec.encoder_decoder_config import EncoderDecoderConfig, Path
from jax_encdec.errors import InputError
from jax_encdec.layers import Params, dense_params, flatten
from jax_encdec.trunk_params import transformer_params


def model_params(config: EncoderDecoderConfig) -> dict[str, Any]:
    """Declare every parameter of a pair; tied leaves once, on the encoder's side."""
    encoder, decoder = config.encoder_trunk, config.decoder_trunk
    declared = {"encoder": transformer_params(encoder), "decoder": transformer_params(decoder)}
    if config.projects:
        declared["enc_to_dec_proj"] = dense_params(
            {"embed_in": encoder.hidden}, {"embed": decoder.hidden}, bias=True, std=decoder.init_std
        )
    flat = flatten(declared)
    for alias in config.aliases():
        del flat[alias]
    return unflatten_dict(flat)


def with_aliases(config: EncoderDecoderConfig, params: Params) -> Params:
    """Show tied leaves under their second name, so that each trunk finds a complete tree."""
    aliases = config.aliases()
    if not aliases:
        return params
    flat = flatten(params)
    return unflatten_dict(flat | {alias: flat[leaf] for alias, leaf in aliases.items()})


def plain_params(params: Any) -> dict[str, Any]:
    """A plain nested dict of arrays, from it or from what `model.init` returns."""
    if isinstance(params, Mapping) and set(params) == {"params"}:
        params = params["params"]
    if not isinstance(params, Mapping):
        kind = type(params).__name__
        hint = "; what prepare made is for generate and stream" if kind == "PreparedParams" else ""
        raise InputError(f"params must be a nested dict of arrays; got {kind}{hint}")
    return dict(nn.meta.unbox(params))


def check_tree(config: EncoderDecoderConfig, flat: Mapping[Path, Any]) -> None:
    """Refuse parameters, by path, that are not the model's, naming the first differences."""
    declared = flatten(model_params(config))
    problems = [f"{'/'.join(p)} is missing" for p in declared if p not in flat]
    problems += [f"{'/'.join(p)} is unexpected" for p in flat if p not in declared]
    problems += [
        f"{'/'.join(p)} has shape {tuple(flat[p].shape)}, expected {leaf.shape}"
        for p, leaf in declared.items()
        if p in flat and tuple(flat[p].shape) != leaf.shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise InputError(f"params do not fit the model: {'; '.join(problems[:3])}{more}")
