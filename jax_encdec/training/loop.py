"""The training loop: steps, and what is due between them; from a fresh start or a checkpoint.

    result = train(TrainingConfig(...))
    result = train(config, model=model, tokenizers=tokenizers, train_data=[("a", "b"), ...])

The device never waits for the host: batches are prepared ahead in a thread, and a step's numbers
are read when the next ones are on their way. What a run does is a function of its configuration
and data; it may be stopped (signal, Ctrl-C, a callback, the clock) after any step and goes on from
its checkpoint as if it had not been.

In a job of several processes all of them call `train` with the same arguments; process 0 writes
metrics, report and model. The validation loss is computed on the mesh; to generate, each process
gathers the parameters, takes its share of the texts, and all exchange what they made.
"""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_encdec import hub
from jax_encdec.encoder_decoder import EncoderDecoderModel
from jax_encdec.errors import EncDecError, InputError
from jax_encdec.tokenization import TokenizerPair
from jax_encdec.training import finish, report, run_folder
from jax_encdec.training.assemble import Given, Pairs, Parts, assemble, facts
from jax_encdec.training.batches import prefetch
from jax_encdec.training.callbacks import EarlyStopping, best_index, check_callbacks, notify
from jax_encdec.training.checkpoint import Checkpoints
from jax_encdec.training.config import TrainingConfig
from jax_encdec.training.dataset import TokenizedData
from jax_encdec.training.distributed import stop_on_signals
from jax_encdec.training.finish import TrainResult
from jax_encdec.training.gather import agreed, first_process, on_first_process
from jax_encdec.training.progress import Bar, MetricsLog, TensorBoard
from jax_encdec.training.scoring import scored
from jax_encdec.training.sharding import data_shard, to_global
from jax_encdec.training.step_numbers import Shape, StepNumbers
from jax_encdec.training.stopping import Ending, Interrupted, Stopped, Stopping


class NonFiniteError(EncDecError):
    """A loss or gradient was not finite; the last checkpoint is of before."""


def train(
    config: TrainingConfig,
    *,
    callbacks: Sequence[Any] = (),
    model: EncoderDecoderModel | None = None,
    params: Any = None,
    tokenizers: TokenizerPair | None = None,
    train_data: Pairs | TokenizedData | None = None,
    validation_data: Pairs | TokenizedData | None = None,
    test_data: Pairs | TokenizedData | None = None,
) -> TrainResult:
    """Train as a configuration says; or go on with the run that is in `config.run.output`.

    Args:
        config: everything about the run; see `TrainingConfig`.
        callbacks: see `Callback`; they may stop the run.
        model: instead of `config.model`'s, used as it is: precision and execution of `config` do
            not touch it.
        params: of `model`; your tree stays as it is. None: drawn from `config.run.seed`.
        tokenizers: of both sides, instead of `config.model`'s.
        train_data, validation_data, test_data: (source, target) texts, instead of `config.data`'s
            files.

    Returns:
        What became of the run. A run that SIGTERM stops has saved a checkpoint and says so
        (`stopped == "signal"`).

    Raises:
        EncDecError: the configuration, a file or an argument cannot be used.
        NonFiniteError: the loss became infinite or not a number.
        KeyboardInterrupt: Ctrl-C, after the step in flight was finished and saved, with words that
            say where; a second one does not wait.
    """
    began = time.monotonic()
    callbacks = check_callbacks(callbacks)
    if not isinstance(config, TrainingConfig):
        raise InputError(f"config must be a TrainingConfig; got {type(config).__name__}")
    config = config.resolved(devices=jax.device_count(), platform=jax.default_backend())
    given = Given(
        model=model,
        params=params,
        tokenizers=tokenizers,
        train=train_data,
        validation=validation_data,
        test=test_data,
    )
    folder = Path(config.run.output)
    on_first_process(lambda: run_folder.check(config))
    parts = assemble(config, given, folder=folder, resuming=run_folder.saved(config.run))
    # Nothing was written until here: what is wrong with a configuration leaves no trace.
    on_first_process(lambda: run_folder.make(config.run))
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(
            Checkpoints(
                folder / run_folder.CHECKPOINTS,
                keep=config.run.keep,
                keep_best=config.run.keep_best,
                best_metric=config.run.best_metric,
                best_mode=config.run.best_mode,
            )
        )
        run = stack.enter_context(Run(parts, folder, checkpoints, callbacks, began))
        return run._go()


class Run:
    """A run while it goes on: what callbacks are given.

    Attributes:
        config: resolved.
        folder: of the run.
        model, tokenizers, mesh: what is trained, and where.
        state: the newest `TrainState`, perhaps still being computed. It is given away at the next
            step: copy what you want to keep.
        step: updates handed to the device so far.
        total_steps: of the whole run.
    """

    def __init__(
        self,
        parts: Parts,
        folder: Path,
        checkpoints: Checkpoints,
        callbacks: Sequence[Any],
        began: float,
    ):
        self.parts, self.config, self.folder = parts, parts.config, folder
        self.model, self.tokenizers, self.mesh = parts.model, parts.tokenizers, parts.mesh
        self.total_steps = parts.total_steps
        self.state: Any = None
        self.step = 0
        self._checkpoints, self._began = checkpoints, began
        self._own = self._observers()
        self._callbacks = (*self._own, *callbacks)
        self._log = MetricsLog(None, step=0)
        self._numbers: StepNumbers
        self._shapes: set[Shape] = set()
        self._evaluations: list[dict[str, Any]] = []
        self._stopping = Stopping(
            self.config.run.max_minutes,
            began=began,
            reached_preemption=checkpoints.reached_preemption,
        )
        self._saved = -1
        self._why = ""

    def _observers(self) -> tuple[Any, ...]:
        """The callbacks that the configuration asks for."""
        run, found = self.config.run, []
        if first_process() and run.progress:
            found.append(Bar())
        if first_process() and run.tensorboard:
            found.append(TensorBoard(self.folder / run_folder.TENSORBOARD))
        if run.patience is not None:
            found.append(EarlyStopping(run.best_metric, mode=run.best_mode, patience=run.patience))
        return tuple(found)

    # What callbacks read ------------------------------------------------------------------------

    @property
    def params(self) -> Any:
        """The parameters that are evaluated and become the model: averaged, if that is asked."""
        return self.state.params if self.state.ema is None else self.state.ema

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The evaluation lines of metrics.jsonl so far, those before a resume included."""
        return self._evaluations

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and value of the best evaluation by `run.best_metric`, the first of equal ones."""
        name = self.config.run.best_metric
        values = [record.get(name) for record in self.evaluations]
        index = best_index(values, self.config.run.best_mode)
        if index is None:
            return None
        return self.evaluations[index]["step"], self.evaluations[index][name]

    # From start to end --------------------------------------------------------------------------

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        for observer in self._own:
            if hasattr(observer, "close"):
                observer.close()
        if error is not None and self.state is not None:
            words = "it was interrupted" if kind is KeyboardInterrupt else f"of an error: {error}"
            self._write_end(self._why or words)
            if kind is NonFiniteError and first_process():
                report.write_report(self.folder)  # Its curve shows how it came to that.
        self._log.close()

    def _go(self) -> TrainResult:
        notes = self._begin()
        with stop_on_signals() as self._stopping.signals:
            self._tell("on_start")
            for note in notes:
                self._say(note)
            if self.step:
                self._say(f"going on with {self.folder} from step {self.step}")
            try:
                stopped, self._why = self._steps()
                if stopped not in ("signal", "interrupted"):
                    return self._finish(stopped)
            except Interrupted:
                stopped, self._why = self._stopping.signalled()
            self._save()
            self._checkpoints.wait()
        saved = f"saved step {self.step} in {self.folder}"
        if stopped == "interrupted":
            raise KeyboardInterrupt(saved)
        self._say(f"{self._why}; {saved}")
        self._write_end(self._why)
        return self._result(stopped, self.params, self.step)

    def _begin(self) -> list[str]:
        """Make or restore the state, and open the record; what a person should know of it."""
        parts, run = self.parts, self.config.run
        notes = list(parts.notes)
        restored = None
        if self._checkpoints.steps():
            restored = self._checkpoints.restore(parts.abstract_state())
        if restored is None:
            if run.resume != "never" and (self.folder / run_folder.SESSIONS).exists():
                notes.append("the run ended before its first checkpoint, and begins anew")
            self.state = parts.initial()
        else:
            parts.batches.check(restored.extra["data"])
            self.state, self.step = restored.state, restored.step
            self._saved = self.step
            # From the checkpoint, so that all processes have the same.
            self._evaluations = list(restored.extra["evaluations"])
            notes += [*restored.notes, *run_folder.changes(self.folder, self.config)]
        if first_process():
            path = self.folder / run_folder.METRICS
            evaluated = {record["step"] for record in self._evaluations}
            self._log = MetricsLog(path, step=self.step, evaluated=evaluated)
            values = {"started": _now(), "from_step": self.step, **report.environment()}
            values |= facts(parts) | {"notes": notes}
            # First, for by it the folder is known as a run's.
            report.write_session(self.folder, values)
            run_folder.save_config(self.folder, self.config)
            if restored is None:
                run_folder.save_start(self.folder, self.model, self.tokenizers)
        self._numbers = StepNumbers(parts, self._log, began=self._began, arrived=self._arrived)
        return notes

    # Steps --------------------------------------------------------------------------------------

    def _steps(self) -> Ending:
        """Take steps until all are taken or something stops the run; why it ended.

        What is due after a step: its evaluation, then its checkpoint, which keeps the scores. The
        last step has both, unless a signal came, which does not wait for an evaluation; the run
        that goes on owes it.
        """
        parts = self.parts
        index, count = data_shard(parts.mesh)
        batches = prefetch(
            parts.batches,
            self.step,
            stop_step=self.total_steps,
            process_index=index,
            process_count=count,
            transform=lambda batch: to_global(batch, parts.mesh),
        )
        with contextlib.closing(batches):
            ending = self._ending(agree=True)  # a callback may know that it was the end before
            while True:
                signalled = ending is not None and ending[0] in ("signal", "interrupted")
                if not signalled and self._wants_evaluation(at_end=ending is not None):
                    self._evaluate()
                    ending = ending or self._ending(agree=True)  # a callback may have had enough
                if ending is not None or self._wants_save():
                    self._save()
                if ending is not None:
                    return ending
                self._one_step(next(batches))
                ending = self._ending(agree=self.step % self.config.run.log_every == 0)

    def _ending(self, *, agree: bool) -> Ending | None:
        """Why the run ends here, if it does."""
        last = self.step >= self.total_steps
        if last:
            self._numbers.drain()  # What a callback says of the last steps counts.
        asked = self._stopping.asked(agree=agree or last)
        return asked or (("finished", "all steps were taken") if last else None)

    def _one_step(self, batch: Mapping[str, jax.Array]) -> None:
        """Hand a step to the device; read the numbers of one that it has finished."""
        rows, source = batch["input_ids"].shape
        shape = rows, source, batch["labels"].shape[1]
        if shape not in self._shapes:
            # Nothing else is under way, so that the time measured is the compiler's.
            self._numbers.drain()
            began = time.monotonic()
            with self._numbers.meter.paused():
                self.state, metrics = self.parts.step(self.state, batch)
            self._shapes.add(shape)
            self._numbers.compiling += time.monotonic() - began
        else:
            self.state, metrics = self.parts.step(self.state, batch)
        self.step += 1
        self._numbers.expect(self.step, shape, metrics)

    def _arrived(self, step: int, metrics: Mapping[str, float]) -> None:
        """Look at the numbers of a step."""
        if not metrics["finite"] and self.config.run.on_non_finite == "stop":
            self._non_finite(step, metrics)
        self._tell("on_step", {"step": step, **metrics})
        if step % self.config.run.log_every == 0:
            self._write_line(step)

    def _non_finite(self, step: int, metrics: Mapping[str, float]) -> None:
        spelled = {"loss": "the loss", "grad_norm": "the gradient's norm"}
        names = [n for n in spelled if not np.isfinite(metrics[n])] or ["loss"]
        what = " and ".join(f"{spelled[n]} ({metrics[n]})" for n in names)
        saved = self._checkpoints.steps()
        last = (
            f"the checkpoint of step {saved[-1]} stays" if saved else "there is no checkpoint yet"
        )
        self._why = f"{what} of step {step} was not finite"
        raise NonFiniteError(
            f"{what} of step {step} is not finite, and the run stops; {last} in {self.folder}: "
            f"lower the learning rate or lengthen the warm-up, or set "
            f"run.on_non_finite = 'continue' to go on regardless"
        )

    def _write_line(self, step: int) -> None:
        """A training line over the steps since the last one, if there were any."""
        if line := self._numbers.write(step):
            self._tell("on_log", line)

    def _settle(self) -> None:
        """Wait for the device; its numbers are then read and written."""
        self._numbers.drain()
        self._write_line(self.step)

    # What is due between steps --------------------------------------------------------------------

    def _due(self, every: int | str | None) -> bool:
        if self.step == 0:
            return False
        if every == "epoch":
            return self.parts.batches.position(self.step)[1] == 0
        return isinstance(every, int) and every > 0 and self.step % every == 0

    def _wants_evaluation(self, *, at_end: bool = False) -> bool:
        every = self.config.run.evaluate_every
        evaluated = {record["step"] for record in self.evaluations}
        if self.parts.validation is None or every == 0 or self.step in evaluated:
            return False
        return at_end or self._due(every)

    def _wants_save(self) -> bool:
        # The best is kept, and so must be there to be kept.
        evaluated = self.evaluations and self.evaluations[-1]["step"] == self.step
        best = self.best
        is_best = bool(evaluated and best and best[0] == self.step and self.config.run.keep_best)
        return is_best or self._due(self.config.run.save_every)

    def _save(self) -> None:
        """Save this step, unless that is done: its numbers are finite, its line is written."""
        if self._saved == self.step:
            return
        self._settle()
        extra = {
            "data": self.parts.batches.state(self.step),
            "evaluations": self.evaluations,
        }
        numbers = None
        if self.evaluations and self.evaluations[-1]["step"] == self.step:
            last = self.evaluations[-1]
            numbers = {k: v for k, v in last.items() if isinstance(v, float)}
        with self._numbers.meter.paused():
            self._checkpoints.save(self.step, self.state, extra, numbers)
        self._saved = self.step
        self._tell("on_save", self.step)

    # Evaluation -----------------------------------------------------------------------------------

    def _evaluate(self) -> None:
        """Validation loss, generated texts and their scores; a line of metrics.jsonl."""
        self._settle()
        with self._numbers.meter.paused():
            record = self._scores("validation", self.params)
            record = self._log.write("evaluate", self.step, record)
        self._evaluations.append(record)
        self._tell("on_evaluate", record)

    def _scores(self, split: str, params: Any) -> dict[str, Any]:
        """Evaluate parameters on a split; the table of samples is written beside."""
        data = self.parts.validation if split == "validation" else self.parts.test
        assert data is not None
        found = scored(self.parts, params, data, split, may_go_on=self._stopping.check)
        if first_process() and found.samples:
            name = "test" if split == "test" else f"step-{self.step:08d}"
            (self.folder / run_folder.SAMPLES).mkdir(exist_ok=True)
            text = report.sample_table(found.samples)
            hub.write_bytes(self.folder / run_folder.SAMPLES / f"{name}.md", text.encode())
        return {"split": split, **found.to_dict()}

    # The end --------------------------------------------------------------------------------------

    def _finish(self, stopped: Stopped) -> TrainResult:
        """Choose the final parameters, test them, write model and report."""
        self._checkpoints.wait()
        params, step = self._final()
        tested = step in {record["step"] for record in self._log.of("test")}
        if self.parts.test is not None and not agreed(int(tested)):
            record = self._log.write("test", step, self._scores("test", params))
            self._tell("on_evaluate", record)
        self._write_end(self._why)
        finish.write(self.folder, self.model, self.tokenizers, params, step)
        result = self._result(stopped, params, step)
        self._tell("on_end", result)
        return result

    def _final(self) -> tuple[Any, int]:
        """The parameters that become the model, and whose step they are of."""
        best = self.best
        if self.config.run.final == "last" or best is None:
            return self.params, self.step
        chosen = finish.best_kept(self._checkpoints, best[0], self.step)
        if chosen == self.step:
            return self.params, self.step
        self.state = None  # Room for the other one.
        restored = finish.restore(self._checkpoints, self.parts.abstract_state(), chosen)
        self.state = restored.state
        return self.params, restored.step

    def _result(self, stopped: Stopped, params: Any, params_step: int) -> TrainResult:
        kinds = ("train", "evaluate", "test")
        lines = {kind: self._log.of(kind)[-1] for kind in kinds if self._log.of(kind)}
        return TrainResult(
            folder=self.folder,
            step=self.step,
            stopped=stopped,
            why=self._why,
            metrics=lines,
            best=self.best,
            model=self.model,
            params=params,
            params_step=params_step,
            tokenizers=self.tokenizers,
        )

    def _write_end(self, why: str) -> None:
        if first_process():
            seconds = time.monotonic() - self._began
            end = {"ended": _now(), "step": self.step, "why": why, "seconds": seconds}
            report.write_session(self.folder, end)

    # Telling --------------------------------------------------------------------------------------

    def _tell(self, event: str, *arguments: Any) -> None:
        stop = notify(self._callbacks, event, self, *arguments)
        self._stopping.wish = stop or self._stopping.wish

    def _say(self, text: str) -> None:
        for observer in self._own:
            if isinstance(observer, Bar):
                observer.say(text)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
