"""The demo: what it prints, that what it saves is what it measured, and what it leaves alone."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from jax_encdec import EncoderDecoderModel, InputError, Text2TextPipeline, TokenizerPair
from jax_encdec.cli import dates, demo

# One worker trains once for all of these.
pytestmark = pytest.mark.xdist_group("demo")

FILES = {
    "README.md",
    "SHA256SUMS",
    "config.json",
    "demo.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "training",
}
DATED = {"README.md", "training"}
"""What says when, and how fast, it was trained."""


def run(*arguments: str) -> tuple[str, str]:
    """Run the command; what it printed, and what it showed on standard error."""
    parser = argparse.ArgumentParser()
    demo.add_parser(parser.add_subparsers())
    args = parser.parse_args(["demo", *arguments])
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert args.run(args) == 0
    return out.getvalue(), err.getvalue()


class Finished(NamedTuple):
    """A short run: what it left, what it printed, and the parameters it had trained."""

    folder: Path
    out: str
    err: str
    model: EncoderDecoderModel
    params: Any


@pytest.fixture(autouse=True, scope="module")
def few_held_out():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "HELD_OUT", 40)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory, few_held_out):
    folder = tmp_path_factory.mktemp("demo") / "new folder"
    train, kept = demo.train, []

    def keeping(*args):
        result, losses = train(*args)
        kept.extend([result.model, result.params])
        return result, losses

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "train", keeping)
        out, err = run("--output", str(folder), "--steps", "6", "--seed", "3")
    return Finished(folder, out, err, *kept)


def test_a_short_run_trains_saves_and_says_so(finished):
    folder, out, err = finished[:3]
    assert {file.name for file in folder.iterdir()} == FILES
    assert "exact match on 40 examples of held-out dates" in out
    assert f"jax-encdec generate --model '{folder}'" in out  # quoted for the shell: it has a space
    assert "6/6" in err
    assert "loss" in err
    assert "tokens/s" in err
    record = json.loads((folder / "demo.json").read_text())
    assert (record["steps"], record["seed"], len(record["losses"])) == (6, 3, 6)
    assert record["losses"][-1] < record["losses"][0]
    assert 0.0 <= record["exact_match"] <= 1.0


def test_how_it_was_trained_lies_beside_the_model(finished):
    training = finished.folder / "training"
    assert {"config.toml", "metrics.jsonl", "report.md"} <= {f.name for f in training.iterdir()}
    assert "6 of 6 steps" in (training / "report.md").read_text()
    assert "Text2TextPipeline" in (finished.folder / "README.md").read_text()


def test_the_table_shows_held_out_examples_as_the_saved_model_decodes_them(finished):
    folder, out = finished[:2]
    examples = dates.make_examples("heldout", demo.SHOWN, 3)
    pipe = Text2TextPipeline.from_pretrained(folder)
    predictions = pipe([text for text, _ in examples], num_beams=4)
    assert demo.table(examples, predictions) in out


def test_the_table_says_what_is_right_and_what_would_have_been():
    shown = demo.table([("a b", "2001-02-03"), ("c", "1999-12-31")], ["2001-02-03", "1999-12-13"])
    assert [line.split(maxsplit=3)[-1] for line in shown.split("\n")[2:]] == ["1999-12-31"]
    assert shown.split("\n")[1].endswith("yes")


def test_the_saved_folder_generates_as_the_trained_parameters_do(finished):
    texts = [text for text, _ in dates.make_examples("heldout", 40, 3)]
    tokenizers = TokenizerPair.from_pretrained(finished.folder)
    here = Text2TextPipeline(finished.model, finished.params, tokenizers)
    assert here(texts) == Text2TextPipeline.from_pretrained(finished.folder)(texts)


def test_the_same_seed_gives_the_same_model_in_the_place_of_an_earlier_demo(finished, tmp_path):
    for name in FILES - {"training"}:
        (tmp_path / name).write_text("earlier")
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "old.md").write_text("earlier")
    run("--output", str(tmp_path), "--steps", "6", "--seed", "3")
    assert {file.name for file in tmp_path.iterdir()} == FILES
    assert not (tmp_path / "training" / "old.md").exists()
    for name in FILES - DATED:  # demo.json holds every step's loss
        assert (tmp_path / name).read_bytes() == (finished.folder / name).read_bytes(), name


def test_pytorch_opens_the_folder_and_generates_the_same(finished):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = finished.folder
    texts = [text for text, _ in dates.make_examples("heldout", demo.HELD_OUT, 3)]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    oracle = transformers.EncoderDecoderModel.from_pretrained(folder).eval()
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        made = oracle.generate(inputs.input_ids, attention_mask=inputs.attention_mask)
    expected = tokenizer.batch_decode(made, skip_special_tokens=True)
    assert Text2TextPipeline.from_pretrained(folder)(texts) == expected


def refusal(*arguments: str) -> str:
    with pytest.raises(InputError) as error:
        run(*arguments)
    return str(error.value)


def test_a_foreign_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "model.safetensors").write_text("precious")
    message = refusal("--output", str(tmp_path), "--steps", "1")
    assert str(tmp_path) in message
    assert "new or empty" in message
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_text() == "precious"


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("precious")
    assert "is a file" in refusal("--output", str(tmp_path / "file"))


@pytest.mark.parametrize("seed", ["-1", str(2**32)])
def test_a_seed_out_of_range_is_refused(tmp_path, seed):
    assert "--seed" in refusal("--output", str(tmp_path / "new"), "--seed", seed)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("existing", [False, True])
def test_an_interrupted_run_leaves_everything_as_it_was(tmp_path, monkeypatch, existing):
    def interrupted(work, folder):
        (folder / "tokenizer.json").write_text("half")
        raise KeyboardInterrupt

    # When all is trained, while its files are put in place.
    monkeypatch.setattr(demo, "train", lambda *_: (None, []))
    monkeypatch.setattr(demo, "adopt", interrupted)
    output = tmp_path / "demo"
    if existing:
        output.mkdir()
        (output / "demo.json").write_text("earlier")
    with pytest.raises(KeyboardInterrupt):
        run("--output", str(output), "--steps", "1")
    if existing:
        assert [file.name for file in output.iterdir()] == ["demo.json"]
        assert (output / "demo.json").read_text() == "earlier"
    else:
        assert not output.exists()
