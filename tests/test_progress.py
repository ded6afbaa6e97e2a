"""The record of a run, its speed, and what a person sees while it goes on."""

from __future__ import annotations

import io
import json
import math
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_encdec import InputError
from jax_encdec.training.callbacks import (
    Callback,
    EarlyStopping,
    Stop,
    best_index,
    check_callbacks,
    notify,
)
from jax_encdec.training.progress import (
    Bar,
    Meter,
    MetricsLog,
    TensorBoard,
    duration,
    evaluation_text,
    speed_text,
)

# metrics.jsonl ------------------------------------------------------------------------------------


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_record_is_in_the_file_as_soon_as_it_is_written(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", step=0)
    log.write("train", 10, {"loss": 1.23456789, "learning_rate": {"encoder": 1e-3}})
    assert lines(tmp_path / "metrics.jsonl") == [
        {"kind": "train", "step": 10, "loss": 1.23457, "learning_rate": {"encoder": 1e-3}}
    ]
    log.close()


def test_what_is_not_finite_becomes_null_so_that_every_line_is_json(tmp_path):
    log = MetricsLog(tmp_path / "m", step=0)
    log.write("train", 1, {"loss": math.nan, "grad_norm": math.inf, "rates": [math.inf, 1.0]})
    log.close()
    assert lines(tmp_path / "m")[0] == {
        "kind": "train", "step": 1, "loss": None, "grad_norm": None, "rates": [None, 1.0]
    }  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(st.integers(1, 60), max_size=12).map(sorted),
    restored=st.integers(0, 60),
    torn=st.integers(0, 30),
)
def test_a_resumed_record_holds_each_step_once(tmp_path_factory, steps, restored, torn):
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    log = MetricsLog(path, step=0)
    for step in steps:
        log.write("train", step, {"loss": 0.5})
    log.close()
    # The kill came while a line was being written.
    path.write_bytes(path.read_bytes() + b'{"kind": "train", "step": 61, "x'[:torn])
    log = MetricsLog(path, step=restored)
    assert [r["step"] for r in log.records] == [s for s in steps if s <= restored]
    log.write("train", 99, {"loss": 0.25})
    log.close()
    assert [r["step"] for r in lines(path)] == [*(s for s in steps if s <= restored), 99]


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\nhello\n{"kind": "train", "step": 2}\n')
    with pytest.raises(InputError, match=r"metrics.jsonl, line 2 is no record"):
        MetricsLog(path, step=5)
    assert path.read_text().count("\n") == 3


def test_a_record_without_a_file_is_kept_in_memory():
    log = MetricsLog(None, step=0)
    log.write("evaluate", 3, {"loss": 1})
    assert [r["step"] for r in log.of("evaluate")] == [3]
    assert log.of("train") == []
    log.close()


# Speed --------------------------------------------------------------------------------------------


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_speeds_leave_pauses_out():
    clock = Clock()
    meter = Meter(lambda b, s, t: b * s * t, peak=1000.0, clock=clock)
    clock.now += 2.0
    meter.step((2, 10, 5), tokens=30)
    with meter.paused():
        clock.now += 100.0
    meter.step((2, 10, 5), tokens=10)
    lap = meter.lap()
    assert lap["seconds"] == 2.0
    assert lap["tokens_per_second"] == 20.0
    assert lap["model_tflops_per_second"] == pytest.approx(100.0 / 1e12)
    assert lap["model_flop_utilization"] == pytest.approx(0.1)
    clock.now += 1.0
    assert meter.lap()["tokens_per_second"] == 0.0


def test_without_a_known_peak_there_is_no_utilisation():
    clock = Clock()
    meter = Meter(lambda b, s, t: 1e12, clock=clock)
    clock.now += 1.0
    meter.step((1, 1, 1), tokens=10)
    lap = meter.lap()
    assert lap["model_flop_utilization"] is None
    assert speed_text(lap) == "10 tokens/s, 1 model TFLOP/s"
    assert speed_text(lap | {"model_flop_utilization": 0.384}) == "10 tokens/s, 38% MFU"


# The bar ------------------------------------------------------------------------------------------


def follow(bar, clock, *, steps, seconds):
    run = SimpleNamespace(step=0, total_steps=steps)
    bar.on_start(run)
    for step in range(1, steps + 1):
        clock.now += seconds
        bar.on_step(run, {"step": step, "loss": 1 / step})
        if step % 10 == 0:
            record = {"step": step, "loss": 1 / step, "tokens_per_second": 1234.0}
            bar.on_log(run, record)
    run.step = steps
    bar.on_end(run, None)


def test_where_there_is_no_terminal_lines_are_seldom():
    clock, out = Clock(), io.StringIO()
    follow(Bar(stream=out, clock=clock), clock, steps=10_000, seconds=1.0)
    said = out.getvalue().splitlines()
    assert "\r" not in out.getvalue()
    assert said[0] == "step 1/10000, loss 1.0000"
    assert said[1] == "step 11/10000, loss 0.0909, 1,234 tokens/s, 2:46:29 left"
    assert said[2].startswith("step 21/10000")
    assert said[-1].startswith("step 10000/10000")
    # Three hours: every 10 s for 200 s, then whenever the run is 5 % older.
    assert 80 < len(said) < 110


def test_on_a_terminal_there_is_a_bar_with_loss_and_speed():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    clock, out = Clock(), Terminal()
    follow(Bar(stream=out, clock=clock), clock, steps=20, seconds=1.0)
    assert "\r" in out.getvalue()
    assert "loss 0.0500, 1,234 tokens/s" in out.getvalue()
    assert "20/20" in out.getvalue()


def test_an_evaluation_is_told_beside_the_baseline():
    record = {"step": 5, "split": "validation", "loss": 2.5, "rouge1": 34.0, "lead_rouge1": 32.59}
    assert evaluation_text(record) == "validation loss 2.5000, rouge1 34.00 (lead 32.59)"
    out = io.StringIO()
    bar = Bar(stream=out)
    bar.on_start(SimpleNamespace(step=0, total_steps=9))
    bar.on_evaluate(SimpleNamespace(), record)
    assert out.getvalue() == f"step 5: {evaluation_text(record)}\n"


@pytest.mark.parametrize(("seconds", "text"), [(42, "0:42"), (725, "12:05"), (10812, "3:00:12")])
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_tensorboard_has_the_same_numbers(tmp_path):
    pytest.importorskip("tensorboardX")
    board = TensorBoard(tmp_path / "board")
    board.on_start(SimpleNamespace(step=0))
    board.on_log(None, {"kind": "train", "step": 10, "loss": 1.5, "learning_rate": {"all": 1e-3}})
    board.on_evaluate(None, {"kind": "evaluate", "split": "validation", "step": 10, "rouge1": 30.0})
    board.close()
    written = b"".join(file.read_bytes() for file in (tmp_path / "board").iterdir())
    for tag in (b"train/loss", b"train/learning_rate/all", b"validation/rouge1"):
        assert tag in written


def test_without_tensorboardx_the_extra_is_named_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(InputError, match=r"pip install 'jax_encdec\[tensorboard\]'"):
        TensorBoard(tmp_path / "board")
    assert not (tmp_path / "board").exists()


# Callbacks ----------------------------------------------------------------------------------------


def test_a_callback_needs_only_the_methods_it_wants():
    class Mine:
        def on_save(self, run, step):
            return Stop("saved")

    callbacks = check_callbacks([Mine(), Callback()])
    assert notify(callbacks, "on_step", None, {}) is None
    assert notify(callbacks, "on_save", None, 3) == Stop("saved")


def test_a_method_that_nothing_calls_is_refused_by_name():
    class Typo(Callback):
        def on_evalute(self, run, metrics):
            pass

    with pytest.raises(InputError, match=r"on_evalute.*did you mean 'on_evaluate'"):
        check_callbacks([Typo()])
    with pytest.raises(InputError, match="object is no callback"):
        check_callbacks([object()])
    with pytest.raises(InputError, match="is no callback"):
        check_callbacks([Callback])


def test_an_answer_that_means_nothing_is_refused():
    class Wrong(Callback):
        def on_step(self, run, metrics):
            return True

    with pytest.raises(InputError, match=r"Wrong.on_step must return None, or Stop"):
        notify([Wrong()], "on_step", None, {})


def test_early_stopping_counts_evaluations_without_improvement():
    stopping = EarlyStopping("rouge1", mode="max", patience=2)
    run = SimpleNamespace(evaluations=[])
    answers = []
    for value in (10.0, 12.0, 11.0, 11.5):
        run.evaluations.append({"rouge1": value})
        answers.append(stopping.on_evaluate(run, run.evaluations[-1]))
    assert answers[:3] == [None] * 3
    assert answers[3] == Stop("rouge1 has not become better than 12 for 2 evaluations")
    with pytest.raises(InputError, match=r"'rouge1'.*did you mean 'rouge2'"):
        stopping.on_evaluate(run, {"rouge2": 1.0})


def test_the_best_is_the_first_best_finite_one():
    assert best_index([None, 3.0, math.nan, 1.0, 1.0], "min") == 3
    assert best_index([None, 3.0, math.inf, 1.0], "max") == 1
    assert best_index([None, math.nan], "min") is None
