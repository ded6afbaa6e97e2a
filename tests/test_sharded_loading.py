"""Weights go from file slices into shards: the same numbers, and nobody reads what is another's."""

from __future__ import annotations

import math
import tracemalloc

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from published_formats import published
from tiny_pairs import save

from jax_encdec import BertConfig, EncoderDecoderConfig, EncoderDecoderModel
from jax_encdec.convert.convert import convert
from jax_encdec.convert.readers import open_tensors
from jax_encdec.convert.safetensors_io import SafetensorsFile
from jax_encdec.errors import CheckpointError
from jax_encdec.layers import flatten
from jax_encdec.pair_params import model_params
from jax_encdec.pretrained import plan_pair
from jax_encdec.training.loading import join_sharded, load_sharded
from jax_encdec.training.sharding import make_mesh, param_shardings, placements
from jax_encdec.warm_start import join

MESHES = ("fsdp=8", "fsdp=2,tensor=4")


def trees_equal(one, other):
    one, other = flatten_dict(one), flatten_dict(other)
    assert one.keys() == other.keys()
    for path in one:
        assert one[path].dtype == other[path].dtype, path
        assert np.asarray(one[path]).tobytes() == np.asarray(other[path]).tobytes(), path


def assert_placed(model, params, mesh):
    expected = flatten_dict(param_shardings(model, mesh))
    for path, leaf in flatten_dict(params).items():
        assert leaf.sharding.is_equivalent_to(expected[path], leaf.ndim), path


@pytest.mark.parametrize("kind", ["bert2bert", "bert2gpt2", "tied", "bart"])
def test_every_format_is_read_into_shards(tmp_path, kind):
    """Mapped or not, in one file or several: bit for bit what `from_pretrained` reads."""
    folder = save(tmp_path / "one", kind)
    model, params = EncoderDecoderModel.from_pretrained(folder)
    convert(folder, tmp_path / "shards", max_shard_bytes=20_000)
    convert(folder, tmp_path / "bin", format="bin")
    convert(folder, tmp_path / "msgpack", format="msgpack")
    for number, name in enumerate(("one", "shards", "bin", "msgpack")):
        mesh = make_mesh(MESHES[number % 2])
        ours, placed = load_sharded(tmp_path / name, mesh)
        assert ours == model
        trees_equal(placed, params)
        assert_placed(model, placed, mesh)


def test_half_precision_on_the_way(tmp_path):
    folder = save(tmp_path / "pair")
    _, params = EncoderDecoderModel.from_pretrained(folder, dtype="bfloat16")
    model, placed = load_sharded(folder, make_mesh("fsdp=8"), dtype="bfloat16")
    assert model.param_dtype == np.dtype(jax.numpy.bfloat16)
    trees_equal(placed, params)


@pytest.mark.parametrize(
    "options",
    [{}, {"cross_attention": "self", "tie_encoder_decoder": True}],
    ids=["fresh", "copied and tied"],
)
def test_warm_starts_are_joined_in_shards(tmp_path, options):
    """What is read, drawn and copied is what `join` reads, draws and copies."""
    side, mesh = published("bert_lm", "msgpack", tmp_path), make_mesh(MESHES[0])
    loaded = join(side, side, **options)
    model, placed = join_sharded(side, side, mesh, **options)
    assert model == loaded.model
    assert_placed(model, placed, mesh)
    ours, expected = flatten_dict(placed), flatten_dict(loaded.params)
    assert ours.keys() == expected.keys()
    for path in ours:
        np.testing.assert_allclose(ours[path], expected[path], rtol=1e-6, err_msg=str(path))


# Who reads what ----------------------------------------------------------------------------------


def large():
    """Large enough that a shard stands out from what planning allocates."""
    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8}
    size |= {"intermediate_size": 128, "vocab_size": 4096, "max_position_embeddings": 64}
    ids = {"decoder_start_token_id": 1, "pad_token_id": 0, "eos_token_id": 2}
    half = BertConfig(**size)
    return EncoderDecoderModel(EncoderDecoderConfig(encoder=half, decoder=half, **ids))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    model = large()
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape, np.float32), model.param_shapes()
    )
    model.save_pretrained(folder, params)
    return folder, model, flatten(params)


def wanted_by(devices, model, mesh):
    """The parts of each leaf that some of the devices hold: one host's."""
    wanted = {}
    for path, leaf in placements(model, mesh).items():
        where = jax.sharding.NamedSharding(mesh, leaf.spec).devices_indices_map(leaf.shape)
        wanted[path] = {
            tuple(s.indices(n)[:2] for s, n in zip(where[d], leaf.shape, strict=True))
            for d in devices
        }
    return wanted


class Seen(np.ndarray):
    """An array that counts the bytes that are taken of it."""

    taken = 0

    def __getitem__(self, index):
        part = super().__getitem__(index)
        Seen.taken += part.nbytes
        return part


@pytest.mark.parametrize("shape", MESHES)
def test_a_host_reads_the_bytes_of_its_own_shards(saved, shape, monkeypatch):
    """Two of eight devices are this host's: it takes from the file what they hold, once."""
    folder, model, params = saved
    mesh = make_mesh(shape)
    wanted = wanted_by(mesh.devices.flat[:2], model, mesh)
    view = SafetensorsFile.view
    monkeypatch.setattr(SafetensorsFile, "view", lambda self, name: view(self, name).view(Seen))
    monkeypatch.setattr(
        SafetensorsFile, "__getitem__", lambda self, name: pytest.fail(f"{name} was read whole")
    )
    monkeypatch.setattr(Seen, "taken", 0)
    held = 0
    with open_tensors(folder) as source:
        declared = flatten(model_params(model.config))
        _, plan, _ = plan_pair(model.config, source, where="here")
        for path, box, part in plan.boxes(source, declared, np.dtype("float32"), wanted):
            index = tuple(slice(*span) for span in box)
            assert np.array_equal(part, params[path][index])
            held += part.nbytes
            wanted[path].remove(box)
    assert not any(wanted.values())
    assert Seen.taken == held
    assert held < 0.35 * sum(leaf.nbytes for leaf in params.values())


def test_one_shard_is_in_memory_at_a_time(saved):
    folder, model, params = saved
    mesh = make_mesh("fsdp=8")
    wanted = wanted_by(mesh.devices.flat, model, mesh)
    largest = max(
        4 * math.prod(leaf.shard_shape(mesh)) for leaf in placements(model, mesh).values()
    )
    assert 8 * largest == params["encoder", "embedding", "token"].nbytes
    with open_tensors(folder) as source:
        declared = flatten(model_params(model.config))
        _, plan, _ = plan_pair(model.config, source, where="here")
        tracemalloc.start()
        for _ in plan.boxes(source, declared, np.dtype("float32"), wanted):
            pass
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2.2 * largest


def test_digests_are_checked_unless_told_not_to(saved, tmp_path):
    folder, model, _ = saved
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match="is not the file that was saved"):
        load_sharded(tmp_path, make_mesh("fsdp=8"))
    assert load_sharded(tmp_path, make_mesh("fsdp=8"), verify=False)[0].config == model.config
