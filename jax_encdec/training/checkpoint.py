"""Checkpoints of a training run: written in the background, verified before they are trusted.

Orbax writes the arrays of a step into a temporary folder; the digests of all files are added, and
then the folder is renamed, which commits it (`step_folders.py`). So a committed step always has its
digests, and a process that is killed leaves at most a temporary folder, swept when the run is
opened again. A step whose files are not those that were written is set aside, and the one before is
used. This is the one module that knows Orbax.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jax_encdec.errors import CheckpointError, EncDecError, InputError, nearest
from jax_encdec.training.gather import on_first_process
from jax_encdec.training.step_folders import ABANDONED, DAMAGED, StepFolders

_on_first_process = partial(on_first_process, otherwise=CheckpointError)
_PATIENCE = 10.0
"""Seconds for a save in progress when this process of several ends in an error."""


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What `Checkpoints.restore` found."""

    step: int
    state: Any
    """The pytree that was asked for, of `jax.Array`s."""
    extra: dict[str, Any]
    metrics: dict[str, float]
    notes: tuple[str, ...] = ()
    """A sentence for each newer step that could not be used; on process 0 only."""


class Checkpoints:
    """The checkpoints of one run, in one folder on a file system that all processes see.

    Every process of a job makes this object and calls its methods, in the same order, from its
    main thread. As a context manager it waits, on leaving, for the save in progress.

    Args:
        folder: made if it is not there; temporary folders that a killed process left are removed.
        keep: how many of the newest steps stay. None: all.
        keep_best: how many of the best steps stay as well.
        best_metric: which of the `metrics` given to `save` says what is best.
        best_mode: "min" or "max".
        asynchronous: write in the background; False: `save` returns when the step is committed.
        read_only: change nothing in the folder, in which a run may be going on.

    Raises:
        InputError: an argument is none of these.
        CheckpointError: the folder cannot be made, or cannot be read.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        keep: int | None = 3,
        keep_best: int = 1,
        best_metric: str = "loss",
        best_mode: str = "min",
        asynchronous: bool = True,
        read_only: bool = False,
    ):
        if keep is not None and keep < 1:
            raise InputError(f"keep must be at least 1, or None for all steps; got {keep}")
        if keep_best < 0:
            raise InputError(f"keep_best must not be negative; got {keep_best}")
        if best_mode not in ("min", "max"):
            raise InputError(f"best_mode must be 'min' or 'max'; got {best_mode!r}")
        if "://" in os.fspath(folder):
            raise InputError(
                f"checkpoints are kept in a folder of a file system; got {os.fspath(folder)}: "
                "mount the bucket, and give the folder where it is mounted"
            )
        self.folder = Path(os.path.abspath(folder))
        self._keep, self._keep_best = keep, keep_best
        self._best_metric, self._best_mode = best_metric, best_mode
        self._asynchronous, self._read_only = asynchronous, read_only
        self._saving: tuple[int, bytes] | None = None  # step being written, and its run.json
        self._saved: set[int] = set()  # committed by this object
        self._metrics: dict[int, dict[str, float]] = {}
        self._files = StepFolders(self.folder)
        with self._told("cannot be used for checkpoints"):
            if not read_only:
                _on_first_process(self._files.open)
            elif not self.folder.is_dir():
                raise FileNotFoundError("there is no such folder")
            self._manager: ocp.CheckpointManager | None = self._open()
        self._quiet = ExitStack()
        self._quiet.enter_context(_quiet_orbax())

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or jax.process_count() == 1:
            self.close()
            return
        # A peer may be gone, and the save in progress would wait for it: not for long.
        manager, self._manager = self._manager, None
        if manager is not None and self._saving is not None:
            waiting = Thread(target=_wait_quietly, args=(manager,), daemon=True)
            waiting.start()
            waiting.join(_PATIENCE)

    def steps(self) -> list[int]:
        """Return the committed steps, in order. Whether their files are sound `restore` finds out.

        A step is committed from one moment to the next, by a rename.
        """
        return self._files.steps()

    def best(self) -> int | None:
        """Return the kept step with the best `best_metric`, the first of equals; None: none."""
        return next(iter(self._best_first()), None)

    def save(
        self,
        step: int,
        state: Any,
        extra: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Begin to save a step; its arrays may be donated or changed as soon as this returns.

        First waits for the save before it, as `wait` does. A step that this object has saved or
        restored is left alone. Others from `step` on are set aside: the run went back, and they
        are no longer its own.

        Args:
            step: how many updates the state has seen.
            state: pytree of `jax.Array`s or, in a single process, numpy arrays and scalars.
            extra: what JSON can hold, given back by `restore`; that of process 0 counts.
            metrics: numbers by name, among them `best_metric` if the step may be one of the best.

        Raises:
            InputError: `extra` is not JSON, a leaf is no array, or there is nothing to save.
            CheckpointError: this step, or the one before, could not be written. Those committed are
                as they were, and another save may be tried.
        """
        if self._read_only:
            raise InputError(f"{self.folder} was opened read-only; nothing can be saved in it")
        step, leaves = int(step), _leaves(state)
        content = _describe(step, leaves, extra or {}, metrics or {})
        arrays = {name: leaf for name, leaf in leaves.items() if np.size(leaf)}
        if not arrays:  # Orbax takes neither nothing nor an array of nothing
            raise InputError("the state must hold an array that is not empty")
        self.wait()
        if step in self._saved:
            return
        if _on_first_process(lambda: self._abandon(step)):
            self._reopen()
        self._saving = (step, content)
        with self._writing():
            self._orbax.save(
                step, args=ocp.args.Composite(state=ocp.args.PyTreeSave(arrays)), force=True
            )
        if not self._asynchronous:
            self.wait()

    def wait(self) -> None:
        """Return when nothing is being written any more; delete what need not be kept.

        Raises:
            CheckpointError: the step that was being saved could not be written.
        """
        if self._saving is None:
            return
        with self._writing():
            self._orbax.wait_until_finished()
        (step, content), self._saving = self._saving, None
        self._saved.add(step)
        self._metrics[step] = json.loads(content)["metrics"]
        _on_first_process(lambda: self._retain(step))

    def close(self) -> None:
        """Wait for the save in progress, and let go of the folder."""
        if self._manager is None:
            return
        try:
            self.wait()
        finally:
            manager, self._manager = self._manager, None
            manager.close()
            self._files.close()
            self._quiet.close()

    def restore(self, like: Any, step: int | None = None) -> Restored | None:
        """Read the newest sound step, or a given one, onto any devices, whichever it was saved on.

        Every file is compared with its digest first. Newer steps that are damaged are set aside (as
        `30.damaged`), warned of and noted, and the one before is used.

        Args:
            like: pytree of `jax.ShapeDtypeStruct`s with the shardings to restore into (or of
                arrays); floating-point leaves may ask for another dtype than they were saved in. It
                may be a part of what was saved, such as the parameters alone.
            step: a committed step; None: the newest that is sound.

        Returns:
            None: nothing was ever committed here.

        Raises:
            CheckpointError: the step asked for is damaged or not there; all steps are damaged; or
                what was saved has not the leaves and shapes of `like`.
        """
        wanted = _leaves(like)
        self.wait()
        notes: list[str] = []
        with self._told("could not be read"):
            chosen = _on_first_process(lambda: self._choose(step, notes))
        if chosen < 0:
            return None
        if step is None and not self._read_only:
            self._reopen()
        for note in notes:
            warnings.warn(note, stacklevel=2)
        with self._told(f"step {chosen} could not be restored"):
            run = self._files.run(chosen)
            _check_fit(wanted, run["leaves"], f"step {chosen} in {self.folder}")
            leaves = self._read(chosen, wanted)
        self._saved.add(chosen)
        return Restored(
            step=chosen,
            state=jax.tree.unflatten(jax.tree.structure(like), leaves),
            extra=run["extra"],
            metrics=run["metrics"],
            notes=tuple(notes),
        )

    def reached_preemption(self, step: int) -> bool:
        """Whether all processes should save this step and stop, as one of them was told to.

        JAX makes the processes of a job agree on the step after any of them got SIGTERM; every
        process must ask once a step. Always False in a single process (see
        `distributed.stop_on_signals`).
        """
        return ocp.multihost.reached_preemption(step)

    # Orbax

    def _open(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                create=False,
                save_root_metadata=False,
                lightweight_initialize=True,  # read nothing that might be damaged
                preservation_policy=ocp.checkpoint_managers.LatestN(None),  # see _retain
                async_options=ocp.options.AsyncOptions(
                    post_finalization_callback=self._before_commit,
                    create_directories_asynchronously=False,  # fail at once when it cannot be done
                ),
            ),
        )

    @property
    def _orbax(self) -> ocp.CheckpointManager:
        if self._manager is None:
            raise InputError(f"the checkpoints in {self.folder} have been closed")
        return self._manager

    def _reopen(self) -> None:
        """Make Orbax forget the steps that were set aside."""
        self._orbax.close()
        self._manager = self._open()

    def _before_commit(self) -> None:
        """On process 0: all have written their arrays, and the folder is about to be renamed."""
        assert self._saving is not None
        self._files.seal(*self._saving)

    def _read(self, step: int, wanted: Mapping[str, Any]) -> list[jax.Array]:
        """The leaves of a step in the order, shardings and dtypes of `wanted`."""
        targets = {
            name: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=_sharding(leaf))
            for name, leaf in wanted.items()
        }
        arrays = {name: target for name, target in targets.items() if math.prod(target.shape)}
        args = ocp.args.PyTreeRestore(
            item=arrays,
            restore_args=ocp.checkpoint_utils.construct_restore_args(arrays),
            partial_restore=True,
        )
        restored = self._orbax.restore(step, args=ocp.args.Composite(state=args))["state"]
        return [
            restored[name]
            if name in restored
            else jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=target.sharding)(
                target.shape, target.dtype
            )
            for name, target in targets.items()
        ]

    # On process 0

    def _choose(self, step: int | None, notes: list[str]) -> int:
        """The step to restore, -1 if there is none; newer ones are set aside, with a note each."""
        steps = self.steps()
        if step is not None:
            if step not in steps:
                known = ", ".join(map(str, steps)) or "none"
                raise CheckpointError(f"{self.folder} has no step {step}; its steps are: {known}")
            if damage := self._files.damage(step):
                raise CheckpointError(f"step {step} in {self.folder} is damaged: {damage}")
            return step
        damaged: list[tuple[int, str]] = []
        while steps and (damage := self._files.damage(steps[-1])):
            damaged.append((steps.pop(), damage))
        if damaged and not steps:
            raise CheckpointError(
                f"no checkpoint in {self.folder} can be used: "
                + "; ".join(f"step {number}: {damage}" for number, damage in damaged)
                + "; restore the folder from a copy, or move it away to begin anew"
            )
        chosen = steps[-1] if steps else -1
        used = f"step {chosen} is used" if steps else "there is none before it"
        for number in self._files.unfinished:
            if number > chosen:
                notes.append(f"step {number} in {self.folder} was never finished; {used}")
        for number, damage in damaged:
            aside = ""
            if not self._read_only:
                aside = f" and set aside as {self._files.set_aside(number, DAMAGED)}"
            notes.append(f"step {number} in {self.folder} is damaged{aside} ({damage}); {used}")
        self._files.unfinished.clear()
        return chosen

    def _abandon(self, step: int) -> int:
        """Set aside what an earlier run committed from `step` on; return how many steps."""
        steps = [number for number in self.steps() if number >= step]
        for number in steps:
            self._files.set_aside(number, ABANDONED)
        return len(steps)

    def _retain(self, newest: int) -> None:
        """Delete what need not be kept, now that `newest` is committed with all its files."""
        if problem := self._files.missing(newest):
            raise CheckpointError(
                f"step {newest} was saved in {self.folder}, but {problem}; no other was deleted"
            )
        steps = self.steps()
        keep = len(steps) if self._keep is None else self._keep
        for step in {*steps} - {*steps[-keep:], *self._best_first()[: self._keep_best]}:
            self._files.delete(step)

    def _best_first(self) -> list[int]:
        sign = 1 if self._best_mode == "min" else -1
        values = {}
        for step in self.steps():
            if step not in self._metrics:
                try:
                    self._metrics[step] = self._files.run(step)["metrics"]
                except CheckpointError:  # damaged; restore will say so
                    continue
            value = self._metrics[step].get(self._best_metric)
            if value is not None and math.isfinite(value):
                values[step] = sign * value
        return sorted(values, key=lambda step: (values[step], step))

    # Errors

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """If it fails, give the room back, so that the next save has it."""
        assert self._saving is not None
        step, _ = self._saving
        try:
            with self._told(f"step {step} could not be saved"):
                yield
        except Exception:  # not when interrupted: the save goes on, and close waits for it
            self._saving = None
            if jax.process_index() == 0:
                self._files.drop_unfinished(step)
            raise

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Turn what goes wrong below into one sentence about this folder."""
        try:
            yield
        except EncDecError:
            raise
        except Exception as error:
            raise CheckpointError(f"{self.folder}: {what}: {_reason(error)}") from error


def _wait_quietly(manager: ocp.CheckpointManager) -> None:
    with suppress(Exception):
        manager.wait_until_finished()


def _leaves(tree: Any) -> dict[str, Any]:
    """The leaves by name: params/decoder/embedding, opt_state/0/mu/..."""
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}
    if len(leaves) != len(paths):
        raise InputError("two leaves of the state have one name; no key may contain a slash")
    for name, leaf in leaves.items():
        if isinstance(leaf, (bool, int, float)):
            leaves[name] = np.asarray(leaf, jax.dtypes.result_type(leaf))
        elif not isinstance(leaf, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)):
            raise InputError(f"{name} of the state must be an array; got a {type(leaf).__name__}")
        elif jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise InputError(f"{name} of the state is a key; save its jax.random.key_data")
        elif jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
            raise InputError(
                f"{name} of the state is {leaf.dtype}, which JAX would narrow; save it in 32 bits "
                "or set jax_enable_x64"
            )
    return leaves


def _describe(
    step: int,
    leaves: Mapping[str, Any],
    extra: Mapping[str, Any],
    metrics: Mapping[str, float],
) -> bytes:
    if step < 0:
        raise InputError(f"step must be a count of updates; got {step}")
    shapes = {name: [str(leaf.dtype), *np.shape(leaf)] for name, leaf in leaves.items()}
    numbers = {name: float(value) for name, value in metrics.items()}
    run = {"step": step, "metrics": numbers, "extra": dict(extra), "leaves": shapes}
    try:
        return json.dumps(run).encode()
    except (TypeError, ValueError) as error:
        raise InputError(f"extra must hold only what JSON can hold: {error}") from None


def _check_fit(wanted: Mapping[str, Any], saved: Mapping[str, list[Any]], where: str) -> None:
    """Compare what is asked for with what was saved, before megabytes are read."""
    if missing := [name for name in wanted if name not in saved]:
        raise CheckpointError(
            f"{where} has no {missing[0]}{nearest(missing[0], saved)} ({len(missing)} of "
            f"{len(wanted)} leaves are missing); it was saved with another model or optimizer"
        )
    for name, leaf in wanted.items():
        dtype, *shape = saved[name]
        if tuple(shape) != np.shape(leaf):
            raise CheckpointError(
                f"{where} holds {name} of shape {tuple(shape)}; expected {np.shape(leaf)}: it was "
                "saved with another model or optimizer"
            )
        numbers = all(jnp.issubdtype(each, jnp.inexact) for each in (dtype, leaf.dtype))
        if leaf.dtype != dtype and not numbers:
            raise CheckpointError(f"{where} holds {name} as {dtype}; expected {leaf.dtype}")


def _sharding(leaf: Any) -> jax.sharding.Sharding:
    sharding = getattr(leaf, "sharding", None)
    if sharding is not None:
        return sharding
    everywhere = jax.sharding.Mesh(np.array(jax.devices()), ("all",))
    return jax.sharding.NamedSharding(everywhere, jax.sharding.PartitionSpec())


def _reason(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    if "No space left" in text or "Disk quota" in text:
        return "the disk is full; make room, or set another folder"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return text.splitlines()[0][:300]


@contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Keep what Orbax prints of an error that it also raises off the screen.

    It logs the whole stack trace. And where several arrays cannot be written it stops at the first;
    Python prints that nobody waits for the others.
    """
    logger, hook = logging.getLogger("absl"), sys.unraisablehook

    def not_from_orbax(record: logging.LogRecord) -> bool:
        return f"{os.sep}orbax{os.sep}" not in record.pathname

    def not_forsaken(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    logger.addFilter(not_from_orbax)
    sys.unraisablehook = not_forsaken
    try:
        yield
    finally:
        logger.removeFilter(not_from_orbax)
        if sys.unraisablehook is not_forsaken:
            sys.unraisablehook = hook
