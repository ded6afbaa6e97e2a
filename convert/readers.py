"""Open the weights of a model, whatever their format: `open_tensors(path)`.

`path` is a weight file, an index of shards, or a folder, in which the published names are looked
for in a fixed order. What a file is, its first bytes say and not its name. Formats live in
safetensors_io, torch_zip, torch_legacy, flax_msgpack and keras_h5, each of which gives PyTorch's
names; `open_file` is where another one is added.
"""

from __future__ import annotations

import os
import re
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path, PureWindowsPath

import numpy as np

from jax_encdec.convert import flax_msgpack, keras_h5
from jax_encdec.convert.flax_msgpack import FlaxTensors
from jax_encdec.convert.hdf5 import SIGNATURE
from jax_encdec.convert.keras_h5 import KerasTensors
from jax_encdec.convert.safetensors_io import (
    INDEX,
    SINGLE,
    SafetensorsFile,
    is_safetensors,
    write_safetensors,
)
from jax_encdec.convert.tensor_source import (
    BinaryFile,
    TensorInfo,
    TensorSource,
    check_tensors,
    names_of,
    short,
    strict_json,
)
from jax_encdec.convert.torch_legacy import is_torch_legacy, is_torch_tar, open_torch_legacy
from jax_encdec.convert.torch_zip import open_torch_zip
from jax_encdec.errors import CheckpointError

__all__ = ["TensorInfo", "TensorSource", "open_tensors", "write_safetensors"]

BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
FLAX, FLAX_INDEX = "flax_model.msgpack", "flax_model.msgpack.index.json"
KERAS, KERAS_INDEX = "tf_model.h5", "tf_model.h5.index.json"
FORMATS = (
    ("safetensors", SINGLE, INDEX),
    ("bin", BIN, BIN_INDEX),
    ("msgpack", FLAX, FLAX_INDEX),
    ("h5", KERAS, KERAS_INDEX),
)
"""Suffix, single file and index, in the order in which a folder is searched."""
_SHARD = re.compile(r".*-\d{5}-of-\d{5}\.(?:safetensors|bin|msgpack|h5)")
NOT_WEIGHTS = frozenset(("training_args.bin", "optimizer.bin", "scheduler.bin"))
"""What trainers leave beside a model under a weight file's suffix."""
_UNSUPPORTED = {".ckpt": "TensorFlow 1", ".gguf": "GGUF"}
MAX_INDEX = 25_000_000
"""Bytes of an index of shards."""
_OPEN_SHARDS = 4
"""Shards whose files are held open at a time."""


def open_tensors(path: str | Path) -> TensorSource:
    """Open a weight file, an index of shards or a folder, reading tables of contents only.

    A folder's weights are model.safetensors, else pytorch_model.bin, flax_model.msgpack or
    tf_model.h5, each or its index of shards, else its only file with one of these suffixes. Where
    several formats lie side by side, as in many repositories, the first is taken.

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
        raise CheckpointError(f"{short(str(path), 300)} cannot be opened: {error}") from None
    if not present:
        raise CheckpointError(
            f"{short(str(path), 300)} does not exist; expected a weight file or folder"
        )
    source = Shards(target) if target.suffix == ".json" else open_file(target)
    source.path = path
    return source


def open_file(path: Path, variables: Mapping[str, str] | None = None) -> TensorSource:
    """Open one weight file of any format.

    Args:
        variables: of a TensorFlow shard, the names that its index gives: see `KerasTensors`.
    """
    file = BinaryFile(path)
    try:
        head = file.read(0, min(file.size, 512))
        if head.startswith(b"PK\x03\x04"):
            return open_torch_zip(file)
        if is_torch_legacy(head):
            return open_torch_legacy(file)
        if head.startswith(SIGNATURE):
            return KerasTensors(file, variables)
        if problem := _not_weights(head, path):
            raise CheckpointError(f"{path} {problem}")
        if flax_msgpack.is_map(head) and not is_safetensors(head) and path.suffix != ".safetensors":
            return FlaxTensors(file)
        return SafetensorsFile(file)
    except BaseException:
        file.close()
        raise


def _not_weights(head: bytes, path: Path) -> str | None:
    """What a file is, if its first bytes are no format's that is read."""
    if not head:
        return "is empty"
    if head.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer, not the weights themselves: run `git lfs pull`"
    if is_torch_tar(head):
        return (
            "is a tar archive, as PyTorch wrote until 0.1, which is not supported; load it with "
            "PyTorch and save it again"
        )
    if head.lstrip()[:1] == b"<":
        return "is a web page, not weights: download the file itself"
    if path.suffix in _UNSUPPORTED:
        return f"is a {_UNSUPPORTED[path.suffix]} file, which this version does not read yet"
    if head[8:9] != b"{" and path.suffix != ".safetensors" and not flax_msgpack.is_map(head):
        return "is neither a safetensors file nor a PyTorch, Flax or TensorFlow checkpoint"
    return None


# Folders -----------------------------------------------------------------------------------------


def find_weights(folder: Path) -> Path:
    """The file or index that holds a folder's weights.

    Raises:
        CheckpointError: as `open_tensors`.
    """
    names = sorted(file.name for file in folder.iterdir())
    for _, single, index in FORMATS:
        if single in names and index in names:
            raise _ambiguous(folder, [single, index])
        for name in (single, index):
            if name in names:
                return _existing(folder / name)
    for suffix, _, index in FORMATS:
        lone = [n for n in names if n.endswith(f".{suffix}") and n not in NOT_WEIGHTS]
        if any(_SHARD.fullmatch(name) for name in lone):
            raise CheckpointError(
                f"{folder} is incomplete: it has shards ({names_of(lone)}) but no {index}"
            )
        if len(lone) > 1:
            raise _ambiguous(folder, lone)
        if lone:
            return _existing(folder / lone[0])
    looked = ", ".join(name for _, *pair in FORMATS for name in pair)
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
            if file.size > MAX_INDEX:
                raise CheckpointError(
                    f"{path} has {file.size} bytes; expected an index of at most {MAX_INDEX}"
                )
            index = strict_json(file.read(0, file.size), str(path))
        finally:
            file.close()
        weight_map = _weight_map(index.get("weight_map"), path)
        names = _torch_names(weight_map)
        self._shard_of = {names[name]: shard for name, shard in weight_map.items()}
        if len(self._shard_of) != len(weight_map):
            raise CheckpointError(f"{path} gives two shards for one tensor")
        self._variables = {keras_h5.shard_name(v): name for v, name in names.items()}
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
            source = open_file(self._index.parent / shard, self._variables)
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

    @property
    def mapped(self) -> bool:
        """As the first of the shards, which are of one format."""
        return self._shard(next(iter(self._shard_of))).mapped

    def view(self, name: str) -> np.ndarray:
        """A tensor, read-only; its numbers are read when touched, where the format allows it."""
        return self._shard(name).view(name)

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
    check_tensors(len(value), str(path))
    seen: set[str] = set()
    for name, shard in value.items():
        if not isinstance(shard, str) or not (shard in seen or _is_plain(shard)):
            raise CheckpointError(
                f"{path} says that tensor {short(name)} is in {short(shard)}; expected the plain "
                f"name of a file beside the index"
            )
        seen.add(shard)
    return value


def _torch_names(weight_map: Mapping[str, str]) -> dict[str, str]:
    """PyTorch's names of the tensors of an index: name there -> name."""
    suffixes = {PureWindowsPath(shard).suffix for shard in weight_map.values()}
    if ".msgpack" in suffixes:
        return {name: flax_msgpack.torch_name(name) for name in weight_map}
    if ".h5" in suffixes:
        return keras_h5.torch_names(weight_map)
    return {name: name for name in weight_map}


def _is_plain(name: str) -> bool:
    """Whether a name can only mean an entry of the folder itself, on any system."""
    return (
        name not in ("", ".", "..")
        and PureWindowsPath(name).name == name  # neither kind of slash, no drive
        and name.isprintable()
    )
