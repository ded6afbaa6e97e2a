"""`jax-encdec inspect`: what a model is, whether it can be used, and what to do where it cannot.

`describe(path)` gathers everything as plain JSON values, from configurations and the weight files'
tables of contents; `render` writes them out for people. No weight is loaded (but tied tensors that
a file holds twice are compared, and files with their digests where there are any).
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax_encdec.cli import hub_options, hub_parser
from jax_encdec.errors import EncDecError

_IDS = {"start": "decoder_start_token_id", "end": "eos_token_id", "pad": "pad_token_id"}
_FALLBACK = {"decoder_start_token_id": "bos_token_id", "pad_token_id": "eos_token_id"}


def add_parser(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser = subparsers.add_parser(
        "inspect",
        parents=[hub_parser()],
        help="say what a model is, and what it lacks",
        description="Describe a pair, or a single model that can be one side of a pair, without "
        "loading it. Exits with 1 if it cannot be used as it is.",
    )
    parser.add_argument("model", metavar="MODEL", help="folder, weight file or hub repository id")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> int:
    """Describe the model; see `add_parser` for the arguments."""
    found = describe(args.model, **hub_options(args))
    print(json.dumps(found, indent=2, ensure_ascii=False) if args.json else render(found))
    return 0 if found["usable"] else 1


def describe(path: str | Path, **source: Any) -> dict[str, Any]:
    """Describe a pair or a single model as plain JSON values.

    Problems of the weights are part of the description: `problems` lists them, `usable` says
    whether the model can be loaded and generated from (a single model: joined) as it is. `source`
    says how a hub repository is had: the arguments of `hub.resolve`.

    Raises:
        CheckpointError, ConfigError: there is no such model, or its configuration is unreadable.
    """
    from jax_encdec import hub
    from jax_encdec.families import FAMILIES
    from jax_encdec.pretrained import refuse_custom_code

    place = hub.resolve(path, **source)
    folder = place if place.is_dir() else place.parent
    data = hub.read_json(folder / "config.json")
    refuse_custom_code(data, str(folder / "config.json"))
    kind = data.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is not None and family.whole_architecture is None:
        found = _single(str(path), place, data)
    else:
        found = _pair(str(path), place, data)
        if family is not None and _hopeless(found):
            # A half of such a model has the same configuration.
            half = _single(str(path), place, data)
            found = found if _hopeless(half) else half
    found["usable"] = not _hopeless(found)
    return found


def _hopeless(found: Mapping[str, Any]) -> bool:
    return any(problem["fatal"] for problem in found["problems"])


# Pairs -------------------------------------------------------------------------------------------


def _pair(path: str, place: Path, data: Mapping[str, Any]) -> dict[str, Any]:
    from jax_encdec.convert import digests
    from jax_encdec.convert.readers import open_tensors
    from jax_encdec.pretrained import plan_pair, read_configs

    folder = place if place.is_dir() else place.parent
    config, generation_config = read_configs(place)
    problems: list[dict[str, Any]] = []
    weights: dict[str, Any] | None = None
    try:
        digests.check(place)
        with open_tensors(place) as source:
            weights = _weights(place, source)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # They are in the report as well.
                config, _, report = plan_pair(config, source, where=path)
        weights["ignored"] = dict(report.ignored)
        weights["fresh"] = list(report.fresh)
        problems += [_problem(note, "convert it, which writes it untied") for note in report.notes]
        unneeded = ("/kept/", "/embedding/position")  # never read, or computed
        if lost := [leaf for leaf in report.fresh if not any(part in leaf for part in unneeded)]:
            problems.append(
                _problem(f"not in the weights: {', '.join(lost)}", "they start from zero")
            )
    except EncDecError as error:
        problems.append(_problem(str(error), "restore the files, or download them again", True))
    vocabulary = config.target_vocabulary
    try:
        generation_config.validate(vocabulary)
    except EncDecError as error:
        problems.append(_problem(str(error), "edit generation_config.json", True))
    ids = {name: _id(key, config, generation_config, data, folder) for name, key in _IDS.items()}
    for name, value in ids.items():
        if value is None:
            problems.append(_undefined(name))
    has_file = (folder / "generation_config.json").exists()
    encoder, decoder = config.encoder_trunk, config.decoder_trunk
    tokenizers, complaints = _tokenizers(folder, encoder.embedding.vocab, vocabulary)
    assert decoder.head is not None
    return {
        "path": path,
        "kind": "whole" if config.whole else "pair",
        "encoder": _architecture(config.encoder, encoder),
        "decoder": _architecture(config.decoder, decoder),
        "projection": [encoder.hidden, decoder.hidden] if config.projects else None,
        "tied": {
            "head_to_embedding": decoder.head.tied,
            "decoder_to_encoder": config.tie_encoder_decoder,
            "embeddings": ("decoder", "embedding", "token") in config.aliases(),
        },
        "parameters": parameter_counts(config),
        "weights": weights,
        "ids": ids,
        "generation": {
            "from": "generation_config.json" if has_file else "config.json",
            "set": {k: v for k, v in generation_config.to_dict().items() if _is_setting(k, v)},
        },
        "tokenizers": tokenizers,
        "problems": problems + complaints,
    }


def parameter_counts(config: Any) -> dict[str, int]:
    """Number of parameters of each part of a pair, from its declaration; tied ones count once."""
    from flax.traverse_util import flatten_dict

    from jax_encdec.pair_params import model_params

    counts: Counter[str] = Counter()
    declared: dict[tuple[str, ...], Any] = flatten_dict(model_params(config))
    for leaf, param in declared.items():
        counts[_part(leaf)] += math.prod(param.shape)
    order = ("encoder", "decoder", "cross-attention", "language model head", "projection")
    ranked = sorted(counts, key=lambda name: [name.startswith(o) for o in order], reverse=True)
    return {name: counts[name] for name in ranked} | {"total": counts.total()}


def _part(leaf: tuple[str, ...]) -> str:
    side, place = leaf[0], leaf[1]
    if side == "enc_to_dec_proj":
        return "projection"
    if "cross_attention" in leaf:
        return "cross-attention"
    if place == "head":
        return "language model head"
    if place == "kept":
        return f"{side} (published, unused)"
    return f"{side} {'embeddings' if place == 'embedding' else 'layers'}"


def _id(
    name: str, config: Any, generation_config: Any, data: Mapping[str, Any], folder: Path
) -> dict[str, Any] | None:
    """A special id and the place that defines it, found as `EncoderDecoderModel.token_id` does."""
    from jax_encdec.errors import ConfigError
    from jax_encdec.token_ids import resolve_ids

    try:
        ids = list(resolve_ids(name, generation_config, config))
    except ConfigError:
        return None
    generation_file = folder / "generation_config.json"
    decoder = data.get("decoder") if "decoder" in data else data
    for key in (name, _FALLBACK.get(name, name)):
        for origin, holder in (
            (
                generation_file.name if generation_file.exists() else "config.json",
                generation_config,
            ),
            ("config.json", None if config.whole else config),
            ("config.json, decoder", config.decoder),
        ):
            value = getattr(holder, key, None)
            if (list(value) if isinstance(value, tuple) else [value]) != ids:
                continue
            if holder is config.decoder and key not in (decoder or {}):
                origin = f"default of {config.decoder.model_type}"
            origin += "" if key == name else f", as {key}"
            return {"value": ids if len(ids) > 1 else ids[0], "from": origin}
    return None  # pragma: no cover


def _undefined(name: str) -> dict[str, Any]:
    key = _IDS[name]
    flag = f"--{key.replace('_', '-')}"
    meaning = {
        "start": "generation cannot begin",
        "end": "every prediction runs to its maximal length",
        "pad": "what has ended is filled with 0",
    }[name]
    return _problem(
        f"{key} is not defined: {meaning}",
        f"set it in generation_config.json, or pass {flag} to generate",
        name == "start",
    )


def _is_setting(name: str, value: Any) -> bool:
    written = ("transformers_version", "_from_model_config", *_IDS.values(), "bos_token_id")
    return value is not None and name not in written


# Single models -----------------------------------------------------------------------------------


def _single(path: str, place: Path, data: Mapping[str, Any]) -> dict[str, Any]:
    from jax_encdec.convert import digests
    from jax_encdec.convert.readers import open_tensors
    from jax_encdec.families import family_config

    folder = place if place.is_dir() else place.parent
    config = family_config(data, str(folder / "config.json"))
    trunk = config.to_trunk(config.roles[0])
    problems: list[dict[str, Any]] = []
    weights, roles = None, {}
    try:
        digests.check(place)
        with open_tensors(place) as source:
            weights = _weights(place, source)
            roles = {role: _as_side(config, role, source, path) for role in config.roles}
    except EncDecError as error:
        problems.append(_problem(str(error), "restore the files, or download them again", True))
    if roles and not any(side["fits"] for side in roles.values()):
        problems.append(_problem(roles[config.roles[0]]["why"], "check the files", True))
    tokenizers, complaints = _tokenizers(folder, trunk.embedding.vocab, trunk.embedding.vocab)
    return {
        "path": path,
        "kind": "single",
        "model": _architecture(config, trunk),
        "as": roles,
        "weights": weights,
        "tokenizers": tokenizers,
        "problems": problems + complaints,
    }


def _as_side(config: Any, role: Any, source: Any, where: str) -> dict[str, Any]:
    """Whether a single checkpoint can be this side of a pair, and what would be new."""
    from flax.traverse_util import flatten_dict

    from jax_encdec.convert import rules, tables
    from jax_encdec.trunk_params import transformer_params

    declared: dict[tuple[str, ...], Any] = flatten_dict(
        {role: transformer_params(config.to_trunk(role))}
    )
    try:
        part = tables.standalone_part(config, role, source, where=where)
        plan = rules.match([part], declared, source, where=where)
    except EncDecError as error:
        return {"fits": False, "why": str(error)}
    fresh = [leaf for leaf in plan.fresh if "kept" not in leaf]
    return {
        "fits": True,
        "parameters": sum(math.prod(param.shape) for param in declared.values()),
        "new": sum(math.prod(declared[leaf].shape) for leaf in fresh),
        "new_parts": sorted({_part(leaf) for leaf in fresh}),
    }


# What both have ----------------------------------------------------------------------------------


def _problem(what: str, fix: str, fatal: bool = False) -> dict[str, Any]:
    return {"what": what, "fix": fix, "fatal": fatal}


def _architecture(config: Any, trunk: Any) -> dict[str, Any]:
    mlp = next(
        sublayer.f
        for segment in trunk.segments
        for block in segment.blocks
        for sublayer in block.sublayers
        if sublayer.name == "mlp"
    )
    attention = trunk.attentions()[0]
    return {
        "family": config.model_type,
        "layers": trunk.layers,
        "width": trunk.hidden,
        "heads": attention.heads,
        "head_dim": attention.head_dim,
        "feed_forward": mlp.width,
        "activation": f"gated {mlp.activation}" if mlp.gated else mlp.activation,
        "window": max((a.window for a in trunk.attentions() if a.window is not None), default=None),
        "positions": trunk.max_length,
        "vocabulary": trunk.embedding.vocab,
    }


def _weights(place: Path, source: Any) -> dict[str, Any]:
    from jax_encdec.convert.readers import find_weights

    file = find_weights(place) if place.is_dir() else place
    files = [file]
    if file.suffix == ".json":
        shards = json.loads(file.read_text(encoding="utf-8"))["weight_map"].values()
        files += [file.parent / name for name in sorted(set(shards))]
    infos = [source.info(name) for name in source]
    return {
        "files": {f.name: f.stat().st_size for f in files},
        "bytes": sum(f.stat().st_size for f in files),
        "tensors": len(infos),
        "dtypes": dict(Counter(str(info.dtype) for info in infos).most_common()),
    }


def _tokenizers(
    folder: Path, source_rows: int, target_rows: int
) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """The tokenizers of a folder, and what is wrong with them."""
    from jax_encdec.tokenization import TokenizerPair

    try:
        pair = TokenizerPair.from_pretrained(folder)
    except EncDecError as error:
        return None, [
            _problem(
                f"no tokenizer: {error}",
                "copy tokenizer.json (and tokenizer_config.json) of the model it was trained "
                "from into the folder; ids can be generated from without",
            )
        ]
    found: dict[str, Any] = {}
    problems = []
    for side, tokenizer, rows in (
        ("source", pair.source, source_rows),
        ("target", pair.target, target_rows),
    ):
        kind = type(tokenizer.backend.model).__name__
        found[side] = {"kind": kind, "vocabulary": tokenizer.vocab_size}
        if tokenizer.vocab_size > rows:
            problems.append(
                _problem(
                    f"the {side} tokenizer has {tokenizer.vocab_size} tokens, the model {rows}",
                    "texts that use the others are refused; is it this model's tokenizer?",
                )
            )
    found["shared"] = pair.source is pair.target
    return found, problems


# For people --------------------------------------------------------------------------------------


def amount(number: float) -> str:
    """`1234567` -> `1.23M`: three digits, in units of 1000."""
    if number < 1000:
        return f"{number:.0f}"
    units = iter("kMG")
    unit = ""
    while number >= 999.5 and unit != "G":
        number, unit = number / 1000, next(units)
    digits = 2 if number < 9.995 else 1 if number < 99.95 else 0
    return f"{number:.{digits}f}{unit}"


def table(counts: Mapping[str, int], indent: str = "") -> str:
    """Counts under each other, each with its short form."""
    width = max(map(len, counts))
    return "\n".join(
        f"{indent}{name:<{width}}  {count:>14,}  {amount(count):>6}"
        for name, count in counts.items()
    )


def render(found: Mapping[str, Any]) -> str:
    """The description as text."""
    lines = _render_single(found) if found["kind"] == "single" else _render_pair(found)
    weights = found["weights"]
    if weights:
        kinds = ", ".join(f"{count} {kind}" for kind, count in weights["dtypes"].items())
        lines.append(
            f"weights      {', '.join(weights['files'])}: {amount(weights['bytes'])}B, "
            f"{weights['tensors']} tensors ({kinds})"
        )
        for why, count in Counter(weights.get("ignored", {}).values()).items():
            lines.append(f"ignored      {count} tensors: {why}")
    tokenizers = found["tokenizers"]
    if tokenizers:
        source, target = (
            f"{t['kind']}, {t['vocabulary']} tokens"
            for t in (tokenizers["source"], tokenizers["target"])
        )
        both = source if tokenizers["shared"] else f"source {source}; target {target}"
        lines.append(f"tokenizer    {both}")
    for problem in found["problems"]:
        lines.append(f"{'PROBLEM' if problem['fatal'] else 'note':<12} {problem['what']}")
        lines.append(f"{'':<12} -> {problem['fix']}")
    return "\n".join(lines)


def _render_pair(found: Mapping[str, Any]) -> list[str]:
    encoder, decoder, tied = found["encoder"], found["decoder"], found["tied"]
    names = f"{encoder['family']} encoder, {decoder['family']} decoder"
    if found["kind"] == "whole":
        names = f"{decoder['family']}, encoder and decoder published as one model"
    shared = [
        text
        for text, holds in (
            ("head with the token embedding", tied["head_to_embedding"]),
            ("token embeddings of both sides", tied["embeddings"]),
            ("decoder with the encoder, layer by layer", tied["decoder_to_encoder"]),
        )
        if holds
    ]
    project = found["projection"]
    lines = [
        f"{found['path']}: {names}, {amount(found['parameters']['total'])} parameters",
        f"encoder      {_say(encoder)}",
        f"decoder      {_say(decoder)}",
        f"projection   {f'{project[0]} -> {project[1]}' if project else 'none: widths are equal'}",
        f"tied         {'; '.join(shared) or 'nothing'}",
        "parameters",
        table(found["parameters"], indent=" " * 13),
    ]
    ids = [
        f"{name} {value['value']} ({value['from']})" if value else f"{name} undefined"
        for name, value in found["ids"].items()
    ]
    lines.append(f"ids          {'; '.join(ids)}")
    settings = ", ".join(f"{k}={v}" for k, v in found["generation"]["set"].items())
    origin = f" ({found['generation']['from']})" if settings else ""
    lines.append(f"generation   {settings or 'defaults: greedy, 20 new tokens'}{origin}")
    return lines


def _render_single(found: Mapping[str, Any]) -> list[str]:
    model, path = found["model"], found["path"]
    lines = [
        f"{path}: a single {model['family']}, which can be one side of a pair",
        f"model        {_say(model)}",
    ]
    for role, side in found["as"].items():
        if not side["fits"]:
            lines.append(f"as {role:<9} no: {side['why']}")
            continue
        new = f"; new: {', '.join(side['new_parts'])}, {amount(side['new'])}" if side["new"] else ""
        lines.append(f"as {role:<9} {amount(side['parameters'])} parameters{new}")
    for role, arguments in (("encoder", f"{path!r}, DECODER"), ("decoder", f"ENCODER, {path!r}")):
        if found["as"].get(role, {}).get("fits"):
            lines.append(
                f"to join      EncoderDecoderModel.from_encoder_decoder_pretrained({arguments})"
            )
    return lines


def _say(part: Mapping[str, Any]) -> str:
    window = f", windows of {part['window']} to either side" if part["window"] else ""
    positions = f"up to {part['positions']} tokens" if part["positions"] else "any length"
    return (
        f"{part['family']}: {part['layers']} layers, width {part['width']}, "
        f"{part['heads']} heads of {part['head_dim']}, feed-forward {part['feed_forward']} "
        f"({part['activation']}), vocabulary {part['vocabulary']}, {positions}{window}"
    )
