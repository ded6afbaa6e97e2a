"""The part of HDF5 that Keras' weight files are made of, read without the HDF5 library.

Such a file is a tree of groups (symbol tables: a B-tree of name-to-object entries, names in a heap)
and datasets of plain numbers, each in one piece. `datasets` walks the tree, checks every size and
address against the file, and says where the numbers lie. Whatever else HDF5 can do (links out of
the tree or the file, chunks, filters, numbers in other files, virtual datasets) is refused: none of
it is needed, and much of it is how such a file would do harm.

Numbers are little-endian; the names of the parts are those of the format's specification.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

import ml_dtypes
import numpy as np

from jax_encdec.convert.tensor_source import (
    BinaryFile,
    TensorInfo,
    check_tensors,
    shape_problem,
    short,
)
from jax_encdec.errors import CheckpointError

SIGNATURE = b"\x89HDF\r\n\x1a\n"
MAX_DEPTH = 32
_BUDGET = 1 << 26
"""Bytes of structure, all numbers left aside; a large model has a few million."""
_READ_COSTS = 512
"""Bytes that a short read is counted as."""
_MAX_NAME = 1000
_NOWHERE = (1 << 64) - 1

# Messages of an object header.
_DATASPACE, _DATATYPE, _EXTERNAL, _LAYOUT, _FILTERS = 0x01, 0x03, 0x07, 0x08, 0x0B
_ATTRIBUTE, _CONTINUED, _SYMBOLS = 0x0C, 0x10, 0x11
_NEWER = {0x02: "a newer kind of group", 0x06: "a newer kind of group"}


class Dataset(NamedTuple):
    """An array of the file, or (`info` is None) a dataset of something else.

    Attributes:
        path: names of the groups it is in, from the root, and its own.
        start: its first byte in the file.
        attributed: whether each of these groups has the attribute that was asked for.
    """

    path: tuple[str, ...]
    info: TensorInfo | None
    start: int
    attributed: tuple[bool, ...]


def datasets(file: BinaryFile, attribute: str) -> list[Dataset]:
    """All datasets of a file, in the order of their names.

    Args:
        attribute: which groups have one whose name begins so is told.

    Raises:
        CheckpointError: the file is damaged, or uses what weight files do not.
    """
    return list(_Reader(file, attribute.encode()).datasets())


@dataclass(frozen=True)
class _Object:
    """What an object header says."""

    messages: dict[int, bytes]
    attributed: bool


class _Reader:
    def __init__(self, file: BinaryFile, attribute: bytes) -> None:
        self.file = file
        self.attribute = attribute
        self.budget = _BUDGET
        self.seen: set[int] = set()

    def fail(self, problem: str) -> NoReturn:
        """Refuse the file."""
        raise CheckpointError(f"{self.file.path} {problem}")

    def damaged(self, problem: str) -> NoReturn:
        """Refuse a file that contradicts itself."""
        self.fail(f"is damaged: {problem}")

    def read(self, start: int, count: int) -> bytes:
        """Bytes of structure."""
        if start + count > self.file.size:
            self.damaged(f"{count} bytes should be at {start}, and the file has {self.file.size}")
        self.budget -= max(count, _READ_COSTS)
        if self.budget < 0:
            self.fail("has more groups, or larger ones, than weights need")
        return self.file.read(start, count)

    def part(self, start: int, signature: bytes, count: int) -> bytes:
        """Bytes of structure that begin with a signature of their own."""
        data = self.read(start, count)
        if not data.startswith(signature):
            self.damaged(f"byte {start} should begin {signature.decode()}")
        return data

    def once(self, address: int) -> None:
        """Note a part of the tree, which may be met only once."""
        if address in self.seen:
            self.damaged(f"what is at byte {address} is used twice")
        self.seen.add(address)

    def datasets(self) -> Iterator[Dataset]:
        """Walk the tree from its root."""
        head = self.read(0, 96)
        version, sizes, base = head[8], head[13:15], head[24:32]
        if not head.startswith(SIGNATURE) or version > 3:
            self.damaged("it does not begin as HDF5 files do")
        if version or sizes != b"\x08\x08" or any(base):
            self.fail(
                f"is an HDF5 file of another kind (superblock {version}) than TensorFlow writes; "
                f"open it with h5py and save it again with libver='earliest'"
            )
        if (end := int.from_bytes(head[40:48], "little")) > self.file.size:
            self.fail(f"is incomplete: it should have {end} bytes, and has {self.file.size}")
        stack = [(int.from_bytes(head[64:72], "little"), (), ())]
        found = 0
        while stack:
            address, path, attributed = stack.pop()
            item = self.object(address, path)
            if _SYMBOLS in item.messages:
                if len(path) >= MAX_DEPTH:
                    self.fail(f"has groups nested deeper than {MAX_DEPTH}")
                self.once(address)
                inner = (*attributed, item.attributed)
                members = self.members(item.messages[_SYMBOLS])
                stack += [(at, (*path, name), inner) for name, at in reversed(members)]
                continue
            found += 1
            check_tensors(found, str(self.file.path))
            info, start = self.dataset(item.messages, path)
            yield Dataset(path, info, start, attributed)

    # Groups

    def members(self, message: bytes) -> list[tuple[str, int]]:
        """A group's (name, address of the object) pairs."""
        if len(message) < 16:
            self.damaged("a group has no symbol table")
        tree, heap = struct.unpack_from("<QQ", message)
        size, names_at = struct.unpack_from("<Q8xQ", self.part(heap, b"HEAP", 32), 8)
        names = self.read(names_at, size)
        found: dict[str, int] = {}
        for node in self.leaves(tree):
            (count,) = struct.unpack_from("<6xH", self.part(node, b"SNOD", 8))
            entries = self.read(node + 8, 40 * count)
            for offset, address, kind in struct.iter_unpack("<QQI20x", entries):
                name = self.name(names, offset)
                if kind == 2:
                    self.fail(f"has a link in place of {short(name)}, which weights do not need")
                if name in found:
                    self.damaged(f"a group has two entries called {short(name)}")
                found[name] = address
        return list(found.items())

    def leaves(self, tree: int) -> list[int]:
        """Addresses of a group's nodes of entries, in order."""
        nodes, level = [tree], None
        while nodes and level != 0:
            below, height = [], 0
            for node in nodes:
                self.once(node)
                kind, height, count = struct.unpack_from("<4xBBH", self.part(node, b"TREE", 24))
                if kind or height > 8 or level not in (None, height + 1):
                    self.damaged(f"the tree of a group at byte {node} is malformed")
                pairs = self.read(node + 32, 16 * count)
                below += [child for child, _ in struct.iter_unpack("<QQ", pairs)]
            level, nodes = height, below
        return nodes

    def name(self, names: bytes, offset: int) -> str:
        """A name of a group's heap."""
        end = names.find(b"\0", offset, offset + _MAX_NAME)
        if end <= offset:
            self.damaged("a name is empty, endless or not where it should be")
        try:
            return names[offset:end].decode("utf-8")
        except UnicodeDecodeError:
            self.damaged("a name is not UTF-8")

    # Objects

    def object(self, address: int, path: tuple[str, ...]) -> _Object:
        """The messages of an object header."""
        version, total, size = struct.unpack_from("<BxH4xI", self.read(address, 16))
        if version != 1:
            self.fail(f"has an object header of version {version} at byte {address}; expected 1")
        blocks = [(address + 16, size)]
        messages: dict[int, bytes] = {}
        attributed = False
        for start, length in blocks:  # which grows on the way
            block, at = self.read(start, length), 0
            while at + 8 <= length and total:
                kind, size, flags = struct.unpack_from("<HHB", block, at)
                data = block[at + 8 : at + 8 + size]
                if len(data) != size:
                    self.damaged(f"a message at byte {start + at} is longer than its block")
                at += 8 + size
                total -= 1
                if kind in _NEWER:
                    self.fail(f"has {_NEWER[kind]} at byte {address}, which Keras does not write")
                if kind == _CONTINUED and size >= 16:
                    blocks.append(struct.unpack_from("<QQ", data))
                elif kind == _ATTRIBUTE:
                    attributed |= self.attribute_name(data).startswith(self.attribute)
                elif kind in (_DATASPACE, _DATATYPE, _LAYOUT, _SYMBOLS, _EXTERNAL, _FILTERS):
                    if flags & 2 or kind in messages:
                        self.damaged(f"{self.called(path)} is described elsewhere, or twice")
                    messages[kind] = data
        return _Object(messages, attributed)

    def attribute_name(self, data: bytes) -> bytes:
        """An attribute's name; its value is of no use."""
        version = data[0] if data else 0
        start = {1: 8, 2: 8, 3: 9}.get(version)
        if start is None or len(data) < start:
            self.damaged(f"an attribute has version {version}")
        return data[start : start + int.from_bytes(data[2:4], "little")].rstrip(b"\0")

    # Datasets

    def called(self, path: tuple[str, ...]) -> str:
        """A dataset in an error message."""
        return f"dataset {short('/'.join(path))}"

    def dataset(
        self, messages: dict[int, bytes], path: tuple[str, ...]
    ) -> tuple[TensorInfo | None, int]:
        """What a dataset is and where its numbers lie."""
        name = self.called(path)
        for kind, what in ((_EXTERNAL, "in another file"), (_FILTERS, "compressed")):
            if kind in messages:
                self.fail(f"has its {name} {what}, which TensorFlow's weights never are")
        if not {_DATASPACE, _DATATYPE, _LAYOUT} <= messages.keys():
            self.damaged(f"{name} lacks its shape, type or place")
        dtype = _DTYPES.get(_normal(messages[_DATATYPE]))
        if dtype is None:
            return None, 0
        shape = self.shape(messages[_DATASPACE], name)
        if problem := shape_problem(shape, dtype):
            self.fail(f"has its {name} damaged: it {problem}")
        info = TensorInfo(dtype, shape)
        layout = messages[_LAYOUT]
        if layout[:2] != b"\x03\x01" or len(layout) < 18:
            kinds = {0: "compact", 2: "chunked", 3: "virtual"}
            kind = kinds.get(layout[1] if len(layout) > 1 and layout[0] > 2 else -1, "old")
            self.fail(f"has its {name} in HDF5's {kind} layout; expected contiguous, as Keras has")
        start, size = struct.unpack_from("<QQ", layout, 2)
        if size != info.nbytes:
            self.damaged(f"{name} of {dtype} {shape} has {size} bytes; expected {info.nbytes}")
        if not size:
            return info, 0
        if start == _NOWHERE:
            self.fail(f"has its {name} declared but never written")
        if start + size > self.file.size:
            self.damaged(f"{name} ends at byte {start + size}, the file at {self.file.size}")
        return info, start

    def shape(self, data: bytes, name: str) -> tuple[int, ...]:
        """A dataspace's dimensions."""
        version, dims, flags = data[:3] if len(data) >= 4 else (0, 0, 0)
        start = {1: 8, 2: 4}.get(version)
        if start is None or flags & 2 or (version == 2 and data[3] > 1):
            self.damaged(f"{name} has a malformed shape")
        if len(data) < start + 8 * dims:
            self.damaged(f"{name} has a malformed shape")
        return struct.unpack_from(f"<{dims}Q", data, start)


# Types -------------------------------------------------------------------------------------------


def _normal(datatype: bytes) -> bytes:
    """A datatype message, its version and padding left out."""
    kind = datatype[0] & 15 if datatype else 15
    return bytes([kind]) + datatype[1 : {0: 12, 1: 20}.get(kind, 1)]


def _integer(size: int, signed: bool) -> bytes:
    return struct.pack("<BBHIHH", 0, 8 * signed, 0, size, 0, 8 * size)


def _float(size: int, exponent: int, mantissa: int) -> bytes:
    bits, bias = 8 * size, (1 << exponent - 1) - 1
    place = struct.pack("<HHBBBBI", 0, bits, mantissa, exponent, 0, mantissa, bias)
    return struct.pack("<BBBBI", 1, 0x20, bits - 1, 0, size) + place


_DTYPES: dict[bytes, np.dtype] = {
    _float(2, 5, 10): np.dtype(np.float16),
    _float(2, 8, 7): np.dtype(ml_dtypes.bfloat16),
    _float(4, 8, 23): np.dtype(np.float32),
    _float(8, 11, 52): np.dtype(np.float64),
    **{_integer(n, True): np.dtype(f"<i{n}") for n in (1, 2, 4, 8)},
    **{_integer(n, False): np.dtype(f"<u{n}") for n in (1, 2, 4, 8)},
}
