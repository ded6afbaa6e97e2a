"""What a run tells others while it goes on, and how they stop it.

A callback is any object with some of the methods of `Callback`; the progress bar, TensorBoard and
early stopping are callbacks themselves. A method that returns `Stop("why")` ends the run cleanly:
the step in flight is finished, a checkpoint saved, the model and the report written. What a method
raises ends the run at once and is raised from `train`; the last checkpoint stays.

In a job of several processes every process calls its own callbacks; one process's `Stop` stops all
of them, at the next logged step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jax_encdec.errors import ConfigError, InputError, nearest

if TYPE_CHECKING:
    from jax_encdec.training.finish import TrainResult
    from jax_encdec.training.loop import Run

EVENTS = ("on_start", "on_step", "on_log", "on_evaluate", "on_save", "on_end")


@dataclass(frozen=True)
class Stop:
    """Returned by a callback's method: end the run cleanly, for this reason."""

    reason: str


class Callback:
    """The methods a callback may have; each does nothing here."""

    def on_start(self, run: Run) -> Stop | None:
        """Called before the first step; `run.step` is where the run starts or goes on."""

    def on_step(self, run: Run, metrics: Mapping[str, float]) -> Stop | None:
        """Called once per step, in order, with that step's numbers.

        `metrics["step"]` says which: the device is already a step or two ahead, so that it never
        waits for whoever reads. `loss` (nats per target token), `grad_norm` (before clipping),
        `accuracy`, `target_tokens` and `source_tokens` are floats.
        """

    def on_log(self, run: Run, record: Mapping[str, Any]) -> Stop | None:
        """Called with every training line of metrics.jsonl: means over the steps it covers."""

    def on_evaluate(self, run: Run, record: Mapping[str, Any]) -> Stop | None:
        """Called with every evaluation line of metrics.jsonl; `run.params` are those evaluated."""

    def on_save(self, run: Run, step: int) -> Stop | None:
        """Called when a checkpoint of `step` was handed over for writing."""

    def on_end(self, run: Run, result: TrainResult) -> None:
        """Called when all is written; too late to stop anything."""


class EarlyStopping(Callback):
    """Stop when a validation metric has not become better for `patience` evaluations.

    It looks at all evaluations of the run, so that a resumed run decides as one never stopped.
    """

    def __init__(self, metric: str = "loss", *, mode: str = "min", patience: int = 3):
        if mode not in ("min", "max"):
            raise ConfigError(f"mode must be 'min' or 'max'; got {mode!r}")
        if isinstance(patience, bool) or not isinstance(patience, int) or patience < 1:
            raise ConfigError(f"patience must be a positive integer; got {patience!r}")
        self.metric, self.mode, self.patience = metric, mode, patience

    def on_start(self, run: Run) -> Stop | None:
        """Stop a resumed run that would have stopped here."""
        return self.on_evaluate(run, run.evaluations[-1]) if run.evaluations else None

    def on_evaluate(self, run: Run, record: Mapping[str, Any]) -> Stop | None:
        """Stop, if nothing has become better for too long."""
        if self.metric not in record:
            raise InputError(
                f"early stopping watches {self.metric!r}, which the evaluation does not give"
                f"{nearest(self.metric, record) or f'; it gives {sorted(record)}'}"
            )
        values = [line[self.metric] for line in run.evaluations]
        best = best_index(values, self.mode)
        if best is not None and len(values) - 1 - best >= self.patience:
            return Stop(
                f"{self.metric} has not become better than {values[best]:.4g} for "
                f"{self.patience} evaluations"
            )
        return None


def best_index(values: Sequence[float | None], mode: str) -> int | None:
    """Index of the first best finite value, or None where there is none."""
    sign = 1 if mode == "min" else -1
    found = [(sign * v, i) for i, v in enumerate(values) if v is not None and math.isfinite(v)]
    return min(found)[1] if found else None


def check_callbacks(callbacks: Sequence[Any]) -> tuple[Any, ...]:
    """Refuse what is no callback, and methods that would never be called.

    Raises:
        InputError: an object without any of the methods, or with a misspelled one.
    """
    if not isinstance(callbacks, Sequence):
        raise InputError(f"callbacks must be a list of them; got {type(callbacks).__name__}")
    for callback in callbacks:
        name = type(callback).__name__
        methods = [m for m in dir(callback) if m.startswith("on_")]
        for method in methods:
            if method not in EVENTS:
                known = f"; a callback has {', '.join(EVENTS)}"
                raise InputError(
                    f"callback {name} has a method {method}, which nothing calls"
                    f"{nearest(method, EVENTS) or known}"
                )
        if not methods or isinstance(callback, type):
            raise InputError(
                f"{name} is no callback: expected an object with one of {', '.join(EVENTS)}"
            )
    return tuple(callbacks)


def notify(callbacks: Sequence[Any], event: str, *arguments: Any) -> Stop | None:
    """Call one method of every callback that has it; the first `Stop` that comes back.

    Raises:
        InputError: a method returned something else than None or a `Stop`.
    """
    stop = None
    for callback in callbacks:
        method = getattr(callback, event, None)
        answer = method(*arguments) if method is not None else None
        if answer is not None and not isinstance(answer, Stop):
            raise InputError(
                f"{type(callback).__name__}.{event} must return None, or Stop(reason) to end the "
                f"run; got {type(answer).__name__}"
            )
        stop = stop or answer
    return stop
