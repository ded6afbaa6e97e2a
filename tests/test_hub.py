"""Hub repositories, from a server on the loopback: what is fetched, kept, resumed and refused."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import hub_server
import pytest
import tiny_pairs
from hub_server import GOOD, MEMBER, Repository
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_encdec import (
    CheckpointError,
    ConfigError,
    EncDecError,
    EncoderDecoderModel,
    InputError,
    Text2TextPipeline,
    TokenizerPair,
)
from jax_encdec.cli import main
from jax_encdec.convert.convert import convert
from jax_encdec.hub import read_json, resolve, write_json
from jax_encdec.pretrained import load
from jax_encdec.warm_start import join

SMALL = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": b"weights" * 1000}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def index(*shards: str) -> bytes:
    return json.dumps({"weight_map": {f"t{i}": name for i, name in enumerate(shards)}}).encode()


@pytest.fixture(scope="module")
def server():
    with hub_server.serve() as running:
        yield running


@pytest.fixture
def hub(server, monkeypatch, tmp_path):
    """The server, empty and well behaved, being the hub; no stored token; an empty cache."""
    server.repositories.clear()
    server.requests.clear()
    server.cuts.clear()
    server.failing = server.large = server.body = None
    monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    constants = "huggingface_hub.constants."
    monkeypatch.setattr(constants + "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants + "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants + "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants + "HF_STORED_TOKENS_PATH", str(tmp_path / "tokens"))
    server.repositories["org/model"] = Repository({"main": dict(SMALL)})
    return server


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return tiny_pairs.save(tmp_path_factory.mktemp("saved") / "pair")


@pytest.fixture
def pair(hub, saved):
    """A whole pair in two revisions, org/pair; its files."""
    files = {p.name: p.read_bytes() for p in saved.iterdir()}
    old = {**files, "generation_config.json": b'{"max_new_tokens": 5}'}
    hub.repositories["org/pair"] = Repository({"main": files, "v1": old})
    return files


def refused(name="org/model", **options) -> str:
    """The one sentence with which a repository is refused."""
    with pytest.raises(EncDecError) as caught:
        resolve(name, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 500
    return text


# What is fetched ---------------------------------------------------------------------------------


def test_everything_takes_an_id_and_a_revision(hub, pair, saved, tmp_path):
    text = tiny_pairs.texts(1)[0]
    expected = Text2TextPipeline.from_pretrained(saved)(text)
    where = {"cache_dir": tmp_path / "elsewhere"}
    assert Text2TextPipeline.from_pretrained("org/pair", **where)(text) == expected
    assert hub.downloaded() == set(pair)
    model, _ = EncoderDecoderModel.from_pretrained("org/pair", revision="v1", **where)
    assert model.generation_config.max_new_tokens == 5
    model, _ = EncoderDecoderModel.from_pretrained("org/pair", **where)
    assert model.generation_config.max_new_tokens == 12
    assert not (tmp_path / "cache").exists()
    asked = len(hub.requests)
    offline = {**where, "local_files_only": True}
    assert load("org/pair", revision="v1", **offline).model.generation_config.max_new_tokens == 5
    assert TokenizerPair.from_pretrained("org/pair", **offline).source.vocab_size == 160
    convert("org/pair", tmp_path / "out", revision="v1", **offline)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == pair["model.safetensors"]
    assert len(hub.requests) == asked


def test_both_sides_of_a_warm_start_have_their_revision(hub):
    def bert(layers: int) -> bytes:
        return json.dumps(tiny_pairs.bert(num_hidden_layers=layers).to_dict()).encode()

    revisions = {name: {**SMALL, "config.json": bert(i)} for i, name in enumerate("abc", 1)}
    hub.repositories["org/bert"] = Repository({**revisions, "main": revisions["c"]})
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        join("org/bert", "org/bert", encoder_revision="a", revision="b", encoder_layers=1)
    asked = {r.path.rpartition("/")[2] for r in hub.requests if "/revision/" in r.path}
    assert asked == {"a", "b"}
    with pytest.raises(InputError, match="the checkpoint's 2 layers"):
        join("org/bert", "org/bert", encoder_revision="a", decoder_revision="b", decoder_layers=3)


FORMATS = [
    ["model.safetensors"],
    ["model.safetensors.index.json", *SHARDS],
    ["pytorch_model.bin"],
    ["pytorch_model.bin.index.json", "pytorch_model-1.bin", "pytorch_model-2.bin"],
    ["flax_model.msgpack"],
    ["flax_model.msgpack.index.json", "flax_model-00001-of-00001.msgpack"],
    ["tf_model.h5"],
    ["tf_model.h5.index.json", "tf_model-00001-of-00001.h5"],
    ["finetuned.safetensors"],
    ["finetuned.bin"],
]
NEEDLESS = {
    "README.md": b"#",
    "training_args.bin": b"x",
    "optimizer.pt": b"x",
    "onnx/model.onnx": b"x",
    "modeling_custom.py": b"raise SystemExit",
    "rust_model.ot": b"x",
    "checkpoint-1/model.safetensors": b"x",
}
TEXT = {
    "config.json": b"{}",
    "generation_config.json": b"{}",
    "vocab.txt": b"[PAD]",
    "decoder_tokenizer/tokenizer.json": b"{}",
    "SHA256SUMS": b"# none",
}


@pytest.mark.parametrize("first", range(len(FORMATS)), ids=[names[0] for names in FORMATS])
def test_only_the_best_format_is_fetched(hub, first):
    files = {**TEXT, **NEEDLESS}
    for best, *shards in FORMATS[first : 8 if first < 8 else first + 1]:
        files[best] = index(*shards) if shards else b"weights"
        files |= dict.fromkeys(shards, b"weights")
    hub.repositories["org/model"].revisions["main"] = files
    folder = resolve("org/model")
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert hub.downloaded() == there == {*TEXT, *FORMATS[first]}
    assert resolve("org/model", local_files_only=True) == folder


def test_tokenizers_come_without_weights(hub):
    resolve("org/model", weights=False)
    assert hub.downloaded() == {"config.json", "tokenizer.json"}
    hub.repositories["org/model"].revisions["main"] = {"README.md": b""}
    assert "neither a tokenizer nor a config.json" in refused(weights=False)


def test_what_is_cached_is_not_fetched_again(hub):
    first = resolve("org/model")
    assert hub.downloaded() == set(SMALL)
    hub.requests.clear()
    assert resolve("org/model") == first
    assert not hub.downloaded()
    hub.repositories["org/model"].revisions["main"] = {**SMALL, "config.json": b'{"a": 1}'}
    hub.requests.clear()
    assert resolve("org/model") != first
    assert hub.downloaded() == {"config.json"}  # the rest is the same content


# Tokens ------------------------------------------------------------------------------------------


def test_a_token_goes_to_the_hub_and_nowhere_else(hub, monkeypatch):
    hub.large = 1000
    resolve("org/model")
    assert {r.token for r in hub.requests} == {None}
    hub.repositories["org/model"].access = "gated"
    hub.repositories["org/model"].revisions["v2"] = {**SMALL, "model.safetensors": b"w" * 2000}
    hub.requests.clear()
    resolve("org/model", revision="v2", token=MEMBER)
    ports = {int(address.rpartition(":")[2]): address for address in (hub.endpoint, hub.storage)}
    sent = {(ports[r.port], r.token) for r in hub.requests}
    assert sent == {(hub.endpoint, MEMBER), (hub.storage, None)}
    monkeypatch.setenv("HF_TOKEN", MEMBER)
    hub.requests.clear()
    resolve("org/model")
    assert {r.token for r in hub.requests} == {MEMBER}
    hub.requests.clear()
    resolve("org/model", token=False)
    assert {r.token for r in hub.requests} == {None}


@pytest.mark.parametrize(
    ("access", "token", "message"),
    [
        ("gated", None, "org/model is gated: ask for access at http"),
        ("gated", None, "and pass that account's token (token=, --token, HF_TOKEN)"),
        ("gated", GOOD, "with the account that the token belongs to"),
        ("private", None, "no repository org/model, or it is private: check the spelling, or pass"),
        ("private", GOOD, "the token of an account that may read it"),
        ("public", "hf_wrong", "the hub does not accept the token"),
        ("public", True, "run `hf auth login`"),
        ("public", "", "the token must be a word"),
        ("public", "hf_a\nhf_b", "the token must be a word"),
    ],
)
def test_what_needs_another_token_says_so(hub, access, token, message):
    hub.repositories["org/model"].access = access
    text = refused(token=token)
    assert message in text
    assert not isinstance(token, str) or not token or token not in text


def test_a_token_is_never_shown(hub, tmp_path, capfd):
    """Whatever goes wrong: in no error, on neither stream, in no file."""
    secret = "hf_SECRETsecret"
    for failing, body, access in [
        (500, None, "public"), (403, None, "public"), (None, b"<html>", "public"),
        (None, b"[]", "public"), (None, None, "private"), (418, None, "public"),
    ]:  # fmt: skip
        hub.failing, hub.body = failing, body
        hub.repositories["org/model"].access = access
        assert "SECRET" not in refused(token=secret)
        assert main(["inspect", "org/model", "--token", secret]) == 2
        out, err = capfd.readouterr()
        assert "SECRET" not in out + err
        assert err.startswith("jax-encdec: error: ")
        assert err.count("\n") == 1
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or secret.encode() not in file.read_bytes()


# Refusals ----------------------------------------------------------------------------------------


def test_no_such_repository_or_revision(hub):
    assert "the hub has no repository org/modle, or it is private" in refused("org/modle")
    text = refused(revision="v9")
    assert "org/model has no revision 'v9'" in text
    assert f"{hub.endpoint}/org/model/tree/main" in text
    with pytest.raises(InputError, match="must be a branch, tag or commit"):
        resolve("org/model", revision="../../x")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("https://huggingface.co/org/model/tree/main", "pass the repository's id 'org/model'"),
        ("hf.co/org/model", "pass the repository's id 'org/model'"),
        ("org/model/sub", "no such file or folder"),
        ("./model", "no such file or folder"),
        ("model.safetensors", "no such file or folder"),
        ("weights/model.msgpack", "no such file or folder"),
        ("my model", "neither a folder here nor a hub repository id, which reads owner/name"),
        ("org--model", "neither a folder here"),
        ("-org/model", "neither a folder here"),
        ("org/", "neither a folder here"),
        ("o" * 5000, "neither a"),
        ("a\0b", "neither a"),
    ],
)
def test_what_is_no_id_is_not_asked_for(hub, name, message):
    assert message in refused(name)
    assert not hub.requests


def test_a_folder_with_nearly_that_name_is_suggested(hub, tmp_path, monkeypatch):
    (tmp_path / "bert2bert").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "did you mean 'bert2bert'" in refused("./bert2brt")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"README.md": b""}, "holds no model: config.json is not among its files (README.md)"),
        ({}, "config.json is not among its files (nothing)"),
        (
            {"config.json": b"{}", "model.onnx": b""},
            "org/model holds no weights that can be read: looked for model.safetensors, "
            "pytorch_model.bin, flax_model.msgpack, tf_model.h5; got config.json, model.onnx",
        ),
        (
            {"config.json": b"{}", "a.bin": b"", "b.bin": b""},
            "no weights that can be read: looked for",
        ),
        (
            {**TEXT, "model.safetensors.index.json": index(*SHARDS), SHARDS[0]: b""},
            f"org/model is incomplete: model.safetensors.index.json names '{SHARDS[1]}'",
        ),
        (
            {**TEXT, "model.safetensors.index.json": index("../../../../secret")},
            "is no index of shards: expected a weight_map",
        ),
        ({**TEXT, "model.safetensors.index.json": b"{"}, "not readable as JSON"),
    ],
)
def test_repositories_without_a_model(hub, files, message):
    hub.repositories["org/model"].revisions["main"] = files
    assert message in refused()


def test_names_that_lead_elsewhere_are_not_followed(hub, tmp_path):
    """File names of the server's that climb, are absolute, or are a system's own."""
    names = ("../../../../evil.json", "/tmp/evil.json", "a/../../evil.safetensors", "..\\evil.json",
             "C:\\evil.bin", "encoder_tokenizer/../../../config.json", "*", "[a-z]*.json", "\0",
             "config.json/../../x")  # fmt: skip
    hub.repositories["org/model"].listed = names
    before = set(tmp_path.rglob("*"))
    folder = resolve("org/model", cache_dir=tmp_path / "cache")
    assert {p.name for p in folder.iterdir()} == set(SMALL)
    assert hub.downloaded() == set(SMALL)
    outside = {p for p in tmp_path.rglob("*") if p.relative_to(tmp_path).parts[0] != "cache"}
    assert outside <= before
    shards = (f"../{SHARDS[0]}", "/etc/passwd", "..\\x.safetensors", "a/b.safetensors", ".", "")
    for shard in shards:
        files = {"config.json": b"{}", "model.safetensors.index.json": index(shard)}
        hub.repositories["org/model"] = Repository({"main": files}, listed=(shard,))
        assert "is no index of shards" in refused()
    hub.repositories["org/model"] = Repository({"main": TEXT}, listed=names)
    assert "looked for" in refused()  # there are only such names


# The network -------------------------------------------------------------------------------------


def test_a_broken_download_goes_on_where_it_stopped(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 50_000)  # of 10 MB
    content = os.urandom(300_000)
    hub.repositories["org/model"].revisions["main"]["model.safetensors"] = content
    hub.cuts["model.safetensors"] = [120_000, 70_000]
    try:
        folder = resolve("org/model")
    except CheckpointError:  # huggingface_hub below 1.10 or so leaves it to the next calls
        with contextlib.suppress(CheckpointError):
            resolve("org/model")
        folder = resolve("org/model")
    assert (folder / "model.safetensors").read_bytes() == content
    assert [r.range for r in hub.got("model.safetensors")] == [
        None, "bytes=100000-", "bytes=150000-",
    ]  # fmt: skip


def test_a_download_that_stays_broken_keeps_what_arrived(hub, monkeypatch):
    waits = []
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", waits.append)
    files = {**TEXT, "model.safetensors.index.json": index(*SHARDS)}
    files |= dict.fromkeys(SHARDS, b"w" * 5000)
    hub.repositories["org/model"].revisions["main"] = files
    hub.cuts[SHARDS[1]] = [1000] + 50 * [0]
    text = refused()
    assert "the download of org/model broke off (" in text
    assert "call again" in text
    assert "lacks model-00002-of-00002.safetensors, and downloads are switched off" in refused(
        local_files_only=True
    )
    hub.cuts.clear()
    hub.requests.clear()
    folder = resolve("org/model")
    assert hub.downloaded() == {SHARDS[1]}
    assert (folder / SHARDS[1]).read_bytes() == files[SHARDS[1]]
    assert {p.name for p in folder.iterdir()} >= {*SHARDS, "config.json"}


def unreachable(hub, monkeypatch):
    with hub_server.serve() as gone:
        monkeypatch.setenv("HF_ENDPOINT", gone.endpoint)


def server_error(hub, monkeypatch):
    hub.failing = 503


def too_many(hub, monkeypatch):
    hub.failing = 429


def a_login_page(hub, monkeypatch):
    hub.body = b"<html>Welcome to the hotel"


def offline(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


OUTAGES = {
    unreachable: "the hub cannot be asked (ConnectError",
    server_error: "the hub cannot be asked (it answers 503)",
    too_many: "the hub cannot be asked (too many requests",
    a_login_page: "the hub cannot be asked (JSONDecodeError",
    offline: "downloads are switched off (HF_HUB_OFFLINE)",
}


@pytest.mark.parametrize("outage", OUTAGES, ids=lambda outage: outage.__name__)
def test_the_cache_serves_when_the_hub_does_not(outage, hub, monkeypatch, capfd):
    files = hub.repositories["org/model"].revisions
    files["v1"] = {**SMALL, "config.json": b'{"v": 1}'}
    folder, old = resolve("org/model"), resolve("org/model", revision="v1")
    commit = old.name
    capfd.readouterr()
    outage(hub, monkeypatch)
    assert resolve("org/model") == folder
    assert resolve("org/model", revision="v1") == resolve("org/model", revision=commit) == old
    assert capfd.readouterr() == ("", "")
    text = refused(revision="v2")
    assert "org/model at revision 'v2' is not in the cache" in text
    assert f"it holds main, v1, and {OUTAGES[outage]}" in text
    text = refused("org/other")
    assert "org/other is not in the cache" in text
    assert "download it once with a network, or pass a local folder" in text
    (folder / "model.safetensors").unlink()
    text = refused()
    assert "the cache's copy of org/model has no weights" in text
    assert OUTAGES[outage] in text


def test_a_refusal_does_not_take_the_cache_unasked(hub):
    folder = resolve("org/model")
    hub.repositories["org/model"].access = "private"
    assert "local_files_only=True (--offline) takes the copy in the cache" in refused()
    assert resolve("org/model", local_files_only=True) == folder


# The command -------------------------------------------------------------------------------------


def command(*arguments, hub, cache):
    """Run the command in a process of its own, which finds the hub by its environment."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(cache)}
    code = "import sys; from jax_encdec.cli import main; sys.exit(main())"
    line = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False, env=environment)


def test_the_commands_take_the_same_options(hub, pair, tmp_path):
    hub.repositories["org/pair"].access = "gated"
    options = ["--revision", "v1", "--cache-dir", str(tmp_path / "cache")]
    done = command("inspect", "org/pair", *options, hub=hub, cache=tmp_path / "home")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "org/pair is gated" in done.stderr
    found = ["inspect", "org/pair", *options, "--json"]
    done = command(*found, "--token", MEMBER, hub=hub, cache=tmp_path / "home")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["generation"]["set"] == {"max_new_tokens": 5}
    asked = len(hub.requests)
    out = tmp_path / "out"
    done = command(
        "convert", "org/pair", out, *options, "--offline", hub=hub, cache=tmp_path / "home"
    )
    assert done.returncode == 0, done.stderr
    assert (out / "model.safetensors").read_bytes() == pair["model.safetensors"]
    assert len(hub.requests) == asked


# JSON --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not readable as JSON"),
        (b"{", "not readable as JSON"),
        (b'{"a": 1}}', "not readable as JSON"),
        (b'{"a": "\xff"}', "not readable as JSON"),
        (b"[1]", "must hold a JSON object; got list"),
        (b'{"a": NaN}', "holds NaN, which is not a finite number"),
        (b'{"a": [-Infinity]}', "holds -Infinity, which is not a finite number"),
        (b'{"a": 1e999}', "holds 1e999, which is not a finite number"),
        (b'{"a": 1, "a": 1}', "names 'a' twice"),
        (b'{"b": {"a": 1, "a": 2}}', "names 'a' twice"),
        (b'{"a": ' + b"9" * 5000 + b"}", "holds an integer of 5000 digits"),
        (b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}", "nests more than 64 levels deep"),
        (b'{"a":' * 10**5, "not readable as JSON"),
        (b"[" * 10**6, "not readable as JSON"),
        (b'{"a": "\\ud800"}', "text that is not Unicode"),
        (b'{"\\udfff": 1}', "text that is not Unicode"),
        (b'{"a": "' + b"x" * 2 * 10**6 + b'"}', "is longer than 2000000 bytes"),
    ],
    ids=range(17),
)
def test_json_is_read_strictly(content, message, tmp_path):
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_json(file)
    assert message in str(caught.value)
    assert str(file) in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(file))


def test_what_is_no_regular_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    for name, message in {
        "pipe": "is not a file", "zero": "is not a file", ".": "is not a file",
        "loop": "cannot be read: Too many levels", "none": "no such file",
    }.items():  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            read_json(tmp_path / name)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False,
    allow_infinity=False) | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("ab", max_size=3), inner),
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(value=st.dictionaries(st.text("abc", max_size=3), JSON), cut=st.integers(0, 10**6))
def test_json_returns_as_it_was_written(tmp_path_factory, value, cut):
    file = tmp_path_factory.mktemp("json") / "config.json"
    write_json(file, value)
    assert read_json(file) == value
    assert [entry.name for entry in file.parent.iterdir()] == ["config.json"]
    content = file.read_bytes()
    file.write_bytes(content[: cut % (len(content) - 2)])
    with pytest.raises(ConfigError):
        read_json(file)


@pytest.mark.parametrize("part", ["", "encoder", "decoder"])
def test_code_of_a_repository_is_never_run(saved, part, tmp_path, capsys):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(saved / name, tmp_path / name)
    marker = tmp_path / "it_ran"
    (tmp_path / "modeling_x.py").write_text(f"open({str(marker)!r}, 'w')")
    data = json.loads((saved / "config.json").read_text())
    named = {"auto_map": {"AutoConfig": "modeling_x.X", "AutoModel": "modeling_x.X"}}
    holder = data[part] if part else data
    holder |= named | {"model_type": "x"}
    (tmp_path / "config.json").write_text(json.dumps(data))
    for arguments in (["inspect", tmp_path], ["convert", tmp_path, tmp_path / "out"]):
        assert main(list(map(str, arguments))) == 2
        error = capsys.readouterr().err
        assert "model_type 'x' is not supported" in error
        assert "(auto_map), and such code is never run here" in error
    with pytest.raises(ConfigError, match="such code is never run here"):
        join(tmp_path, tmp_path)
    holder["model_type"] = "bert" if part else "encoder-decoder"
    (tmp_path / "config.json").write_text(json.dumps(data))
    load(tmp_path)
    assert not marker.exists()
