"""`train`: what a run leaves behind, how it stops, and that it goes on as if it had not."""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
import signal
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
import tiny_pairs

from jax_encdec import EncoderDecoderModel, InputError, Text2TextPipeline
from jax_encdec.cli import dates
from jax_encdec.training import assemble as assembly
from jax_encdec.training import evaluation, finish
from jax_encdec.training.callbacks import Callback, Stop
from jax_encdec.training.checkpoint import Checkpoints
from jax_encdec.training.config import EvaluationConfig, RunConfig, TrainingConfig
from jax_encdec.training.data_config import DataConfig
from jax_encdec.training.distributed import EXIT_STOPPED
from jax_encdec.training.loop import NonFiniteError, train
from jax_encdec.training.optimizer_config import OptimizerConfig

# One worker compiles once for all of these.
pytestmark = pytest.mark.xdist_group("training-loop")

STEPS = 12
SHORT = [(source.strip(), iso) for source, iso in dates.make_examples("train", 80, 0)]
PAIRS = SHORT[:40] + [(f"{source} {source}", iso) for source, iso in SHORT[40:]]
MODEL, PARAMS = tiny_pairs.pair()
GIVEN: dict[str, Any] = {
    "model": MODEL,
    "params": PARAMS,
    "tokenizers": tiny_pairs.tokenizers(),
    "train_data": PAIRS,
}


def configure(folder, **run) -> TrainingConfig:
    run = {"steps": STEPS, "log_every": 4, "evaluate_every": 6, "save_every": 6} | run
    return TrainingConfig(
        data=DataConfig(batch_size=16, source_buckets=(24, 48), target_buckets=(16,)),
        optimizer=OptimizerConfig(learning_rate=3e-3, schedule="linear", warmup_steps=2),
        evaluation=EvaluationConfig(samples=4, shown=2, batch_size=8),
        run=RunConfig(output=str(folder), progress=False, **run),
    )


@pytest.fixture(autouse=True, scope="module")
def quick():
    """Two devices do; and runs of equal programs share them, as by themselves they do not."""
    with pytest.MonkeyPatch.context() as patch:
        make_mesh = functools.partial(assembly.make_mesh, devices=jax.devices()[:2])
        patch.setattr(assembly, "make_mesh", make_mesh)
        for name in ("make_train_step", "make_eval_step"):
            patch.setattr(assembly, name, functools.cache(getattr(assembly, name)))
        yield


def records(folder, kind: str | None = None) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if kind in (None, line["kind"])]


def covered(folder) -> list[int]:
    """The steps that the training lines cover, in order."""
    found = []
    for line in records(folder, "train"):
        found += range(line["step"] - line["steps"] + 1, line["step"] + 1)
    return found


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


class Losses(Callback):
    """Every step's loss, by step; and whatever else is to happen then."""

    def __init__(self, act=lambda run, step: None):
        self.by_step: dict[int, float] = {}
        self.act = act

    def on_step(self, run, metrics):
        self.by_step[int(metrics["step"])] = metrics["loss"]
        return self.act(run, metrics["step"])


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run from beginning to end."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    losses, kept = Losses(), []

    class Keep(Callback):
        def on_start(self, run):
            kept.append(run)

    callbacks = [losses, Keep()]
    result = train(configure(folder), callbacks=callbacks, validation_data=PAIRS[:8], **GIVEN)
    return SimpleNamespace(folder=folder, result=result, losses=losses.by_step, run=kept[0])


# What a run leaves behind -------------------------------------------------------------------------


def test_the_folder_holds_configuration_numbers_checkpoints_report_and_model(straight):
    names = {entry.name for entry in straight.folder.iterdir()}
    assert names >= {"config.toml", "metrics.jsonl", "sessions.jsonl", "checkpoints", "start"}
    assert names >= {"samples", "model", "report.md"}
    assert not [name for name in names if name.startswith(".")]
    assert straight.result.stopped == "finished"
    assert straight.result.exit_code == 0
    assert "It ended because all steps were taken." in (straight.folder / "report.md").read_text()
    assert (straight.folder / "samples" / "step-00000012.md").read_text().count("\n") == 4


def test_every_step_is_in_one_training_line_and_in_one_call(straight):
    assert covered(straight.folder) == list(range(1, STEPS + 1))
    assert list(straight.losses) == list(range(1, STEPS + 1))
    for line in records(straight.folder, "train"):
        of = range(line["step"] - line["steps"] + 1, line["step"] + 1)
        # Every batch has the same number of target tokens: the mean of means is the mean.
        assert line["loss"] == pytest.approx(np.mean([straight.losses[s] for s in of]), rel=1e-5)
        assert line["tokens_per_second"] > 0
        assert line["model_tflops_per_second"] > 0
        assert line["model_flop_utilization"] is None  # A CPU has no published peak.
    assert straight.losses[STEPS] < straight.losses[1]
    last = records(straight.folder, "train")[-1]
    assert last["learning_rate"] == {"default": pytest.approx(3e-4)}
    assert last["epoch"] == pytest.approx(STEPS / 5)


def test_evaluations_come_when_they_are_due_with_scores_beside_baselines(straight):
    lines = records(straight.folder, "evaluate")
    assert [line["step"] for line in lines] == [6, 12]
    for line in lines:
        assert line["loss"] > 0
        assert {"rouge1", "rouge2", "rougeL", "bleu", "chrf"} <= line.keys()
        assert {"lead_rouge1", "lead_bleu"} <= line.keys()
    assert straight.result.best == (12, lines[-1]["loss"])
    assert straight.result.metrics["evaluate"] == lines[-1]


def test_the_saved_model_is_the_trained_one_and_generates(straight):
    _, params = EncoderDecoderModel.from_pretrained(straight.folder / "model")
    assert_same(params, straight.result.params)
    pipe = Text2TextPipeline.from_pretrained(straight.folder / "model")
    sources = [source for source, _ in PAIRS[:4]]
    here = Text2TextPipeline(
        straight.result.model, straight.result.params, straight.result.tokenizers
    )
    assert pipe(sources) == here(sources)
    card = (straight.folder / "model" / "README.md").read_text()
    assert "Text2TextPipeline.from_pretrained" in card
    assert "lead baseline" in card


def test_pytorch_opens_the_model_folder_as_its_card_says(straight):
    transformers = pytest.importorskip("transformers")
    card = (straight.folder / "model" / "README.md").read_text()
    code = next(part for part in card.split("```python\n")[1:] if "transformers" in part)
    code = code.split("```")[0].replace("this-folder", str(straight.folder / "model"))
    code = code.replace('["a text", "another"]', '["2001/2/3", "1999-12-31"]')
    *body, last = code.strip().splitlines()
    names: dict[str, Any] = {}
    exec("\n".join(body), names)
    pipe = Text2TextPipeline.from_pretrained(straight.folder / "model")
    assert eval(last, names) == pipe(["2001/2/3", "1999-12-31"])
    assert names["EncoderDecoderModel"] is transformers.EncoderDecoderModel


def test_the_parameters_that_were_passed_are_untouched(straight):
    assert_same(PARAMS, tiny_pairs.pair.__wrapped__()[1])


# Stopping and going on ----------------------------------------------------------------------------


def test_a_run_stopped_twice_by_signals_ends_as_the_one_never_stopped(straight, tmp_path, capsys):
    folder = tmp_path / "run"

    def kill(number, at):
        return lambda run, step: os.kill(os.getpid(), number) if step == at else None

    terminated = Losses(kill(signal.SIGTERM, 3))
    options: dict[str, Any] = {**GIVEN, "validation_data": PAIRS[:8]}
    result = train(configure(folder), callbacks=[terminated], **options)
    assert result.stopped == "signal"
    assert result.exit_code == EXIT_STOPPED != 0
    assert not (folder / "model").exists()
    first = result.step
    assert 3 <= first <= 6
    with Checkpoints(folder / "checkpoints", read_only=True) as saved:
        assert saved.steps() == [first]
    assert covered(folder) == list(range(1, first + 1))

    # A kill left lines of later steps, and half of one.
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "train", "step": first + 1, "steps": 1, "loss": 9.0}))
        file.write('\n{"kind": "tra')
    interrupted = Losses(kill(signal.SIGINT, 8))
    with pytest.raises(KeyboardInterrupt, match=f"saved step .* in {folder}"):
        train(configure(folder, resume="auto"), callbacks=[interrupted], **options)

    said = Losses()
    again = configure(folder, resume="always").replace(run={"progress": True})
    last = train(again, callbacks=[said], **options)
    assert last.stopped == "finished"
    second = min(said.by_step) - 1
    assert f"going on with {folder} from step {second}" in capsys.readouterr().err
    # Bit for bit the same losses and the same model, each step once.
    assert terminated.by_step | interrupted.by_step | said.by_step == straight.losses
    assert covered(folder) == list(range(1, STEPS + 1))
    assert_same(last.params, straight.result.params)
    evaluations = [
        [{k: v for k, v in line.items() if k != "seconds"} for line in records(f, "evaluate")]
        for f in (folder, straight.folder)
    ]
    assert evaluations[0] == evaluations[1]
    report = (folder / "report.md").read_text()
    for why in ("it was told to stop (SIGTERM)", "it was interrupted", "all steps were taken"):
        assert why in report


def test_a_finished_run_may_be_gone_on_with_and_writes_its_model_again(straight, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(straight.folder, folder)
    shutil.rmtree(folder / "model")  # Killed after its last checkpoint.
    losses = Losses()
    config = configure(folder, resume="auto")
    result = train(config, callbacks=[losses], validation_data=PAIRS[:8], **GIVEN)
    assert losses.by_step == {}
    assert result.step == STEPS
    assert len(records(folder)) == len(records(straight.folder))
    _, params = EncoderDecoderModel.from_pretrained(folder / "model")
    assert_same(params, straight.result.params)


def test_other_data_are_refused_on_a_resume(straight):
    config = configure(straight.folder, resume="auto")
    with pytest.raises(InputError, match="the checkpoint was made with other batches"):
        train(config, **{**GIVEN, "train_data": PAIRS[:40]})


def test_an_evaluation_that_a_signal_cut_off_is_made_up_for(straight, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(straight.folder, folder)
    # As if the signal had come during the last evaluation, and a kill while it was made up for:
    # its line is there, but the checkpoint does not know of it.
    with Checkpoints(folder / "checkpoints") as saved:
        restored = saved.restore(straight.run.parts.abstract_state())
        shutil.rmtree(folder / "checkpoints" / str(STEPS))
    with Checkpoints(folder / "checkpoints") as saved:
        extra = restored.extra | {"evaluations": restored.extra["evaluations"][:1]}
        saved.save(STEPS, restored.state, extra)
    train(configure(folder, resume="auto"), validation_data=PAIRS[:8], **GIVEN)
    assert [line["step"] for line in records(folder, "evaluate")] == [6, 12]


def test_a_run_that_ended_before_its_first_checkpoint_begins_anew(straight, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(straight.folder, folder, ignore=shutil.ignore_patterns("checkpoints", "model"))
    result = train(configure(folder, resume="always"), validation_data=PAIRS[:8], **GIVEN)
    assert_same(result.params, straight.result.params)
    assert covered(folder) == list(range(1, STEPS + 1))
    assert "begins anew" in (folder / "report.md").read_text()


def test_what_was_changed_for_the_rest_of_a_run_is_reported(straight, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(straight.folder, folder)
    config = configure(folder, resume="auto").replace(evaluation={"shown": 1})
    train(config, validation_data=PAIRS[:8], **GIVEN)
    assert "evaluation.shown was 2 and is 1" in (folder / "report.md").read_text()
    text = (folder / "config.toml").read_text()
    assert 'resume = "never"' in text  # The file, used again, goes on with nothing unasked.


def test_a_callback_stops_the_run_cleanly(tmp_path):
    stopping = Losses(lambda run, step: Stop("it is late") if step == 2 else None)
    result = train(configure(tmp_path / "run"), callbacks=[stopping], **GIVEN)
    assert (result.stopped, result.why) == ("callback", "it is late")
    assert 2 <= result.step <= 5
    assert "It ended because it is late." in (tmp_path / "run" / "report.md").read_text()
    assert (tmp_path / "run" / "model" / "config.json").exists()


def test_a_run_stopped_early_and_killed_at_its_end_is_stopped_there_again(tmp_path, monkeypatch):
    losses = iter([1.0, 2.0])

    def evaluate(*_, **__):
        return evaluation.EvaluationResult(loss=next(losses), accuracy=0.0, weight=1.0)

    def killed(*_):
        raise RuntimeError("as if killed")

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    options = {"patience": 1, "evaluate_every": 2, "save_every": 2, "log_every": 3}
    with monkeypatch.context() as patch:
        patch.setattr(finish, "write", killed)
        with pytest.raises(RuntimeError, match="as if killed"):
            train(configure(tmp_path / "run", **options), validation_data=PAIRS[:8], **GIVEN)
    again, taken = configure(tmp_path / "run", resume="always", **options), Losses()
    result = train(again, callbacks=[taken], validation_data=PAIRS[:8], **GIVEN)
    assert (result.stopped, result.step, taken.by_step) == ("callback", 4, {})
    assert "has not become better than 1" in result.why


def test_what_a_callback_raises_ends_the_run_and_the_checkpoint_stays(tmp_path):
    def fail(run, step):
        if step == 8:
            raise RuntimeError("of my own")

    with pytest.raises(RuntimeError, match="of my own"):
        train(configure(tmp_path / "run"), callbacks=[Losses(fail)], **GIVEN)
    with Checkpoints(tmp_path / "run" / "checkpoints", read_only=True) as saved:
        assert saved.steps() == [6]
    assert "of an error: of my own" in (tmp_path / "run" / "sessions.jsonl").read_text()


def test_the_clock_stops_a_run_cleanly(tmp_path):
    result = train(configure(tmp_path / "run", max_minutes=1e-6), **GIVEN)
    assert (result.stopped, result.step) == ("minutes", 0)
    assert (tmp_path / "run" / "model" / "config.json").exists()


# Numbers that are none ----------------------------------------------------------------------------


def broken():
    leaves, tree = jax.tree.flatten(PARAMS)
    return jax.tree.unflatten(tree, [np.full_like(leaf, math.nan) for leaf in leaves])


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path):
    with pytest.raises(NonFiniteError, match=r"the loss \(nan\).* of step 1 is not finite"):
        train(configure(tmp_path / "run"), **{**GIVEN, "params": broken()})
    with Checkpoints(tmp_path / "run" / "checkpoints", read_only=True) as saved:
        assert saved.steps() == []  # Nothing broken was saved.


def test_a_run_may_go_on_regardless(tmp_path):
    config = configure(tmp_path / "run", on_non_finite="continue", save_every=None)
    config = config.replace(data={"source_buckets": (48,)})  # one shape to compile
    result = train(config, **{**GIVEN, "params": broken()})
    assert result.step == STEPS
    for line in records(tmp_path / "run", "train"):
        assert line["loss"] is None
        assert line["steps_not_finite"] == line["steps"]


# Compiling, shapes, the best ----------------------------------------------------------------------


def test_a_step_is_compiled_once_per_shape_of_a_batch(straight):
    parts = straight.run.parts
    assert len(parts.batches.shapes) == 2
    # 12 steps, with evaluations and saves between them; and resumed runs, if their tests ran.
    assert parts.step.jitted._cache_size() == 2
    lines = records(straight.folder, "train")
    assert lines[0]["compile_seconds"] > 0
    assert lines[-1]["compile_seconds"] == 0


def test_the_best_step_becomes_the_model(tmp_path, monkeypatch):
    losses = iter([1.0, 2.0])
    found = evaluation.EvaluationResult

    def evaluate(*_, **__):
        return found(loss=next(losses), accuracy=0.0, weight=1.0)

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    config = configure(tmp_path / "run", keep=1)
    result = train(config, validation_data=PAIRS[:8], **GIVEN)
    assert result.best == (6, 1.0)
    assert result.metrics["evaluate"]["loss"] == 2.0
    assert (result.step, result.params_step) == (STEPS, 6)
    _, params = EncoderDecoderModel.from_pretrained(tmp_path / "run" / "model")
    assert_same(params, result.params)


def test_where_the_best_step_is_damaged_the_last_one_becomes_the_model(tmp_path, monkeypatch):
    losses = iter([1.0, 2.0])

    def evaluate(*_, **__):
        return evaluation.EvaluationResult(loss=next(losses), accuracy=0.0, weight=1.0)

    monkeypatch.setattr(evaluation, "evaluate", evaluate)

    class Damage(Callback):
        def on_save(self, run, step):
            if step == STEPS:
                (run.folder / "checkpoints" / "6" / "run.json").write_text("{}")

    with pytest.warns(UserWarning, match="step 6 in .* is damaged.*newest sound step is taken"):
        result = train(
            configure(tmp_path / "run"),
            callbacks=[Damage()],
            validation_data=PAIRS[:8],
            **GIVEN,
        )
    assert (result.step, result.params_step) == (STEPS, STEPS)
    assert (tmp_path / "run" / "model" / "config.json").exists()


# Folders and arguments ----------------------------------------------------------------------------


def refusal(folder, **run) -> str:
    with pytest.raises(InputError) as error:
        train(configure(folder, **run), **GIVEN)
    return str(error.value)


def test_a_folder_that_is_not_a_runs_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    assert "thesis.tex" in refusal(tmp_path, overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]
    assert "is a file" in refusal(tmp_path / "thesis.tex")


def test_a_run_is_neither_overwritten_nor_gone_on_with_unasked(straight, tmp_path):
    before = (straight.folder / "metrics.jsonl").read_bytes()
    message = refusal(straight.folder)
    assert "run.resume='auto'" in message
    assert "run.overwrite=true" in message
    assert (straight.folder / "metrics.jsonl").read_bytes() == before
    assert "holds no run to go on with" in refusal(tmp_path / "none", resume="always")
    assert not (tmp_path / "none").exists()


def test_files_that_a_run_would_remove_or_replace_are_not_touched(tmp_path):
    (tmp_path / "config.toml").write_text("# my own notes\n")
    assert "holds a config.toml but no run" in refusal(tmp_path)
    (tmp_path / "sessions.jsonl").write_text("")
    config = configure(tmp_path, overwrite=True)
    config = config.replace(model={"path": str(tmp_path / "model")})
    with pytest.raises(InputError, match=r"model.path is .*, inside run.output"):
        train(config, **GIVEN)
    assert (tmp_path / "config.toml").read_text() == "# my own notes\n"


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    from jax_encdec.training.run_folder import replaced

    def fill(text: str) -> None:
        with replaced(tmp_path / "model") as new:
            (new / "a").write_text(text)
            if text == "broken":
                raise RuntimeError

    fill("one")
    fill("two")
    with pytest.raises(RuntimeError):
        fill("broken")
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "a").read_text() == "two"
    # Killed between the two renames: the old one is put back by the next attempt.
    (tmp_path / "model").rename(tmp_path / ".model-old")
    with pytest.raises(RuntimeError):
        fill("broken")
    assert (tmp_path / "model" / "a").read_text() == "two"


def test_arguments_that_do_not_fit_together_are_refused(tmp_path):
    config = configure(tmp_path / "run")
    with pytest.raises(InputError, match="pass model="):
        train(config, params=PARAMS)
    with pytest.raises(InputError, match="TokenizerPair"):
        train(config, model=MODEL, tokenizers=tiny_pairs.tokenizers().source)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="TrainingConfig; got dict"):
        train({})  # type: ignore[arg-type]
    with pytest.raises(InputError, match="is no callback"):
        train(config, callbacks=[print])
