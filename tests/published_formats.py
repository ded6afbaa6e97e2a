"""The models in `data/`, each saved by the real PyTorch, Flax and TensorFlow classes.

What a class of one library saves and that of another does not is in `BESIDE` and `LACKING`.
"""

from __future__ import annotations

import functools
import gzip
import json
import random
import shutil
import tempfile
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jax_encdec import EncoderDecoderModel
from jax_encdec.convert.readers import open_tensors
from jax_encdec.errors import CheckpointError
from jax_encdec.families import FAMILIES
from jax_encdec.families.bert import BertConfig
from jax_encdec.layers import flatten
from jax_encdec.warm_start import join

DATA = Path(__file__).parent / "data"
CONFIGS: dict[str, dict[str, Any]] = {
    file.parent.name: json.loads(file.read_text()) for file in sorted(DATA.glob("*/config.json"))
}
FILES = {
    "safetensors": "model.safetensors",
    "msgpack": "flax_model.msgpack",
    "h5": "tf_model.h5",
}
MODELS = {
    kind: tuple(name for name in CONFIGS if any((DATA / name).glob(f"{FILES[kind]}*")))
    for kind in ("msgpack", "h5")
}
"""Folders by format. Not every family had a class in both libraries."""
PAIRS = ("bert_gpt2", "roberta_bert", "bart")
"""Models of two different halves, and one published whole."""
WHOLE = {
    kind: tuple(n for n in MODELS[kind] if CONFIGS[n].get("is_encoder_decoder")) for kind in MODELS
}
"""Those that `from_pretrained` takes."""
SIDES = {
    kind: tuple(
        (name, role)
        for name in MODELS[kind]
        if name not in WHOLE[kind]
        for role in FAMILIES[CONFIGS[name]["model_type"]].roles
    )
    for kind in MODELS
}
"""Those that a warm start takes for a side, and for which."""

BESIDE = {
    ("albert_lm", "h5"): "predictions.decoder.bias",  # a second bias, of zeros
    ("marian", "h5"): "model.*.embed_positions.weight",  # sines, which the others compute
    ("mpnet", "h5"): "mpnet.pooler.*",  # TensorFlow's class has one below every head
    ("xglm", "h5"): "lm_head.weight",  # the embedding again
}
"""Tensors that a class saves and PyTorch's does not."""
LACKING = {
    ("pegasus", "msgpack"): "model.*.embed_positions.weight",
    ("roformer", "msgpack"): "roformer.encoder.embed_positions.weight",
}
"""Tensors that PyTorch's class saves and the other computes: sines."""


def published(name: str, kind: str, folder: Path) -> Path:
    """`folder`, with one of the models in one format only."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(DATA / name / "config.json", folder)
    if kind == "h5":
        data = gzip.decompress((DATA / name / "tf_model.h5.gz").read_bytes())
        (folder / FILES[kind]).write_bytes(data)
    else:
        shutil.copy(DATA / name / FILES[kind], folder)
    return folder


def tensors(path: Path) -> dict[str, np.ndarray]:
    with open_tensors(path) as source:
        found = {}
        for name in source:
            found[name] = source[name]
            assert source.info(name) == (found[name].dtype, found[name].shape)
            assert found[name].flags.c_contiguous
            assert found[name].flags.writeable
        return found


def assert_same(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert set(got) == set(expected)
    for name, array in expected.items():
        assert (got[name].dtype, got[name].shape) == (array.dtype, array.shape), name
        assert got[name].tobytes() == array.tobytes(), name


def assert_as_pytorch_saved(name: str, kind: str, folder: Path, prefix: str = "") -> None:
    """A model's file has PyTorch's tensors, bit for bit; `prefix` is before its names only."""
    found = tensors(published(name, kind, folder))
    expected = {f"{prefix}{n}": array for n, array in tensors(DATA / name).items()}
    beside, lacking = BESIDE.get((name, kind)), LACKING.get((name, kind))
    extra, absent = set(found) - set(expected), set(expected) - set(found)
    assert bool(extra) == bool(beside), extra
    assert bool(absent) == bool(lacking), absent
    assert all(fnmatch(n, str(beside)) for n in extra), extra
    assert all(fnmatch(n, str(lacking)) for n in absent), absent
    assert_same(
        {n: array for n, array in found.items() if n not in extra},
        {n: array for n, array in expected.items() if n not in absent},
    )


def assert_same_model(one: Path, other: Path) -> None:
    """`from_pretrained` gives the same model and the same parameters for two folders."""
    assert_same_loaded(
        EncoderDecoderModel.from_pretrained(one), EncoderDecoderModel.from_pretrained(other)
    )


def assert_same_loaded(one: tuple, other: tuple) -> None:
    """Two of `(model, params)` have the same configurations and parameters."""
    (model, params), (model_2, params_2) = one, other
    assert model.config.encoder == model_2.config.encoder
    assert model.config.decoder == model_2.config.decoder
    jax.tree.map(np.testing.assert_array_equal, params, params_2)


@functools.cache
def loaded(name: str) -> tuple:
    """`(model, params)` of a whole model, as PyTorch's class saved it."""
    with tempfile.TemporaryDirectory() as folder:
        return EncoderDecoderModel.from_pretrained(published(name, "safetensors", Path(folder)))


def assert_same_side(one: Path, other: Path, role: str) -> None:
    """`join` makes the same of two folders as one side of a pair."""
    config = BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
    )
    options: dict[str, Any] = {"decoder_start_token_id": 1, "pad_token_id": 0, "eos_token_id": 2}
    made = [
        join(place, None, decoder_config=config, **options)
        if role == "encoder"
        else join(None, place, encoder_config=config, **options)
        for place in (one, other)
    ]
    # What a model has and never uses is random where a file lacks it.
    read, read_2 = (
        {path: array for path, array in flatten(m.params).items() if "kept" not in path}
        for m in made
    )
    assert_same_loaded((made[0].model, read), (made[1].model, read_2))


def refused(path: Path) -> str:
    """The one sentence in which a file is refused."""
    with pytest.raises(CheckpointError) as caught:
        tensors(path)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700
    assert path.name in message
    return message


def mutated(rng: random.Random, data: bytes) -> bytes:
    """A file damaged in one of several ways."""
    if rng.random() < 0.15:
        return data[: rng.randrange(len(data))]
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(changed))
        if rng.random() < 0.5:
            changed[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        elif rng.random() < 0.5:
            changed[at] ^= 1 << rng.randrange(8)
        else:
            changed[at : at + rng.randint(0, 4)] = rng.randbytes(rng.randint(0, 4))
    return bytes(changed)


def fuzz(path: Path, data: bytes, rounds: int, seed: int) -> None:
    """Damaged files are refused, or read as announced: never anything else."""
    rng = random.Random(seed)
    for _ in range(rounds):
        path.write_bytes(mutated(rng, data))
        try:
            found = tensors(path)
        except CheckpointError:
            continue
        assert sum(array.nbytes for array in found.values()) <= 1 << 26
