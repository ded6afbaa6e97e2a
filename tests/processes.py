"""Jobs of real processes on the loopback, with CPU collectives (gloo) and fake devices."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path


class Job:
    """The processes of one job, each the same command; ended with the `with` block.

    Args:
        folder: of what they print.
        command: run by each of them; the environment says which one it is.
        count: how many.
        devices: of each.
        slurm: launched as by `srun`.
        cwd: their working folder.
    """

    def __init__(
        self,
        folder: Path,
        command: Sequence[str],
        count: int,
        devices: int,
        *,
        slurm: bool = False,
        cwd: Path | None = None,
    ):
        # The last of two flags counts.
        flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
        shared = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        self.folder = folder
        self.processes, self.outputs = [], []
        port = free_port()
        for number in range(count):
            name = f"{time.time_ns()}-{number}"
            self.outputs.append((folder / f"{name}.out", folder / f"{name}.err"))
            with open(self.outputs[-1][0], "w") as out, open(self.outputs[-1][1], "w") as err:
                process = subprocess.Popen(
                    command,
                    env=shared | launched(number, count, port, slurm),
                    stdout=out,
                    stderr=err,
                    cwd=cwd,
                )
            self.processes.append(process)

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def output(self, number: int = 0) -> str:
        return self.outputs[number][0].read_text()

    def errors(self, number: int = 0) -> str:
        return self.outputs[number][1].read_text()

    def until(self, condition: Callable[[], bool], seconds: float = 240) -> None:
        """Wait for something while all processes live."""
        deadline = time.monotonic() + seconds
        while not condition():
            codes = [process.poll() for process in self.processes]
            assert set(codes) == {None}, (codes, [self.errors(n) for n in range(len(codes))])
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def end(self, expected: int = 0, seconds: float = 240) -> None:
        """Wait for all; see that they have this exit code."""
        deadline = time.monotonic() + seconds
        codes = [process.wait(deadline - time.monotonic()) for process in self.processes]
        assert set(codes) == {expected}, (codes, [self.errors(n) for n in range(len(codes))])


def launched(number: int, count: int, port: int, slurm: bool) -> dict[str, str]:
    """What a launcher would put into the environment of a process."""
    if count == 1:
        return {}
    if slurm:  # JAX takes the port from the job's number
        job = str(port - (65536 - 4096))
        names = {"SLURM_JOB_ID": job, "SLURM_NTASKS": str(count), "SLURM_PROCID": str(number)}
        return names | {"SLURM_STEP_NODELIST": "localhost", "SLURM_LOCALID": str(number)}
    names = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(count)}
    return names | {"JAX_PROCESS_ID": str(number)}


def free_port() -> int:
    """One that SLURM's jobs may get as well."""
    while True:
        port = random.SystemRandom().randrange(65536 - 4096, 65536)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
