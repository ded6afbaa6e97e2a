"""The file of an exported model: named parts in one zip archive, nothing compressed, every byte
under a digest.

`Writer` makes one, `Archive` opens one. Any zip tool lists the parts. Tensors are one part in the
safetensors format, begun at a multiple of 64 bytes, so that they can be used where they lie in the
file, mapped into memory. `manifest.json` says what the parts are for and holds the SHA-256 of each;
the archive's comment, at its very end, holds that of all bytes before it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jax_encdec.errors import CheckpointError, InputError

FORMAT = "jax_encdec.exported"
VERSION = 1
MANIFEST = "manifest.json"
_SEAL = b"sha256:"
_DIGITS = 64
_ALIGNMENT = 64
_CHUNK = 2**24
_LOCAL_HEADER = 30
_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


# Writing -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def writing(path: Path, nbytes: int, *, overwrite: bool) -> Iterator[Writer]:
    """A `Writer` whose file gets its name when it is complete; else nothing is left of it.

    Args:
        path: the file to be.
        nbytes: about how large it will be.
        overwrite: whether it may take the place of a file.

    Raises:
        InputError: something is in the way, or the folder cannot be written, or is too full.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder; an exported model is one file, name that")
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists; name another file, or allow to overwrite it")
    folder = path.parent
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder} to write {path.name} into")
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise InputError(
            f"{folder} has room for {free / 1e6:,.0f} MB; {path.name} takes {nbytes / 1e6:,.0f} MB"
        )
    temporary = None
    try:
        handle, name = tempfile.mkstemp(dir=folder, prefix=f".{path.name}.")
        temporary = Path(name)
        with os.fdopen(handle, "w+b") as file:
            writer = Writer(file)
            try:
                yield writer
            except BaseException:
                writer.abandon()
                raise
            writer.seal()
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


class Writer:
    """Adds parts to an archive that is being written; the manifest comes last.

    The same parts give the same bytes, whenever and wherever they are written.
    """

    def __init__(self, file: Any):
        self._file = file
        self._zip = zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True)
        self._parts: dict[str, dict[str, Any]] = {}

    def add(self, name: str, data: bytes) -> None:
        """Add a part."""
        with self._open(name) as write:
            write(data)

    def add_tensors(self, name: str, tensors: Mapping[str, np.ndarray]) -> None:
        """Add named tensors as a safetensors part; what is on a device is fetched one by one."""
        # A tensor begins where the one before it ends: first those that keep the alignment.
        order = sorted(tensors, key=lambda n: (tensors[n].nbytes % _ALIGNMENT > 0, n))
        header, end = {}, 0
        for key in order:
            x = tensors[key]
            start, end = end, end + x.nbytes
            header[key] = {
                "dtype": _NAMES[np.dtype(x.dtype)],
                "shape": list(x.shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        with self._open(name) as write:
            spaces = -(self._file.tell() + 8 + len(text)) % _ALIGNMENT
            write(struct.pack("<Q", len(text) + spaces) + text + b" " * spaces)
            for key in order:
                data = np.ascontiguousarray(np.asarray(tensors[key])).reshape(-1)
                write(data.view(np.uint8).data)

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Add the manifest: `manifest`, the format's name and version, and the parts' digests."""
        whole = {"format": FORMAT, "format_version": VERSION, **manifest, "parts": self._parts}
        text = json.dumps(whole, indent=1, ensure_ascii=False) + "\n"
        self._zip.writestr(_entry(MANIFEST), text.encode())

    def abandon(self) -> None:
        """Let go of the file, which will not be finished."""
        with contextlib.suppress(OSError, ValueError):
            self._zip.close()

    def seal(self) -> None:
        """Close the archive and write the digest of all before it into its comment."""
        self._zip.comment = _SEAL + b"0" * _DIGITS
        self._zip.close()
        size = self._file.seek(0, os.SEEK_END) - _DIGITS
        self._file.seek(0)
        digest = hashlib.sha256()
        while size > 0:
            data = self._file.read(min(_CHUNK, size))
            digest.update(data)
            size -= len(data)
        self._file.write(digest.hexdigest().encode())

    @contextlib.contextmanager
    def _open(self, name: str) -> Iterator[Any]:
        digest, size = hashlib.sha256(), 0
        with self._zip.open(_entry(name), "w", force_zip64=True) as part:

            def write(data: Any) -> None:
                nonlocal size
                size += len(data)
                digest.update(data)
                part.write(data)

            yield write
        self._parts[name] = {"bytes": size, "sha256": digest.hexdigest()}


def _entry(name: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))


# Reading -----------------------------------------------------------------------------------------


class Archive:
    """An exported model's file, mapped into memory.

    Attributes:
        path: where it lies.
        manifest: what the writer said of it.
    """

    def __init__(self, path: Path, *, verify: bool = True):
        """Open a file and check it.

        Args:
            path: the file.
            verify: read all of it and compare the digest; False: check all parts but tensors,
                which then are read only where they are used.

        Raises:
            CheckpointError: it cannot be read, is damaged, is something else, or of a format that
                this library does not know.
        """
        self.path = path
        try:
            if path.is_dir():
                raise CheckpointError(f"{path} is a folder; an exported model is one file")
            empty = path.stat().st_size == 0
            self._bytes = np.empty(0, np.uint8) if empty else np.memmap(path, np.uint8, "r")
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
        end = bytes(self._bytes[-len(_SEAL) - _DIGITS :])
        if not end.startswith(_SEAL):
            raise CheckpointError(
                f"{path} is not an exported model, or its end was cut off; such files are written "
                f"by `jax-encdec export`"
            )
        if verify and self._digest(0, len(self._bytes) - _DIGITS) != end[len(_SEAL) :].decode(
            "latin-1"
        ):
            raise CheckpointError(f"{path} is damaged: its digest is not the one written in it")
        try:
            self._places = self._find()
            self.manifest: dict[str, Any] = json.loads(self.part(MANIFEST))
            kind, version = self.manifest["format"], self.manifest["format_version"]
            if kind != FORMAT or version != VERSION:
                raise CheckpointError(
                    f"{path} is of format {kind!r}, version {version!r}; this library reads "
                    f"{FORMAT!r}, version {VERSION}: export the model again"
                )
            self._check_parts(verify)
        except (ValueError, KeyError, TypeError, AttributeError, struct.error, zipfile.BadZipFile,
                NotImplementedError, RecursionError, OverflowError) as error:  # fmt: skip
            raise self.damaged(error) from None

    def damaged(self, error: BaseException) -> CheckpointError:
        """What to raise when a part is not what it should be."""
        return CheckpointError(f"{self.path} is damaged: {type(error).__name__}: {error}")

    def part(self, name: str) -> bytes:
        """The bytes of a part, copied."""
        start, end = self._places[name]
        return self._bytes[start:end].tobytes()

    def tensors(self, name: str) -> dict[str, np.ndarray]:
        """The tensors of a part, read-only views of the file.

        Raises:
            CheckpointError: the part is not what it should be.
        """
        try:
            start, end = self._places[name]
            length = int.from_bytes(self._bytes[start : start + 8].tobytes(), "little")
            first = start + 8 + length
            if first > end:
                raise ValueError(f"the header of {name} is longer than the part")
            header = json.loads(self._bytes[start + 8 : first].tobytes())
            found = {}
            for key, entry in header.items():
                dtype, (low, high) = _DTYPES[entry["dtype"]], entry["data_offsets"]
                shape = tuple(entry["shape"])
                if not 0 <= low <= high <= end - first:
                    raise ValueError(f"the tensor {key} lies outside of {name}")
                if math.prod(shape) * dtype.itemsize != high - low or min(shape, default=0) < 0:
                    raise ValueError(f"the tensor {key} has {high - low} bytes for {shape}")
                data = np.asarray(self._bytes)[first + low : first + high]
                found[key] = data.view(dtype).reshape(shape)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self.damaged(error) from None
        return found

    def _find(self) -> dict[str, tuple[int, int]]:
        """Where each part lies, by the archive's directory."""
        places = {}
        with zipfile.ZipFile(self.path) as archive:
            for info in archive.infolist():
                at = info.header_offset
                sizes = self._bytes[at + 26 : at + _LOCAL_HEADER].tobytes()
                start = at + _LOCAL_HEADER + sum(struct.unpack("<HH", sizes))
                end = start + info.file_size
                if info.compress_type != zipfile.ZIP_STORED or end > len(self._bytes):
                    raise ValueError(f"the part {info.filename} does not lie in it as written")
                places[info.filename] = (start, end)
        return places

    def _check_parts(self, verified: bool) -> None:
        parts = self.manifest["parts"]
        if set(parts) | {MANIFEST} != set(self._places):
            raise ValueError("its parts are not those that its manifest names")
        for name, expected in parts.items():
            start, end = self._places[name]
            unread = verified or name.endswith(".safetensors")
            if end - start != expected["bytes"] or not (
                unread or self._digest(start, end) == expected["sha256"]
            ):
                raise ValueError(f"the part {name} is not as written")

    def _digest(self, start: int, end: int) -> str:
        digest = hashlib.sha256()
        for at in range(start, end, _CHUNK):
            digest.update(self._bytes[at : min(at + _CHUNK, end)].data)
        return digest.hexdigest()
