"""What training carries from step to step, and where each part of it lives.

`init_state` makes it in place: parameters are drawn, or moved shard by shard, into their
shardings, and the optimizer's moments are made there by a compiled function, so that no device
ever holds more than its part. `abstract_state` is the same without memory: what a checkpoint is
restored into, and what `plan` compiles for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_encdec import layers
from jax_encdec.encoder_decoder import EncoderDecoderModel
from jax_encdec.pair_params import check_tree, plain_params
from jax_encdec.training.optimizer import Optimizer
from jax_encdec.training.sharding import (
    DEFAULT_RULES,
    LeafPath,
    Placement,
    ShardingRules,
    placements,
    replicated,
)


@flax.struct.dataclass
class TrainState:
    """Everything that a training step changes; or the shape, or the sharding, of each part."""

    step: Any
    """int32 scalar: steps taken."""
    params: Any
    opt_state: Any
    ema: Any = None
    """Moving average of the parameters, a tree like them; None where none is kept."""


def init_state(
    model: EncoderDecoderModel,
    optimizer: Optimizer | optax.GradientTransformation,
    mesh: Mesh,
    rules: ShardingRules = DEFAULT_RULES,
    *,
    params: Mapping[str, Any] | None = None,
    key: jax.Array | None = None,
    ema: bool = False,
) -> TrainState:
    """Make the state before the first step, each part in its place.

    Args:
        params: a tree of NumPy or JAX arrays, copied shard by shard (the state's own are given
            away at each step, yours stay); or None, and they are drawn.
        key: for what is drawn; by default `jax.random.key(0)`. The numbers do not depend on the
            mesh.
        ema: keep a moving average, which starts as the parameters.

    Raises:
        ConfigError: the rules do not fit the model, see `placements`.
        InputError: `params` is not this model's tree.
    """
    shardings = state_shardings(model, optimizer, mesh, rules, ema=ema)
    key = jax.random.key(0) if key is None else key
    if params is None and mesh.size == 1:
        placed = jax.device_put(model.init_params(key), shardings.params)  # compiles a few shapes
    elif params is None:
        placed = jax.jit(model.init_params, out_shardings=shardings.params)(key)
    else:
        placed = place_params(model, params, shardings.params)
    return TrainState(
        step=jax.device_put(jnp.zeros((), jnp.int32), shardings.step),
        params=placed,
        opt_state=jax.jit(optimizer.init, out_shardings=shardings.opt_state)(placed),
        ema=jax.tree.map(jnp.copy, placed) if ema else None,
    )


def place_params(
    model: EncoderDecoderModel, params: Mapping[str, Any], shardings: Mapping[str, Any]
) -> dict[str, Any]:
    """Copy a tree of parameters into `shardings` (a tree like it), in the model's `param_dtype`.

    Raises:
        InputError: `params` is not this model's tree.
    """
    params = plain_params(params)
    check_tree(model.config, layers.flatten(params))

    def place(leaf: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(leaf, jax.Array):
            if leaf.is_fully_addressable == sharding.is_fully_addressable:
                # Copied first: a replica on the device that has it already would be the very same
                # memory (jax 0.10.2, whatever `may_alias` says), and be given away at each step.
                leaf = jnp.array(leaf, model.param_dtype, copy=True)
                return jax.device_put(leaf, sharding)
            leaf = leaf.astype(model.param_dtype)
        return jax.make_array_from_callback(
            leaf.shape, sharding, lambda index: np.array(leaf[index], model.param_dtype)
        )

    return jax.tree.map(place, params, dict(shardings))


def state_shardings(
    model: EncoderDecoderModel,
    optimizer: Optimizer | optax.GradientTransformation,
    mesh: Mesh,
    rules: ShardingRules = DEFAULT_RULES,
    *,
    ema: bool = False,
) -> TrainState:
    """The sharding of each part of the state: a `TrainState` of `NamedSharding`s.

    What the optimizer keeps per parameter lives where the parameter does: an optimizer's state
    repeats the parameters' tree, so that a leaf whose path ends in a parameter's belongs to it,
    whatever wraps it (masks, partitions, chains). Of another shape (factored statistics), it is
    split as those dimensions of the parameter are that it still has. The rest (counts) is whole
    on each device.
    """
    placed = placements(model, mesh, rules)
    abstract = jax.eval_shape(optimizer.init, model.param_shapes())

    def sharding(path: Any, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        owner = _owner(path, placed)
        return replicated(mesh) if owner is None else _like(owner, leaf.shape, mesh)

    params = unflatten_dict({p: NamedSharding(mesh, leaf.spec) for p, leaf in placed.items()})
    return TrainState(
        step=replicated(mesh),
        params=params,
        opt_state=jax.tree_util.tree_map_with_path(sharding, abstract),
        ema=params if ema else None,
    )


def _owner(path: Any, placed: Mapping[LeafPath, Placement]) -> Placement | None:
    """The parameter whose path stands at the end of a leaf's, or nearest to it."""
    names = tuple(str(getattr(entry, "key", getattr(entry, "name", ""))) for entry in path)
    for end in range(len(names), 0, -1):
        for start in range(end):
            if names[start:end] in placed:
                return placed[names[start:end]]
    return None


def _like(owner: Placement, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Split an array as those dimensions of its parameter are that it has, in their order.

    One dimension may be several of the parameter's, joined (heads x head_dim).
    """
    if shape == owner.shape:
        return NamedSharding(mesh, owner.spec)
    split = (*owner.spec, *[None] * (len(owner.shape) - len(owner.spec)))
    entries, at = [], 0
    for size in shape:
        runs = (
            (start, stop)
            for start in range(at, len(owner.shape))
            for stop in range(start + 1, len(owner.shape) + 1)
            if math.prod(owner.shape[start:stop]) == size != 1
        )
        start, at = next(runs, (None, at))
        entries.append(None if start is None else split[start])
    return NamedSharding(mesh, PartitionSpec(*entries))


def abstract_state(
    model: EncoderDecoderModel,
    optimizer: Optimizer | optax.GradientTransformation,
    mesh: Mesh,
    rules: ShardingRules = DEFAULT_RULES,
    *,
    ema: bool = False,
) -> TrainState:
    """Shapes, dtypes and shardings of the state, without memory: `jax.ShapeDtypeStruct`s."""
    params = model.param_shapes()
    shapes = TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32),
        params=params,
        opt_state=jax.eval_shape(optimizer.init, params),
        ema=params if ema else None,
    )
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_shardings(model, optimizer, mesh, rules, ema=ema),
    )
