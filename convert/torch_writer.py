"""Writing `pytorch_model.bin`, without PyTorch: what `torch.save` of a state dict writes today.

A zip archive of stored entries: a pickle that describes the tensors, then the bytes of each,
aligned to 64. `torch.load(weights_only=True)` opens it, and with `mmap=True` without copying. Sizes
are known before any number, and a tensor's checksum before it is written, so that the file is
written front to back.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from jax_encdec.convert.tensor_source import TensorInfo
from jax_encdec.convert.torch_names import STORAGES
from jax_encdec.convert.weight_writer import Entry, Layout, Sink, fetched, write_weights

_CLASSES = {np.dtype(dtype): name for name, dtype in STORAGES.items()}
_ALIGNMENT = 64
_TOP = "archive"
_ELSEWHERE = 0xFFFFFFFF
"""A size or place that is in a field of ZIP64, as those from `_LARGE` on are."""
_LARGE = _ELSEWHERE


def write_torch(
    folder: str | Path,
    entries: Iterable[Entry],
    *,
    max_shard_bytes: int = 5 * 10**9,
    progress: Callable[[str], None] | None = None,
) -> list[Path]:
    """Save tensors as `pytorch_model.bin`, or as numbered shards and an index; see `write_weights`.

    Raises:
        InputError, CheckpointError: as `write_weights`.
    """
    return write_weights(
        folder, entries, LAYOUT, max_shard_bytes=max_shard_bytes, progress=progress
    )


def _write_file(sink: Sink, entries: Sequence[Entry]) -> None:
    archive = _Archive(sink)
    archive.add(f"{_TOP}/data.pkl", _pickle([(name, info) for name, info, _ in entries]))
    archive.add(f"{_TOP}/byteorder", b"little")
    for number, entry in enumerate(entries):
        archive.add(f"{_TOP}/data/{number}", fetched(entry), entry[0])
    archive.add(f"{_TOP}/version", b"3\n")
    archive.close()


LAYOUT = Layout(
    kind="a PyTorch checkpoint",
    single="pytorch_model.bin",
    index="pytorch_model.bin.index.json",
    dtypes=frozenset(_CLASSES),
    write=_write_file,
)


# The pickle --------------------------------------------------------------------------------------


def _pickle(tensors: Sequence[tuple[str, TensorInfo]]) -> bytes:
    """A dict of names to dense tensors, tensor `n` being all of storage `n`."""
    items = b"".join(_text(name) + _tensor(i, info) for i, (name, info) in enumerate(tensors))
    return b"\x80\x02}(" + items + b"u."


def _tensor(number: int, info: TensorInfo) -> bytes:
    """A call of `_rebuild_tensor_v2(storage, offset, shape, strides, False, OrderedDict())`."""
    count = int(np.prod(info.shape, dtype=np.int64))
    storage = b"".join(
        (
            b"(" + _text("storage"),
            b"ctorch\n" + _CLASSES[info.dtype].encode() + b"\n",
            _text(str(number)) + _text("cpu") + _integer(count) + b"tQ",
        )
    )
    strides, step = [], 1
    for n in reversed(info.shape):
        strides.append(step)
        step *= max(n, 1)
    hooks = b"\x89ccollections\nOrderedDict\n)R"
    view = storage + _integer(0) + _tuple(info.shape) + _tuple(strides[::-1]) + hooks
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + view + b"tR"


def _text(text: str) -> bytes:
    data = text.encode("utf-8")
    return b"X" + struct.pack("<I", len(data)) + data


def _integer(number: int) -> bytes:
    if number < 1 << 8:
        return b"K" + struct.pack("<B", number)
    if number < 1 << 31:
        return b"J" + struct.pack("<i", number)
    return b"\x8a\x09" + number.to_bytes(9, "little")


def _tuple(numbers: Sequence[int]) -> bytes:
    return b"(" + b"".join(map(_integer, numbers)) + b"t"


# The archive -------------------------------------------------------------------------------------


class _Archive:
    """A zip archive of stored entries, written front to back."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._directory: list[bytes] = []

    def add(self, name: str, data: bytes | np.ndarray, tensor: str | None = None) -> None:
        """Write an entry; `tensor` is whose bytes these are."""
        start, size = self._sink.position, len(data)
        crc = zlib.crc32(data if isinstance(data, bytes) else data.data)
        path = name.encode()
        wide = struct.pack("<HHQQ", 1, 16, size, size) if size >= _LARGE else b""
        # A field of its own, as PyTorch has it, moves the data to where it is aligned.
        pad = -(start + 30 + len(path) + len(wide) + 4) % _ALIGNMENT
        extra = wide + struct.pack("<2sH", b"FB", pad) + b"Z" * pad
        common = _common(crc, size, len(path))
        self._sink.write(b"PK\x03\x04" + common + struct.pack("<H", len(extra)) + path + extra)
        if isinstance(data, bytes):
            self._sink.write(data)
        else:
            self._sink.write_fetched(str(tensor), data)
        fields = [n for n in (size, size, start) if n >= _LARGE]
        wide = struct.pack(f"<HH{len(fields)}Q", 1, 8 * len(fields), *fields) if fields else b""
        self._directory.append(
            b"PK\x01\x02\x2d\x00"
            + common
            + struct.pack("<HHHHII", len(wide), 0, 0, 0, 0, _small(start))
            + path
            + wide
        )

    def close(self) -> None:
        """Write the directory."""
        start, count = self._sink.position, len(self._directory)
        directory = b"".join(self._directory)
        end = start + len(directory)
        self._sink.write(directory)
        if start >= _LARGE or count >= 0xFFFF:
            place = struct.pack("<HHIIQQQQ", 45, 45, 0, 0, count, count, len(directory), start)
            self._sink.write(b"PK\x06\x06" + struct.pack("<Q", len(place)) + place)
            self._sink.write(b"PK\x06\x07" + struct.pack("<IQI", 0, end, 1))
        few = min(count, 0xFFFF)
        self._sink.write(
            b"PK\x05\x06"
            + struct.pack("<HHHHIIH", 0, 0, few, few, len(directory), _small(start), 0)
        )


def _common(crc: int, size: int, name: int) -> bytes:
    """What an entry's header and its line of the directory share: no compression, no date."""
    sizes = _small(size), _small(size)
    return struct.pack("<HHHHHIIIH", 45, 0x0800, 0, 0, 0x21, crc, *sizes, name)


def _small(number: int) -> int:
    return number if number < _LARGE else _ELSEWHERE
