"""Safetensors files: a lazy reader and a streaming writer.

A file is an 8-byte little-endian header length, a JSON header (name -> dtype, shape, data_offsets)
padded with spaces, and the tensors' bytes without gaps. The reader checks the whole header before
any number is read. The writer computes the header from `TensorInfo`s alone, then fetches, checks
and writes one tensor at a time; its bytes are those of the official library.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jax_encdec.convert.tensor_source import (
    BinaryFile,
    TensorInfo,
    TensorSource,
    as_tensor,
    is_count,
    reason,
    shape_problem,
    short,
    strict_json,
)
from jax_encdec.errors import CheckpointError, InputError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_MAX_HEADER = 100_000_000
"""Bytes of header that the specification allows."""

# In the order in which a file holds them.
_DTYPES: dict[str, np.dtype] = {
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
    "F32": np.dtype(np.float32),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_RANK = {dtype: rank for rank, dtype in enumerate(_DTYPES.values())}


# Reading -----------------------------------------------------------------------------------------


class SafetensorsFile(TensorSource):
    """One safetensors file."""

    def __init__(self, file: BinaryFile) -> None:
        self.path = file.path
        self._file = file
        length = int.from_bytes(file.read(0, 8), "little")
        if length > _MAX_HEADER:
            raise CheckpointError(
                f"{self.path} is not a safetensors file: it claims a header of {length} bytes; "
                f"at most {_MAX_HEADER} are allowed"
            )
        self._start = 8 + length
        header = strict_json(file.read(8, length), f"the header of {self.path}")
        self.metadata = _metadata(header.pop("__metadata__", {}), self.path)
        self._tensors = {name: _entry(name, value, self.path) for name, value in header.items()}
        end = 0
        for name, (info, begin) in sorted(
            self._tensors.items(), key=lambda item: (item[1][1], item[1][0].nbytes)
        ):
            if begin != end:
                raise CheckpointError(
                    f"{self.path} is damaged: tensor {short(name)} starts at byte "
                    f"{short(begin)} of the data; expected {end}"
                )
            end += info.nbytes
        have = file.size - self._start
        if have != end:
            raise CheckpointError(
                f"{self.path} is damaged or incomplete: its header describes {end} bytes of "
                f"tensors; the file has {have}"
            )

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of a tensor."""
        if name not in self._tensors:
            raise self._unknown(name)
        return self._tensors[name][0]

    def __getitem__(self, name: str) -> np.ndarray:
        info = self.info(name)
        start = self._start + self._tensors[name][1]
        return as_tensor(self._file.read_array(start, info.nbytes), info)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def close(self) -> None:
        """Let go of the file; a later read opens it again."""
        self._file.close()


def _metadata(value: Any, path: Path) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise CheckpointError(f"the header of {path} has __metadata__ that is not text")
    return value


def _entry(name: str, value: Any, path: Path) -> tuple[TensorInfo, int]:
    """Info and first byte of a header's entry."""
    where = f"{path}: tensor {short(name)}"
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise CheckpointError(f"{where} needs dtype, shape and data_offsets")
    kind, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(kind, str) or kind not in _DTYPES:
        raise CheckpointError(
            f"{where} has dtype {short(kind)}; supported are {', '.join(_DTYPES)}"
        )
    if not isinstance(shape, list) or not all(map(is_count, shape)):
        raise CheckpointError(f"{where} has an impossible shape {short(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_count, offsets)):
        raise CheckpointError(f"{where} has impossible data_offsets {short(offsets)}")
    if not _encodes(name):
        raise CheckpointError(f"{where} has a name that is not valid Unicode")
    info = TensorInfo(_DTYPES[kind], tuple(shape))
    if problem := shape_problem(info.shape, info.dtype):
        raise CheckpointError(f"{where} {problem}")
    if offsets[1] - offsets[0] != info.nbytes:
        raise CheckpointError(
            f"{where} of dtype {kind} and shape {short(info.shape)} needs {info.nbytes} bytes; "
            f"its data_offsets {short(offsets)} give {short(offsets[1] - offsets[0])}"
        )
    return info, offsets[0]


def _encodes(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


# Writing -----------------------------------------------------------------------------------------

Entry = tuple[str, TensorInfo, Callable[[], np.ndarray]]


def write_safetensors(
    folder: str | Path,
    entries: Iterable[Entry],
    *,
    max_shard_bytes: int = 5 * 10**9,
    metadata: Mapping[str, str] | None = {"format": "pt"},
    progress: Callable[[str], None] | None = None,
) -> list[Path]:
    """Save tensors as `model.safetensors`, or as numbered shards and an index if they are large.

    Nothing appears under its final name before everything is written; after an exception until
    then the folder is as it was. Should the renaming itself fail half-way, the folder is refused by
    `open_tensors`, and never read as a mixture of two saves. Weights of an
    earlier save that the new one replaces (its shards and index, or its single file) are removed
    at the end.

    Args:
        folder: made if absent.
        entries: (name, info, fetch); `fetch()` returns the array of that info and is called once,
            each array being dropped before the next is fetched. Shards are filled in this order;
            within a file, tensors lie and are fetched by dtype and name.
        max_shard_bytes: of tensors in one file; a larger tensor has a file of its own.
        metadata: the files' free text; {"format": "pt"} is what PyTorch Transformers looks for.
        progress: called with a tensor's name when it is written.

    Returns:
        The weight files, and after shards their index.

    Raises:
        InputError: a name occurs twice, safetensors has no such dtype, or a fetched array is not
            as announced.
        CheckpointError: the folder cannot be written.
    """
    folder = Path(folder)
    if not is_count(max_shard_bytes) or not max_shard_bytes:
        raise InputError(f"max_shard_bytes must be a positive integer; got {max_shard_bytes!r}")
    entries = list(entries)
    _check(entries, metadata)
    shards = _split(entries, max_shard_bytes)
    single = len(shards) == 1
    names = [
        SINGLE if single else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        for i in range(1, len(shards) + 1)
    ]
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    complete: dict[str, Path] = {}
    with ExitStack() as cleanup:
        for name, shard in zip(names, shards, strict=True):
            complete[name] = _temporary(folder, name, cleanup)
            _write_file(complete[name], shard, metadata, progress)
        if not single:
            complete[INDEX] = _temporary(folder, INDEX, cleanup)
            with _writing(folder):
                complete[INDEX].write_bytes(_index(names, shards))
        with _writing(folder):
            _publish(folder, complete)
    return [folder / name for name in complete]


def _publish(folder: Path, complete: Mapping[str, Path]) -> None:
    """Give complete files their names, and remove weights of an earlier save."""
    if INDEX in complete:
        # Should the renaming be cut off half-way, no old index may name new shards.
        (folder / INDEX).unlink(missing_ok=True)
    for name, temporary in complete.items():
        os.replace(temporary, folder / name)
    for file in folder.iterdir():
        ours = file.name in (SINGLE, INDEX) or _SHARD.fullmatch(file.name)
        if ours and file.name not in complete:
            file.unlink()


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """For the file system's errors only: what `fetch` raises is the caller's."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {reason(error)}") from None


def _check(entries: Sequence[Entry], metadata: Mapping[str, str] | None) -> None:
    seen: set[str] = set()
    for name, info, _ in entries:
        if name in seen:
            raise InputError(f"two tensors are called {short(name)}; names must differ")
        seen.add(name)
        if name == "__metadata__" or not _encodes(name):
            raise InputError(f"a safetensors file cannot hold a tensor called {short(name)}")
        if info.dtype not in _NAMES:
            raise InputError(
                f"tensor {short(name)} has dtype {info.dtype}, which safetensors files cannot hold"
            )
    for key, value in (metadata or {}).items():
        if not (isinstance(key, str) and isinstance(value, str) and _encodes(key + value)):
            raise InputError(f"metadata must be text; got {short(key)}: {short(value)}")


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
    path: Path,
    entries: Sequence[Entry],
    metadata: Mapping[str, str] | None,
    progress: Callable[[str], None] | None,
) -> None:
    ordered = sorted(entries, key=lambda entry: (_RANK[entry[1].dtype], entry[0]))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, info, _ in ordered:
        span = [end, end + info.nbytes]
        header[name] = {
            "dtype": _NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": span,
        }
        end += info.nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with ExitStack() as stack:
        with _writing(path.parent):
            # Unbuffered, so that closing has nothing left to write, and to fail at.
            file = stack.enter_context(open(path, "xb", buffering=0))
            _write(file, memoryview(len(text).to_bytes(8, "little") + text))
        for name, info, fetch in ordered:
            data = _fetched(name, info, fetch)
            with _writing(path.parent):
                _write(file, data.data)
            del data  # before the next is fetched
            if progress is not None:
                progress(name)
        with _writing(path.parent):
            os.fsync(file.fileno())


def _write(file: FileIO, view: memoryview) -> None:
    while len(view):
        view = view[file.write(view) :]


def _fetched(name: str, info: TensorInfo, fetch: Callable[[], np.ndarray]) -> np.ndarray:
    """The array's bytes, uint8 `[nbytes]`."""
    array = np.asarray(fetch())
    if array.dtype != info.dtype or array.shape != tuple(info.shape):
        raise InputError(
            f"tensor {short(name)} was announced as {info.dtype} {tuple(info.shape)}; "
            f"got {array.dtype} {array.shape}"
        )
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
