"""A pair in any readable format -> a folder that PyTorch, or Flax, opens as its own.

The family's rules read and write at the same time: each tensor to be written asks for the slices
of leaves it is made of, and only then are they read. So one tensor is in memory at a time, however
large the model. The folder appears under its name when it is complete.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_encdec import hub, pretrained
from jax_encdec.convert import digests, rules, tables
from jax_encdec.convert.flax_writer import flax_entries, write_flax
from jax_encdec.convert.readers import FORMATS as PUBLISHED
from jax_encdec.convert.readers import TensorInfo, TensorSource, open_tensors, write_safetensors
from jax_encdec.convert.rules import Plan, Report
from jax_encdec.convert.torch_writer import write_torch
from jax_encdec.convert.weight_writer import Entry, is_saved
from jax_encdec.encoder_decoder_config import EncoderDecoderConfig
from jax_encdec.errors import CheckpointError, InputError
from jax_encdec.layers import flatten
from jax_encdec.pair_params import model_params
from jax_encdec.tokenizer_files import FILES

DTYPES = ("auto", "float32", "bfloat16", "float16")
FORMATS = ("safetensors", "bin", "msgpack")
TOKENIZER_FOLDERS = ("", "encoder_tokenizer", "decoder_tokenizer")

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
    format: str = "safetensors",
    dtype: str = "auto",
    max_shard_bytes: int = pretrained.DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    revision: str | None = None,
    token: hub.Token = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Convert a pair's checkpoint, with its configuration and tokenizer files.

    Args:
        src: a folder, a weight file with its configuration beside it, or a hub repository id.
        dst: a folder that is new or empty; with `overwrite`, one whose model is replaced.
        format: of the written weights: "safetensors", which all of Transformers opens; "bin" as
            PyTorch had before; "msgpack" for the Flax classes of Transformers 4.
        dtype: of the written weights; "auto": each tensor keeps its own.
        max_shard_bytes: of tensors in one file.
        revision, token, cache_dir, local_files_only: as in `from_pretrained`.

    Raises:
        CheckpointError, ConfigError: `src` is no pair, or a damaged one; nothing is written then.
        InputError: `dst` is in use or is `src`, or `dtype` or `format` is unknown.
    """
    if format == "h5":
        raise InputError(
            "tf_model.h5 can be read, and is not written: the TensorFlow classes of Transformers "
            "open safetensors, so convert to format 'safetensors'"
        )
    if format not in FORMATS:
        raise InputError(f"format must be one of {', '.join(FORMATS)}; got {format!r}")
    if dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    place = hub.resolve(
        src,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    folder = place if place.is_dir() else place.parent
    target = Path(dst).expanduser().resolve()
    if target == folder.resolve():
        raise InputError(f"{dst} is where the model comes from; choose another folder to write")
    if target.exists() and not target.is_dir():
        raise InputError(f"{dst} is a file; expected a folder to write")
    if target.exists() and any(target.iterdir()) and not overwrite:
        raise InputError(f"{dst} is not empty; pass --overwrite (overwrite=True) to replace it")
    config, generation_config = pretrained.read_configs(place)
    digests.check(place)
    with ExitStack() as stack:
        source = stack.enter_context(open_tensors(place))
        config, plan, report = pretrained.plan_pair(config, source, where=str(src))
        entries = list(_entries(config, plan, source, dtype))
        numbers = iter(range(1, len(entries) + 1))

        def written(name: str) -> None:
            if progress is not None:
                progress(name, next(numbers), len(entries))

        # Only now, that a source which is refused may leave no trace.
        staging = stack.enter_context(_staging(target))
        weights = _write(staging, entries, format, config, max_shard_bytes, written)
        dtypes = Counter(str(info.dtype) for _, info, _ in entries)
        data = pretrained.published_config(config, dtypes.most_common(1)[0][0])
        hub.write_json(staging / "config.json", data)
        defaults = pretrained.generation_defaults(generation_config, config)
        hub.write_json(staging / "generation_config.json", defaults.to_dict())
        for name in tokenizer_files(folder):
            (staging / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / name, staging / name)
        digests.write(staging, weights)
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


def _write(
    folder: Path,
    entries: list[Entry],
    format: str,
    config: EncoderDecoderConfig,
    max_shard_bytes: int,
    progress: Callable[[str], None],
) -> list[Path]:
    """Write the weights in one of `FORMATS`."""
    if format == "msgpack":
        last = _flax_names(config, {name for name, _, _ in entries})
        flax = flax_entries(entries, last)
        return write_flax(folder, flax, max_shard_bytes=max_shard_bytes, progress=progress)
    write = write_torch if format == "bin" else write_safetensors
    return write(folder, entries, max_shard_bytes=max_shard_bytes, progress=progress)


def _flax_names(config: EncoderDecoderConfig, names: set[str]) -> dict[str, str]:
    """What the Flax classes have in place of each tensor's `weight`; the rules know what it is."""
    declared = flatten(model_params(config))
    found = {}
    for part in tables.parts(config):
        for slot in rules.bind(part, declared):
            outer, _, last = slot.tensor.rpartition(".")
            if last != "weight":
                continue
            leaf = slot.leaves[0][-1]
            if leaf.endswith("kernel"):
                found[slot.tensor] = "kernel"
            elif not leaf.endswith("scale"):
                found[slot.tensor] = "embedding"
            elif f"{outer}.bias" in names:
                found[slot.tensor] = "scale"  # an RMS norm's is `weight` in Flax, too
    return found


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
    for name in sorted(new, key=lambda name: name.name == digests.NAME):  # the digests last
        (target / name).parent.mkdir(exist_ok=True)
        os.replace(staging / name, target / name)
    stale = [Path(file.name) for file in target.iterdir() if _is_weights(file.name)]
    stale += [Path(name) for name in tokenizer_files(target)]
    for name in set(stale) - set(new):
        (target / name).unlink()


def _is_weights(name: str) -> bool:
    return any(is_saved(name, single, index) for _, single, index in PUBLISHED)


def _files(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file()]
