"""`jax-encdec train` from start to end: a run, a resumed run, a dry run, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_pairs
from commands import call, refused
from processes import Job

from jax_encdec import Text2TextPipeline
from jax_encdec.cli import dates, main
from jax_encdec.cli.train import summary
from jax_encdec.convert.readers import open_tensors, write_safetensors
from jax_encdec.errors import EncDecError
from jax_encdec.training.config import ExecutionConfig, ModelConfig, TrainingConfig
from jax_encdec.training.config_io import load
from jax_encdec.training.distributed import EXIT_STOPPED
from jax_encdec.training.models import load_model, load_tokenizers, with_dropout
from jax_encdec.training.sharding import make_mesh

FLAGS = """--train train.jsonl --validation valid.jsonl --test_file valid.jsonl --text_column text
 --summary_column iso --workers 0 --data.cache-dir cache --source-buckets 32 --target-buckets 16
 --data.batch-size 8 --mesh fsdp=2,replica=4 --evaluate-every 2 --save-every 2 --samples 4
 --max_eval_samples 8 --test-samples 4 --max-test-samples 8 --evaluation.batch-size 8 --num-beams 1
 --max-length 12 --learning-rate 1e-2 --dropout 0 --log-every 1 --progress false""".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a pair and data."""
    folder = tmp_path_factory.mktemp("train")
    tiny_pairs.save(folder / "pair")
    for name, part, count in (("train", "train", 40), ("valid", "heldout", 12)):
        lines = [
            json.dumps({"text": text.strip(), "iso": iso}) + "\n"
            for text, iso in dates.make_examples(part, count, 3)
        ]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def here(place, monkeypatch) -> Path:
    monkeypatch.chdir(place)
    return place


@pytest.fixture(scope="module")
def run(place) -> Path:
    """A finished run of 4 steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        flags = ["--model", "pair", *FLAGS, "--steps", "4", "--output", "run"]
        assert main(["train", *flags]) == 0
    return place / "run"


def lines(run: Path, kind: str) -> list[dict]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


def test_a_run_leaves_all_that_was_asked_for(run):
    steps = lines(run, "train")
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert steps[-1]["loss"] < steps[0]["loss"]
    evaluated = lines(run, "evaluate")
    assert [line["step"] for line in evaluated] == [2, 4]
    assert {"loss", "rouge2", "bleu", "chrf", "lead_rouge2"} <= set(evaluated[0])
    assert len(lines(run, "test")) == 1
    config = load(run / "config.toml")
    assert config.run.steps == 4
    assert config.model.path == str(run.parent / "pair")
    assert config.data.train == (str(run.parent / "train.jsonl"),)
    assert config.execution.scan_layers is False
    # What is generated afterwards is what was scored.
    options = Text2TextPipeline.from_pretrained(run / "model").model.generation_config
    assert (options.num_beams, options.max_length) == (1, 12)


def test_resuming_reads_all_from_the_folder(run, tmp_path, monkeypatch):
    asked = []

    def train(config):
        asked.append(config)
        raise EncDecError("seen")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("jax_encdec.training.loop.train", train)
    assert main(["train", "--resume", str(run), "--steps", "9"]) == 2
    before = load(run / "config.toml")
    changes = {"resume": "always", "overwrite": False, "output": str(run), "steps": 9}
    assert asked == [before.replace(run=changes)]


def command(*arguments: str) -> list[str]:
    """`jax-encdec train`, in a process of its own."""
    code = "import sys; from jax_encdec.cli import main; sys.exit(main())"
    return [sys.executable, "-c", code, "train", *arguments]


def test_two_processes_do_and_write_what_one_does(run, place):
    flags = ["--model", "pair", *FLAGS, "--steps", "4", "--output", "two"]
    with Job(place, command(*flags), 2, 4, cwd=place) as job:
        job.end()
        assert "4 steps; all steps were taken" in job.output(0)
        assert "steps" not in job.output(1)
    two = place / "two"
    for kind in ("train", "evaluate", "test"):
        assert len(lines(two, kind)) == len(lines(run, kind)) > 0
        for found, expected in zip(lines(two, kind), lines(run, kind), strict=True):
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                if isinstance(value, float) and not name.endswith(("second", "seconds")):
                    rel = 1e-3 if name == "grad_norm" else 2e-5  # six digits are written
                    assert (name, found[name]) == (name, pytest.approx(value, rel=rel))
    names = [{path.relative_to(folder) for path in folder.glob("[!c]*/*")} for folder in (two, run)]
    assert names[0] == names[1]
    for name in ("step-00000004.md", "test.md"):
        assert (two / "samples" / name).read_text() == (run / "samples" / name).read_text()
    with open_tensors(two / "model") as found, open_tensors(run / "model") as expected:
        assert set(found) == set(expected)
        for name in expected:
            # A key's bias adds the same to all scores of a query, and its gradient is nothing but
            # rounding, which Adam makes as large as any other.
            atol = 4 * 1e-2 if name.endswith("key.bias") else 1e-4
            np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=atol)


@pytest.mark.exhaustive
def test_told_to_stop_in_an_evaluation_two_processes_give_it_up_and_one_makes_up_for_it(run, place):
    flags = ["--model", "pair", *FLAGS, "--steps", "4", "--output", "stopped"]
    stopped = place / "stopped"
    with Job(place, command(*flags, "--evaluation.batch-size", "1"), 2, 4, cwd=place) as job:
        metrics = stopped / "metrics.jsonl"
        job.until(lambda: metrics.exists() and len(lines(stopped, "train")) == 2)
        job.processes[1].terminate()
        job.end(EXIT_STOPPED)
    assert [line["step"] for line in lines(stopped, "train")] == [1, 2]
    assert not lines(stopped, "evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert main(["train", "--resume", "stopped", "--evaluation.batch-size", "8"]) == 0
    for kind in ("train", "evaluate", "test"):
        expected = [
            (line["step"], pytest.approx(line["loss"], rel=2e-5)) for line in lines(run, kind)
        ]
        assert [(line["step"], line["loss"]) for line in lines(stopped, kind)] == expected


@pytest.mark.exhaustive
def test_resuming_needs_nothing_but_the_folder(run, tmp_path, monkeypatch, capsys):
    """From another working folder, stopped at 2 of 4: the same numbers as the run never stopped."""
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    for name in ("model", "report.md"):
        path = copy / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(copy / "checkpoints" / "4")
    monkeypatch.chdir(tmp_path)
    code, out, _ = call(capsys, "train", "--resume", copy)
    assert code == 0
    assert f"{copy}/model" in out
    for kind in ("train", "evaluate", "test"):
        before = [(line["step"], line["loss"]) for line in lines(run, kind)]
        assert [(line["step"], line["loss"]) for line in lines(copy, kind)] == before


def test_what_the_terminal_says(run):
    class Result:
        step, why, exit_code, params_step, folder = 4, "all steps were taken", 0, 2, run
        metrics = {  # noqa: RUF012
            "evaluate": {"loss": 2.5, "rouge1": 30.0, "lead_rouge1": 32.59},
            "test": {"loss": 2.0},
        }

    text = summary(Result)
    assert "4 steps; all steps were taken" in text
    assert "validation: loss 2.5000, rouge1 30.00 (first sentence 32.59)" in text
    assert "test: loss 2.0000" in text
    assert f"model of step 2: {run}/model" in text
    Result.exit_code = 143
    assert summary(Result).endswith(f"go on: jax-encdec train --resume {run}")


def test_a_dry_run_prints_a_configuration_that_says_the_same(here, tmp_path, capsys):
    flags = [*FLAGS, "--per_device_train_batch_size", "2", "--epochs", "2", "--output", "dry"]
    code, out, _ = call(capsys, "train", "--model", "pair", *flags, "--dry-run")
    assert code == 0
    assert not (here / "dry").exists()
    (tmp_path / "c.toml").write_text(out)
    config = load(tmp_path / "c.toml")
    assert config.data.batch_size == 16
    assert config.run.epochs == 2.0
    assert "# total_steps: 6" in out
    assert "decoder/embedding/token" in out
    code, again, _ = call(capsys, "train", tmp_path / "c.toml", "--dry-run")
    assert code == 0
    assert again == out


@pytest.fixture(scope="module")
def single(place) -> Path:
    """One side of the pair as a model of its own."""
    config = json.loads((place / "pair" / "config.json").read_text())
    folder = place / "single"
    folder.mkdir()
    with open_tensors(place / "pair") as source:
        entries = [
            (name.removeprefix("encoder."), source.info(name), lambda name=name: source[name])
            for name in source
            if name.startswith("encoder.")
        ]
        write_safetensors(folder, entries)
    (folder / "config.json").write_text(json.dumps(config["encoder"]))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(place / "pair" / file, folder)
    return folder


def test_two_checkpoints_are_joined_as_the_flags_say(single, here, capsys):
    flags = ["--encoder", "single", "--decoder", "single", *FLAGS, "--steps", "1"]
    flags += ["--cross-attention", "self", "--tie-encoder-decoder", "--decoder-layers", "1"]
    code, out, _ = call(capsys, "train", *flags, "--output", "joined", "--dry-run")
    assert code == 0
    assert "# total_steps: 1" in out
    (here / "joined.toml").write_text(out)
    config = load(here / "joined.toml")
    assert config.model.encoder == str(single)
    mesh = make_mesh(config.execution.mesh)
    loaded = load_model(config, mesh)
    found, pair = loaded.model.config, tiny_pairs.config()
    assert found.tie_encoder_decoder
    assert found.decoder.hidden_dropout_prob == found.encoder.attention_probs_dropout_prob == 0.0
    assert found.decoder_start_token_id == pair.decoder_start_token_id
    assert not loaded.model.execution.scan_layers
    token = loaded.params["encoder"]["embedding"]["token"]
    assert len(token.devices()) == 8
    _, params = tiny_pairs.pair()
    assert (token == params["encoder"]["embedding"]["token"]).all()
    tokenizers = load_tokenizers(config)
    assert tokenizers.source is tokenizers.target


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"path": "pair", "encoder_options": {"hidden_droput_prob": 0.1}}, "hidden_dropout_prob"),
        ({"path": "pair", "eos_token_id": 999}, "0..159; got 999"),
        ({"encoder": "pair", "decoder": "single"}, "describes a pair"),
        ({"encoder": "single", "decoder": "single", "decoder_layers": 9}, "1 layers; got 9"),
        ({"encoder": "single", "decoder_config": "pair"}, "describes a pair; model.config takes"),
        ({"config": "single"}, "this is a single model"),
        ({"path": "absent/pair/here"}, "absent/pair/here: no such file or folder"),
        ({}, "name what to train"),
    ],
)
def test_models_that_cannot_be_had_are_refused(model, message, single, here):
    config = TrainingConfig(model=ModelConfig(**model))
    with pytest.raises(EncDecError) as error:
        load_model(config)
    assert message in str(error.value)


def test_models_start_from_configurations_and_change_by_options(single, here):
    random = load_model(TrainingConfig(model=ModelConfig(config="pair")))
    assert random.params is None
    assert random.model.config == tiny_pairs.config()
    options = {"hidden_dropout_prob": 0.25}
    changed = load_model(TrainingConfig(model=ModelConfig(path="pair", decoder_options=options)))
    assert changed.model.config.decoder.hidden_dropout_prob == 0.25
    assert changed.model.config.encoder.hidden_dropout_prob == 0.1
    half = ModelConfig(encoder="single", decoder_config="single", decoder_options=options)
    joined = load_model(
        TrainingConfig(model=half, execution=ExecutionConfig(dtype="bfloat16", remat="full"))
    )
    assert joined.model.config.decoder.hidden_dropout_prob == 0.25
    start = tiny_pairs.config().decoder_start_token_id
    assert joined.model.config.decoder_start_token_id == start  # of the tokenizer beside
    assert (joined.model.dtype, joined.model.param_dtype) == ("bfloat16", "float32")
    assert joined.model.execution.remat == "full"
    for kind in ("bert2gpt2", "bart"):
        found = with_dropout(tiny_pairs.config(kind), 0.5)
        for trunk in (found.encoder_trunk, found.decoder_trunk):
            assert trunk.dropout.residual == trunk.dropout.attention == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to train: name a saved pair with --model, or two checkpoints to join"),
        (["--model", "M"], "nothing to train on: name files with --train"),
        (["--encoder", "M", "--train", "f"], "model.encoder is given, model.decoder is not"),
        (["--model", "M", "--train", "f", "--learning-rat", "1"], "did you mean '--learning-rate'"),
        (["--model", "M", "--train", "f", "--steps", "many"], "--steps must be an integer"),
        (["--model", "M", "--train", "f", "--set", "run.stepps=3"], "did you mean 'steps'"),
        (["--model", "M", "--train", "f", "--fp16"], "--fp16 has no meaning here"),
        (["absent.toml"], "absent.toml: no such file"),
        (["a.toml", "--resume", "R"], "give a configuration or --resume"),
        (["--resume", "R"], "--resume R: no such run: R/config.toml is not there"),
        (["--model", "./M", "--train", "f.jsonl"], "./M: no such file or folder"),
        (["--model", "M", "--train", "f", "--process-id", "x"], "invalid int value: 'x'"),
        (["--model", "M", "--train", "f", "--heartbeat-timeout", "0"], "positive integer; got '0'"),
    ],
)  # fmt: skip
def test_bad_command_lines_are_refused(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, "train", *arguments)
    left = [path.name for path in tmp_path.iterdir() if path.name != "jax-encdec-run"]
    assert not left


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mesh", "fsdp=3"], "3"),
        (["--data.batch-size", "12"], "divide"),
        (["--summary_column", "is"], "did you mean 'iso'"),
        (["--train", "absent.jsonl"], "absent.jsonl matches no file"),
        (["--max-source-length", "4096"], "4096"),
        (["--max-length", "4096"], "4096"),
    ],
)
def test_what_model_and_data_do_not_allow_is_refused(flags, message, here, capsys):
    arguments = ["train", "--model", "pair", *FLAGS, "--steps", "1", "--output", "refused", *flags]
    assert message in refused(capsys, *arguments)
    assert message in refused(capsys, *arguments, "--dry-run")
    assert not (here / "refused").exists()


def test_a_dry_run_looks_at_the_output_folder(run, here, capsys):
    arguments = ["train", "--model", "pair", *FLAGS, "--output", "run"]
    assert "holds a run already" in refused(capsys, *arguments, "--dry-run")
