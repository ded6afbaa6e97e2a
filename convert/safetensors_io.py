"""Safetensors files: a lazy reader and a streaming writer.

A file is an 8-byte little-endian header length, a JSON header (name -> dtype, shape, data_offsets)
padded with spaces, and the tensors' bytes without gaps. The reader checks the whole header before
any number is read. The writer computes the header from `TensorInfo`s alone, and streams the tensors
(weight_writer); its bytes are those of the official library.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jax_encdec.convert.tensor_source import (
    BinaryFile,
    FileTensors,
    TensorInfo,
    as_tensor,
    check_tensors,
    is_count,
    shape_problem,
    short,
    strict_json,
)
from jax_encdec.convert.weight_writer import Entry, Layout, Sink, encodes, write_weights
from jax_encdec.errors import CheckpointError, InputError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_MAX_HEADER = 25_000_000
"""Bytes of header, 800 for each of the most tensors; the specification allows four times that."""

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


def is_safetensors(head: bytes) -> bool:
    """Whether a file that begins so (9 bytes) may be a safetensors file."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _MAX_HEADER


class SafetensorsFile(FileTensors):
    """One safetensors file."""

    def __init__(self, file: BinaryFile) -> None:
        self.path = file.path
        self._file = file
        length = int.from_bytes(file.read(0, 8), "little")
        if length > _MAX_HEADER:
            raise CheckpointError(
                f"{self.path} is not a safetensors file, or has a header of more than "
                f"{_MAX_HEADER} bytes"
            )
        self._start = 8 + length
        header = strict_json(file.read(8, length), f"the header of {self.path}")
        check_tensors(len(header), str(self.path))
        self._ignored = {}
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
        return self._entry_of(name)[0]

    def __getitem__(self, name: str) -> np.ndarray:
        return as_tensor(self._file.read_array(*self._span(name)), self.info(name))

    @property
    def mapped(self) -> bool:
        """True: tensors lie in the file as they are."""
        return True

    def view(self, name: str) -> np.ndarray:
        """A tensor, read-only, whose numbers are read when touched."""
        info = self.info(name)
        if info.dtype == np.bool_:
            return self[name]
        return as_tensor(self._file.map_array(*self._span(name)), info)

    def _span(self, name: str) -> tuple[int, int]:
        info, begin = self._entry_of(name)
        return self._start + begin, info.nbytes


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
    if not encodes(name):
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


# Writing -----------------------------------------------------------------------------------------


def write_safetensors(
    folder: str | Path,
    entries: Iterable[Entry],
    *,
    max_shard_bytes: int = 5 * 10**9,
    metadata: Mapping[str, str] | None = {"format": "pt"},
    progress: Callable[[str], None] | None = None,
) -> list[Path]:
    """Save tensors as `model.safetensors`, or as numbered shards and an index if they are large.

    Args:
        metadata: the files' free text; {"format": "pt"} is what PyTorch Transformers looks for.
        folder, entries, max_shard_bytes, progress: as in `write_weights`. Within a file, tensors
            lie and are fetched by dtype and name.

    Returns:
        The weight files, and after shards their index.

    Raises:
        InputError, CheckpointError: as `write_weights`.
    """
    for key, value in (metadata or {}).items():
        if not (isinstance(key, str) and isinstance(value, str) and encodes(key + value)):
            raise InputError(f"metadata must be text; got {short(key)}: {short(value)}")

    def write(sink: Sink, entries: Sequence[Entry]) -> None:
        _write_file(sink, entries, metadata)

    layout = Layout(
        kind="a safetensors file",
        single=SINGLE,
        index=INDEX,
        dtypes=frozenset(_NAMES),
        allows=lambda name: name != "__metadata__",
        write=write,
    )
    return write_weights(
        folder, entries, layout, max_shard_bytes=max_shard_bytes, progress=progress
    )


def _write_file(sink: Sink, entries: Sequence[Entry], metadata: Mapping[str, str] | None) -> None:
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
    sink.write(len(text).to_bytes(8, "little") + text)
    for entry in ordered:
        sink.write_tensor(entry)
