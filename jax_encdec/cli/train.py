"""`jax-encdec train`: fine-tune a pair as a TOML file and flags say, or go on with a run.

Every key of the configuration is a flag; the flag names of the well-known scripts are taken, too.
What can be wrong with files and flags shows before JAX is imported.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax_encdec.cli.arguments import add_job_options, connected
from jax_encdec.cli.compilation_cache import add_cache_option, use_cache
from jax_encdec.errors import InputError

if TYPE_CHECKING:
    from jax_encdec.training.config import TrainingConfig

_DESCRIPTION = """\
Fine-tune a pair, on whatever devices there are. All that a run is made of stands in one TOML file
of the sections below, or in flags, which win over it:

  jax-encdec train run.toml
  jax-encdec train run.toml --learning-rate 1e-4 --output runs/second
  jax-encdec train --encoder google-bert/bert-base-uncased --decoder google-bert/bert-base-uncased
      --train train.jsonl --validation valid.jsonl --epochs 3
  jax-encdec train --resume runs/second

A flag is named by section and key; the key alone will do where only one section has it
(--learning-rate). The flag names of run_summarization, run_translation and
Seq2SeqTrainingArguments are accepted (--model_name_or_path, --train_file, --text_column,
--per_device_train_batch_size, --num_train_epochs, --output_dir, ...): only the names, what is not
given has the defaults below; sizes per device are multiplied by the number of devices when the
run starts."""


def add_parser(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser = subparsers.add_parser(
        "train",
        help="fine-tune a pair: saved, or two checkpoints joined",
        usage="jax-encdec train [CONFIG.toml] [--set SECTION.KEY=VALUE] [--resume RUN] "
        "[--dry-run] [flags]",
        description=_DESCRIPTION,
        formatter_class=_Formatter,
    )
    parser.set_defaults(run=run)
    parser.later = _add_options


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=36)


def _add_options(parser: argparse.ArgumentParser) -> None:
    from jax_encdec.training.aliases import add_aliases
    from jax_encdec.training.config_io import add_flags

    parser.add_argument("config", nargs="?", metavar="CONFIG.toml", help="the configuration")
    parser.add_argument(
        "--resume", metavar="RUN", help="go on with the run in this folder, as it was configured"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the configuration as TOML, and as comments what would be done with it",
    )
    add_job_options(parser)
    add_cache_option(parser)
    add_flags(parser)
    add_aliases(parser)


def run(args: argparse.Namespace) -> int:
    """Train; see `add_parser` for the arguments.

    Returns:
        0; or the code of a signal that ended the run early, after a checkpoint.
    """
    config = read(args)
    from jax_encdec.training.host_memory import keep_freed_memory

    keep_freed_memory()
    with connected(args), explained_memory():
        use_cache(args)
        if args.dry_run:
            return _dry_run(config)
        from jax_encdec.training.gather import first_process
        from jax_encdec.training.loop import train

        result = train(config)
        if first_process():
            print(summary(result))
        return result.exit_code


def read(args: argparse.Namespace) -> TrainingConfig:
    """The configuration that a command line describes.

    Raises:
        ConfigError, InputError: it cannot be used, or names no model or no data.
    """
    from jax_encdec.training import aliases, config_io

    overrides, notices = aliases.translate(args.overrides or ())
    for notice in notices:
        warnings.warn(notice, stacklevel=2)
    source = args.config
    if args.resume is not None:
        if args.config is not None:
            raise InputError("give a configuration or --resume, which has its own; not both")
        source = Path(args.resume) / "config.toml"
        if not source.is_file():
            raise InputError(f"--resume {args.resume}: no such run: {source} is not there")
        overrides += [
            config_io.Override("run.output", (args.resume,), "--resume"),
            config_io.Override("run.resume", ("always",), "--resume"),
            config_io.Override("run.overwrite", ("false",), "--resume"),
        ]
    config = config_io.load(source, overrides)
    if config.model.kind is None:
        raise InputError(
            "nothing to train: name a saved pair with --model, or two checkpoints to join with "
            "--encoder and --decoder"
        )
    if not config.data.train:
        raise InputError("nothing to train on: name files with --train, such as train.jsonl")
    return config


def summary(result: Any) -> str:
    """What became of a run, for the terminal."""
    lines = [f"{result.step} steps; {result.why}"]
    for kind, name in (("evaluate", "validation"), ("test", "test")):
        if record := result.metrics.get(kind):
            lines.append(f"{name}: {_scores(record)}")
    folder = shlex.quote(str(result.folder))
    if result.exit_code:
        return "\n".join([*lines, f"go on: jax-encdec train --resume {folder}"])
    lines.append(f"model of step {result.params_step}: {folder}/model, report: {folder}/report.md")
    return "\n".join(lines)


def _scores(record: dict[str, Any]) -> str:
    parts = [f"loss {record['loss']:.4f}"]
    for name in ("rouge1", "rouge2", "rougeL", "bleu", "chrf"):
        if name in record:
            lead = record.get(f"lead_{name}")
            beside = "" if lead is None else f" (first sentence {lead:.2f})"
            parts.append(f"{name} {record[name]:.2f}{beside}")
    return ", ".join(parts)


@contextlib.contextmanager
def explained_memory() -> Iterator[None]:
    """Turn a device's lack of memory into a sentence.

    Raises:
        InputError: a computation did not fit.
    """
    import jax

    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise InputError(
            "the device has too little memory: lower the batch size, set --execution.accumulate, "
            "--execution.loss-chunk, --execution.remat full or --execution.dtype bfloat16, or "
            "lower --evaluation.batch-size"
        ) from None


# Dry runs ----------------------------------------------------------------------------------------


def _dry_run(config: TrainingConfig) -> int:
    import jax

    from jax_encdec.training import run_folder
    from jax_encdec.training.assemble import Given, assemble, facts
    from jax_encdec.training.config_io import to_toml

    resolved = config.resolved(devices=jax.device_count(), platform=jax.default_backend())
    run_folder.check(resolved)
    parts = assemble(
        resolved, Given(), folder=Path(resolved.run.output), resuming=run_folder.saved(resolved.run)
    )
    sys.stdout.write(to_toml(resolved))
    for line in [*_told(facts(parts)), *_placed(parts)]:
        print(f"# {line}".rstrip())
    return 0


def _told(facts: dict[str, Any], indent: str = "") -> Iterator[str]:
    for name, value in facts.items():
        if isinstance(value, dict) and value:
            yield f"{indent}{name}:"
            yield from _told(value, indent + "  ")
        elif value not in (None, [], {}):
            shown = ", ".join(map(str, value)) if isinstance(value, list) else value
            yield (
                f"{indent}{name}: {shown:,}"
                if isinstance(shown, int)
                else f"{indent}{name}: {shown}"
            )


def _placed(parts: Any) -> Iterator[str]:
    """How each parameter lies on the mesh, and why where that is not plain."""
    from jax_encdec.training.sharding import placements

    if parts.mesh.size == 1:
        yield "placement: all on one device"
        return
    yield "placement:"
    for path, placement in placements(parts.model, parts.mesh, parts.rules).items():
        note = f"  ({placement.note})" if placement.note else ""
        axes = ", ".join("-" if axis is None else str(axis) for axis in placement.spec)
        yield f"  {'/'.join(path)} {list(placement.shape)}: [{axes}]{note}"
