"""Damaged files are refused, or read as what they were; with digests, always refused.

Seeded mutations of a complete model in each format: bits, bytes, insertions, deletions, cuts,
swapped and spliced blocks, integers overwritten where the format keeps its own. No format notices
changed numbers, so a file that is still read has the same names, shapes and dtypes, no more.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import hostile_pickles
import numpy as np
import pytest
import tiny_pairs
from flax.serialization import msgpack_serialize
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load, save

from jax_encdec import EncoderDecoderModel
from jax_encdec.convert import digests
from jax_encdec.convert.convert import convert
from jax_encdec.convert.readers import open_tensors
from jax_encdec.errors import EncDecError
from jax_encdec.pretrained import plan_pair, read_configs

Tensors = dict[str, np.ndarray]
ROUNDS, MANY = 1_000, 10_000


def _flax(tensors: Tensors) -> bytes:
    """As Flax would nest and call them; what matters here is that they are read."""
    flat = {}
    for name, array in tensors.items():
        *path, last = name.split(".")
        if array.ndim == 2 and "embeddings" in name:
            last = "embedding"
        elif array.ndim == 2:
            last, array = "kernel", np.ascontiguousarray(array.T)
        elif "LayerNorm" in name and last == "weight":
            last = "scale"
        flat[*path, last] = array
    return msgpack_serialize(unflatten_dict(flat))


FORMATS: dict[str, tuple[str, Callable[[Tensors], bytes]]] = {
    "zip": ("pytorch_model.bin", lambda t: hostile_pickles.zipped(*hostile_pickles.model(t))),
    "legacy": ("pytorch_model.bin", lambda t: hostile_pickles.legacy(*hostile_pickles.model(t))),
    "safetensors": ("model.safetensors", lambda t: save(t, {"format": "pt"})),
    "msgpack": ("flax_model.msgpack", _flax),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> tuple[Path, Tensors]:
    """A model's folder without weights, and the weights."""
    folder = tiny_pairs.save(tmp_path_factory.mktemp("good") / "model")
    tensors = load((folder / "model.safetensors").read_bytes())
    for name in ("model.safetensors", digests.NAME):
        (folder / name).unlink()
    return folder, tensors


# Mutations ---------------------------------------------------------------------------------------


def structure(data: bytes, tensors: Tensors) -> list[int]:
    """Where the bytes are that are no tensor's numbers."""
    inside = np.ones(len(data), bool)
    for array in tensors.values():
        for numbers in (array.tobytes(), array.T.tobytes()):
            if (at := data.find(numbers)) >= 0:
                inside[at : at + len(numbers)] = False
    return np.flatnonzero(inside).tolist()


def mutated(rng: random.Random, data: bytes, places: list[int], other: bytes) -> bytes:
    """A damaged copy; four times of five it is the structure that is hit."""

    def place() -> int:
        return rng.choice(places) if rng.random() < 0.8 else rng.randrange(len(data))

    changed = bytearray(data)
    kind = rng.choice(("bit", "bit", "byte", "number", "insert", "delete", "cut", "swap", "splice"))
    for _ in range(rng.choice((1, 1, 1, 2, 8)) if kind in ("bit", "byte", "number") else 1):
        at = place()
        if kind == "bit":
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == "byte":
            changed[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind == "number":
            size = rng.choice((1, 2, 4, 8))
            value = rng.choice((0, 1, len(data), 2**31, 2**32 - 1, 2**63, 2**64 - 1))
            value = (value + rng.randint(-2, 2)) % (1 << 8 * size)
            changed[at : at + size] = value.to_bytes(size, rng.choice(("little", "big")))
        elif kind == "insert":
            changed[at:at] = rng.randbytes(rng.choice((1, 1, 2, 8, 64)))
        elif kind == "delete":
            del changed[at : at + rng.choice((1, 1, 2, 8, 64))]
        elif kind == "cut":
            del changed[at:]
        elif kind == "swap":
            size, to = rng.choice((1, 8, 64)), place()
            changed[at : at + size], changed[to : to + size] = (
                changed[to : to + size],
                changed[at : at + size],
            )
        else:
            start = rng.randrange(len(other))
            size = rng.choice((8, 64, 1024))
            changed[at : at + size] = other[start : start + size]
    return bytes(changed)


def mutations(format: str, tensors: Tensors, seed: int, rounds: int):
    data = FORMATS[format][1](tensors)
    other = FORMATS["zip" if format != "zip" else "safetensors"][1](tensors)
    places, rng = structure(data, tensors), random.Random(f"{format} {seed}")
    for _ in range(rounds):
        changed = mutated(rng, data, places, other)
        if changed != data:
            yield changed


# Without digests ---------------------------------------------------------------------------------


def looked_at(folder: Path) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """Match a folder's weights with its configuration and read all of them."""
    config, _ = read_configs(folder)
    with open_tensors(folder) as source, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of ties that the damage broke
        _, plan, report = plan_pair(config, source, where="it")
        found = {}
        for name in source:
            array = source[name]
            assert (array.dtype, array.shape) == source.info(name)
            found[name] = (array.dtype, array.shape)
        return {name: found[plan.names[name]] for name in report.read}


def fuzz(folder: Path, model: tuple[Path, Tensors], format: str, seed: int, rounds: int) -> None:
    good, tensors = model
    shutil.copytree(good, folder)
    path = folder / FORMATS[format][0]
    path.write_bytes(FORMATS[format][1](tensors))
    expected = looked_at(folder)
    assert len(expected) == len(tensors)
    read = 0
    for data in mutations(format, tensors, seed, rounds):
        path.write_bytes(data)
        try:
            found = looked_at(folder)
        except EncDecError:
            continue
        read += 1
        assert found.items() <= expected.items()
        # What no computation reads may be lost: the report says so.
        assert all("pooler" in name for name in expected.keys() - found.keys())
    assert read < 0.6 * rounds  # else the mutations miss


@pytest.mark.parametrize("format", FORMATS)
def test_damaged_files_are_refused_or_read_as_they_were(tmp_path, model, format):
    fuzz(tmp_path / "model", model, format, seed=0, rounds=ROUNDS)


@pytest.mark.exhaustive
@pytest.mark.parametrize("format", FORMATS)
def test_damaged_files_at_length(tmp_path, model, format):
    fuzz(tmp_path / "model", model, format, seed=1, rounds=MANY)


def test_damaged_indexes(tmp_path, model):
    good, tensors = model
    shutil.copytree(good, folder := tmp_path / "model")
    names = list(tensors)
    shards = {"one": names[:20], "two": names[20:]}
    for shard, held in shards.items():
        (folder / shard).write_bytes(save({name: tensors[name] for name in held}))
    where = {name: shard for shard, held in shards.items() for name in held}
    data = json.dumps({"metadata": {}, "weight_map": where}).encode()
    path = folder / "model.safetensors.index.json"
    path.write_bytes(data)
    expected, rng = looked_at(folder), random.Random(0)
    for _ in range(ROUNDS // 2):
        path.write_bytes(mutated(rng, data, list(range(len(data))), data))
        with contextlib.suppress(EncDecError):
            found = looked_at(folder)
            assert found.items() <= expected.items()
            assert all("pooler" in name for name in expected.keys() - found.keys())


# With digests ------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_with_digests_no_change_passes(tmp_path, model, format):
    good, tensors = model
    folder = tmp_path / "model"
    shutil.copytree(good, folder)
    path = folder / FORMATS[format][0]
    path.write_bytes(FORMATS[format][1](tensors))
    digests.write(folder, [path])
    digests.check(folder)
    for number, data in enumerate(mutations(format, tensors, 2, 200)):
        path.write_bytes(data)
        read = EncoderDecoderModel.from_pretrained
        use = partial(convert, dst=tmp_path / "out") if number % 2 else read
        with pytest.raises(EncDecError, match="not the file that was saved"):
            use(folder)
    assert not (tmp_path / "out").exists()
