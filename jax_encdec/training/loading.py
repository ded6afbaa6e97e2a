"""Pretrained weights straight into sharded arrays: no host reads, and no device holds, the whole.

The short forms of `pretrained.load` and `warm_start.join` with the shardings of a mesh. Weight
files that can be mapped (safetensors, PyTorch's) are read slice by slice, the rest tensor by
tensor.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jax_encdec.encoder_decoder import EncoderDecoderModel
from jax_encdec.training.sharding import DEFAULT_RULES, ShardingRules, param_shardings


def load_sharded(
    path: str | Path, mesh: Mesh, rules: ShardingRules = DEFAULT_RULES, **options: Any
) -> tuple[EncoderDecoderModel, dict[str, Any]]:
    """Load a published pair into the shardings of a mesh.

    Args:
        **options: of `pretrained.load`. With `verify=False` a process reads the bytes of its own
            shards only; by default a SHA256SUMS is checked first, against whole files.

    Raises:
        CheckpointError, ConfigError: as `from_pretrained` and `placements`.
    """
    from jax_encdec.pretrained import load

    loaded = load(path, shardings=partial(param_shardings, mesh=mesh, rules=rules), **options)
    return loaded.model, loaded.params


def join_sharded(
    encoder: str | Path | None,
    decoder: str | Path | None,
    mesh: Mesh,
    rules: ShardingRules = DEFAULT_RULES,
    **options: Any,
) -> tuple[EncoderDecoderModel, dict[str, Any]]:
    """Join two checkpoints into a new pair in the shardings of a mesh.

    Args:
        **options: of `warm_start.join`; what neither checkpoint holds is drawn shard by shard.

    Raises:
        CheckpointError, ConfigError, InputError: as `join` and `placements`.
    """
    from jax_encdec.warm_start import join

    placed = partial(param_shardings, mesh=mesh, rules=rules)
    loaded = join(encoder, decoder, shardings=placed, **options)
    return loaded.model, loaded.params
