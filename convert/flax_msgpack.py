"""Flax checkpoints (`flax_model.msgpack`), read without Flax or msgpack, under PyTorch's names.

flax.serialization writes one MessagePack value: nested maps whose leaves are extension types, an
array being type 1 and again MessagePack (shape, dtype's name, bytes). `_Scanner` walks the whole
structure, checks each size against the file and skips the numbers, so that opening reads names
only. The Transformers library's Flax classes are its PyTorch classes with other names for the last
part and with every kernel transposed, GPT-2's included; `torch_name` undoes that, so the families'
rules need not know.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from jax_encdec.convert.tensor_source import (
    MAX_DIMS,
    BinaryFile,
    FileTensors,
    TensorInfo,
    as_tensor,
    check_tensors,
    is_count,
    shape_problem,
    short,
)
from jax_encdec.errors import CheckpointError

ARRAY, COMPLEX, SCALAR = 1, 2, 3
"""Extension types of flax.serialization."""
CHUNKED = "__msgpack_chunked_array__"
"""Key of a map that stands for an array beyond `CHUNK_BYTES`, cut into flat pieces."""
CHUNK_BYTES = 1 << 30
MAX_DEPTH = 64
MAX_VALUES = 200_000
"""Of the whole file, maps and what is in them; a large model has a few thousand."""
_MAX_NAMES = 1 << 24
"""Characters of all names together."""
_WINDOW = 1 << 12

DTYPES: dict[str, np.dtype] = {
    np.dtype(kind).name: np.dtype(kind)
    for kind in (
        *(np.float64, np.float32, np.float16, np.complex64, np.complex128, np.bool_),
        *(np.int64, np.int32, np.int16, np.int8, np.uint64, np.uint32, np.uint16, np.uint8),
        *(ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e4m3fnuz),
        *(ml_dtypes.float8_e5m2, ml_dtypes.float8_e5m2fnuz, ml_dtypes.float8_e8m0fnu),
    )
}
"""By the names that NumPy gives them, which are those of the file."""


def is_map(head: bytes) -> bool:
    """Whether a file that begins so may be MessagePack's map of something."""
    return head[:1] in (b"\xde", b"\xdf") or b"\x81" <= head[:1] <= b"\x8f"


def torch_name(name: str) -> str:
    """PyTorch's name of a leaf `a/b/kernel`: `a.b.weight`."""
    *outer, last = name.split("/")
    if last in ("kernel", "scale", "embedding"):
        last = "weight"
    return ".".join((*outer, last))


def torch_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The order in which PyTorch has the axes of a Flax (or TensorFlow) kernel of this shape.

    `(in, out)` becomes `(out, in)`, a convolution's outputs and inputs come before its window.
    """
    return (3, 2, 0, 1) if len(shape) == 4 else tuple(range(len(shape)))[::-1]


def axes_back(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The order in which Flax has the axes of a PyTorch kernel of this shape."""
    return (2, 3, 1, 0) if len(shape) == 4 else tuple(range(len(shape)))[::-1]


@dataclass(frozen=True, slots=True)
class Array:
    """An array of the file: what it is, and where its bytes lie, in one or several pieces."""

    info: TensorInfo
    pieces: tuple[tuple[int, int], ...]  # (first byte, bytes)


@dataclass(frozen=True, slots=True)
class _Other:
    """A value that is no array."""

    kind: str


class FlaxTensors(FileTensors):
    """The parameters of one msgpack file, named and laid out as PyTorch has them.

    A tree that wraps them in `params`, as training states do, is unwrapped.
    """

    def __init__(self, file: BinaryFile) -> None:
        self.path = file.path
        self._file = file
        tree = _Scanner(file).tree()
        self._ignored: dict[str, str] = {}
        while isinstance(inner := tree.get("params"), dict):
            self._ignored |= {name: _kind(tree[name]) for name in tree if name != "params"}
            tree = inner
        self._tensors: dict[str, tuple[Array, bool]] = {}
        self._length = 0
        self._collect(tree, "")
        if not self._tensors:
            raise CheckpointError(f"{self.path} holds no arrays; expected a tree of parameters")

    def _collect(self, tree: dict[str, Any], prefix: str) -> None:
        for key, node in tree.items():
            name = prefix + key
            if isinstance(node, dict):
                self._collect(node, f"{name}/")
                continue
            self._length += len(name)
            if self._length > _MAX_NAMES:
                raise CheckpointError(
                    f"{self.path} has names of more than {_MAX_NAMES} characters in all"
                )
            if not isinstance(node, Array):
                self._ignored[name] = _kind(node)
                continue
            renamed = torch_name(name)
            if renamed in self._tensors:
                raise CheckpointError(f"{self.path} has two arrays for {short(renamed)}")
            self._tensors[renamed] = node, key == "kernel"

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of a tensor, as PyTorch has it."""
        array, kernel = self._entry_of(name)
        if not kernel:
            return array.info
        shape = array.info.shape
        return TensorInfo(array.info.dtype, tuple(shape[i] for i in torch_axes(shape)))

    def __getitem__(self, name: str) -> np.ndarray:
        self.info(name)
        array, kernel = self._tensors[name]
        if len(array.pieces) == 1:
            data = self._file.read_array(*array.pieces[0])
        else:
            data, end = np.empty(array.info.nbytes, np.uint8), 0
            for start, size in array.pieces:
                data[end : end + size] = self._file.read_array(start, size)
                end += size
        tensor = as_tensor(data, array.info)
        if kernel:
            tensor = tensor.transpose(torch_axes(tensor.shape)).copy(order="C")
        return tensor


def _kind(node: Any) -> str:
    return node.kind if isinstance(node, _Other) else type(node).__name__.lower()


# The structure -----------------------------------------------------------------------------------

_FIXED = {0xCA: 4, 0xCB: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}  # floats, signed integers


class _Scanner:
    """A position in a file of MessagePack, and a window of its bytes."""

    def __init__(self, file: BinaryFile) -> None:
        self.file = file
        self.at = 0
        self.values = self.arrays = 0
        self._window, self._start = b"", 0

    def fail(self, problem: str) -> NoReturn:
        """Refuse the file."""
        raise CheckpointError(f"{self.file.path} is no Flax checkpoint, or damaged: {problem}")

    def tree(self) -> dict[str, Any]:
        """The file's one value, which must be a map and all of the file."""
        tree = self.value(0)
        if self.at != self.file.size:
            self.fail(f"it goes on after its end at byte {self.at}")
        if not isinstance(tree, dict):
            self.fail(f"it holds {_kind(tree)}; expected a map of parameters")
        return tree

    def take(self, count: int) -> bytes:
        """The next bytes, few of them."""
        begin = self.at - self._start
        if begin < 0 or begin + count > len(self._window):
            most = self.file.size - self.at
            if count > most:
                self.fail(f"it ends too early, at byte {self.file.size}")
            self._window = self.file.read(self.at, min(max(count, _WINDOW), most))
            self._start, begin = self.at, 0
        self.at += count
        return self._window[begin : begin + count]

    def number(self, count: int) -> int:
        """The next bytes as an integer from zero up."""
        return int.from_bytes(self.take(count), "big")

    def skip(self, count: int) -> None:
        """Pass over bytes that the file has."""
        if count > self.file.size - self.at:
            self.fail(f"byte {self.at} announces {count} bytes, and the file ends before")
        self.at += count

    def value(self, depth: int) -> Any:
        """The next value: a dict, an `Array`, an int, or `_Other`."""
        self.values += 1
        if self.values > MAX_VALUES:
            self.fail(f"it has more than {MAX_VALUES} values")
        if depth > MAX_DEPTH:
            self.fail(f"it is nested deeper than {MAX_DEPTH}")
        code = self.number(1)
        if code < 0x80:
            return code
        if code < 0x90 or code in (0xDE, 0xDF):
            return self.map(code & 15 if code < 0x90 else self.number(2 << code - 0xDE), depth)
        if code < 0xA0 or code in (0xDC, 0xDD):
            count = self.counted(code & 15 if code < 0xA0 else self.number(2 << code - 0xDC))
            return {str(i): self.value(depth + 1) for i in range(count)}
        if 0xCC <= code <= 0xCF:
            return self.number(1 << code - 0xCC)
        if code >= 0xE0:
            return _Other("int")
        if code in (0xC0, 0xC2, 0xC3):
            return _Other("NoneType" if code == 0xC0 else "bool")
        if code in _FIXED:
            self.skip(_FIXED[code])
            return _Other("float" if code < 0xCC else "int")
        if 0xC7 <= code <= 0xC9:
            return self.extension(self.number(1 << code - 0xC7))
        if 0xD4 <= code <= 0xD8:
            return self.extension(1 << code - 0xD4)
        if (size := self.length(code)) is None:
            self.fail(f"byte {self.at - 1} is 0x{code:02x}, which begins nothing")
        self.skip(size)
        return _Other("bytes" if 0xC4 <= code <= 0xC6 else "str")

    def length(self, code: int) -> int | None:
        """Bytes of a text or of binary data that begins with `code`; None if neither does."""
        if 0xA0 <= code < 0xC0:
            return code & 31
        for first in (0xC4, 0xD9):
            if first <= code <= first + 2:
                return self.number(1 << code - first)
        return None

    def counted(self, count: int) -> int:
        """A number of values, which take a byte each at least."""
        if count > min(self.file.size - self.at, MAX_VALUES):
            self.fail(f"byte {self.at} announces {count} values")
        return count

    def text(self, what: str) -> str:
        """The next value, which must be a short text."""
        size = self.length(self.number(1))
        if size is None or size > 1000:
            self.fail(f"byte {self.at} should begin {what}")
        try:
            return self.take(size).decode("utf-8")
        except UnicodeDecodeError:
            self.fail(f"{what} before byte {self.at} is not UTF-8")

    def map(self, count: int, depth: int) -> dict[str, Any] | Array:
        """A map's items, or the array that it stands for."""
        found: dict[str, Any] = {}
        for _ in range(self.counted(count)):
            name = self.text("a name")
            if name in found:
                self.fail(f"it names {short(name)} twice")
            found[name] = self.value(depth + 1)
        return self.joined(found) if CHUNKED in found else found

    def extension(self, size: int) -> Array | _Other:
        """An extension type of `size` bytes."""
        kind = self.number(1)
        end = self.at + size
        if end > self.file.size:
            self.fail(f"byte {self.at} announces {size} bytes, and the file ends before")
        if kind == COMPLEX:
            self.skip(size)
            return _Other("complex")
        if kind not in (ARRAY, SCALAR):
            self.fail(f"byte {self.at} begins extension type {kind}, which Flax has not")
        self.arrays += 1
        check_tensors(self.arrays, str(self.file.path))
        array = self.array()
        if self.at != end:
            self.fail(f"an array ends at byte {self.at}; expected {end}")
        return array

    def array(self) -> Array:
        """(shape, dtype's name, bytes)."""
        if self.number(1) != 0x93:
            self.fail(f"byte {self.at - 1} should begin the three parts of an array")
        code = self.number(1)
        dims = (
            code & 15 if 0x90 <= code < 0xA0 else self.number(2) if code == 0xDC else MAX_DIMS + 1
        )
        if dims > MAX_DIMS:
            self.fail(f"the array at byte {self.at} has a malformed shape")
        shape = tuple(self.value(MAX_DEPTH) for _ in range(dims))
        name = self.text("the name of a dtype")
        size = self.length(self.number(1))
        info = self.info(shape, name)
        if size is None or size != info.nbytes:
            self.fail(f"an array {name} {info.shape} has {size} bytes; expected {info.nbytes}")
        start = self.at
        self.skip(size)
        return Array(info, ((start, size),))

    def info(self, shape: tuple[Any, ...], dtype: str) -> TensorInfo:
        """A checked shape and dtype."""
        if dtype not in DTYPES:
            self.fail(f"it has an array of dtype {short(dtype)}")
        if not all(map(is_count, shape)):
            self.fail("it has an array with a malformed shape")
        if problem := shape_problem(shape, DTYPES[dtype]):
            self.fail(f"an array of dtype {dtype} {problem}")
        return TensorInfo(DTYPES[dtype], shape)

    def joined(self, chunked: dict[str, Any]) -> Array:
        """A large array, from the map of its shape and flat pieces."""
        shape, chunks = (self.sequence(chunked.get(name)) for name in ("shape", "chunks"))
        if not chunks or not all(isinstance(chunk, Array) for chunk in chunks):
            self.fail("it has a chunked array without chunks")
        dtype = chunks[0].info.dtype
        info = self.info(tuple(shape), dtype.name)
        if any(c.info.dtype != dtype or len(c.info.shape) != 1 for c in chunks) or (
            sum(c.info.nbytes for c in chunks) != info.nbytes
        ):
            self.fail(f"the chunks of an array {dtype.name} {info.shape} do not make it up")
        return Array(info, tuple(piece for chunk in chunks for piece in chunk.pieces))

    def sequence(self, node: Any) -> list[Any]:
        """What Flax made of a tuple: a map with keys "0", "1" and so on."""
        if not isinstance(node, dict) or any(str(i) not in node for i in range(len(node))):
            self.fail("it has a malformed chunked array")
        return [node[str(i)] for i in range(len(node))]
