"""Learning rates as functions of the step alone, so that a resumed run is the same run.

One formula serves the compiled step (`xp=jax.numpy`, the step traced) and the log (`xp=numpy`).
Warm-up rises to the peak over `warmup_steps` updates, of which the first is not idle.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any


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
    n = xp.asarray(step + 1).astype(xp.float32)
    rise = xp.minimum(n / max(1, warmup_steps), 1.0)
    if schedule == "constant":
        shape = rise
    elif schedule in ("inverse_sqrt", "noam"):
        warm = max(1, warmup_steps)
        shape = xp.minimum(rise, xp.sqrt(warm / n))
        # rise = n / w and sqrt(w / n) are w^0.5 times noam's n * w^-1.5 and n^-0.5.
        peak = peak / math.sqrt(warm) if schedule == "noam" else peak
    else:
        left = (total_steps - (n - 1)) / max(1, total_steps - warmup_steps)
        left = xp.clip(left, 0.0, 1.0)
        fall = left if schedule == "linear" else 0.5 - 0.5 * xp.cos(math.pi * left)
        shape = xp.where(n <= warmup_steps, rise, fall)
    return (peak * shape).astype(xp.float32)
