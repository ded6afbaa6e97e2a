"""What several commands take: positive numbers, and how the processes of a job find each other."""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager


def positive(text: str) -> int:
    """Parse a positive integer, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer; got {text!r}")
    return int(text)


def add_job_options(parser: argparse.ArgumentParser) -> None:
    """Declare how the processes of a job find each other."""
    group = parser.add_argument_group(
        "several processes", "by default as the environment says (JAX_..., SLURM, a TPU pod)"
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    group.add_argument("--num-processes", type=int, metavar="N", help="processes of the job")
    group.add_argument("--process-id", type=int, metavar="N", help="which one this is, from 0")
    group.add_argument(
        "--heartbeat-timeout",
        type=positive,
        metavar="SECONDS",
        help="without a sign of life, after which a process is taken for dead and the others end "
        "(default: 20)",
    )


def connected(args: argparse.Namespace) -> AbstractContextManager[bool]:
    """The job that the options describe; yields whether it has other processes."""
    from jax_encdec.training.distributed import HEARTBEAT_TIMEOUT, job

    return job(
        args.coordinator,
        args.num_processes,
        args.process_id,
        heartbeat_timeout_seconds=args.heartbeat_timeout or HEARTBEAT_TIMEOUT,
    )
