"""The report of a run and the model's card, made from the files of its folder."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_encdec import InputError
from jax_encdec.training.model_card import model_card
from jax_encdec.training.report import (
    cell,
    environment,
    read_record,
    sample_table,
    table,
    write_report,
    write_session,
)

START = {
    "started": "2026-11-21T17:00:00+00:00",
    "from_step": 0,
    "total_steps": 40,
    "seed": 7,
    "mesh": {"replica": 1, "fsdp": 8, "tensor": 1},
    "platform": "cpu",
    "device_kind": "cpu",
    "devices": 8,
    "processes": 1,
    "cpu": "AMD EPYC",
    "cores": 2,
    "memory_gib": 15.6,
    "system": "Linux",
    "versions": {"python": "3.12.1", "jax": "0.10.2"},
    "notes": [],
    "model": {
        "name": "bert2bert",
        "base": ["google-bert/bert-base-uncased", "./mine"],
        "parameters": 247363386,
    },
    "data": {"training pairs": 32349, "fingerprint": "0f" * 16},
    "optimizer": {"name": "adamw", "parameters by group": {"cross": 10, "default": 90}},
    "execution": {"remat": "none"},
}
END = {"ended": "2026-11-21T17:25:00+00:00", "step": 40, "why": "all steps were taken"}
CONFIG = '[run]\noutput = "/home/somebody/run"\nsteps = 40\n'


def fill(folder: Path, *, evaluated: bool = True, test: bool = True) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.toml").write_text(CONFIG)
    write_session(folder, START)
    write_session(folder, END | {"seconds": 1500.0})
    lines = []
    for step in range(10, 50, 10):
        line = {"kind": "train", "step": step, "loss": 10 / step, "seconds": 5.0, "epoch": 0.5}
        lines.append(line | {"tokens_per_second": 5210.4, "model_flop_utilization": None})
        if evaluated and step % 20 == 0:
            scores = {"rouge1": float(step), "lead_rouge1": 32.59, "bleu": 4.0, "lead_bleu": 3.0}
            lines.append({"kind": "evaluate", "step": step, "loss": 11 / step, **scores})
    if test:
        lines.append({"kind": "test", "step": 40, "loss": 0.3, "rouge1": 41.0, "lead_rouge1": 32.6})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def rows(text: str) -> list[list[str]]:
    """The cells of every Markdown table row, unescaped pipes being borders."""
    found = []
    for line in text.splitlines():
        if line.startswith("|"):
            found.append([c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]])
    return found


def test_the_report_says_results_speed_hardware_versions_seed_and_options(tmp_path):
    folder = fill(tmp_path)
    (folder / "samples").mkdir()
    pairs = [SimpleNamespace(source="a text", reference="a", prediction="b")]
    (folder / "samples" / "step-00000040.md").write_text(sample_table(pairs))
    text = write_report(folder).read_text()
    assert ["ROUGE-1", "41.00", "32.60"] in rows(text)  # test, beside the baseline
    assert ["20", "0.55", "20", "4"] in rows(text)
    assert ["lead baseline", "", "32.59", "3"] in rows(text)
    assert ["a text", "a", "b"] in rows(text)
    assert "5,210" in text
    assert "no published peak for this device" in text
    assert ["model: parameters", "247,363,386"] in rows(text)
    assert ["seed", "7"] in rows(text)
    assert "8 x cpu (cpu), 1 process(es), mesh replica 1, fsdp 8, tensor 1" in text
    assert "python 3.12.1, jax 0.10.2" in text
    assert "It ended because all steps were taken." in text
    assert "steps = 40" in text
    assert "/home/somebody" not in text


def test_curves_are_pictures_and_the_same_numbers_give_the_same_file(tmp_path):
    pytest.importorskip("matplotlib")
    text = write_report(fill(tmp_path / "a")).read_text()
    write_report(fill(tmp_path / "b"))
    for name in ("loss", "rouge", "scores"):
        assert f"![{name}](curves/{name}.svg)" in text
        drawn = [(tmp_path / x / "curves" / f"{name}.svg").read_bytes() for x in "ab"]
        assert b"<svg" in drawn[0]
        assert drawn[0] == drawn[1]
        assert (tmp_path / "a" / "curves" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_without_matplotlib_the_report_has_the_numbers_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = write_report(fill(tmp_path)).read_text()
    assert "pip install 'jax_encdec[train]'" in text
    assert ["10", "1"] in rows(text)
    assert not (tmp_path / "curves").exists()


def test_a_run_without_validation_data_says_so(tmp_path):
    text = write_report(fill(tmp_path, evaluated=False, test=False)).read_text()
    assert "There was no validation data. The last training loss is 0.2500." in text


def test_a_resumed_run_lists_its_parts(tmp_path):
    folder = fill(tmp_path)
    again = {"started": "2026-11-22T09:00:00+00:00", "from_step": 40, "device_kind": "TPU v5e"}
    write_session(folder, START | again | {"notes": ["step 41 in checkpoints is damaged"]})
    with (folder / "sessions.jsonl").open("a") as file:
        file.write('{"ended": "2026-11-2')  # a kill while it was written
    text = write_report(folder).read_text()
    parts = [row for row in rows(text) if row[0].startswith("2026")]
    assert [row[1:4] for row in parts] == [
        ["0", "8 x cpu", "all steps were taken"],
        ["40", "8 x TPU v5e", "it was killed"],
    ]
    assert "step 41 in checkpoints is damaged" in text


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no run"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_card_says_what_it_is_how_good_and_how_to_use_it(tmp_path):
    record = read_record(fill(tmp_path))
    text = model_card(record, step=40, whole=False, own_target_tokenizer=True)
    front = text.split("---")[1]
    assert '- "google-bert/bert-base-uncased"' in front
    assert "./mine" not in front  # a folder is nothing that a hub knows
    assert "# bert2bert" in text
    assert ["ROUGE-1", "41.00", "32.60"] in rows(text)
    assert "Text2TextPipeline.from_pretrained" in text
    assert "EncoderDecoderModel.from_pretrained" in text
    assert 'subfolder="decoder_tokenizer"' in text
    assert "steps = 40" in text
    whole = model_card(record, step=40, whole=True, own_target_tokenizer=False)
    assert "AutoModelForSeq2SeqLM.from_pretrained" in whole
    assert "decoder_tokenizer" not in whole


@given(st.lists(st.tuples(st.text(), st.text()), max_size=4))
def test_no_text_breaks_a_table(pairs):
    made = rows(table(("a", "b"), pairs))
    assert len(made) == 2 + len(pairs)
    assert {len(row) for row in made} == {2}


def test_cells_are_one_line_of_readable_length():
    assert cell("a\n b|c <b>") == "a b\\|c &lt;b>"
    assert len(cell("x" * 5000)) == 300
    assert cell(0.123456) == "0.1235"
    assert cell(None) == ""


def test_the_environment_names_hardware_and_versions():
    found = environment()
    assert found["devices"] == 8
    assert found["platform"] == "cpu"
    assert found["versions"].keys() >= {"python", "jax", "flax", "numpy"}
    assert found["cores"] >= 1
