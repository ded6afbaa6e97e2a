"""One process of a training job, run by tests/test_distributed.py with a folder and a number.

It finds the others of its job in the environment, goes on from the newest checkpoint in the folder,
saves after every so many steps, and prints what happens as lines of JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from jax_encdec.training import distributed


def main(folder: Path, every: int) -> int:
    import jax
    from tiny_run import TinyRun

    from jax_encdec.training.checkpoint import Checkpoints

    rows = 8  # of TinyRun's batches, which as many devices can share
    devices = jax.device_count()
    run = TinyRun(f"fsdp={rows},tensor={devices // rows}" if devices > rows else None, total=20)
    with distributed.stop_on_signals() as stop, Checkpoints(folder, keep=2) as checkpoints:
        begin, state = run.restore(checkpoints)
        tell(begin=begin)
        for step in range(begin + 1, run.total + 1):
            state, losses = run.go(state, step - 1, step)
            tell(step=step, loss=losses[0])
            asked = stop.requested or checkpoints.reached_preemption(step)
            if asked or step % every == 0:
                run.save(checkpoints, step, state)
            if asked:
                return distributed.EXIT_STOPPED
    return 0


def tell(**what: Any) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    with distributed.job():
        code = main(Path(sys.argv[1]), int(sys.argv[2]))
    sys.exit(code)
