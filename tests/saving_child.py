"""A process that saves without pause until it is killed; run by tests/test_checkpoints.py.

It reads folders from standard input. For each it forks a process that goes on from the newest step
there, reports on standard output each step whose save has begun, and never ends by itself. Forking,
before JAX has started anything, spares each of them the seconds that the imports take.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings

import jax
import numpy as np

from jax_encdec.training.checkpoint import Checkpoints


def state(step: int) -> dict[str, np.ndarray]:
    """What the run holds after so many updates: about 1 MB that does not compress."""
    rng = np.random.default_rng(step)
    big = {f"w{i}": rng.standard_normal((64, 256), np.float32) for i in range(12)}
    return big | {"step": np.asarray(step, np.int32), "mask": rng.random(999) < 0.5}


def go_on(folder: str) -> None:
    with Checkpoints(folder, keep=2, keep_best=1) as checkpoints:
        restored = checkpoints.restore(state(0))
        step = restored.step if restored else 0
        while True:
            step += 1
            arrays = jax.tree.map(jax.numpy.asarray, state(step))
            checkpoints.save(step, arrays, {"step": step}, {"loss": (step % 7) / 7})
            os.write(1, f"{step}\n".encode())


if __name__ == "__main__":
    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            warnings.simplefilter("ignore")  # that the last one left a step unfinished
            try:
                go_on(line.strip())
            except BaseException:
                traceback.print_exc()
            os._exit(1)
        print(f"started {child}", flush=True)
        os.waitpid(child, 0)
        print("gone", flush=True)
