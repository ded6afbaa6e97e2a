"""What a person sees of a run while it goes on: metrics.jsonl, a bar, TensorBoard; and its speed.

`MetricsLog` is the run's record: one JSON object per line, appended, flushed, and on a resume cut
back to the restored step, so that no line is lost or doubled. `Bar` and `TensorBoard` are
callbacks fed from it. `Meter` measures tokens and model FLOPs per second of training time.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from jax_encdec.errors import InputError
from jax_encdec.training.callbacks import Callback

if TYPE_CHECKING:
    from jax_encdec.training.finish import TrainResult
    from jax_encdec.training.loop import Run

# The record -------------------------------------------------------------------------------------


class MetricsLog:
    """metrics.jsonl: lines of `{"kind": "train" | "evaluate" | "test", "step": N, ...}`.

    Attributes:
        records: what the file holds, lines of the resumed part included.
    """

    def __init__(self, path: Path | None, *, step: int, evaluated: Collection[int] | None = None):
        """Open `path` for a run that goes on after `step`; None keeps the records in memory only.

        Lines of later steps, and a line cut short by a kill, are removed from the file.

        Args:
            path: of the file.
            step: what the run goes on after.
            evaluated: the steps whose evaluation the checkpoint knows; those of others will come
                again. None: all.

        Raises:
            InputError: the file holds a line that is no record, before its last.
            OSError: the file cannot be written.
        """
        self.records: list[dict[str, Any]] = []
        self._file: TextIO | None = None
        if path is None:
            return
        if path.exists():
            end = self._read(path, step, evaluated)
            os.truncate(path, end)
        self._file = path.open("a", encoding="utf-8")

    def _read(self, path: Path, step: int, evaluated: Collection[int] | None) -> int:
        """Take in the records up to `step`; return where they end, in bytes."""
        end = 0
        content = path.read_bytes()
        for number, line in enumerate(content.splitlines(keepends=True), 1):
            try:
                record = json.loads(line) if line.endswith(b"\n") else None
                late = record is not None and record["step"] > step
                if record is not None and record["kind"] == "evaluate" and evaluated is not None:
                    late = late or record["step"] not in evaluated
            except (ValueError, KeyError, TypeError):
                if content.endswith(line) and end + len(line) == len(content):
                    break
                raise InputError(
                    f"{path}, line {number} is no record of a run; expected JSON with a step: "
                    f"repair the line or move the file away"
                ) from None
            if record is None or late:
                break
            self.records.append(record)
            end += len(line)
        return end

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Append a record; numbers that are not finite become null. Returns it as written."""
        record = plain({"kind": kind, "step": step, **values})
        self.records.append(record)
        if self._file is not None:
            self._file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
            self._file.flush()
        return record

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The records of one kind, in order."""
        return [record for record in self.records if record["kind"] == kind]

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def plain(value: Any) -> Any:
    """JSON data of a value: six significant digits, null for what is not finite."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    number = float(value)
    return float(f"{number:.6g}") if math.isfinite(number) else None


# Speed ------------------------------------------------------------------------------------------


class Meter:
    """Tokens and model FLOPs per second, of the time spent training.

    Time inside `paused()` (compiling, evaluating, saving) does not count. Model FLOPs are those the
    mathematics needs, padding included, recomputation not.
    """

    def __init__(
        self,
        flops: Callable[[int, int, int], float] | None = None,
        *,
        peak: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        """Start the clock.

        Args:
            flops: of one training step, by rows, source and target length.
            peak: FLOPs per second of all devices together; None: unknown, then there is no
                utilisation, only FLOPs per second.
            clock: seconds.
        """
        self._flops, self._peak, self._clock = flops, peak, clock
        self._known: dict[tuple[int, int, int], float] = {}
        self._start()

    def _start(self) -> None:
        self._since, self._paused = self._clock(), 0.0
        self._tokens = self._work = 0.0

    def step(self, shape: tuple[int, int, int], tokens: float) -> None:
        """Count a finished step of `shape` (B, S, T) and its source and target tokens."""
        self._tokens += tokens
        if self._flops is not None:
            if shape not in self._known:
                self._known[shape] = self._flops(*shape)
            self._work += self._known[shape]

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time inside."""
        began = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - began

    def lap(self) -> dict[str, float | None]:
        """Speeds since the last lap; utilisation is a fraction, None where no peak is known."""
        seconds = max(self._clock() - self._since - self._paused, 1e-9)
        rate = self._work / seconds if self._flops is not None else None
        share = None if rate is None or self._peak is None else rate / self._peak
        speeds = {
            "seconds": seconds,
            "tokens_per_second": self._tokens / seconds,
            "model_tflops_per_second": None if rate is None else rate / 1e12,
            "model_flop_utilization": share,
        }
        self._start()
        return speeds


# The bar ----------------------------------------------------------------------------------------


class Bar(Callback):
    """A progress bar on standard error; where that is no terminal, a line now and then.

    Lines come every 10 s at first, later whenever the run is 5 % older, at least every 10 minutes.
    """

    def __init__(
        self, *, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ):
        self._stream, self._clock = stream, clock
        self._bar: Any = None

    def on_start(self, run: Run) -> None:
        """Show the bar."""
        from tqdm import tqdm

        self._out = self._stream or sys.stderr
        self._total, self._first, self._began = run.total_steps, run.step, self._clock()
        self._next, self._said = 10.0, ""
        self._loss: float | None = None
        if self._out.isatty():
            self._bar = tqdm(
                total=run.total_steps,
                initial=run.step,
                unit="step",
                desc="compiling",
                file=self._out,
                dynamic_ncols=True,
            )

    def on_step(self, run: Run, metrics: Mapping[str, float]) -> None:
        """Move on by a step."""
        if self._bar is not None:
            self._bar.update()
            return
        age = self._clock() - self._began
        if age >= self._next or metrics["step"] == self._first + 1:
            # The time left says nothing before there is a speed without compilation in it.
            done = metrics["step"] - self._first
            left = age / done * (self._total - metrics["step"]) if done > 1 else None
            self._line(int(metrics["step"]), metrics["loss"], left)
            self._next = age + min(max(10.0, 0.05 * age), 600.0)

    def on_log(self, run: Run, record: Mapping[str, Any]) -> None:
        """Show the loss and the speed."""
        self._said = speed_text(record)
        self._loss = record["loss"]
        if self._bar is not None:
            self._bar.set_description("training", refresh=False)
            loss = "not finite" if self._loss is None else f"{self._loss:.4f}"
            self._bar.set_postfix_str(f"loss {loss}, {self._said}")

    def on_evaluate(self, run: Run, record: Mapping[str, Any]) -> None:
        """Print the evaluation's numbers above the bar."""
        self.say(f"step {record['step']}: {evaluation_text(record)}")

    def say(self, text: str) -> None:
        """Print a line without disturbing the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._out)
        else:
            print(text, file=self._out, flush=True)

    def _line(self, step: int, loss: float, left: float | None) -> None:
        parts = [f"step {step}/{self._total}", f"loss {loss:.4f}"]
        parts += [self._said] if self._said else []
        parts += [f"{duration(left)} left"] if left is not None else []
        print(", ".join(parts), file=self._out, flush=True)

    def on_end(self, run: Run, result: TrainResult) -> None:
        """Leave the finished bar behind."""
        if self._bar is None and self._loss is not None:
            self._line(run.step, self._loss, None)
        self.close()

    def close(self) -> None:
        """Let go of the terminal's line, also when a run ends early."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def speed_text(record: Mapping[str, Any]) -> str:
    """`5,210 tokens/s, 38 % MFU`; without a known peak, the model's TFLOP/s instead."""
    parts = [f"{record['tokens_per_second']:,.0f} tokens/s"]
    if record.get("model_flop_utilization") is not None:
        parts.append(f"{record['model_flop_utilization']:.0%} MFU")
    elif record.get("model_tflops_per_second") is not None:
        parts.append(f"{record['model_tflops_per_second']:.3g} model TFLOP/s")
    return ", ".join(parts)


def evaluation_text(record: Mapping[str, Any]) -> str:
    """`validation loss 2.8123, rouge1 34.0 (lead 32.6), ...`."""
    parts = []
    if record.get("loss") is not None:
        parts.append(f"{record.get('split', 'validation')} loss {record['loss']:.4f}")
    for name, value in record.items():
        base = record.get(f"lead_{name}")
        if base is not None and value is not None:
            parts.append(f"{name} {value:.2f} (lead {base:.2f})")
    return ", ".join(parts) or "nothing to evaluate"


def duration(seconds: float) -> str:
    """`0:42`, `12:05`, `3:00:12`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


# TensorBoard ------------------------------------------------------------------------------------


class TensorBoard(Callback):
    """The numbers of metrics.jsonl as TensorBoard's scalars, in a folder."""

    def __init__(self, folder: Path):
        """Refuse at once, not after the first steps, where the library is absent.

        Raises:
            InputError: tensorboardX is not installed.
        """
        try:
            import tensorboardX  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise InputError(
                "TensorBoard needs tensorboardX: pip install 'jax_encdec[tensorboard]', or leave "
                "run.tensorboard out; metrics.jsonl holds the same numbers"
            ) from None
        self._writer_of, self._folder = tensorboardX.SummaryWriter, folder
        self._writer: Any = None

    def on_start(self, run: Run) -> None:
        """Open the folder; steps after `run.step`, of before a resume, are hidden."""
        purge = run.step + 1 if run.step else None
        self._writer = self._writer_of(str(self._folder), purge_step=purge)

    def on_log(self, run: Run, record: Mapping[str, Any]) -> None:
        """Write a training line."""
        self._scalars("train", record)

    def on_evaluate(self, run: Run, record: Mapping[str, Any]) -> None:
        """Write an evaluation."""
        self._scalars(record.get("split", "validation"), record)

    def _scalars(self, prefix: str, record: Mapping[str, Any]) -> None:
        for name, value in record.items():
            if isinstance(value, Mapping):
                self._scalars(f"{prefix}/{name}", {**value, "step": record["step"]})
            elif name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                self._writer.add_scalar(f"{prefix}/{name}", value, record["step"])
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
