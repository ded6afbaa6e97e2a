"""`jax-encdec export`: a pair and its search as one file that runs on jax, numpy and tokenizers."""

from __future__ import annotations

import argparse
from typing import Any

from jax_encdec.cli import hub_options, hub_parser
from jax_encdec.cli.generation_options import add_generation_options, generation_options


def add_parser(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser = subparsers.add_parser(
        "export",
        parents=[hub_parser()],
        help="write a pair as one file that needs only jax, numpy and tokenizers",
        description="Write weights, tokenizers and the whole search, lowered to StableHLO for each "
        "platform and shape, as one file for `jax_encdec.load_exported`. Numbers that are set, and "
        "lengths up to what is given here, remain arguments; the rest is fixed.",
    )
    parser.add_argument("model", metavar="MODEL", help="folder, weight file or hub repository id")
    parser.add_argument("out", metavar="OUT", help="file to write, say summaries.jaxed")
    parser.add_argument(
        "--platforms",
        type=_names,
        default=("cpu", "cuda", "tpu"),
        metavar="P,...",
        help="out of cpu, cuda, tpu, rocm (default: cpu,cuda,tpu)",
    )
    parser.add_argument(
        "--batch", type=_sizes, default=(1, 8), metavar="N,...", help="batch sizes (default: 1,8)"
    )
    parser.add_argument(
        "--source-length",
        type=_sizes,
        default=(128,),
        metavar="N,...",
        help="source lengths in tokens (default: 128)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16", "auto"),
        default="float32",
        help="of parameters and computation; auto: as in the file (default: float32)",
    )
    parser.add_argument(
        "--no-tokenizer", action="store_true", help="leave the tokenizers out: token ids only"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")
    parser.later = add_generation_options


def run(args: argparse.Namespace) -> int:
    """Export and print what was written; see `add_parser` for the arguments."""
    options = generation_options(args)

    from jax_encdec import hub
    from jax_encdec.cli.inspect import amount
    from jax_encdec.decoding.export import export
    from jax_encdec.pretrained import from_pretrained
    from jax_encdec.tokenization import TokenizerPair

    place = hub.resolve(args.model, **hub_options(args))
    tokenizers = None if args.no_tokenizer else TokenizerPair.from_pretrained(place)
    model, params = from_pretrained(place, dtype=args.dtype)
    done = export(
        model,
        params,
        args.out,
        tokenizers=tokenizers,
        platforms=args.platforms,
        batch=args.batch,
        source_length=args.source_length,
        overwrite=args.overwrite,
        **options,
    )
    print(f"{done.path}: {amount(done.nbytes)}B")
    for platform, batch, length, nbytes in done.programs:
        print(
            f"  {platform}, batch {batch}, source length {length}: {amount(nbytes)}B of StableHLO"
        )
    numbers = ", ".join(f"{name} ({value})" for name, value in done.adjustable.items())
    print(f"can be changed: {numbers}")
    return 0


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _sizes(text: str) -> tuple[int, ...]:
    parts = _names(text)
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"expected sizes such as 1,8; got {text!r}")
    return tuple(map(int, parts))
