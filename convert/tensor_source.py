"""What every weight file looks like to the rest of the library: names, infos, arrays on demand.

A `TensorSource` is a read-only mapping from tensor names to NumPy arrays. Opening one reads the
file's table of contents only; each subscription reads one tensor. The formats (safetensors_io,
torch_zip) and sharded folders (readers) implement it; all of them read through `BinaryFile`.
"""

from __future__ import annotations

import json
import math
import os
import stat
import threading
from abc import abstractmethod
from collections.abc import Hashable, Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jax_encdec.errors import CheckpointError, nearest

ALIGNMENT = 64
"""Bytes; from such an address on, a CPU device takes an array without copying it."""
MAX_DIMS = 64
"""Dimensions that a NumPy array can have."""
MAX_TENSORS = 30_000
"""Tensors in a file: several times the most that are published. All limits are here so that
no file takes long, or much memory, to be refused."""
_MAX_VALUES = 500_000
"""Values in a JSON text, about; a tensor's entry has ten."""


class TensorInfo(NamedTuple):
    """What a tensor is, without its numbers."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers, densely packed."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorSource(Mapping[str, np.ndarray]):
    """Named tensors of a file or of a folder of shards, read one at a time.

    Names iterate in the file's order. `source[name]` returns a C-contiguous, writable array in
    memory of its own: nothing is cached, so read each tensor once. `name in source`, `len` and
    `info` read no numbers.

    Attributes:
        path: what the user named: a file, an index or a folder.
        metadata: a safetensors file's own free text; empty for everything else.
    """

    path: Path
    metadata: Mapping[str, str] = {}

    @property
    def mapped(self) -> bool:
        """Whether a `view` reads only what is taken of it; else it is the whole tensor, read."""
        return False

    def view(self, name: str) -> np.ndarray:
        """A tensor to take parts of, read-only; where `mapped`, numbers are read when touched."""
        return self[name]

    @abstractmethod
    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of a tensor.

        Raises:
            KeyError: no tensor has this name.
            CheckpointError: the shard that should hold it is missing or damaged.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of open files; a later read opens them again."""

    def aliases(self) -> dict[str, str]:
        """Tied tensors: name -> the first name of the very same storage, offset, shape, strides.

        PyTorch's files keep ties; safetensors files have none.
        """
        first: dict[Hashable, str] = {}
        found = {}
        for name in self:
            identity = self._identity(name)
            if identity is not None and first.setdefault(identity, name) != name:
                found[name] = first[identity]
        return found

    def ignored(self) -> dict[str, str]:
        """Entries of the file that are not tensors: name -> what it is."""
        return {}

    def _identity(self, name: str) -> Hashable | None:
        """Equal for names that share their memory; None where a format knows no sharing."""
        return None

    def _unknown(self, name: object) -> KeyError:
        return KeyError(f"{self.path} has no tensor {name!r}{nearest(str(name), self)}")

    @abstractmethod
    def __contains__(self, name: object) -> bool: ...

    # Mapping would compare by reading every tensor.
    __eq__ = object.__eq__
    __hash__ = object.__hash__  # type: ignore[assignment]

    def __enter__(self) -> TensorSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {str(self.path)!r}: {len(self)} tensors>"


class FileTensors(TensorSource):
    """The tensors of one file, of which the subclass keeps an entry each in `_tensors`."""

    _file: BinaryFile
    _tensors: dict[str, Any]
    _ignored: dict[str, str]

    def ignored(self) -> dict[str, str]:
        """Entries of the file that are no tensors of numbers: name -> kind."""
        return dict(self._ignored)

    def _entry_of(self, name: str) -> Any:
        if name not in self._tensors:
            raise self._unknown(name)
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def close(self) -> None:
        """Let go of the file; a later read opens it again."""
        self._file.close()


class BinaryFile:
    """A regular file read by position.

    `close` may be followed by further reads: the file is opened again, and refused if it is no
    longer the same, so that a table of contents is never applied to other bytes. Threads may share
    one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._file: FileIO | None = None
        self._seen: tuple[int, ...] | None = None
        with self._lock:
            self._opened()

    def _opened(self) -> FileIO:
        if self._file is not None:
            return self._file
        try:
            # Asked first: opening a pipe would wait for its writer.
            if not stat.S_ISREG(os.stat(self.path).st_mode):
                raise CheckpointError(f"{self.path} is not a file; expected a weight file")
            file = FileIO(self.path, "r")
        except (OSError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{self.path} cannot be opened: {reason(error)}") from None
        status = os.fstat(file.fileno())
        seen = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        if self._seen not in (None, seen):
            file.close()
            raise CheckpointError(f"{self.path} was changed while it was being read; open it again")
        self._file, self._seen, self.size = file, seen, status.st_size
        return file

    def read(self, offset: int, count: int) -> bytes:
        """Return exactly `count` bytes from `offset`.

        Raises:
            CheckpointError: the file ends before, which is found out before memory is taken.
        """
        return self.read_array(offset, count).tobytes()

    def read_array(self, offset: int, count: int) -> np.ndarray:
        """Like `read`, as uint8 `[count]` in new memory."""
        if offset < 0 or count < 0 or offset + count > self.size:
            raise CheckpointError(
                f"{self.path} ends too early: expected {offset + count} bytes, got {self.size}"
            )
        try:
            array = aligned((count,), np.uint8)
        except MemoryError:
            raise CheckpointError(
                f"{self.path}: {count} bytes for one tensor do not fit into memory"
            ) from None
        view = array.data
        with self._lock:
            try:
                file = self._opened()
                file.seek(offset)
                while len(view):
                    got = file.readinto(view)
                    if not got:
                        raise CheckpointError(f"{self.path} was cut short while it was being read")
                    view = view[got:]
            except OSError as error:
                raise CheckpointError(f"{self.path} cannot be read: {reason(error)}") from None
        return array

    def map_array(self, offset: int, count: int) -> np.ndarray:
        """Like `read_array`, read-only, and read from the file only where it is touched."""
        if not 0 <= offset <= offset + count <= self.size or not count:
            return self.read_array(offset, count)
        with self._lock:
            file = self._opened()
            try:
                return np.memmap(file, np.uint8, "r", offset, (count,))
            except (OSError, ValueError):
                pass  # some file systems cannot
        return self.read_array(offset, count)

    def close(self) -> None:
        """Let go of the file until the next read."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None


def aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array without values, which a CPU device takes without a copy."""
    dtype = np.dtype(dtype)
    count = math.prod(shape) * dtype.itemsize
    memory = np.empty(count + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + count].view(dtype).reshape(shape)


def as_tensor(data: np.ndarray, info: TensorInfo) -> np.ndarray:
    """Bytes (uint8 `[nbytes]`, owned by the caller) as the tensor that they are."""
    if info.dtype == np.bool_:
        np.minimum(data, 1, out=data)  # a file may hold any byte; NumPy expects 0 or 1
    return data.view(info.dtype).reshape(info.shape)


def shape_problem(shape: tuple[int, ...], dtype: np.dtype) -> str | None:
    """Why NumPy could not hold such an array, whatever the file's size; None if it could."""
    if len(shape) > MAX_DIMS:
        return f"has {len(shape)} dimensions; at most {MAX_DIMS} are supported"
    # Zeros do not help: NumPy multiplies the others all the same.
    if math.prod(max(n, 1) for n in shape) * dtype.itemsize >= 2**63:
        return f"has an impossible shape {short(shape)}"
    return None


def strict_json(data: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object, refusing duplicate keys, text that is not UTF-8 and endless lists.

    Raises:
        CheckpointError: `data` is anything else.
    """
    # Every value follows one of these; they may stand inside text as well, but hardly so often.
    if sum(map(data.count, (b",", b"{", b"["))) > _MAX_VALUES:
        raise CheckpointError(f"{where} holds more than {_MAX_VALUES} values")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(k for k, _ in pairs if k in seen or seen.add(k))
            raise CheckpointError(f"{where} names {short(twice)} twice")
        return result

    try:
        text = data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not valid JSON: {short(str(error))}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} must be a JSON object; got {type(value).__name__}")
    return value


def check_tensors(count: int, where: str) -> None:
    """Refuse a file of more tensors than models have.

    Raises:
        CheckpointError: there are more than `MAX_TENSORS`.
    """
    if count > MAX_TENSORS:
        raise CheckpointError(f"{where} names {count} tensors; at most {MAX_TENSORS} are read")


def is_count(value: object) -> bool:
    """Whether this is an integer from zero up (True is not)."""
    return type(value) is int and value >= 0


def reason(error: BaseException) -> str:
    """The part of an operating system's error that people can read."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def short(value: object, limit: int = 80) -> str:
    """`repr` for an error message: of bounded length and on one line."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def names_of(names: Iterator[str] | list[str] | tuple[str, ...], limit: int = 8) -> str:
    """Comma-separated names, the first few of them."""
    listed = list(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more
