"""Generation over a mesh: heads and feed-forward parts over `tensor`, rows over the other axes.

    mesh = make_mesh("fsdp=2,tensor=4")
    params = shard_params(model, params, mesh)
    model.generate(params, input_ids, num_beams=4)

It runs where the parameters are. Inputs are laid beside them, the compiler splits everything in
between, caches included, and the tokens are those of one device. Rows are independent, so that
devices that split them exchange one bit per step: whether all are done. The mesh may be that of a
job of several processes: all call with the same arguments, and each gets the whole result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_encdec.layers import flatten
from jax_encdec.pair_params import check_tree, plain_params
from jax_encdec.training.sharding import (
    AXES,
    BATCH_AXES,
    DEFAULT_RULES,
    ShardingRules,
    make_mesh,
    param_shardings,
    rows,
)

if TYPE_CHECKING:
    from jax_encdec.decoding.engine import Request
    from jax_encdec.encoder_decoder import EncoderDecoderModel

GENERATION_RULES = replace(
    DEFAULT_RULES, params=tuple(rule for rule in DEFAULT_RULES.params if rule[0] != "embed")
)
"""As in training, but whole over `fsdp`: a step reads all weights, and gathering them each time
would take longer than reading them."""


def shard_params(
    model: EncoderDecoderModel,
    params: Any,
    mesh: Mesh | str | Mapping[str, int],
    rules: ShardingRules = GENERATION_RULES,
) -> dict[str, Any]:
    """Lay a model's parameters over a mesh, for `generate`.

    Args:
        params: a tree of NumPy or JAX arrays, in their dtypes.
        mesh: of `make_mesh`, or what it takes: "replica=2,tensor=4".
        rules: where each logical axis goes.

    Raises:
        ConfigError: the mesh does not fit the devices, or the rules the model.
        InputError: `params` is not this model's tree.
    """
    mesh = mesh if isinstance(mesh, Mesh) else make_mesh(mesh)
    params = plain_params(params)
    check_tree(model.config, flatten(params))
    return jax.device_put(params, param_shardings(model, mesh, rules))


def mesh_of(params: Any) -> Mesh | None:
    """The mesh that parameters lie on; None: they do not, or it is not one of `make_mesh`."""
    leaf = jax.tree.leaves(params)[0]
    sharding = None if isinstance(leaf, Tracer) else getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, Mesh):
        return None
    mesh = sharding.mesh
    return mesh if mesh.size > 1 and mesh.axis_names == AXES else None


def running(params: Any) -> AbstractContextManager[Any]:
    """What a compiled function of `params` is called under: their mesh, if they have one."""
    mesh = mesh_of(params)
    return nullcontext() if mesh is None else jax.set_mesh(mesh)


def placed(asked: Request) -> Request:
    """A request laid over the mesh of its parameters, if they have one.

    Rows that the mesh does not divide are repeated on all devices. Parameters that lie as in
    training are gathered, see `gathered`.
    """
    mesh = mesh_of(asked.params)
    if mesh is None:
        return asked
    parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    whole = NamedSharding(mesh, PartitionSpec())
    split = whole if asked.prompt.shape[0] % parts else rows(mesh)
    source, prompt = jax.device_put((asked.source, asked.prompt), split)
    length = jax.device_put(asked.prompt_length, split if asked.prompt_length.ndim else whole)
    return asked._replace(
        params=gathered(asked.params), source=source, prompt=prompt, prompt_length=length
    )


def spans_processes(params: Any) -> bool:
    """Whether parameters lie on devices of several processes."""
    mesh = mesh_of(params)
    return mesh is not None and mesh.is_multi_process


def whole(tree: Any) -> Any:
    """A tree whose arrays this process can read: what it lacks comes from the other processes."""

    def fetched(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return x
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(fetched, tree)


def agreed(params: Any, late: bool) -> bool:
    """What the first process says, where parameters lie on devices of several: clocks differ."""
    if not spans_processes(params):
        return late
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(np.bool_(late)))


def gathered(params: Any) -> Any:
    """Parameters, whole over the axes that split rows; as they are where that is so already, or
    where a device has no room for them."""
    mesh = mesh_of(params)
    if mesh is None:
        return params

    def axes(leaf: Any) -> list[tuple[str, ...]]:
        spec = getattr(getattr(leaf, "sharding", None), "spec", ())
        return [(entry,) if isinstance(entry, str) else entry or () for entry in spec]

    def sharding(leaf: Any) -> NamedSharding:
        kept = [tuple(a for a in over if a not in BATCH_AXES) or None for over in axes(leaf)]
        return NamedSharding(mesh, PartitionSpec(*kept))

    leaves = jax.tree.leaves(params)
    split = [leaf for leaf in leaves if any(a in BATCH_AXES for over in axes(leaf) for a in over)]
    shapes = [sharding(leaf).shard_shape(leaf.shape) for leaf in split]
    size = sum(x.dtype.itemsize * math.prod(s) for x, s in zip(split, shapes, strict=True))
    if not split or not has_room(mesh.local_devices[0], 2 * size):
        return params
    return jax.device_put(params, jax.tree.map(sharding, params))


def has_room(device: Any, size: int) -> bool:
    """Whether a device has so many bytes free; True where it does not tell, as CPUs."""
    memory = device.memory_stats() or {}
    return size <= memory.get("bytes_limit", math.inf) - memory.get("bytes_in_use", 0)
