"""Arrays in a folder that appears at once and whole, and is mapped into memory.

The folder's name is a digest of everything its content depends on, so that nothing in it is ever
out of date. Any number of processes may write the same folder at the same time: each writes under
another name and renames it, and whoever comes second takes what is there. A digest of each array is
checked when it is opened; what is damaged is reported, and made anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jax_encdec.errors import InputError

Arrays = dict[str, np.ndarray]
Manifest = dict[str, Any]

_MANIFEST = "manifest.json"
_STALE_SECONDS = 24 * 3600


class Writer:
    """Appends to arrays, in files or in memory, and digests what it appends."""

    def __init__(self, dtypes: Mapping[str, Any], folder: Path | None = None):
        self._dtypes = dtypes
        self._files: dict[str, io.BufferedIOBase] = {}
        for name in dtypes:
            self._files[name] = io.BytesIO() if folder is None else (folder / name).open("wb")
        self._digests = {name: hashlib.sha256() for name in dtypes}

    def append(self, name: str, data: bytes | np.ndarray) -> None:
        """Append to one of the arrays."""
        if not isinstance(data, bytes):
            assert data.dtype == self._dtypes[name]
            data = data.tobytes()
        self._files[name].write(data)
        self._digests[name].update(data)

    def digests(self) -> dict[str, str]:
        """SHA-256 of each array's bytes so far."""
        return {name: made.hexdigest() for name, made in self._digests.items()}

    def arrays(self) -> Arrays:
        """What was written, if it was into memory."""
        return {
            name: np.frombuffer(file.getvalue(), self._dtypes[name])
            for name, file in self._files.items()
            if isinstance(file, io.BytesIO)
        }

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()


def cached(
    place: Path, dtypes: Mapping[str, Any], write: Callable[[Writer], Manifest]
) -> tuple[Arrays, Manifest]:
    """The arrays in the folder `place`, and what `write` had to say of them, JSON.

    Args:
        place: named by a digest of everything that the content depends on.
        dtypes: of the arrays, by name; each is flat, and not empty.
        write: makes the content, where there is none or a damaged one.

    Raises:
        InputError: the folder cannot be written.
    """
    opened = _open(place, dtypes)
    if opened is None:
        _sweep(place.parent)
        opened = _publish(place, dtypes, write)
    return opened


def digest(*parts: Any) -> str:
    """A short digest of JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _open(place: Path, dtypes: Mapping[str, Any]) -> tuple[Arrays, Manifest] | None:
    """The arrays of a folder, mapped; None where there is none, or a damaged one."""
    if not place.is_dir():
        return None
    try:
        file = json.loads((place / _MANIFEST).read_text())
        manifest, digests = file["content"], file["digests"]
        if file["digest"] != digest(manifest, digests):
            raise ValueError(f"{_MANIFEST} is not what was written")
        arrays: Arrays = {}
        for name, dtype in dtypes.items():
            arrays[name] = np.memmap(place / name, dtype, "r")
            if hashlib.sha256(arrays[name].data).hexdigest() != digests[name]:
                raise ValueError(f"{name} is not what was written")
        return arrays, manifest
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"the cache in {place} is damaged ({error}) and is made anew", stacklevel=4)
        return None


def _publish(
    place: Path, dtypes: Mapping[str, Any], write: Callable[[Writer], Manifest]
) -> tuple[Arrays, Manifest]:
    """Write a folder under another name, and rename it when it is whole."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(place)
    except OSError as error:
        raise InputError(
            f"the cache cannot be written in {place.parent}: {error.strerror}; set data.cache_dir "
            f'("" does without)'
        ) from None
    try:
        writer = Writer(dtypes, temporary)
        with contextlib.closing(writer):
            manifest = write(writer)
        digests = writer.digests()
        text = {"content": manifest, "digests": digests, "digest": digest(manifest, digests)}
        (temporary / _MANIFEST).write_text(json.dumps(text, indent=1) + "\n")
        for _ in range(10):
            with contextlib.suppress(OSError):  # Somebody's is there.
                os.rename(temporary, place)
            # A good one serves as well; a damaged one makes room.
            opened = _open(place, dtypes)
            if opened is not None:
                return opened
            away = _temporary(place)
            with contextlib.suppress(OSError):
                os.rename(place, away / "damaged")
            shutil.rmtree(away, ignore_errors=True)
        raise InputError(f"the cache folder {place} cannot be written; set data.cache_dir")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _temporary(place: Path) -> Path:
    return Path(tempfile.mkdtemp(prefix=f".{place.name[:16]}-", dir=place.parent))


def _sweep(folder: Path) -> None:
    """Remove what killed processes left behind."""
    with contextlib.suppress(OSError):
        for path in folder.glob(f".{'?' * 16}-*"):
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
