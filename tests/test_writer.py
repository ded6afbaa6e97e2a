"""Saves are those of the official safetensors library; a failed save changes nothing."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from jax_encdec.convert.readers import TensorInfo, open_tensors, write_safetensors
from jax_encdec.errors import CheckpointError, InputError

ST, ST_INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = [
    np.float64, np.float32, np.float16, np.int64, np.int32, np.int16, np.int8,
    np.uint64, np.uint32, np.uint16, np.uint8, np.bool_, np.complex64,
]  # fmt: skip


def entries(tensors: dict[str, np.ndarray]) -> list:
    return [
        (name, TensorInfo(array.dtype, array.shape), lambda array=array: array)
        for name, array in tensors.items()
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def read(folder: Path) -> dict[str, np.ndarray]:
    with open_tensors(folder) as source:
        return dict(source.items())


def assert_equal(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert set(got) == set(expected)
    for name, array in expected.items():
        assert (got[name].dtype, got[name].shape) == (array.dtype, array.shape), name
        assert got[name].tobytes() == array.tobytes(), name


@st.composite
def arrays(draw) -> np.ndarray:
    """Any dtype and layout: C, Fortran or with strides."""
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    array = rng.integers(0, 2 if dtype == np.bool_ else 100, shape).astype(dtype)
    layout = draw(st.sampled_from(["C", "F", "strided"]))
    if layout == "F":
        return np.asfortranarray(array)
    return np.repeat(array, 2, -1)[..., ::2] if layout == "strided" and array.ndim else array


NAMES = st.text(st.characters(exclude_categories=("Cs",)), max_size=12).filter(
    lambda name: name != "__metadata__"
)


@settings(max_examples=100, deadline=None)
@given(tensors=st.dictionaries(NAMES, arrays(), max_size=8))
def test_files_are_those_of_the_official_library_byte_for_byte(tmp_path_factory, tensors):
    folder = tmp_path_factory.mktemp("saved")
    written = write_safetensors(folder, entries(tensors))
    assert written == [folder / ST]
    dense = {name: np.ascontiguousarray(a).reshape(a.shape) for name, a in tensors.items()}
    save_file(dense, folder / "official", metadata={"format": "pt"})
    assert written[0].read_bytes() == (folder / "official").read_bytes()
    assert_equal(load_file(written[0]), tensors)
    assert_equal(read(folder), tensors)


def test_half_precision_is_written_as_torch_writes_it(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    bits = np.arange(1 << 16, dtype=np.uint16)
    names = ["float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz"]
    ours = {n: bits.astype(np.uint8).view(getattr(ml_dtypes, n)) for n in names}
    ours |= {"bfloat16": bits.view(ml_dtypes.bfloat16), "float16": bits.view(np.float16)}
    ours["z.bfloat16"] = ours["bfloat16"].reshape(256, 256).T
    write_safetensors(tmp_path, entries(ours))
    theirs = load_torch(tmp_path / ST)
    for name, tensor in theirs.items():
        raw = tensor.contiguous().flatten().view(torch.uint8).numpy()
        assert str(tensor.dtype).removeprefix("torch.") == str(ours[name].dtype)
        assert raw.tobytes() == ours[name].tobytes()
    save_torch(theirs, tmp_path / "official", metadata={"format": "pt"})
    assert (tmp_path / "official").read_bytes() == (tmp_path / ST).read_bytes()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 12), max_size=12), st.integers(1, 30))
def test_shards_are_those_of_the_official_library(tmp_path_factory, sizes, limit):
    hub = pytest.importorskip("huggingface_hub")
    folder = tmp_path_factory.mktemp("saved")
    tensors = {f"t{i}": np.full(size, i, np.uint8) for i, size in enumerate(sizes)}
    written = write_safetensors(folder, entries(tensors), max_shard_bytes=limit)
    expected = hub.split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda a: a.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=limit,
    )
    shards = expected.filename_to_tensors or {ST: []}
    files = [*shards, ST_INDEX] if len(shards) > 1 else list(shards)
    assert [path.name for path in written] == files
    assert {path.name for path in folder.iterdir()} == set(files)
    for name, held in shards.items():
        assert set(load_file(folder / name)) == set(held)
    if len(shards) > 1:
        index = json.loads((folder / ST_INDEX).read_text())
        assert index["weight_map"] == expected.tensor_to_filename
        assert index["metadata"] == {"total_size": sum(sizes)}
    assert_equal(read(folder), tensors)


def test_transformers_loads_the_shards(tmp_path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=8,
    )
    model = transformers.BertModel(config)
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    config.save_pretrained(tmp_path)
    assert len(write_safetensors(tmp_path, entries(tensors), max_shard_bytes=2000)) > 3
    loaded = transformers.BertModel.from_pretrained(tmp_path).state_dict()
    assert_equal({name: tensor.numpy() for name, tensor in loaded.items()}, tensors)


def test_a_save_replaces_the_weights_of_an_earlier_one_and_nothing_else(tmp_path):
    tensors = {f"t{i}": np.full(4, i, np.float32) for i in range(6)}
    others = {"config.json", "pytorch_model.bin", "adapter.safetensors", "model-1-of-2.safetensors"}
    for name in others:
        (tmp_path / name).write_bytes(b"kept")
    for limit in (16, 1000, 32, 16, 48, 1000, 1000, 16):
        tensors = {name: array + 1 for name, array in tensors.items()}
        written = write_safetensors(tmp_path, entries(tensors), max_shard_bytes=limit)
        assert {f.name for f in tmp_path.iterdir()} == {f.name for f in written} | others
        assert_equal(read(tmp_path), tensors)
    assert all((tmp_path / name).read_bytes() == b"kept" for name in others)


def test_tensors_may_be_read_from_the_folder_being_replaced(tmp_path):
    tensors = {f"t{i}": np.full(4, i, np.float32) for i in range(6)}
    write_safetensors(tmp_path, entries(tensors), max_shard_bytes=16)
    with open_tensors(tmp_path) as source:
        lazy = [(n, source.info(n), lambda n=n: source[n] + np.float32(1)) for n in source]
        write_safetensors(tmp_path, lazy, max_shard_bytes=32)
    assert_equal(read(tmp_path), {name: array + 1 for name, array in tensors.items()})


def raising(error: BaseException) -> Callable[[], np.ndarray]:
    def fetch():
        raise error

    return fetch


@pytest.mark.parametrize("before", [16, 1000])
@pytest.mark.parametrize("after", [16, 1000])
@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt(), OSError("x")])
def test_after_an_exception_everything_is_as_it_was(tmp_path, before, after, error):
    tensors = {f"t{i}": np.full(4, i, np.float32) for i in range(6)}
    write_safetensors(tmp_path, entries(tensors), max_shard_bytes=before)
    old = contents(tmp_path)
    new = entries(tensors)
    new[4] = ("t4", new[4][1], raising(error))
    with pytest.raises(type(error)):
        write_safetensors(tmp_path, new, max_shard_bytes=after)
    assert contents(tmp_path) == old


def test_a_full_disk_is_reported_and_cleaned_up(tmp_path, monkeypatch):
    tensors = {"a": np.ones(4, np.float32)}
    write_safetensors(tmp_path, entries(tensors))
    old = contents(tmp_path)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="cannot be written: No space left on device"):
        write_safetensors(tmp_path, entries({"a": np.zeros(4, np.float32)}))
    assert contents(tmp_path) == old


def test_an_interrupted_renaming_never_mixes_two_saves(tmp_path, monkeypatch):
    """Whatever the rename that fails: the old weights, the new ones or a refusal."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    for before in (16, 32, 1000):
        for after in (16, 32, 1000):
            for fail_at in range(8):
                folder = tmp_path / f"{before}-{after}-{fail_at}"
                old = {f"t{i}": np.zeros(4, np.float32) for i in range(6)}
                new = {f"t{i}": np.ones(4, np.float32) for i in range(6)}
                write_safetensors(folder, entries(old), max_shard_bytes=before)
                calls = iter(range(100))
                replace = os.replace

                def failing(*args, calls=calls, fail_at=fail_at, replace=replace):
                    if next(calls) == fail_at:
                        raise OSError(5, "Input/output error")
                    replace(*args)

                with monkeypatch.context() as patch:
                    patch.setattr(os, "replace", failing)
                    with contextlib.suppress(CheckpointError):
                        write_safetensors(folder, entries(new), max_shard_bytes=after)
                assert not [name for name in contents(folder) if name.endswith(".tmp")]
                try:
                    found = read(folder)
                except CheckpointError:
                    continue
                assert len({array.tobytes() for array in found.values()}) == 1


@pytest.mark.parametrize(
    "wrong",
    [np.zeros((2, 3), np.float16), np.zeros((3, 2), np.float32), np.zeros(6, ">f4"), 1.0],
)
def test_an_array_that_is_not_as_announced_is_refused(tmp_path, wrong):
    info = TensorInfo(np.dtype(np.float32), (2, 3))
    with pytest.raises(InputError, match=r"'layer\.weight' was announced as float32 \(2, 3\)"):
        write_safetensors(tmp_path, [("layer.weight", info, lambda: wrong)])
    assert contents(tmp_path) == {}


def test_what_a_file_cannot_hold_is_refused_before_anything_is_fetched(tmp_path):
    good = np.zeros(2, np.float32)
    never = raising(AssertionError("fetched"))
    info = TensorInfo(good.dtype, good.shape)
    cases = {
        "two tensors": [("a", info, never), ("a", info, never)],
        "__metadata__": [("__metadata__", info, never)],
        "cannot hold": [("\ud800", info, never)],
        "dtype complex128": [("a", TensorInfo(np.dtype(np.complex128), (2,)), never)],
        "dtype >f4": [("a", TensorInfo(np.dtype(">f4"), (2,)), never)],
    }
    for said, bad in cases.items():
        with pytest.raises(InputError, match=said):
            write_safetensors(tmp_path / "new", bad)
    for limit in (0, -1, 1.5, True):
        with pytest.raises(InputError, match="max_shard_bytes"):
            write_safetensors(tmp_path / "new", [("a", info, never)], max_shard_bytes=limit)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="metadata"):
        write_safetensors(tmp_path / "new", [], metadata={"a": 1})  # type: ignore[dict-item]
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="file cannot be written"):
        write_safetensors(tmp_path / "file", [])
    (tmp_path / ST).mkdir()
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_safetensors(tmp_path, [])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", ST]


def test_metadata_and_progress(tmp_path):
    told: list[str] = []
    tensors = {"b": np.ones(2, np.float32), "a": np.ones(2, np.float32)}
    write_safetensors(tmp_path, entries(tensors), metadata={"format": "x"}, progress=told.append)
    assert sorted(told) == ["a", "b"]
    with open_tensors(tmp_path) as source:
        assert source.metadata == {"format": "x"}
    write_safetensors(tmp_path, [], metadata=None)
    with open_tensors(tmp_path) as source:
        assert (len(source), source.metadata) == (0, {})


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    size, count = 1 << 22, 10
    info = TensorInfo(np.dtype(np.uint8), (size,))
    tracemalloc.start()
    try:
        write_safetensors(
            tmp_path,
            [(f"t{i}", info, lambda i=i: np.full(size, i, np.uint8)) for i in range(count)],
            max_shard_bytes=3 * size,
        )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1.5 * size
    with open_tensors(tmp_path) as source:
        assert all(source[f"t{i}"][-1] == i for i in range(count))


def test_files_have_ordinary_permissions(tmp_path):
    mask = os.umask(0o022)
    try:
        [path] = write_safetensors(tmp_path, [])
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
