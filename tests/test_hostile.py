"""No file does harm, however broken or malicious: one sentence, exit code 2, and nothing else.

Each crafted input stands in an otherwise good model and is given to the command line in a child
process with 2 s of CPU time and 512 MB beyond its start (see hostile_guard). The attacks are the
tables of hostile_pickles, hostile_archives, hostile_safetensors, hostile_folders, hostile_configs.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import struct
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import hostile_archives
import hostile_configs
import hostile_folders
import hostile_pickles
import hostile_safetensors
import numpy as np
import pytest
import tiny_pairs
from hostile_guard import CPU_SECONDS, MEMORY, Guard, Result, snapshot
from safetensors.numpy import load, save

pytestmark = [
    pytest.mark.xdist_group("hostile"),
    pytest.mark.skipif(sys.platform != "linux", reason="limits and /proc as Linux has them"),
]


class Ground(NamedTuple):
    """Where an attack happens: a good model without weights, and an empty working directory."""

    model: Path
    work: Path
    tensors: dict[str, np.ndarray]
    guard: Guard

    def json(self, name: str) -> dict:
        return json.loads((self.model / name).read_text())

    def convert(self) -> list[str]:
        return ["convert", str(self.model), "out"]

    def generate(self) -> list[str]:
        return ["generate", "--model", str(self.model), "some text"]


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Iterator[tuple[Path, dict[str, np.ndarray], Guard]]:
    folder = tmp_path_factory.mktemp("good")
    tiny_pairs.save(folder / "model")
    (folder / "model" / "SHA256SUMS").unlink(missing_ok=True)
    model, out = str(folder / "model"), str(folder / "out")
    guard = Guard(
        ["inspect", model], ["convert", model, out], ["generate", "--model", model, "a text"]
    )
    weights = folder / "model" / "model.safetensors"
    tensors = load(weights.read_bytes())
    weights.unlink()
    yield folder / "model", tensors, guard
    guard.close()


@pytest.fixture
def ground(tmp_path, good) -> Iterator[Ground]:
    model, tensors, guard = good
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "work").mkdir()
    yield Ground(tmp_path / "model", tmp_path / "work", tensors, guard)
    shutil.rmtree(tmp_path)  # pytest would keep it, all of a gigabyte


def refused(ground: Ground, arguments: list[str], said: str) -> Result:
    """Run, and assert that nothing happened but one sentence that holds `said`."""
    before = snapshot(ground.model.parent)
    result = ground.guard.run(arguments, ground.work)
    assert result.events == [], result.err
    assert result.code == 2, result.err
    assert result.err.startswith("jax-encdec: error: "), result.err
    assert result.err.count("\n") == 1
    assert result.err.endswith("\n")
    assert re.search(said, result.sentence), result.sentence
    assert result.out == ""
    assert result.cpu <= CPU_SECONDS + 0.1
    assert 0 <= result.memory <= MEMORY
    assert snapshot(ground.model.parent) == before
    return result


# The guard ---------------------------------------------------------------------------------------

BIN, SAFETENSORS = "pytorch_model.bin", "model.safetensors"


@pytest.mark.parametrize("name", [BIN, SAFETENSORS, "archive by hand", "shards"])
def test_what_the_attacks_are_made_from_is_good(ground, name):
    if name == SAFETENSORS:
        (ground.model / name).write_bytes(save(ground.tensors))
    elif name == "shards":
        sharded(ground)
    else:
        data = hostile_pickles.zipped(*hostile_pickles.model(ground.tensors))
        if name == "archive by hand":
            data = hostile_archives.archive(hostile_archives.of(entries(data)))
        (ground.model / BIN).write_bytes(data)
    result = ground.guard.run(ground.convert(), ground.work, mode="free")
    assert (result.code, result.err) == (0, "")
    written = load((ground.work / "out" / SAFETENSORS).read_bytes())
    assert written.keys() == ground.tensors.keys()
    for key, array in ground.tensors.items():
        np.testing.assert_array_equal(written[key], array)


@pytest.mark.parametrize("name", hostile_pickles.EXECUTE)
def test_python_itself_would_run_them_and_the_guard_would_see_it(ground, name):
    """So that no attack is a dud, and no misdeed would go unnoticed."""
    path = ground.model / "pickle"
    code = hostile_pickles.EXECUTE[name]
    path.write_bytes(b"\x80\x02}(" + hostile_pickles.text("evil") + code + b"u.")
    result = ground.guard.run([str(path)], ground.work, mode="unpickle")
    seen = [event for event in result.events if not event.startswith("pickle.find_class")]
    assert any(event.startswith("pickle.find_class") for event in result.events)
    assert seen or list(ground.work.iterdir()) or result.code < 0, result


# Weights -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", hostile_pickles.ENTRIES)
def test_hostile_values_in_pickles(ground, name):
    value, said = hostile_pickles.ENTRIES[name]
    pickled = hostile_pickles.model(ground.tensors, hostile_pickles.text("evil") + value)
    (ground.model / BIN).write_bytes(hostile_pickles.zipped(*pickled))
    refused(ground, ground.convert(), said)


@pytest.mark.parametrize("name", hostile_pickles.TENSORS)
def test_tensors_that_lie(ground, name):
    value, said = hostile_pickles.TENSORS[name]
    pickled = hostile_pickles.model(ground.tensors, hostile_pickles.text("evil") + value)
    (ground.model / BIN).write_bytes(hostile_pickles.zipped(*pickled))
    refused(ground, ground.convert(), said)


@pytest.mark.parametrize("name", hostile_pickles.STREAMS)
def test_hostile_pickles(ground, name):
    stream, said = hostile_pickles.STREAMS[name]
    _, storages = hostile_pickles.model(ground.tensors)
    data = stream() if callable(stream) else stream
    (ground.model / BIN).write_bytes(hostile_pickles.zipped(data, storages))
    refused(ground, ground.convert(), said)


@pytest.mark.parametrize(
    "name", [*hostile_pickles.ENTRIES, *hostile_pickles.TENSORS, *hostile_pickles.STREAMS]
)
def test_the_same_in_files_of_before_1_6(ground, name):
    if name in hostile_pickles.STREAMS:
        stream, said = hostile_pickles.STREAMS[name]
        pickled = stream() if callable(stream) else stream, {}
    else:
        value, said = (hostile_pickles.ENTRIES | hostile_pickles.TENSORS)[name]
        pickled = hostile_pickles.model(ground.tensors, hostile_pickles.text("evil") + value)
    (ground.model / BIN).write_bytes(hostile_pickles.legacy(*pickled))
    # Another reader checks in another order: it may find another fault first.
    refused(ground, ground.convert(), f"{said}|pytorch_model.bin (has|is|uses|describes|names)")


@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "stack global", "inst"])
def test_bare_pickles(ground, name):
    (ground.model / BIN).write_bytes(b"\x80\x02" + hostile_pickles.EXECUTE[name] + b".")
    refused(ground, ground.convert(), "neither|not loaded|not need")


def entries(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.parametrize("name", hostile_archives.ATTACKS)
def test_archives_that_lie(ground, name):
    make, said = hostile_archives.ATTACKS[name]
    data = hostile_pickles.zipped(*hostile_pickles.model(ground.tensors))
    (ground.model / BIN).write_bytes(make(entries(data)))
    refused(ground, ground.convert(), said)


@pytest.mark.parametrize("name", hostile_safetensors.ATTACKS)
def test_safetensors_that_lie(ground, name):
    make, said = hostile_safetensors.ATTACKS[name]
    data = save(ground.tensors, {"format": "pt"})
    start = 8 + struct.unpack("<Q", data[:8])[0]
    (ground.model / SAFETENSORS).write_bytes(make(json.loads(data[8:start]), data[start:]))
    refused(ground, ground.convert(), said)


# Folders -----------------------------------------------------------------------------------------


def sharded(ground: Ground) -> dict[str, str]:
    """Write the weights as two shards and an index; return the index's map."""
    half = len(ground.tensors) // 2
    shards = (
        (hostile_folders.A, list(ground.tensors)[:half]),
        (hostile_folders.B, list(ground.tensors)[half:]),
    )
    for shard, names in shards:
        (ground.model / shard).write_bytes(save({n: ground.tensors[n] for n in names}))
    where = {name: shard for shard, names in shards for name in names}
    hostile_folders.write(ground.model, where)
    return where


@pytest.mark.parametrize("name", hostile_folders.ATTACKS)
def test_folders_that_lie(ground, name):
    change, said = hostile_folders.ATTACKS[name]
    where = sharded(ground)
    other = ground.model.parent / "other"
    other.mkdir()
    shutil.copy(ground.model / hostile_folders.A, other)
    (ground.model.parent / "secret.txt").write_text(hostile_folders.SECRET)
    (ground.model.parent / "secret.json").write_text(json.dumps({"a": hostile_folders.SECRET}))
    change(ground.model, where)
    result = refused(ground, ground.convert(), said)
    assert hostile_folders.SECRET not in result.err
    assert "root:" not in result.err


def test_links_as_the_hub_makes_them_are_followed(ground):
    sharded(ground)
    blobs = ground.model.parent / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(ground.model.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(f"../blobs/{number}")
    result = ground.guard.run(ground.convert(), ground.work, mode="free")
    assert (result.code, result.err) == (0, "")


# Configurations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", hostile_configs.CONFIGS)
def test_configurations(ground, name):
    change, said = hostile_configs.CONFIGS[name]
    (ground.model / SAFETENSORS).write_bytes(save(ground.tensors))
    good = ground.json("config.json")
    (ground.model / "config.json").write_bytes(hostile_configs.content(change, good))
    refused(ground, ground.convert(), said)


@pytest.mark.parametrize("name", hostile_configs.GENERATION)
def test_generation_defaults(ground, name):
    change, said = hostile_configs.GENERATION[name]
    (ground.model / SAFETENSORS).write_bytes(save(ground.tensors))
    good = ground.json("generation_config.json")
    (ground.model / "generation_config.json").write_bytes(hostile_configs.content(change, good))
    refused(ground, ground.generate(), said)


@pytest.mark.parametrize("name", hostile_configs.TOKENIZERS)
def test_tokenizers(ground, name):
    file, change, said = hostile_configs.TOKENIZERS[name]
    (ground.model / SAFETENSORS).write_bytes(save(ground.tensors))
    good = ground.json(file)
    (ground.model / file).write_bytes(hostile_configs.content(change, good))
    refused(ground, ground.generate(), said)


@pytest.mark.parametrize("name", hostile_configs.VOCABULARIES)
def test_vocabularies(ground, name):
    files, said = hostile_configs.VOCABULARIES[name]
    (ground.model / SAFETENSORS).write_bytes(save(ground.tensors))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (ground.model / file).unlink()
    for file, content in files.items():
        (ground.model / file).write_bytes(content)
    refused(ground, ground.generate(), said)
