"""SHA256SUMS: written with weights, checked before they are read, understood by sha256sum."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest
import tiny_pairs
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_encdec import CheckpointError, EncoderDecoderModel
from jax_encdec.cli import main
from jax_encdec.cli.inspect import describe
from jax_encdec.convert import digests
from jax_encdec.convert.convert import convert
from jax_encdec.warm_start import join

NAME = "SHA256SUMS"


@pytest.fixture(scope="module", params=["single", "sharded"])
def saved(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / request.param
    model, params = tiny_pairs.pair()
    size = 20_000 if request.param == "sharded" else 10**9
    model.save_pretrained(folder, params, max_shard_bytes=size)
    tiny_pairs.tokenizers().save(folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def weight_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.name.startswith("model"))


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        EncoderDecoderModel.from_pretrained(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_weight_file_is_listed_and_nothing_else(saved):
    expected = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in weight_files(saved)}
    assert digests.read(saved / NAME) == expected
    assert (len(expected) > 1) == ("sharded" in saved.name)
    assert not [file for file in saved.iterdir() if file.name.startswith(".")]


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="needs sha256sum")
def test_sha256sum_reads_it_and_is_read(copy):
    def run(*command: str) -> subprocess.CompletedProcess:
        return subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)

    assert run("sha256sum", "--strict", "-c", NAME).returncode == 0
    names = sorted(file.name for file in copy.iterdir() if file.name != NAME)
    for binary in ("--text", "--binary"):
        (copy / NAME).write_text(run("sha256sum", binary, *names).stdout)
        assert set(digests.read(copy / NAME)) == set(names)
        digests.check(copy)


def test_pytorch_does_not_mind(saved):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    transformers.EncoderDecoderModel.from_pretrained(saved)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_anywhere_is_refused(saved, tmp_path_factory, data):
    file = data.draw(st.sampled_from(weight_files(saved)))
    content = bytearray(file.read_bytes())
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    copy = Path(shutil.copytree(saved, tmp_path_factory.mktemp("flipped") / "copy"))
    content[bit // 8] ^= 1 << bit % 8
    (copy / file.name).write_bytes(content)
    text = refused(copy)
    assert f"{file.name} is not the file that was saved: its SHA-256 is" in text
    assert "download or copy it again, or, if it was replaced on purpose, remove SHA256SUMS" in text
    with pytest.raises(CheckpointError, match="is not the file that was saved"):
        digests.check(copy / file.name if "safetensors" in file.suffix else copy)
    shutil.rmtree(copy)


def test_everything_that_reads_weights_checks_them(copy, tmp_path, capsys):
    file = weight_files(copy)[0]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="is not the file that was saved"):
        convert(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert main(["generate", "--model", str(copy), "a"]) == 2
    assert "is not the file that was saved" in capsys.readouterr().err
    assert not describe(copy)["usable"]
    config = (copy / "config.json").read_text().replace('"encoder-decoder"', '"bert"')
    (copy / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match="is not the file that was saved"):
        join(copy, copy)


def test_of_a_damaged_file_the_digest_is_what_is_complained_of(copy):
    """Whatever else its reader stumbles over meanwhile."""
    file = weight_files(copy)[-1]
    file.write_bytes(file.read_bytes()[:-1])
    damaged = pytest.raises(CheckpointError, match="is not the file that was saved")
    with damaged, digests.checking(copy):
        raise CheckpointError("too short")
    with damaged, digests.checking(copy):
        pass
    own = pytest.raises(CheckpointError, match="too short")
    with own, digests.checking(copy, verify=False):
        raise CheckpointError("too short")


def test_without_it_nothing_is_checked(copy):
    (copy / NAME).unlink()
    EncoderDecoderModel.from_pretrained(copy)


def test_saving_again_replaces_it(copy, tmp_path):
    before = (copy / NAME).read_bytes()
    model, params = tiny_pairs.pair("bert2gpt2")
    model.save_pretrained(copy, params)
    assert (copy / NAME).read_bytes() != before
    assert set(digests.read(copy / NAME)) == {"model.safetensors"}
    convert(copy, tmp_path / "out", max_shard_bytes=20_000)
    assert set(digests.read(tmp_path / "out" / NAME)) == {
        file.name for file in weight_files(tmp_path / "out")
    }
    convert(copy, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / NAME).read_bytes() == (copy / NAME).read_bytes()
    EncoderDecoderModel.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not a digest", f"{NAME}, line 2 is not of sha256sum's form"),
        (f"{'0' * 63}  model.safetensors", "line 2 is not of sha256sum's form"),
        (f"{'g' * 64}  model.safetensors", "line 2 is not of sha256sum's form"),
        (f"{'0' * 64} model.safetensors", "line 2 is not of sha256sum's form"),
        (f"{'0' * 64}  ", "line 2 is not of sha256sum's form"),
        ("x" * 10**5, "line 2 is not of sha256sum's form"),
        (f"{'0' * 64}  ../model.safetensors", "which is outside the folder"),
        (f"{'0' * 64}  a/../../model.safetensors", "which is outside the folder"),
        (f"{'0' * 64}  /etc/passwd", "which is outside the folder"),
        (f"{'0' * 64}  C:\\model.safetensors", "which is outside the folder"),
        (f"{'0' * 64}  ..\\model.safetensors", "which is outside the folder"),
        (f"{'0' * 64}  other.txt\n{'1' * 64}  ./other.txt", "line 3 gives 'other.txt' a second"),
        ("x\n" * 10**6, "is longer than 1000000 bytes"),
        ("\udcff", "is not UTF-8"),
    ],
)
def test_a_malformed_file_is_refused(copy, line, message):
    (copy / NAME).write_bytes(b"# digests\n" + line.encode(errors="surrogateescape"))
    text = refused(copy)
    assert message in text
    assert len(text) < 500


def test_what_is_no_file_is_refused(copy):
    (copy / NAME).unlink()
    (copy / NAME).mkdir()
    assert "is not a file" in refused(copy)
    (copy / NAME).rmdir()
    (copy / NAME).symlink_to("nowhere")
    assert "no such file" in refused(copy)


def test_other_lines_are_left_alone(copy):
    content = (copy / NAME).read_text()
    more = f"{'0' * 64}  README.md\r\n\n# more\n{'1' * 64} *onnx/model.onnx\n"
    (copy / NAME).write_text(more + content.replace("  ", "  ./", 1).upper().replace(
        "MODEL", "model").replace("SAFETENSORS", "safetensors").replace("INDEX.JSON", "index.json")
        .replace("-OF-", "-of-"))  # fmt: skip
    EncoderDecoderModel.from_pretrained(copy)
    (copy / NAME).write_text("")
    EncoderDecoderModel.from_pretrained(copy)


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=200) | st.text("0af \n*#./\\x", max_size=200).map(str.encode))
def test_any_content_is_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("sums") / NAME
    path.write_bytes(content)
    try:
        found = digests.read(path)
    except CheckpointError:
        return
    assert all(len(d) == 64 and not n.startswith(("/", "../")) for n, d in found.items())
