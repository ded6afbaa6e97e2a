"""Open the weights of a model, whatever their format: `open_tensors(path)`.

`path` is a weight file, an index of shards, or a folder, in which the published names are looked
for in a fixed order. What a file is, its first bytes say and not its name. Formats live in
safetensors_io and torch_zip; `open_file` is where another one is added.
"""

from __future__ import annotations

import os
import re
from collections.abc import Hashable, Iterator
from pathlib import Path, PureWindowsPath

import numpy as np

from jax_encdec.convert.safetensors_io import (
    INDEX,
    SINGLE,
    SafetensorsFile,
    write_safetensors,
)
from jax_encdec.convert.tensor_source import (
    BinaryFile,
    TensorInfo,
    TensorSource,
    names_of,
    short,
    strict_json,
)
from jax_encdec.convert.torch_zip import LEGACY_MAGIC, open_torch_zip
from jax_encdec.errors import CheckpointError

__all__ = ["TensorInfo", "TensorSource", "open_tensors", "write_safetensors"]

BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_FORMATS = (("safetensors", SINGLE, INDEX), ("bin", BIN, BIN_INDEX))
_SHARD = re.compile(r".*-\d{5}-of-\d{5}\.(?:safetensors|bin)")
_NOT_WEIGHTS = frozenset(("training_args.bin", "optimizer.bin", "scheduler.bin"))
"""What trainers leave beside a model under a weight file's suffix."""
_UNSUPPORTED = {".msgpack": "Flax", ".h5": "TensorFlow", ".ckpt": "TensorFlow", ".gguf": "GGUF"}
_MAX_INDEX = 100_000_000
_OPEN_SHARDS = 4
"""Shards whose files are held open at a time."""


def open_tensors(path: str | Path) -> TensorSource:
    """Open a weight file, an index of shards or a folder, reading tables of contents only.

    A folder's weights are model.safetensors, else model.safetensors.index.json, else
    pytorch_model.bin, else pytorch_model.bin.index.json, else its only *.safetensors or *.bin.

    Raises:
        CheckpointError: there is none, more than one, one of a format that is not supported, or it
            is damaged.
    """
    path = Path(path)
    try:
        # Broken links and links in circles are told from what is not there.
        present = os.path.lexists(path)
        target = find_weights(path) if path.is_dir() else path
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{short(str(path))} cannot be opened: {error}") from None
    if not present:
        raise CheckpointError(
            f"{short(str(path))} does not exist; expected a weight file or folder"
        )
    source = Shards(target) if target.suffix == ".json" else open_file(target)
    source.path = path
    return source


def open_file(path: Path) -> TensorSource:
    """Open one weight file of any format."""
    file = BinaryFile(path)
    try:
        head = file.read(0, min(file.size, 64))
        if head.startswith(b"PK\x03\x04"):
            return open_torch_zip(file)
        if problem := _not_weights(head, path):
            raise CheckpointError(f"{path} {problem}")
        return SafetensorsFile(file)
    except BaseException:
        file.close()
        raise


def _not_weights(head: bytes, path: Path) -> str | None:
    """What a file is, if its first bytes are neither a zip archive's nor safetensors'."""
    if not head:
        return "is empty"
    if head.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer, not the weights themselves: run `git lfs pull`"
    if head.startswith(LEGACY_MAGIC):
        return (
            "was saved by PyTorch before 1.6, which this version does not read yet; load it with "
            "PyTorch and save it again"
        )
    if head.lstrip()[:1] == b"<":
        return "is a web page, not weights: download the file itself"
    if head.startswith(b"\x89HDF"):
        return "is a TensorFlow file (HDF5), which this version does not read yet"
    if path.suffix in _UNSUPPORTED:
        return f"is a {_UNSUPPORTED[path.suffix]} file, which this version does not read yet"
    if head[8:9] != b"{" and path.suffix != ".safetensors":
        return "is neither a safetensors file nor a PyTorch checkpoint"
    return None


# Folders -----------------------------------------------------------------------------------------


def find_weights(folder: Path) -> Path:
    """The file or index that holds a folder's weights.

    Raises:
        CheckpointError: as `open_tensors`.
    """
    names = sorted(file.name for file in folder.iterdir())
    for _, single, index in _FORMATS:
        if single in names and index in names:
            raise _ambiguous(folder, [single, index])
        for name in (single, index):
            if name in names:
                return _existing(folder / name)
    for suffix, _, index in _FORMATS:
        lone = [n for n in names if n.endswith(f".{suffix}") and n not in _NOT_WEIGHTS]
        if any(_SHARD.fullmatch(name) for name in lone):
            raise CheckpointError(
                f"{folder} is incomplete: it has shards ({names_of(lone)}) but no {index}"
            )
        if len(lone) > 1:
            raise _ambiguous(folder, lone)
        if lone:
            return _existing(folder / lone[0])
    looked = ", ".join(name for _, *pair in _FORMATS for name in pair)
    unread = [n for n in names if any(s in _UNSUPPORTED for s in Path(n).suffixes)]
    if unread:
        kinds = sorted(
            {_UNSUPPORTED[s] for n in unread for s in Path(n).suffixes if s in _UNSUPPORTED}
        )
        have = f"it has {names_of(unread)}, and this version does not read {' or '.join(kinds)} yet"
    else:
        have = f"it has {names_of(names)}" if names else "it is empty"
    raise CheckpointError(
        f"{folder} holds no weights that can be read: looked for {looked}; {have}"
    )


def _ambiguous(folder: Path, names: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{folder} holds several weights ({names_of(names)}); pass the file that is meant"
    )


def _existing(path: Path) -> Path:
    if not path.exists():
        raise CheckpointError(f"{path} is a link to a file that is not there; download it again")
    return path


# Shards ------------------------------------------------------------------------------------------


class Shards(TensorSource):
    """An index and the weight files that it names, each opened when first asked for."""

    def __init__(self, path: Path) -> None:
        self.path = self._index = path
        file = BinaryFile(path)
        try:
            if file.size > _MAX_INDEX:
                raise CheckpointError(
                    f"{path} has {file.size} bytes; expected an index of at most {_MAX_INDEX}"
                )
            index = strict_json(file.read(0, file.size), str(path))
        finally:
            file.close()
        self._shard_of = _weight_map(index.get("weight_map"), path)
        self._sources: dict[str, TensorSource] = {}
        self._recent: list[str] = []
        shards = sorted(set(self._shard_of.values()))
        absent = [name for name in shards if not (path.parent / name).exists()]
        if absent:
            raise CheckpointError(
                f"{path.parent} is incomplete: {names_of(absent)} of {len(shards)} shards named "
                f"in {path.name} is missing"
            )

    def _shard(self, name: str) -> TensorSource:
        if name not in self._shard_of:
            raise self._unknown(name)
        shard = self._shard_of[name]
        if shard not in self._sources:
            source = open_file(self._index.parent / shard)
            lost = [n for n, s in self._shard_of.items() if s == shard and n not in source]
            if lost:
                source.close()
                raise CheckpointError(
                    f"{source.path} lacks what {self._index.name} says it holds: "
                    f"{names_of(map(short, lost))}"
                )
            self._sources[shard] = source
        if shard in self._recent:
            self._recent.remove(shard)
        self._recent.append(shard)
        while len(self._recent) > _OPEN_SHARDS:
            self._sources[self._recent.pop(0)].close()
        return self._sources[shard]

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of a tensor; opens its shard."""
        return self._shard(name).info(name)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._shard(name)[name]

    def _identity(self, name: str) -> Hashable | None:
        inner = self._shard(name)._identity(name)
        return None if inner is None else (self._shard_of[name], inner)

    def ignored(self) -> dict[str, str]:
        """Entries of the shards that are no tensors, or that the index leaves out."""
        found: dict[str, str] = {}
        for name in {shard: name for name, shard in self._shard_of.items()}.values():
            source = self._shard(name)
            found |= source.ignored()
            found |= {n: "a tensor not in the index" for n in source if n not in self._shard_of}
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._shard_of)

    def __len__(self) -> int:
        return len(self._shard_of)

    def __contains__(self, name: object) -> bool:
        return name in self._shard_of

    def close(self) -> None:
        """Let go of the shards' files; a later read opens them again."""
        for source in self._sources.values():
            source.close()


def _weight_map(value: object, path: Path) -> dict[str, str]:
    if not isinstance(value, dict) or not value:
        raise CheckpointError(f"{path} is not an index of shards: it has no weight_map")
    for name, shard in value.items():
        if not isinstance(shard, str) or not _is_plain(shard):
            raise CheckpointError(
                f"{path} says that tensor {short(name)} is in {short(shard)}; expected the plain "
                f"name of a file beside the index"
            )
    return value


def _is_plain(name: str) -> bool:
    """Whether a name can only mean an entry of the folder itself, on any system."""
    return (
        name not in ("", ".", "..")
        and PureWindowsPath(name).name == name  # neither kind of slash, no drive
        and name.isprintable()
    )
