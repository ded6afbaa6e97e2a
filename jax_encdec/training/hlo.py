"""What a compiled program communicates, read from its text.

XLA prints each loop body once; here, what a loop calls counts as often as the loop runs. Sizes are
those of one device and one execution of the program.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

_BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16,
    "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64, "c128": 128,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Collective:
    """All executions of one kind of communication, per device and step."""

    kind: str
    """One of `KINDS`."""
    across_slices: bool
    """Between slices, over the data center's network; else between neighbouring chips."""
    count: int
    bytes: int
    """Sum of the whole arrays that are gathered, reduced or exchanged."""
    sent: int
    """Bytes that each device sends, at the least."""


def collectives(text: str, slices: Sequence[int]) -> tuple[Collective, ...]:
    """Every kind of communication in a compiled program.

    Args:
        text: of `compiled.as_text()`.
        slices: for each partition of the program, the slice that its device belongs to.
    """
    computations, entry = _computations(text)
    totals: dict[tuple[str, bool], Collective] = {}
    memo: dict[str, list[tuple[int, Collective]]] = {}
    for count, found in _executed(entry, computations, slices, memo):
        key = found.kind, found.across_slices
        old = totals.get(key, replace(found, count=0, bytes=0, sent=0))
        totals[key] = replace(
            old,
            count=old.count + count,
            bytes=old.bytes + count * found.bytes,
            sent=old.sent + count * found.sent,
        )
    return tuple(totals[k] for k in sorted(totals, key=lambda k: (KINDS.index(k[0]), k[1])))


# Computations and who calls them ------------------------------------------------------------------


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Lines of instructions by computation, and the name of the entry."""
    out: dict[str, list[str]] = {}
    entry = current = ""
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head is not None and not line.startswith(" "):
            current = head[2]
            out[current] = []
            entry = current if head[1] else entry
        elif line.startswith("}"):
            current = ""
        elif current:
            out[current].append(line)
    return out, entry


def _executed(
    name: str,
    computations: dict[str, list[str]],
    slices: Sequence[int],
    memo: dict[str, list[tuple[int, Collective]]],
) -> list[tuple[int, Collective]]:
    """(times, collective) of everything that one run of a computation executes."""
    if name in memo:
        return memo[name]
    found: list[tuple[int, Collective]] = []
    for line in computations.get(name, ()):
        if (own := _collective(line, name, slices)) is not None:
            found.append((1, own))
        elif loop := re.search(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line):
            trips = _trips(line, computations.get(loop[1], ()))
            inner = _executed(loop[2], computations, slices, memo)
            found += [(trips * count, what) for count, what in inner]
        else:
            for called in _called(line):
                found += _executed(called, computations, slices, memo)
    memo[name] = found
    return found


def _called(line: str) -> list[str]:
    names = re.findall(r"(?:calls|to_apply|called_computation)=%?([\w.\-]+)", line)
    for group in re.findall(r"(?:branch_computations|called_computations)=\{([^}]*)\}", line):
        names += [part.strip().lstrip("%") for part in group.split(",")]
    return names


def _trips(line: str, condition: Sequence[str]) -> int:
    """How often a loop runs: as the compiler says, else what its counter is compared with."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', line):
        return int(known[1])
    bounds = [int(m[1]) for x in condition if (m := re.search(r"s32\[\]\S* constant\((\d+)\)", x))]
    return max(bounds, default=1)


# One collective -----------------------------------------------------------------------------------

_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_MEGASCALE = re.compile(r' = \((\S+), .*? send\(.*_xla_megascale_transfer_type="(\w+)"')


def _collective(line: str, computation: str, slices: Sequence[int]) -> Collective | None:
    if between := _MEGASCALE.search(line):
        return _between_slices(between[1], between[2], len(set(slices)))
    match = _COLLECTIVE.search(line)
    if match is None:
        return None
    kind, size = match[2], _bytes(match[1])
    if kind == "collective-permute":
        pairs = _pairs(line)
        crosses = any(_crosses(pair, slices) for pair in pairs)
        size //= 2 if match[3] else 1  # what goes in and what comes out
        return Collective(kind=kind, across_slices=crosses, count=1, bytes=size, sent=size)
    groups = _groups(line)
    groups = groups or [list(range(len(slices)))]
    n = max(1, len(groups[0]))
    crosses = any(_crosses(group, slices) for group in groups)
    share = (n - 1) / n
    if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"  # as TPUs have it: a fusion that keeps a slice of the sum
    elif kind == "reduce-scatter":
        size *= n
    elif kind == "all-gather" and match[3]:
        size = size * n // (n + 1)
    sent = (2 if kind == "all-reduce" else 1) * share * size
    return Collective(kind=kind, across_slices=crosses, count=1, bytes=size, sent=int(sent))


def _between_slices(shape: str, transfer: str, n: int) -> Collective:
    """What a TPU hands to its host, to be combined with what n - 1 other slices have."""
    kind, size = transfer.lower().replace("_", "-"), _bytes(shape)
    sent = 2 * (n - 1) / max(1, n) * size if kind == "all-reduce" else size
    kind = kind if kind in KINDS else "collective-permute"
    return Collective(kind=kind, across_slices=True, count=1, bytes=size, sent=int(sent))


def _bytes(shapes: str) -> int:
    """Bytes of a result, an array or a tuple of them."""
    bits = 0
    for dtype, dims in re.findall(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]", shapes):
        width = _BITS.get(dtype, 8)  # the eight-bit floats have many names
        bits += width * math.prod(int(d) for d in dims.split(",") if d)
    return bits // 8


def _crosses(group: Sequence[int], slices: Sequence[int]) -> bool:
    return len({slices[i] for i in group}) > 1


def _pairs(line: str) -> list[list[int]]:
    found = re.search(r"source_target_pairs=\{(.*?)\}\}", line)
    return [] if found is None else _lists(found[1].replace("},{", "} {"))


def _lists(text: str) -> list[list[int]]:
    return [[int(i) for i in part.split(",")] for part in re.findall(r"\d+(?:,\d+)*", text)]


def _groups(line: str) -> list[list[int]]:
    """Who communicates with whom, in any of the three ways that XLA writes it."""
    if found := re.search(r"replica_groups=\{\{(.*?)\}\}", line):
        return _lists(found[1].replace("},{", "} {"))
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\S+?)(?:,\s|$)", line):
        return _iota(found[3]).reshape(int(found[1]), int(found[2])).tolist()
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](.*?)\{([^}]*)\}", line):
        return _mesh_groups(found[1], found[2], found[3])
    return []


def _iota(text: str) -> np.ndarray:
    """`[4,2]T(1,0)` -> the numbers from 0, in that shape, transposed."""
    match = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    assert match is not None, text
    shape = [int(i) for i in match[1].split(",")]
    array = np.arange(math.prod(shape)).reshape(shape)
    return array.transpose([int(i) for i in match[2].split(",")]) if match[2] else array


def _mesh_groups(axes: str, devices: str, over: str) -> list[list[int]]:
    """`'a'=4,'b'=2` and `'a'` or a part of an axis, `'a':(2)2`."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    parts: dict[str, list[tuple[int, int]]] = {}
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", over):
        whole = (1, sizes[name])
        parts.setdefault(name, []).append((int(before), int(size)) if size else whole)
    shape: list[int] = []
    taken: list[int] = []
    for name, size in sizes.items():
        done = 1
        for before, part in sorted(parts.get(name, [])):
            shape += [before // done, part]
            taken.append(len(shape) - 1)
            done = before * part
        shape.append(size // done)
    order = re.search(r"device_ids=\(?(\[[^)]*\](?:T\([\d,]+\))?)", devices)
    ids = _iota(order[1]).ravel() if order else np.arange(math.prod(shape))
    rest = [i for i in range(len(shape)) if i not in taken]
    n = math.prod(shape[i] for i in taken)
    return ids.reshape(shape).transpose(rest + taken).reshape(-1, n).tolist()
