"""Weight files are read as PyTorch and the safetensors library read them, and never run.

The oracles are `torch.load(weights_only=True)` and the official safetensors library. Damaged and
hostile files end in one sentence that names the file.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, TensorSpec, serialize
from safetensors.numpy import load as official_load
from safetensors.numpy import save as official_save

from jax_encdec.convert import readers
from jax_encdec.convert.readers import TensorInfo, open_tensors
from jax_encdec.errors import CheckpointError


def read_all(path: Path) -> dict[str, np.ndarray]:
    with open_tensors(path) as source:
        return {name: source[name] for name in source}


def refused(path: Path) -> str:
    """Open `path` and read all of it; return the one sentence of its refusal."""
    with pytest.raises(CheckpointError) as caught:
        read_all(path)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700
    assert path.name in message
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    return message


def same(array: np.ndarray, other: np.ndarray) -> bool:
    return (array.dtype, array.shape, array.tobytes()) == (
        other.dtype,
        other.shape,
        other.tobytes(),
    )


# PyTorch checkpoints -----------------------------------------------------------------------------


def from_torch(tensor) -> np.ndarray:
    """A tensor's numbers; types that NumPy lacks go through their bytes."""
    import torch

    tensor = tensor.detach().contiguous()
    name = str(tensor.dtype).removeprefix("torch.")
    if not hasattr(ml_dtypes, name):
        return tensor.numpy()
    data = tensor.flatten().view(torch.uint8).numpy()
    return data.view(getattr(ml_dtypes, name)).reshape(tuple(tensor.shape))


DTYPES = (  # noqa: SIM905
    "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 uint16 uint32 uint64 bool "
    "complex64 complex128 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz"
).split()


def random_view(torch, rng: random.Random, base):
    """One of the views that can be saved, of a 3-d tensor."""
    n = tuple(base.shape)
    views = [
        lambda: base,
        lambda: base.transpose(0, 2),
        lambda: base.permute(1, 2, 0),
        lambda: base[rng.randrange(n[0]) :],
        lambda: base[:, :: rng.randint(1, 3)],
        lambda: base[0, rng.randrange(n[1])],
        lambda: base[-1, -1, -1],
        lambda: base[:, 1:1],
        lambda: base[:1].expand(4, *n[1:]),
        lambda: base[0, 0, 0].expand(3, 2),
        lambda: base.flatten(),
        lambda: base.unsqueeze(1),
        lambda: base.diagonal(),
        lambda: base.unfold(2, 2, 1),
        lambda: base.as_strided((2, 2), (1, 1), 1),
        lambda: base.clone().transpose(0, 1),
    ]
    return rng.choice(views)()


def random_state_dict(torch, rng: random.Random) -> dict:
    state = OrderedDict() if rng.random() < 0.7 else {}
    made: list = []
    for i in range(rng.randint(1, 8)):
        if made and rng.random() < 0.2:
            tensor = rng.choice(made)  # tied
        elif made and rng.random() < 0.2 and rng.choice(made).dim() == 3:
            three = [t for t in made if t.dim() == 3 and t.numel()]
            tensor = random_view(torch, rng, rng.choice(three)) if three else made[0]
        else:
            dtype = getattr(torch, rng.choice(DTYPES))
            shape = [rng.randint(2, 5) for _ in range(3)]
            count = int(np.prod(shape)) * torch.empty((), dtype=dtype).element_size()
            data = torch.tensor(list(rng.randbytes(count)), dtype=torch.uint8)
            base = (data & 1).bool() if dtype == torch.bool else data.view(dtype)
            tensor = random_view(torch, rng, base.view(shape))
        if rng.random() < 0.2 and tensor.is_floating_point() and tensor.dtype.itemsize > 1:
            tensor = torch.nn.Parameter(tensor)
        made.append(tensor)
        state[f"layer.{i}.weight"] = tensor
    if isinstance(state, OrderedDict) and rng.random() < 0.5:
        state._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    return state


def test_torch_files_are_read_bit_for_bit_as_torch_reads_them(tmp_path):
    torch = pytest.importorskip("torch")
    rng = random.Random(0)
    path = tmp_path / "pytorch_model.bin"
    for _ in range(300):
        state = random_state_dict(torch, rng)
        protocol = rng.choice([2, 2, 2, 3, 4, 5])
        torch.save(state, path, pickle_protocol=protocol)
        # Its own restricted reader knows the default protocol only.
        expected = torch.load(path, weights_only=protocol == 2)
        with open_tensors(path) as source:
            assert list(source) == list(expected)
            views: dict = {}
            for name, tensor in expected.items():
                array = source[name]
                assert same(array, from_torch(tensor)), (name, tensor.dtype, tensor.stride())
                assert source.info(name) == TensorInfo(array.dtype, array.shape)
                assert source.info(name).nbytes == array.nbytes
                assert array.flags.c_contiguous
                assert array.flags.writeable
                view = (
                    tensor.untyped_storage()._cdata,
                    tensor.dtype,
                    tensor.storage_offset(),
                    tensor.shape,
                    tensor.stride(),
                )
                views.setdefault(view, []).append(name)
            ties = {n: names[0] for names in views.values() for n in names[1:]}
            assert source.aliases() == ties


def test_tied_weights_are_reported(tmp_path):
    torch = pytest.importorskip("torch")
    weight = torch.nn.Parameter(torch.randn(4, 3))
    state = {"embedding": weight, "half": weight[:2], "head": weight, "copy": weight.clone()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    with open_tensors(tmp_path) as source:
        assert source.aliases() == {"head": "embedding"}


@pytest.mark.parametrize("key", ["state_dict", "model", "net"])
def test_a_nested_state_dict_is_found(tmp_path, key):
    torch = pytest.importorskip("torch")
    path = tmp_path / "checkpoint.bin"
    optimizer = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}
    nested = {"a": torch.arange(3), "step": 4, "shape": torch.Size([2]), "t": torch.float32}
    rest = {"epoch": 3, "args": None, "data": b"x", "ids": {1, 2}, "z": 1j, "at": bytearray(b"1")}
    rest |= {"device": torch.device("cpu"), "optimizer": optimizer, "big": 1 << 70, "x": -1.5}
    for protocol in (2, 4, 5):
        torch.save({key: nested, **rest}, path, pickle_protocol=protocol)
        with open_tensors(path) as source:
            assert list(source) == ["a"]
            assert source["a"].tolist() == [0, 1, 2]
            ignored = source.ignored()
        assert set(ignored) == {*rest, f"{key}.step", f"{key}.shape", f"{key}.t"}
        assert (ignored["epoch"], ignored[f"{key}.t"]) == ("int", "torch.float32")


def test_entries_that_are_no_tensors_are_reported(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.ones(2), "epoch": 3}, tmp_path / "pytorch_model.bin")
    with open_tensors(tmp_path) as source:
        assert list(source) == ["a"]
        assert source.ignored() == {"epoch": "int"}


def test_tensors_with_attributes_and_parameters_with_state_are_read(tmp_path):
    torch = pytest.importorskip("torch")
    tensor, parameter = torch.arange(4.0), torch.nn.Parameter(torch.ones(2))
    tensor.note, parameter.note = "x", 3
    torch.save({"t": tensor, "p": parameter}, tmp_path / "pytorch_model.bin")
    with open_tensors(tmp_path) as source:
        assert source["t"].tolist() == [0, 1, 2, 3]
        assert source["p"].tolist() == [1, 1]


def test_what_a_checkpoint_cannot_hold_is_named(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "pytorch_model.bin"
    cases = {
        "sparse": torch.eye(2).to_sparse(),
        "meta device": torch.ones(2, device="meta"),
        "float4_e2m1fn_x2": torch.ones(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
        "conjugation": torch.ones(2, dtype=torch.complex64).conj(),
    }
    for said, tensor in cases.items():
        torch.save({"layer.weight": tensor}, path)
        message = refused(path)
        assert said in message
        assert "'layer.weight'" in message
    torch.save(torch.nn.Linear(2, 2), path)
    assert "torch.nn.modules.linear.Linear" in refused(path)
    torch.save({"lr": 0.1}, path)
    assert "found none" in refused(path)
    torch.save({"a": {"w": torch.ones(1)}, "b": {"w": torch.ones(1)}}, path)
    assert "'a', 'b'" in refused(path)
    torch.save([torch.ones(2)], path)
    assert "a list" in refused(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))
    assert refused(path)


def test_expanded_tensors_are_read_and_bombs_refused(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "pytorch_model.bin"
    torch.save({"mask": torch.ones(1, dtype=torch.bool).expand(1, 1, 1024, 1024)}, path)
    with open_tensors(path) as source:
        assert source["mask"].all()
        assert source["mask"].shape == (1, 1, 1024, 1024)
    for shape in [(1 << 40,), (1 << 20, 1 << 20), (1 << 62, 1 << 62), (1 << 28,)]:
        numbers = b"(" + b"".join(b"\x8a\x09" + n.to_bytes(9, "little") for n in shape) + b"t"
        zeros = b"(" + b"K\x00" * len(shape) + b"t"
        archive(path, state(tensor(shape=numbers, strides=zeros)))
        assert "tensor '0'" in refused(path)


def rewrite(path: Path, folder: str, extra: dict[str, bytes] | None = None) -> None:
    """Write a torch zip again under another top folder, with further entries."""
    with zipfile.ZipFile(path) as archive:
        entries = {n.partition("/")[2]: archive.read(n) for n in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (entries | (extra or {})).items():
            archive.writestr(f"{folder}/{name}", data)


def test_any_top_folder_and_absent_side_entries_will_do(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.arange(6).view(2, 3).t()}, path)
    rewrite(path, "some name")
    with open_tensors(path) as source:
        assert source["a"].tolist() == [[0, 3], [1, 4], [2, 5]]
    rewrite(path, "archive", {"byteorder": b"big"})
    assert "byte order" in refused(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_compressed_archives_are_refused(tmp_path, method):
    path = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}, 2))
    assert "compressed" in refused(path)


# Hostile pickles ---------------------------------------------------------------------------------

STORAGE = (
    b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK%ctQ"
)
HOOKS = b"\x89ccollections\nOrderedDict\n)R"


def tensor(numel: int = 2, offset=b"K\x00", shape=b"K\x02\x85", strides=b"K\x01\x85") -> bytes:
    storage = STORAGE.replace(b"%c", bytes([numel]))
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + offset + shape + strides + HOOKS + b"tR"
    )


def state(*values: bytes) -> bytes:
    """A pickle of `{"0": value, "1": value...}`."""
    items = b"".join(b"X\x01\x00\x00\x00%d" % i + v for i, v in enumerate(values))
    return b"\x80\x02}(" + items + b"u."


def archive(path: Path, data: bytes, storage: bytes = bytes(8)) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", data)
        file.writestr("archive/data/0", storage)
    return path


def test_the_hand_made_pickle_is_a_good_one(tmp_path):
    path = archive(tmp_path / "good.bin", state(tensor()), np.float32([1, 2]).tobytes())
    with open_tensors(path) as source:
        assert source["0"].tolist() == [1, 2]


class Sentinel:
    """Creates a file when it is unpickled."""

    def __init__(self, how, path):
        self.how, self.path = how, path

    def __reduce__(self):
        return (self.how, (self.path,))


def hostile(target: str) -> dict[str, bytes]:
    command = f"touch {target}".encode()
    text = b"X" + struct.pack("<I", len(command)) + command
    system = b"cos\nsystem\n"
    call = system + text + b"\x85R"
    reduce = b"ctorch._utils\n_rebuild_parameter\n"
    self_list = b"]q\x00h\x00a"
    deep = b")" + b"\x85" * 50_000
    laughs = b"]q\x00" + b"".join(
        b"](" + bytes([0x68, i]) * 10 + b"eq" + bytes([i + 1]) for i in range(100)
    )
    return {
        "os.system": state(call),
        "posix.system": state(call.replace(b"cos\n", b"cposix\n")),
        "in a tensor's arguments": state(tensor(offset=call)),
        "as a shape": state(tensor(shape=call)),
        "as a key": b"\x80\x02}" + call + b"K\x01s.",
        "as a persistent id": b"\x80\x02" + call + b"Q.",
        "nested reduce": state(reduce + b"(" + call + b"\x88" + HOOKS[1:] + b"tR"),
        "below the answer": b"\x80\x02" + call + b"0}.",
        "after the tensors": state(tensor(), call),
        "stack global": b"\x80\x04\x8c\x02os\x8c\x06system\x93" + text + b"\x85R.",
        "dotted global": b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93" + text + b"\x85R.",
        "builtins.eval": state(b"cbuiltins\neval\n" + text + b"\x85R"),
        "getattr": state(b"cbuiltins\ngetattr\n" + text + text + b"\x86R"),
        "torch.load": state(b"ctorch.serialization\nload\n" + text + b"\x85R"),
        "inst": state(b"(" + text + b"ios\nsystem\n"),
        "obj": state(b"(" + system + text + b"o"),
        "newobj": state(system + text + b"\x85\x81"),
        "newobj of an allowed name": state(b"ccollections\nOrderedDict\n)\x81"),
        "newobj_ex": state(system + text + b"\x85}\x92"),
        "extension": state(b"\x82\x01" + text + b"\x85R"),
        "build on a tensor": state(tensor() + b"}b"),
        "build on a dict": state(b"}}b"),
        "build on a name": state(b"ctorch\nTensor\n}X\x01\x00\x00\x00aK\x01sb"),
        "reduce on a dtype": state(b"ctorch\nfloat32\n)R"),
        "reduce on a storage class": state(b"ctorch\nFloatStorage\nK\x08\x85R"),
        "reduce on a tensor": state(tensor() + b")R"),
        "reduce without arguments": state(b"ctorch._utils\n_rebuild_tensor_v2\n)R"),
        "reduce on a list": state(b"ctorch._utils\n_rebuild_tensor_v2\n]R"),
        "type_v2 through system": state(
            b"ctorch._tensor\n_rebuild_from_type_v2\n(" + system + b"ctorch\nTensor\n)}tR"
        ),
        "type_v2 through itself": state(
            b"ctorch._tensor\n_rebuild_from_type_v2\nq\x00(h\x00ctorch\nTensor\n)}tR"
        ),
        "ordered dict from a call": state(b"ccollections\nOrderedDict\n]\x85R"),
        "protocol 0": b"cos\nsystem\n(S'" + command + b"'\ntR.",
        "unicode name": b"\x80\x02cos\nsystem\xff\n.",
        "endless name": b"\x80\x02c" + b"a" * 10_000,
        "no stop": b"\x80\x02}",
        "nothing": b"",
        "stop only": b".",
        "pop of nothing": b"\x80\x020.",
        "unopened tuple": b"\x80\x02t.",
        "unknown memo": b"\x80\x02h\x07.",
        "odd dict": b"\x80\x02}(K\x01u.",
        "append to a dict": b"\x80\x02}K\x01a.",
        "deep marks": b"\x80\x02" + b"(" * 100_000 + b".",
        "long text": b"\x80\x02X\xff\xff\xff\xff.",
        "long bytes": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.",
        "long frame": b"\x80\x04\x95" + b"\xff" * 8 + b"}.",
        "long int": b"\x80\x02\x8b\xff\xff\xff\x7f.",
        "protocol 9": b"\x80\x09}.",
        "endless": b"\x80\x02" + b"]0" * 2_100_000 + b"}.",
        "a list in itself": b"\x80\x02" + self_list + b".",
        "calling a list in itself": b"\x80\x02" + self_list + b")R.",
        "a list in itself as storage": state(
            b"ctorch._utils\n_rebuild_parameter\n(" + self_list + b"NNtR"
        ),
        "deep tuple called": b"\x80\x02" + deep + b")R.",
        "deep tuple as a name": b"\x80\x04" + deep + b"\x8c\x01a\x93.",
        "deep tuple as storage": b"\x80\x02" + deep + b"Q.",
        "deep tuple as a dtype": state(
            tensor().replace(b"_v2", b"_v3").replace(b"tR", deep + b"tR", 1)
        ),
        "laughs called": b"\x80\x02" + laughs + b")R.",
        "laughs as a shape": state(tensor(shape=laughs + b"\x85")),
        "laughs as the answer": b"\x80\x02" + laughs + b".",
    }


def test_hostile_pickles_are_refused_and_run_nothing(tmp_path):
    sentinel = tmp_path / "executed"
    for name, data in hostile(str(sentinel)).items():
        path = archive(tmp_path / "evil.bin", data)
        assert refused(path), name
        assert not sentinel.exists(), name
    for how in (os.system, os.mkdir, os.makedirs, eval, exec):
        evil = pickle.dumps({"a": Sentinel(how, str(sentinel))}, 2)
        assert "was not loaded" in refused(archive(tmp_path / "evil.bin", evil))
        (tmp_path / "plain.bin").write_bytes(evil)
        refused(tmp_path / "plain.bin")
        assert not sentinel.exists()


def test_endless_values_that_nobody_reads_do_no_harm(tmp_path):
    deep = b")" + b"\x85" * 50_000
    values = (tensor(), b"]q\x00h\x00a", deep, b"}" + deep + b"K\x01s")
    with open_tensors(archive(tmp_path / "odd.bin", state(*values))) as source:
        assert list(source) == ["0"]
        assert source.ignored() == {"1": "list", "2": "tuple", "3": "dict"}


def test_lying_sizes_are_refused(tmp_path):
    big = b"\x8a\x08" + struct.pack("<q", 1 << 61)
    huge = b"\x8a\xff" + b"\xff" * 254 + b"\x7f"
    negative = b"J" + struct.pack("<i", -1)
    lies = {
        "shape": tensor(shape=b"K\x03\x85"),
        "offset": tensor(offset=b"K\x01"),
        "strides": tensor(strides=b"K\x02\x85"),
        "storage": tensor(numel=3),
        "big shape": tensor(shape=big + b"\x85"),
        "big offset": tensor(offset=big),
        "big strides": tensor(strides=big + b"\x85"),
        "huge shape": tensor(shape=huge + b"\x85", strides=b"K\x00\x85"),
        "huge offset": tensor(offset=huge),
        "negative shape": tensor(shape=negative + b"\x85"),
        "negative offset": tensor(offset=negative),
        "negative strides": tensor(offset=b"K\x01", strides=negative + b"\x85"),
        "overflowing shape": tensor(shape=big + big + b"\x86", strides=b"K\x00K\x00\x86"),
        "overflowing empty": tensor(
            shape=b"(K\x00" + big + big + b"t", strides=b"(K\x00K\x00K\x00t"
        ),
        "ranks": tensor(strides=b"K\x01K\x01\x86"),
        "many dimensions": tensor(
            shape=b"(" + b"K\x01" * 70 + b"t", strides=b"(" + b"K\x01" * 70 + b"t"
        ),
        "bool": tensor(shape=b"\x88\x85"),
        "float": tensor(shape=b"G" + bytes(8) + b"\x85"),
        "list": tensor(shape=b"](K\x02e"),
        "other storage": tensor().replace(b"\x01\x00\x00\x000", b"\x01\x00\x00\x007"),
        "negative storage": tensor().replace(b"K\x02tQ", negative + b"tQ"),
        "storage of a function": tensor().replace(
            b"ctorch\nFloatStorage", b"ccollections\nOrderedDict"
        ),
        "persistent id": tensor().replace(b"storage", b"modules"),
    }
    for name, data in lies.items():
        path = archive(tmp_path / "lie.bin", state(data))
        assert refused(path), name
    arbitrary_stride_of_one = tensor(shape=b"K\x01\x85", strides=huge + b"\x85")
    with open_tensors(archive(tmp_path / "one.bin", state(arbitrary_stride_of_one))) as source:
        assert source["0"].shape == (1,)


# Safetensors -------------------------------------------------------------------------------------

OFFICIAL = [
    np.float64, np.float32, np.float16, np.int64, np.int32, np.int16, np.int8,
    np.uint64, np.uint32, np.uint16, np.uint8, np.bool_, np.complex64,
]  # fmt: skip


@st.composite
def arrays(draw) -> np.ndarray:
    dtype = np.dtype(draw(st.sampled_from(OFFICIAL)))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
    count = int(np.prod(shape)) * dtype.itemsize
    data = np.frombuffer(draw(st.randoms(use_true_random=False)).randbytes(count), np.uint8)
    return (data & 1 if dtype == np.bool_ else data).view(dtype).reshape(shape)


NAMES = st.text(st.characters(exclude_categories=("Cs",)), max_size=12).filter(
    lambda name: name != "__metadata__"
)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(NAMES, arrays(), max_size=6), st.dictionaries(NAMES, NAMES, max_size=2))
def test_official_safetensors_are_read(tmp_path_factory, tensors, metadata):
    path = tmp_path_factory.getbasetemp() / "official.safetensors"
    path.write_bytes(official_save(tensors, metadata or None))
    with open_tensors(path) as source:
        assert source.metadata == metadata
        assert set(source) == set(tensors)
        assert source.aliases() == {}
        assert source.ignored() == {}
        for name, array in tensors.items():
            assert same(source[name], array)
            assert source.info(name) == TensorInfo(array.dtype, array.shape)


def test_bfloat16_and_float8_are_read_as_torch_wrote_them(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    names = "bfloat16 float8_e4m3fn float8_e5m2 float8_e8m0fnu float8_e4m3fnuz float8_e5m2fnuz"
    bits = torch.arange(1 << 16).to(torch.uint16)
    tensors = {
        name: (bits if name == "bfloat16" else bits.to(torch.uint8)).view(getattr(torch, name))
        for name in names.split()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    with open_tensors(tmp_path) as source:
        for name, expected in tensors.items():
            assert source[name].dtype == getattr(ml_dtypes, name)
            assert same(source[name], from_torch(expected))
        floats = source["bfloat16"].astype(np.float32)
    np.testing.assert_array_equal(floats, tensors["bfloat16"].float().numpy())


def test_an_unsupported_dtype_is_named(tmp_path):
    data = np.zeros(4, np.uint8)
    spec = TensorSpec(dtype="float4_e2m1fn_x2", shape=(4,), data_ptr=data.ctypes.data, data_len=4)
    (tmp_path / "model.safetensors").write_bytes(serialize({"layer.weight": spec}))
    message = refused(tmp_path / "model.safetensors")
    assert "'layer.weight'" in message
    assert "'F4'" in message


def raw(header: str | bytes | dict, data: bytes = b"") -> bytes:
    if isinstance(header, dict):
        header = json.dumps(header)
    text = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(text)) + text + data


def entry(start: int = 0, end: int = 8, shape=(2,), dtype="F32", **more) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end], **more}


BROKEN = {
    "overlap": raw({"a": entry(), "b": entry(4, 12)}, bytes(12)),
    "same bytes": raw({"a": entry(), "b": entry()}, bytes(8)),
    "hole": raw({"a": entry(), "b": entry(12, 20)}, bytes(20)),
    "hole in front": raw({"a": entry(4, 12)}, bytes(12)),
    "trailing bytes": raw({"a": entry()}, bytes(9)),
    "missing bytes": raw({"a": entry()}, bytes(7)),
    "backwards": raw({"a": entry(8, 0)}, bytes(8)),
    "negative": raw({"a": entry(-8, 0)}, bytes(8)),
    "size": raw({"a": entry(shape=(3,))}, bytes(8)),
    "negative shape": raw({"a": entry(shape=(-2, -1))}, bytes(8)),
    "float shape": raw({"a": entry(shape=(2.0,))}, bytes(8)),
    "bool shape": raw({"a": entry(0, 4, shape=(True,))}, bytes(4)),
    "text shape": raw({"a": entry(shape=("2",))}, bytes(8)),
    "overflowing shape": raw({"a": entry(0, 0, shape=(0, 1 << 40, 1 << 40))}),
    "huge shape": raw({"a": entry(0, 1 << 70, shape=(1 << 68,))}),
    "digits": raw('{"a":{"dtype":"F32","shape":[' + "9" * 5000 + '],"data_offsets":[0,0]}}'),
    "many dimensions": raw({"a": entry(0, 4, shape=(1,) * 65)}, bytes(4)),
    "dtype": raw({"a": entry(dtype="F33")}, bytes(8)),
    "no dtype": raw({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
    "list for a tensor": raw({"a": [1, 2]}),
    "duplicate": raw(
        '{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},'
        '"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    ),
    "duplicate inside": raw('{"a":{"dtype":"F32","dtype":"F16","shape":[0],"data_offsets":[0,0]}}'),
    "surrogate": raw('{"\\ud800":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'),
    "metadata": raw({"__metadata__": {"a": 1}}),
    "metadata list": raw({"__metadata__": []}),
    "not json": raw("{]}"),
    "not an object": raw("[]      "),
    "not utf-8": raw(b'{"\xff":1}'),
    "deep": raw("{" + '"a":[' * 100_000),
    "header beyond the file": struct.pack("<Q", 1 << 20) + b"{}",
    "header beyond reason": struct.pack("<Q", 1 << 62) + b"{}",
    "short": b"\x00\x01",
    "empty": b"",
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_safetensors_are_refused(tmp_path, name):
    path = tmp_path / "model.safetensors"
    path.write_bytes(BROKEN[name])
    refused(path)


def test_any_byte_of_a_bool_is_true(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw({"a": entry(0, 4, (4,), "BOOL")}, bytes([0, 1, 2, 255])))
    with open_tensors(path) as source:
        assert source["a"].tobytes() == bytes([0, 1, 1, 1])


# Folders and shards ------------------------------------------------------------------------------


def safetensors_file(path: Path, *names: str) -> Path:
    path.write_bytes(official_save({n: np.full(3, i, np.float32) for i, n in enumerate(names)}))
    return path


def index(path: Path, weight_map: object) -> Path:
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return path


ST, ST_INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def test_a_folder_is_searched_in_the_published_order(tmp_path):
    safetensors_file(tmp_path / "shard-a", "from index")
    index(tmp_path / BIN_INDEX, {"from index": "shard-a"})
    (tmp_path / "training_args.bin").write_bytes(b"x")
    assert list(open_tensors(tmp_path)) == ["from index"]
    archive(tmp_path / BIN, state(tensor()))
    assert "several weights (pytorch_model.bin, pytorch_model.bin.index.json)" in refused(tmp_path)
    (tmp_path / BIN_INDEX).rename(tmp_path / ST_INDEX)
    assert list(open_tensors(tmp_path)) == ["from index"]
    (tmp_path / ST_INDEX).unlink()
    with open_tensors(tmp_path) as source:
        assert list(source) == ["0"]
        assert source.path == tmp_path
    safetensors_file(tmp_path / ST, "single")
    with open_tensors(tmp_path) as source:
        assert list(source) == ["single"]
    with open_tensors(str(tmp_path / BIN)) as source:
        assert list(source) == ["0"]


def test_a_lone_file_is_taken_and_several_are_not(tmp_path):
    one = safetensors_file(tmp_path / "adapter.safetensors", "a")
    archive(tmp_path / "other.bin", state(tensor()))
    with open_tensors(tmp_path) as source:
        assert list(source) == ["a"]
    safetensors_file(tmp_path / "second.safetensors", "b")
    message = refused(tmp_path)
    assert "adapter.safetensors, second.safetensors" in message
    assert "pass the file" in message
    with open_tensors(one) as source:
        assert list(source) == ["a"]


def test_a_folder_without_weights_says_what_it_has(tmp_path):
    assert "it is empty" in refused(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    message = refused(tmp_path)
    assert "looked for model.safetensors, " in message
    assert "it has config.json" in message
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert "it has model.gguf, and this version does not read GGUF yet" in refused(tmp_path)
    assert "GGUF" in refused(tmp_path / "model.gguf")
    safetensors_file(tmp_path / "model-00001-of-00002.safetensors", "a")
    assert "no model.safetensors.index.json" in refused(tmp_path)
    assert "does not exist" in refused(tmp_path / "absent")
    assert "weight_map" in refused(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"\x89HDF\r\n\x1a\n" + bytes(50), "damaged"),
        (bytes(257) + b"ustar", "tar archive"),
        (b"", "is empty"),
        (b"PK\x03\x04", "incomplete"),
    ],
)
@pytest.mark.parametrize("name", [ST, BIN])
def test_files_that_are_something_else_are_recognised(tmp_path, content, said, name):
    (tmp_path / name).write_bytes(content)
    assert said in refused(tmp_path / name)
    with pytest.raises(CheckpointError, match=said):
        open_tensors(tmp_path)


def test_special_files_are_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    refused(tmp_path / "pipe.safetensors")
    (tmp_path / ST).symlink_to("absent")
    assert "link" in refused(tmp_path)[: -len("link")]
    (tmp_path / "loop").symlink_to("loop")
    refused(tmp_path / "loop")
    with pytest.raises(CheckpointError):
        open_tensors("null\0byte")


def test_a_hub_snapshot_of_links_is_read(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    safetensors_file(blobs / "1", "a", "b")
    safetensors_file(blobs / "2", "c")
    shards = {"a": "model-00001-of-00002.safetensors", "c": "model-00002-of-00002.safetensors"}
    index(blobs / "3", {"b": shards["a"], **shards})
    for name, blob in ((shards["a"], 1), (shards["c"], 2), (ST_INDEX, 3)):
        (snapshot / name).symlink_to(f"../../blobs/{blob}")
    with open_tensors(snapshot) as source:
        assert list(source) == ["b", "a", "c"]
        assert source["b"].tolist() == [1, 1, 1]
        assert source["c"].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "shard",
    ["../a", "/etc/passwd", "sub/a", "..", ".", "", "a\\b", "C:a", "..\\a", "a\0", "a\nb", 3, None],
)
def test_shards_must_be_plain_names(tmp_path, shard):
    safetensors_file(tmp_path / "a", "x")
    assert "plain name" in refused(index(tmp_path / ST_INDEX, {"x": shard}))


def test_incomplete_shards_are_refused(tmp_path):
    safetensors_file(tmp_path / "one", "a")
    where = index(tmp_path / ST_INDEX, {"a": "one", "b": "two"})
    with pytest.raises(CheckpointError, match="two of 2 shards"):
        open_tensors(where)
    safetensors_file(tmp_path / "two", "c")
    message = refused(where)
    assert "lacks what" in message
    assert "'b'" in message
    (tmp_path / "two").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with open_tensors(where) as source:
        assert source["a"].shape == (3,)
        with pytest.raises(CheckpointError, match="two is a git-lfs"):
            source["b"]
    for bad in ("[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "one", "a": "two"}}', "{"):
        where.write_text(bad)
        refused(where)


def test_torch_shards_keep_their_ties(tmp_path):
    torch = pytest.importorskip("torch")
    weight = torch.arange(6.0).view(2, 3)
    torch.save({"a": weight, "b": weight, "n": 1, "extra": weight}, tmp_path / "one.bin")
    torch.save({"c": weight.t()}, tmp_path / "two.bin")
    index(tmp_path / BIN_INDEX, {"a": "one.bin", "b": "one.bin", "c": "two.bin"})
    with open_tensors(tmp_path) as source:
        assert source.aliases() == {"b": "a"}
        assert source["c"].tolist() == [[0, 3], [1, 4], [2, 5]]
        assert source.ignored() == {"n": "int", "extra": "a tensor not in the index"}


# Laziness ----------------------------------------------------------------------------------------


def peak_of(action) -> int:
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_only_what_is_read_takes_memory(tmp_path):
    """A sparse file of 64 GB and a tensor of 1 MB."""
    path, small = tmp_path / "model.safetensors", 1 << 20
    big = 1 << 36
    header = {"a": entry(0, big, (big,), "U8"), "b": entry(big, big + small, (small,), "U8")}
    path.write_bytes(raw(header))
    os.truncate(path, path.stat().st_size + big + small)

    def read():
        with open_tensors(path) as source:
            assert source["b"].nbytes == small

    assert peak_of(read) < 2 * small


def test_a_view_of_a_large_storage_is_read_alone(tmp_path):
    torch = pytest.importorskip("torch")
    weight = torch.zeros(1 << 24, dtype=torch.uint8)
    torch.save({"a": weight, "b": weight[-5000:]}, tmp_path / BIN)

    def read():
        with open_tensors(tmp_path) as source:
            assert source["b"].nbytes == 5000

    assert peak_of(read) < 1 << 20


def test_few_shards_are_open_at_a_time(tmp_path):
    names = [f"t{i}" for i in range(40)]
    for name in names:
        safetensors_file(tmp_path / f"{name}.part", name)
    index(tmp_path / ST_INDEX, {name: f"{name}.part" for name in names})
    before = len(os.listdir("/proc/self/fd"))
    with open_tensors(tmp_path) as source:
        for name in names + names:
            source[name]
        assert len(os.listdir("/proc/self/fd")) - before <= 4
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_that_changes_between_reads_is_refused(tmp_path):
    path = safetensors_file(tmp_path / ST, "a", "b")
    source = open_tensors(path)
    assert source["a"].tolist() == [0, 0, 0]
    source.close()
    assert source["b"].tolist() == [1, 1, 1]
    source.close()
    safetensors_file(path, "b", "a", "c")
    with pytest.raises(CheckpointError, match="was changed"):
        source["a"]


def test_a_source_is_a_mapping_that_reads_on_demand(tmp_path):
    with open_tensors(safetensors_file(tmp_path / ST, "encoder.a", "encoder.b")) as source:
        assert len(source) == 2
        assert "encoder.a" in source
        assert "encoder.c" not in source
        assert source.get("encoder.c") is None
        assert source == source
        assert set(source.keys()) == {"encoder.a", "encoder.b"}
        with pytest.raises(KeyError, match=r"did you mean 'encoder\.a'"):
            source["encoder.aa"]
        with pytest.raises(KeyError):
            source.info("encoder.c")


def test_reading_needs_numpy_only(tmp_path):
    """The readers by themselves: other parts of the package may import JAX."""
    path = safetensors_file(tmp_path / ST, "a")
    code = (
        "import sys, types\n"
        "package = types.ModuleType('jax_encdec.convert')\n"
        f"package.__path__ = [{str(Path(readers.__file__).parent)!r}]\n"
        "sys.modules['jax_encdec.convert'] = package\n"
        "from jax_encdec.convert import readers\n"
        f"readers.open_tensors({str(path)!r}).close()\n"
        "others = 'jax', 'flax', 'torch', 'transformers', 'tensorflow', 'safetensors'\n"
        "sys.exit(any(name in sys.modules for name in others))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# Fuzzing -----------------------------------------------------------------------------------------


def mutated(rng: random.Random, data: bytes) -> bytes:
    if rng.random() < 0.2:
        return data[: rng.randrange(len(data))]
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(changed))
        if rng.random() < 0.5:
            changed[at] = rng.randrange(256)
        elif rng.random() < 0.5:
            changed[at] ^= 1 << rng.randrange(8)
        else:
            changed[at : at + rng.randint(0, 4)] = rng.randbytes(rng.randint(0, 4))
    return bytes(changed)


def seeds() -> dict[str, bytes]:
    """Small files of every format, the headers being most of them."""
    good = {BIN: state(tensor(), b"}", tensor(offset=b"K\x01", shape=b"K\x01\x85"))}
    path = io.BytesIO()
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", good[BIN])
        file.writestr("a/data/0", bytes(8))
    tensors = {"a": np.zeros((2, 3), np.float32), "b": np.zeros(4, np.int8)}
    return {
        BIN: path.getvalue(),
        ST: official_save(tensors, {"format": "pt"}),
        ST_INDEX: json.dumps({"weight_map": {"x": "s"}}).encode(),
    }


def test_what_the_official_library_refuses_is_refused(tmp_path):
    rng = random.Random(0)
    path = tmp_path / ST
    for _ in range(400):
        data = mutated(rng, seeds()[ST])
        path.write_bytes(data)
        official = None
        with contextlib.suppress(SafetensorError, KeyError):
            official = official_load(data)
        if official is None:
            refused(path)
            continue
        with contextlib.suppress(CheckpointError):  # ours is stricter: names given twice
            ours = {name: array.shape for name, array in read_all(path).items()}
            assert ours == {name: array.shape for name, array in official.items()}


def test_truncated_torch_files_are_refused(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / BIN
    torch.save({"a": torch.ones(100), "b": torch.ones(3).bfloat16()}, path)
    data = path.read_bytes()
    for end in range(0, len(data), 7):
        path.write_bytes(data[:end])
        refused(path)
