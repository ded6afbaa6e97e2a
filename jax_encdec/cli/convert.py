"""`jax-encdec convert`: a pair in any readable format to safetensors, `.bin` or msgpack."""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from typing import Any

from jax_encdec.cli import hub_options, hub_parser

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def add_parser(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser = subparsers.add_parser(
        "convert",
        parents=[hub_parser()],
        help="write a pair as safetensors that PyTorch opens",
        description="Write a pair, from any format that can be read, as a folder of safetensors "
        "(or of another format) that PyTorch Transformers opens, tokenizer files included.",
    )
    parser.add_argument("src", metavar="SRC", help="folder, weight file or hub repository id")
    parser.add_argument("dst", metavar="DST", help="folder to write, new or empty")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the written weights; auto: each as it is (default: auto)",
    )
    parser.add_argument(
        "--format",
        choices=("safetensors", "bin", "msgpack"),
        default="safetensors",
        help="of the written weights: for today's libraries, old PyTorch, or Flax "
        "(default: safetensors)",
    )
    parser.add_argument(
        "--max-shard-size",
        type=size,
        default="5GB",
        metavar="SIZE",
        help="largest weight file: 500MB, 2GiB, ... (default: 5GB)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the model in DST")


def run(args: argparse.Namespace) -> int:
    """Convert and print what was done; see `add_parser` for the arguments."""
    from tqdm import tqdm

    from jax_encdec.cli.inspect import amount, parameter_counts, table
    from jax_encdec.convert.convert import convert

    with tqdm(unit="tensor", disable=None, file=sys.stderr) as bar:

        def progress(name: str, number: int, total: int) -> None:
            bar.total = total
            bar.set_postfix_str(name, refresh=False)
            bar.update(number - bar.n)

        done = convert(
            args.src,
            args.dst,
            format=args.format,
            dtype=args.dtype,
            max_shard_bytes=args.max_shard_size,
            overwrite=args.overwrite,
            **hub_options(args),
            progress=progress,
        )
    kinds = ", ".join(f"{count} {name}" for name, count in done.dtypes.items())
    print(f"{args.dst}: {amount(done.nbytes)}B of weights ({kinds} tensors)")
    print(f"files: {', '.join(done.files)}")
    print("parameters:")
    print(table(parameter_counts(done.config), indent="  "))
    print(f"source: {dataclasses.replace(done.report, fresh=())}")
    if done.report.fresh:
        print(f"not in the source, and not written: {', '.join(done.report.fresh)}")
    return 0


def size(text: str) -> int:
    """Parse `5GB`, `500MB`, `2GiB` or a number of bytes, for argparse."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?)?B?", text.strip().upper())
    nbytes = int(float(found[1]) * _UNITS[found[2] or ""]) if found else 0
    if nbytes < 1:
        raise argparse.ArgumentTypeError(f"expected a size such as 5GB or 500MiB; got {text!r}")
    return nbytes
