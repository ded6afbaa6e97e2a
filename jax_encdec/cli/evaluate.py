"""`jax-encdec evaluate`: a model's loss and scores on a file, beside what costs nothing.

The model is a saved pair, or a run of `jax-encdec train`, whose configuration then says how its
data is read and texts are generated; flags win over it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax_encdec.cli import hub_options, hub_parser
from jax_encdec.cli.arguments import positive
from jax_encdec.cli.compilation_cache import add_cache_option, use_cache
from jax_encdec.cli.train import explained_memory
from jax_encdec.errors import InputError

if TYPE_CHECKING:
    from jax_encdec.training.config import TrainingConfig
    from jax_encdec.training.evaluation import EvaluationResult

_KEYS = {
    "data": (
        "format",
        "source_column",
        "target_column",
        "source_prefix",
        "max_source_length",
        "max_target_length",
        "bad_rows",
        "max_line_bytes",
        "csv_quoting",
        "workers",
    ),
    "evaluation": (
        "num_beams",
        "max_length",
        "min_length",
        "length_penalty",
        "no_repeat_ngram_size",
        "early_stopping",
        "repetition_penalty",
        "batch_size",
        "metrics",
        "bleu_tokenizer",
        "baselines",
        "shown",
    ),
    "execution": ("mesh", "attention"),
}
"""What of the configuration an evaluation follows."""

_COLUMNS = {
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "rougeLsum": "ROUGE-Lsum",
    "bleu": "BLEU",
    "chrf": "chrF",
    "exact_match": "exact match",
}
_WIDTH = 300


def add_parser(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser = subparsers.add_parser(
        "evaluate",
        parents=[hub_parser()],
        help="loss, ROUGE, BLEU and chrF of a model on a file",
        usage="jax-encdec evaluate --model M [--data FILE ...] [options]",
        description="Measure a model's loss on pairs of texts, generate a text from each source, "
        "and score them beside the first sentence of each source, and the best one.",
    )
    parser.add_argument(
        "--model",
        required=True,
        help="folder, weight file or hub repository id of a saved pair; or the folder of a run",
    )
    parser.add_argument(
        "--data", nargs="+", metavar="FILE", help="files of pairs (default: those of the run)"
    )
    parser.add_argument(
        "--split",
        choices=("train", "validation", "test"),
        default="test",
        help="which of the run's files, where --data is not given (default: test)",
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="take the first N pairs only")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16", "auto"),
        default="float32",
        help="of parameters and computation; auto: as in the file (default: float32)",
    )
    parser.add_argument("--output", metavar="FILE.jsonl", help="where to write all predictions")
    add_cache_option(parser)
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    parser.set_defaults(run=run)
    parser.later = _add_options


def _add_options(parser: argparse.ArgumentParser) -> None:
    from jax_encdec.training.config_io import add_flags

    only = {f"{section}.{name}" for section, names in _KEYS.items() for name in names}
    add_flags(parser, only)


def run(args: argparse.Namespace) -> int:
    """Evaluate; see `add_parser` for the arguments."""
    place, config, files = _read(args)
    _check_output(args.output)
    with explained_memory():
        found = _evaluate(args, place, config, files)
    if args.output:
        _write(Path(args.output), found)
        print(f"{len(found.predictions)} predictions: {args.output}", file=sys.stderr)
    if args.json:
        numbers = found.to_dict() | {"intervals": dict(found.intervals)}
        print(json.dumps(numbers))
    else:
        print("\n".join(table(found)))
    return 0


def _read(args: argparse.Namespace) -> tuple[str, TrainingConfig, tuple[str, ...]]:
    """The model's place, the configuration, and the files."""
    from jax_encdec.training import config_io

    folder = Path(args.model).expanduser()
    is_run = (folder / "config.toml").is_file() and not (folder / "config.json").is_file()
    if is_run and not (folder / "model").is_dir():
        raise InputError(f"{folder} is a run that has not written its model yet: {folder}/model")
    config = config_io.load(folder / "config.toml" if is_run else None, args.overrides or ())
    files = tuple(args.data or (getattr(config.data, args.split) if is_run else ()))
    if not files:
        of = f"the run {folder} has no {args.split} data" if is_run else "nothing to evaluate on"
        raise InputError(f"{of}: name files with --data")
    limit = args.limit if args.data or args.limit else config.data.limit(args.split)
    config = config.replace(data={"pack": False, f"max_{args.split}_samples": limit})
    return str(folder / "model" if is_run else args.model), config, files


def _evaluate(
    args: argparse.Namespace, place: str, config: TrainingConfig, files: tuple[str, ...]
) -> EvaluationResult:
    from jax_encdec import hub, pretrained
    from jax_encdec.tokenization import TokenizerPair
    from jax_encdec.training import evaluation, models, scores
    from jax_encdec.training.dataset import tokenize
    from jax_encdec.training.loading import load_sharded
    from jax_encdec.training.sharding import make_mesh

    use_cache(args)
    scores.check_metrics(config.evaluation.metrics)
    found = hub.resolve(place, **hub_options(args))
    tokenizers = TokenizerPair.from_pretrained(found)
    pair, defaults = pretrained.read_configs(found)
    models.check_generation(models.generation_of(defaults, config.evaluation), pair)
    mesh = make_mesh(config.execution.mesh)
    model, params = load_sharded(found, mesh, dtype=args.dtype)
    model = model.clone(execution=models.execution_of(config.execution))
    data = tokenize(files, tokenizers, config.data, args.split, model=model)
    return evaluation.evaluate(model, params, tokenizers, data, config.evaluation, mesh=mesh)


# Output ------------------------------------------------------------------------------------------


def _check_output(output: str | None) -> None:
    """Refuse a file that could not be written, before anything is computed."""
    if output is None:
        return
    path = Path(output)
    if path.suffix != ".jsonl":
        raise InputError(f"--output must end in .jsonl; got {output!r}")
    if path.is_dir():
        raise InputError(f"--output {output} is a folder; expected a file")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError(f"--output {output} cannot be written: no such folder, or not writable")


def _write(path: Path, found: EvaluationResult) -> None:
    from jax_encdec.hub import write_bytes

    lines = [json.dumps(s._asdict(), ensure_ascii=False) + "\n" for s in found.predictions]
    write_bytes(path, "".join(lines).encode("utf-8"))


def table(found: EvaluationResult) -> Iterator[str]:
    """Loss, scores beside baselines, and some predictions, as lines for a terminal."""
    yield (
        f"loss {found.loss:.4f} nats per token, accuracy {found.accuracy:.2%}, "
        f"{int(found.weight):,} tokens"
    )
    yield f"{len(found.predictions):,} predictions, {found.distinct:.1%} of them distinct"
    yield ""
    columns = [name for name in _COLUMNS if name in found.scores]
    rows = [("", [_COLUMNS[name] for name in columns])]
    rows.append(("model", [f"{found.scores[name]:.2f}" for name in columns]))
    rows.append(("  95 % between", [_between(found.intervals.get(name)) for name in columns]))
    names: Mapping[str, str] = {"lead": "first sentence", "best_sentence": "best sentence"}
    for name, scores in found.baselines.items():
        rows.append((names[name], [f"{scores[column]:.2f}" for column in columns]))
    first = max(len(label) for label, _ in rows)
    widths = [max(len(cells[i]) for _, cells in rows) for i in range(len(columns))]
    for label, cells in rows:
        padded = "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        yield f"{label:<{first}}  {padded}".rstrip()
    yield from (f"{name}: {text}" for name, text in found.signatures.items())
    for sample in found.samples:
        yield ""
        for label, text in zip(("source", "reference", "prediction"), sample, strict=True):
            line = " ".join(text.split())
            cut = line if len(line) <= _WIDTH else f"{line[:_WIDTH]} ..."
            yield f"  {label:<10}  {cut}"


def _between(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.1f}-{interval[1]:.1f}"
