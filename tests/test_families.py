"""Every family in every role: PyTorch's numbers, PyTorch's tokens, PyTorch's files.

The README's table of families is made from these tests; see `benchmarks/family_table.py`.
"""

from __future__ import annotations

import shutil

import jax
import numpy as np
import pytest
from flax.serialization import to_bytes
from flax.traverse_util import unflatten_dict
from oracle import (
    CONFIGS,
    WHOLE,
    as_torch,
    assert_same_tokens,
    family_config,
    from_torch,
    labels_batch,
    randomize,
    source_batch,
    torch,
    torch_pair,
)
from safetensors.numpy import load_file
from test_pairs import check_pair, close
from test_pretrained import trees_equal

from jax_encdec import EncoderDecoderModel
from jax_encdec.families import FAMILIES

ENCODERS = tuple(name for name, cls in FAMILIES.items() if "encoder" in cls.roles)
DECODERS = tuple(name for name, cls in FAMILIES.items() if "decoder" in cls.roles)
# PyTorch's EncoderDecoderModel cannot name these parts in a configuration, so it cannot reopen
# them; passed to it as instances they run.
NO_CLASS = {
    *((f"{name}", "encoder") for name, cls in FAMILIES.items() if cls.whole_architecture),
    *((name, "decoder") for name in ("t5", "mt5", "umt5")),
}


@pytest.fixture(autouse=True)
def _exact_matmuls():
    with jax.default_matmul_precision("highest"):
        yield


def test_every_family_is_here():
    assert set(FAMILIES) == set(CONFIGS)
    assert {name for name, cls in FAMILIES.items() if cls.whole_architecture} == set(WHOLE)


def check_files(oracle, folder, *roles):
    """What we write holds the tensors that PyTorch writes, bit for bit, and PyTorch reopens it."""
    oracle.save_pretrained(folder / "theirs")
    model, params = EncoderDecoderModel.from_pretrained(folder / "theirs")
    model.save_pretrained(folder / "ours", params)
    theirs = load_file(folder / "theirs" / "model.safetensors")
    ours = load_file(folder / "ours" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert ours[name].dtype == theirs[name].dtype, name
        assert np.array_equal(ours[name], theirs[name]), name
    if NO_CLASS & set(roles):
        return "equal"
    back, info = type(oracle).from_pretrained(folder / "ours", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    expected = oracle.state_dict()
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    return "reopened"


@pytest.mark.parametrize("family", ENCODERS)
def test_encoder(family, tmp_path, record_property):
    record_property("family", family)
    size, seed = "projected, untied", len(family)
    oracle = check_pair(family, "bert", size, seed, record=record_property)
    record_property("export", check_files(oracle, tmp_path, (family, "encoder")))


@pytest.mark.parametrize("size", ["equal, tied", "projected, untied"])
@pytest.mark.parametrize("family", DECODERS)
def test_decoder(family, size, tmp_path, record_property):
    record_property("family", family)
    oracle = check_pair("bert", family, size, len(family), record=record_property)
    record_property("export", check_files(oracle, tmp_path, (family, "decoder")))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", WHOLE)
def test_whole(family, tied, tmp_path, record_property):
    record_property("family", family)
    oracle = whole(family, tied)
    model, params = from_torch(oracle)
    assert model.config.whole
    rng = np.random.default_rng(1)
    ids, mask = source_batch(rng)
    ids = np.minimum(ids, 52)
    labels = labels_batch(rng)
    with torch.no_grad():
        theirs = oracle(
            input_ids=as_torch(ids), attention_mask=as_torch(mask), labels=as_torch(labels)
        )
    ours = model.apply({"params": params}, ids, mask, labels=labels)
    counted = labels != -100  # the pads after the end are hidden here, and not there
    error = close(ours.logits[counted], theirs.logits[as_torch(counted).bool()], 1e-5)
    record_property("logits", error)
    assert abs(float(ours.loss) - theirs.loss.item()) <= 2e-6 * theirs.loss.item()
    ties = 0
    for beams in (1, 4):
        options = {"max_new_tokens": 24, "num_beams": beams}
        ties += assert_same_tokens(oracle, model, params, ids, mask, **options)
    record_property("near_ties", ties)
    record_property("export", check_files(oracle, tmp_path))


def as_zip(model, folder):
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def as_old_bin(model, folder):
    file = folder / "pytorch_model.bin"
    torch.save(model.state_dict(), file, _use_new_zipfile_serialization=False)


def as_msgpack(model, folder):
    (folder / "flax_model.msgpack").write_bytes(to_bytes(as_flax(model)))


FORMATS = {".bin": as_zip, "old .bin": as_old_bin, "msgpack": as_msgpack}


@pytest.mark.parametrize("family", CONFIGS)
def test_reads(family, tmp_path, record_property):
    """The same parameters from every format that PyTorch and Flax ever wrote."""
    record_property("family", family)
    encoder = family if "encoder" in FAMILIES[family].roles else "bert"
    decoder = family if "decoder" in FAMILIES[family].roles else "bert"
    oracle = torch_pair(encoder, decoder, seed=9)
    oracle.save_pretrained(tmp_path / "safetensors")
    _, expected = EncoderDecoderModel.from_pretrained(tmp_path / "safetensors")
    for number, (name, save) in enumerate(FORMATS.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        shutil.copy(tmp_path / "safetensors" / "config.json", folder)
        save(oracle, folder)
        _, params = EncoderDecoderModel.from_pretrained(folder)
        trees_equal(params, expected)
        record_property("reads", name)


def as_flax(model):
    """A model's parameters as Transformers' Flax classes named and turned them."""
    tree = {}
    for name, tensor in model.state_dict().items():
        *path, last = name.split(".")
        value = tensor.numpy()
        if last == "weight" and ("norm" in path[-1].lower() or path[-1].startswith("ln_")):
            last = "scale"
        elif last == "weight" and value.ndim == 2 and "embed" in path[-1]:
            last = "embedding"
        elif last == "weight":
            last, value = "kernel", value.T
        tree[(*path, last)] = value
    return unflatten_dict(tree)


def whole(family, tied, seed=3):
    """A family's own sequence-to-sequence model, random."""
    config = family_config(family, "decoder", tied=tied)
    config.is_decoder, config.add_cross_attention = False, False
    model = randomize(WHOLE[family](config), seed)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_(generator=torch.Generator().manual_seed(0))
    return model


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(60))
def test_random_pair(seed, tmp_path, record_property):
    rng = np.random.default_rng(seed)
    encoder, decoder = str(rng.choice(ENCODERS)), str(rng.choice(DECODERS))
    size = ("equal, tied", "projected, untied")[rng.integers(2)]
    record_property("pair", f"{encoder} + {decoder}")
    oracle = check_pair(encoder, decoder, size, seed, batch=4, length=13, record=record_property)
    check_files(oracle, tmp_path, (encoder, "encoder"), (decoder, "decoder"))
