"""Learning rates as functions of the step alone, so that a resumed run is the same run.

One formula serves the compiled step (`xp=jax.numpy`, the step traced) and the log (`xp=numpy`).
The numbers are those of PyTorch Transformers' schedules of the same names, so that the warm-up
rises from zero, the rate of the first update, to the peak at update `warmup_steps`; "noam" is that
of Vaswani et al. 2017, which counts updates from one.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

_TIMESCALE = 10_000
"""Updates over which "inverse_sqrt" without a warm-up falls to 0.7 of the peak."""


def rate(
    schedule: str, peak: float, warmup_steps: int, total_steps: int, step: Any, xp: ModuleType
) -> Any:
    """The rate of update number `step`, counted from zero.

    Args:
        schedule: one of `optimizer_config.SCHEDULES`.
        peak: the rate at the end of the warm-up; for "noam", the factor of its formula.
        warmup_steps: updates over which the rate rises.
        total_steps: number of updates, after which "linear" and "cosine" are at zero.
        step: int32 scalar or array.
        xp: numpy or jax.numpy.

    Returns:
        float32, of step's shape.
    """
    warm = max(1, warmup_steps)
    n = xp.asarray(step).astype(xp.float32)
    if schedule == "noam":
        n = n + 1
        shape = xp.minimum(n / warm, xp.sqrt(warm / n)) / math.sqrt(warm)
        return (peak * shape).astype(xp.float32)
    if schedule == "constant":
        fall = xp.ones_like(n)
    elif schedule == "inverse_sqrt":
        scale = warmup_steps or _TIMESCALE
        fall = xp.sqrt(scale / xp.maximum(n + (scale - warmup_steps), 1))
    else:
        left = (total_steps - n) / max(1, total_steps - warmup_steps)
        left = xp.clip(left, 0.0, 1.0)
        fall = left if schedule == "linear" else 0.5 - 0.5 * xp.cos(math.pi * left)
    shape = xp.where(n < warmup_steps, n / warm, fall)
    return (peak * shape).astype(xp.float32)
