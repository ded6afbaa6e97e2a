"""What the TensorFlow classes saved is read under PyTorch's names, as the PyTorch classes read it.

The oracles are files that the real classes of Transformers 4 saved (`data/`) and h5py.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from published_formats import (
    CONFIGS,
    DATA,
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
from safetensors.numpy import save_file
from test_readers import peak_of

from jax_encdec import EncoderDecoderModel
from jax_encdec.convert.readers import open_tensors
from jax_encdec.families import FAMILIES

h5py = pytest.importorskip("h5py")

KERAS, INDEX = "tf_model.h5", "tf_model.h5.index.json"
PREFIX = {"electra": "electra.", "albert": "albert."}
"""The bare models, whose PyTorch class leaves out the main layer's name."""


@pytest.mark.parametrize("name", MODELS["h5"])
def test_published_models_are_read_as_pytorch_has_them(tmp_path, name, record_property):
    family = CONFIGS[name]["model_type"]
    if family in FAMILIES:
        record_property("family", family)
        record_property("reads", "TensorFlow")
    assert_as_pytorch_saved(name, "h5", tmp_path, PREFIX.get(name, ""))


@pytest.mark.parametrize("name", WHOLE["h5"])
def test_published_whole_models_load_as_those_of_pytorch(tmp_path, name):
    folder = published(name, "h5", tmp_path)
    assert_same_loaded(EncoderDecoderModel.from_pretrained(folder), loaded(name))


@pytest.mark.parametrize(("name", "role"), SIDES["h5"])
def test_published_models_make_the_same_side_of_a_pair(tmp_path, name, role):
    folder = published(name, "h5", tmp_path / "tensorflow")
    assert_same_side(folder, published(name, "safetensors", tmp_path / "torch"), role)


def test_deberta_with_position_kernels_of_its_own_is_read(tmp_path):
    """They have other names than PyTorch's, whose class leaves them random."""
    shapes = {"weight": (8, 8), "bias": (8,)}
    folders = {
        "torch": ("pos_key_proj", "pos_query_proj"),
        "tensorflow": ("pos_proj", "pos_q_proj"),
    }
    for folder, names in folders.items():
        rng = np.random.default_rng(0)
        arrays = tensors(DATA / "deberta_v2") | {
            f"deberta.encoder.layer.0.attention.self.{name}.{part}": rng.normal(size=shape)
            for name in names
            for part, shape in shapes.items()
        }
        (tmp_path / folder).mkdir()
        config = CONFIGS["deberta_v2"] | {"share_att_key": False}
        (tmp_path / folder / "config.json").write_text(json.dumps(config))
        save_file(arrays, tmp_path / folder / "model.safetensors")
    assert_same_side(tmp_path / "tensorflow", tmp_path / "torch", "encoder")


def variables(path: Path) -> dict[str, np.ndarray]:
    """By h5py: a model's variables under TensorFlow's names."""
    with h5py.File(path) as file:
        layers = [file[name] for name in file.attrs["layer_names"]]
        return {name: layer[name][()] for layer in layers for name in layer.attrs["weight_names"]}


@pytest.mark.parametrize("name", ["bert_gpt2", "roberta_bert", "bart", "t5"])
def test_shards_are_read(tmp_path, name):
    """As `save_pretrained(max_shard_size=...)` of the TensorFlow classes made them."""
    folder = published(name, "h5", tmp_path)
    whole = tensors(folder)
    flat = variables(folder / KERAS)
    (folder / KERAS).unlink()
    weight_map = {}
    for number in (1, 2):
        shard = f"tf_model-{number:05d}-of-00002.h5"
        part = {n: flat[n] for i, n in enumerate(sorted(flat)) if i % 2 == number - 1}
        with h5py.File(folder / shard, "w") as file:
            for variable, array in part.items():
                bare = "/".join(variable.split("/")[1:])
                kept = "model." in variable or not bare
                file.create_dataset(variable if kept else bare, data=array)
            file.attrs["layer_names"] = list(map(str.encode, part))
        weight_map |= dict.fromkeys(part, shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_same(tensors(folder), whole)
    # Of a single shard, too, though its names are the model's without those of others.
    with open_tensors(folder / "tf_model-00001-of-00002.h5") as shard:
        assert len(shard) == list(weight_map.values()).count("tf_model-00001-of-00002.h5")


def test_a_variable_that_is_saved_twice_must_be_the_same_twice(tmp_path):
    """T5's embedding is in the file three times."""
    path = published("t5", "h5", tmp_path) / KERAS
    with h5py.File(path, "r+") as file:
        file["encoder/shared/shared/embeddings:0"][0, 0] += 1
    assert "'shared.weight' twice, and they differ" in refused(path)


NAMES = st.lists(
    st.text(st.sampled_from("abcXYZ019 ._-:"), min_size=1, max_size=12).filter(
        lambda name: set(name) != {"."}
    ),
    min_size=1,
    max_size=5,
)
DTYPES = ["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"]
SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(NAMES, st.sampled_from(DTYPES), SHAPES), min_size=1, max_size=40),
    st.integers(0, 9),
)
def test_any_tree_of_datasets_is_read_as_h5py_reads_it(tmp_path_factory, items, seed):
    path = tmp_path_factory.getbasetemp() / "any.h5"
    rng = np.random.default_rng(seed)
    with h5py.File(path, "w") as file:
        for parts, dtype, shape in items:
            names = ["model", *parts]
            places = ["/".join(names[:end]) for end in range(1, len(names) + 1)]
            if places[-1] in file or any(isinstance(file.get(p), h5py.Dataset) for p in places):
                continue
            file[places[-1]] = rng.integers(0, 100, shape).astype(dtype)
        found: list[np.ndarray] = []
        file.visititems(
            lambda _, item: found.append(item[()]) if isinstance(item, h5py.Dataset) else None
        )
    read = tensors(path)
    contents = sorted((str(a.dtype), a.shape, a.tobytes()) for a in found)
    assert sorted((str(a.dtype), a.shape, a.tobytes()) for a in read.values()) == contents


def test_many_names_in_one_group_are_found(tmp_path):
    """Enough for a B-tree of several levels."""
    path = tmp_path / KERAS
    with h5py.File(path, "w") as file:
        for i in range(3000):
            file[f"model/layer_._{i}/bias:0"] = np.float32([i])
    found = tensors(path)
    assert len(found) == 3000
    assert all(array[0] == int(name.split(".")[-2]) for name, array in found.items())


# Bad files ---------------------------------------------------------------------------------------


def hostile(folder: Path) -> dict[str, Path]:
    """Files that h5py makes and TensorFlow does not."""
    made: dict[str, Path] = {}

    def file(name: str, **options):
        made[name] = folder / f"{name.replace(' ', '_')}.h5"
        opened = h5py.File(made[name], "w", **options)
        opened["model/dense/bias:0"] = np.ones(4, np.float32)
        return opened

    secret = folder / "secret"
    secret.write_bytes(b"secret" * 100)
    with file("external link") as f:
        f["model/x"] = h5py.ExternalLink("external_storage.h5", "/model")
    with file("external storage") as f:
        external = [(str(secret), 0, 16)]
        f.create_dataset("model/x", (4,), np.float32, external=external)
    with file("soft link") as f:
        f["model/x"] = h5py.SoftLink("/model/dense/bias:0")
    with file("soft link in a circle") as f:
        f["model/x"] = h5py.SoftLink("/model/x")
    with file("hard link in a circle") as f:
        f["model/x"] = f["model"]
    with file("group twice") as f:
        f["model/x"] = f["model/dense"]
    with file("gzip bomb") as f:
        f.create_dataset("model/x", (1 << 28,), np.uint8, compression="gzip", fillvalue=0)
    with file("chunked") as f:
        f.create_dataset("model/x", data=np.ones(100), chunks=(10,))
    with file("resizable") as f:
        f.create_dataset("model/x", data=np.ones(100), maxshape=(None,))
    with file("never written") as f:
        f.create_dataset("model/x", (1 << 40,), np.float32)
    with file("virtual") as f:
        layout = h5py.VirtualLayout((4,), np.float32)
        layout[:] = h5py.VirtualSource(f["model/dense/bias:0"])
        f.create_virtual_dataset("model/x", layout)
    with file("newer groups", track_order=True):
        pass
    with file("newest", libver="latest"):
        pass
    with file("user block", userblock_size=512):
        pass
    with file("committed type") as f:
        f["type"] = np.dtype("f4")
        f.create_dataset("model/x", data=np.ones(4, "f4"), dtype=f["type"])
    with file("deep") as f:
        f["model" + "/x" * 40] = np.ones(2)
    with file("compact") as f:
        space, kind = h5py.h5s.create_simple((2,)), h5py.h5t.IEEE_F32LE
        options = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        options.set_layout(h5py.h5d.COMPACT)
        h5py.h5d.create(f["model"].id, b"x", kind, space, options)
    return made


def test_what_tensorflow_does_not_write_is_refused(tmp_path):
    for name, path in hostile(tmp_path).items():
        assert peak_of(lambda path=path: refused(path)) < 1 << 22, name


def test_what_is_no_array_of_numbers_is_left_aside(tmp_path):
    path = tmp_path / KERAS
    with h5py.File(path, "w") as file:
        file["model/dense/bias:0"] = np.ones(4, np.float32)
        file["model/text"] = "a text of any length"
        file["model/names"] = np.array([b"a", b"bc"])
        file["model/big-endian"] = np.ones(2, ">f4")
        file["model/mixed"] = np.zeros(2, [("a", "f4"), ("b", "i4")])
        file["model/references"] = np.array([file.ref], h5py.ref_dtype)
        file["model/true"] = np.array([True])
    with open_tensors(path) as source:
        assert list(source) == ["model.dense.bias"]
        assert len(source.ignored()) == 6


def test_an_empty_file_is_refused(tmp_path):
    h5py.File(tmp_path / KERAS, "w").close()
    assert "holds no arrays" in refused(tmp_path / KERAS)


def test_a_cut_file_is_refused(tmp_path):
    path = published("electra", "h5", tmp_path) / KERAS
    data = path.read_bytes()
    for end in range(1, len(data), 97):
        path.write_bytes(data[:end])
        refused(path)


def seed(path: Path) -> bytes:
    with h5py.File(path, "w") as file:
        group = file.create_group("bert")
        group.attrs["weight_names"] = [b"m/bert/a/kernel:0", b"m/bert/a/bias:0"]
        group["m/bert/a/kernel:0"] = np.ones((2, 3), np.float32)
        group["m/bert/a/bias:0"] = np.ones(3, np.float32)
    return path.read_bytes()


def test_damaged_files_are_refused_or_read(tmp_path):
    fuzz(tmp_path / KERAS, seed(tmp_path / KERAS), 2000, 0)


@pytest.mark.exhaustive
def test_damaged_files_are_refused_or_read_at_length(tmp_path):
    fuzz(tmp_path / KERAS, seed(tmp_path / KERAS), 10_000, 1)
