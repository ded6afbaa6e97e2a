"""One job of several processes: how they find each other, how they stop, and what one does when
another is gone.

`job` is all that a command needs: it connects the processes, and if anything goes wrong in this one
it ends it at once, in one line, instead of waiting for peers that may be dead. `stop_on_signals`
turns SIGTERM and Ctrl-C into a wish to save and stop after the step. A coordinator that stops
hearing from a process ends the job after `HEARTBEAT_TIMEOUT` seconds, where JAX's default is 100.
A process that waits for the others in a save, not in a computation, is ended by JAX itself then: in
its words, with exit code 134 (SIGABRT); jaxlib 0.10.2 cannot call Python there.
"""

from __future__ import annotations

import glob
import importlib.util
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax

from jax_encdec.errors import EncDecError, InputError

EXIT_STOPPED = 75
"""Exit code of a run that was told to stop, saved its step and did; started again, it goes on."""
EXIT_PEER_LOST = 76
"""Exit code of a process that ended because another one of its job was gone."""
HEARTBEAT_TIMEOUT = 20
"""Seconds without a sign of life after which a process is taken for dead."""

_SLURM = (
    "SLURM_JOB_ID",
    "SLURM_STEP_NODELIST",
    "SLURM_NTASKS",
    "SLURM_PROCID",
    "SLURM_LOCALID",
)
_PEER_LOST = re.compile(
    r"Gloo|NCCL|Connection (closed|reset)|Socket closed|Broken pipe|coordination service|"
    r"CoordinationService|heartbeat|UNAVAILABLE|barrier",
    re.IGNORECASE,
)


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat_timeout_seconds: int = HEARTBEAT_TIMEOUT,
    initialization_timeout_seconds: int = 300,
) -> bool:
    """Connect this process to the others of its job, if it has any; before any other use of JAX.

    What is not given comes from the environment: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID; else what SLURM (`srun`), Open MPI or a TPU pod say.

    Args:
        coordinator: "host:port" of process 0, which will listen there.
        num_processes: how many processes the job has.
        process_id: which one this is, from 0.
        heartbeat_timeout_seconds: how long a process may be silent before the job is ended.
        initialization_timeout_seconds: how long to wait for the others.

    Returns:
        True: one process of several; False: this process is alone, and nothing was done.

    Raises:
        InputError: the arguments do not fit together, or the coordinator cannot be reached.
    """
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    num_processes = _number("num_processes", num_processes, "JAX_NUM_PROCESSES")
    process_id = _number("process_id", process_id, "JAX_PROCESS_ID")
    if not _has_peers(coordinator, num_processes, process_id):
        return False
    if jax.distributed.is_initialized():
        return True
    if "JAX_CPU_COLLECTIVES_IMPLEMENTATION" not in os.environ:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if coordinator is not None and process_id is not None:
        _check_reachable(coordinator, process_id, initialization_timeout_seconds)
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=heartbeat_timeout_seconds,
            initialization_timeout=initialization_timeout_seconds,
            shutdown_timeout_seconds=60,
        )
    except (ValueError, RuntimeError) as error:
        if coordinator is None and num_processes is None and not _launched():
            return False  # TPU chips, but no pod around them
        raise InputError(
            f"the processes of the job could not be connected: {str(error).splitlines()[0]}"
        ) from error
    return jax.process_count() > 1


@contextmanager
def job(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat_timeout_seconds: int = HEARTBEAT_TIMEOUT,
) -> Iterator[bool]:
    """Run the body as one process of a job (see `initialize`); yields whether there are others.

    An exception ends a process of several at once, after a line on standard error: with
    `EXIT_PEER_LOST` if it came from a peer that is gone, 2 for bad input, 130 when interrupted, 1
    and a stack trace otherwise. The others then end the same way. Alone, exceptions pass.
    """
    several = initialize(
        coordinator,
        num_processes,
        process_id,
        heartbeat_timeout_seconds=heartbeat_timeout_seconds,
    )
    try:
        yield several
    except BaseException as error:
        if not several or (isinstance(error, SystemExit) and error.code in (None, 0, EXIT_STOPPED)):
            raise
        code = _last_words(error)
        sys.stdout.flush()
        sys.stderr.flush()
        if jax.process_index() == 0:
            time.sleep(2)  # the coordinator goes with it; let the others say what they have to
        os._exit(code)  # an orderly exit would wait for the peers


class Stop:
    """Whether this process was asked to stop; made by `stop_on_signals`."""

    requested: signal.Signals | None = None
    """The first signal that came."""


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Within the body, let SIGTERM and Ctrl-C ask for a stop after the step, instead of killing.

    The second time they do what they did before. In a job of several processes SIGTERM is left to
    JAX, which makes all processes agree on the step after which they stop: ask
    `Checkpoints.reached_preemption` at every step. Whoever acts on `requested` there has to agree
    with the other processes by himself, for they do not see this process's Ctrl-C.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may handle signals
        return
    before: dict[int, Any] = {}

    def handle(number: int, _: object) -> None:
        stop.requested = stop.requested or signal.Signals(number)
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in (signal.SIGINT,) if jax.process_count() > 1 else (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _number(name: str, value: int | None, variable: str) -> int | None:
    if value is not None:
        return value
    text = os.environ.get(variable)
    if text is None:
        return None
    if not text.strip().isdecimal():
        raise InputError(f"{variable} must be a number, for {name}; got {text[:40]!r}")
    return int(text)


def _has_peers(coordinator: str | None, num_processes: int | None, process_id: int | None) -> bool:
    if num_processes is not None and num_processes < 1:
        raise InputError(f"num_processes must be at least 1; got {num_processes}")
    if process_id is not None and (process_id < 0 or process_id >= (num_processes or sys.maxsize)):
        raise InputError(
            f"process_id must be from 0 to num_processes - 1; got {process_id} of {num_processes}"
        )
    if coordinator is not None:
        address = re.fullmatch(r"\S+:(\d{1,5})", coordinator)
        if address is None or not 0 < int(address[1]) < 65536:
            raise InputError(f"coordinator must read host:port; got {coordinator[:80]!r}")
    if num_processes == 1:
        return False
    given = {
        "coordinator": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    if not missing or _launched() or _on_tpu():
        return True
    if len(missing) < len(given):
        raise InputError(
            f"several processes need coordinator, num_processes and process_id; "
            f"{' and '.join(missing)} missing, and no SLURM, Open MPI or TPU pod says"
        )
    return False


def _launched() -> bool:
    """Whether a launcher that JAX can ask started several processes."""
    environment = os.environ
    slurm = all(name in environment for name in _SLURM) and environment["SLURM_NTASKS"] != "1"
    mpi = "OMPI_MCA_orte_hnp_uri" in environment and environment.get("OMPI_COMM_WORLD_SIZE") != "1"
    return slurm or mpi


def _on_tpu() -> bool:
    platforms = os.environ.get("JAX_PLATFORMS") or "tpu"
    chips = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    return bool("tpu" in platforms and chips and importlib.util.find_spec("libtpu"))


def _check_reachable(coordinator: str, process_id: int, timeout: float) -> None:
    """Say in a sentence what JAX would end the process for."""
    host, port = coordinator.rsplit(":", 1)
    host = host.strip("[]")
    if process_id == 0:
        try:
            with socket.socket(socket.AF_INET) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("", int(port)))
        except OSError as error:
            raise InputError(
                f"process 0 cannot listen on port {port} of {coordinator}: {error}; choose another"
            ) from None
        return
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise InputError(
                    f"process {process_id} cannot reach process 0 at {coordinator} after "
                    f"{timeout:.0f} s: {error}; is it running, with the same coordinator?"
                ) from None
        time.sleep(0.2)


def _last_words(error: BaseException) -> int:
    """Say on standard error what ends this process; return its exit code."""
    who = f"jax-encdec: process {jax.process_index()} of {jax.process_count()}"
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, KeyboardInterrupt):
        print(": ".join([who, "interrupted", *map(str, error.args)]), file=sys.stderr)
        return 130
    if reason := _lost_peer(error):
        print(
            f"{who}: another process of the job is gone ({reason}); start the job again, and it "
            "goes on from what was saved last",
            file=sys.stderr,
        )
        return EXIT_PEER_LOST
    if isinstance(error, EncDecError):
        print(f"{who}: {error}", file=sys.stderr)
        return 2
    traceback.print_exception(error)
    print(f"{who}: ended by the error above", file=sys.stderr)
    return 1


def _lost_peer(error: BaseException | None) -> str | None:
    """What JAX said, if this is how it tells that a peer is gone."""
    while error is not None:
        # The runtime's errors are JaxRuntimeError or, from a transfer, a bare ValueError.
        if (
            isinstance(error, (jax.errors.JaxRuntimeError, TimeoutError))
            or type(error) is ValueError
        ):
            text = " ".join(str(error).split())
            if _PEER_LOST.search(text):
                return text[:160]
        error = error.__cause__ or error.__context__
    return None
