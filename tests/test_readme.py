"""The README's code runs as it stands, on tiny models in the place of published ones."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_pairs
from oracle import transformers

from jax_encdec import BertConfig, EncoderDecoderModel
from jax_encdec.families import FAMILIES, GPT2Config, RobertaConfig
from jax_encdec.training import config_io

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
_spec = importlib.util.spec_from_file_location(
    "family_table", ROOT / "benchmarks" / "family_table.py"
)
assert _spec is not None
assert _spec.loader is not None
family_table = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(family_table)
TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 32, "max_position_embeddings": 40, "vocab_size": 160}  # fmt: skip
TINY_GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 40, "vocab_size": 160}


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", README.read_text(), re.S | re.M)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Folders that stand for the README's hub ids."""
    root = tmp_path_factory.mktemp("hub")
    masked, causal = transformers.AutoModelForMaskedLM, transformers.AutoModelForCausalLM
    gpt2 = transformers.GPT2Config(**TINY_GPT2, bos_token_id=3, eos_token_id=3)
    for name, cls, config in (
        ("google-bert/bert-base-uncased", masked, transformers.BertConfig(**TINY)),
        ("FacebookAI/roberta-base", masked, transformers.RobertaConfig(**TINY)),
        ("openai-community/gpt2", causal, gpt2),
    ):
        cls.from_config(config).save_pretrained(root / name)
    tiny_pairs.tokenizers().source.save(root / "google-bert/bert-base-uncased")
    tiny_pairs.save(root / "folder-or-hub-id")
    return root


def test_the_python_of_the_readme_runs(published, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ids = np.random.default_rng(0).integers(5, 150, (8, 8))  # a row for each device
    names = {
        "batches": [{"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": ids}] * 2,
        "input_ids": ids,
        "mask": np.ones_like(ids),
        "attention_mask": np.ones_like(ids),
        "decoder_input_ids": ids,
        "path": str(published / "folder-or-hub-id"),
        "TINY": TINY,
        "TINY_GPT2": TINY_GPT2,
        "jax": jax,
        "BertConfig": BertConfig,
        "GPT2Config": GPT2Config,
        "RobertaConfig": RobertaConfig,
    }
    ran = 0
    for block in blocks():
        if "FlaxEncoderDecoderModel" in block:
            continue  # the other column
        code = block
        for name in ("bert-base-uncased", "roberta-base", "gpt2"):
            code = re.sub(rf'"([\w-]+/{name})"', rf'"{published}/\1"', code)
        code = code.replace('"folder-or-hub-id"', f'"{published}/folder-or-hub-id"')
        code = code.replace("BertConfig()", "BertConfig(**TINY)").replace("50256", "3")
        code = code.replace("GPT2Config()", "GPT2Config(**TINY_GPT2)")
        code = code.replace("max_new_tokens=64", "max_new_tokens=4").replace("101", "1")
        code = code.replace("max_length=64", "max_length=6").replace("102", "2")
        code = code.replace("batch_size=2", "batch_size=8")  # a row for each device
        code = code.replace("(1, 8)", "(8,)").replace(
            "logits_processors=(never_7,)", "logits_processors=(never_7,), max_length=6"
        )
        exec(compile(code, "README.md", "exec"), names)
        ran += 1
    assert ran >= 9
    assert EncoderDecoderModel.from_pretrained(tmp_path / "out")
    assert names["summarize"](names["params"], ids, np.ones_like(ids)).shape == (8, 6)


def test_the_toml_of_the_readme_is_a_configuration():
    found = re.findall(r"^```toml\n(.*?)^```", README.read_text(), re.S | re.M)
    configs = [config_io.load(tomllib.loads(text)) for text in found]
    assert [config.run.steps for config in configs] == [20000]


def test_the_table_of_families_is_the_newest_record():
    record = family_table.newest()
    assert set(record["families"]) == set(FAMILIES)
    assert family_table.rewritten(README.read_text(), record) == README.read_text()
