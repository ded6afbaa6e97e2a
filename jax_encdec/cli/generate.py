"""`jax-encdec generate`: texts from the command line or a file, predictions to the terminal or a
file.

Every field of `GenerationConfig` is a flag, derived from the dataclass. Input is read, and the
output file opened, before the model is loaded, so that what is wrong with them shows at once.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from jax_encdec.cli import hub_options, hub_parser
from jax_encdec.decoding.config import GenerationConfig
from jax_encdec.errors import InputError, nearest

_COLUMNS = ("source", "text")  # Looked for in this order unless --source-column names one.
_INPUTS = "lines of text, or .jsonl, .csv, .tsv"
_OUTPUTS = (".jsonl", ".csv", ".tsv", ".txt")
_META = {"int": "N", "float": "X"}
_HELP = {
    "num_beams": "beams of beam search; 1: greedy search or sampling",
    "num_return_sequences": "predictions per text, best first",
    "do_sample": "draw tokens instead of taking the best",
    "max_length": "most tokens of a prediction, start token included",
    "max_new_tokens": "most tokens of a prediction, start token not counted (default: 20)",
    "min_length": "fewest tokens, start token included",
    "min_new_tokens": "fewest tokens, start token not counted",
    "length_penalty": "exponent on the length that divides a beam's score",
    "early_stopping": "when beam search stops: true, false or never",
    "temperature": "divides the logits when sampling",
    "top_k": "draw from the k most probable tokens; 0: from all",
    "top_p": "draw from the fewest tokens whose probabilities sum to p",
    "no_repeat_ngram_size": "no n-gram of this size occurs twice in a prediction",
    "encoder_no_repeat_ngram_size": "no n-gram of this size is copied from the source",
    "repetition_penalty": "above 1: tokens used already become less probable",
    "bad_words_ids": "token sequences never to be produced: [[5, 6], [7]]",
    "forced_bos_token_id": "first token after the start token",
    "forced_eos_token_id": "last token when the maximal length is reached: 2 or [2, 3]",
    "suppress_tokens": "tokens never produced: [5, 6]",
    "begin_suppress_tokens": "tokens never produced first: [5, 6]",
    "decoder_start_token_id": "token that opens every prediction",
    "bos_token_id": "opens predictions where no start token is defined",
    "eos_token_id": "tokens that end a prediction: 2 or [2, 3]",
    "pad_token_id": "token that fills up what has ended",
}


class Record(NamedTuple):
    """A text and where it stands, for error messages."""

    text: str
    where: str


def add_parser(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser = subparsers.add_parser(
        "generate",
        parents=[hub_parser()],
        help="generate from texts with a trained pair",
        description="Generate from texts; without --output, one prediction per line is printed "
        "(line breaks inside a prediction become spaces).",
    )
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="what to generate from")
    parser.add_argument("--model", required=True, help="folder, weight file or hub repository id")
    parser.add_argument("--input", metavar="FILE", help=f"{_INPUTS}; -: lines of standard input")
    parser.add_argument("--output", metavar="FILE", help=f"to write: {', '.join(_OUTPUTS)}")
    parser.add_argument(
        "--source-column", metavar="NAME", help="column of the input's texts (default: source/text)"
    )
    parser.add_argument("--batch-size", type=positive, default=16, help="(default: 16)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16", "auto"),
        default="float32",
        help="of parameters and computation; auto: as in the file (default: float32)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of what --do-sample draws (default: 0)"
    )
    parser.add_argument("--truncation", action="store_true", help="cut sources that are too long")
    group = parser.add_argument_group(
        "generation", "What is not given is as the model's generation_config.json says."
    )
    for field in generation_fields():
        flag = "--" + field.name.replace("_", "-")
        kind = str(field.type).split(" | ")[0]
        if kind == "bool" and "Literal" not in str(field.type):
            how: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        else:
            how = {"type": _value, "metavar": _META.get(kind, "VALUE")}
        group.add_argument(flag, default=argparse.SUPPRESS, help=_HELP.get(field.name), **how)


def run(args: argparse.Namespace) -> int:
    """Generate; see `add_parser` for the arguments."""
    names = [field.name for field in generation_fields()]
    options = {name: getattr(args, name) for name in names if hasattr(args, name)}
    GenerationConfig().replace(**options)
    records = _records(args)
    with _output(args.output) as file:
        texts = [record.text for record in records]
        began = time.perf_counter()
        results = _generate(args, options, records)
        _write(file or sys.stdout, _format(args.output), texts, results)
    if args.output:
        taken = time.perf_counter() - began
        print(f"{len(texts)} predictions in {taken:.1f} s: {args.output}", file=sys.stderr)
    return 0


def generation_fields() -> tuple[dataclasses.Field, ...]:
    """The fields of `GenerationConfig` that are options."""
    return tuple(f for f in dataclasses.fields(GenerationConfig) if f.name != "extra")


def positive(text: str) -> int:
    """Parse a positive integer, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer; got {text!r}")
    return int(text)


def _value(text: str) -> Any:
    """JSON, or else a plain word; GenerationConfig checks what it is."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _generate(
    args: argparse.Namespace, options: dict[str, Any], records: Sequence[Record]
) -> list[list[str]]:
    import jax

    from jax_encdec import hub
    from jax_encdec.pipeline import Text2TextPipeline, TextError
    from jax_encdec.pretrained import read_configs

    place = hub.resolve(args.model, **hub_options(args))
    config, defaults = read_configs(place)
    defaults.replace(**options).validate(config.target_vocabulary)
    pipe = Text2TextPipeline.from_pretrained(place, dtype=args.dtype)
    try:
        results = pipe(
            [record.text for record in records],
            batch_size=args.batch_size,
            truncation=args.truncation,
            progress=sys.stderr.isatty(),
            key=jax.random.key(args.seed),
            **options,
        )
    except TextError as error:
        reason = error.reason.replace("truncation=True", "--truncation")
        raise InputError(f"{records[error.index].where} {reason}") from None
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise InputError(
            f"the device has too little memory for batches of {args.batch_size}; "
            f"lower --batch-size or --num-beams, or pass --dtype bfloat16"
        ) from None
    return [[result] if isinstance(result, str) else result for result in results]


# Input -------------------------------------------------------------------------------------------


def _records(args: argparse.Namespace) -> list[Record]:
    if args.texts and args.input:
        raise InputError("give texts or --input, not both")
    if args.texts:
        if args.source_column:
            raise InputError("--source-column needs an --input that has columns")
        return [Record(text, f"text {i}") for i, text in enumerate(args.texts, 1)]
    if not args.input:
        raise InputError("nothing to generate from: give texts, --input FILE, or --input -")
    if args.input == "-":
        records = read_texts(sys.stdin.buffer.read(), "standard input", ".txt", args.source_column)
    else:
        path = Path(args.input)
        records = read_texts(path.read_bytes(), str(path), path.suffix, args.source_column)
    return records


def read_texts(data: bytes, name: str, suffix: str, column: str | None = None) -> list[Record]:
    """Read texts of a file called `name` from its content.

    Args:
        suffix: .jsonl: an object (or a string) per line; .csv, .tsv: a header and rows; .json is
            refused, and everything else is one text per line.
        column: which field of objects and rows; None: "source", or else "text".

    Raises:
        InputError: with the file, the line and what is wrong there.
    """
    try:
        content = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{name}, line {line} is not UTF-8 (byte 0x{data[error.start]:02x}); "
            f"convert the file to UTF-8"
        ) from None
    suffix = suffix.lower()
    if suffix == ".json":
        raise InputError(f"{name}: expected {_INPUTS}; got .json: write one object per line")
    if column and suffix not in (".jsonl", ".csv", ".tsv"):
        raise InputError(f"{name} has no columns for --source-column {column!r}; it is plain text")
    if suffix == ".jsonl":
        records = list(_jsonl(content, name, column))
    elif suffix in (".csv", ".tsv"):
        records = list(_csv(content, name, column, "," if suffix == ".csv" else "\t"))
    else:
        lines = content.removesuffix("\n").split("\n") if content else []
        records = [
            Record(line.removesuffix("\r"), f"{name}, line {i}") for i, line in enumerate(lines, 1)
        ]
    if not records:
        raise InputError(f"{name} holds no texts")
    for record in records:
        if not record.text.strip():
            raise InputError(f"{record.where} is empty; leave it out")
    return records


def _jsonl(content: str, name: str, column: str | None) -> Iterator[Record]:
    for number, line in enumerate(content.split("\n"), 1):
        where = f"{name}, line {number}"
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"{where} is not valid JSON: {error}") from None
        if isinstance(value, dict):
            value = value[_column(where, list(value), column)]
        if not isinstance(value, str):
            raise InputError(f"{where}: the text must be a string; got {type(value).__name__}")
        yield Record(value, where)


def _csv(content: str, name: str, column: str | None, delimiter: str) -> Iterator[Record]:
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(reader, None)
        if header is None:
            return
        place = header.index(_column(f"{name}, line 1", header, column))
        for row in reader:
            where = f"{name}, line {reader.line_num}"
            if not row:
                continue
            if len(row) != len(header):
                raise InputError(
                    f"{where} has {len(row)} fields, the header {len(header)}; "
                    f"quote fields that hold a {delimiter!r}"
                )
            yield Record(row[place], where)
    except csv.Error as error:
        raise InputError(f"{name}, line {reader.line_num} is not valid CSV: {error}") from None


def _column(where: str, names: list[str], wanted: str | None) -> str:
    for name in (wanted,) if wanted else _COLUMNS:
        if name in names:
            return name
    expected = repr(wanted) if wanted else " or ".join(map(repr, _COLUMNS))
    hint = nearest(wanted, names) if wanted else "; name one with --source-column"
    raise InputError(f"{where}: expected a column {expected}; got {', '.join(names)}{hint}")


# Output ------------------------------------------------------------------------------------------


def _format(path: str | None) -> str:
    return Path(path).suffix.lower() if path else ".txt"


@contextmanager
def _output(path: str | None) -> Iterator[TextIO | None]:
    """A file that gets its name when it is complete; None for standard output."""
    if path is None:
        yield None
        return
    target = Path(path)
    if _format(path) not in _OUTPUTS:
        raise InputError(f"--output must end in {', '.join(_OUTPUTS)}; got {path!r}")
    if target.is_dir():
        raise InputError(f"--output {path} is a folder; expected a file")
    try:
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    except OSError as error:
        raise InputError(f"--output {path} cannot be written: {error.strerror}") from None
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            yield file
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _write(file: TextIO, kind: str, texts: Sequence[str], results: Sequence[list[str]]) -> None:
    """Write predictions; several of one text follow each other, or are a list in JSONL."""
    if kind == ".jsonl":
        for text, made in zip(texts, results, strict=True):
            prediction = made[0] if len(made) == 1 else made
            line = {"source": text, "prediction": prediction}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    elif kind in (".csv", ".tsv"):
        writer = csv.writer(file, delimiter="," if kind == ".csv" else "\t", lineterminator="\n")
        writer.writerow(["source", "prediction"])
        for text, made in zip(texts, results, strict=True):
            writer.writerows([text, one] for one in made)
    else:
        for made in results:
            file.writelines(" ".join(one.splitlines()) + "\n" for one in made)
