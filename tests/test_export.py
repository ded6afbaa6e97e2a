"""An exported model: one file that gives the live model's tokens and needs next to nothing, and is
refused when it is not what was written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import types
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_pairs
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from jax_encdec import CheckpointError, InputError, Text2TextPipeline, cli, export, load_exported
from jax_encdec.decoding import archive

pytestmark = pytest.mark.xdist_group("export")  # The files are made once.
TEXTS = list(tiny_pairs.texts(7))
SEARCHES = {
    "greedy": {"repetition_penalty": 1.2},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "no_repeat_ngram_size": 2},
    "sampling": {"do_sample": True, "top_p": 0.9, "min_length": 3},
}


def written(folder, search, **more):
    model, params = tiny_pairs.pair("bert2gpt2")
    options = {"tokenizers": tiny_pairs.tokenizers(), "platforms": ["cpu"], "batch": (1, 4)}
    options |= {"source_length": (24, 40)} | more
    export(model, params, folder / f"{search}.jaxed", **options, **SEARCHES[search])
    return folder / f"{search}.jaxed"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    return {search: written(folder, search) for search in SEARCHES}


@pytest.fixture(scope="module")
def exported(files):
    return {search: load_exported(path) for search, path in files.items()}


@pytest.fixture(scope="module")
def live():
    model, params = tiny_pairs.pair("bert2gpt2")
    return model, params, Text2TextPipeline(model, params, tiny_pairs.tokenizers())


@pytest.fixture(scope="module")
def arrays():
    ids, mask = tiny_pairs.tokenizers().source.batch(TEXTS[:4], buckets=(24,), max_length=24)
    return ids, mask


# The same tokens ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("search", "numbers"),
    [
        ("greedy", {"max_new_tokens": 5, "repetition_penalty": 2.0}),
        ("beams", {"max_length": 9, "length_penalty": -1.0, "no_repeat_ngram_size": 1}),
        ("sampling", {"temperature": 2.0, "top_p": 0.5, "min_new_tokens": 6}),
    ],
)
def test_texts_are_those_of_the_live_model(exported, live, search, numbers):
    pipe = live[2]
    key = jax.random.key(3) if search == "sampling" else None
    for options in ({}, numbers):
        made = exported[search](TEXTS, key=key, **options)
        assert made == pipe(TEXTS, key=key, **(SEARCHES[search] | options))
    assert exported[search](TEXTS[0], key=key) == exported[search](TEXTS[:1], key=key)[0]


def test_arrays_are_those_of_the_live_model(exported, live, arrays):
    model, params, _ = live
    ids, mask = np.tile(arrays[0], (2, 1)), np.tile(arrays[1], (2, 1))  # two programs' worth
    ours = exported["beams"].generate(ids, mask)
    theirs = model.generate(params, ids, attention_mask=mask, **SEARCHES["beams"])
    np.testing.assert_array_equal(ours.sequences, theirs.sequences)
    np.testing.assert_array_equal(ours.lengths, theirs.lengths)
    np.testing.assert_allclose(ours.sequences_scores, theirs.sequences_scores, atol=1e-5)


def test_each_row_may_have_numbers_of_its_own(exported, arrays):
    ids, mask = arrays
    limits = np.array([3, 9, 1, 12])
    together = exported["greedy"].generate(ids, mask, max_new_tokens=limits)
    for i, limit in enumerate(limits):
        alone = exported["greedy"].generate(
            ids[i : i + 1], mask[i : i + 1], max_new_tokens=int(limit)
        )
        length = int(alone.lengths[0])
        assert together.lengths[i] == length <= limit + 1
        np.testing.assert_array_equal(together.sequences[i, :length], alone.sequences[0])


# Inside somebody's own program -------------------------------------------------------------------


def test_a_program_works_under_jit_vmap_and_shard_map(exported, arrays):
    ids, mask = arrays
    model = exported["greedy"]
    expected = model.generate(ids, mask)
    f = model.function(4, 24)
    got = jax.jit(f)(model.params(4), ids, mask)
    width = expected.sequences.shape[1]
    np.testing.assert_array_equal(got.sequences[:, :width], expected.sequences)
    np.testing.assert_array_equal(got.lengths, expected.lengths)

    many = jnp.stack([ids, ids[::-1]]), jnp.stack([mask, mask[::-1]])
    mapped = jax.vmap(f, (None, 0, 0))(model.params(4), *many)
    np.testing.assert_array_equal(mapped.sequences[0], got.sequences)
    np.testing.assert_array_equal(mapped.sequences[1], got.sequences[::-1])

    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    one = model.function(1, 24)
    split = jax.shard_map(one, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P("data"))
    weights = jax.device_put(model.params(1), jax.sharding.NamedSharding(mesh, P()))
    shared = jax.jit(split)(weights, ids, mask)
    np.testing.assert_array_equal(shared.sequences, got.sequences)


def test_numbers_and_keys_may_be_traced(exported, live, arrays):
    ids, mask = arrays
    model = exported["sampling"]
    f = jax.jit(model.function(4, 24))
    for temperature in (0.5, 2.0):
        got = f(model.params(4), ids, mask, key=jax.random.key(7), temperature=temperature)
        theirs = live[0].generate(
            live[1], ids, attention_mask=mask, key=jax.random.key(7), temperature=temperature,
            **SEARCHES["sampling"],
        )  # fmt: skip
        width = theirs.sequences.shape[1]
        np.testing.assert_array_equal(got.sequences[:, :width], theirs.sequences)
    assert f._cache_size() == 1


# What it needs -----------------------------------------------------------------------------------

_CHILD = """
import json, sys
REFUSED = {"flax", "optax", "orbax", "safetensors", "torch", "transformers", "huggingface_hub",
           "tqdm", "flatbuffers", "msgpack"}
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in REFUSED:
            raise ModuleNotFoundError(f"refused: {name}")
sys.meta_path.insert(0, Refuse())
import jax_encdec
made = jax_encdec.load_exported(sys.argv[1])(json.loads(sys.argv[2]))
print(json.dumps([made, sorted({name.split(".")[0] for name in sys.modules})]))
"""


def test_it_runs_on_jax_numpy_and_tokenizers_alone(files, live):
    run = subprocess.run(
        [sys.executable, "-c", _CHILD, str(files["greedy"]), json.dumps(TEXTS)],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert run.returncode == 0, run.stderr
    made, modules = json.loads(run.stdout)
    assert made == live[2](TEXTS, **SEARCHES["greedy"])
    refused = set(re.findall(r'"(\w+)"', _CHILD.split("REFUSED = {")[1].split("}")[0]))
    assert not refused & set(modules)


def test_programs_are_for_every_platform_and_tell_nothing_of_the_machine(tmp_path):
    path = written(tmp_path, "sampling", platforms=["tpu", "cuda", "cpu"], batch=2)
    whole = path.read_bytes()
    assert b"site-packages" not in whole
    assert b".py" not in whole
    with zipfile.ZipFile(path) as parts:
        assert parts.testzip() is None
        names = parts.namelist()
    for platform in ("tpu", "cuda", "cpu"):
        assert f"programs/{platform}/2x40.stablehlo" in names
    again = written(tmp_path, "sampling", platforms=["tpu", "cuda", "cpu"], batch=2, overwrite=True)
    assert again.read_bytes() == whole


# What is refused ---------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_is_refused(files, tmp_path_factory, data):
    whole = bytearray(files["greedy"].read_bytes())
    # As often in the directory at the end as in the parts.
    low = data.draw(st.sampled_from([0, len(whole) - 2000]))
    at = data.draw(st.integers(low, len(whole) - 1))
    whole[at] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path_factory.getbasetemp() / "flipped.jaxed"
    path.write_bytes(whole)
    with pytest.raises(CheckpointError, match=r"flipped\.jaxed is"):
        load_exported(path)


@settings(max_examples=50, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_refused(files, tmp_path_factory, share):
    whole = files["greedy"].read_bytes()
    path = tmp_path_factory.getbasetemp() / "short.jaxed"
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match=r"short\.jaxed is not an exported model"):
        load_exported(path)


def changed(path, folder, change):
    """A file whose manifest somebody changed, seals and all."""
    old = archive.Archive(path)
    target = folder / "changed.jaxed"
    with archive.writing(target, 0, overwrite=True) as writer:
        for name in old.manifest["parts"]:
            writer.add(name, old.part(name))
        manifest = {k: v for k, v in old.manifest.items() if k != "parts"}
        change(manifest)
        writer.finish(manifest)
    return target


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: [p.update(platform="tpu") for p in m["programs"]], "exported for tpu"),
        (lambda m: m.update(format_version=2), "version 2; this library reads"),
        (lambda m: m.update(format="other"), "is of format 'other'"),
        (lambda m: m.update(calling_convention=3), "exported by jax"),
        (lambda m: m["numbers"].update(novelty=1), "newer version of this library"),
        (lambda m: m.pop("generation"), "is damaged: KeyError"),
        (lambda m: m["generation"].update(num_beams="x"), "is damaged"),
        (lambda m: m.update(programs=3), "is damaged"),
    ],
)
def test_a_file_for_something_else_is_refused(files, tmp_path, change, said):
    with pytest.raises(CheckpointError, match=said):
        load_exported(changed(files["greedy"], tmp_path, change))


def test_without_verifying_all_but_the_weights_is_checked(files, tmp_path):
    whole = bytearray(files["greedy"].read_bytes())
    with zipfile.ZipFile(files["greedy"]) as parts:
        places = {info.filename: info.header_offset + info.file_size for info in parts.infolist()}
    path = tmp_path / "flipped.jaxed"
    for name in ("programs/cpu/1x24.stablehlo", "source_tokenizer.json", "manifest.json"):
        flipped = bytearray(whole)
        flipped[places[name] - 20] ^= 4
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError, match="is damaged"):
            load_exported(path, verify=False)
    whole[places["weights.safetensors"] - 20] ^= 4
    path.write_bytes(whole)
    assert load_exported(path, verify=False).shapes == ((1, 24), (1, 40), (4, 24), (4, 40))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_beams": 2}, "num_beams was fixed at 1 when the model was exported"),
        ({"temperature": 2.0}, "temperature was fixed"),
        ({"max_new_tokens": 13}, "exported for at most 13"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"repetition_penalty": -1.0}, "repetition_penalty must be above 0"),
        ({"repetition_penalti": 1.0}, "did you mean|repetition_penalty"),
        ({"max_new_tokens": np.arange(1, 4)}, "one number for each of the 1 rows"),
    ],
)
def test_options_that_cannot_be_had_are_refused(exported, options, said):
    with pytest.raises(InputError, match=said):
        exported["greedy"](TEXTS[0], **options)


def test_what_does_not_fit_is_refused(exported):
    model = exported["greedy"]
    for call, said in (
        (lambda: model("word " * 60), "limit is 40"),
        (lambda: model.generate(np.ones((1, 41), int)), "longest program takes 40"),
        (lambda: model.generate([[10**6]]), "input_ids"),
        (lambda: model.generate([1, 2]), r"\[batch, length\]"),
        (lambda: model.generate([[1, 2]], [[1]]), "attention_mask must have shape"),
        (lambda: model.function(3, 24), r"no program for \(3, 24\)"),
        (lambda: model.function(1, 24)(model.params(1), [[1, 2]]), "the program's shape"),
        (lambda: model.params(3), "no programs for batches of 3"),
        (lambda: model.function(1, 24)(model.params(4)[1:], [[1] * 24]), r"those of params\(1\)"),
        (lambda: exported["sampling"](TEXTS[0]), "pass a random key"),
        (lambda: jax.jit(model.generate)(jnp.ones((1, 4), jnp.int32)), "exported.function"),
    ):
        with pytest.raises(InputError, match=said):
            call()


# Writing -----------------------------------------------------------------------------------------


def test_the_command_line_exports_what_can_be_loaded(tmp_path, capsys):
    folder, out = tiny_pairs.save(tmp_path / "model"), tmp_path / "out.jaxed"
    line = ["export", str(folder), str(out), "--platforms", "cpu", "--batch", "2"]
    line += ["--source-length", "24", "--num-beams", "2", "--max-new-tokens", "6"]
    assert cli.main(line) == 0
    said = capsys.readouterr().out
    assert "cpu, batch 2, source length 24" in said
    assert "max_new_tokens (6), length_penalty (1.0)" in said
    pipe = Text2TextPipeline.from_pretrained(folder)
    assert load_exported(out)(TEXTS) == pipe(TEXTS, num_beams=2, max_new_tokens=6)
    assert cli.main(line) == 2
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"platforms": ["gpu"]}, "say cuda or rocm"),
        ({"platforms": []}, "at least one platform"),
        ({"batch": 0}, "batch must be positive integers"),
        ({"source_length": 1000}, "encoder takes at most 48"),
        ({"stop_strings": "."}, "stop_strings cannot be exported"),
        ({"output_scores": True}, "leave out output_scores"),
        ({"num_beam": 2}, "num_beams"),
        ({"max_new_tokens": 500}, "positions"),
    ],
)
def test_what_cannot_be_exported_is_refused_and_leaves_nothing(tmp_path, options, said):
    model, params = tiny_pairs.pair("bert2gpt2")
    given = {"platforms": ["cpu"], "batch": 1, "source_length": 24, **options}
    with pytest.raises(InputError, match=said):
        export(model, params, tmp_path / "x.jaxed", **given)
    assert not list(tmp_path.iterdir())


def test_where_nothing_can_be_written_it_says_so(tmp_path, monkeypatch):
    model, params = tiny_pairs.pair("bert2gpt2")

    def refused(path, said):
        with pytest.raises(InputError, match=said):
            export(model, params, path, platforms=["cpu"], batch=1, source_length=24)

    refused(tmp_path, "is a folder")
    refused(tmp_path / "none" / "x.jaxed", "there is no folder")
    (tmp_path / "there").write_text("mine")
    refused(tmp_path / "there", "exists")
    assert (tmp_path / "there").read_text() == "mine"
    monkeypatch.setattr(archive.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1000))
    refused(tmp_path / "x", "has room for 0 MB")
    monkeypatch.undo()
    # The disk fills up in the midst of it.
    monkeypatch.setattr(archive.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "Full")))
    refused(tmp_path / "x", "cannot be written: Full")
    assert [p.name for p in tmp_path.iterdir()] == ["there"]
