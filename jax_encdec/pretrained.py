"""Checkpoints in and out: a published pair, or two published models joined into a new one.

Data flows one way: folder -> configuration -> rules -> plan -> arrays. `load` and `join` return
everything, report included; `from_pretrained` and `from_encoder_decoder_pretrained` are the short
forms. Nothing here, or below, needs PyTorch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from jax_encdec import hub
from jax_encdec.config import Role
from jax_encdec.convert import rules, tables
from jax_encdec.convert.readers import TensorSource, open_tensors, write_safetensors
from jax_encdec.convert.rules import Plan, Report
from jax_encdec.decoding.config import GENERATION_KEYS, GenerationConfig
from jax_encdec.encoder_decoder import (
    EncoderDecoderModel,
    check_tree,
    model_params,
    plain_params,
    resolve_ids,
)
from jax_encdec.encoder_decoder_config import MODEL_TYPES, EncoderDecoderConfig
from jax_encdec.errors import CheckpointError, ConfigError, EncDecError, InputError, nearest
from jax_encdec.families import FamilyConfig, family_config
from jax_encdec.layers import flatten

Params = dict[str, Any]
TreePath = tuple[str, ...]
DEFAULT_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Loaded:
    """A model, its parameters, and what became of each tensor on the way."""

    model: EncoderDecoderModel
    params: Params
    reports: Mapping[str, Report]
    """By origin: the folder of a pair, or "encoder" and "decoder" of a warm start."""


# A published pair --------------------------------------------------------------------------------


def from_pretrained(
    path: str | Path,
    *,
    dtype: Any = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
) -> tuple[EncoderDecoderModel, Params]:
    """Load a published pair: `EncoderDecoderModel` or a whole BART, from PyTorch or from here.

    Args:
        path: a folder, a weight file with its config.json beside it, or a hub repository id.
        dtype: of parameters and computation; None: float32; "auto": as the file has it.
        revision: branch, tag or commit of a hub repository.
        cache_dir: where downloads are kept.

    Returns:
        The model and its parameters, a nested dict of arrays on the default device.

    Raises:
        CheckpointError, ConfigError: the folder holds no such model, or a damaged one.
    """
    loaded = load(path, dtype=dtype, revision=revision, cache_dir=cache_dir)
    return loaded.model, loaded.params


def load(
    path: str | Path,
    *,
    dtype: Any = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
) -> Loaded:
    """Like `from_pretrained`, with the report."""
    place = hub.resolve(path, revision=revision, cache_dir=cache_dir)
    config, generation_config = read_configs(place)
    with open_tensors(place) as source:
        config, plan, report = plan_pair(config, source, where=str(path))
        kind = _dtype(dtype, source)
        flat = dict(_arrays(plan, source, config, kind))
    model = EncoderDecoderModel(
        config, generation_config=generation_config, dtype=kind, param_dtype=kind
    )
    return Loaded(model, unflatten_dict(flat), {str(path): report})


def read_configs(place: Path) -> tuple[EncoderDecoderConfig, GenerationConfig]:
    """Read config.json and the generation defaults of a pair's folder (or weight file).

    Old files keep generation defaults at the top level of config.json: without a
    generation_config.json they are taken from there.
    """
    folder = place if place.is_dir() else place.parent
    data = hub.read_json(folder / "config.json")
    config = EncoderDecoderConfig.from_dict(data, str(folder / "config.json"))
    file = folder / "generation_config.json"
    options = hub.read_json(file) if file.exists() else _generation_keys(data)
    try:
        generation_config = GenerationConfig.from_dict(options)
    except EncDecError as error:
        source = file if file.exists() else folder / "config.json"
        raise ConfigError(f"{source}: {error}") from None
    # They live in generation_config.json from here on, where PyTorch looks for them first.
    moved = set(_generation_keys(config.extra))
    config = config.replace(extra={k: v for k, v in config.extra.items() if k not in moved})
    return config, generation_config


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


def _arrays(
    plan: Plan, source: TensorSource, config: EncoderDecoderConfig, dtype: Any
) -> Iterator[tuple[TreePath, jax.Array]]:
    declared = flatten(model_params(config))
    for path, leaf in plan.leaves(source, declared, np.dtype(dtype)):
        yield path, jnp.asarray(leaf)
    yield from _fresh(declared, plan.fresh, jax.random.key(0), dtype)


def _fresh(
    declared: Mapping[TreePath, Any], paths: Sequence[TreePath], key: jax.Array, dtype: Any
) -> Iterator[tuple[TreePath, jax.Array]]:
    numbers = {path: i for i, path in enumerate(declared)}
    for path in paths:
        yield path, declared[path].value(jax.random.fold_in(key, numbers[path]), dtype)


def _dtype(dtype: Any, source: TensorSource) -> Any:
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


# Two published models ----------------------------------------------------------------------------


def from_encoder_decoder_pretrained(
    encoder: str | Path | None = None, decoder: str | Path | None = None, **options: Any
) -> tuple[EncoderDecoderModel, Params]:
    """Join two checkpoints into a new pair; what neither holds is initialised.

    Args:
        encoder, decoder: folder, weight file or hub repository id; None for a random side, whose
            configuration is then given by `encoder_config` or `decoder_config`.
        **options: of `join`.

    Returns:
        The model and its parameters. Cross-attention is new unless copied, and wants training.
    """
    loaded = join(encoder, decoder, **options)
    return loaded.model, loaded.params


def join(
    encoder: str | Path | None,
    decoder: str | Path | None,
    *,
    encoder_config: FamilyConfig | None = None,
    decoder_config: FamilyConfig | None = None,
    encoder_layers: int | Sequence[int] | None = None,
    decoder_layers: int | Sequence[int] | None = None,
    cross_attention: str = "fresh",
    tie_encoder_decoder: bool = False,
    decoder_start_token_id: int | None = None,
    pad_token_id: int | None = None,
    eos_token_id: int | tuple[int, ...] | None = None,
    key: jax.Array | None = None,
    dtype: Any = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    **fields: Any,
) -> Loaded:
    """Like `from_encoder_decoder_pretrained`, with the report.

    Args:
        encoder_config, decoder_config: configuration of a random side, or instead of the
            checkpoint's own.
        encoder_layers, decoder_layers: how many of the checkpoint's layers to take, from the
            first; or which ones, by number from zero.
        cross_attention: "fresh": drawn from the decoder's initial distribution; "self": copied
            from each layer's self-attention.
        tie_encoder_decoder: the decoder shares every parameter that the encoder has, too.
        decoder_start_token_id, pad_token_id, eos_token_id: by default found in the decoder's
            configuration or tokenizer ([CLS] or <s> starts, [SEP] or </s> ends).
        key: for what is drawn; by default `jax.random.key(0)`.
        dtype: of parameters and computation; None: float32.
        **fields: `encoder_...` and `decoder_...` change fields of the configurations, as in
            `decoder_hidden_dropout_prob=0.2`.
    """
    if cross_attention not in ("fresh", "self"):
        raise InputError(f"cross_attention must be 'fresh' or 'self'; got {cross_attention!r}")
    if dtype == "auto":
        raise InputError("two files may differ in dtype: name one, such as 'float32'")
    sides: dict[Role, _Side] = {
        "encoder": _Side.of(
            "encoder", encoder, encoder_config, encoder_layers, revision, cache_dir
        ),
        "decoder": _Side.of(
            "decoder", decoder, decoder_config, decoder_layers, revision, cache_dir
        ),
    }
    for name, value in fields.items():
        role, _, field = name.partition("_")
        if role not in sides:
            known = ("encoder_config", "decoder_config", "encoder_layers", "decoder_layers")
            raise InputError(f"unknown argument {name!r}{nearest(name, known)}")
        sides[role].config = sides[role].config.replace(**{field: value})
    config = EncoderDecoderConfig(
        encoder=sides["encoder"].config,
        decoder=sides["decoder"].config,
        decoder_start_token_id=decoder_start_token_id,
        pad_token_id=pad_token_id,
        eos_token_id=eos_token_id,
        tie_encoder_decoder=tie_encoder_decoder,
    )
    kind = _dtype(dtype, {})  # type: ignore[arg-type]
    flat: dict[TreePath, jax.Array] = {}
    reports: dict[str, Report] = {}
    for role, side in sides.items():
        if side.place is None:
            continue
        config, report = side.load(role, config, flat, kind)
        reports[role] = report
    declared = flatten(model_params(config))
    if cross_attention == "self":
        flat.update(_copied(declared, flat))
    absent = [path for path in declared if path not in flat]
    seed = jax.random.key(0) if key is None else key
    flat.update(_fresh(declared, absent, seed, kind))
    config = _with_ids(config, sides["decoder"].place)
    model = EncoderDecoderModel(config, dtype=kind, param_dtype=kind)
    return Loaded(model, unflatten_dict({p: flat[p] for p in declared}), reports)


@dataclass
class _Side:
    """One side of a warm start: its configuration, where its weights are, which layers to take."""

    config: FamilyConfig
    place: Path | None
    layers: tuple[int, ...] | None
    name: str

    @classmethod
    def of(
        cls,
        role: Role,
        name: str | Path | None,
        config: FamilyConfig | None,
        layers: int | Sequence[int] | None,
        revision: str | None,
        cache_dir: str | Path | None,
    ) -> _Side:
        if name is None and config is None:
            raise InputError(
                f"without a checkpoint for the {role}, {role}_config must say what it is: "
                f"{role}_config=BertConfig(...)"
            )
        place = None
        if name is not None:
            place = hub.resolve(name, revision=revision, cache_dir=cache_dir)
            if config is None:
                file = (place if place.is_dir() else place.parent) / "config.json"
                config = _single_config(hub.read_json(file), str(file))
        assert config is not None
        taken = None
        if layers is not None:
            have = getattr(config, config.layers_field(role))
            taken = tuple(range(layers)) if isinstance(layers, int) else tuple(layers)
            if not taken or not all(isinstance(i, int) and 0 <= i < have for i in taken):
                raise InputError(
                    f"{role}_layers must choose among the checkpoint's {have} layers; got {layers}"
                )
            config = config.replace(**{config.layers_field(role): len(taken)})
        return cls(config, place, taken, str(name))

    def load(
        self, role: Role, config: EncoderDecoderConfig, flat: dict[TreePath, jax.Array], dtype: Any
    ) -> tuple[EncoderDecoderConfig, Report]:
        """Read this side into `flat`; return the pair's configuration, untied where the file is."""
        assert self.place is not None
        with open_tensors(self.place) as source:
            while True:
                # The side on its own: complete, whatever the pair shares.
                untied = config.replace(tie_encoder_decoder=False)
                declared = {
                    p: leaf for p, leaf in flatten(model_params(untied)).items() if p[0] == role
                }
                side: FamilyConfig = getattr(config, role)
                part = tables.standalone_part(
                    side, role, source, where=self.name, layers=self.layers
                )
                if role == "decoder" and side.ties_head is False:
                    # A model that was never a decoder may be published without its own kernel.
                    part = replace(part, optional=(*part.optional, "decoder/kept/*"))
                part = replace(part, trunks={role: getattr(config, f"{role}_trunk")})
                # What else a checkpoint carries (somebody's own head) is reported, not refused.
                plan = rules.match([part], declared, source, where=self.name, strict=False)
                broken = plan.broken_ties(source)
                if not broken:
                    break
                warnings.warn(
                    f"{self.name} is configured as tied, but {broken[0][1]} and {broken[0][2]} "
                    f"differ; they were loaded as untied parameters",
                    stacklevel=5,
                )
                config = config.replace(**{role: side.replace(tie_word_embeddings=False)})
            aliases = config.aliases()
            for path, leaf in plan.leaves(source, declared, np.dtype(dtype)):
                home = aliases.get(path, path)
                if home not in flat:
                    flat[home] = jnp.asarray(leaf)
        return config, plan.report


def _single_config(data: Mapping[str, Any], where: str) -> FamilyConfig:
    if data.get("model_type") in MODEL_TYPES:
        raise ConfigError(
            f"{where} describes a pair; load it with EncoderDecoderModel.from_pretrained"
        )
    return family_config(data, where)


def _copied(
    declared: Mapping[TreePath, Any], flat: Mapping[TreePath, jax.Array]
) -> dict[TreePath, jax.Array]:
    """Cross-attention leaves as copies of self-attention's."""
    copies = {}
    for path, leaf in declared.items():
        if "cross_attention" not in path or path in flat:
            continue
        twin = tuple("self_attention" if name == "cross_attention" else name for name in path)
        source = flat.get(twin, flat.get(("encoder", *twin[1:])))
        if source is None or source.shape != leaf.shape:
            raise InputError(
                "cross_attention='self' needs a decoder checkpoint whose self-attention has the "
                f"shapes of its cross-attention; {'/'.join(path)} has {leaf.shape}, its twin "
                f"{None if source is None else source.shape}"
            )
        copies[path] = source
    return copies


def _with_ids(config: EncoderDecoderConfig, place: Path | None) -> EncoderDecoderConfig:
    """Fill in ids that the configuration leaves open from the decoder's tokenizer."""
    wanted: dict[str, Callable[[Any], int | None]] = {
        "decoder_start_token_id": lambda t: _first(t.cls_token_id, t.bos_token_id),
        "eos_token_id": lambda t: _first(t.sep_token_id, t.eos_token_id),
        "pad_token_id": lambda t: t.pad_token_id,
    }
    open_ids = [name for name in wanted if not _resolves(name, config)]
    if not open_ids or place is None:
        return config
    from jax_encdec.tokenization import Tokenizer

    try:
        tokenizer = Tokenizer.from_pretrained(place if place.is_dir() else place.parent)
    except EncDecError:
        return config
    found = {name: wanted[name](tokenizer) for name in open_ids}
    size = config.decoder.vocab_size
    return config.replace(**{k: v for k, v in found.items() if v is not None and v < size})


def _resolves(name: str, config: EncoderDecoderConfig) -> bool:
    try:
        resolve_ids(name, GenerationConfig(), config)
    except ConfigError:
        return False
    return True


def _first(*values: int | None) -> int | None:
    return next((v for v in values if v is not None), None)


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
    leaves the device.

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
        write_safetensors(folder, entries, max_shard_bytes=max_shard_bytes, progress=progress)
        dtype = next(iter(flat.values())).dtype
        hub.write_json(folder / "config.json", published_config(config, str(dtype)))
        defaults = generation_defaults(model.generation_config, config)
        hub.write_json(folder / "generation_config.json", defaults.to_dict())
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
