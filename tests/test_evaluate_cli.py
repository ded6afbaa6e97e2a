"""`jax-encdec evaluate`: numbers, tables and predictions of a model on a file."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import tiny_pairs
from test_train_cli import call, refused

from jax_encdec import Text2TextPipeline
from jax_encdec.cli import dates
from jax_encdec.training import scores
from jax_encdec.training.config import RunConfig, TrainingConfig
from jax_encdec.training.config_io import save
from jax_encdec.training.data_config import DataConfig

PAIRS = [(text.strip(), iso) for text, iso in dates.make_examples("heldout", 9, 4)]
COLUMNS = ["--source-column", "text", "--target-column", "iso", "--workers", "0"]
SEARCH = ["--num-beams", "2", "--max-length", "12", "--batch-size", "4"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a pair, data, and a run that trained the pair."""
    folder = tmp_path_factory.mktemp("evaluate")
    tiny_pairs.save(folder / "pair")
    lines = [json.dumps({"text": text, "iso": iso}) + "\n" for text, iso in PAIRS]
    (folder / "d.jsonl").write_text("".join(lines))
    run = folder / "run"
    tiny_pairs.save(run / "model")
    data = DataConfig(
        test=(str(folder / "d.jsonl"),), source_column="text", target_column="iso", pack=True,
        workers=0, max_test_samples=6, cache_dir="",
    )  # fmt: skip
    config = TrainingConfig(data=data, run=RunConfig(output=str(run)))
    save(
        config.replace(evaluation={"num_beams": 2, "max_length": 12, "batch_size": 4}),
        run / "config.toml",
    )
    return folder


@pytest.fixture
def here(place, monkeypatch) -> Path:
    monkeypatch.chdir(place)
    return place


def test_numbers_predictions_and_table(here, tmp_path, capsys):
    output = tmp_path / "p.jsonl"
    arguments = ["evaluate", "--model", "pair", "--data", "d.jsonl", *COLUMNS, *SEARCH]
    code, out, err = call(capsys, *arguments, "--json", "--output", output)
    assert code == 0
    assert f"9 predictions: {output}" in err
    numbers = json.loads(out)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["source"], row["reference"]) for row in rows] == PAIRS
    pipe = Text2TextPipeline.from_pretrained("pair")
    made = pipe([text for text, _ in PAIRS], num_beams=2, max_length=12, batch_size=4)
    assert [row["prediction"] for row in rows] == made
    references = [iso for _, iso in PAIRS]
    for name, value in scores.score(made, references).values.items():
        assert numbers[name] == value
    lead = scores.score(scores.lead_baseline([text for text, _ in PAIRS]), references).values
    assert numbers["lead_rouge1"] == lead["rouge1"]
    assert numbers["predictions"] == 9
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]

    code, out, _ = call(capsys, *arguments, "--shown", "2")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith(f"loss {numbers['loss']:.4f} nats per token")
    table = {re.split(r"  +", line)[0]: line.split() for line in lines if "  " in line}
    assert table["first sentence"][2] == f"{lead['rouge1']:.2f}"
    assert table["model"][1] == f"{numbers['rouge1']:.2f}"
    assert out.count("  prediction  ") == 2
    assert f"  source      {PAIRS[1][0]}" in lines
    assert any(line.startswith("bleu: nrefs:1|") for line in lines)


def test_a_run_says_how_its_data_is_read(here, capsys):
    code, out, _ = call(capsys, "evaluate", "--model", "run", "--json", "--metrics", "rouge")
    assert code == 0
    numbers = json.loads(out)
    assert numbers["predictions"] == 6
    assert "bleu" not in numbers
    flags = ["--limit", "6", "--metrics", "rouge", "--json"]
    arguments = ["--model", "pair", "--data", "d.jsonl", *COLUMNS, *SEARCH, *flags]
    code, again, _ = call(capsys, "evaluate", *arguments)
    assert code == 0
    assert {**json.loads(again), "seconds": 0} == {**numbers, "seconds": 0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "d.jsonl"], "missing: --model"),
        (["--model", "pair"], "nothing to evaluate on: name files with --data"),
        (["--model", "run", "--split", "train"], "the run run has no train data: name files with"),
        (["--model", "pair", "--data", "absent.jsonl"], "absent.jsonl matches no file"),
        (["--model", "./absent", "--data", "d.jsonl"], "./absent: no such file or folder"),
        (["--model", "pair", "--data", "d.jsonl"], "'source'"),
        (["--model", "pair", "--data", "d.jsonl", "--limit", "0"], "a positive integer; got '0'"),
        (["--model", "pair", "--data", "d.jsonl", "--num-beam", "2"], "did you mean '--num-beams'"),
        (["--model", "pair", "--data", "d.jsonl", "--metrics", "meteor"], "--metrics must be"),
        (["--model", "pair", "--data", "d.jsonl", "--max-length", "400"], "has positions for 48"),
        (["--model", "pair", "--data", "d.jsonl", "--min-length", "30"], "min_length (30) is ab"),
        (["--model", "pair", "--data", "d.jsonl", "--output", "p.csv"], "must end in .jsonl"),
        (["--model", "pair", "--data", "d.jsonl", "--output", "no/p.jsonl"], "cannot be written"),
        (["--model", "pair", "--data", "d.jsonl", "--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)  # fmt: skip
def test_bad_command_lines_are_refused(arguments, message, here, capsys):
    before = sorted(here.rglob("*"))
    text = refused(capsys, "evaluate", *arguments)
    assert message in text
    assert sorted(here.rglob("*")) == before


def test_a_run_without_a_model_yet_is_said_to_be_one(here, tmp_path, capsys):
    (tmp_path / "config.toml").write_text((here / "run" / "config.toml").read_text())
    text = refused(capsys, "evaluate", "--model", tmp_path)
    assert "is a run that has not written its model yet" in text
