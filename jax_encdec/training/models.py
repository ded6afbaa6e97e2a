"""From a configuration's [model] to a model, its parameters and its tokenizers.

A saved pair, two checkpoints joined, or a random pair; then what the configuration changes of it:
dropout, fields of the two sides, token ids, and how it is computed. With a mesh, weights go from
the file straight to the devices that hold them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jax_encdec import hub, pretrained, warm_start
from jax_encdec.convert.rules import Report
from jax_encdec.decoding.config import GenerationConfig
from jax_encdec.encoder_decoder import EncoderDecoderModel
from jax_encdec.encoder_decoder_config import MODEL_TYPES, EncoderDecoderConfig
from jax_encdec.errors import CheckpointError, ConfigError, InputError
from jax_encdec.execution import Execution
from jax_encdec.families import FamilyConfig, family_config
from jax_encdec.pretrained import Loaded, read_configs
from jax_encdec.token_ids import resolve_ids
from jax_encdec.tokenization import Tokenizer, TokenizerPair
from jax_encdec.training.config import (
    EvaluationConfig,
    ExecutionConfig,
    ModelConfig,
    TrainingConfig,
)
from jax_encdec.training.sharding import DEFAULT_RULES, ShardingRules, param_shardings

_IDS = ("decoder_start_token_id", "pad_token_id", "eos_token_id")


@dataclass(frozen=True)
class LoadedModel:
    """A model as the configuration wants it."""

    model: EncoderDecoderModel
    params: Any
    """None: all random, to be drawn where they are to lie."""
    notes: tuple[str, ...] = ()
    """What a person should know: which parameters are new, what was left out."""


# Tokenizers --------------------------------------------------------------------------------------


def load_tokenizers(config: TrainingConfig) -> TokenizerPair:
    """The tokenizers of both sides, one object where they are equal.

    Raises:
        CheckpointError: a tokenizer is missing or damaged.
        ConfigError: the configuration does not say where they are.
    """
    wanted = config.model
    if wanted.tokenizer is None and not (wanted.source_tokenizer and wanted.target_tokenizer):
        place = wanted.path or wanted.config
        if place is not None:
            pair = TokenizerPair.from_pretrained(place, **wanted.hub_options())
            source, target = pair.source, pair.target
        else:
            source = _own_tokenizer(wanted, "encoder", wanted.source_tokenizer)
            target = _own_tokenizer(wanted, "decoder", wanted.target_tokenizer)
    else:
        source = target = None
    if named := wanted.tokenizer or wanted.source_tokenizer:
        source = Tokenizer.from_pretrained(named, **wanted.hub_options())
    if named := wanted.tokenizer or wanted.target_tokenizer:
        target = Tokenizer.from_pretrained(named, role="decoder", **wanted.hub_options())
    assert source is not None
    assert target is not None
    same = source.files == target.files and source.backend.to_str() == target.backend.to_str()
    return TokenizerPair(source=source, target=source if same else target)


def _own_tokenizer(wanted: ModelConfig, role: str, named: str | None) -> Tokenizer | None:
    """The tokenizer beside a side's checkpoint or configuration; None where one is named."""
    if named is not None:
        return None
    place = getattr(wanted, role) or getattr(wanted, f"{role}_config")
    if place is None:
        raise ConfigError(_NO_MODEL)
    side = "source" if role == "encoder" else "target"
    try:
        return Tokenizer.from_pretrained(place, role=role, **_hub_options(wanted, role))
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; name the {side} side's as model.{side}_tokenizer"
        ) from None


# Models ------------------------------------------------------------------------------------------

_NO_MODEL = (
    "name what to train: a saved pair (model.path), or two checkpoints to join (model.encoder and "
    "model.decoder)"
)


def load_model(
    config: TrainingConfig, mesh: Mesh | None = None, rules: ShardingRules = DEFAULT_RULES
) -> LoadedModel:
    """Load what the configuration names, changed and computed as it says.

    Args:
        config: resolved.
        mesh, rules: where the parameters are to lie; None: on the default device.

    Raises:
        EncDecError: it cannot be had, is damaged, or cannot be what the configuration says.
    """
    wanted, kind = config.model, config.execution.param_dtype
    notes: tuple[str, ...] = ()
    if wanted.kind == "saved":
        loaded = _load_pair(wanted, kind, mesh, rules)
        model, params = loaded.model, loaded.params
        notes = _told(loaded.reports)
    elif wanted.kind == "joined":
        loaded = _join(wanted, kind, config.run.seed, mesh, rules)
        model, params = loaded.model, loaded.params
        notes = _told(loaded.reports)
    elif wanted.kind == "random":
        assert wanted.config is not None
        found, generation = read_configs(_resolve(wanted, wanted.config))
        model, params = EncoderDecoderModel(found, generation_config=generation), None
        notes = ("all parameters are random",)
    else:
        raise ConfigError(_NO_MODEL)
    model = _with_ids(_changed(model, wanted), config)
    return LoadedModel(configured(model, config), params, notes)


def _told(reports: Mapping[str, Report]) -> tuple[str, ...]:
    """What was left out of each file, what stays at its initial values, and the reader's notes."""
    return tuple(
        f"{origin}: {line}"
        for origin, report in reports.items()
        for line in str(report).splitlines()[1:]  # the first says how many tensors were read
    )


def configured(model: EncoderDecoderModel, config: TrainingConfig) -> EncoderDecoderModel:
    """The same model, computed as `config.execution` says; parameters are not touched."""
    return model.clone(
        execution=execution_of(config.execution),
        dtype=config.execution.dtype,
        param_dtype=config.execution.param_dtype,
    )


def execution_of(config: ExecutionConfig) -> Execution:
    """The model's `Execution`; "auto" layers are settled for the default backend."""
    return Execution(
        remat=config.remat,
        attention=config.attention,
        scan_layers=config.scans_layers(jax.default_backend()),
    )


def with_generation(
    model: EncoderDecoderModel, config: TrainingConfig, longest_target: int | None = None
) -> EncoderDecoderModel:
    """The same model, generating by default as `config.evaluation` says.

    Args:
        longest_target: tokens of the longest target, the start token not counted; how much is
            generated where neither the configuration nor the model's own says.

    Raises:
        InputError: the model cannot generate so.
    """
    settings = generation_of(model.generation_config, config.evaluation, longest_target)
    if config.evaluation.samples or config.evaluation.test_samples != 0:
        check_generation(settings, model.config)
    return model.clone(generation_config=settings)


def generation_of(
    own: GenerationConfig, config: EvaluationConfig, longest_target: int | None = None
) -> GenerationConfig:
    """A model's own `GenerationConfig` with what `config` sets; see `with_generation`."""
    options = config.generation_options()
    if "max_length" in options:
        options["max_new_tokens"] = None
    elif own.max_length is None and own.max_new_tokens is None and longest_target:
        options["max_length"] = longest_target + 1
    if "min_length" in options:
        options["min_new_tokens"] = None
    return own.replace(**options)


def check_generation(settings: GenerationConfig, config: EncoderDecoderConfig) -> None:
    """See, before anything is computed, that a pair can generate as it is asked to.

    Raises:
        InputError: options contradict each other, or the pair lacks an id or positions.
    """
    settings.validate(config.target_vocabulary)
    length, limit = settings.max_length, config.decoder_trunk.max_length
    if settings.max_new_tokens is not None:
        length = settings.max_new_tokens + 1
    # The last token is never fed back, so it needs no position.
    if length is not None and limit is not None and length - 1 > limit:
        raise InputError(
            f"evaluation.max_length is {length}, but the decoder has positions for {limit} tokens"
        )


def _load_pair(wanted: ModelConfig, kind: str, mesh: Mesh | None, rules: ShardingRules) -> Loaded:
    assert wanted.path is not None
    where = _where(mesh, rules)
    return pretrained.load(wanted.path, dtype=kind, **wanted.hub_options(), **where)


def _join(
    wanted: ModelConfig, kind: str, seed: int, mesh: Mesh | None, rules: ShardingRules
) -> Loaded:
    configs: dict[str, FamilyConfig] = {}
    for role in ("encoder", "decoder"):
        if (place := getattr(wanted, f"{role}_config")) is not None:
            configs[f"{role}_config"] = _family_config(wanted, role, place)
    options = {n: getattr(wanted, n) for n in _IDS}
    for role in ("encoder", "decoder"):
        changes = dict(getattr(wanted, f"{role}_options"))
        for field in changes:
            if f"{role}_{field}" in _RESERVED:
                raise ConfigError(f"model.{role}_options cannot change {field!r}")
        options |= {f"{role}_{field}": value for field, value in changes.items()}
    return warm_start.join(
        wanted.encoder,
        wanted.decoder,
        **configs,
        encoder_layers=wanted.encoder_layers,
        decoder_layers=wanted.decoder_layers,
        cross_attention=wanted.cross_attention,
        tie_encoder_decoder=wanted.tie_encoder_decoder,
        key=jax.random.key(seed),
        dtype=kind,
        encoder_revision=wanted.encoder_revision,
        decoder_revision=wanted.decoder_revision,
        **wanted.hub_options(),
        **options,
        **_where(mesh, rules),
    )


_RESERVED = frozenset(
    f"{role}_{what}" for role in ("encoder", "decoder") for what in ("config", "layers", "revision")
)


def _where(mesh: Mesh | None, rules: ShardingRules) -> dict[str, Any]:
    """The arguments that place weights on a mesh as they are read."""
    if mesh is None:
        return {}
    return {"shardings": partial(param_shardings, mesh=mesh, rules=rules)}


def _family_config(wanted: ModelConfig, role: str, place: str) -> FamilyConfig:
    found = _resolve(wanted, place, role)
    file = found / "config.json" if found.is_dir() else found
    data = hub.read_json(file)
    if data.get("model_type") in MODEL_TYPES:
        raise ConfigError(f"{file} describes a pair; model.config takes it")
    return family_config(data, str(file))


def _resolve(wanted: ModelConfig, place: str, role: str | None = None) -> Path:
    if Path(place).expanduser().is_file():
        return Path(place).expanduser()
    return hub.resolve(place, weights=False, **_hub_options(wanted, role))


def _hub_options(wanted: ModelConfig, role: str | None) -> dict[str, Any]:
    own = getattr(wanted, f"{role}_revision") if role else None
    return {**wanted.hub_options(), "revision": own or wanted.revision}


# Changes -----------------------------------------------------------------------------------------


def _changed(model: EncoderDecoderModel, wanted: ModelConfig) -> EncoderDecoderModel:
    """Dropout, and for a saved pair also fields and ids, as the configuration says."""
    config = model.config
    if wanted.kind != "joined":
        ids = {name: value for name in _IDS if (value := getattr(wanted, name)) is not None}
        options = {
            role: dict(getattr(wanted, f"{role}_options")) for role in ("encoder", "decoder")
        }
        config = _with_fields(config, options).replace(**ids)
        model = model.clone(generation_config=model.generation_config.replace(**ids))
    if wanted.dropout is not None:
        config = with_dropout(config, wanted.dropout)
    return model.clone(config=config)


def _with_ids(model: EncoderDecoderModel, config: TrainingConfig) -> EncoderDecoderModel:
    """Ids that nothing defines yet, as the target's tokenizer has them.

    Raises:
        ConfigError: an id that a target needs is nowhere to be found.
    """
    missing = [name for name in _IDS if not _resolves(name, model)]
    if not missing:
        return model
    target = load_tokenizers(config).target
    found = {
        "decoder_start_token_id": (target.cls_token_id, target.bos_token_id),
        "eos_token_id": (target.sep_token_id, target.eos_token_id),
        "pad_token_id": (target.pad_token_id,),
    }
    ids = {name: next((i for i in found[name] if i is not None), None) for name in missing}
    for name, value in ids.items():
        if value is None:
            raise ConfigError(
                f"neither the decoder's configuration nor its tokenizer says which token is the "
                f"{name.removesuffix('_id')}; name it as model.{name}"
            )
    return model.clone(config=model.config.replace(**ids))


def _resolves(name: str, model: EncoderDecoderModel) -> bool:
    try:
        resolve_ids(name, model.generation_config, model.config)
    except ConfigError:
        return False
    return True


def _with_fields(
    config: EncoderDecoderConfig, options: Mapping[str, Mapping[str, Any]]
) -> EncoderDecoderConfig:
    if config.whole:
        both = {**options["encoder"], **options["decoder"]}
        for name in set(options["encoder"]) & set(options["decoder"]):
            if options["encoder"][name] != options["decoder"][name]:
                raise ConfigError(
                    f"the two halves of a whole model have one {name}; got "
                    f"{options['encoder'][name]!r} and {options['decoder'][name]!r}"
                )
        options = {"encoder": both, "decoder": both}
    encoder = config.encoder.replace(**options["encoder"])
    decoder = config.decoder.replace(**options["decoder"])
    return config.replace(encoder=encoder, decoder=decoder)


def with_dropout(config: EncoderDecoderConfig, rate: float) -> EncoderDecoderConfig:
    """Every dropout rate of both sides set to `rate`, whatever their families call them.

    Raises:
        InputError: a side has no dropout rate at all.
    """
    sides = {}
    for role in ("encoder", "decoder"):
        side: FamilyConfig = getattr(config, role)
        names = [f.name for f in dataclasses.fields(side) if _is_dropout(f.name)]
        if not names:
            raise InputError(f"the {role}, {side.model_type}, has no dropout rate to set")
        sides[role] = side.replace(**dict.fromkeys(names, rate))
    return config.replace(**sides)


def _is_dropout(name: str) -> bool:
    return ("dropout" in name and "classifier" not in name) or name.endswith("pdrop")
