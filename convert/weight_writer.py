"""Writing weights in any format: shards, an index, one tensor in memory at a time, all or nothing.

A format is a `Layout`: the names of its files, and how one file is written to a `Sink`.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import numpy as np

from jax_encdec.convert.tensor_source import TensorInfo, is_count, reason, short
from jax_encdec.errors import CheckpointError, InputError

Entry = tuple[str, TensorInfo, Callable[[], np.ndarray]]
"""A tensor's name, dtype and shape, and how to get it."""


class Sink:
    """The file being written."""

    def __init__(self, file: FileIO, folder: Path, progress: Callable[[str], None] | None) -> None:
        self._file, self._folder, self._progress = file, folder, progress
        self.position = 0

    def write(self, data: bytes | memoryview) -> None:
        """Write all of `data`."""
        view = memoryview(data)
        self.position += len(view)
        with writing(self._folder):
            while len(view):
                view = view[self._file.write(view) :]

    def write_tensor(self, entry: Entry) -> None:
        """Fetch a tensor, check it and write its bytes."""
        self.write_fetched(entry[0], fetched(entry))

    def write_fetched(self, name: str, data: np.ndarray) -> None:
        """Write a tensor's bytes, uint8 `[nbytes]`, and tell that it is done."""
        self.write(data.data)
        if self._progress is not None:
            self._progress(name)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A format of weight files.

    Attributes:
        kind: what one file is, in a sentence.
        single, index: name of the file that holds everything, and of an index of shards.
        dtypes: what tensors can be.
        allows: whether a tensor can have this name.
        write: writes one file.
    """

    kind: str
    single: str
    index: str
    dtypes: frozenset[np.dtype]
    allows: Callable[[str], bool] = lambda name: True
    write: Callable[[Sink, Sequence[Entry]], None]

    def shard(self, number: int, count: int) -> str:
        """Name of a shard, numbered from one."""
        stem, suffix = os.path.splitext(self.single)
        return f"{stem}-{number:05d}-of-{count:05d}{suffix}"


def is_saved(name: str, single: str, index: str) -> bool:
    """Whether a file of this name is of a save as `single`, or as shards and `index`."""
    stem, suffix = map(re.escape, os.path.splitext(single))
    shard = rf"{stem}-\d{{5}}-of-\d{{5}}{suffix}"
    return name in (single, index) or re.fullmatch(shard, name) is not None


def write_weights(
    folder: str | Path,
    entries: Iterable[Entry],
    layout: Layout,
    *,
    max_shard_bytes: int = 5 * 10**9,
    progress: Callable[[str], None] | None = None,
) -> list[Path]:
    """Save tensors as one file, or as numbered shards and an index if they are large.

    Nothing appears under its final name before everything is written; after an exception until
    then the folder is as it was. Should the renaming itself fail half-way, the folder is refused by
    `open_tensors`, and never read as a mixture of two saves. Weights of an earlier save that the
    new one replaces (its shards and index, or its single file) are removed at the end.

    Args:
        folder: made if absent.
        entries: (name, info, fetch); `fetch()` returns the array of that info and is called once,
            each array being dropped before the next is fetched. Shards are filled in this order.
        layout: the format.
        max_shard_bytes: of tensors in one file; a larger tensor has a file of its own.
        progress: called with a tensor's name when it is written.

    Returns:
        The weight files, and after shards their index.

    Raises:
        InputError: a name occurs twice, the format has no such dtype, or a fetched array is not as
            announced.
        CheckpointError: the folder cannot be written.
    """
    folder = Path(folder)
    if not is_count(max_shard_bytes) or not max_shard_bytes:
        raise InputError(f"max_shard_bytes must be a positive integer; got {max_shard_bytes!r}")
    entries = list(entries)
    _check(entries, layout)
    shards = _split(entries, max_shard_bytes)
    single = len(shards) == 1
    names = [
        layout.single if single else layout.shard(i, len(shards)) for i in range(1, len(shards) + 1)
    ]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    complete: dict[str, Path] = {}
    with ExitStack() as cleanup:
        for name, shard in zip(names, shards, strict=True):
            complete[name] = _temporary(folder, name, cleanup)
            _write_file(complete[name], shard, layout, progress)
        if not single:
            complete[layout.index] = _temporary(folder, layout.index, cleanup)
            with writing(folder):
                complete[layout.index].write_bytes(_index(names, shards))
        with writing(folder):
            _publish(folder, complete, layout)
    return [folder / name for name in complete]


def _publish(folder: Path, complete: Mapping[str, Path], layout: Layout) -> None:
    """Give complete files their names, and remove weights of an earlier save."""
    if layout.index in complete:
        # Should the renaming be cut off half-way, no old index may name new shards.
        (folder / layout.index).unlink(missing_ok=True)
    for name, temporary in complete.items():
        os.replace(temporary, folder / name)
    for file in folder.iterdir():
        ours = is_saved(file.name, layout.single, layout.index)
        if ours and file.name not in complete:
            file.unlink()


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """For the file system's errors only: what `fetch` raises is the caller's."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {reason(error)}") from None


def _check(entries: Sequence[Entry], layout: Layout) -> None:
    seen: set[str] = set()
    for name, info, _ in entries:
        if name in seen:
            raise InputError(f"two tensors are called {short(name)}; names must differ")
        seen.add(name)
        if not layout.allows(name) or not encodes(name):
            raise InputError(f"{layout.kind} cannot hold a tensor called {short(name)}")
        if info.dtype not in layout.dtypes:
            raise InputError(
                f"tensor {short(name)} has dtype {info.dtype}, which {layout.kind} cannot hold"
            )


def encodes(text: str) -> bool:
    """Whether a text can be written as UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _split(entries: Sequence[Entry], limit: int) -> list[list[Entry]]:
    """Fill files in order, a file being closed by the first tensor that does not fit.

    As Transformers does it, a tensor above the limit does not close the file being filled.
    """
    shards: list[list[Entry]] = []
    current: list[Entry] = []
    filled = 0
    for entry in entries:
        size = entry[1].nbytes
        if size > limit:
            shards.append([entry])
            continue
        if filled + size > limit:
            shards.append(current)
            current, filled = [], 0
        current.append(entry)
        filled += size
    return [*shards, current] if current or not shards else shards


def _index(names: Sequence[str], shards: Sequence[Sequence[Entry]]) -> bytes:
    index = {
        "metadata": {"total_size": sum(info.nbytes for s in shards for _, info, _ in s)},
        "weight_map": {
            name: file for file, s in zip(names, shards, strict=True) for name, _, _ in s
        },
    }
    text = json.dumps(index, indent=2, sort_keys=True, ensure_ascii=False)
    return f"{text}\n".encode()


def _temporary(folder: Path, name: str, cleanup: ExitStack) -> Path:
    path = folder / f".{name}.{secrets.token_hex(8)}.tmp"
    cleanup.callback(path.unlink, missing_ok=True)
    return path


def _write_file(
    path: Path, entries: Sequence[Entry], layout: Layout, progress: Callable[[str], None] | None
) -> None:
    with ExitStack() as stack:
        with writing(path.parent):
            # Unbuffered, so that closing has nothing left to write, and to fail at.
            file = stack.enter_context(open(path, "xb", buffering=0))
        layout.write(Sink(file, path.parent, progress), entries)
        with writing(path.parent):
            os.fsync(file.fileno())


def fetched(entry: Entry) -> np.ndarray:
    """A tensor's bytes, uint8 `[nbytes]`.

    Raises:
        InputError: it is not as announced.
    """
    name, info, fetch = entry
    array = np.asarray(fetch())
    if array.dtype != info.dtype or array.shape != tuple(info.shape):
        raise InputError(
            f"tensor {short(name)} was announced as {info.dtype} {tuple(info.shape)}; "
            f"got {array.dtype} {array.shape}"
        )
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
