"""What the steps of a run say of themselves: read from the device, averaged, written line by line.

The device never waits for the host: a step's numbers are read when the next ones are on their way.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jax_encdec.training.assemble import Parts, flops_of
from jax_encdec.training.progress import Meter, MetricsLog

IN_FLIGHT = 2
"""Steps handed to the device whose numbers have not been read yet."""

Shape = tuple[int, int, int]
"""Rows, source and target length of a batch."""


class StepNumbers:
    """The numbers of all steps of one session.

    Attributes:
        meter: of speed.
        compiling: seconds spent compiling since the last line.
    """

    def __init__(
        self,
        parts: Parts,
        log: MetricsLog,
        *,
        began: float,
        arrived: Callable[[int, dict[str, float]], None],
    ):
        """Start the clock.

        Args:
            parts: of the run.
            log: where lines are written.
            began: when the session did, by `time.monotonic`.
            arrived: called with each step's number and metrics, in order.
        """
        flops, peak = flops_of(parts)
        self.meter = Meter(flops, peak=peak)
        self.compiling = 0.0
        self._parts, self._log, self._began, self._arrived = parts, log, began, arrived
        self._pending: deque[tuple[int, Shape, Mapping[str, jax.Array]]] = deque()
        self._covered: list[dict[str, float]] = []

    def expect(self, step: int, shape: Shape, arrays: Mapping[str, jax.Array]) -> None:
        """Take the numbers of a step that the device was just given; read those of an older one."""
        for value in arrays.values():
            value.copy_to_host_async()
        self._pending.append((step, shape, arrays))
        self._read(IN_FLIGHT)

    def drain(self) -> None:
        """Wait for the device and read all numbers."""
        self._read(0)

    def _read(self, left: int) -> None:
        while len(self._pending) > left:
            step, shape, arrays = self._pending.popleft()
            metrics = {name: float(value) for name, value in jax.device_get(arrays).items()}
            self.meter.step(shape, metrics["source_tokens"] + metrics["target_tokens"])
            self._covered.append(metrics)
            self._arrived(step, metrics)

    def write(self, step: int) -> dict[str, Any] | None:
        """Write a training line over the steps since the last one, if there were any; return it."""
        covered, self._covered = self._covered, []
        if not covered:
            return None
        tokens = sum(m["target_tokens"] for m in covered)

        def mean(name: str) -> float:
            return sum(m[name] * m["target_tokens"] for m in covered) / max(tokens, 1.0)

        values: dict[str, Any] = {
            "steps": len(covered),
            "loss": mean("loss"),
            "objective": mean("objective"),
            "accuracy": mean("accuracy"),
            "grad_norm": sum(m["grad_norm"] for m in covered) / len(covered),
            "learning_rate": self._parts.optimizer.rates(step - 1),
            "target_tokens": int(tokens),
            "source_tokens": int(sum(m["source_tokens"] for m in covered)),
            "epoch": self._epoch(step),
            "elapsed_seconds": time.monotonic() - self._began,
            "compile_seconds": self.compiling,
            **self.meter.lap(),
        }
        if bad := sum(not m["finite"] for m in covered):
            values["steps_not_finite"] = bad
        self.compiling = 0.0
        return self._log.write("train", step, values)

    def _epoch(self, step: int) -> float:
        batches = self._parts.batches
        epoch, index = batches.position(step)
        return epoch + index / max(batches.steps_per_epoch(epoch), 1)
