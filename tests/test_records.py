"""Reading pairs: every format gives back what was written, and bad rows are named or counted."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_encdec.errors import ConfigError, InputError
from jax_encdec.training.data_config import DataConfig
from jax_encdec.training.records import BadRow, Record, Skipped, read_records

PAIRS = [("a cat", "eine Katze"), ('"two", dogs', "zwei\tHunde"), ("ünï ☃", "\U0001f642 \u2028 ok")]


def read(*patterns, split="train", skipped=None, **options):
    return list(read_records(patterns, DataConfig(**options), split, skipped=skipped))


def texts(records):
    return [record[:2] for record in records]


def write_jsonl(path: Path, pairs, columns=("source", "target")) -> str:
    lines = [json.dumps(dict(zip(columns, pair, strict=True))) for pair in pairs]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def write_csv(path: Path, pairs, dialect="excel") -> str:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, dialect).writerows([("source", "id", "target")])
        csv.writer(file, dialect).writerows((s, "7", t) for s, t in pairs)
    return str(path)


# Every format gives back what was written --------------------------------------------------------


def test_jsonl(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", PAIRS)
    assert read(path) == [Record(*pair, path, i) for i, pair in enumerate(PAIRS, 1)]


def test_csv_and_tsv(tmp_path):
    pairs = [*PAIRS, ("two\nlines", 'a "quoted" word')]
    assert texts(read(write_csv(tmp_path / "a.csv", pairs))) == pairs
    assert texts(read(write_csv(tmp_path / "a.tsv", pairs, "excel-tab"))) == pairs


def test_a_csv_row_is_named_by_its_first_line(tmp_path):
    path = write_csv(tmp_path / "a.csv", [("one\ntwo\nthree", "x"), ("y", "z")])
    assert [record.line for record in read(path)] == [2, 5]


def test_tsv_without_quoting(tmp_path):
    (tmp_path / "a.tsv").write_text('source\ttarget\n"Hi" he said\tsaid\n')
    path = str(tmp_path / "a.tsv")
    assert texts(read(path, csv_quoting=False)) == [('"Hi" he said', "said")]
    with pytest.raises(BadRow, match=r"line 2: cannot be read.*csv_quoting"):
        read(path)


def test_parallel_text(tmp_path):
    (tmp_path / "t.en").write_text("one\ntwo\r\nthree\u2028four", encoding="utf-8", newline="")
    (tmp_path / "t.de").write_text("eins\nzwei\ndrei\n")
    found = read(f"{tmp_path}/t.en,{tmp_path}/t.de")
    assert texts(found) == [("one", "eins"), ("two", "zwei"), ("three\u2028four", "drei")]
    assert found[2].file == f"{tmp_path}/t.en"
    assert found[2].line == 3


def test_parallel_globs_are_joined_by_what_the_star_stands_for(tmp_path, monkeypatch):
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.en").write_text(f"{name} en\n")
        (tmp_path / f"{name}.de").write_text(f"{name} de\n")
    pattern = f"{tmp_path}/*.en,{tmp_path}/*.de"
    expected = [(f"{n} en", f"{n} de") for n in "abc"]
    assert texts(read(pattern)) == expected
    monkeypatch.chdir(tmp_path)
    assert texts(read("./*.en,./*.de")) == expected
    with pytest.raises(InputError, match="no other wildcard"):
        read(f"{tmp_path}/?.en,{tmp_path}/?.de")
    (tmp_path / "b.de").unlink()
    with pytest.raises(InputError, match=r"b\.en has no counterpart"):
        read(pattern)


def test_globs_are_read_in_the_order_of_names_and_patterns_as_given(tmp_path):
    for i in (2, 1):
        write_jsonl(tmp_path / f"part-{i}.jsonl", [(f"s{i}", "t")])
    last = write_jsonl(tmp_path / "last.jsonl", [("z", "t")])
    found = read(last, f"{tmp_path}/part-*.jsonl")
    assert [record.source for record in found] == ["z", "s1", "s2"]


def test_gzip(tmp_path):
    plain = Path(write_jsonl(tmp_path / "a.jsonl", PAIRS)).read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(plain))
    assert texts(read(f"{tmp_path}/b.jsonl.gz")) == PAIRS
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(plain)[:-12])
    with pytest.raises(InputError, match=r"cut\.jsonl\.gz is damaged or no gzip file"):
        read(f"{tmp_path}/cut.jsonl.gz")
    (tmp_path / "no.jsonl.gz").write_bytes(plain)
    with pytest.raises(InputError, match=r"no\.jsonl\.gz is damaged or no gzip file"):
        read(f"{tmp_path}/no.jsonl.gz")


def test_columns_by_name_and_by_dots(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", PAIRS, ("article", "highlights"))
    assert texts(read(path, source_column="article", target_column="highlights")) == PAIRS
    row = {"translation": {"en": "yes", "de": "ja"}, "a.b": "dotted"}
    (tmp_path / "b.jsonl").write_text(json.dumps(row))
    columns = {"source_column": "a.b", "target_column": "translation.de"}
    assert texts(read(f"{tmp_path}/b.jsonl", **columns)) == [("dotted", "ja")]


def test_a_mark_at_the_start_of_a_file_is_no_part_of_it(tmp_path):
    plain = Path(write_csv(tmp_path / "a.csv", PAIRS)).read_bytes()
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf" + plain)
    assert texts(read(f"{tmp_path}/a.csv")) == PAIRS


def test_limits_are_of_a_split(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", PAIRS)
    limits = {"max_train_samples": 1, "max_test_samples": 2}
    for split, count in (("train", 1), ("validation", 3), ("test", 2)):
        assert texts(read(path, split=split, **limits)) == PAIRS[:count]
    Path(path).write_text(Path(path).read_text() + "a bad row beyond it\n")
    assert texts(read(path, max_train_samples=3)) == PAIRS


@pytest.mark.skipif(not importlib.util.find_spec("pyarrow"), reason="needs pyarrow")
def test_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    sources, targets = zip(*PAIRS, strict=True)
    table = pyarrow.table(
        {"source": pyarrow.array(sources).dictionary_encode(), "target": [*targets[:2], None]}
    )
    path = str(tmp_path / "a.parquet")
    pyarrow.parquet.write_table(table, path)
    skipped = Skipped()
    assert texts(read(path, bad_rows="skip", skipped=skipped)) == PAIRS[:2]
    assert "line 3: column 'target' must be a text; got null" in str(skipped)
    with pytest.raises(InputError, match=r"no column 'sauce'; did you mean 'source'\?"):
        read(path, source_column="sauce")
    Path(path).write_bytes(Path(path).read_bytes()[:40])
    with pytest.raises(InputError, match="damaged or no Parquet"):
        read(path)


@pytest.mark.filterwarnings("default")  # the library's own
@pytest.mark.skipif(not importlib.util.find_spec("datasets"), reason="needs datasets")
def test_datasets_folders(tmp_path):
    import datasets

    sources, targets = zip(*PAIRS, strict=True)
    table = datasets.table.InMemoryTable.from_pydict({"source": sources, "target": targets})
    # A fingerprint of its own: to compute one, some versions pickle what some of pyarrow cannot.
    made = datasets.DatasetDict(train=datasets.Dataset(table, fingerprint="f"))
    made.save_to_disk(str(tmp_path / "set"))
    options = {"format": "datasets"}
    assert texts(read(f"{tmp_path}/set", **options)) == PAIRS
    assert texts(read(f"{tmp_path}/set:train", split="test", **options)) == PAIRS
    with pytest.raises(InputError, match="cannot be read"):
        read(f"{tmp_path}/set:valid", **options)


@pytest.mark.parametrize(("module", "name"), [("pyarrow", "parquet"), ("datasets", "datasets")])
def test_an_absent_extra_is_one_sentence(module, name, tmp_path, monkeypatch):
    for missing in (module, f"{module}.parquet"):
        monkeypatch.setitem(sys.modules, missing, None)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(InputError, match=rf"needs {module}.*pip install 'jax_encdec\[{name}\]'"):
        read(f"{tmp_path}/a.parquet", format=name)


# Bad rows ----------------------------------------------------------------------------------------

GOOD = b'{"source": "good", "target": "ok"}'
BAD_LINES = {
    b'{"source": "", "target": "x"}': "column 'source' is empty",
    b'{"source": "x", "target": " \\n "}': "column 'target' is empty",
    b'{"source": "\xff", "target": "x"}': "is not UTF-8",
    b'{"source": "\\ud800", "target": "x"}': "column 'source' is not UTF-8",
    b'{"source": "x\\u0000", "target": "x"}': "holds a NUL character",
    b'{"source": "x\x00", "target": "x"}': "is not JSON",
    b'\xef\xbb\xbf{"source": "x", "target": "x"}': "is not JSON",
    b'{"source": "\\ufeffx", "target": "x"}': "byte order mark",
    b'{"sorce": "x", "target": "x"}': "no column 'source'; did you mean 'sorce'?; it has 'sorce'",
    b'{"source": 3, "target": "x"}': "column 'source' must be a text; got a number",
    b'{"source": null, "target": "x"}': "column 'source' must be a text; got null",
    b'{"source": ["x"], "target": "x"}': "column 'source' must be a text; got a list",
    b'"source"': "must be a JSON object; got no text",
    b'{"source": "x", ': "is not JSON",
    b'{"source": "x", "target": ' + b"[" * 9000: "is not JSON",
    b'{"source": ' + b"9" * 5000 + b', "target": ""}': "is not JSON",
    b'{"source": "' + b"x" * 20_000 + b'", "target": "x"}': "longer than max_line_bytes = 10,000",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: repr(line[:30]))
def test_a_bad_line_is_named_or_counted(line, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([GOOD, b"", line, GOOD]))
    with pytest.raises(BadRow) as caught:
        read(str(path), max_line_bytes=10_000)
    assert f"{path}, line 3: {caught.value.reason};" in str(caught.value)
    assert BAD_LINES[line] in caught.value.reason
    assert (caught.value.file, caught.value.line) == (str(path), 3)
    skipped = Skipped()
    found = read(str(path), max_line_bytes=10_000, bad_rows="skip", skipped=skipped)
    assert [record.line for record in found] == [1, 4]
    assert skipped.count == 1
    assert BAD_LINES[line] in str(skipped)


BAD_ROWS = {
    b"only one": "has 1 columns, but the header has 2",
    b"a,b,c": "has 3 columns, but the header has 2",
    b",x": "column 'source' is empty",
    b"\xff,x": "is not UTF-8",
    b"a\x00,x": "NUL",
    b'"a"b,x': "cannot be read",
    b'"never closed,x': "cannot be read",
    b"x" * 20_000 + b",x": "longer than max_line_bytes",
}


@pytest.mark.parametrize("line", BAD_ROWS, ids=lambda line: repr(line[:30]))
@pytest.mark.parametrize("after", [b'good,"o\nk"', b"good,o k"])
def test_a_bad_csv_row_costs_that_row_only(line, after, tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"\n".join([b"source,target", line, *[after] * 3000]))
    skipped, limit = Skipped(), csv.field_size_limit()
    options = {"bad_rows": "skip", "max_line_bytes": 10_000}
    found = read(str(path), skipped=skipped, **options)
    assert texts(found) == [("good", "o\nk" if b"\n" in after else "o k")] * 3000
    assert found[0].line == 3
    assert skipped.count == 1
    assert BAD_ROWS[line] in str(skipped)
    assert csv.field_size_limit() == limit
    with pytest.raises(BadRow, match="line 2: "):
        read(str(path), max_line_bytes=10_000)


@pytest.mark.parametrize(
    ("line", "reason"),
    [(b"", "is empty"), (b"\xff", "is not UTF-8"), (b"x" * 200, "is longer"), (b"\0", "NUL")],
)
@pytest.mark.parametrize("side", ["en", "de"])
def test_a_bad_line_of_parallel_text_keeps_the_rest_aligned(line, reason, side, tmp_path):
    for name in ("en", "de"):
        lines = [f"{name} {i}".encode() for i in range(4)]
        if name == side:
            lines[1] = line
        (tmp_path / f"a.{name}").write_bytes(b"\n".join(lines))
    pattern, skipped = f"{tmp_path}/a.en,{tmp_path}/a.de", Skipped()
    found = read(pattern, bad_rows="skip", max_line_bytes=100, skipped=skipped)
    assert texts(found) == [(f"en {i}", f"de {i}") for i in (0, 2, 3)]
    assert f"a.{side}, line 2" in str(skipped)
    assert reason in str(skipped)


def test_only_some_of_many_bad_rows_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_text("x\n" * 9)
    skipped = Skipped()
    assert read(f"{tmp_path}/a.jsonl", bad_rows="skip", skipped=skipped) == []
    assert str(skipped).startswith("9 rows left out (")
    assert len(skipped.named) == 5


# Bad files: never skipped ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.csv", b"sorce,target\nx,y\n", "no column 'source'; did you mean 'sorce'"),
        ("a.csv", b"source,source,target\n1,2,3\n", "several columns 'source'"),
        ("a.jsonl", b'\xff\xfe{\x00"\x00', "is UTF-16; convert it to UTF-8"),
        ("a.json", b'[{"source": "x", "target": "y"}]', "is a JSON array; expected JSONL"),
        ("a.json", b'[\n{"source": "x", "target": "y"}]', "one JSON document over many lines"),
        ("a.xml", b"<a/>", "the format of .* cannot be told from its name"),
        ("a.csv", b'"source,target\nx,y\n', "line 1: the header cannot be read"),
    ],
)
def test_what_is_wrong_with_a_whole_file(name, data, message, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message):
        read(f"{tmp_path}/{name}", bad_rows="skip")


def test_parallel_files_of_unequal_length_cannot_be_skipped_over(tmp_path):
    (tmp_path / "a.en").write_text("1\n2\n3\n")
    (tmp_path / "a.de").write_text("1\n2\n")
    with pytest.raises(InputError, match=r"a\.en has more lines than .*a\.de, which has 2"):
        read(f"{tmp_path}/a.en,{tmp_path}/a.de", bad_rows="skip")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("nowhere.jsonl", "nowhere.jsonl matches no file"),
        (".", r"\. is no file; expected files"),
        ("a.en,b.de,c.fr", "is no pair of text files"),
        ("a.en,b.de", "a.en matches no file"),
    ],
)
def test_files_that_are_not_there(pattern, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        read(pattern)


def test_one_side_of_parallel_text(tmp_path):
    (tmp_path / "a.en").touch()
    with pytest.raises(InputError, match="one side of parallel text"):
        read(f"{tmp_path}/a.en", format="text")


# Properties --------------------------------------------------------------------------------------

TEXT = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff"), min_size=1
).filter(str.strip)
SINGLE_LINE = TEXT.filter(lambda text: "\n" not in text and not text.endswith("\r"))


@settings(deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT), max_size=8), st.booleans())
def test_jsonl_round_trip(tmp_path_factory, pairs, ascii_only):
    path = tmp_path_factory.mktemp("p") / "a.jsonl"
    lines = (json.dumps({"source": s, "target": t}, ensure_ascii=ascii_only) for s, t in pairs)
    path.write_bytes("\n".join(lines).encode())
    assert texts(read(str(path))) == pairs


@settings(deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT), max_size=8), st.sampled_from(["excel", "excel-tab"]))
def test_csv_round_trip(tmp_path_factory, pairs, dialect):
    # Within quotes, "\r\n" is read as "\n".
    pairs = [(s.replace("\r\n", "\n"), t.replace("\r\n", "\n")) for s, t in pairs]
    suffix = "csv" if dialect == "excel" else "tsv"
    path = write_csv(tmp_path_factory.mktemp("p") / f"a.{suffix}", pairs, dialect)
    assert texts(read(path)) == pairs


@settings(deadline=None)
@given(st.lists(st.tuples(SINGLE_LINE, SINGLE_LINE), max_size=8))
def test_parallel_text_round_trip(tmp_path_factory, pairs):
    folder = tmp_path_factory.mktemp("p")
    for i, name in enumerate(("en", "de")):
        (folder / name).write_bytes("".join(pair[i] + "\n" for pair in pairs).encode())
    assert texts(read(f"{folder}/en,{folder}/de")) == pairs


@settings(deadline=None)
@given(
    st.sampled_from(["jsonl", "csv", "tsv"]),
    st.lists(
        st.one_of(
            st.binary(max_size=40),
            st.sampled_from([GOOD, b"source,target", b"source\ttarget", b'a,"b', b"a,b", b'"']),
        ),
        max_size=12,
    ),
)
def test_any_bytes_are_read_or_refused_in_a_sentence(tmp_path_factory, name, lines):
    path = tmp_path_factory.mktemp("p") / f"a.{name}"
    path.write_bytes(b"\n".join(lines))
    skipped = Skipped()
    try:
        found = read(str(path), bad_rows="skip", max_line_bytes=64, skipped=skipped)
    except InputError:
        return
    assert all(record.source.strip() and record.target.strip() for record in found)
    if skipped:
        with pytest.raises(BadRow):
            read(str(path), max_line_bytes=64)


# The configuration -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": "a.jsonl"}, "data.train must be a list of file names; got 'a.jsonl'"),
        ({"format": "xml"}, "data.format must be one of jsonl, csv"),
        ({"bad_rows": "ignore"}, 'data.bad_rows must be "error" or "skip"; got \'ignore\''),
        ({"batch_size": 0}, "data.batch_size must be a positive integer; got 0"),
        ({"max_source_length": 1.5}, "data.max_source_length must be a positive integer"),
        ({"source_buckets": [8, 8]}, "data.source_buckets must be a list of different"),
        ({"pack": 1}, "data.pack must be true or false; got 1"),
        ({"workers": -1}, "data.workers must be an integer from 0; got -1"),
    ],
)
def test_a_configuration_says_what_it_expected(options, message):
    with pytest.raises(ConfigError, match=message):
        DataConfig(**options)


def test_a_configuration_hashes_and_takes_lists():
    config = DataConfig(train=["a.jsonl"], source_buckets=[64, 32])
    assert config == DataConfig(train=("a.jsonl",), source_buckets=(32, 64))
    assert hash(config) == hash(DataConfig(train=("a.jsonl",), source_buckets=(32, 64)))


def test_reading_needs_no_jax():
    code = (
        "import sys, jax_encdec.training.batches; "
        "assert not {'jax', 'torch', 'pyarrow', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
