"""What a job of several processes is promised: one run, whoever dies, and nobody hangs.

The processes are real ones, on the loopback, with CPU collectives (gloo) and fake devices.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import jax
import pytest
import training_child
from processes import Job, free_port
from tiny_run import TinyRun

from jax_encdec.errors import InputError
from jax_encdec.training import distributed
from jax_encdec.training.checkpoint import Checkpoints

STEPS = 20
SURVIVOR = 30.0
"""Seconds within which a process whose peer was killed has to end."""


class Run(Job):
    """Processes of tests/training_child.py."""

    def __init__(self, folder: Path, count: int, devices: int, every: int, slurm: bool = False):
        command = [sys.executable, training_child.__file__, str(folder / "run"), str(every)]
        super().__init__(folder, command, count, devices, slurm=slurm)

    def told(self, number: int = 0) -> list[dict[str, Any]]:
        lines = self.output(number).splitlines()
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]

    def losses(self, number: int = 0) -> dict[int, float]:
        return {line["step"]: line["loss"] for line in self.told(number) if "step" in line}

    def run_to_end(self) -> dict[int, float]:
        self.end()
        losses = self.losses()
        assert all(self.losses(n) == losses for n in range(len(self.processes)))
        return losses


@pytest.fixture(scope="module")
def one_process() -> dict[int, float]:
    """The losses of the same run in one process, on one device."""
    run = TinyRun(devices=1, total=STEPS)
    return dict(enumerate(run.go(run.begin())[1], 1))


def check_same(found: dict[int, float], expected: dict[int, float]) -> None:
    assert found == pytest.approx({step: expected[step] for step in found}, rel=1e-5)


def kill_while_saving(folder: Path, victim: int, after: int, devices: int = 1) -> dict[int, float]:
    """Kill one of two processes while a step is being saved; the survivor has to end by itself."""
    with Run(folder, 2, devices, every=1) as job:
        saving = lambda: any(folder.glob("run/*.orbax-checkpoint-tmp"))  # noqa: E731
        job.until(lambda: len(job.losses()) >= after and saving())
        job.processes[victim].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        job.processes[1 - victim].wait(SURVIVOR)
        took, said = time.monotonic() - killed, job.errors(1 - victim)
        code = job.processes[1 - victim].returncode
        print(f"process {victim} killed; the other ended after {took:.1f} s with exit code {code}")
        # Mostly a collective fails and we say so; else JAX notices first, and aborts.
        assert code in (distributed.EXIT_PEER_LOST, -signal.SIGABRT)
        if code == distributed.EXIT_PEER_LOST:
            assert f"process {1 - victim} of 2: another process of the job is gone" in said
            assert "Traceback" not in said
        else:
            assert "another task died" in said
        return job.losses(1 - victim)


def newest(folder: Path) -> int:
    with Checkpoints(folder / "run", read_only=True) as checkpoints:
        return checkpoints.steps()[-1]


def test_killed_told_to_stop_and_restarted_it_is_the_run_of_one_process(tmp_path, one_process):
    """2 processes with 2 devices each lose one to SIGKILL; 2 go on until SIGTERM; 1 ends it."""
    seen = kill_while_saving(tmp_path, victim=1, after=3, devices=2)
    begin = newest(tmp_path)
    assert begin >= max(seen) - 2, "more was lost than the step being saved and the one after it"

    with Run(tmp_path, 2, 2, every=5, slurm=True) as job:
        job.until(lambda: len(job.losses()) >= 4)
        job.processes[1].send_signal(signal.SIGTERM)
        job.end(distributed.EXIT_STOPPED)
        assert job.losses(0) == job.losses(1), "they stopped after different steps"
        assert job.told()[0] == {"begin": begin}
        check_same(seen | job.losses(), one_process)
        stopped = max(job.losses())
    assert newest(tmp_path) == stopped < STEPS

    with Run(tmp_path, 1, 1, every=5) as job:
        last = job.run_to_end()
    assert sorted(last) == list(range(stopped + 1, STEPS + 1))
    check_same(last, one_process)


@pytest.mark.exhaustive
@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize("count", [2, 4])
def test_many_processes_see_the_losses_of_one(tmp_path, one_process, count, devices):
    with Run(tmp_path, count, devices, every=7) as job:
        losses = job.run_to_end()
    assert len(losses) == STEPS
    check_same(losses, one_process)
    assert newest(tmp_path) == 14


@pytest.mark.exhaustive
@pytest.mark.parametrize("restart", [2, 1])
@pytest.mark.parametrize("victim", [1, 0])
def test_killed_while_saving_the_job_goes_on_with_2_and_with_1(
    tmp_path, one_process, victim, restart
):
    seen = {}
    for _ in range(3):
        seen |= kill_while_saving(tmp_path, victim, after=2)
    begin = newest(tmp_path)
    with Run(tmp_path, restart, 1, every=5) as job:
        losses = job.run_to_end()
        assert sorted(losses) == list(range(begin + 1, STEPS + 1))
    check_same(seen | losses, one_process)


# What a process is told, and what it is not.


@pytest.fixture
def nowhere(monkeypatch):
    """An environment without launchers, in which JAX would not be reached."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "JAX_COORDINATOR", "JAX_NUM_", "JAX_PROCESS_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: pytest.fail("connected"))
    return monkeypatch


def test_a_process_without_peers_is_left_alone(nowhere):
    assert not distributed.initialize()
    assert not distributed.initialize("host:1", 1, 0)
    nowhere.setenv("SLURM_NTASKS", "1")  # srun with one task
    for name in ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_LOCALID"):
        nowhere.setenv(name, "0")
    nowhere.setenv("SLURM_STEP_NODELIST", "node[1-2]")
    assert not distributed.initialize()
    with distributed.job() as several:
        assert not several
    with pytest.raises(ZeroDivisionError), distributed.job():
        _ = 1 / 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("host:1", None, None), "num_processes and process_id missing"),
        ((None, 2, 0), "coordinator missing"),
        (("host", 2, 0), "coordinator must read host:port; got 'host'"),
        (("host:1", 2, 2), "process_id must be from 0 to num_processes - 1; got 2 of 2"),
        (("host:1", 0, None), "num_processes must be at least 1; got 0"),
        (("host:99999", 2, 1), "coordinator must read host:port; got 'host:99999'"),
    ],
)
def test_processes_that_cannot_be_connected_are_told_why(nowhere, arguments, message):
    with pytest.raises(InputError, match=message):
        distributed.initialize(*arguments)


def test_a_variable_that_is_no_number_is_named(nowhere):
    nowhere.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(InputError, match=r"JAX_NUM_PROCESSES must be a number.*got 'two'"):
        distributed.initialize()


def test_a_coordinator_that_is_not_there_or_whose_port_is_taken_is_one_sentence(nowhere):
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(InputError, match=r"cannot reach process 0 at .* after 0 s.*is it running"):
        distributed.initialize(address, 2, 1, initialization_timeout_seconds=0)
    with socket.create_server(("", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(InputError, match=r"process 0 cannot listen on port .*choose another"):
            distributed.initialize(address, 2, 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_and_the_second_does_what_it_always_did(number):
    caught = []
    before = signal.signal(number, lambda *_: caught.append(1))
    try:
        with distributed.stop_on_signals() as stop:
            assert stop.requested is None
            os.kill(os.getpid(), number)
            assert stop.requested is number
            assert caught == []
            os.kill(os.getpid(), number)
            assert caught == [1]
        with distributed.stop_on_signals() as stop:
            pass
        os.kill(os.getpid(), number)
        assert (stop.requested, caught) == (None, [1, 1])
    finally:
        signal.signal(number, before)
