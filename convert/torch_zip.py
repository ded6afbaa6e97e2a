"""PyTorch checkpoints (`.bin`, `.pt`), read without PyTorch.

Since 1.6 `torch.save` writes a zip archive: `data.pkl` describes the tensors, `data/0`, `data/1`...
hold their storages, uncompressed. `open_torch_zip` finds those; `TorchTensors`, which any container
of a pickle and storages can use, picks the state dict and reads views of storages. Like PyTorch, it
does not look at the archive's checksums.
"""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import numpy as np

from jax_encdec.convert.pickle_reader import MAX_BYTES, unpickle
from jax_encdec.convert.tensor_source import (
    MAX_TENSORS,
    BinaryFile,
    FileTensors,
    TensorInfo,
    as_tensor,
    check_tensors,
    names_of,
    shape_problem,
    short,
)
from jax_encdec.convert.torch_names import Global, Opaque, Tensor
from jax_encdec.errors import CheckpointError

_MAX_DIRECTORY = 2_500_000
"""Bytes of a zip archive's directory, about 64 for an entry."""
MAX_EXPANDED = 1 << 26
"""Bytes of a tensor larger than its storage (`expand`) that are always granted; a file may
moreover ask for as many as it has itself. More is taken for an attack."""


class TorchTensors(FileTensors):
    """The state dict of a pickle, over storages that lie elsewhere in its file.

    Args:
        file: what the storages are read from.
        root: the pickle's value.
        storages: key -> (first byte, bytes) of each storage.

    Raises:
        CheckpointError: there is no state dict, or a tensor lies outside its storage.
    """

    def __init__(
        self, file: BinaryFile, root: Any, storages: Mapping[str, tuple[int, int]]
    ) -> None:
        self.path = file.path
        self._file = file
        self._storages = storages
        state, self._ignored = _state_dict(root, str(self.path))
        check_tensors(len(state), str(self.path))
        self._tensors = {name: self._checked(name, tensor) for name, tensor in state.items()}

    def _checked(self, name: str, tensor: Tensor | Opaque) -> tuple[Tensor, TensorInfo]:
        where = f"{self.path}: tensor {short(name)}"
        if isinstance(tensor, Opaque):
            raise CheckpointError(f"{where} {tensor.problem}")
        storage, size = tensor.storage, tensor.dtype.itemsize
        if storage.key not in self._storages:
            raise CheckpointError(f"{where} needs storage {short(storage.key)}, which is not there")
        have = self._storages[storage.key][1]
        claimed = storage.numel * (storage.dtype.itemsize if storage.dtype else 1)
        if claimed > have:
            raise CheckpointError(
                f"{where} needs a storage of {short(claimed)} bytes; storage {short(storage.key)} "
                f"has {have}"
            )
        if problem := shape_problem(tensor.shape, tensor.dtype):
            raise CheckpointError(f"{where} {problem}")
        info = TensorInfo(tensor.dtype, tensor.shape)
        if info.nbytes and (tensor.offset + _span(tensor)) * size > claimed:
            raise CheckpointError(
                f"{where} reaches beyond its storage: shape {tensor.shape}, strides "
                f"{short(tensor.strides)} and offset {short(tensor.offset)} in {claimed} bytes"
            )
        if info.nbytes > max(claimed, self._file.size, MAX_EXPANDED):
            raise CheckpointError(
                f"{where} is {info.nbytes} bytes expanded from a storage of {claimed}; this was "
                f"refused, for it may be meant to exhaust the memory"
            )
        return tensor, info

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of a tensor."""
        return self._entry_of(name)[1]

    def __getitem__(self, name: str) -> np.ndarray:
        # A view with gaps is copied, so that it does not hold on to what lies between.
        tensor = self._strided(name, self._file.read_array)
        return tensor if tensor.flags.c_contiguous else tensor.copy(order="C")

    @property
    def mapped(self) -> bool:
        """True: storages lie in the file as they are."""
        return True

    def view(self, name: str) -> np.ndarray:
        """A tensor, read-only, whose numbers are read when touched."""
        if self.info(name).dtype == np.bool_:
            return self[name]
        return self._strided(name, self._file.map_array)

    def _strided(self, name: str, read: Callable[[int, int], np.ndarray]) -> np.ndarray:
        info = self.info(name)
        tensor = self._tensors[name][0]
        size = info.dtype.itemsize
        # Of the storage, only what the view spans is read: its size was checked against the file.
        span = _span(tensor) if info.nbytes else 0
        start = self._storages[tensor.storage.key][0] + tensor.offset * size if span else 0
        flat = as_tensor(read(start, span * size), TensorInfo(info.dtype, (span,)))
        if _dense(tensor):
            return flat.reshape(info.shape)
        strides = [0 if n == 1 else s * size for n, s in _axes(tensor)]
        # np.ndarray checks once more that the view stays within its buffer.
        return np.ndarray(info.shape, info.dtype, flat, 0, tuple(strides))

    def _identity(self, name: str) -> Hashable:
        tensor = self._tensors[name][0]
        return tensor.storage.key, tensor.dtype, tensor.offset, tensor.shape, tensor.strides


def _axes(tensor: Tensor) -> zip[tuple[int, int]]:
    return zip(tensor.shape, tensor.strides, strict=True)


def _span(tensor: Tensor) -> int:
    """Elements of storage from a non-empty view's first to its last, both included."""
    return 1 + sum((n - 1) * s for n, s in _axes(tensor))


def _dense(tensor: Tensor) -> bool:
    """Whether a view's elements lie in the storage in order and without gaps."""
    if not math.prod(tensor.shape):
        return True
    expected = 1
    for n, s in reversed(list(_axes(tensor))):
        if n != 1 and s != expected:
            return False
        expected *= n
    return True


def _state_dict(root: Any, where: str) -> tuple[dict[str, Tensor | Opaque], dict[str, str]]:
    """Find the tensors: on top, or in the one nested dict that has some."""
    if not isinstance(root, dict):
        raise CheckpointError(f"{where} holds a {type(root).__name__}; expected a state dict")
    prefix, state = "", root
    if not any(map(_is_tensor, root.values())):
        nested = {
            key: value
            for key, value in root.items()
            if isinstance(value, dict) and any(map(_is_tensor, value.values()))
        }
        if len(nested) != 1:
            found = f"{len(nested)} of them: {names_of(map(short, nested))}" if nested else "none"
            raise CheckpointError(f"{where} must hold tensors or one state dict; found {found}")
        [(key, state)] = nested.items()
        prefix = f"{key}."
    tensors = {name: value for name, value in state.items() if _is_tensor(value)}
    ignored = {n: _kind(v) for n, v in root.items() if v is not state and not _is_tensor(v)}
    if state is not root:
        ignored |= {f"{prefix}{n}": _kind(v) for n, v in state.items() if not _is_tensor(v)}
    return tensors, ignored


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, Opaque) and value.problem is not None)


def _kind(value: Any) -> str:
    if isinstance(value, Global):
        return value.name
    return value.kind if isinstance(value, Opaque) else type(value).__name__


# The zip archive ---------------------------------------------------------------------------------


def open_torch_zip(file: BinaryFile) -> TorchTensors:
    """Open what `torch.save` writes since 1.6.

    Raises:
        CheckpointError: the archive or its pickle is damaged, or no state dict.
    """
    where = str(file.path)
    places = _entries(file)
    pickles = [name for name in places if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(pickles) != 1:
        raise CheckpointError(
            f"{where} is a zip archive but no PyTorch checkpoint: expected one data.pkl in it, "
            f"found {len(pickles)} among {names_of(map(short, places))}"
        )
    top = pickles[0].removesuffix("data.pkl")
    if f"{top}constants.pkl" in places:
        raise CheckpointError(
            f"{where} is a TorchScript program, not a state dict; save model.state_dict() instead"
        )
    order = f"{top}byteorder"
    if order in places and (got := _content(file, places[order], order)) != b"little":
        raise CheckpointError(
            f"{where} was saved with byte order {short(got.decode('latin-1'))}; "
            f"only little-endian files are supported"
        )
    pickled = _content(file, places[pickles[0]], pickles[0])
    root, end = unpickle(pickled, where)
    if end != len(pickled):
        raise CheckpointError(
            f"{where} is damaged: its {short(pickles[0])} goes on after the pickle's end"
        )
    prefix = f"{top}data/"
    storages = {n.removeprefix(prefix): at for n, at in places.items() if n.startswith(prefix)}
    return TorchTensors(file, root, storages)


def _content(file: BinaryFile, place: tuple[int, int], name: str) -> bytes:
    start, size = place
    if size > MAX_BYTES:
        raise CheckpointError(
            f"{file.path}: its {short(name)} has {size} bytes; at most {MAX_BYTES} are read"
        )
    return file.read(start, size)


class _Directory:
    """A file as `zipfile` reads one: it asks for the end, then for the whole directory at once."""

    def __init__(self, file: BinaryFile) -> None:
        self._file, self._position = file, 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = offset + (self._file.size if whence == 2 else 0)
        if self._position < 0:
            raise OSError("it ends too early")
        return self._position

    def read(self, count: int = -1) -> bytes:
        rest = max(0, self._file.size - self._position)
        count = rest if count < 0 else min(count, rest)
        if count > _MAX_DIRECTORY:
            raise CheckpointError(
                f"{self._file.path} has a directory of {count} bytes; at most {_MAX_DIRECTORY} are "
                f"read, enough for {MAX_TENSORS} tensors"
            )
        data = self._file.read(self._position, count)
        self._position += count
        return data


def _entries(file: BinaryFile) -> dict[str, tuple[int, int]]:
    """Where each entry's bytes lie: name -> (start, size), checked against the file."""
    where = str(file.path)
    try:
        with zipfile.ZipFile(_Directory(file)) as archive:  # type: ignore[arg-type]
            listed, end_of_data = archive.infolist(), archive.start_dir
    except CheckpointError:
        raise
    except Exception as error:
        # Damage shows in many ways; zipfile does not promise which exceptions it raises.
        raise CheckpointError(
            f"{where} is damaged or incomplete: it starts like a zip archive, but "
            f"{short(str(error) or type(error).__name__)}"
        ) from None
    places: dict[str, tuple[int, int]] = {}
    end = 0
    for entry in sorted(listed, key=lambda entry: entry.header_offset):
        name, offset, size = entry.filename, entry.header_offset, entry.file_size
        if name in places:
            raise CheckpointError(f"{where} is damaged: two entries are called {short(name)}")
        if entry.flag_bits & 0x1:
            raise CheckpointError(f"{where}: its entry {short(name)} is encrypted")
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != size:
            raise CheckpointError(
                f"{where}: its entry {short(name)} is compressed, which torch.save never does"
            )
        if not places and offset:
            raise CheckpointError(f"{where} is damaged: it starts with {offset} bytes of no entry")
        if offset < end or offset + 30 > end_of_data:
            raise CheckpointError(f"{where} is damaged: its entry {short(name)} overlaps others")
        # The name and extra field before the data need not be as long as in the directory.
        header = file.read(offset, 30)
        start = offset + 30 + int.from_bytes(header[26:28], "little")
        start += int.from_bytes(header[28:30], "little")
        end = start + size
        if header[:4] != b"PK\x03\x04" or end > end_of_data:
            raise CheckpointError(
                f"{where} is damaged or incomplete: its entry {short(name)} of {size} bytes is "
                f"not where the archive's directory says"
            )
        places[name] = (start, size)
    return places
