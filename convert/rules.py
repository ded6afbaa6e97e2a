"""The rule language: which published tensor is which leaf of the parameter tree, both ways.

A `Rule` names a tensor, one leaf (or several, where the published tensor fuses them) and how the
numbers are laid out. A `Part` is the rules of one side of a model. From the same rules follow
import (`match`, then `Plan.recipes`), export (`tensors`) and the report of what was read, ignored
and why, and left fresh. Every tensor of a file is consumed or ignored for a stated reason, every
leaf is filled exactly once; all problems are collected and raised together.

Two rules may lead to one leaf: published names of tied weights. Importing takes whichever is there
and compares the rest; exporting writes one name per part, as PyTorch does.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from threading import Lock
from typing import Any, Protocol

import numpy as np

from jax_encdec.config import TransformerConfig
from jax_encdec.convert.layouts import PLAIN, Conv1D, Linear, Plain, Shape, Vector
from jax_encdec.convert.readers import TensorInfo, TensorSource
from jax_encdec.convert.tensor_source import aligned
from jax_encdec.errors import CheckpointError
from jax_encdec.host_arrays import HostArray

Path = tuple[str, ...]
Box = tuple[tuple[int, int], ...]
"""A part of a leaf: from where to where, for each dimension."""


class HasShape(Protocol):
    """A declaration or an array."""

    @property
    def shape(self) -> Shape:
        """Dimensions."""
        ...


# Rules -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """One published tensor and where it goes.

    Attributes:
        tensor: its name; `{}` stands for a layer's number.
        leaf: path of the leaf, `/` between names, or several for a fused tensor; a layer's leaf
            starts with `{}`, as in `{}/mlp/up/kernel`.
        layout: how the numbers lie.
        fallback: read only where a file has no other tensor for the leaf; never written.
    """

    tensor: str
    leaf: str | tuple[str, ...]
    layout: Plain = PLAIN
    fallback: bool = False

    def prefixed(self, tensor: str, leaf: str) -> Rule:
        """The same rule inside a larger model."""
        leaves = self.leaf if isinstance(self.leaf, tuple) else (self.leaf,)
        return replace(
            self, tensor=tensor + self.tensor, leaf=tuple(f"{leaf}/{name}" for name in leaves)
        )


def linear(tensor: str, leaf: str | tuple[str, ...], inputs: int = 1) -> tuple[Rule, Rule]:
    """Rules of a torch.nn.Linear: `weight` and `bias` of one or several dense layers."""
    return _dense(tensor, leaf, Linear(inputs))


def conv1d(tensor: str, leaf: str | tuple[str, ...], inputs: int = 1) -> tuple[Rule, Rule]:
    """Rules of GPT-2's Conv1D, a dense layer stored untransposed."""
    return _dense(tensor, leaf, Conv1D(inputs))


def _dense(tensor: str, leaf: str | tuple[str, ...], layout: Plain) -> tuple[Rule, Rule]:
    leaves = leaf if isinstance(leaf, tuple) else (leaf,)
    return (
        Rule(f"{tensor}.weight", tuple(f"{name}/kernel" for name in leaves), layout),
        Rule(f"{tensor}.bias", tuple(f"{name}/bias" for name in leaves), Vector()),
    )


def norm(tensor: str, leaf: str) -> tuple[Rule, Rule]:
    """Rules of a torch.nn.LayerNorm, or of an RMS norm, which has no bias."""
    return Rule(f"{tensor}.weight", f"{leaf}/scale"), Rule(f"{tensor}.bias", f"{leaf}/bias")


@dataclass(frozen=True)
class Part:
    """The rules of one side of a model, with complete names on both ends.

    Attributes:
        rules: tensors and leaves.
        trunks: where `{}` counts layers: (path of the trunk, its configuration).
        layers: numbers of the published layers that fill the trunk's layers in turn.
        ignored: (pattern of names, why they are of no use here).
        aliases: leaves that exist only under another name, within or across parts.
        optional: patterns of leaves that may stay fresh when a file lacks them.
    """

    rules: tuple[Rule, ...]
    trunks: Mapping[str, TransformerConfig] = field(default_factory=dict)
    layers: tuple[int, ...] | None = None
    ignored: tuple[tuple[str, str], ...] = ()
    aliases: Mapping[Path, Path] = field(default_factory=dict)
    optional: tuple[str, ...] = ()


@dataclass(frozen=True)
class Slot:
    """One tensor bound to slices of leaves: `leaves[k]` at `index`, joined in order."""

    tensor: str
    leaves: tuple[Path, ...]
    index: int | None
    layout: Plain
    fallback: bool = False


def bind(part: Part, leaves: Mapping[Path, HasShape]) -> Iterator[Slot]:
    """Write out a part's rules for the layers that its trunks have.

    A layered rule passes over layers that lack its leaf (a first block without a norm, say).
    """
    for rule in part.rules:
        names = rule.leaf if isinstance(rule.leaf, tuple) else (rule.leaf,)
        for tensor, paths, index in _places(part, rule.tensor, names):
            real = tuple(part.aliases.get(path, path) for path in paths)
            present = [path in leaves for path in real]
            if all(present):
                yield Slot(tensor, real, index, rule.layout, rule.fallback)


def _places(
    part: Part, tensor: str, names: Sequence[str]
) -> Iterator[tuple[str, tuple[Path, ...], int | None]]:
    trunk = next((t for t in part.trunks if names[0].startswith(f"{t}/{{}}/")), None)
    if trunk is None:
        yield tensor, tuple(tuple(name.split("/")) for name in names), None
        return
    number = 0
    for i, segment in enumerate(part.trunks[trunk].segments):
        for repeat in range(segment.repeat):
            for j in range(len(segment.blocks)):
                published = number if part.layers is None else part.layers[number]
                place = f"{trunk}/segment_{i}/block_{j}/"
                paths = tuple(
                    tuple(name.replace(f"{trunk}/{{}}/", place, 1).split("/")) for name in names
                )
                yield tensor.format(published), paths, None if segment.share else repeat
                number += 1


def _slice(leaf: HasShape, index: int | None) -> Shape:
    return leaf.shape if index is None else leaf.shape[1:]


def tensor_shape(slot: Slot, leaves: Mapping[Path, HasShape]) -> Shape:
    """Shape of a slot's published tensor."""
    pieces = [slot.layout.shape(_slice(leaves[path], slot.index)) for path in slot.leaves]
    axis = slot.layout.axis
    if len(pieces) == 1:
        return pieces[0]
    first = pieces[0]
    return (*first[:axis], sum(piece[axis] for piece in pieces), *first[axis + 1 :])


# Import ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """What became of a file's tensors and of the model's leaves."""

    read: tuple[str, ...] = ()
    ignored: Mapping[str, str] = field(default_factory=dict)
    fresh: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{len(self.read)} tensors read"]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.ignored.items():
            reasons.setdefault(reason, []).append(name)
        lines += [f"{len(names)} ignored ({why}): {_some(names)}" for why, names in reasons.items()]
        if self.fresh:
            lines.append(f"{len(self.fresh)} left at their initial values: {_some(self.fresh)}")
        return "\n".join([*lines, *self.notes])


def _some(names: Sequence[str], limit: int = 4) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


_LEGACY = ((re.compile(r"\.gamma$"), ".weight"), (re.compile(r"\.beta$"), ".bias"))
_WRAPPERS = ("module.", "_orig_mod.")


def published_names(source: Iterable[str]) -> dict[str, str]:
    """Map today's names to a file's: old LayerNorm names, training wrappers' prefixes."""
    names = {name: name for name in source}
    for wrapper in _WRAPPERS:
        if names and all(name.startswith(wrapper) for name in names):
            names = {name[len(wrapper) :]: real for name, real in names.items()}
    out = {}
    for name, real in names.items():
        for pattern, today in _LEGACY:
            name = pattern.sub(today, name)
        out[name] = real
    return out


@dataclass(frozen=True)
class Plan:
    """A file matched with a model: nothing is missing, wrong or left over."""

    slots: Mapping[tuple[Path, int | None], tuple[Slot, ...]]
    """For each slice of each leaf, the tensors that hold it; several where tied."""
    names: Mapping[str, str]
    fresh: tuple[Path, ...]
    report: Report

    def broken_ties(self, source: TensorSource) -> list[tuple[Path, str, str]]:
        """Tied leaves whose published copies differ: (leaf, one tensor, the other)."""
        broken = []
        for (path, _), (first, *others) in self.slots.items():
            if not others:
                continue
            one = self.read(source, first, path, lazy=True)
            for other in others:
                if not np.array_equal(one, self.read(source, other, path, lazy=True)):
                    broken.append((path, first.tensor, other.tensor))
        return broken

    def boxes(
        self,
        source: TensorSource,
        leaves: Mapping[Path, HasShape],
        dtype: np.dtype,
        wanted: Mapping[Path, Iterable[Box]],
    ) -> Iterator[tuple[Path, Box, np.ndarray]]:
        """Yield parts of the leaves that the file fills, in `dtype`, reading only those parts.

        In memory is one part at a time, where the file can be mapped; else all parts of a leaf
        and one tensor. Of a tensor whose parts lie scattered, a disk reads what is in between.

        Args:
            wanted: the parts of each leaf.
        """
        for path, indices in self._slices().items():
            boxes = list(wanted.get(path, ()))
            for group in [[box] for box in boxes] if source.mapped else [boxes]:
                parts = [np.empty([stop - start for start, stop in box], dtype) for box in group]
                for index in indices:
                    slot, shape = self.slots[path, index][0], leaves[path].shape
                    # Layer `index` is row `index - start` of the boxes that reach over it.
                    hits = [
                        (part, box) if index is None else (part[index - box[0][0]], box[1:])
                        for part, box in zip(parts, group, strict=True)
                        if index is None or box[0][0] <= index < box[0][1]
                    ]
                    if hits:
                        piece = self.read(source, slot, path, shape, lazy=True)
                        for part, box in hits:
                            part[...] = piece[tuple(slice(*span) for span in box)]
                        del piece
                for box in group:
                    yield path, box, parts.pop(0)

    def _slices(self) -> dict[Path, list[int | None]]:
        """The layers of each leaf, or None for one that has none."""
        slices: dict[Path, list[int | None]] = {}
        for path, index in self.slots:
            slices.setdefault(path, []).append(index)
        return slices

    def recipes(
        self, source: TensorSource, leaves: Mapping[Path, HasShape], dtype: np.dtype
    ) -> dict[Path, HostArray]:
        """How each leaf that the file fills is read, whole or layer by layer, in `dtype`."""
        lock = Lock()  # A source is read by one thread at a time.

        def layer(path: Path, index: int | None) -> np.ndarray:
            with lock:
                piece = self.read(source, self.slots[path, index][0], path, leaves[path].shape)
            return piece.astype(dtype, copy=False)

        def whole(path: Path, indices: list[int | None]) -> np.ndarray:
            if indices == [None]:
                return layer(path, None)
            out = aligned(leaves[path].shape, dtype)
            for index in indices:
                out[index] = layer(path, index)
            return out

        return {
            path: HostArray(
                partial(whole, path, indices),
                leaves[path].shape,
                layer=partial(layer, path),
                fresh=True,
            )
            for path, indices in self._slices().items()
        }

    def read(
        self,
        source: TensorSource,
        slot: Slot,
        path: Path,
        shape: Shape | None = None,
        *,
        lazy: bool = False,
    ) -> np.ndarray:
        """Read one slot's tensor, or the part of it that is `path`'s.

        With the leaf's `shape`, the result is laid out as the leaf (or its slice); without, it
        stays as published. If `lazy`, it is a view of the file, where that can be mapped.
        """
        name = self.names[slot.tensor]
        tensor = source.view(name) if lazy else source[name]
        if len(slot.leaves) > 1:
            # Parts of one fused tensor are of one size (queries, keys and values).
            parts = np.split(tensor, len(slot.leaves), axis=slot.layout.axis)
            tensor = parts[slot.leaves.index(path)]
        if shape is None:
            return tensor
        return slot.layout.to_leaf(tensor, shape if slot.index is None else shape[1:])


def match(
    parts: Sequence[Part],
    leaves: Mapping[Path, HasShape],
    source: TensorSource,
    *,
    where: str,
    strict: bool = True,
) -> Plan:
    """Match a file's tensors with a model's leaves.

    Args:
        leaves: the model's declared leaves, by path.
        source: the file.
        where: what to call the file in messages.
        strict: refuse tensors that no rule knows; otherwise report them as ignored.

    Raises:
        CheckpointError: tensors are missing, unexpected or of another shape; all are named.
    """
    names = published_names(source)
    slots: dict[tuple[Path, int | None], list[Slot]] = {}
    missing: dict[tuple[Path, int | None], list[str]] = {}
    consumed: set[str] = set()
    problems: list[str] = []
    bound: set[Path] = set()
    fallbacks: dict[tuple[Path, int | None], Slot] = {}
    for part in parts:
        for slot in bind(part, leaves):
            bound.update(slot.leaves)
            if slot.fallback and slot.tensor in names:
                fallbacks |= {(path, slot.index): slot for path in slot.leaves}
            if slot.fallback or slot.tensor not in names:
                for path in slot.leaves:
                    missing.setdefault((path, slot.index), []).append(slot.tensor)
                continue
            consumed.add(slot.tensor)
            if problem := _misfit(slot, leaves, source.info(names[slot.tensor])):
                problems.append(problem)
                continue
            for path in slot.leaves:
                slots.setdefault((path, slot.index), []).append(slot)
    optional = _optional(parts, leaves)
    if unbound := [path for path in leaves if path not in bound and path not in optional]:
        raise AssertionError(f"no rule fills {unbound}")  # a hole in a family's table
    for place, slot in fallbacks.items():
        if place in slots or place not in missing:
            continue
        consumed.add(slot.tensor)
        slots[place] = [slot]
        if problem := _misfit(slot, leaves, source.info(names[slot.tensor])):
            problems.append(problem)
    lost = {place: tensors for place, tensors in missing.items() if place not in slots}
    fresh = tuple(dict.fromkeys(path for path, _ in lost if path in optional))
    fresh += tuple(path for path in optional if path not in bound)
    absent = sorted({t[0] for (path, _), t in lost.items() if path not in optional})
    if absent:
        problems.append(f"{len(absent)} tensors are missing: {_some(absent)}")
    ignored, unexpected = {}, []
    for name in names:
        if name in consumed:
            continue
        reason = _reason(parts, name)
        if reason is None and strict:
            unexpected.append(name)
        else:
            ignored[name] = reason or "no rule of this family knows it"
    if unexpected:
        problems.append(f"{len(unexpected)} tensors are unexpected: {_some(unexpected)}")
    if problems:
        text = "; ".join(problems[:4]) + ("; ..." if len(problems) > 4 else "")
        raise CheckpointError(
            f"{where} does not fit its configuration: {text}; check that the file and config.json "
            f"belong together"
        )
    # A leaf of which only some layers are there would be half fresh.
    half = {path for path, _ in slots} & set(fresh)
    if half:
        raise CheckpointError(
            f"{where} holds only some layers of {_some(['/'.join(p) for p in sorted(half)])}"
        )
    report = Report(
        read=tuple(sorted(consumed)),
        ignored=ignored,
        fresh=tuple("/".join(path) for path in fresh),
    )
    return Plan({place: tuple(s) for place, s in slots.items()}, names, fresh, report)


def _misfit(slot: Slot, leaves: Mapping[Path, HasShape], info: TensorInfo) -> str | None:
    """Why a file's tensor cannot be what the slot expects."""
    expected = tensor_shape(slot, leaves)
    if info.shape != expected:
        return f"{slot.tensor} has shape {info.shape}, expected {expected}"
    if info.dtype.kind in "biuc":
        return f"{slot.tensor} holds {info.dtype}, expected floating point numbers"
    return None


def _optional(parts: Sequence[Part], leaves: Mapping[Path, Any]) -> dict[Path, None]:
    patterns = [pattern for part in parts for pattern in part.optional]
    return {
        path: None
        for path in leaves
        if any(fnmatch.fnmatchcase("/".join(path), pattern) for pattern in patterns)
    }


def _reason(parts: Sequence[Part], name: str) -> str | None:
    for part in parts:
        for pattern, reason in part.ignored:
            if fnmatch.fnmatchcase(name, pattern):
                return reason
    return None


# Export ------------------------------------------------------------------------------------------


def tensors(
    parts: Sequence[Part], leaves: Mapping[Path, Any]
) -> Iterator[tuple[str, TensorInfo, Callable[[], np.ndarray]]]:
    """Yield (name, dtype and shape, how to make it) for every tensor to be written.

    Args:
        leaves: arrays by path, the model's own leaves only.
    """
    for part in parts:
        written: set[tuple[tuple[Path, ...], int | None]] = set()
        for slot in bind(part, leaves):
            key = (slot.leaves, slot.index)
            if key in written or slot.fallback:
                continue
            written.add(key)
            dtype = np.dtype(leaves[slot.leaves[0]].dtype)
            info = TensorInfo(dtype, tensor_shape(slot, leaves))

            def make(slot: Slot = slot) -> np.ndarray:
                pieces = [_published(slot, leaves[path]) for path in slot.leaves]
                joined = (
                    np.concatenate(pieces, axis=slot.layout.axis) if len(pieces) > 1 else pieces[0]
                )
                return np.ascontiguousarray(joined)

            yield slot.tensor, info, make


def _published(slot: Slot, leaf: Any) -> np.ndarray:
    # Slice on the device before the copy to host: one layer at a time crosses.
    return slot.layout.to_tensor(np.asarray(leaf if slot.index is None else leaf[slot.index]))
