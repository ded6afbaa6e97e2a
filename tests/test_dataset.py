"""Tokenized data: the ids a tokenizer gives, cached by content, whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_pairs
import tokenizer_folders
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_encdec import Tokenizer, TokenizerPair
from jax_encdec.cli import dates
from jax_encdec.errors import ConfigError, InputError
from jax_encdec.training import encoding
from jax_encdec.training.data_config import DataConfig
from jax_encdec.training.dataset import TokenizedData, tokenize
from jax_encdec.training.records import BadRow, Record

PAIRS = [(source.strip(), target) for source, target in dates.make_examples("train", 40, 3)]
MEMORY = DataConfig(cache_dir="")


@pytest.fixture
def files(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"source": s, "target": t}) + "\n" for s, t in PAIRS))
    return DataConfig(train=(str(path),), cache_dir=str(tmp_path / "cache"))


def same(a: TokenizedData, b: TokenizedData) -> bool:
    sides = ((a.source, b.source), (a.target, b.target))
    equal = all(
        np.array_equal(x.values, y.values) and np.array_equal(x.lengths, y.lengths)
        for x, y in sides
    )
    assert equal == (a.fingerprint == b.fingerprint)
    return equal and a.records() == b.records()


# Ids ---------------------------------------------------------------------------------------------


def test_sources_are_tokenized_as_published_and_targets_end_but_do_not_start():
    tokenizers = tiny_pairs.tokenizers()
    data = tokenize(PAIRS, tokenizers, MEMORY, model=tiny_pairs.pair()[0])
    expected = tokenizers.source.encode([source for source, _ in PAIRS])
    assert [data.source[i].tolist() for i in range(len(data))] == expected
    expected = tokenizers.target.encode([target for _, target in PAIRS])
    assert [data.target[i].tolist() for i in range(len(data))] == [row[1:] for row in expected]
    assert data.source.values.dtype == np.int32
    assert data.records() == [
        Record(*pair, "the given pairs", i) for i, pair in enumerate(PAIRS, 1)
    ]


def test_a_target_whose_tokenizer_does_not_end_it_is_ended():
    plain = Tokenizer(tiny_pairs.tokenizers().source.backend, {"eos_token": "[SEP]"})
    backend = type(plain.backend).from_str(plain.backend.to_str())
    backend.post_processor = tokenizer_folders.processors.ByteLevel()
    tokenizers = TokenizerPair(source=plain, target=Tokenizer(backend, plain.config))
    for model in (None, tiny_pairs.pair("bert2gpt2")[0]):
        data = tokenize(PAIRS, tokenizers, MEMORY, model=model)
        ids = backend.encode(PAIRS[0][1], add_special_tokens=False).ids
        assert data.target[0].tolist() == [*ids, plain.eos_token_id]


def test_a_start_token_that_is_not_the_models_is_a_label():
    """BART's targets begin with <s> after the start token </s>, in all its published training."""
    tokenizers, model = tiny_pairs.tokenizers(), tiny_pairs.pair("bart")[0]
    config = dataclasses.replace(
        model.config.decoder, decoder_start_token_id=tokenizers.target.sep_token_id
    )
    other = model.clone(
        config=dataclasses.replace(model.config, encoder=config, decoder=config),
        generation_config=model.generation_config,
    )
    data = tokenize(PAIRS, tokenizers, MEMORY, model=other)
    assert data.target[0].tolist() == tokenizers.target.encode([PAIRS[0][1]])[0]


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["left", "right"]),
    st.integers(4, 12),
    st.lists(st.sampled_from(tokenizer_folders.texts()[:60]), min_size=1, max_size=5),
)
def test_what_is_too_long_is_cut_as_the_tokenizer_cuts(side, limit, texts):
    backend = tiny_pairs.tokenizers().source.backend
    config = {"truncation_side": side, "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = Tokenizer(backend, config)
    described = encoding.make_side("source", tokenizer, limit=limit)
    ids, lengths, _ = encoding.encode(described, backend, texts)
    rows = np.split(ids, np.cumsum(lengths)[:-1])
    options = {"max_length": limit, "truncation": True, "allow_empty": True}
    for row, expected in zip(rows, tokenizer.encode(texts, **options), strict=True):
        assert row.tolist() == (expected if len(expected) > 2 else [])


def test_a_prefix_is_tokenized_with_the_source_and_is_no_part_of_the_record():
    config = dataclasses.replace(MEMORY, source_prefix="may ")
    tokenizers = tiny_pairs.tokenizers()
    data = tokenize(PAIRS[:2], tokenizers, config)
    assert data.source[0].tolist() == tokenizers.source.encode(["may " + PAIRS[0][0]])[0]
    assert data.record(0)[:2] == PAIRS[0]


def test_limits_come_from_the_configuration_or_the_model():
    model = tiny_pairs.pair()[0]
    long = [("1 " * 100, "2 " * 100)]

    def lengths(model=model, **options):
        made = dataclasses.replace(MEMORY, **options)
        data = tokenize(long, tiny_pairs.tokenizers(), made, model=model)
        assert data.cut == (data.source.lengths[0] < 102, data.target.lengths[0] < 101)
        assert len(data.notes) == sum(data.cut)
        return int(data.source.lengths[0]), int(data.target.lengths[0])

    assert lengths() == (tiny_pairs.POSITIONS, tiny_pairs.POSITIONS)
    assert lengths(None) == (102, 101)
    assert lengths(max_source_length=9, target_buckets=(5, 7)) == (9, 7)
    with pytest.raises(ConfigError, match="max_source_length = 99, but the model has positions"):
        lengths(max_source_length=99)
    with pytest.raises(ConfigError, match="max_target_length = 1 leaves no room"):
        lengths(max_target_length=1)


def test_a_tokenizer_of_another_model_is_refused():
    big = dates.train_tokenizer([text for pair in PAIRS for text in pair], 400)
    model = tiny_pairs.pair()[0]
    small = model.clone(
        config=dataclasses.replace(
            model.config, encoder=dataclasses.replace(model.config.encoder, vocab_size=60)
        )
    )
    with pytest.raises(InputError, match=r"outside the model's vocabulary 0\.\.59; it belongs"):
        tokenize(PAIRS, big, MEMORY, model=small)


def test_texts_that_hold_nothing_are_bad_rows(files):
    path = Path(files.train[0])
    path.write_text('{"source": "\\u200b", "target": "1"}\n' + path.read_text())
    tokenizers = tiny_pairs.tokenizers()
    with pytest.raises(BadRow, match=r"train.jsonl, line 1: the source holds nothing"):
        tokenize(files.train, tokenizers, files)
    data = tokenize(files.train, tokenizers, dataclasses.replace(files, bad_rows="skip"))
    assert len(data) == len(PAIRS)
    assert data.record(0).line == 2
    assert data.notes[0].startswith("1 row left out (")


# Where data comes from ---------------------------------------------------------------------------


def test_pairs_in_python_are_the_same_as_files(files):
    tokenizers = tiny_pairs.tokenizers()
    read = tokenize(files.train, tokenizers, files)
    for given_pairs in (
        PAIRS,
        [list(pair) for pair in PAIRS],
        [{"target": t, "source": s} for s, t in PAIRS],
        [Record(*pair, files.train[0], i) for i, pair in enumerate(PAIRS, 1)],
        (pair for pair in PAIRS),
    ):
        data = tokenize(given_pairs, tokenizers, MEMORY)
        assert data.fingerprint == read.fingerprint
        assert [r[:2] for r in data.records(3)] == PAIRS[:3]
    limited = dataclasses.replace(MEMORY, max_train_samples=7, bad_rows="skip")
    data = tokenize([("", "x"), *PAIRS], tokenizers, limited)
    assert (len(data), data.skipped.count) == (7, 1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "no data for 'train': name its files in data.train"),
        ([("a", "")], "the given pairs, line 1: the target is empty"),
        ([("a", "b"), 3], "the given pairs, line 2: is no pair of texts: '3'"),
        ([{"source": "a"}], "has no column 'target'; it has 'source'"),
        (["a.jsonl", ("a", "b")], "must be file names or pairs of texts, not both"),
        (["no.jsonl"], r"no\.jsonl matches no file"),
    ],
)
def test_data_that_cannot_be_used(data, message):
    with pytest.raises(InputError, match=message):
        tokenize(data, tiny_pairs.tokenizers(), MEMORY)


def test_nothing_left_after_skipping_is_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_text("nonsense\n")
    config = DataConfig(bad_rows="skip", cache_dir=str(tmp_path / "cache"))
    with pytest.raises(InputError, match=r"no pair that can be used; 1 row left out \(.*line 1"):
        tokenize([f"{tmp_path}/a.jsonl"], tiny_pairs.tokenizers(), config)
    assert list((tmp_path / "cache").iterdir()) == []


# Workers -----------------------------------------------------------------------------------------


def test_workers_give_the_same_in_the_same_order(monkeypatch):
    monkeypatch.setattr(encoding, "CHUNK", 3)
    alone, many = (
        tokenize(PAIRS, tiny_pairs.tokenizers(), dataclasses.replace(MEMORY, workers=n))
        for n in (0, 2)
    )
    assert same(alone, many)


def test_workers_report_errors_and_end(monkeypatch):
    monkeypatch.setattr(encoding, "CHUNK", 3)
    side = encoding.make_side("source", tiny_pairs.tokenizers().source)
    small = dataclasses.replace(side, vocabulary=6)
    with pytest.raises(InputError, match="belongs to another model"):
        list(encoding.encode_all((small, side), PAIRS, 2))

    pool = encoding._Workers((side, side), 2)
    with pool:
        pool.processes[0].kill()
        with pytest.raises(RuntimeError, match=r"ended with code -9.*workers = 0"):
            [future.result(30) for future in [pool.submit(PAIRS[:2]) for _ in range(4)]]
    assert all(process.returncode is not None for process in pool.processes)


def test_a_script_without_a_main_guard_can_use_workers(files, tmp_path):
    """Fresh interpreters, not copies of this program: its body must not run again in each."""
    tiny_pairs.tokenizers().save(tmp_path / "tokenizer")
    script = tmp_path / "script.py"
    script.write_text(
        "print('started')\n"
        "from jax_encdec import Tokenizer\n"
        "from jax_encdec.training.data_config import DataConfig\n"
        "from jax_encdec.training.dataset import tokenize\n"
        f"tokenizer = Tokenizer.from_pretrained({str(tmp_path / 'tokenizer')!r})\n"
        f"print(len(tokenize([{files.train[0]!r}], tokenizer, "
        "DataConfig(workers=1, cache_dir=''))))\n"
    )
    run = [sys.executable, "-W", "error", str(script)]
    done = subprocess.run(run, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == f"started\n{len(PAIRS)}\n"
    assert done.stderr == ""


# The cache ---------------------------------------------------------------------------------------


def folders(config):
    return sorted(Path(config.cache_dir).iterdir())


def test_the_cache_is_mapped_and_serves_without_tokenizing(files, monkeypatch):
    tokenizers = tiny_pairs.tokenizers()
    first = tokenize(files.train, tokenizers, files)
    monkeypatch.setattr("jax_encdec.training.dataset.encode_all", None)
    second = tokenize(files.train, tokenizers, files)
    assert isinstance(second.source.values.base, np.memmap)
    assert same(first, second)
    assert second.record(5) == Record(*PAIRS[5], files.train[0], 6)
    moved = Path(files.train[0]).rename(Path(files.train[0]).with_name("moved.jsonl"))
    assert tokenize([str(moved)], tokenizers, files).record(5).file == str(moved)


def test_the_cache_depends_on_content_tokenizer_and_options(files):
    tokenizers = tiny_pairs.tokenizers()
    tokenize(files.train, tokenizers, files)
    other = dates.train_tokenizer([text for pair in PAIRS for text in pair], 80)
    tokenize(files.train, other, files)
    for options in ({"max_source_length": 9}, {"source_prefix": "x"}, {"max_train_samples": 3}):
        tokenize(files.train, tokenizers, dataclasses.replace(files, **options))
    assert len(folders(files)) == 5
    # How batches are made, and by how many, changes no ids.
    for options in ({"batch_size": 7}, {"pack": True}, {"workers": 0}, {"shuffle": False}):
        tokenize(files.train, tokenizers, dataclasses.replace(files, **options))
    assert len(folders(files)) == 5
    status = os.stat(files.train[0])
    path = Path(files.train[0])
    path.write_text(path.read_text().replace(PAIRS[0][1], PAIRS[1][1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # size and time tell nothing
    assert tokenize(files.train, tokenizers, files).record(0).target == PAIRS[1][1]


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_a_damaged_cache_is_noticed_and_made_anew(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged")
    config = DataConfig(cache_dir=str(folder), workers=0)
    tokenizers = tiny_pairs.tokenizers()
    whole = tokenize(PAIRS, tokenizers, config)
    (place,) = folders(config)
    name = data.draw(st.sampled_from(sorted(os.listdir(place))))
    raw = bytearray((place / name).read_bytes())
    how = data.draw(st.sampled_from(["flip", "cut", "remove", "grow"]))
    if how == "flip":
        raw[data.draw(st.integers(0, len(raw) - 2))] ^= 1 << data.draw(st.integers(0, 7))
    elif how == "cut":
        del raw[data.draw(st.integers(0, len(raw) - 2)) :]
    elif how == "grow":
        raw += b"0000"
    (place / name).unlink()
    if how != "remove":
        (place / name).write_bytes(raw)
    with pytest.warns(UserWarning, match="is damaged .* and is made anew"):
        assert same(tokenize(PAIRS, tokenizers, config), whole)
    assert same(tokenize(PAIRS, tokenizers, config), whole)
    assert folders(config) == [place]


def test_a_failure_leaves_nothing(files):
    path = Path(files.train[0])
    path.write_text(path.read_text() + "nonsense\n")
    with pytest.raises(BadRow, match="line 41"):
        tokenize(files.train, tiny_pairs.tokenizers(), files)
    assert folders(files) == []


def test_files_that_change_while_they_are_read_are_not_cached(files, monkeypatch):
    from jax_encdec.training import dataset

    def meddle(*args):
        yield from encoding.encode_all(*args)
        with open(files.train[0], "a") as file:
            file.write("\n")

    monkeypatch.setattr(dataset, "encode_all", meddle)
    with pytest.raises(InputError, match="were changed while they were read"):
        tokenize(files.train, tiny_pairs.tokenizers(), files)
    assert folders(files) == []


def test_what_killed_processes_left_is_swept(files):
    cache = Path(files.cache_dir)
    for name, age in ((f".{'0' * 16}-old", 2), (f".{'1' * 16}-new", 0)):
        (cache / name).mkdir(parents=True)
        (cache / name / "source_ids").write_bytes(b"half")
        then = time.time() - age * 24 * 3600 - 60
        os.utime(cache / name, (then, then))
    tokenize(files.train, tiny_pairs.tokenizers(), files)
    assert [p.name for p in folders(files) if p.name.startswith(".")] == [f".{'1' * 16}-new"]


AT_ONCE = """
import sys
from jax_encdec import Tokenizer
from jax_encdec.training.data_config import DataConfig
from jax_encdec.training.dataset import tokenize
tokenizer = Tokenizer.from_pretrained(sys.argv[1])
config = DataConfig(train=(sys.argv[2],), cache_dir=sys.argv[3])
for _ in sys.stdin:
    print(len(tokenize(config.train, tokenizer, config)), flush=True)
"""


def test_processes_that_write_the_same_at_the_same_time(files, tmp_path):
    tokenizers = tiny_pairs.tokenizers()
    tokenizers.save(tmp_path / "tokenizer")
    command = [sys.executable, "-W", "ignore", "-c", AT_ONCE]
    command += [str(tmp_path / "tokenizer"), *files.train, files.cache_dir]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    processes = [subprocess.Popen(command, **pipes) for _ in range(3)]
    try:
        for damage in (None, b"", b"other"):
            if damage is not None:
                (folders(files)[0] / "target_ids").write_bytes(damage)
            for process in processes:
                process.stdin.write("go\n")
            assert [int(process.stdout.readline()) for process in processes] == [len(PAIRS)] * 3
            (place,) = folders(files)
            assert not place.name.startswith(".")
        whole = tokenize(files.train, tokenizers, files)
        assert [record[:2] for record in whole.records()] == PAIRS
    finally:
        for process in processes:
            process.communicate()
    assert [process.returncode for process in processes] == [0] * 3


def test_a_cache_that_cannot_be_written_says_so(files, tmp_path):
    (tmp_path / "file").touch()
    config = dataclasses.replace(files, cache_dir=str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"cannot be written in .*; set data.cache_dir"):
        tokenize(files.train, tiny_pairs.tokenizers(), config)
