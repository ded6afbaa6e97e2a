"""SHA256SUMS: the digests of a folder's weight files, as sha256sum writes and checks them.

No weight format notices a bit that flipped in its numbers. `write` is the last step of a save;
`check` comes before anything is read, or `checking` beside the reading; without the file both do
nothing. `sha256sum -c SHA256SUMS` in the folder does the same.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath

from jax_encdec import hub
from jax_encdec.convert.readers import MAX_INDEX, find_weights
from jax_encdec.convert.tensor_source import short
from jax_encdec.errors import CheckpointError, ConfigError

NAME = hub.DIGESTS
_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](\S.*)")
_MAX_BYTES = 1_000_000
_THREADS = 4


def write(folder: Path, files: Iterable[Path]) -> Path:
    """Write the digests of `files`, which lie in `folder`, and nothing else, into SHA256SUMS."""
    hub.write_bytes(folder / NAME, listing(folder, files))
    return folder / NAME


def listing(folder: Path, files: Iterable[Path]) -> bytes:
    """What SHA256SUMS says of `files`, which lie in `folder`, as they are now.

    Raises:
        CheckpointError: a file is none, or cannot be read.
    """
    files = sorted(files)
    return "".join(
        f"{digest}  {file.relative_to(folder).as_posix()}\n"
        for file, digest in zip(files, _digests(files), strict=True)
    ).encode()


def check(place: Path) -> None:
    """Compare a model's weight files with the SHA256SUMS beside them, if there is one.

    Args:
        place: a folder, a weight file or an index of shards. Files that SHA256SUMS does not list,
            and what it lists beyond the weights, are left alone.

    Raises:
        CheckpointError: a digest differs, or SHA256SUMS is malformed.
    """
    folder = place if place.is_dir() else place.parent
    if not os.path.lexists(folder / NAME):
        return
    expected = read(folder / NAME)
    target = find_weights(place) if place.is_dir() else place
    _compare([target], expected)
    if target.suffix == ".json":
        _compare(_shards(target), expected)


@contextmanager
def checking(place: Path, verify: bool = True) -> Iterator[None]:
    """`check`, beside what the `with` block does, which reads the very files.

    The block's results count only once this has ended. Of damaged files the digest is what is
    complained of, whatever the block stumbled over.
    """
    if not verify:
        yield
        return
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(check, place)
        try:
            yield
        except Exception:
            found.result()
            raise
        found.result()


def _compare(files: list[Path], expected: Mapping[str, str]) -> None:
    files = [file for file in files if file.name in expected]
    for file, digest in zip(files, _digests(files), strict=True):
        if digest != expected[file.name]:
            raise CheckpointError(
                f"{file} is not the file that was saved: its SHA-256 is {digest[:12]}..., expected "
                f"{expected[file.name][:12]}... from {NAME}; download or copy it again, or, if it "
                f"was replaced on purpose, remove {NAME}"
            )


def read(path: Path) -> dict[str, str]:
    """Read a SHA256SUMS file: names relative to its folder -> digests in hexadecimal.

    Raises:
        CheckpointError: a line is not one, or names a file outside the folder.
    """
    try:
        text = hub.read_bytes(path, _MAX_BYTES).decode("utf-8")
    except (ConfigError, UnicodeDecodeError) as error:
        reason = str(error) if isinstance(error, ConfigError) else f"{path} is not UTF-8"
        raise CheckpointError(f"{reason}; download or copy it again, or remove it") from None
    found: dict[str, str] = {}
    for number, line in enumerate(text.split("\n"), 1):
        line = line.removesuffix("\r")
        if not line or line.startswith("#"):
            continue
        where = f"{path}, line {number}"
        entry = _LINE.fullmatch(line)
        if entry is None:
            raise CheckpointError(
                f"{where} is not of sha256sum's form (64 hexadecimal digits, two spaces, a file "
                f"name): {short(line)}"
            )
        name = posixpath.normpath(entry[2])
        if name.startswith(("/", "../")) or name == ".." or "\\" in name or _drive(name):
            raise CheckpointError(f"{where} names {short(entry[2])}, which is outside the folder")
        digest = entry[1].lower()
        if found.setdefault(name, digest) != digest:
            raise CheckpointError(f"{where} gives {short(name)} a second digest")
    return found


def _drive(name: str) -> str:
    return PureWindowsPath(name).drive


def _shards(index: Path) -> list[Path]:
    """The files that an index names; what else is wrong with it is for its reader to say."""
    try:
        shards = hub.read_json(index, limit=MAX_INDEX).get("weight_map")
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    names = set(map(str, shards.values())) if isinstance(shards, dict) else set()
    files = [index.parent / name for name in sorted(names) if Path(name).name == name]
    return [file for file in files if file.is_file()]


def _digests(files: list[Path]) -> list[str]:
    """SHA-256 of each file, several at a time: hashing lets other threads run."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(_digest, files))


def _digest(path: Path) -> str:
    try:
        if not path.is_file():  # a pipe would be waited for
            raise CheckpointError(f"{path} is not a file; expected a weight file")
        with open(path, "rb", buffering=0) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
