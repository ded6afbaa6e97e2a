"""How a model is computed, never what it computes.

`Execution` is static and hashable: what is rematerialised, which attention kernel runs, whether
layers are scanned, how activations are laid over a mesh. Every choice gives the same values up to
rounding; the default is right for one device. The rest of this file is what the trunk asks of it:
`remat` around a layer and `constrain` for an activation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import PartitionSpec

from jax_encdec.errors import ConfigError, nearest

ATTENTION = ("auto", "dense", "xla", "cudnn", "splash")
"""Attention kernels; see `jax_encdec.attention_kernels`."""

REMAT = ("none", "dots", "full")
"""What the forward pass leaves behind for the backward pass, within a layer: everything, the
results of dense layers, or nothing but the layer's input."""

ACTIVATION_AXES = ("act_batch", "act_length", "act_embed", "act_heads", "act_mlp", "act_vocab")
"""Logical names of activation axes; apart from the parameters' axes, whose rules differ."""

Rules = tuple[tuple[str, tuple[str, ...]], ...]
"""Pairs of a logical axis and the mesh axes that it is split over, in order."""


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a model is computed; an `EncoderDecoderModel` has one, changed by `model.clone`."""

    remat: str = "none"
    """`none`, `dots` or `full`: less memory for the backward pass, more to compute again."""
    attention: str = "auto"
    """`auto`, `dense`, `xla`, `cudnn` or `splash`; a kernel asked for by name that cannot do the
    job is an error that says why, where `auto` takes another."""
    scan_layers: bool = True
    """Scanned layers compile in a time that does not grow with depth. False: straight-line code,
    which the compiler optimises across layers."""
    activation_rules: Rules = ()
    """Mesh axes per activation axis (`act_batch`, `act_length`, `act_embed`, `act_heads`,
    `act_mlp`, `act_vocab`), in force under `jax.set_mesh`; an axis without a rule is the
    compiler's choice, one with `()` is replicated."""

    def __post_init__(self):
        for name, known in (("remat", REMAT), ("attention", ATTENTION)):
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(
                    f"execution {name} must be one of {', '.join(known)}; got {value!r}"
                    + nearest(str(value), known)
                )
        # Lists come from configuration files; a static argument must be hashable.
        rules = tuple((axis, tuple(mesh_axes)) for axis, mesh_axes in self.activation_rules)
        for axis, _ in rules:
            if axis not in ACTIVATION_AXES:
                raise ConfigError(
                    f"activation_rules know the axes {', '.join(ACTIVATION_AXES)}; got {axis!r}"
                    + nearest(axis, ACTIVATION_AXES)
                )
        object.__setattr__(self, "activation_rules", rules)

    def rule(self, axis: str | None) -> tuple[str, ...] | None:
        """The mesh axes of an activation axis; None where no rule speaks of it."""
        return next((over for name, over in self.activation_rules if name == axis), None)


DEFAULT = Execution()


def remat(execution: Execution, layer: Callable[..., Any], *, scanned: bool) -> Callable[..., Any]:
    """`layer`, a function of arrays, keeping for its backward pass what `execution.remat` says."""
    if execution.remat == "none":
        return layer
    policies = jax.checkpoint_policies
    return jax.checkpoint(
        layer,
        policy={"dots": policies.dots_with_no_batch_dims_saveable, "full": None}[execution.remat],
        # In a loop the two passes are apart already, and the barrier would only cost.
        prevent_cse=not scanned,
    )


# Activations over a mesh -------------------------------------------------------------------------


def constrain(execution: Execution, x: jax.Array, *axes: str | None) -> jax.Array:
    """Lay an activation over the current mesh, by the logical name of each of its axes.

    Without rules or without a mesh (`jax.set_mesh`), `x` itself. An axis named None is replicated;
    one without a rule, or whose size the mesh axes do not divide, is left to the compiler.
    """
    if not execution.activation_rules:
        return x
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    taken: set[str] = set()
    spec: list[Any] = []
    for size, axis in zip(x.shape, axes, strict=True):
        over = () if axis is None else execution.rule(axis)
        free = None if over is None else split_over(mesh, over, size, taken)
        spec.append(PartitionSpec.UNCONSTRAINED if free is None else free or None)
        taken.update(free or ())
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def split_over(
    mesh: Any, over: tuple[str, ...], size: int, taken: Any = ()
) -> tuple[str, ...] | None:
    """Those of the mesh axes `over` that exist, are free and longer than one; None if they do not
    divide `size`, though they should."""
    manual = getattr(mesh, "manual_axes", ())  # inside a shard_map these are split already
    axes = tuple(a for a in over if mesh.shape.get(a, 1) > 1 and a not in taken and a not in manual)
    return axes if size % math.prod(mesh.shape[a] for a in axes) == 0 else None
