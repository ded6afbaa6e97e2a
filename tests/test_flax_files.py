"""What the Flax classes saved is read under PyTorch's names, as the PyTorch classes read it.

The oracles are files that the real classes of Transformers 4 saved (`data/`), and
flax.serialization.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from flax.traverse_util import flatten_dict, unflatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from published_formats import (
    CONFIGS,
    MODELS,
    SIDES,
    WHOLE,
    assert_as_pytorch_saved,
    assert_same,
    assert_same_loaded,
    assert_same_side,
    fuzz,
    loaded,
    published,
    refused,
    tensors,
)
from test_readers import peak_of

from jax_encdec import EncoderDecoderModel
from jax_encdec.convert.readers import open_tensors
from jax_encdec.families import FAMILIES

FLAX, INDEX = "flax_model.msgpack", "flax_model.msgpack.index.json"


def write(path: Path, tree: object) -> Path:
    path.write_bytes(serialization.to_bytes(tree))
    return path


@pytest.mark.parametrize("name", MODELS["msgpack"])
def test_published_models_are_read_as_pytorch_has_them(tmp_path, name, record_property):
    family = CONFIGS[name]["model_type"]
    if family in FAMILIES:
        record_property("family", family)
        record_property("reads", "Flax")
    assert_as_pytorch_saved(name, "msgpack", tmp_path)


@pytest.mark.parametrize("name", WHOLE["msgpack"])
def test_published_whole_models_load_as_those_of_pytorch(tmp_path, name):
    folder = published(name, "msgpack", tmp_path)
    assert_same_loaded(EncoderDecoderModel.from_pretrained(folder), loaded(name))


@pytest.mark.parametrize(("name", "role"), SIDES["msgpack"])
def test_published_models_make_the_same_side_of_a_pair(tmp_path, name, role):
    folder = published(name, "msgpack", tmp_path / "flax")
    assert_same_side(folder, published(name, "safetensors", tmp_path / "torch"), role)


@pytest.mark.parametrize("name", ["bert_gpt2", "bart"])
def test_shards_are_read(tmp_path, name):
    """As `save_pretrained(max_shard_size=...)` of the Flax classes made them."""
    folder = published(name, "msgpack", tmp_path)
    whole = tensors(folder)
    flat = flatten_dict(serialization.msgpack_restore((folder / FLAX).read_bytes()), sep="/")
    (folder / FLAX).unlink()
    weight_map = {}
    for number in (1, 2):
        shard = f"flax_model-{number:05d}-of-00002.msgpack"
        part = {n: flat[n] for i, n in enumerate(sorted(flat)) if i % 2 == number - 1}
        write(folder / shard, unflatten_dict(part, sep="/"))
        weight_map |= dict.fromkeys(part, shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_same(tensors(folder), whole)
    weight_map["encoder/pooler"] = weight_map.pop(next(iter(weight_map)))
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with open_tensors(folder) as source, pytest.raises(ValueError, match=r"encoder\.pooler"):
        tensors(source.path)


# Any tree ----------------------------------------------------------------------------------------

DTYPES = [
    np.float64, np.float32, np.float16, jnp.bfloat16, np.int64, np.int32, np.int8, np.uint8,
    np.uint16, np.bool_, np.complex64, jnp.float8_e4m3fn, jnp.float8_e5m2,
]  # fmt: skip
KEYS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="/"), max_size=40)
KEYS |= st.sampled_from(["kernel", "scale", "embedding", "bias", "0", "weight"])


@st.composite
def arrays(draw) -> object:
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    array = rng.integers(0, 2, shape).astype(dtype)
    return array if array.shape or draw(st.booleans()) else array[()]


LEAVES = arrays() | st.integers(-9, 1 << 40) | st.none() | st.text(max_size=40)
LEAVES |= st.complex_numbers() | st.floats() | st.booleans() | st.binary(max_size=300)
TREES = st.dictionaries(
    KEYS, st.recursive(LEAVES, lambda inner: st.dictionaries(KEYS, inner, max_size=4)), max_size=20
)


def expected_of(tree: dict) -> tuple[dict[str, np.ndarray], set[str]] | None:
    """By flax's own reading: arrays under PyTorch's names and everything else; None: ambiguous."""
    restored = serialization.msgpack_restore(serialization.to_bytes(tree))
    found: dict[str, np.ndarray] = {}
    others: set[str] = set()
    for path, leaf in flatten_dict(restored).items():
        if not isinstance(leaf, np.ndarray | np.generic):
            others.add("/".join(path))
            continue
        last = "weight" if path[-1] in ("kernel", "scale", "embedding") else path[-1]
        name = ".".join(("/".join((*path[:-1], last))).split("/"))
        if name in found:
            return None
        array = np.asarray(leaf)
        if path[-1] == "kernel":
            array = array.transpose((3, 2, 0, 1)) if array.ndim == 4 else array.T
        found[name] = array
    return found, others


@settings(max_examples=150, deadline=None)
@given(TREES)
def test_any_tree_is_read_as_flax_reads_it(tmp_path_factory, tree):
    path = write(tmp_path_factory.getbasetemp() / "any.msgpack", tree)
    expected = expected_of(tree)
    if expected is None:
        assert "two arrays" in refused(path)
    elif not expected[0]:
        assert refused(path)
    else:
        assert_same(tensors(path), expected[0])
        with open_tensors(path) as source:
            assert set(source.ignored()) == expected[1]


def test_a_nested_list_is_read_by_numbers(tmp_path):
    path = write(tmp_path / FLAX, {"a": [np.arange(2), {"kernel": np.ones((2, 3))}]})
    assert {n: a.shape for n, a in tensors(path).items()} == {"a.0": (2,), "a.1.weight": (3, 2)}
    data = serialization.msgpack_serialize({"a": [np.arange(2), [np.arange(3)]]})
    path.write_bytes(data)
    assert {n: a.shape for n, a in tensors(path).items()} == {"a.0": (2,), "a.1.0": (3,)}


def test_large_arrays_in_chunks_are_put_together(tmp_path, monkeypatch):
    tree = {"a": {"kernel": np.arange(35.0).reshape(5, 7)}, "b": np.arange(9, dtype=np.int8)}
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 64)
    path = write(tmp_path / FLAX, tree)
    assert b"chunked_array" in path.read_bytes()
    assert_same(tensors(path), {"a.weight": tree["a"]["kernel"].T, "b": tree["b"]})


@pytest.mark.parametrize("depth", [1, 2])
def test_wrapped_parameters_and_training_states_are_unwrapped(tmp_path, depth):
    tree: dict = {"encoder": {"kernel": np.ones((2, 3), np.float32)}}
    for _ in range(depth):
        tree = {"params": tree, "step": 7, "opt_state": {"0": {"mu": np.zeros(3)}}}
    with open_tensors(write(tmp_path / "state.msgpack", tree)) as source:
        assert list(source) == ["encoder.weight"]
        assert source.ignored() == {"step": "int", "opt_state": "dict"}


# Bad files ---------------------------------------------------------------------------------------

KERNEL = serialization.to_bytes({"a": np.float32([[1, 2]])})


def chunked(**parts: object) -> bytes:
    whole = {"__msgpack_chunked_array__": True, "shape": {"0": 4}}
    return serialization.msgpack_serialize({"a": whole | {"chunks": {"0": np.arange(4)}} | parts})


BROKEN = {
    "not a map": serialization.to_bytes(np.ones(2)),
    "empty": b"\x81\xa1a\x80",
    "no arrays": serialization.to_bytes({"a": 1}),
    "goes on": KERNEL + b"\xc0",
    "a name twice": b"\x82" + KERNEL[1:] + KERNEL[1:],
    "two names for one": serialization.to_bytes({"a": {"kernel": np.ones(2), "scale": np.ones(2)}}),
    "number for a name": b"\x81\x01" + KERNEL[3:],
    "name not UTF-8": b"\x81\xa1\xff" + KERNEL[3:],
    "endless name": b"\x81\xdb\x7f\xff\xff\xff" + KERNEL[3:],
    "long name": serialization.to_bytes({"a" * 2000: np.ones(2)}),
    "huge map": b"\xdf\xff\xff\xff\xff" + KERNEL[1:],
    "huge array": b"\x81\xa1a\xdd\xff\xff\xff\xff",
    "huge bytes": b"\x81\xa1a\xc6\xff\xff\xff\xff",
    "huge extension": b"\x81\xa1a\xc9\xff\xff\xff\xff\x01",
    "deep": b"\x81\xa1a" * 5000 + b"\xc0",
    "deep arrays": b"\x81\xa1a" + b"\x91" * 5000 + b"\xc0",
    "many values": b"\x81\xa1a\xdd\x00\x20\x00\x00" + bytes(1 << 21),
    "unused code": b"\x81\xa1a\xc1",
    "other extension": b"\x81\xa1a\xd4\x07\x00",
    "timestamp": b"\x81\xa1a\xd6\xff\x00\x00\x00\x00",
    "more bytes": KERNEL.replace(b"\xc4\x08", b"\xc4\x09") + b"\x00",
    "fewer bytes": KERNEL.replace(b"\xc4\x08", b"\xc4\x07"),
    "other shape": KERNEL.replace(b"\x92\x01\x02", b"\x92\x01\x03"),
    "negative shape": KERNEL.replace(b"\x92\x01\x02", b"\x92\xff\xfe"),
    "shape of maps": KERNEL.replace(b"\x92\x01\x02", b"\x92\x80\x02"),
    "no shape": KERNEL.replace(b"\x92\x01\x02", b"\x02\x01\x02"),
    "unknown dtype": KERNEL.replace(b"float32", b"float33"),
    "objects": KERNEL.replace(b"\xa7float32", b"\xa7object_"),
    "longer extension": KERNEL.replace(b"\xc7\x15", b"\xc7\x16") + b"\x00",
    "no chunks": chunked(chunks={}),
    "chunks of numbers": chunked(chunks={"0": 1}),
    "chunk not flat": chunked(chunks={"0": np.ones((2, 2))}),
    "chunk missing": chunked(chunks={"1": np.arange(4)}),
    "chunks of two dtypes": chunked(chunks={"0": np.arange(2), "1": np.ones(2)}),
    "too few in chunks": chunked(chunks={"0": np.arange(3)}),
    "shape of chunks": chunked(shape={"0": -4}),
    "no shape of chunks": chunked(shape=4),
    "huge shape of chunks": chunked(shape={"0": 1 << 62, "1": 1 << 62}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused(tmp_path, name):
    path = tmp_path / FLAX
    path.write_bytes(BROKEN[name])
    assert peak_of(lambda: refused(path)) < 1 << 27


def test_a_cut_file_is_refused_wherever_it_is_cut(tmp_path):
    path = write(tmp_path / FLAX, {"a": {"kernel": np.ones((2, 3))}, "b": jnp.ones(3)})
    data = path.read_bytes()
    for end in range(len(data)):
        path.write_bytes(data[:end])
        refused(path)


def test_only_what_is_read_takes_memory(tmp_path):
    """A sparse file of 3 GB and a tensor of three numbers."""
    head = b"\x82\xa1b" + KERNEL[3:] + b"\xa1a\xc9" + (15 + 3 * 2**30).to_bytes(4, "big") + b"\x01"
    inner = b"\x93\x91\xce" + (3 * 2**30).to_bytes(4, "big") + b"\xa4int8"
    inner += b"\xc6" + (3 * 2**30).to_bytes(4, "big")
    path = tmp_path / FLAX
    head = head.replace(
        (15 + 3 * 2**30).to_bytes(4, "big"), (len(inner) + 3 * 2**30).to_bytes(4, "big")
    )
    path.write_bytes(head + inner)
    os.truncate(path, len(head + inner) + 3 * 2**30)

    def read():
        with open_tensors(path) as source:
            assert source["b"].tolist() == [[1, 2]]
            assert source.info("a").shape == (3 * 2**30,)

    assert peak_of(read) < 1 << 20


def seed() -> bytes:
    return serialization.to_bytes(
        {"a": {"kernel": np.ones((2, 3)), "bias": jnp.ones(3)}, "step": 3, "c": np.float16(1)}
    )


def test_damaged_files_are_refused_or_read(tmp_path):
    fuzz(tmp_path / FLAX, seed(), 1000, 0)


@pytest.mark.exhaustive
def test_damaged_files_are_refused_or_read_at_length(tmp_path):
    fuzz(tmp_path / FLAX, seed(), 10_000, 1)
