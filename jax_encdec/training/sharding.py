"""Where every parameter and every row of a batch lives: a mesh, rules, and what follows from them.

A mesh has three axes. `replica` repeats the model (data parallelism; the only axis that may span
slices, over the slow network). `fsdp` splits batch and parameters alike: each device holds a part
of every matrix and gathers a layer's when it needs it. `tensor` splits heads, feed-forward width
and vocabulary, and with them the work on one row. `ShardingRules` map the logical axes that each
parameter is declared with (`layers.Param`) to these; `placements` says what became of every leaf.

What a mesh axis does not divide (30522 rows over 8) follows `ShardingRules.indivisible`, and every
such case carries a note.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jax_encdec import layers
from jax_encdec.encoder_decoder import EncoderDecoderModel
from jax_encdec.errors import ConfigError, InputError, nearest
from jax_encdec.layers import Param
from jax_encdec.pair_params import model_params

AXES = ("replica", "fsdp", "tensor")
BATCH_AXES = ("replica", "fsdp")
"""The mesh axes that split the rows of a batch."""

LeafPath = tuple[str, ...]
Rules = tuple[tuple[str, tuple[str, ...]], ...]
"""(logical axis, the mesh axes that split it) pairs."""


# The mesh ----------------------------------------------------------------------------------------


def make_mesh(
    shape: str | Mapping[str, int] | None = None, *, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh of all (or the given) devices with the axes `replica`, `fsdp` and `tensor`.

    Args:
        shape: sizes by axis, as in `"replica=2,fsdp=4"` or `{"fsdp": 8}`; absent axes have size 1,
            one of them may be -1: all devices that are left. None: everything on `fsdp`, with one
            replica per slice where there are several.
        devices: by default `jax.devices()`.

    Raises:
        ConfigError: an unknown axis, a size that is no number, or sizes that do not multiply to
            the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    sizes = _sizes({"replica": slices, "fsdp": -1} if shape is None else shape, len(devices))
    if sizes["replica"] % slices:
        raise ConfigError(
            f"replica={sizes['replica']} does not fit {slices} slices: only replica may span "
            f"slices, so that its size must be a multiple of {slices}"
        )
    if slices > 1:
        inner = (sizes["replica"] // slices, sizes["fsdp"], sizes["tensor"])
        grid = mesh_utils.create_hybrid_device_mesh(inner, (slices, 1, 1), devices)
        return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)
    # The default, Explicit, turns constraints into assertions.
    return jax.make_mesh(
        tuple(sizes[a] for a in AXES), AXES, devices=devices, axis_types=(AxisType.Auto,) * 3
    )


def _sizes(shape: str | Mapping[str, int], devices: int) -> dict[str, int]:
    """Sizes of all axes of a mesh, from what was asked for."""
    asked = _parse(shape) if isinstance(shape, str) else dict(shape)
    for axis, size in asked.items():
        if axis not in AXES:
            raise ConfigError(
                f"a mesh has the axes {', '.join(AXES)}; got {axis!r}{nearest(str(axis), AXES)}"
            )
        if type(size) is not int or (size < 1 and size != -1):
            raise ConfigError(
                f"the size of mesh axis {axis} must be a positive integer, or -1 for the devices "
                f"that are left; got {size!r}"
            )
    rest = [axis for axis, size in asked.items() if size == -1]
    known = math.prod(size for size in asked.values() if size != -1)
    if len(rest) > 1:
        raise ConfigError(f"only one mesh axis may be -1; got {' and '.join(rest)}")
    if rest and devices % known == 0:
        asked[rest[0]] = devices // known
        known = devices
    if known != devices:
        text = ",".join(f"{axis}={size}" for axis, size in asked.items())
        raise ConfigError(
            f"mesh {text or '(empty)'} takes {known} devices{' or a multiple' if rest else ''}; "
            f"there are {devices}"
        )
    return {axis: asked.get(axis, 1) for axis in AXES}


def _parse(text: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"(\w+)\s*=\s*(-?\d{1,9})", part)
        if match is None or match[1] in found:
            raise ConfigError(
                f"a mesh is written as 'replica=2,fsdp=4,tensor=1', each axis once; got {text!r}"
            )
        found[match[1]] = int(match[2])
    return found


# Rules -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ShardingRules:
    """Which mesh axes split which logical axes; what is not named stays whole.

    Attributes:
        params: of parameters.
        activations: of intermediate results (`act_*`), as `Execution.activation_rules` has them.
        indivisible: what becomes of a mesh axis that does not divide its dimension. "move": it
            splits the largest other dimension of that leaf that it divides, else none;
            "replicate": none; "error": a ConfigError.
    """

    params: Rules = (
        ("embed", ("fsdp",)),
        ("vocab", ("tensor",)),
        ("heads", ("tensor",)),
        ("kv_heads", ("tensor",)),
        ("mlp", ("tensor",)),
    )
    activations: Rules = (
        ("act_batch", ("replica", "fsdp")),
        ("act_length", ()),
        ("act_embed", ()),
        ("act_heads", ("tensor",)),
        ("act_mlp", ("tensor",)),
        ("act_vocab", ("tensor",)),
    )
    indivisible: Literal["move", "replicate", "error"] = "move"

    def __post_init__(self) -> None:
        if self.indivisible not in ("move", "replicate", "error"):
            raise ConfigError(
                f"indivisible must be 'move', 'replicate' or 'error'; got {self.indivisible!r}"
            )
        for kind in ("params", "activations"):
            names = [name for name, _ in getattr(self, kind)]
            if len(set(names)) != len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise ConfigError(f"sharding rules name the {kind} axis {twice!r} twice")
            for name, axes in getattr(self, kind):
                wrong = [a for a in axes if a not in AXES]
                if isinstance(axes, str) or wrong or len(set(axes)) != len(axes):
                    raise ConfigError(
                        f"sharding rule {name!r} must name mesh axes among {', '.join(AXES)}, "
                        f"each once, in a tuple; got {axes!r}"
                    )


DEFAULT_RULES = ShardingRules()


@dataclass(frozen=True)
class Placement:
    """What the rules made of one leaf."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    """Its logical axes."""
    spec: PartitionSpec
    note: str | None = None
    """What was not as the rules say, and why."""

    def shard_shape(self, mesh: Mesh) -> tuple[int, ...]:
        """Shape of the part that one device holds."""
        return NamedSharding(mesh, self.spec).shard_shape(self.shape)


def placements(
    model: EncoderDecoderModel, mesh: Mesh, rules: ShardingRules = DEFAULT_RULES
) -> dict[LeafPath, Placement]:
    """Where each parameter of a model lives, by path.

    Raises:
        ConfigError: two dimensions of a leaf are to be split by one mesh axis; or, if the rules
            say so, a mesh axis does not divide its dimension.
    """
    declared = layers.flatten(model_params(model.config))
    return {path: _place("/".join(path), leaf, mesh, rules) for path, leaf in declared.items()}


def _place(name: str, leaf: Param, mesh: Mesh, rules: ShardingRules) -> Placement:
    wanted = dict(rules.params)
    # An axis of size 1 splits nothing, and unnamed it leaves the program as it would be without.
    asked = [[a for a in wanted.get(axis or "", ()) if mesh.shape[a] > 1] for axis in leaf.axes]
    everything = [a for axes in asked for a in axes]
    if len(set(everything)) != len(everything):
        twice = next(a for a in everything if everything.count(a) > 1)
        both = [str(axis) for axis, axes in zip(leaf.axes, asked, strict=True) if twice in axes]
        raise ConfigError(
            f"the sharding rules split {name} twice by mesh axis {twice}: its axes "
            f"{' and '.join(both)} both ask for it; take it from one of them"
        )
    split: list[list[str]] = [[] for _ in asked]
    homeless: list[tuple[str, int]] = []
    for i, axes in enumerate(asked):
        for a in axes:
            fits = leaf.shape[i] % (_parts(mesh, split[i]) * mesh.shape[a]) == 0
            split[i] += [a] if fits else []
            homeless += [] if fits else [(a, i)]
    notes = []
    for a, i in homeless:
        why = f"{leaf.axes[i]} {leaf.shape[i]} does not divide by {a}={mesh.shape[a]}"
        if split[i]:
            why = f"{why} after {'x'.join(split[i])}"
        if rules.indivisible == "error":
            raise ConfigError(f"{name}: {why}; choose another mesh or indivisible='move'")
        to = _another(leaf, split, i, a, mesh) if rules.indivisible == "move" else None
        if to is not None:
            split[to].append(a)
            notes.append(f"{why}: {a} splits {leaf.axes[to] or 'axis'} {leaf.shape[to]} instead")
        else:
            notes.append(f"{why}: whole on each device of {a}")
    entries = [tuple(axes) if len(axes) > 1 else axes[0] if axes else None for axes in split]
    while entries and entries[-1] is None:
        entries.pop()
    return Placement(leaf.shape, leaf.axes, PartitionSpec(*entries), "; ".join(notes) or None)


def _parts(mesh: Mesh, axes: Sequence[str]) -> int:
    return math.prod(mesh.shape[a] for a in axes)


def _another(leaf: Param, split: list[list[str]], not_: int, axis: str, mesh: Mesh) -> int | None:
    """The dimension that `axis` can split instead: the one with the largest parts."""

    def part(i: int) -> int:
        return leaf.shape[i] // _parts(mesh, split[i])

    # Never layers: a scan over them would gather the whole leaf at each.
    able = [
        i
        for i, logical in enumerate(leaf.axes)
        if i != not_
        and logical != "layers"
        and part(i) % mesh.shape[axis] == 0
        and leaf.shape[i] % _parts(mesh, split[i]) == 0
    ]
    return max(able, key=part, default=None)


# Shardings ---------------------------------------------------------------------------------------


def replicated(mesh: Mesh) -> NamedSharding:
    """The same whole array on each device."""
    return NamedSharding(mesh, PartitionSpec())


def rows(mesh: Mesh) -> NamedSharding:
    """An array's first axis split as a batch's rows are, over `replica` and `fsdp`."""
    axes = tuple(a for a in BATCH_AXES if mesh.shape[a] > 1)
    return NamedSharding(mesh, PartitionSpec(axes) if axes else PartitionSpec())


def param_shardings(
    model: EncoderDecoderModel, mesh: Mesh, rules: ShardingRules = DEFAULT_RULES
) -> dict[str, Any]:
    """The sharding of each parameter: a tree like the parameters.

    Raises:
        ConfigError: as `placements`.
    """
    placed = placements(model, mesh, rules)
    return unflatten_dict({p: NamedSharding(mesh, leaf.spec) for p, leaf in placed.items()})


def used_shardings(
    model: EncoderDecoderModel, mesh: Mesh, rules: ShardingRules = DEFAULT_RULES
) -> dict[str, Any] | None:
    """The sharding in which each parameter enters the computation; None: as it is.

    What stands outside the layers (tables of embeddings, the head) is gathered over the axes that
    split rows of batches, once: looking rows up in a table that is split by columns over the
    devices that split the batch would have the compiler replicate both. Layers are gathered one by
    one where they are used.
    """
    if all(mesh.shape[a] == 1 for a in BATCH_AXES):
        return None
    used = {}
    for path, leaf in placements(model, mesh, rules).items():
        split = [(s,) if isinstance(s, str) else s or () for s in leaf.spec]
        if "layers" not in leaf.axes:
            split = [tuple(a for a in axes if a not in BATCH_AXES) for axes in split]
        used[path] = NamedSharding(mesh, PartitionSpec(*[axes or None for axes in split]))
    return unflatten_dict(used)


def batch_shardings(mesh: Mesh, batch: Mapping[str, Any], parts: int = 1) -> dict[str, Any]:
    """The sharding of each array of a batch: rows over `replica` and `fsdp`.

    Args:
        parts: micro-batches into which the rows are split besides.

    Raises:
        InputError: the mesh does not divide the number of rows.
    """
    count = _parts(mesh, BATCH_AXES) * parts
    for name, array in batch.items():
        if not array.shape or array.shape[0] % count:
            times = f" x {parts} micro-batches" if parts > 1 else ""
            raise InputError(
                f"a batch's rows must divide by replica x fsdp{times} = {count}; {name} has shape "
                f"{tuple(array.shape)}"
            )
    return dict.fromkeys(batch, rows(mesh))


def check_rows(count: int, mesh: Mesh, parts: int = 1) -> None:
    """See that a mesh divides the rows of a batch, before there is one.

    Args:
        parts: micro-batches into which the rows are split besides.

    Raises:
        InputError: it does not.
    """
    shares = _parts(mesh, BATCH_AXES) * parts
    if count % shares:
        micro = f" x execution.accumulate {parts}" if parts > 1 else ""
        shape = ",".join(f"{axis}={size}" for axis, size in mesh.shape.items())
        raise InputError(
            f"data.batch_size is {count}, which must divide by replica x fsdp{micro} = {shares} "
            f"(mesh {shape}); {max(count // shares, 1) * shares} would do"
        )


def data_shard(mesh: Mesh, process: int | None = None) -> tuple[int, int]:
    """Which part of each global batch a process feeds: (index, number of parts).

    Processes that `tensor` joins feed the same rows. Part i of n are rows `[i * B / n,
    (i + 1) * B / n)` of the global batch, in whatever order the mesh lays them out.

    Args:
        process: by default this one.

    Raises:
        ConfigError: the mesh cuts across processes in a way that gives them unequal parts.
    """
    grid = mesh.devices.reshape(_parts(mesh, BATCH_AXES), -1)
    owned: dict[int, frozenset[int]] = {}
    for block, devices in enumerate(grid):
        for p in {d.process_index for d in devices}:
            owned[p] = owned.get(p, frozenset()) | {block}
    parts = sorted(set(owned.values()), key=min)
    if sum(map(len, parts)) != len(grid) or len(set(map(len, parts))) != 1:
        raise ConfigError(
            f"mesh {dict(mesh.shape)} splits batches unevenly among {len(owned)} processes; make "
            f"replica x fsdp a multiple of the number of processes, or tensor a multiple of it"
        )
    return parts.index(owned[jax.process_index() if process is None else process]), len(parts)


def to_global(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Arrays over all processes from what each one holds: its `data_shard` of the rows.

    Raises:
        InputError: the mesh does not divide the number of rows.
    """
    _, parts = data_shard(mesh)
    count, out = _parts(mesh, BATCH_AXES) // parts, {}
    for name, array in batch.items():
        if not array.shape or array.shape[0] % count:
            raise InputError(
                f"this process's rows must divide by {count}, its part of the mesh; {name} has "
                f"shape {tuple(array.shape)}"
            )
        shape = (array.shape[0] * parts, *array.shape[1:])
        out[name] = jax.make_array_from_process_local_data(rows(mesh), np.asarray(array), shape)
    return out
