"""`jax-encdec generate`: texts from the command line or a file, predictions to the terminal or a
file.

Input is checked, and whether the output can be written, before the model is loaded, so that what is
wrong with them shows at once. A file is streamed, whatever its size, and a run that was killed goes
on with the same command.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import math
import os
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from jax_encdec.cli import hub_options, hub_parser
from jax_encdec.cli.arguments import add_job_options, connected, positive
from jax_encdec.cli.compilation_cache import add_cache_option, use_cache
from jax_encdec.cli.generation_options import add_generation_options, generation_options
from jax_encdec.errors import InputError
from jax_encdec.text_files import KINDS, Record, TextFile, read_texts

if TYPE_CHECKING:
    from jax.sharding import Mesh


def add_parser(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser = subparsers.add_parser(
        "generate",
        parents=[hub_parser()],
        help="generate from texts with a trained pair",
        description="Generate from texts; without --output, one prediction per line is printed "
        "(line breaks inside a prediction become spaces). Files may be of any size; a run that was "
        "killed goes on with the same command.",
    )
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="what to generate from")
    parser.add_argument("--model", required=True, help="folder, weight file or hub repository id")
    parser.add_argument("--input", metavar="FILE", help=f"{KINDS}; -: lines of standard input")
    parser.add_argument("--output", metavar="FILE", help="to write: .jsonl, .csv, .tsv, .txt")
    parser.add_argument(
        "--stream", action="store_true", help="print the prediction of one TEXT while it is made"
    )
    parser.add_argument(
        "--restart",
        action="store_true",
        help="begin the output anew where an earlier run was killed; without it that run goes on",
    )
    parser.add_argument(
        "--source-column", metavar="NAME", help="column of the input's texts (default: source/text)"
    )
    parser.add_argument("--batch-size", type=positive, default=16, help="(default: 16)")
    parser.add_argument(
        "--mesh",
        metavar="AXES",
        help="split the work over all devices, as in replica=2,tensor=4: texts of a batch over "
        "replica and fsdp, heads and vocabulary over tensor; the predictions stay the same "
        "(default: one device; of several processes all, texts split)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16", "auto"),
        default="float32",
        help="of parameters and computation; auto: as in the file (default: float32)",
    )
    parser.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the weights that matrices multiply by; bfloat16: half the bytes to read, sums "
        "stay in float32 (default: float32)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of what --do-sample draws (default: 0)"
    )
    parser.add_argument("--truncation", action="store_true", help="cut sources that are too long")
    add_job_options(parser)
    add_cache_option(parser)
    add_generation_options(parser)


def run(args: argparse.Namespace) -> int:
    """Generate; see `add_parser` for the arguments."""
    options = generation_options(args)
    if args.stream and (args.input or args.output or len(args.texts) != 1):
        raise InputError("--stream prints the prediction of one TEXT; give one, and no file")
    source = _source(args)
    if args.output:
        from jax_encdec.prediction_files import check_output

        check_output(args.output)
    elif args.restart:
        raise InputError("--restart needs an --output to begin anew")
    total = sum(1 for _ in source)  # And all lines are well-formed.
    with connected(args) as several, _explained(args):
        if several and args.input == "-":
            raise InputError("several processes cannot read one standard input; name a file")
        _generate(args, options, source, total, several)
    return 0


def _source(args: argparse.Namespace) -> Iterable[Record]:
    if args.texts and args.input:
        raise InputError("give texts or --input, not both")
    if args.texts:
        if args.source_column:
            raise InputError("--source-column needs an --input that has columns")
        records = [Record(text, f"text {i}") for i, text in enumerate(args.texts, 1)]
        for record in records:
            if not record.text.strip():
                raise InputError(f"{record.where} is empty; leave it out")
        return records
    if not args.input:
        raise InputError("nothing to generate from: give texts, --input FILE, or --input -")
    if args.input == "-":
        return read_texts(sys.stdin.buffer.read(), "standard input", ".txt", args.source_column)
    return TextFile(args.input, args.source_column)


def _generate(
    args: argparse.Namespace,
    options: dict[str, Any],
    source: Iterable[Record],
    total: int,
    several: bool,
) -> None:
    import jax

    from jax_encdec import hub
    from jax_encdec.file_generation import fitting_size
    from jax_encdec.pipeline import Text2TextPipeline
    from jax_encdec.prediction_files import Printed
    from jax_encdec.pretrained import read_configs

    use_cache(args)
    mesh = _mesh(args, several)
    place = hub.resolve(args.model, **hub_options(args))
    config, defaults = read_configs(place)
    settings = defaults.replace(**options)
    settings.validate(config.target_vocabulary)
    if mesh is None:
        lanes = max(settings.num_beams or 1, settings.num_return_sequences or 1)
        layout = {"rows": lanes * fitting_size(total, args.batch_size), "precision": args.precision}
        pipe = Text2TextPipeline.from_pretrained(place, dtype=args.dtype, **layout)
    else:
        pipe = Text2TextPipeline.from_pretrained(place, dtype=args.dtype, mesh=mesh)
        if args.precision != "float32":  # Kernels stay in the order in which they are split.
            pipe.params = pipe.model.prepare(pipe.params, precision=args.precision)
    key = jax.random.key(args.seed)
    first = jax.process_index() == 0
    if args.stream:
        for piece in pipe.stream(args.texts[0], truncation=args.truncation, key=key, **options):
            if first:
                print(piece, end="", flush=True)
        if first:
            print()
        return
    done = pipe.generate_records(
        source,
        args.output or Printed(sys.stdout),
        batch_size=args.batch_size,
        truncation=args.truncation,
        restart=args.restart,
        total=total,
        progress=sys.stderr.isatty(),
        key=key,
        **options,
    )
    if args.output and first:
        earlier = f" ({done.resumed} of them by an earlier run)" if done.resumed else ""
        print(
            f"{done.texts} predictions in {done.seconds:.1f} s, "
            f"{done.tokens / done.seconds:,.0f} tokens/s{earlier}: {args.output}",
            file=sys.stderr,
        )


def _mesh(args: argparse.Namespace, several: bool) -> Mesh | None:
    """The mesh that was asked for; it is to split batches, unless one text is streamed."""
    if args.mesh is None and not several:
        return None
    from jax_encdec.training.sharding import BATCH_AXES, make_mesh

    mesh = make_mesh(args.mesh or "replica=-1")
    parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if args.batch_size % parts and not args.stream:
        raise InputError(
            f"--batch-size is {args.batch_size}, which must divide by replica x fsdp = {parts} of "
            f"the mesh; {max(args.batch_size // parts, 1) * parts} would do"
        )
    return mesh


@contextlib.contextmanager
def _explained(args: argparse.Namespace) -> Iterator[None]:
    """Say what went wrong in terms of the command line."""
    import jax

    try:
        yield
    except InputError as error:
        message = str(error).replace("truncation=True", "--truncation")
        raise InputError(message.replace("restart=True", "--restart")) from None
    except OSError as error:
        if error.errno != errno.ENOSPC or not args.output:
            raise
        raise InputError(
            f"{args.output}: no space left on the device; what is done is kept in "
            f"{args.output}.partial, and the same command goes on when there is space again"
        ) from None
    except KeyboardInterrupt:
        kept = f"{args.output}.partial"
        if not args.output or not os.path.exists(kept):
            raise
        message = f"what is done is kept in {kept}; the same command goes on"
        raise KeyboardInterrupt(message) from None
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise InputError(
            f"the device has too little memory for batches of {args.batch_size}; "
            f"lower --batch-size or --num-beams, or pass --dtype bfloat16"
        ) from None
