"""Writing `flax_model.msgpack`, without Flax: what the Transformers library's Flax classes saved.

`flax_entries` gives PyTorch's tensors Flax's names and layout; the file is then one tree of
MessagePack maps, every size in it known before any number is fetched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jax_encdec.convert.flax_msgpack import ARRAY, CHUNK_BYTES, CHUNKED, DTYPES, axes_back
from jax_encdec.convert.tensor_source import TensorInfo
from jax_encdec.convert.weight_writer import Entry, Layout, Sink, fetched, write_weights
from jax_encdec.errors import InputError


def write_flax(
    folder: str | Path,
    entries: Iterable[Entry],
    *,
    max_shard_bytes: int = 5 * 10**9,
    progress: Callable[[str], None] | None = None,
) -> list[Path]:
    """Save arrays called `a/b/c` as `flax_model.msgpack`, or as numbered shards and an index.

    Raises:
        InputError, CheckpointError: as `write_weights`; or one array's name is where another's
            goes on.
    """
    return write_weights(
        folder, entries, LAYOUT, max_shard_bytes=max_shard_bytes, progress=progress
    )


def flax_entries(entries: Iterable[Entry], last: Mapping[str, str]) -> Iterator[Entry]:
    """PyTorch's tensors as Flax names and lays them out.

    Args:
        last: of each tensor `a.b.weight`, what takes the place of `weight`: "kernel" (which is
            also transposed), "scale" or "embedding". Other tensors keep their names.
    """
    for name, info, fetch in entries:
        outer, _, own = name.rpartition(".")
        renamed = last.get(name, own)
        path = "/".join((*outer.split("."), renamed)) if outer else renamed
        if renamed != "kernel":
            yield path, info, fetch
            continue
        axes = axes_back(info.shape)
        shape = tuple(info.shape[i] for i in axes)
        yield path, TensorInfo(info.dtype, shape), _transposed(fetch, axes)


def _transposed(fetch: Callable[[], np.ndarray], axes: Sequence[int]) -> Callable[[], np.ndarray]:
    return lambda: np.asarray(fetch()).transpose(axes)


def _write_file(sink: Sink, entries: Sequence[Entry]) -> None:
    _write_map(sink, _tree(entries))


LAYOUT = Layout(
    kind="a Flax checkpoint",
    single="flax_model.msgpack",
    index="flax_model.msgpack.index.json",
    dtypes=frozenset(DTYPES.values()),
    allows=lambda name: CHUNKED not in name.split("/"),
    write=_write_file,
)


def _tree(entries: Sequence[Entry]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for entry in entries:
        *outer, last = entry[0].split("/")
        node = tree
        for name in outer:
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                raise InputError(f"{entry[0]!r} goes on where another array ends")
        if last in node:
            raise InputError(f"{entry[0]!r} ends where another array goes on")
        node[last] = entry
    return tree


def _write_map(sink: Sink, tree: Mapping[str, Any]) -> None:
    sink.write(_counted("map", len(tree)))
    for name, node in tree.items():
        sink.write(_text(name))
        if isinstance(node, dict):
            _write_map(sink, node)
        elif node[1].nbytes > CHUNK_BYTES:
            _write_chunks(sink, node)
        else:
            sink.write(_array_head(node[1]))
            sink.write_tensor(node)


def _write_chunks(sink: Sink, entry: Entry) -> None:
    """An array beyond what Flax puts into one piece."""
    name, info, _ = entry
    sink.write(_counted("map", 3) + _text(CHUNKED) + b"\xc3" + _text("shape"))
    sink.write(_counted("map", len(info.shape)))
    for i, n in enumerate(info.shape):
        sink.write(_text(str(i)) + _integer(n))
    size = CHUNK_BYTES // info.dtype.itemsize * info.dtype.itemsize
    starts = range(0, info.nbytes, size)
    sink.write(_text("chunks") + _counted("map", len(starts)))
    data = fetched(entry)
    for i, start in enumerate(starts):
        piece = data[start : start + size]
        flat = TensorInfo(info.dtype, (len(piece) // info.dtype.itemsize,))
        sink.write(_text(str(i)) + _array_head(flat))
        if start + size < info.nbytes:
            sink.write(piece.data)
        else:
            sink.write_fetched(name, piece)


# MessagePack -------------------------------------------------------------------------------------


def _sized(code: int, size: int) -> bytes:
    """The first bytes of a value: `code` for 8 bits of size, the next ones for 16 and 32."""
    width = next(w for w in (1, 2, 4) if size < 1 << 8 * w)
    return bytes([code + width // 2]) + size.to_bytes(width, "big")


def _text(text: str) -> bytes:
    data = text.encode("utf-8")
    return (bytes([0xA0 | len(data)]) if len(data) < 32 else _sized(0xD9, len(data))) + data


def _counted(kind: str, count: int) -> bytes:
    """The first bytes of a map or an array."""
    few, many = {"map": (0x80, 0xDE), "array": (0x90, 0xDC)}[kind]
    if count < 16:
        return bytes([few | count])
    return (
        bytes([many]) + count.to_bytes(2, "big")
        if count < 1 << 16
        else (bytes([many + 1]) + count.to_bytes(4, "big"))
    )


def _integer(number: int) -> bytes:
    """An integer from zero up."""
    if number < 0x80:
        return bytes([number])
    step = next(i for i in range(4) if number < 1 << (8 << i))
    return bytes([0xCC + step]) + number.to_bytes(1 << step, "big")


def _array_head(info: TensorInfo) -> bytes:
    """What stands before an array's bytes: the extension, the shape, the dtype, the size."""
    shape = _counted("array", len(info.shape)) + b"".join(map(_integer, info.shape))
    inner = b"\x93" + shape + _text(info.dtype.name) + _sized(0xC4, info.nbytes)
    size = len(inner) + info.nbytes
    if size in (1, 2, 4, 8, 16):
        return bytes([0xD4 + size.bit_length() - 1, ARRAY]) + inner
    return _sized(0xC7, size) + bytes([ARRAY]) + inner
