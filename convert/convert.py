"""A pair in any readable format -> a folder of safetensors that PyTorch opens as its own.

The family's rules read and write at the same time: each tensor to be written asks for the slices
of leaves it is made of, and only then are they read. So one tensor is in memory at a time, however
large the model. The folder appears under its name when it is complete.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_encdec import hub, pretrained
from jax_encdec.convert.readers import TensorInfo, TensorSource, open_tensors, write_safetensors
from jax_encdec.convert.rules import Plan, Report
from jax_encdec.encoder_decoder import model_params
from jax_encdec.encoder_decoder_config import EncoderDecoderConfig
from jax_encdec.errors import CheckpointError, InputError
from jax_encdec.layers import flatten
from jax_encdec.tokenizer_files import FILES

DTYPES = ("auto", "float32", "bfloat16", "float16")
TOKENIZER_FOLDERS = ("", "encoder_tokenizer", "decoder_tokenizer")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")

Progress = Callable[[str, int, int], None]
"""Called with a tensor's name, its number from one, and their total, when it is written."""


@dataclass(frozen=True)
class Conversion:
    """What was written.

    Attributes:
        config: of the pair, ties as the weights show them.
        report: what became of the source's tensors. Leaves that it lacks, and that nothing reads,
            are not written either.
        files: names of the written files, relative to the folder.
        nbytes: size of the weight files.
        dtypes: number of tensors by dtype.
    """

    config: EncoderDecoderConfig
    report: Report
    files: tuple[str, ...]
    nbytes: int
    dtypes: Mapping[str, int]


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    dtype: str = "auto",
    max_shard_bytes: int = pretrained.DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Convert a pair's checkpoint, with its configuration and tokenizer files.

    Args:
        src: a folder, a weight file with its configuration beside it, or a hub repository id.
        dst: a folder that is new or empty; with `overwrite`, one whose model is replaced.
        dtype: of the written weights; "auto": each tensor keeps its own.
        max_shard_bytes: of tensors in one file.
        revision, cache_dir: as in `from_pretrained`.

    Raises:
        CheckpointError, ConfigError: `src` is no pair, or a damaged one; nothing is written then.
        InputError: `dst` is in use or is `src`, or `dtype` is unknown.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    place = hub.resolve(src, revision=revision, cache_dir=cache_dir)
    folder = place if place.is_dir() else place.parent
    target = Path(dst).expanduser().resolve()
    if target == folder.resolve():
        raise InputError(f"{dst} is where the model comes from; choose another folder to write")
    if target.exists() and not target.is_dir():
        raise InputError(f"{dst} is a file; expected a folder to write")
    if target.exists() and any(target.iterdir()) and not overwrite:
        raise InputError(f"{dst} is not empty; pass --overwrite (overwrite=True) to replace it")
    config, generation_config = pretrained.read_configs(place)
    with open_tensors(place) as source, _staging(target) as staging:
        config, plan, report = pretrained.plan_pair(config, source, where=str(src))
        entries = list(_entries(config, plan, source, dtype))
        numbers = iter(range(1, len(entries) + 1))

        def written(name: str) -> None:
            if progress is not None:
                progress(name, next(numbers), len(entries))

        weights = write_safetensors(
            staging, entries, max_shard_bytes=max_shard_bytes, progress=written
        )
        dtypes = Counter(str(info.dtype) for _, info, _ in entries)
        data = pretrained.published_config(config, dtypes.most_common(1)[0][0])
        hub.write_json(staging / "config.json", data)
        defaults = pretrained.generation_defaults(generation_config, config)
        hub.write_json(staging / "generation_config.json", defaults.to_dict())
        for name in tokenizer_files(folder):
            (staging / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / name, staging / name)
        nbytes = sum(file.stat().st_size for file in weights)
        files = tuple(sorted(str(f.relative_to(staging)) for f in _files(staging)))
    return Conversion(config, report, files, nbytes, dict(dtypes))


def tokenizer_files(folder: Path) -> list[str]:
    """The tokenizer files of a pair's folder, relative to it."""
    names = [str(Path(sub, name)) for sub in TOKENIZER_FOLDERS for name in FILES]
    return [name for name in names if (folder / name).is_file()]


# Weights -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Leaf:
    """A leaf of the parameter tree that is read, a slice at a time, when somebody looks at it."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    plan: Plan
    source: Any

    def __getitem__(self, index: int | None) -> np.ndarray:
        slot = self.plan.slots[self.path, index][0]
        array = self.plan.read(self.source, slot, self.path, self.shape)
        if array.dtype == self.dtype:
            return array
        with np.errstate(over="ignore"):
            cast = array.astype(self.dtype)
        if not np.isfinite(cast).all() and np.isfinite(array).all():
            raise CheckpointError(
                f"{slot.tensor} holds numbers beyond the range of {self.dtype}; "
                f"convert to bfloat16 or float32"
            )
        return cast

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[None]


class _Remembering:
    """A source that keeps the last tensor: a fused one is asked for once per part."""

    def __init__(self, source: TensorSource):
        self.source = source
        self._last: dict[str, np.ndarray] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._last:
            self._last.clear()  # Before the next is read: one at a time.
            self._last[name] = self.source[name]
        return self._last[name]


def _entries(
    config: EncoderDecoderConfig, plan: Plan, source: TensorSource, dtype: str
) -> Iterator[tuple[str, TensorInfo, Callable[[], np.ndarray]]]:
    """What to write: (name, dtype and shape, how to make it)."""
    slots: dict[tuple[str, ...], list[str]] = {}
    for (path, _), found in plan.slots.items():
        slots.setdefault(path, []).append(plan.names[found[0].tensor])
    declared = flatten(model_params(config))
    one_by_one = _Remembering(source)
    leaves = {}
    for path, names in slots.items():
        kind = jnp.dtype(dtype) if dtype != "auto" else _common(source, names)
        leaves[path] = _Leaf(path, declared[path].shape, kind, plan, one_by_one)
    yield from pretrained.write_order(config, leaves)


def _common(source: TensorSource, names: list[str]) -> np.dtype:
    """The dtype of a leaf's tensors; where layers differ, one that holds them all."""
    kinds = {source.info(name).dtype for name in names}
    if len(kinds) == 1:
        return kinds.pop()
    return np.dtype(np.float64 if max(kind.itemsize for kind in kinds) > 4 else np.float32)


# Files -------------------------------------------------------------------------------------------


@contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """A folder beside `target` that takes its place, or its files', on success."""
    staging = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        staging.mkdir(parents=True)
        try:
            yield staging
            if target.exists() and any(target.iterdir()):
                _replace(staging, target)
            else:
                os.replace(staging, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error.strerror or error}") from None


def _replace(staging: Path, target: Path) -> None:
    """Move files in, and remove what would make another model of them."""
    new = [file.relative_to(staging) for file in _files(staging)]
    for name in new:
        (target / name).parent.mkdir(exist_ok=True)
        os.replace(staging / name, target / name)
    stale = [file.relative_to(target) for pattern in _WEIGHTS for file in target.glob(pattern)]
    stale += [Path(name) for name in tokenizer_files(target)]
    for name in set(stale) - set(new):
        (target / name).unlink()


def _files(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file()]
