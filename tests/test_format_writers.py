"""Weights are written as PyTorch and the Flax classes wrote them, and any format becomes any other.

The oracles are torch.load, flax.serialization and the files of `data/`.
"""

from __future__ import annotations

import json
import os
import random
import tracemalloc
import zipfile
from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
from flax import serialization
from flax.traverse_util import flatten_dict
from published_formats import (
    DATA,
    PAIRS,
    assert_same,
    assert_same_model,
    published,
    tensors,
)
from test_readers import from_torch

from jax_encdec import EncDecError, EncoderDecoderModel
from jax_encdec.convert import flax_writer, torch_writer
from jax_encdec.convert.convert import convert
from jax_encdec.convert.flax_writer import flax_entries, write_flax
from jax_encdec.convert.readers import TensorInfo, write_safetensors
from jax_encdec.convert.torch_writer import write_torch
from jax_encdec.convert.weight_writer import write_weights
from jax_encdec.errors import CheckpointError, InputError

WRITERS: dict[str, Callable] = {
    "safetensors": write_safetensors,
    "bin": write_torch,
    "msgpack": write_flax,
}
SINGLE = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}
SINGLE |= {"msgpack": "flax_model.msgpack", "h5": "tf_model.h5"}
DTYPES = [
    np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.int32, np.int16, np.int8,
    np.uint8, np.bool_, np.complex64, np.complex128,
]  # fmt: skip


def entries(arrays: dict[str, np.ndarray]) -> list:
    return [
        (name, TensorInfo(array.dtype, array.shape), lambda array=array: array)
        for name, array in arrays.items()
    ]


def some_arrays(seed: int) -> dict[str, np.ndarray]:
    rng, sizes = np.random.default_rng(seed), random.Random(seed)
    found = {}
    for i in range(sizes.randint(0, 12)):
        shape = tuple(sizes.choice([0, 1, 2, 3, 20, 300]) for _ in range(sizes.randint(0, 3)))
        array = rng.integers(0, 2, shape).astype(sizes.choice(DTYPES))
        found[f"layer.{i}.{'é' * sizes.randint(0, 3)}weight"] = array.T
    return found


@pytest.mark.parametrize("wide", [False, True])
def test_torch_opens_what_is_written(tmp_path, monkeypatch, wide):
    torch = pytest.importorskip("torch")
    if wide:  # as archives beyond 4 GB are
        monkeypatch.setattr(torch_writer, "_LARGE", 100)
    for seed in range(30):
        arrays = some_arrays(seed)
        [path] = write_torch(tmp_path, entries(arrays))
        for mmap in (False, True):
            loaded = torch.load(path, weights_only=True, mmap=mmap)
            assert list(loaded) == list(arrays)
            assert_same({n: from_torch(tensor) for n, tensor in loaded.items()}, arrays)
            assert all(t.is_contiguous() for t in loaded.values())
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
        if arrays:
            assert_same(tensors(path), arrays)


def test_data_of_torch_files_is_aligned(tmp_path):
    arrays = {f"t{i}": np.full(i, 255, np.uint8) for i in range(1, 70)}
    [path] = write_torch(tmp_path, entries(arrays))
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            start = entry.header_offset + 30 + sum(data[entry.header_offset + 26 :][:4][::2])
            assert start % 64 == 0
            assert data[start : start + entry.file_size] == archive.read(entry)


@pytest.mark.parametrize("chunk", [1 << 30, 4096])
def test_flax_opens_what_is_written(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(flax_writer, "CHUNK_BYTES", chunk)
    for seed in range(30):
        arrays = {n.replace(".", "/"): array for n, array in some_arrays(seed).items()}
        [path] = write_flax(tmp_path, entries(arrays))
        restored = serialization.msgpack_restore(path.read_bytes())
        assert_same(flatten_dict(restored, sep="/"), arrays)
        if arrays:
            expected = {n.replace("/", "."): array for n, array in arrays.items()}
            assert_same(tensors(path), expected)


def test_a_flax_file_is_the_one_that_flax_writes(tmp_path):
    arrays = {"a/b": np.ones((2, 300), np.float32), "a/c": np.ones(1, np.int8), "d": np.ones(())}
    [path] = write_flax(tmp_path, entries(arrays))
    tree = {"a": {"b": arrays["a/b"], "c": arrays["a/c"]}, "d": arrays["d"]}
    assert path.read_bytes() == serialization.msgpack_serialize(tree)


def test_kernels_are_turned_and_turned_back(tmp_path):
    shapes = {"a.weight": (2, 3), "b.weight": (2, 3, 4), "c.weight": (2, 3, 4, 5), "d.weight": (2,)}
    arrays = {n: np.random.default_rng(0).normal(size=shape) for n, shape in shapes.items()}
    last = dict.fromkeys(list(shapes)[:3], "kernel") | {"d.weight": "scale"}
    [path] = write_flax(tmp_path, flax_entries(entries(arrays), last))
    restored = flatten_dict(serialization.msgpack_restore(path.read_bytes()), sep="/")
    turned = {"a/kernel": (3, 2), "b/kernel": (4, 3, 2), "c/kernel": (4, 5, 3, 2), "d/scale": (2,)}
    assert {n: array.shape for n, array in restored.items()} == turned
    assert_same(tensors(path), arrays)


@pytest.mark.parametrize("kind", WRITERS)
def test_shards_are_numbered_and_read_again(tmp_path, kind):
    arrays = {f"t{i}": np.full(4, i, np.float32) for i in range(6)}
    stem, suffix = os.path.splitext(SINGLE[kind])
    written = WRITERS[kind](tmp_path, entries(arrays), max_shard_bytes=32)
    shards = [f"{stem}-0000{i}-of-00003{suffix}" for i in (1, 2, 3)]
    assert [path.name for path in written] == [*shards, f"{stem}{suffix}.index.json"]
    assert json.loads(written[-1].read_text())["metadata"] == {"total_size": 96}
    assert_same(tensors(tmp_path), arrays)
    WRITERS[kind](tmp_path, entries(arrays))
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE[kind]]


@pytest.mark.parametrize("kind", WRITERS)
def test_after_an_exception_everything_is_as_it_was(tmp_path, kind):
    arrays = {f"t{i}": np.full(4, i, np.float32) for i in range(6)}
    WRITERS[kind](tmp_path, entries(arrays))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def fail():
        raise KeyboardInterrupt

    broken = [*entries(arrays)[:3], ("x", TensorInfo(np.dtype("f4"), (4,)), fail)]
    with pytest.raises(KeyboardInterrupt):
        WRITERS[kind](tmp_path, broken)
    wrong = [("x", TensorInfo(np.dtype("f4"), (3,)), lambda: np.zeros(4, "f4"))]
    with pytest.raises(InputError, match="was announced"):
        WRITERS[kind](tmp_path, wrong)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_what_a_format_cannot_hold_is_refused(tmp_path):
    eight = np.zeros(1, ml_dtypes.float8_e4m3fn)
    with pytest.raises(InputError, match="float8_e4m3fn, which a PyTorch checkpoint cannot hold"):
        write_torch(tmp_path, entries({"a": eight}))
    one = np.zeros(1, np.float32)
    for names in (["a", "a/b"], ["a/b", "a"], ["a/b/c", "a/b"]):
        with pytest.raises(InputError, match="another array"):
            write_flax(tmp_path, entries(dict.fromkeys(names, one)))
    with pytest.raises(InputError, match="cannot hold a tensor called"):
        write_flax(tmp_path, entries({"a/__msgpack_chunked_array__": one}))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_reported_and_cleaned_up(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for write in (write_torch, write_flax):
        with pytest.raises(CheckpointError, match="cannot be written: No space left on device"):
            write(tmp_path, entries({"a": np.zeros(4)}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["bin", "msgpack"])
def test_one_tensor_is_in_memory_at_a_time(tmp_path, kind):
    size = 1 << 22
    info = TensorInfo(np.dtype(np.uint8), (size,))
    lazy = [(f"t{i}", info, lambda i=i: np.full(size, i, np.uint8)) for i in range(8)]
    tracemalloc.start()
    try:
        WRITERS[kind](tmp_path, lazy)
        assert tracemalloc.get_traced_memory()[1] < 1.5 * size
    finally:
        tracemalloc.stop()


# From any to any ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("source", ["safetensors", "msgpack", "h5"])
def test_every_format_becomes_every_other(tmp_path, name, source):
    start = published(name, source, tmp_path / "start")
    expected = tensors(published(name, "safetensors", tmp_path / "expected"))
    for kind in WRITERS:
        done = convert(start, tmp_path / kind, format=kind)
        assert SINGLE[kind] in done.files
        assert done.nbytes == (tmp_path / kind / SINGLE[kind]).stat().st_size
        assert_same(tensors(tmp_path / kind), expected)
        assert_same_model(tmp_path / kind, tmp_path / "expected")
    tree = serialization.msgpack_restore((tmp_path / "msgpack" / SINGLE["msgpack"]).read_bytes())
    real = serialization.msgpack_restore((DATA / name / SINGLE["msgpack"]).read_bytes())
    assert_same(flatten_dict(tree, sep="/"), flatten_dict(real, sep="/"))


def test_transformers_opens_a_written_bin(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    start = published("bert_gpt2", "msgpack", tmp_path / "start")
    convert(start, tmp_path / "out", format="bin", max_shard_bytes=4000)
    assert len(list((tmp_path / "out").glob("pytorch_model-*.bin"))) > 2
    loaded = transformers.EncoderDecoderModel.from_pretrained(tmp_path / "out").state_dict()
    expected = tensors(published("bert_gpt2", "safetensors", tmp_path / "expected"))
    assert set(expected) <= set(loaded)
    for name, array in expected.items():
        assert torch.equal(loaded[name], torch.from_numpy(array)), name


@pytest.mark.parametrize("kind", WRITERS)
def test_weights_of_other_formats_do_not_stay_behind(tmp_path, kind):
    start = published("bert_gpt2", "safetensors", tmp_path / "start")
    out = tmp_path / "out"
    published("bert_gpt2", "h5", out)
    for write in WRITERS.values():
        write(out, entries({"a": np.zeros(3), "b": np.zeros(3)}), max_shard_bytes=30)
    (out / "notes.bin").write_bytes(b"kept")
    convert(start, out, format=kind, overwrite=True)
    weights = {file.name for file in out.iterdir()} - {"notes.bin"}
    assert {name for name in weights if "model" in name} == {SINGLE[kind]}
    assert (out / "notes.bin").exists()
    EncoderDecoderModel.from_pretrained(out)


def test_an_unknown_format_is_refused(tmp_path):
    start = published("bert_gpt2", "safetensors", tmp_path / "start")
    with pytest.raises(EncDecError, match="must be one of safetensors, bin, msgpack; got 'pt'"):
        convert(start, tmp_path / "out", format="pt")
    with pytest.raises(EncDecError, match="open safetensors"):
        convert(start, tmp_path / "out", format="h5")
    assert not (tmp_path / "out").exists()


def test_layouts_say_what_they_write(tmp_path):
    for layout in (torch_writer.LAYOUT, flax_writer.LAYOUT):
        assert write_weights(tmp_path, [], layout) == [tmp_path / layout.single]
