"""The machine a decoding benchmark runs on: how quiet it is, and the least time it could take.

The floor of a generation is what its arithmetic and its reads of memory cost at the rates measured
here: the larger of the two at each step. Nothing gets below it without reading fewer bytes.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import statistics
import time
from pathlib import Path

THREADS = 2
BYTES = 4  # of a float32


def pin() -> None:
    """Confine this process, and those it starts, to two processors and as many threads."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(THREADS)


def processor() -> str:
    """The processor's name."""
    try:
        for text in Path("/proc/cpuinfo").read_text().splitlines():
            if text.startswith("model name"):
                return text.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def quietness() -> float:
    """Wall time over processor time of two busy processes: 1.0 on a quiet machine."""
    with multiprocessing.get_context("spawn").Pool(THREADS) as pool:
        return max(pool.map(_spin, range(THREADS)))


def _spin(_: int) -> float:
    wall, cpu = time.perf_counter(), time.process_time()
    while time.process_time() - cpu < 0.5:
        sum(range(1000))
    return (time.perf_counter() - wall) / (time.process_time() - cpu)


class Neighbours:
    """Processors kept busy by anybody else, measured while this process and `others` work."""

    def __init__(self, pids: list[int]):
        self.pids = [os.getpid(), *pids]

    def start(self) -> None:
        """Begin to watch."""
        self._busy, self._own, self._wall = _busy(), self._used(), time.perf_counter()

    def stop(self) -> float:
        """How many processors others kept busy since `start`, on average."""
        wall = time.perf_counter() - self._wall
        others = (_busy() - self._busy) - (self._used() - self._own)
        return max(0.0, others / wall)

    def _used(self) -> float:
        ticks = 0
        for pid in self.pids:
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")


def _busy() -> float:
    """Seconds of work of all processors since the machine started."""
    fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    idle = fields[3] + fields[4]
    return (sum(fields[:8]) - idle) / os.sysconf("SC_CLK_TCK")


def rates(footprints: list[int]) -> dict:
    """Bytes per second read by matrix-vector products over weights of so many bytes, and the
    float32 operations per second of large matrix products; the best of XLA's and PyTorch's."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_rates, (footprints,))


def _rates(footprints: list[int]) -> dict:
    import jax
    import jax.numpy as jnp
    import torch

    torch.set_num_threads(THREADS)
    width, rows = 1024, 1024

    def best(run, work: float, times: int = 7) -> float:
        run()
        seconds = []
        for _ in range(times):
            began = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - began)
        return work / statistics.median(seconds)

    found: dict = {"read_bytes_per_second": {}}
    for size in footprints:
        count = max(1, round(size / (width * width * BYTES)))
        ours = [jnp.full((width, width), 0.5, jnp.float32) for _ in range(count)]
        theirs = [torch.full((width, width), 0.5) for _ in range(count)]
        vector, other = jnp.ones((1, width)), torch.ones(width)

        @jax.jit
        def multiply(vector, matrices):
            return sum(vector @ matrix for matrix in matrices)

        def xla(matrices=ours, vector=vector, multiply=multiply):
            multiply(vector, matrices).block_until_ready()

        def pytorch(matrices=theirs, other=other):
            for matrix in matrices:
                torch.mv(matrix, other)

        work = count * width * width * BYTES
        found["read_bytes_per_second"][str(size)] = {
            "xla": best(xla, work),
            "pytorch": best(pytorch, work),
        }
    a, b = jnp.ones((rows, 2048)), jnp.ones((2048, 2048))
    c, d = torch.ones(rows, 2048), torch.ones(2048, 2048)
    dot = jax.jit(jnp.dot)
    operations = 2.0 * rows * 2048 * 2048
    found["float32_operations_per_second"] = {
        "xla": best(lambda: dot(a, b).block_until_ready(), operations),
        "pytorch": best(lambda: torch.mm(c, d), operations),
    }
    return found


def step_weights(family: str, width: int, layers: int, vocab: int) -> int:
    """Weights that a decode step reads: attention, feed-forward, head (cross-attention's keys and
    values are computed once)."""
    head = width * vocab + (width * width if family == "bert" else 0)
    return layers * 14 * width * width + head


def floor(
    family: str,
    shape: tuple[int, int, int],
    vocab: int,
    cell: tuple[int, int, int],
    tokens: int,
    measured: dict,
) -> float:
    """The least seconds of a generation in float32, at the rates measured.

    Args:
        shape: width, layers, heads.
        cell: source length, batch, beams.
    """
    width, layers, _ = shape
    source, batch, beams = cell
    weights = step_weights(family, width, layers, vocab)
    speed = max(measured["float32_operations_per_second"].values())
    by_size = measured["read_bytes_per_second"]
    nearest = min(by_size, key=lambda size: abs(int(size) - weights * BYTES))
    read = max(by_size[nearest].values())
    rows = batch * source
    encoder = rows * layers * (2 * 12 * width * width + 4 * source * width)
    cross = rows * layers * 2 * 2 * width * width
    lanes = batch * beams
    seconds = (encoder + cross) / speed
    for step in range(tokens):
        numbers = weights + 2 * layers * width * (batch * source + lanes * (step + 1))
        operations = 2 * lanes * weights + 4 * lanes * layers * width * (source + step + 1)
        seconds += max(numbers * BYTES / read, operations / speed)
    return seconds
