"""Checkpoints of PyTorch 0.2 to 1.5 are read as PyTorch reads them, and never run.

The oracle is `torch.load` of what `torch.save` writes with `_use_new_zipfile_serialization=False`.
"""

from __future__ import annotations

import os
import random
import struct
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from published_formats import assert_same_model, fuzz, published, refused, tensors
from safetensors.numpy import load_file
from test_readers import from_torch, hostile, peak_of, random_state_dict, same, state

from jax_encdec.convert.readers import open_tensors
from jax_encdec.convert.torch_legacy import MAGIC

torch = pytest.importorskip("torch")

NUMBER = struct.Struct("<q").pack
FRONT = (
    b"\x80\x02\x8a\n" + MAGIC.to_bytes(10, "little") + b"."
    b"\x80\x02M\xe9\x03."
    b"\x80\x02}X\x0d\x00\x00\x00little_endian\x88s."
)
ORDERED = b"\x89ccollections\nOrderedDict\n)R"


def save(value: object, path: Path, protocol: int = 2) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=False, pickle_protocol=protocol)
    return path


def tensor(numel: bytes = b"K\x02", part: bytes = b"N", kind: str = "Float") -> bytes:
    """A vector of two, over the storage "0" or a part of it."""
    storage = b"(X\x07\x00\x00\x00storagectorch\n%sStorage\nX\x01\x00\x00\x000" % kind.encode()
    storage += b"X\x03\x00\x00\x00cpu" + numel + part + b"tQ"
    view = storage + b"K\x00K\x02\x85K\x01\x85"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + view + ORDERED + b"tR"


def part(key: bytes, offset: int, numel: int) -> bytes:
    return b"X\x01\x00\x00\x00" + key + bytes([0x4B, offset, 0x4B, numel]) + b"\x87"


KEYS = b"\x80\x02]X\x01\x00\x00\x000a."


def made(path: Path, pickled: bytes, keys: bytes = KEYS, data: bytes | None = None) -> Path:
    """A file of a pickle, a list of storages and their bytes."""
    storage = NUMBER(2) + struct.pack("<2f", 1, 2) if data is None else data
    path.write_bytes(FRONT + pickled + keys + storage)
    return path


@settings(max_examples=150, deadline=None)
@given(st.randoms(use_true_random=False), st.sampled_from([2, 2, 2, 3, 4, 5]))
def test_old_files_are_read_bit_for_bit_as_torch_reads_them(tmp_path_factory, rng, protocol):
    path = tmp_path_factory.getbasetemp() / "old.bin"
    saved = random_state_dict(torch, random.Random(rng.randrange(1 << 30)))
    save(saved, path, protocol)
    # PyTorch cannot load the newest dtypes from the files of this form that it writes.
    new = {"uint16", "uint32", "uint64"}
    names = {str(tensor.dtype).removeprefix("torch.") for tensor in saved.values()}
    lost = any(name in new or name.startswith("float8") for name in names)
    expected = saved if lost else torch.load(path, weights_only=protocol == 2)
    with open_tensors(path) as source:
        assert list(source) == list(expected)
        views: dict = {}
        for name, value in expected.items():
            assert same(source[name], from_torch(value)), (name, value.dtype, value.stride())
            assert source.info(name) == (source[name].dtype, source[name].shape)
            place = (value.untyped_storage()._cdata, value.dtype, value.storage_offset())
            views.setdefault((*place, value.shape, value.stride()), []).append(name)
        assert source.aliases() == {n: ns[0] for ns in views.values() for n in ns[1:]}


def test_a_part_of_a_storage_is_read_as_torch_reads_it(tmp_path):
    """Files of PyTorch 0.2 to 0.4 say of a storage that it is a part of another."""
    numbers = NUMBER(5) + struct.pack("<5f", *range(5))
    pickled = state(tensor(b"K\x05", part(b"a", 1, 2)), tensor(b"K\x05", part(b"b", 3, 2)))
    path = made(tmp_path / "old.bin", pickled, data=numbers)
    expected = torch.load(path, weights_only=True)
    found = tensors(path)
    assert found["0"].tolist() == expected["0"].tolist() == [1, 2]
    assert found["1"].tolist() == expected["1"].tolist() == [3, 4]


def test_a_nested_state_dict_is_found(tmp_path):
    path = save({"model": {"a": torch.arange(3)}, "epoch": 3}, tmp_path / "old.bin")
    with open_tensors(path) as source:
        assert source["a"].tolist() == [0, 1, 2]
        assert source.ignored() == {"epoch": "int"}


def test_a_pair_is_loaded(tmp_path):
    new = published("bert_gpt2", "safetensors", tmp_path / "new")
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_bytes((new / "config.json").read_bytes())
    weights = load_file(new / "model.safetensors")
    save({n: torch.from_numpy(array) for n, array in weights.items()}, old / "pytorch_model.bin")
    assert_same_model(new, old)


def test_lies_are_refused(tmp_path):
    path = tmp_path / "old.bin"
    assert tensors(made(path, state(tensor())))["0"].tolist() == [1, 2]
    good, two = state(tensor()), NUMBER(2) + bytes(8)
    lies = {
        "another magic": FRONT.replace(b"\x8a\n\x6c", b"\x8a\n\x6d"),
        "another version": FRONT.replace(b"M\xe9\x03", b"M\xea\x03") + good + KEYS + two,
        "version true": FRONT.replace(b"M\xe9\x03", b"\x88") + good + KEYS + two,
        "big-endian": FRONT.replace(b"\x88s", b"\x89s") + good + KEYS + two,
        "no machine": FRONT.replace(b"\x88s", b"\x88s0N") + good + KEYS + two,
        "no keys": FRONT + good + b"\x80\x02N." + two,
        "no storage": FRONT + good + b"\x80\x02].",
        "unknown storage": FRONT + good + KEYS.replace(b"0a", b"1a") + two,
        "storage twice": FRONT + good + KEYS.replace(b"0a", b"0aX\x01\x00\x00\x000a") + two + two,
        "number for a key": FRONT + good + b"\x80\x02]K\x00a." + two,
        "part for a key": FRONT
        + state(tensor(b"K\x02", part(b"a", 0, 2)))
        + KEYS.replace(b"0a", b"aa")
        + two,
        "fewer elements": FRONT + good + KEYS + NUMBER(1) + bytes(8),
        "more elements": FRONT + good + KEYS + NUMBER(3) + bytes(12),
        "negative": FRONT + good + KEYS + NUMBER(-2) + bytes(8),
        "cut short": FRONT + good + KEYS + NUMBER(2) + bytes(7),
        "no number": FRONT + good + KEYS,
        "part beyond": FRONT + state(tensor(b"K\x02", part(b"a", 1, 2))) + KEYS + two,
        "part of text": FRONT + state(tensor(b"K\x02", b"X\x01\x00\x00\x00a")) + KEYS + two,
        "part too short": FRONT + state(tensor(b"K\x04", part(b"a", 0, 1))) + KEYS + NUMBER(4),
        "two sizes": FRONT + state(tensor(), tensor(b"K\x03")) + KEYS + two,
        "two dtypes": FRONT + state(tensor(), tensor(kind="Int")) + KEYS + two,
        "two parts": FRONT
        + state(tensor(b"K\x05", part(b"a", 0, 2)), tensor(b"K\x05", part(b"a", 1, 2)))
        + KEYS
        + NUMBER(5)
        + bytes(20),
        "storage of today": FRONT + good.replace(b"NtQ", b"tQ") + KEYS + two,
        "huge storage": FRONT + state(tensor(b"\x8a\x08" + NUMBER(1 << 61))) + KEYS + two,
    }
    for name, data in lies.items():
        path.write_bytes(data)
        assert refused(path), name


def test_hostile_pickles_are_refused_and_run_nothing(tmp_path):
    sentinel = tmp_path / "executed"
    for name, pickled in hostile(str(sentinel)).items():
        for front in (FRONT, FRONT[:15], FRONT[: FRONT.index(b"\x80\x02}")]):
            path = tmp_path / "evil.bin"
            path.write_bytes(front + pickled + KEYS + NUMBER(2) + bytes(8))
            assert refused(path), name
            assert not sentinel.exists(), name


def test_a_cut_file_is_refused_wherever_it_is_cut(tmp_path):
    path = save({"a": torch.ones(10), "b": torch.ones(3).bfloat16()}, tmp_path / "old.bin")
    data = path.read_bytes()
    for end in range(1, len(data)):
        path.write_bytes(data[:end])
        refused(path)


def test_only_the_front_is_read_on_opening(tmp_path):
    """A sparse file of 64 GB and a tensor of two numbers."""
    big = 1 << 34
    pickled = state(tensor(b"\x8a\x08" + NUMBER(big)), tensor(b"\x8a\x08" + NUMBER(big)))
    path = made(tmp_path / "old.bin", pickled, data=NUMBER(big) + struct.pack("<2f", 1, 2))
    os.truncate(path, path.stat().st_size - 8 + 4 * big)

    def read():
        with open_tensors(path) as source:
            assert source["1"].tolist() == [1, 2]
            assert source.aliases() == {"1": "0"}

    assert peak_of(read) < 1 << 20


def test_a_pickle_larger_than_the_first_read_is_read(tmp_path):
    weights = {f"layer.{i}.{'x' * 100}": torch.full((1,), i) for i in range(2000)}
    found = tensors(save(weights, tmp_path / "old.bin"))
    assert [int(array[0]) for array in found.values()] == list(range(2000))


def test_the_archives_of_the_first_versions_are_recognised(tmp_path):
    path = tmp_path / "first.bin"
    (tmp_path / "storages").write_bytes(b"x")
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        archive.add(tmp_path / "storages", "storages")
    assert "tar archive, as PyTorch wrote until 0.1" in refused(path)


def test_damaged_files_are_refused_or_read(tmp_path):
    path = save({"a": torch.arange(6.0).view(2, 3).t(), "b": torch.ones(3)}, tmp_path / "x.bin")
    fuzz(path, path.read_bytes(), 1000, 0)


@pytest.mark.exhaustive
def test_damaged_files_are_refused_or_read_at_length(tmp_path):
    path = save({"a": torch.arange(6.0).view(2, 3).t(), "b": torch.ones(3)}, tmp_path / "x.bin")
    fuzz(path, path.read_bytes(), 10_000, 1)
