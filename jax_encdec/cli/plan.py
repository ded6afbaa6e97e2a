"""`jax-encdec plan`: whether a run fits a pod, what it communicates, how fast it can be at best.

The machine need not be there: its compiler is. The model's configuration is read, its weights are
not. All that a run's configuration says counts here, too; what a plan is mostly asked with has
short flags.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax_encdec.cli.arguments import positive
from jax_encdec.errors import InputError

if TYPE_CHECKING:
    from jax_encdec import EncoderDecoderConfig
    from jax_encdec.training.config import ModelConfig, TrainingConfig
    from jax_encdec.training.plan import Plan, PlanRequest

_DESCRIPTION = """\
Compile the training step for machines that are not here, and say whether it fits:

  jax-encdec plan --topology v5e:4x4 --model my-pair --batch 256 --mesh fsdp=16
  jax-encdec plan --topology v5p:2x2x2 --slices 2 --model google-t5/t5-base
  jax-encdec plan run.toml --gpu h100:8 --remat full

It prints the bytes on each device, parameters that a mesh does not divide, FLOPs, communication by
kind, and an upper bound on utilisation from published figures; where the mesh asked for does not
fit, it looks for one that does."""

_SHORT = {
    "batch": ("data.batch_size", "N", "rows of the global batch (default: 32)"),
    "source_length": ("data.max_source_length", "N", "tokens of a source (default: 512, or the "
                      "model's most)"),
    "target_length": ("data.max_target_length", "N", "tokens of a target (default: 128)"),
    "optimizer": ("optimizer.name", "NAME", "adamw, adafactor or lion"),
}  # fmt: skip
_KINDS = {
    "all-gather": "all-gather",
    "reduce-scatter": "reduce-scatter",
    "all-reduce": "all-reduce",
    "all-to-all": "all-to-all",
    "collective-permute": "permute",
}


def add_parser(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser = subparsers.add_parser(
        "plan",
        help="whether a run fits a TPU pod or GPUs that are not here",
        usage="jax-encdec plan [CONFIG.toml] --topology KIND:SHAPE --model M [options]",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", nargs="?", metavar="CONFIG.toml", help="of `jax-encdec train`")
    parser.add_argument("--topology", metavar="KIND:SHAPE", help="TPUs, such as v5e:4x4")
    parser.add_argument("--gpu", metavar="KIND:N", help="GPUs of one host, such as h100:8")
    parser.add_argument(
        "--slices", type=positive, default=1, metavar="N", help="TPU slices (default: 1)"
    )
    parser.add_argument(
        "--model", metavar="M", help="folder, config.json or hub id of a pair, or ENCODER+DECODER"
    )
    for name, (_, metavar, text) in _SHORT.items():
        parser.add_argument(f"--{name.replace('_', '-')}", metavar=metavar, help=text)
    parser.add_argument(
        "--effort",
        choices=("low", "full"),
        default="low",
        help="of the compiler: low is quicker, full gives the very program that would run",
    )
    parser.add_argument(
        "--no-proposal", action="store_true", help="look for no other mesh where one does not fit"
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.set_defaults(run=run)
    parser.later = _add_options


def _add_options(parser: argparse.ArgumentParser) -> None:
    from jax_encdec.training.config_io import add_flags, all_keys

    sections = ("model.", "optimizer.", "execution.", "data.pack")
    add_flags(parser, {key for key in all_keys() if key.startswith(sections)})


def run(args: argparse.Namespace) -> int:
    """Plan; see `add_parser` for the arguments.

    Returns:
        0; or 1 where the step does not fit.
    """
    from jax_encdec.training.plan import Planner, propose

    request, notes = read(args)
    with Planner(request) as planner:
        found = [planner.plan(request)]
        found[0] = dataclasses.replace(found[0], notes=notes + found[0].notes)
        if not args.json:
            print(text(found[0]), flush=True)
        if not found[0].fits and not args.no_proposal:
            for other in propose(planner, found[0]):
                found.append(other)
                if not args.json:
                    print(f"\ntried {_how(other)}: {_verdict(other)}", flush=True)
    if args.json:
        out = found[0].to_json() | {"proposals": [plan.to_json() for plan in found[1:]]}
        json.dump(out, sys.stdout, indent=1)
        print()
    elif found[-1].fits and len(found) > 1:
        print(f"\n{text(found[-1])}\n\nproposal: {_how(found[-1])}")
    elif len(found) > 1:
        print("\nno mesh of these devices was found to fit; take more of them, or fewer rows")
    return 0 if found[0].fits else 1


def read(args: argparse.Namespace) -> tuple[PlanRequest, tuple[str, ...]]:
    """The request that a command line describes, and what it takes for granted.

    Raises:
        EncDecError: it names no machine or no model, or one that cannot be had.
    """
    from jax_encdec.training import config_io
    from jax_encdec.training.plan import PlanRequest, missing

    if (args.topology is None) == (args.gpu is None):
        raise InputError(
            "name the machines: --topology v5e:4x4 for TPUs, or --gpu h100:8"
            if args.gpu is None
            else "give --topology or --gpu, not both"
        )
    if sentence := missing(args.gpu is not None):
        raise InputError(sentence)
    overrides: list[Any] = list(args.overrides or ())
    for name, (key, *_) in _SHORT.items():
        if (value := getattr(args, name)) is not None:
            flag = f"--{name.replace('_', '-')}"
            overrides.append(config_io.Override(key, (value,), flag))
    if args.model is not None:
        overrides += _model_overrides(args.model)
    config = config_io.load(args.config, overrides)
    if config.model.kind is None:
        raise InputError("name a model: --model folder, config.json, hub id, or ENCODER+DECODER")
    model = pair(config.model)
    source, from_source = _length(config, "source", model.encoder_trunk.max_length, 512)
    target, from_target = _length(config, "target", model.decoder_trunk.max_length, 128)
    request = PlanRequest(
        model=model,
        topology=(args.gpu or args.topology).lower(),
        slices=args.slices,
        batch_size=_rows(config),
        source_length=source,
        target_length=target,
        packed=config.data.pack,
        dropout=config.model.dropout != 0.0,
        optimizer=config.optimizer,
        execution=dataclasses.replace(config.execution, batch_size_per_device=None),
        effort=args.effort,
    )
    return request, tuple(note for note in (from_source, from_target) if note)


def _length(
    config: TrainingConfig, side: str, most: int | None, usual: int
) -> tuple[int, str | None]:
    """The longest shape of a side's rows, and a note where nothing says what it is."""
    buckets = getattr(config.data, f"{side}_buckets")
    stated = max(buckets) if buckets else getattr(config.data, f"max_{side}_length")
    if stated is not None:
        return stated, None
    length = min(usual, most or usual)
    return length, (
        f"a run takes its {side} lengths from the data, which a plan does not read: {length} is "
        f"assumed (--{side}-length)"
    )


def _rows(config: TrainingConfig) -> int:
    if config.execution.batch_size_per_device is not None:
        raise InputError("a plan takes the global batch: give --batch, not a size per device")
    return config.data.batch_size


# The model, without its weights -------------------------------------------------------------------


def _model_overrides(name: str) -> list[Any]:
    from jax_encdec.training.config_io import Override

    if "+" in name and not Path(name).exists():
        encoder, _, decoder = name.partition("+")
        sides = (("encoder", encoder), ("decoder", decoder))
        return [Override(f"model.{role}", (value,), "--model") for role, value in sides]
    return [Override("model.path", (name,), "--model")]


def pair(wanted: ModelConfig) -> EncoderDecoderConfig:
    """The configuration of the pair that a run would train; no weights are read.

    Raises:
        EncDecError: it cannot be had, or describes no such pair.
    """
    from jax_encdec import EncoderDecoderConfig

    if wanted.kind != "joined":
        place = str(wanted.path or wanted.config)
        config = EncoderDecoderConfig.from_dict(*_json(wanted, place, None))
        sides = {role: getattr(config, role) for role in ("encoder", "decoder")}
        for role, side in sides.items():
            sides[role] = side.replace(**dict(getattr(wanted, f"{role}_options")))
        config = config.replace(**sides)
    else:
        sides = {role: _side(wanted, role) for role in ("encoder", "decoder")}
        tied = wanted.tie_encoder_decoder
        config = EncoderDecoderConfig(**sides, tie_encoder_decoder=tied)
    if config.decoder_start_token_id is None:
        config = config.replace(decoder_start_token_id=0)  # any will do: nothing is computed
    return config if config.pad_token_id is not None else config.replace(pad_token_id=0)


def _side(wanted: ModelConfig, role: Any) -> Any:
    from jax_encdec.families import family_config

    place = getattr(wanted, f"{role}_config") or getattr(wanted, role)
    side = family_config(*_json(wanted, place, role))
    layers = getattr(wanted, f"{role}_layers")
    if layers is not None:
        side = side.with_layers(role, tuple(range(layers)) if isinstance(layers, int) else layers)
    return side.replace(**dict(getattr(wanted, f"{role}_options")))


def _json(wanted: ModelConfig, place: str, role: str | None) -> tuple[dict[str, Any], str]:
    """A config.json and what to call it."""
    from jax_encdec import hub

    options = wanted.hub_options()
    if role is not None:
        options["revision"] = getattr(wanted, f"{role}_revision") or wanted.revision
    file = Path(place).expanduser()
    if not (file.is_file() and file.suffix == ".json"):
        found = hub.resolve(place, weights=False, **options)
        file = (found if found.is_dir() else found.parent) / "config.json"
    return hub.read_json(file), str(file)


# Showing ------------------------------------------------------------------------------------------


def text(plan: Plan) -> str:
    """A plan for people."""
    request = plan.request
    many = f"{request.slices} x " if request.slices > 1 else ""
    lines = [
        f"{many}{request.topology}: {plan.devices} devices of {request.chip.name}, mesh "
        f"{_mesh(plan.mesh)}",
        f"{plan.parameters:,} parameters; {request.batch_size} rows of {request.source_length} + "
        f"{request.target_length} tokens, {_how(plan)}",
        "",
        *_memory(plan),
        "",
        *_placements(plan),
        *_collectives(plan),
        *_speed(plan),
        *(f"note: {note}" for note in plan.notes),
    ]
    return "\n".join(lines)


def _how(plan: Plan) -> str:
    execution = plan.request.execution
    optimizer = plan.request.optimizer
    parts = [f"mesh {_mesh(plan.mesh)}", optimizer.preset or optimizer.name or "adamw"]
    parts += [f"{execution.dtype}", f"remat {execution.remat}"]
    if execution.accumulate > 1:
        parts.append(f"accumulate {execution.accumulate}")
    if execution.loss_chunk:
        parts.append(f"loss_chunk {execution.loss_chunk}")
    return ", ".join(parts)


def _mesh(mesh: dict[str, int]) -> str:
    return ",".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "fsdp=1"


def _verdict(plan: Plan) -> str:
    needed, usable = size(plan.needed), size(plan.usable)
    if plan.fits:
        return f"fits, {needed} of {usable}"
    return f"does not fit: at least {needed} of {usable}"


def _memory(plan: Plan) -> list[str]:
    memory = plan.memory
    rows = [("parameters", memory["parameters"]), ("moments", memory["moments"])]
    if memory["average"]:
        rows.append(("average", memory["average"]))
    if "temporaries" in memory:
        rows.append(("temporaries", memory["temporaries"]))
    rows.append(("  activations kept", memory["activations"]))
    if "program" in memory:
        rows += [("program", memory["program"]), ("batch, padding", memory["other"])]
    lines = [f"{'on each device':<22}{'bytes':>12}"]
    lines += [f"{name:<22}{size(value):>12}" for name, value in rows]
    total = f"{size(plan.needed)} of {size(plan.usable)}"
    compiled = plan.collectives is not None
    least = "" if compiled else "at least "
    return [*lines, f"{'total':<22}{least + total:>12}: {'fits' if plan.fits else 'DOES NOT FIT'}"]


def _placements(plan: Plan) -> list[str]:
    if not plan.placements:
        return ["every parameter is divided as the rules say", ""]
    lines = ["what the mesh does not divide"]
    for row in plan.placements:
        lines.append(f"  {row['path']} {row['shape']}: {row['note']}")
    return [*lines, ""]


def _collectives(plan: Plan) -> list[str]:
    if plan.collectives is None:
        return []
    if not plan.collectives:
        return ["nothing is communicated", ""]
    lines = [f"{'each device, each step':<28}{'times':>8}{'of bytes':>12}{'sends':>12}"]
    for c in plan.collectives:
        name = _KINDS[c["kind"]] + (" across slices" if c["across_slices"] else "")
        lines.append(f"  {name:<26}{c['count']:>8}{size(c['bytes']):>12}{size(c['sent']):>12}")
    return [*lines, ""]


def _speed(plan: Plan) -> list[str]:
    flops = plan.flops["train_step"] / plan.devices
    lines = [f"{flops / 1e9:,.1f} GFLOP of matrix products on each device, by our own count"]
    if plan.bound is not None and plan.utilisation is not None:
        bound = plan.bound
        parts = [
            f"{name} {1e3 * value:.3g} ms"
            for name in ("compute", "memory", "links", "network")
            if (value := getattr(bound, name)) > 0
        ]
        lines.append(f"a step takes at the least: {', '.join(parts)}")
        lines.append(
            f"utilisation is at most {plan.utilisation:.0%} of peak, limited by {bound.limit}"
        )
    if plan.seconds:
        lines.append(f"compiled in {plan.seconds:.0f} s, effort {plan.request.effort}")
    return lines


def size(value: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"
