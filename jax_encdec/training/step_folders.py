"""The folder of a run's checkpoints: one folder a step, what is in it, and whether it is sound.

A step's folder is complete before it gets its name: `seal` adds `run.json` (what is not an array)
and `SHA256SUMS` (of every file), then it is renamed. All other changes are renames too, so that a
process may be killed anywhere: `30` is a step; `30.orbax-checkpoint-tmp` is being written,
`30.deleted` deleted, and both are swept; `30.damaged` and `30.abandoned` were set aside. Nothing
here knows of arrays.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from threading import Thread
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from jax_encdec import hub
from jax_encdec.convert import digests
from jax_encdec.errors import CheckpointError, ConfigError, EncDecError

RUN = "run.json"
LOCK = ".lock"
TEMPORARY, DELETED = ".orbax-checkpoint-tmp", ".deleted"
DAMAGED, ABANDONED = ".damaged", ".abandoned"

# Orbax completes these two after the digests are taken. Nothing is ever restored from them.
_MARKERS = ("_CHECKPOINT_METADATA", "commit_success.txt")
_MAX_RUN = 64_000_000
_LOCK_PATIENCE = 60.0
"""Seconds for the process that had the folder, longer than it takes to notice a lost peer."""


class StepFolders:
    """The steps in one folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.unfinished: list[int] = []
        """Steps whose temporary folders were swept."""
        self._lock: int | None = None
        self._deleting: list[Thread] = []

    def open(self) -> None:
        """Make the folder, keep other processes from writing to it, and sweep it.

        Raises:
            CheckpointError: another process is writing to it.
            OSError: it cannot be made or swept.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.folder / LOCK)
        for entry in list(self.folder.iterdir()):
            step = entry.name.partition(".")[0]
            if not (_is_step(step) and entry.is_dir()):
                continue
            if entry.name.startswith(step + TEMPORARY):
                self.unfinished.append(int(step))
                shutil.rmtree(entry)
            elif entry.name == step + DELETED:
                shutil.rmtree(entry)

    def close(self) -> None:
        """Finish deleting and let others write."""
        for thread in self._deleting:
            thread.join()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def steps(self) -> list[int]:
        """The committed steps, in order."""
        names = (entry.name for entry in self.folder.iterdir() if entry.is_dir())
        return sorted(int(name) for name in names if _is_step(name))

    def run(self, step: int) -> dict[str, Any]:
        """What `seal` was given for a step.

        Raises:
            CheckpointError: its run.json is missing or damaged.
        """
        path = self.folder / str(step) / RUN
        try:
            run = json.loads(hub.read_bytes(path, _MAX_RUN))
            if all(isinstance(run[key], dict) for key in ("metrics", "extra", "leaves")):
                return run
        except ConfigError as error:
            raise CheckpointError(str(error)) from None
        except (ValueError, KeyError, TypeError):  # not JSON, or another JSON
            pass
        raise CheckpointError(f"{path} is not that of a checkpoint")

    def seal(self, step: int, run: bytes) -> None:
        """Complete the temporary folder of a step, whose arrays are written, for its commit."""
        folder = next(self.folder.glob(f"{step}{TEMPORARY}*"))
        hub.write_bytes(folder / RUN, run)
        digests.write(folder, [folder / name for name in _files(folder)])

    def missing(self, step: int) -> str | None:
        """Which file a step lacks or has too many, if any: the quick part of `damage`."""
        folder = self.folder / str(step)
        return _difference(digests.read(folder / digests.NAME), _files(folder))

    def damage(self, step: int) -> str | None:
        """What is wrong with a step's files, in a few words; None: they are those written."""
        folder = self.folder / str(step)
        try:
            if problem := self.missing(step):
                return problem
            written = hub.read_bytes(folder / digests.NAME, _MAX_RUN)
            found = digests.listing(folder, [folder / name for name in _files(folder)])
        except (EncDecError, OSError) as error:
            return str(error)
        if found == written:
            return None
        line = sorted(set(found.splitlines()) - set(written.splitlines()))[:1]
        name = line[0].decode().partition("  ")[2] if line else digests.NAME
        return f"{name} is not the file that was written, or its digest is not"

    def set_aside(self, step: int, why: str) -> str:
        """Take a step out of the run, and return the name it has from then on."""
        name, count = f"{step}{why}", 1
        while os.path.lexists(self.folder / name):
            count += 1
            name = f"{step}{why}.{count}"
        os.rename(self.folder / str(step), self.folder / name)
        return name

    def delete(self, step: int) -> None:
        """Take a step out at once, and delete its files in the background."""
        gone = self.folder / f"{step}{DELETED}"
        os.rename(self.folder / str(step), gone)
        thread = Thread(target=shutil.rmtree, args=(gone,), kwargs={"ignore_errors": True})
        thread.start()
        self._deleting = [thread, *(other for other in self._deleting if other.is_alive())]

    def drop_unfinished(self, step: int) -> None:
        """Give back the room that a failed save took."""
        for left in self.folder.glob(f"{step}{TEMPORARY}*"):
            shutil.rmtree(left, ignore_errors=True)


def _is_step(name: str) -> bool:
    return name.isascii() and name.isdigit() and name == str(int(name))


def _files(folder: Path) -> list[str]:
    """The files of a step that have digests, by their paths within it."""
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(
        name.as_posix()
        for name in names
        if name.as_posix() not in (*_MARKERS, digests.NAME)
        and not name.name.startswith((".nfs", "._", ".DS_Store"))  # file systems' own
    )


def _difference(expected: Mapping[str, str], files: list[str]) -> str | None:
    if missing := sorted(set(expected) - set(files)):
        return f"{missing[0]} is missing"
    if unknown := sorted(set(files) - set(expected)):
        return f"{unknown[0]} is not among its {digests.NAME}"
    return None


def _lock(path: Path) -> int | None:
    """Wait until no other process writes here, a survivor of the last job for one.

    A lock of this kind ends with its process, however that ends, and is not inherited.
    """
    if fcntl is None:
        return None
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    deadline = time.monotonic() + _LOCK_PATIENCE
    while True:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except (BlockingIOError, PermissionError):
            if time.monotonic() > deadline:
                os.close(handle)
                raise CheckpointError(
                    f"another process is writing checkpoints to {path.parent}; end it first, or "
                    "give this run another folder"
                ) from None
            time.sleep(0.2)
        except OSError:  # a file system without locks
            os.close(handle)
            return None
