"""What a training run is promised about its checkpoints.

They come back bit for bit, on any mesh; a run killed at any moment loses at most the step that was
being written; a damaged file is noticed, and the step before serves.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import hypothesis.extra.numpy as arrays_of
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import saving_child
from hypothesis import assume, given, settings
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_encdec.errors import CheckpointError, InputError
from jax_encdec.training.checkpoint import Checkpoints
from jax_encdec.training.step_folders import LOCK, RUN

AUTO = jax.sharding.AxisType.Auto


def mesh(count: int, name: str = "fsdp") -> Mesh:
    return jax.make_mesh((count,), (name,), (AUTO,), devices=jax.devices()[:count])


def small(step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    return {
        "kernel": rng.standard_normal((40, 64), np.float32),
        "bias": rng.standard_normal(16).astype(ml_dtypes.bfloat16),
        "step": np.asarray(step, np.int32),
    }


def same(left: Any, right: Any) -> bool:
    """Equal to the last bit, NaNs and signs of zeros included."""
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return jax.tree.structure(left) == jax.tree.structure(right) and all(
        a.dtype == b.dtype and a.shape == b.shape and np.asarray(a).tobytes() == b.tobytes()
        for a, b in ((x, np.asarray(y)) for x, y in pairs)
    )


def fill(folder: Path, *steps: int, **options: Any) -> None:
    with Checkpoints(folder, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, small(step), {"at": step}, {"loss": 1 / (1 + step)})


def names(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name != LOCK)


def restored_step(folder: Path, **options: Any) -> int | None:
    with Checkpoints(folder, **options) as checkpoints:
        restored = checkpoints.restore(small(0))
    assert restored is None or same(restored.state, small(restored.step))
    return restored and restored.step


# What goes in comes out.


def test_an_optimizer_state_comes_back_bit_for_bit(tmp_path):
    params = {"a": {"kernel": jnp.arange(12.0).reshape(3, 4)}, "b": jnp.float32(-0.0), "none": None}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = (params, optimizer.init(params), jnp.zeros((0, 3)), np.uint32(7))
    extra = {"epoch": 2, "text": "né", "list": [1, None, {"deep": 0.1}]}
    with Checkpoints(tmp_path / "new" / "folder") as checkpoints:
        assert checkpoints.restore(state) is None
        checkpoints.save(3, state, extra, {"loss": 0.5})
        restored = checkpoints.restore(jax.eval_shape(lambda: state))
        assert restored is not None
    assert same(restored.state, state)
    assert (restored.step, restored.extra, restored.metrics) == (3, extra, {"loss": 0.5})
    assert restored.notes == ()


def test_numbers_that_are_none_come_back_too(tmp_path):
    """A loss may overflow; the run must still be able to stop and go on."""
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, small(1), {"losses": [np.inf, 1.5]}, {"loss": np.nan})
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.best() is None
        restored = checkpoints.restore(small(0))
    assert restored is not None
    assert restored.extra == {"losses": [np.inf, 1.5]}
    assert np.isnan(restored.metrics["loss"])


_KEYS = st.text("abcXYZ_.0189é ", min_size=1, max_size=5)
_DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16, np.int32, np.int8, np.uint32, np.bool_)
_LEAVES = st.sampled_from(_DTYPES).flatmap(
    lambda dtype: st.tuples(
        st.just(dtype), arrays_of.array_shapes(min_dims=0, max_dims=3, min_side=0), st.binary()
    )
)
_TREES = st.recursive(
    st.none() | _LEAVES.map(lambda leaf: _array(*leaf)),
    lambda tree: st.dictionaries(_KEYS, tree, max_size=3) | st.lists(tree, max_size=3),
    max_leaves=6,
)


def _array(dtype: Any, shape: tuple[int, ...], content: bytes) -> np.ndarray:
    """Any bits at all, among them NaNs of every kind."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.resize(np.frombuffer(content or b"\x80", np.uint8), size)
    return (
        (raw & 1).view(bool).reshape(shape) if dtype is np.bool_ else raw.view(dtype).reshape(shape)
    )


@settings(max_examples=15, deadline=None)
@given(_TREES)
def test_any_tree_of_arrays_comes_back_bit_for_bit(tree):
    assume(any(np.size(leaf) for leaf in jax.tree.leaves(tree)))
    with tempfile.TemporaryDirectory() as folder, Checkpoints(folder) as checkpoints:
        checkpoints.save(0, tree)
        restored = checkpoints.restore(tree)
        assert restored is not None
        assert same(restored.state, tree)


def test_the_arrays_may_be_donated_and_changed_as_soon_as_save_returns(tmp_path):
    """Saving goes on in the background, of memory that training has taken back."""
    placed = NamedSharding(mesh(8), PartitionSpec("fsdp"))
    step = jax.jit(lambda state: jax.tree.map(lambda x: -3 * x + 1, state), donate_argnums=0)
    state = {"x": jax.device_put(jnp.arange(2.0**20).reshape(8, -1), placed), "y": jnp.ones(999)}
    host = np.arange(50_000, dtype=np.float32)
    with Checkpoints(tmp_path, keep=None) as checkpoints:
        seen = []
        for number in range(4):
            seen.append(jax.tree.map(np.array, (state, host)))
            checkpoints.save(number, (state, host))
            state, host[:] = step(state), host[::-1].copy()
        for number, expected in enumerate(seen):
            restored = checkpoints.restore(expected, number)
            assert restored is not None
            assert same(restored.state, expected)


def test_restores_onto_another_mesh_device_count_and_dtype(tmp_path):
    tree = {"w": jnp.arange(64.0).reshape(8, 8) / 7, "n": jnp.arange(8)}
    saved = jax.device_put(tree, NamedSharding(mesh(8), PartitionSpec("fsdp")))
    grid = jax.make_mesh((2, 2), ("a", "b"), (AUTO, AUTO), devices=jax.devices()[:4])
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, saved)
        for target in (
            NamedSharding(mesh(1), PartitionSpec()),
            NamedSharding(mesh(2, "tensor"), PartitionSpec("tensor")),
            NamedSharding(grid, PartitionSpec(("a", "b"))),
            NamedSharding(grid, PartitionSpec("b")),
        ):
            for dtype in (jnp.float32, jnp.bfloat16):
                like = {
                    "w": jax.ShapeDtypeStruct((8, 8), dtype, sharding=target),
                    "n": jax.ShapeDtypeStruct((8,), jnp.int32, sharding=target),
                }
                restored = checkpoints.restore(like)
                assert restored is not None
                assert same(restored.state, tree | {"w": tree["w"].astype(dtype)})
                assert {leaf.sharding for leaf in jax.tree.leaves(restored.state)} == {target}


def test_restores_a_part_of_what_was_saved(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": small(1), "opt_state": (small(2), small(3))})
        restored = checkpoints.restore({"params": small(0)})
        assert restored is not None
        assert same(restored.state, {"params": small(1)})


@pytest.mark.parametrize(
    ("like", "message"),
    [
        (
            {"kernal": np.zeros(2, np.float32)},
            "no kernal; did you mean 'kernel'.*another model or optimizer",
        ),
        (
            small(0) | {"kernel": np.zeros((64, 40), np.float32)},
            r"kernel of shape \(40, 64\); expected \(64,",
        ),
        (small(0) | {"step": np.float32(0)}, "step as int32; expected float32"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_nothing_is_set_aside(tmp_path, like, message):
    fill(tmp_path, 1, 2)
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(CheckpointError, match=message):
            checkpoints.restore(like)
        assert checkpoints.steps() == [1, 2]


# What is kept.


def test_keeps_the_newest_and_the_best(tmp_path):
    losses = {1: 0.5, 2: 0.1, 3: 0.9, 4: float("nan"), 5: 0.4, 6: None, 7: 0.3, 8: 0.2}
    with Checkpoints(tmp_path, keep=2, keep_best=2) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(step, small(step), metrics=None if loss is None else {"loss": loss})
        checkpoints.wait()
        assert checkpoints.steps() == [2, 7, 8]  # 8 is the newest and second best
        assert checkpoints.best() == 2
    assert names(tmp_path) == ["2", "7", "8"]
    with Checkpoints(tmp_path, keep=1, keep_best=1, best_mode="max") as checkpoints:
        checkpoints.save(9, small(9), metrics={"loss": 0.0})
        checkpoints.wait()
        assert checkpoints.steps() == [7, 9]  # known from the files of an earlier run


def test_of_equally_good_steps_the_first_is_the_best(tmp_path):
    """As for whoever compares each new value with the best so far."""
    with Checkpoints(tmp_path, keep=1, best_mode="max") as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, small(step), metrics={"loss": 100.0})
        checkpoints.wait()
        assert checkpoints.best() == 1
        assert checkpoints.steps() == [1, 3]


def test_a_step_is_saved_once(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, small(1))
        checkpoints.save(1, small(2))
        restored = checkpoints.restore(small(0))
        assert restored is not None
        assert same(restored.state, small(1))


def test_a_finished_run_that_is_resumed_saves_nothing_anew(tmp_path):
    fill(tmp_path, 1, 2)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(small(0)) is not None
        checkpoints.save(2, small(2))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_run_that_goes_back_sets_the_later_steps_aside(tmp_path):
    fill(tmp_path, 1, 2, 3)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        restored = checkpoints.restore(small(0), step=1)
        assert restored is not None
        assert restored.step == 1
        assert checkpoints.steps() == [1, 2, 3]
        checkpoints.save(2, small(22))
        checkpoints.wait()
        assert checkpoints.steps() == [1, 2]
        again = checkpoints.restore(small(0))
        assert again is not None
        assert same(again.state, small(22))
    assert names(tmp_path) == ["1", "2", "2.abandoned", "3.abandoned"]


def test_a_reader_changes_nothing(tmp_path):
    fill(tmp_path, 1, 2)
    (tmp_path / "3.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "2" / RUN).write_text("{}")
    before = sorted(map(str, tmp_path.rglob("*")))
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        with pytest.warns(UserWarning, match=r"step 2 .* is damaged \(run.json.*step 1 is used"):
            restored = checkpoints.restore(small(0))
        assert restored is not None
        assert restored.step == 1
        with pytest.raises(InputError, match="read-only"):
            checkpoints.save(3, small(3))
    assert sorted(map(str, tmp_path.rglob("*"))) == before


# Killed.


def test_killed_at_any_moment_at_most_the_step_being_written_is_lost(tmp_path):
    kill_repeatedly(tmp_path, 10)


@pytest.mark.exhaustive
def test_killed_at_any_moment_long(tmp_path):
    kill_repeatedly(tmp_path, 40)


def kill_repeatedly(folder: Path, kills: int) -> None:
    moments = random.Random(0)
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, saving_child.__file__]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    halfway = newest = 0
    with subprocess.Popen(command, env=environment, **pipes) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        for number in range(kills):
            print(folder, file=parent.stdin, flush=True)
            child = int(parent.stdout.readline().removeprefix("started "))
            # Now and then it is killed while it starts, sweeps or restores; else while it saves.
            said = [parent.stdout.readline()] if number % 5 else []
            time.sleep(moments.uniform(0, 0.5))
            os.kill(child, signal.SIGKILL)
            while not said or said[-1] != "gone\n":
                said.append(parent.stdout.readline())
            begun = int(said[-2]) if len(said) > 1 else newest
            halfway += any(name.endswith("-tmp") for name in names(folder))
            with Checkpoints(folder, read_only=True) as checkpoints:  # the child will sweep
                before, newest = newest, max(checkpoints.steps(), default=0)
                assert newest >= max(before, begun - 1), "more was lost than what was being written"
                restored = checkpoints.restore(saving_child.state(0))
            assert (restored.step if restored else 0) == newest, "the newest was not sound"
            assert not restored or same(restored.state, saving_child.state(newest))
        parent.stdin.close()
    print(f"{halfway} of {kills} kills left an unfinished step; {newest} steps in all")
    assert newest > 0
    assert halfway >= kills / 2, "the kills were not spread over saving"
    with Checkpoints(folder) as checkpoints:
        assert all(name.isdigit() for name in names(folder)), "not swept"
        assert (
            len(checkpoints.steps()) <= 4
        )  # keep=2, keep_best=1, and one that was not yet deleted


def test_an_unfinished_step_is_reported_and_swept(tmp_path):
    fill(tmp_path, 1)
    shutil.copytree(tmp_path / "1", tmp_path / "2.orbax-checkpoint-tmp")
    shutil.copytree(tmp_path / "1", tmp_path / "0.deleted")
    (tmp_path / "mine.txt").write_text("not a checkpoint's")
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.warns(UserWarning, match="step 2 .* was never finished; step 1 is used"):
            restored = checkpoints.restore(small(0))
        assert restored is not None
        assert len(restored.notes) == 1
    assert names(tmp_path) == ["1", "mine.txt"]


# Damaged.

MARKERS = ("_CHECKPOINT_METADATA", "commit_success.txt")
"""Orbax's two outermost files: they say that the step was committed and hold nothing else."""


def damage_repeatedly(folder: Path, flips: int, truncations: int) -> None:
    """Flip bits of and cut random files; a file is as likely to be hit as it is long."""
    fill(folder, 1, 2)
    chance = random.Random(0)
    files = sorted(path for path in (folder / "2").rglob("*") if path.is_file())
    sizes = [path.stat().st_size for path in files]
    assert len(files) > 10
    hit = set()
    for number in range(flips + truncations):
        path = chance.choices(files, sizes)[0] if number < flips else files[number % len(files)]
        hit.add(path)
        whole = path.read_bytes()
        at = chance.randrange(len(whole))
        if number < flips:
            path.write_bytes(
                whole[:at] + bytes([whole[at] ^ 1 << chance.randrange(8)]) + whole[at + 1 :]
            )
        else:
            path.write_bytes(whole[:at])
        with Checkpoints(folder, read_only=True) as checkpoints:
            if path.name in MARKERS and path.parent.name == "2":
                restored = checkpoints.restore(small(0))
                assert restored is not None
                assert restored.step == 2, "nothing that is restored was damaged"
            else:
                with pytest.warns(UserWarning, match="step 2 .* is damaged .* step 1 is used"):
                    restored = checkpoints.restore(small(0))
                assert restored is not None
                assert restored.step == 1, f"{path} was damaged at byte {at}, and not noticed"
        assert same(restored.state, small(restored.step))
        path.write_bytes(whole)
    assert restored_step(folder) == 2
    assert truncations < len(files) or hit == set(files)


def test_every_flipped_bit_and_every_truncation_is_noticed(tmp_path):
    damage_repeatedly(tmp_path, 100, 50)


@pytest.mark.exhaustive
def test_every_flipped_bit_and_every_truncation_is_noticed_long(tmp_path):
    damage_repeatedly(tmp_path, 1000, 500)


def test_a_damaged_step_is_set_aside_and_the_run_goes_on(tmp_path):
    fill(tmp_path, 1, 2, 3, 4, keep=None)
    (tmp_path / "4" / "SHA256SUMS").unlink()
    next((tmp_path / "3" / "state").rglob("manifest.ocdbt")).unlink()
    with Checkpoints(tmp_path, keep=None) as checkpoints:
        with pytest.warns(UserWarning, match="is damaged and set aside") as warned:
            restored = checkpoints.restore(small(0))
        assert restored is not None
        assert restored.step == 2
        assert same(restored.state, small(2))
        assert [str(warning.message) for warning in warned] == list(restored.notes)
        assert [note.split(" in ")[0] for note in restored.notes] == ["step 4", "step 3"]
        assert "set aside as 4.damaged" in restored.notes[0]
        for step in (3, 4):
            checkpoints.save(step, small(step))
    assert names(tmp_path) == ["1", "2", "3", "3.damaged", "4", "4.damaged"]
    assert restored_step(tmp_path) == 4


def test_when_all_steps_are_damaged_none_is_used_and_none_is_lost(tmp_path):
    """Beginning anew in silence would be the worst answer."""
    fill(tmp_path, 1, 2)
    for step in ("1", "2"):
        (tmp_path / step / RUN).write_text("{}")
    for _ in range(2):
        with Checkpoints(tmp_path) as checkpoints:
            with pytest.raises(
                CheckpointError, match=r"no checkpoint in .* can be used: step 2: run"
            ):
                checkpoints.restore(small(0))
            assert checkpoints.steps() == [1, 2]


@pytest.mark.parametrize("step", [1, 5])
def test_a_step_asked_for_by_number_is_had_or_refused(tmp_path, step):
    fill(tmp_path, 1, 2)
    (tmp_path / "1" / RUN).write_text("{}")
    message = {1: "step 1 .* is damaged: run.json", 5: "no step 5; its steps are: 1, 2"}[step]
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError, match=message):
        checkpoints.restore(small(0), step=step)


# What cannot be written.


def test_a_full_disk_is_one_sentence_and_the_steps_before_stay(tmp_path):
    """A limit on the size of files, as close to a full disk as a test may come."""
    fill(tmp_path, 1, 2)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        try:
            checkpoints.save(3, small(3))
            with pytest.raises(CheckpointError, match="step 3 could not be saved") as caught:
                checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "\n" not in str(caught.value)
        assert names(tmp_path) == ["1", "2"]
        checkpoints.save(3, small(3))
        checkpoints.wait()
        assert checkpoints.steps() == [2, 3]  # 2 is the best but for 3, which has no loss
    assert restored_step(tmp_path) == 3


def test_what_the_disk_says_when_it_is_full_becomes_a_sentence(tmp_path, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with Checkpoints(tmp_path) as checkpoints:
        monkeypatch.setattr("jax_encdec.hub.write_bytes", full)
        checkpoints.save(1, small(1))
        with pytest.raises(CheckpointError, match="step 1 could not be saved: the disk is full"):
            checkpoints.wait()
    assert names(tmp_path) == []


def test_two_processes_never_write_to_one_folder(tmp_path, monkeypatch):
    """A job may be started again while a process of the last one has yet to notice."""
    monkeypatch.setattr("jax_encdec.training.step_folders._LOCK_PATIENCE", 0.3)
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); "
    command = [sys.executable, "-c", hold + "print('held', flush=True); sys.stdin.read()"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, str(tmp_path / LOCK)], **pipes) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match="another process is writing checkpoints to"):
            Checkpoints(tmp_path)
        other.kill()
    fill(tmp_path, 1)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps() == [1]


def test_a_folder_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CheckpointError, match="cannot be used for checkpoints"):
            Checkpoints(folder)
    with pytest.raises(CheckpointError, match="there is no such folder"):
        Checkpoints(tmp_path / "nothing", read_only=True)
    with pytest.raises(InputError, match=r"got gs://bucket/run: mount the bucket"):
        Checkpoints("gs://bucket/run")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, {}), "step must be a count of updates; got -1"),
        ((1, {"a": "text"}), "a of the state must be an array; got a str"),
        ((1, {"a": np.arange(3)}), "a of the state is int64, which JAX would narrow"),
        ((1, {"a": None, "b": jnp.zeros((3, 0))}), "must hold an array that is not empty"),
        ((1, {"a": jax.random.key(0)}), "a of the state is a key"),
        ((1, {"a/b": 1.0, "a": {"b": 2.0}}), "two leaves .* have one name"),
        ((1, {}, {"model": object()}), "extra must hold only what JSON can hold"),
    ],
)
def test_what_cannot_be_saved_is_refused(tmp_path, arguments, message):
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(InputError, match=message):
        checkpoints.save(*arguments)


@pytest.mark.parametrize("options", [{"keep": 0}, {"keep_best": -1}, {"best_mode": "least"}])
def test_options_out_of_range_are_refused(tmp_path, options):
    with pytest.raises(InputError, match=next(iter(options))):
        Checkpoints(tmp_path, **options)


def test_one_process_alone_is_never_preempted(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert not checkpoints.reached_preemption(1)
