"""Checkpoints of pairs, in and out; two single models are joined in `warm_start.py`.

Data flows one way: folder -> configuration -> rules -> plan -> arrays. `load` returns everything,
report included; `from_pretrained` is the short form. Nothing here, or below, needs PyTorch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import Sharding

from jax_encdec import hub
from jax_encdec.convert import digests, rules, tables
from jax_encdec.convert.readers import TensorSource, open_tensors, write_safetensors
from jax_encdec.convert.rules import Box, Plan, Report
from jax_encdec.decoding.config import GENERATION_KEYS, GenerationConfig
from jax_encdec.decoding.layout import read_prepared
from jax_encdec.encoder_decoder import EncoderDecoderModel
from jax_encdec.encoder_decoder_config import MODEL_TYPES, EncoderDecoderConfig
from jax_encdec.errors import CheckpointError, ConfigError, EncDecError, InputError
from jax_encdec.families import FAMILIES
from jax_encdec.host_arrays import HostArray, land
from jax_encdec.layers import Param, flatten
from jax_encdec.pair_params import check_tree, model_params, plain_params
from jax_encdec.token_ids import resolve_ids

Params = dict[str, Any]
Shardings = Callable[[EncoderDecoderModel], Mapping[str, Any]]
"""From a model to the `jax.sharding.Sharding` of each parameter, a tree like them."""
TreePath = tuple[str, ...]
DEFAULT_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Loaded:
    """A model, its parameters, and what became of each tensor on the way."""

    model: EncoderDecoderModel
    params: Any
    """A nested dict of arrays, or with `rows` or `precision` `PreparedParams`."""
    reports: Mapping[str, Report]
    """By origin: the folder of a pair, or "encoder" and "decoder" of a warm start."""


# A published pair --------------------------------------------------------------------------------


def from_pretrained(
    path: str | Path,
    *,
    dtype: Any = None,
    revision: str | None = None,
    token: hub.Token = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    rows: int | None = None,
    precision: str | None = None,
) -> tuple[EncoderDecoderModel, Any]:
    """Load a published pair, `EncoderDecoderModel` or a whole BART, T5, ..., in any format.

    Args:
        path: a folder, a weight file with its config.json beside it, or a hub repository id.
        dtype: of parameters and computation; None: float32; "auto": as the file has it.
        revision: branch, tag or commit of a hub repository.
        token: for a repository that asks for one; None: the stored one, if any; False: none.
        cache_dir: where downloads are kept.
        local_files_only: take what the cache holds and ask nobody.
        rows, precision: for inference alone, as in `model.prepare`: with either, parameters are
            read straight into the layout of inference, in half the memory of loading and preparing.

    Returns:
        The model and its parameters, a nested dict of arrays on the default device; with `rows` or
        `precision`, `PreparedParams`.

    Raises:
        CheckpointError, ConfigError: the folder holds no such model, or a damaged one, or weights
            that differ from its SHA256SUMS; or the hub does not give it.
    """
    loaded = load(
        path,
        dtype=dtype,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        rows=rows,
        precision=precision,
    )
    return loaded.model, loaded.params


def load(
    path: str | Path,
    *,
    dtype: Any = None,
    revision: str | None = None,
    token: hub.Token = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    rows: int | None = None,
    precision: str | None = None,
    shardings: Shardings | None = None,
    verify: bool = True,
) -> Loaded:
    """Like `from_pretrained`, with the report.

    Args:
        shardings: where each parameter is to live; each process then reads its own parts only.
        verify: compare the weights with SHA256SUMS, where there is one, which reads them whole.
    """
    place = hub.resolve(
        path,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    if shardings is not None and (rows is not None or precision is not None):
        raise InputError("rows and precision are for one device; leave them out, or shardings")
    config, generation_config = read_configs(place)
    with digests.checking(place, verify), open_tensors(place) as source:
        config, plan, report = plan_pair(config, source, where=str(path))
        kind = dtype_of(dtype, source)
        model = EncoderDecoderModel(
            config, generation_config=generation_config, dtype=kind, param_dtype=kind
        )
        declared = flatten(model_params(config))
        if rows is not None or precision is not None:
            recipes = plan.recipes(source, declared, kind)
            fresh = fresh_values(declared, plan.fresh, None, kind)
            recipes |= {path: HostArray.of(value) for path, value in fresh}
            params = read_prepared(config, unflatten_dict(recipes), rows, precision)
            return Loaded(model, params, {str(path): report})
        homes = None if shardings is None else flatten(shardings(model))
        flat = dict(read_leaves(plan, source, declared, kind, homes))
        flat.update(fresh_values(declared, plan.fresh, None, kind, homes))
    return Loaded(model, unflatten_dict(flat), {str(path): report})


def read_configs(place: Path) -> tuple[EncoderDecoderConfig, GenerationConfig]:
    """Read config.json and the generation defaults of a pair's folder (or weight file).

    Old files keep generation defaults at the top level of config.json: without a
    generation_config.json they are taken from there.
    """
    folder = place if place.is_dir() else place.parent
    data = hub.read_json(folder / "config.json")
    refuse_custom_code(data, str(folder / "config.json"))
    config = EncoderDecoderConfig.from_dict(data, str(folder / "config.json"))
    file = folder / "generation_config.json"
    # A whole model's family has defaults of its own, such as a forced end.
    stated = config.decoder.to_dict() if config.whole else data
    options = hub.read_json(file) if file.exists() else _generation_keys(stated)
    try:
        generation_config = GenerationConfig.from_dict(options)
    except EncDecError as error:
        source = file if file.exists() else folder / "config.json"
        raise ConfigError(f"{source}: {error}") from None
    # They live in generation_config.json from here on, where PyTorch looks for them first.
    moved = set(_generation_keys(config.extra))
    config = config.replace(extra={k: v for k, v in config.extra.items() if k not in moved})
    return config, generation_config


def refuse_custom_code(data: Mapping[str, Any], where: str) -> None:
    """Say of an unknown model that comes with code of its own that no such code is run.

    Raises:
        ConfigError: `auto_map` names code for a `model_type` that is not ours.
    """
    for part in (data, data.get("encoder"), data.get("decoder")):
        if not isinstance(part, Mapping) or "auto_map" not in part:
            continue
        kind = part.get("model_type")
        if not isinstance(kind, str) or kind not in (*FAMILIES, *MODEL_TYPES):
            raise ConfigError(
                f"{where}: model_type {str(kind)[:80]!r} is not supported: code that comes with "
                f"it defines it (auto_map), and such code is never run here"
            )


def _generation_keys(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key in GENERATION_KEYS}


def plan_pair(
    config: EncoderDecoderConfig, source: TensorSource, *, where: str
) -> tuple[EncoderDecoderConfig, Plan, Report]:
    """Match a pair's file with its configuration, untying what the file shows to be untied."""
    notes: tuple[str, ...] = ()
    while True:
        declared = flatten(model_params(config))
        plan = rules.match(tables.parts(config, source), declared, source, where=where)
        broken = plan.broken_ties(source)
        if not broken:
            return config, plan, replace(plan.report, notes=notes)
        _, one, other = broken[0]
        note = (
            f"{where} is configured as tied, but {one} and {other} differ; they were loaded "
            f"as untied parameters"
        )
        warnings.warn(note, stacklevel=4)
        notes += (note,)
        config = _untied(config, one, other)


def _untied(config: EncoderDecoderConfig, one: str, other: str) -> EncoderDecoderConfig:
    if config.tie_encoder_decoder and one.split(".")[0] != other.split(".")[0]:
        return config.replace(tie_encoder_decoder=False)
    decoder = config.decoder.replace(tie_word_embeddings=False)
    return config.replace(decoder=decoder, **({"encoder": decoder} if config.whole else {}))


def read_leaves(
    plan: Plan,
    source: TensorSource,
    declared: Mapping[TreePath, Param],
    dtype: Any,
    shardings: Mapping[TreePath, Sharding] | None = None,
) -> Iterator[tuple[TreePath, jax.Array]]:
    """Read the leaves that a file fills, onto the default device or into their shardings.

    With shardings, a process reads the parts of its own devices, and hands each over before the
    next, so that no leaf need fit into the memory of one device, nor the model into the host's.
    """
    if shardings is None:
        yield from land(plan.recipes(source, declared, np.dtype(dtype))).items()
        return
    wanted = {path: _boxes(shardings[path], declared[path].shape) for path in declared}
    placed: list[jax.Array] = []
    for path, box, part in plan.boxes(source, declared, np.dtype(dtype), wanted):
        placed += [jax.device_put(part, device) for device in wanted[path][box]]
        jax.block_until_ready(placed)
        if len(placed) == sum(map(len, wanted[path].values())):
            shape = declared[path].shape
            yield path, jax.make_array_from_single_device_arrays(shape, shardings[path], placed)
            placed = []


def _boxes(sharding: Sharding, shape: tuple[int, ...]) -> dict[Box, list[Any]]:
    """The parts of a leaf that this process holds, and the devices that hold each."""
    boxes: dict[Box, list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        whole = (*(index or ()), *[slice(None)] * (len(shape) - len(index or ())))
        box = tuple(s.indices(n)[:2] for s, n in zip(whole, shape, strict=True))
        boxes.setdefault(box, []).append(device)
    return boxes


def fresh_values(
    declared: Mapping[TreePath, Param],
    paths: Sequence[TreePath],
    key: jax.Array | None,
    dtype: Any,
    shardings: Mapping[TreePath, Sharding] | None = None,
) -> Iterator[tuple[TreePath, jax.Array]]:
    """Draw the initial values of some leaves, onto the default device or into their shardings.

    A leaf's values depend neither on these nor on which others are drawn.

    Args:
        key: None: `jax.random.key(0)`.
    """
    if not paths:
        return  # Even making a key compiles something.
    key = jax.random.key(0) if key is None else key
    numbers = {path: i for i, path in enumerate(declared)}
    for path in paths:
        value = partial(declared[path].value, dtype=dtype)
        if shardings is not None:
            value = jax.jit(value, out_shardings=shardings[path])
        yield path, value(jax.random.fold_in(key, numbers[path]))


def dtype_of(dtype: Any, source: TensorSource) -> Any:
    """The dtype that was asked for; None: float32; "auto": the file's most frequent."""
    if dtype is None:
        return jnp.dtype(jnp.float32)
    if isinstance(dtype, str) and dtype == "auto":
        kinds = [source.info(name).dtype for name in source]
        floats = [kind for kind in kinds if jnp.issubdtype(kind, jnp.floating)]
        most = max(set(floats), key=floats.count) if floats else np.dtype(np.float32)
        return jnp.dtype(most)
    try:
        kind = jnp.dtype(dtype)
    except TypeError:
        kind = None
    if kind is None or kind.name not in ("float32", "bfloat16", "float16"):
        raise InputError(f"dtype must be 'float32', 'bfloat16', 'float16' or 'auto'; got {dtype!r}")
    return kind


# Saving ------------------------------------------------------------------------------------------


def save_pretrained(
    folder: str | Path,
    model: EncoderDecoderModel,
    params: Mapping[str, Any],
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Save config.json, generation_config.json and safetensors as PyTorch Transformers writes them.

    Everything is written under temporary names and renamed when complete; a layer at a time
    leaves the device. SHA256SUMS, written last, tells later whether the weights are still these.

    Raises:
        InputError: `params` is not this model's tree.
        CheckpointError: the folder cannot be written.
    """
    folder, config = Path(folder), model.config
    flat = flatten(plain_params(params))
    check_tree(config, flat)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; expected a folder to save into")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        entries = write_order(config, flat)
        weights = write_safetensors(
            folder, entries, max_shard_bytes=max_shard_bytes, progress=progress
        )
        dtype = next(iter(flat.values())).dtype
        hub.write_json(folder / "config.json", published_config(config, str(dtype)))
        defaults = generation_defaults(model.generation_config, config)
        hub.write_json(folder / "generation_config.json", defaults.to_dict())
        digests.write(folder, weights)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error.strerror or error}") from None


def published_config(config: EncoderDecoderConfig, dtype: str) -> dict[str, Any]:
    """config.json saying, wherever it says so, in which dtype the weights are."""
    data = config.to_dict()
    data["dtype"] = dtype
    for part in (data, data.get("encoder"), data.get("decoder")):
        for key in ("dtype", "torch_dtype"):  # the latter until Transformers 4.55
            if isinstance(part, dict) and part.get(key) is not None:
                part[key] = dtype
    return data


def write_order(config: EncoderDecoderConfig, flat: Mapping[TreePath, Any]) -> Any:
    """Entries for `write_safetensors`, from a pair's leaves by path."""
    return list(rules.tensors(tables.parts(config), flat))


def generation_defaults(
    generation_config: GenerationConfig, config: EncoderDecoderConfig
) -> GenerationConfig:
    """The generation config with every id that can be resolved filled in, so that PyTorch's
    `generate` finds them there."""
    found = {}
    for name in ("decoder_start_token_id", "pad_token_id", "eos_token_id", "bos_token_id"):
        if getattr(generation_config, name) is None:
            try:
                ids = resolve_ids(name, generation_config, config)
            except ConfigError:
                continue
            found[name] = ids[0] if len(ids) == 1 else ids
    return replace(generation_config, **found)
