"""Predictions, written in input order so that a killed run goes on where it was.

While OUT is being written there are two files beside it. `OUT.partial` holds the predictions of all
finished windows of the input, as they will stand in OUT. `OUT.partial.journal` is JSON lines: first
what the run is (model, options) and how far `OUT.partial` goes, then the results of each batch of
the window in work. The journal is the truth: what `OUT.partial` holds beyond it is cut off, so that
whenever the process dies, no line is lost or doubled. When all is done `OUT.partial` becomes OUT.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from jax_encdec.errors import InputError
from jax_encdec.hub import write_bytes

FORMATS = (".jsonl", ".csv", ".tsv", ".txt")
_VERSION = 1


def check_output(path: str | Path) -> Path:
    """Return `path` if predictions can be written there, before anything is computed.

    Raises:
        InputError: another kind of file, a folder, or a place that cannot be written to.
    """
    target = Path(path)
    if target.suffix.lower() not in FORMATS:
        raise InputError(f"the output must end in {', '.join(FORMATS)}; got {str(path)!r}")
    if target.is_dir():
        raise InputError(f"the output {path} is a folder; expected a file")
    reason = None
    if not target.parent.is_dir():
        reason = "Not a directory" if target.parent.exists() else "No such file or directory"
    elif not os.access(target.parent, os.W_OK | os.X_OK):
        reason = "Permission denied"
    if reason:
        raise InputError(f"the output {path} cannot be written: {reason}")
    return target


def rows(kind: str, sources: Sequence[str], results: Sequence[Sequence[str]], first: bool) -> str:
    """Predictions as they stand in a file.

    Args:
        kind: ".jsonl": an object per source, its "prediction" a list where there are several;
            ".csv", ".tsv": a row per prediction, under a header; else a line per prediction, line
            breaks inside it as spaces.
        sources: the texts generated from.
        results: the predictions of each.
        first: these open the file.
    """
    out = io.StringIO(newline="")
    if kind == ".jsonl":
        for source, made in zip(sources, results, strict=True):
            line = {"source": source, "prediction": made[0] if len(made) == 1 else list(made)}
            out.write(json.dumps(line, ensure_ascii=False) + "\n")
    elif kind in (".csv", ".tsv"):
        writer = csv.writer(out, delimiter="," if kind == ".csv" else "\t", lineterminator="\n")
        if first:
            writer.writerow(["source", "prediction"])
        for source, made in zip(sources, results, strict=True):
            writer.writerows([source, one] for one in made)
    else:
        for made in results:
            out.writelines(" ".join(one.splitlines()) + "\n" for one in made)
    return out.getvalue()


class Printed:
    """Predictions that go to a stream, a line each, window by window."""

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.done = 0

    def state(self) -> dict[str, Any]:
        """What the other processes of a job have to know, see `Elsewhere`; JSON."""
        return {"done": 0, "digest": "", "kept": {}}

    def resume(self, digest: str) -> None:
        """Nothing was kept."""

    def found(self, window: str) -> dict[int, list[str]]:
        """Nothing was kept."""
        return {}

    def add(self, window: str, results: Mapping[int, Sequence[str]]) -> None:
        """Nothing is kept."""

    def commit(self, window: str, sources: Sequence[str], results: Sequence[Sequence[str]]) -> None:
        """Print a window."""
        self.stream.write(rows(".txt", sources, results, False))
        self.stream.flush()
        self.done += len(sources)

    def finish(self) -> None:
        """All is printed."""


class Elsewhere:
    """Predictions that another process of the job writes.

    Attributes:
        done: texts that need not be generated from, as that process says.
    """

    def __init__(self, state: Mapping[str, Any]):
        """Args: state: of that process's `PredictionFile`."""
        self.done, self._digest = state["done"], state["digest"]
        self._kept = {
            window: {int(i): made for i, made in results.items()}
            for window, results in state["kept"].items()
        }

    def resume(self, digest: str) -> None:
        """Check that this process reads the texts that the other one does."""
        if digest != self._digest:
            raise InputError(
                f"the first {self.done} texts are not those that process 0 reads; give all "
                f"processes the same input"
            )

    def found(self, window: str) -> dict[int, list[str]]:
        """What the other process has of a window."""
        return dict(self._kept.get(window, {}))

    def add(self, window: str, results: Mapping[int, Sequence[str]]) -> None:
        """It is kept elsewhere."""

    def commit(self, window: str, sources: Sequence[str], results: Sequence[Sequence[str]]) -> None:
        """It is written elsewhere."""
        self.done += len(sources)

    def finish(self) -> None:
        """It is finished elsewhere."""


class PredictionFile:
    """The file OUT in the making; use it in a `with` statement.

    Attributes:
        path: OUT.
        done: texts whose predictions are in `OUT.partial`, all of them before any other.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any], *, restart: bool = False):
        """Open what an earlier run left, or begin.

        Args:
            path: its ending says the format.
            settings: what the predictions depend on; JSON. A run goes on only with the same.
            restart: drop what an earlier run left.

        Raises:
            InputError: an earlier run had other settings, another process is at work, the files
                are damaged, or OUT cannot be written.
        """
        self.path = check_output(path)
        self.partial = self.path.with_name(self.path.name + ".partial")
        self.journal = self.path.with_name(self.path.name + ".partial.journal")
        self._settings = json.loads(json.dumps(settings))
        self._digest = ""
        self._kept: dict[str, dict[int, list[str]]] = {}
        self.done = self._bytes = self._head = 0
        self._log: Any = None
        self._created = not self.partial.exists()
        try:
            self._file = open(self.partial, "ab")  # noqa: SIM115
        except OSError as error:
            raise InputError(f"the output {path} cannot be written: {error.strerror}") from None
        try:
            self._lock()
            if restart:
                self.journal.unlink(missing_ok=True)
            elif self.journal.exists():
                self._read()
            elif self._file.tell():
                raise InputError(
                    f"{self.partial} is there without its journal; remove it, or pass restart=True"
                )
            self._file.truncate(self._bytes)
            self._write_journal()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> PredictionFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def state(self) -> dict[str, Any]:
        """What the other processes of a job have to know, see `Elsewhere`; JSON."""
        return {"done": self.done, "digest": self._digest, "kept": self._kept}

    def resume(self, digest: str) -> None:
        """Check that the first `done` texts of the input are those predicted from.

        Raises:
            InputError: they are not.
        """
        if digest != self._digest:
            raise InputError(
                f"{self.partial} was begun with another input: its first {self.done} texts are not "
                f"those of this one; pass restart=True to begin anew"
            )

    def found(self, window: str) -> dict[int, list[str]]:
        """What an earlier run generated of a window that it did not finish, by number of text."""
        return dict(self._kept.get(window, {}))

    def add(self, window: str, results: Mapping[int, Sequence[str]]) -> None:
        """Keep the results of a batch, by number of text, until the window is finished."""
        line = {"window": window, "results": {str(i): list(made) for i, made in results.items()}}
        self._log.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self._log.flush()

    def commit(self, window: str, sources: Sequence[str], results: Sequence[Sequence[str]]) -> None:
        """Write a finished window; `window` is the digest of all texts up to its end."""
        kind = self.path.suffix.lower()
        data = rows(kind, sources, results, not self.done).encode("utf-8")
        self._file.write(data)
        self._file.flush()
        os.fsync(self._file.fileno())
        self.done += len(sources)
        self._bytes += len(data)
        self._digest = window
        self._kept = {}
        self._write_journal()

    def finish(self) -> None:
        """Give the file its name."""
        self._close_files()
        os.replace(self.partial, self.path)
        self.journal.unlink()

    def close(self) -> None:
        """Let go of the files; those of a run that came to nothing are removed."""
        if self._file.closed:
            return
        opened = self._log is not None
        kept = self.done or self._kept or (opened and self._log.tell() > self._head)
        self._close_files()
        if not kept and (opened or self._created):
            self.partial.unlink(missing_ok=True)
        if not kept and opened:
            self.journal.unlink(missing_ok=True)

    def _close_files(self) -> None:
        self._file.close()
        if self._log is not None:
            self._log.close()

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # A system without it; two runs at once are then the user's to avoid.
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{self.partial}: another process is writing it") from None
        except OSError:
            pass  # A file system without locks.

    def _write_journal(self) -> None:
        """Replace the journal by one that holds how far `OUT.partial` goes, and what is kept."""
        head = {
            "version": _VERSION,
            "settings": self._settings,
            "texts": self.done,
            "bytes": self._bytes,
            "digest": self._digest,
        }
        if self._log is not None:
            self._log.close()
        lines: list[Any] = [head]
        for window, results in self._kept.items():
            lines.append({"window": window, "results": {str(i): r for i, r in results.items()}})
        data = b"".join(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines)
        write_bytes(self.journal, data)
        self._log = open(self.journal, "ab")  # noqa: SIM115
        self._head = self._log.tell()

    def _read(self) -> None:
        """Take over what an earlier run left."""
        # The last line may be torn: the process died while writing it.
        lines = self.journal.read_bytes().split(b"\n")[:-1]
        try:
            head, *batches = (json.loads(line) for line in lines)
            if head["version"] != _VERSION:
                raise InputError(
                    f"{self.journal} is of another version of this program; pass restart=True"
                )
            settings, self._digest = head["settings"], str(head["digest"])
            self.done, self._bytes = int(head["texts"]), int(head["bytes"])
            for batch in batches:
                kept = self._kept.setdefault(batch["window"], {})
                kept.update({int(i): list(made) for i, made in batch["results"].items()})
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(
                f"{self.journal} is damaged; pass restart=True to begin anew"
            ) from None
        difference = _difference(settings, self._settings)
        if difference:
            raise InputError(
                f"{self.partial} was begun with {difference}; repeat that command to go on, or "
                f"pass restart=True to begin anew"
            )
        size = self._file.tell()
        if not size and self.path.is_file() and self.path.stat().st_size == self._bytes:
            # All that run left to do was to remove its journal.
            self._digest, self._kept, self.done, self._bytes = "", {}, 0, 0
        elif size < self._bytes:
            raise InputError(
                f"{self.partial} is shorter than its journal says ({size} of {self._bytes} bytes); "
                f"pass restart=True to begin anew"
            )


def _difference(old: Any, new: Any, name: str = "") -> str:
    """The first setting that differs, in words; empty where none does."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            found = _difference(old.get(key), new.get(key), key)
            if found:
                return found
        return ""
    if old == new:
        return ""
    if name == "model":
        return "another model"
    return f"{name} {json.dumps(old)}, not {json.dumps(new)}"
