"""A run that was stopped and resumed is the run that was never stopped.

Bit for bit on the same mesh, dropout, data order, moments and moving average included; up to
rounding on another.
"""

from __future__ import annotations

import random
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_run import TinyRun, as_numpy

from jax_encdec.training.checkpoint import Checkpoints

POINTS = 20


@pytest.fixture(scope="module")
def never_stopped():
    """The run on one device: its losses, and its last state."""
    run = TinyRun(devices=1)
    last, losses = run.go(run.begin())
    return run, losses, as_numpy(last)


@pytest.fixture(scope="module")
def stopped(never_stopped, tmp_path_factory):
    """The run stopped after 20 random steps: the points, a checkpoint of each, losses, the end."""
    run = never_stopped[0]
    points = sorted(random.Random(0).sample(range(1, run.total), POINTS))
    folder = tmp_path_factory.mktemp("run")
    losses, state = [], None
    for point in [*points, run.total]:
        with Checkpoints(folder, keep=None) as checkpoints:
            begin, state = run.restore(checkpoints)
            assert begin == len(losses)
            state, more = run.go(state, begin, point)
            run.save(checkpoints, point, state)
        losses += more
    return points, folder, losses, as_numpy(state)


def test_stopped_at_20_random_points_it_ends_bit_for_bit_as_if_never_stopped(
    never_stopped, stopped
):
    _, losses, last = never_stopped
    assert len(set(losses)) == len(losses) == 24
    assert stopped[2] == losses
    jax.tree.map(np.testing.assert_array_equal, stopped[3], last)


def go_on(run: TinyRun, points: list[int], folder: Path, losses: list[float]) -> None:
    for point in points:
        with Checkpoints(folder, read_only=True) as checkpoints:
            begin, state = run.restore(checkpoints, point)
        last, found = run.go(state, begin)
        assert found == pytest.approx(losses[point:], rel=1e-5)
        assert {leaf.sharding.mesh for leaf in jax.tree.leaves(last)} == {run.place}
        assert int(last.step) == run.total


def test_resumed_on_another_mesh_it_goes_on_within_rounding(never_stopped, stopped):
    points, folder, *_ = stopped
    go_on(TinyRun("fsdp=2", devices=2), points[3::6], folder, never_stopped[1])


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "mesh", ["replica=8", "fsdp=8", "tensor=8", "replica=2,fsdp=2,tensor=2", "fsdp=4,tensor=2"]
)
def test_resumed_on_every_mesh_from_every_point(never_stopped, stopped, mesh):
    points, folder, *_ = stopped
    go_on(TinyRun(mesh), points, folder, never_stopped[1])
