"""The command line: what it does, and that bad input is one sentence and exit code 2."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_pairs
from commands import call, refused

from jax_encdec import EncoderDecoderModel, GenerationConfig, Text2TextPipeline
from jax_encdec.cli import main
from jax_encdec.cli.convert import size
from jax_encdec.cli.generation_options import HELP, generation_fields
from jax_encdec.cli.inspect import amount, describe, parameter_counts
from jax_encdec.convert.convert import convert
from jax_encdec.convert.readers import TensorInfo, open_tensors, write_safetensors
from jax_encdec.errors import InputError
from jax_encdec.text_files import read_texts

TEXTS = list(tiny_pairs.texts(4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_pairs.save(tmp_path_factory.mktemp("models") / "pair")


@pytest.fixture(scope="module")
def predictions(folder) -> list[str]:
    return Text2TextPipeline.from_pretrained(folder)(TEXTS)


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    """A copy to be damaged, without the digests that would notice."""
    ignored = shutil.ignore_patterns("SHA256SUMS")
    return Path(shutil.copytree(folder, tmp_path / "copy", ignore=ignored))


def shell(*arguments, **options) -> subprocess.CompletedProcess:
    code = "import sys; from jax_encdec.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def edit(file: Path, **changes) -> None:
    data = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in data.items() if v is not ...}))


def rewrite(folder: Path, change) -> None:
    """Change a checkpoint's tensors, given and returned by name."""
    with open_tensors(folder) as source:
        tensors = change({name: source[name] for name in source})
    save_tensors(folder, tensors)


def save_tensors(folder: Path, tensors) -> None:
    entries = [(n, TensorInfo(t.dtype, t.shape), lambda t=t: t) for n, t in tensors.items()]
    write_safetensors(folder, entries)


# generate ----------------------------------------------------------------------------------------


def test_predictions_are_printed_a_line_each(folder, predictions, capsys):
    code, out, _ = call(capsys, "generate", "--model", folder, *TEXTS)
    assert code == 0
    assert out.splitlines() == predictions


def test_files_of_every_kind_go_in_and_out(folder, predictions, tmp_path, capsys):
    inputs = {
        "a.txt": "\n".join(TEXTS) + "\n",
        "a.jsonl": "".join(json.dumps({"id": 1, "text": t}) + "\n" for t in TEXTS),
        "a.csv": "n,source\r\n" + "".join(f'1,"{t}"\r\n' for t in TEXTS),
        "b.jsonl": "".join(json.dumps({"t": t}) + "\n" for t in TEXTS),
    }
    for name, content in inputs.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
        out = tmp_path / f"{name}.out.jsonl"
        column = ["--source-column", "t"] if name == "b.jsonl" else []
        arguments = ["--input", tmp_path / name, "--output", out, *column]
        code, printed, err = call(capsys, "generate", "--model", folder, *arguments)
        assert code == 0
        assert not printed
        assert "4 predictions in" in err
        rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
        assert [row["source"] for row in rows] == TEXTS
        assert [row["prediction"] for row in rows] == predictions
    for name in ("o.txt", "o.csv"):
        call(capsys, "generate", "--model", folder, *TEXTS, "--output", tmp_path / name)
    assert (tmp_path / "o.txt").read_text().splitlines() == predictions
    with open(tmp_path / "o.csv", newline="") as file:
        assert [row["prediction"] for row in csv.DictReader(file)] == predictions
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]


def test_a_prediction_is_printed_while_it_is_made(folder, predictions, capsys):
    code, out, err = call(capsys, "generate", "--model", folder, TEXTS[0], "--stream")
    assert (code, out, err) == (0, predictions[0] + "\n", "")


def test_weights_of_half_the_bytes(folder, capsys):
    code, out, err = call(capsys, "generate", "--model", folder, *TEXTS, "--precision", "bfloat16")
    assert (code, err) == (0, "")
    model, params = EncoderDecoderModel.from_pretrained(folder)
    prepared = model.prepare(params, rows=4, precision="bfloat16")
    pipe = Text2TextPipeline(model, prepared, tiny_pairs.tokenizers())
    assert out.splitlines() == pipe(TEXTS)


def test_several_devices_predict_the_same(folder, predictions, tmp_path, capsys):
    several = ["generate", "--model", folder, "--mesh", "replica=2,tensor=4"]
    code, out, err = call(capsys, *several, *TEXTS)
    assert (code, out.splitlines(), err) == (0, predictions, "")
    code, out, err = call(capsys, *several, TEXTS[0], "--stream")
    assert (code, out, err) == (0, predictions[0] + "\n", "")
    (tmp_path / "in.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    files = ["--input", tmp_path / "in.txt", "--output", tmp_path / "out.txt"]
    code, _, _ = call(capsys, *several[:3], "--mesh", "fsdp=-1", "--batch-size", "8", *files)
    assert code == 0
    assert (tmp_path / "out.txt").read_text(encoding="utf-8").splitlines() == predictions
    half = ["--precision", "bfloat16", "--num-beams", "3"]
    one = call(capsys, "generate", "--model", folder, *TEXTS, *half)
    assert call(capsys, *several, *TEXTS, *half) == one


def test_a_mesh_that_does_not_fit_is_refused(folder, capsys):
    def why(mesh, *more):
        return refused(capsys, "generate", "--model", folder, *TEXTS, "--mesh", mesh, *more)

    assert "mesh replica=2,tensor=2 takes 4 devices; there are 8" in why("replica=2,tensor=2")
    assert "got 'tensors'; did you mean 'tensor'" in why("tensors=8")
    assert "a mesh is written as 'replica=2,fsdp=4,tensor=1'" in why("8")
    message = "--batch-size is 12, which must divide by replica x fsdp = 8 of the mesh; 8 would do"
    assert message in why("replica=8", "--batch-size", "12")


def test_options_reach_the_search_and_seeds_repeat(folder, capsys):
    flags = ["--do-sample", "--top-k", "5", "--num-return-sequences", "2"]
    flags += ["--bad-words-ids", "[[7]]", "--no-repeat-ngram-size", "2"]
    one = call(capsys, "generate", "--model", folder, *TEXTS, *flags)
    same = call(capsys, "generate", "--model", folder, *TEXTS, *flags, "--seed", "0")
    other = call(capsys, "generate", "--model", folder, *TEXTS, *flags, "--seed", "1")
    assert one == same
    assert one[1] != other[1]
    assert len(one[1].splitlines()) == 2 * len(TEXTS)
    import jax

    pipe = Text2TextPipeline.from_pretrained(folder)
    options = {"do_sample": True, "top_k": 5, "num_return_sequences": 2}
    options |= {"bad_words_ids": [[7]], "no_repeat_ngram_size": 2}
    made = pipe(TEXTS, key=jax.random.key(1), **options)
    assert [line for lines in made for line in lines] == other[1].splitlines()


def test_every_generation_option_is_a_flag_with_a_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["generate", "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    names = {f.name for f in dataclasses.fields(GenerationConfig)} - {"extra"}
    names = {name for name in names if not name.startswith("output_")}  # nothing for a file
    assert {f.name for f in generation_fields()} == names
    assert set(HELP) == names
    assert all("--" + name.replace("_", "-") in text for name in names)


def test_help_is_fast_and_imports_no_jax():
    code = (
        "import sys, time; t = time.perf_counter()\n"
        "from jax_encdec.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "t = time.perf_counter() - t\n"
        "heavy = {'jax', 'flax', 'numpy', 'tokenizers', 'torch'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert t < 0.5, t"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_standard_input_and_a_reader_that_leaves(folder, predictions):
    done = shell("generate", "--model", folder, "--input", "-", input="\n".join(TEXTS))
    assert done.stdout.splitlines() == predictions, done.stderr
    code = "import sys; from jax_encdec.cli import main; sys.exit(main())"
    with subprocess.Popen(
        [sys.executable, "-c", code, "generate", "--model", str(folder), *TEXTS],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["genrate"], "no command 'genrate'; did you mean 'generate'"),
        (["generate", "a"], "missing: --model"),
        (["generate", "--model", "M"], "nothing to generate from"),
        (["generate", "--model", "M", "a", "--num-beam", "4"], "did you mean '--num-beams'"),
        (["generate", "--model", "M", "a", "--num-beams=x"], "num_beams must be an integer"),
        (["generate", "--model", "M", "a", "--early-stopping", "1"], 'false, true or "never"'),
        (["generate", "--model", "M", "a", "--batch-size", "0"], "a positive integer; got '0'"),
        (["generate", "--model", "M", "a", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["generate", "--model", "M", "a", "--input", "f.txt"], "texts or --input, not both"),
        (["generate", "--model", "M", "a", "--output", "o.xml"], "must end in .jsonl"),
        (["generate", "--model", "M", "a", "--output", "no/o.txt"], "cannot be written: No such"),
        (["generate", "--model", "M", "a", "--restart"], "--restart needs an --output"),
        (["generate", "--model", "M", "a", "b", "--stream"], "the prediction of one TEXT"),
        (["generate", "--model", "M", "--input", "absent.txt"], "absent.txt: No such file"),
        (["generate", "--model", "./M", "a"], "./M: no such file or folder"),
        (["generate", "--model", "org/m", "a", "--offline"], "org/m is not in the cache"),
        (["generate", "--model", "M", "a", "--token", ""], "the token must be a word"),
        (["inspect", "M", "--ofline"], "did you mean '--offline'"),
        (["inspect", "M", "--revision", ".."], "must be a branch, tag or commit; got '..'"),
        (["convert", "a", "b", "--format", "pickle"], "invalid choice: 'pickle'"),
        (["convert", "SRC"], "missing: DST"),
        (["convert", "a", "b", "--max-shard-size", "many"], "a size such as 5GB"),
        (["inspect", "./absent"], "./absent: no such file or folder"),
        ([ "inspect", "a", "b"], "unexpected argument 'b'"),
    ],
)  # fmt: skip
def test_bad_command_lines_are_refused(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["1 May", " "], "text 2 is empty"),
        (["1 " * 60], "text 1 has 62 tokens, the limit is 48; shorten it or pass --truncation"),
        (["a", "--num-return-sequences", "2"], "greedy decoding returns one sequence"),
        (["a", "--num-beams", "2", "--num-return-sequences", "3"], "at most num_beams (2)"),
        (["a", "--min-length", "30", "--max-new-tokens", "5"], "min_length (30) is above"),
        (["a", "--forced-bos-token-id", "999"], "must lie in the vocabulary, 0 to 159, got 999"),
        (["a", "--max-new-tokens", "400"], "positions for"),
    ],
)
def test_texts_and_options_that_the_model_refuses(arguments, message, folder, tmp_path, capsys):
    output = tmp_path / "o.jsonl"
    assert message in refused(capsys, "generate", "--model", folder, *arguments)
    assert message in refused(capsys, "generate", "--model", folder, *arguments, "--output", output)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("data", "suffix", "column", "message"),
    [
        (b"", ".txt", None, "F holds no texts"),
        (b"a\n\nb\n", ".txt", None, "F, line 2 is empty"),
        (b"a\nb\xff\n", ".txt", None, "F, line 2 is not UTF-8 (byte 0xff)"),
        (b"a", ".txt", "x", "F has no columns for --source-column 'x'"),
        (b"[]", ".json", None, "got .json: write one object per line"),
        (b'{"text": "a"}\n{"text": \n', ".jsonl", None, "F, line 2 is not valid JSON"),
        (b'{"text": "a"}\n{"txt": "b"}', ".jsonl", None, "F, line 2: expected a column 'source'"),
        (b'{"text": 5}', ".jsonl", None, "F, line 1: the text must be a string; got int"),
        (b"[1]", ".jsonl", None, "F, line 1: the text must be a string; got list"),
        (b'{"text": " "}', ".jsonl", None, "F, line 1 is empty"),
        (b"a,b\n1,2", ".csv", None, "F, line 1: expected a column 'source' or 'text'; got a, b"),
        (b"text\n1,2", ".csv", None, "F, line 2 has 2 fields, the header 1"),
        (b'text\n"1', ".csv", None, "F, line 2 is not valid CSV"),
        (b"text\n", ".csv", None, "F holds no texts"),
        (b"src\n1", ".csv", "sorc", "expected a column 'sorc'; got src; did you mean 'src'"),
    ],
)
def test_malformed_input_is_named_with_its_line(data, suffix, column, message):
    with pytest.raises(InputError) as error:
        read_texts(data, "F", suffix, column)
    assert message in str(error.value)


def test_texts_are_read_as_written():
    lines = read_texts("\ufeffa\u2028b\r\n  c \n".encode(), "F", ".txt")
    assert [record.text for record in lines] == ["a\u2028b", "  c "]
    rows = read_texts(b'text,n\n"a\nb",1\n\n"c ""d""",2\n', "F", ".csv")
    assert [record.text for record in rows] == ["a\nb", 'c "d"']
    assert rows[1].where == "F, line 5"
    assert [r.text for r in read_texts(b'"a"\n\n{"x": "b"}', "F", ".jsonl", "x")] == ["a", "b"]


def test_interruption_and_operating_system_errors(folder, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("jax_encdec.cli.inspect.describe", interrupted)
    assert call(capsys, "inspect", folder)[::2] == (130, "jax-encdec: interrupted\n")

    def full(*_, **__):
        raise OSError(28, "No space left on device", "disk")

    monkeypatch.setattr("jax_encdec.cli.inspect.describe", full)
    assert "disk: No space left on device" in refused(capsys, "inspect", folder)


# Damaged models: one sentence from generate and convert, a line of inspect's description ----------


def without_weights(folder):
    (folder / "model.safetensors").unlink()


def two_checkpoints(folder):
    file = folder / "model.safetensors"
    shutil.copy(file, folder / "a.safetensors")
    file.rename(folder / "b.safetensors")


def truncated(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def a_tensor_missing(folder):
    rewrite(folder, lambda t: {n: x for n, x in t.items() if not n.endswith("query.bias")})


def a_tensor_too_many(folder):
    rewrite(folder, lambda t: t | {"decoder.extra.weight": np.zeros(3, np.float32)})


def a_wrong_shape(folder):
    rewrite(folder, lambda t: {n: x[:-1] if "word_emb" in n else x for n, x in t.items()})


DAMAGE = {
    without_weights: "no weights",
    two_checkpoints: "several weights (a.safetensors, b.safetensors)",
    truncated: "model.safetensors is damaged or incomplete",
    a_tensor_missing: "3 tensors are missing: decoder.bert.encoder.layer.0.attention",
    a_tensor_too_many: "1 tensors are unexpected: decoder.extra.weight",
    a_wrong_shape: "has shape (159, 16), expected (160, 16)",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damaged_weights(damage, copy, tmp_path, capsys):
    damage(copy)
    assert DAMAGE[damage] in refused(capsys, "generate", "--model", copy, "a")
    assert DAMAGE[damage] in refused(capsys, "convert", copy, tmp_path / "out")
    code, out, err = call(capsys, "inspect", copy)
    assert (code, err) == (1, "")
    assert DAMAGE[damage] in out
    assert "bert encoder, bert decoder" in out
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "got 'llama'"),
        ({"decoder": {"model_type": "llama"}}, "model_type 'llama' is not supported"),
        ({"decoder_start_token_id": 160}, "decoder's vocabulary, 0..159; got 160"),
        ({"encoder": ...}, "lacks the 'encoder' configuration"),
        ({"pad_token_id": "x"}, "pad_token_id must be an integer or null; got 'x'"),
    ],
)
def test_configurations_that_cannot_be_used(changes, message, copy, tmp_path, capsys):
    edit(copy / "config.json", **changes)
    for arguments in (
        ["generate", "--model", copy, "a"],
        ["convert", copy, tmp_path / "out"],
        ["inspect", copy],
    ):
        error = refused(capsys, *arguments)
        assert message in error
        assert "config.json" in error
    assert not (tmp_path / "out").exists()


def test_no_tokenizer(copy, capsys):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    assert "tokenizer" in refused(capsys, "generate", "--model", copy, "a")
    code, out, _ = call(capsys, "inspect", copy)
    assert code == 0
    assert "no tokenizer" in out
    assert "copy tokenizer.json" in out


# inspect -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert2bert", "bert2gpt2", "bart", "tied"])
def test_a_pair_is_described(kind, tmp_path, capsys):
    tiny_pairs.save(tmp_path, kind)
    code, out, _ = call(capsys, "inspect", tmp_path, "--json")
    assert code == 0
    found = json.loads(out)
    model, params = tiny_pairs.pair(kind)
    import jax

    total = sum(x.size for x in jax.tree.leaves(params))
    assert found["parameters"]["total"] == total
    assert sum(found["parameters"].values()) == 2 * total
    assert found["projection"] == ([16, 24] if kind == "bert2gpt2" else None)
    assert found["tied"]["decoder_to_encoder"] == (kind == "tied")
    assert found["encoder"]["positions"] == tiny_pairs.POSITIONS
    assert found["weights"]["bytes"] == (tmp_path / "model.safetensors").stat().st_size
    assert list(found["weights"]["dtypes"]) == ["float32"]
    for name, key in (("start", "decoder_start_token_id"), ("end", "eos_token_id")):
        assert found["ids"][name] == {
            "value": model.token_id(key),
            "from": "generation_config.json",
        }
    assert found["generation"]["set"] == {"max_new_tokens": 12}
    assert found["tokenizers"]["source"] == {"kind": "WordPiece", "vocabulary": 160}
    assert found["problems"] == []
    text = call(capsys, "inspect", tmp_path)[1]
    assert f"{amount(total)} parameters" in text
    assert f"{total:,}" in text


def test_what_is_undefined_is_named_with_its_cure(copy, capsys):
    for name in ("config.json", "generation_config.json"):
        edit(copy / name, decoder_start_token_id=..., eos_token_id=...)
    code, out, _ = call(capsys, "inspect", copy)
    assert code == 1
    assert "decoder_start_token_id is not defined: generation cannot begin" in out
    assert "pass --eos-token-id to generate" in out
    assert "pad 0 (generation_config.json)" in out
    assert "decoder_start_token_id is not defined" in refused(
        capsys, "generate", "--model", copy, "a"
    )
    edit(copy / "generation_config.json", pad_token_id=..., bos_token_id=4, guidance_scale=2.0)
    edit(copy / "config.json", pad_token_id=...)
    found = describe(copy)
    assert found["ids"]["start"]["from"] == "generation_config.json, as bos_token_id"
    assert found["ids"]["pad"] == {"value": 0, "from": "config.json, decoder"}
    assert any("guidance_scale" in problem["what"] for problem in found["problems"])
    (copy / "generation_config.json").unlink()
    edit(copy / "config.json", eos_token_id=5, decoder_start_token_id=6, num_beams=3)
    found = describe(copy)
    assert found["ids"]["end"] == {"value": 5, "from": "config.json"}
    assert found["generation"] == {"from": "config.json", "set": {"num_beams": 3}}


def test_a_single_model_says_how_to_join(tmp_path, capsys):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = {"vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = transformers.BertModel(transformers.BertConfig(**size, intermediate_size=16))
    bert.save_pretrained(tmp_path)
    code, out, _ = call(capsys, "inspect", tmp_path)
    assert code == 0
    assert "a single bert, which can be one side of a pair" in out
    assert f"from_encoder_decoder_pretrained('{tmp_path}', DECODER)" in out
    assert "new: cross-attention, language model head" in out
    assert "no tokenizer" in out
    found = describe(tmp_path)
    assert found["as"]["encoder"]["parameters"] == sum(p.numel() for p in bert.parameters())
    assert "single model: join two" in refused(capsys, "convert", tmp_path, tmp_path / "out")


def test_a_half_of_bart_is_told_from_the_whole(tmp_path):
    transformers = pytest.importorskip("transformers")
    size = {"vocab_size": 40, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1}
    size |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    whole = transformers.BartForConditionalGeneration(transformers.BartConfig(**size))
    whole.save_pretrained(tmp_path / "whole")
    half = transformers.BartForCausalLM(transformers.BartConfig(**size, is_decoder=True))
    half.save_pretrained(tmp_path / "half")
    assert describe(tmp_path / "whole")["kind"] == "whole"
    found = describe(tmp_path / "half")
    assert found["kind"] == "single"
    assert found["as"]["decoder"]["fits"]
    assert found["usable"]


def test_amounts_are_short():
    expected = {0: "0", 999: "999", 1000: "1.00k", 18656: "18.7k", 123456: "123k", 999_600: "1.00M"}
    assert {n: amount(n) for n in expected} == expected
    assert amount(247_363_386) == "247M"
    assert amount(4.2e12) == "4200G"


# convert -----------------------------------------------------------------------------------------


def test_torch_files_become_safetensors_that_transformers_opens(folder, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.EncoderDecoderModel.from_pretrained(folder)
    source, out = tmp_path / "bin", tmp_path / "out"
    shutil.copytree(folder, source)
    (source / "model.safetensors").unlink()
    torch.save(model.state_dict(), source / "pytorch_model.bin")
    capsys.readouterr()
    code, printed, err = call(capsys, "convert", source, out)
    assert (code, err) == (0, "")
    assert f"{parameter_counts(tiny_pairs.config())['total']:,}" in printed
    again = transformers.EncoderDecoderModel.from_pretrained(out)
    state = again.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    names = {"model.safetensors", "config.json", "generation_config.json", "SHA256SUMS"}
    tokenizer = {"tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in out.iterdir()} == names | tokenizer
    for name in tokenizer:
        assert (out / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("kind", ["bert2bert", "bert2gpt2", "bart", "tied"])
def test_what_was_saved_here_is_converted_byte_for_byte(kind, tmp_path):
    source = tiny_pairs.save(tmp_path / "a", kind)
    seen = []
    done = convert(source, tmp_path / "b", progress=lambda *step: seen.append(step))
    names = {file.name for file in source.iterdir()}
    assert set(done.files) == names
    for name in names - {"config.json"}:
        assert (tmp_path / "b" / name).read_bytes() == (source / name).read_bytes()
    one, other = (json.loads((tmp_path / d / "config.json").read_text()) for d in "ab")
    assert one == other
    total = sum(done.dtypes.values())
    assert [step[1:] for step in seen] == [(n, total) for n in range(1, total + 1)]


def test_dtypes_and_shards(folder, tmp_path, capsys):
    edit_config = json.loads((folder / "config.json").read_text())
    assert edit_config["dtype"] == "float32"
    arguments = ["--dtype", "bfloat16", "--max-shard-size", "20kB"]
    assert call(capsys, "convert", folder, tmp_path / "half", *arguments)[0] == 0
    assert (tmp_path / "half" / "model.safetensors.index.json").exists()
    model, _ = EncoderDecoderModel.from_pretrained(tmp_path / "half", dtype="auto")
    assert str(model.dtype) == "bfloat16"
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    with open_tensors(folder) as source, open_tensors(tmp_path / "half") as half:
        assert set(source) == set(half)
        for name in source:
            assert half[name].dtype == "bfloat16"
            np.testing.assert_array_equal(half[name], source[name].astype(half[name].dtype))


def test_numbers_that_do_not_fit_are_refused(copy, tmp_path, capsys):
    def enlarge(tensors):
        name = "encoder.pooler.dense.weight"
        return tensors | {name: tensors[name] * np.float32(1e6)}

    rewrite(copy, enlarge)
    error = refused(capsys, "convert", copy, tmp_path / "out", "--dtype", "float16")
    assert "encoder.pooler.dense.weight holds numbers beyond the range of float16" in error
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_a_folder_in_use_is_kept_unless_told_otherwise(copy, folder, tmp_path, capsys):
    assert "is where the model comes from" in refused(capsys, "convert", copy, copy)
    file = tmp_path / "file"
    file.write_text("x")
    assert "is a file" in refused(capsys, "convert", folder, file)
    out = tmp_path / "out"
    out.mkdir()
    assert call(capsys, "convert", copy, out, "--max-shard-size", "20kB")[0] == 0
    (out / "notes.md").write_text("mine")
    (out / "vocab.txt").write_text("[PAD]\n")
    before = {f.name: f.read_bytes() for f in out.iterdir()}
    assert "is not empty; pass --overwrite" in refused(capsys, "convert", copy, out)
    truncated(copy)
    refused(capsys, "convert", copy, out, "--overwrite")
    assert {f.name: f.read_bytes() for f in out.iterdir()} == before
    assert call(capsys, "convert", folder, out, "--overwrite")[0] == 0
    assert (out / "SHA256SUMS").read_bytes() == (folder / "SHA256SUMS").read_bytes()
    assert {f.name for f in out.iterdir()} == {f.name for f in folder.iterdir()} | {"notes.md"}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_folder_that_cannot_be_written(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    error = refused(capsys, "convert", folder, tmp_path / "file" / "out")
    assert "cannot be written: Not a directory" in error


def test_what_the_source_lacks_is_not_made_up(copy, tmp_path):
    rewrite(copy, lambda t: {n: x for n, x in t.items() if "pooler" not in n})
    done = convert(copy, tmp_path / "out")
    assert len(done.report.fresh) == 2
    with open_tensors(tmp_path / "out") as out:
        assert not any("pooler" in name for name in out)


def test_ties_that_the_weights_deny_are_reported_and_undone(copy, tmp_path, capsys):
    def untie(tensors):
        name = "decoder.cls.predictions."
        kernel = tensors["decoder.bert.embeddings.word_embeddings.weight"] + 1
        bias = {f"{name}decoder.bias": tensors[f"{name}bias"]}
        return tensors | bias | {f"{name}decoder.weight": kernel}

    rewrite(copy, untie)
    code, out, err = call(capsys, "convert", copy, tmp_path / "out")
    assert code == 0, err
    assert err.startswith("jax-encdec: warning: ")
    assert err.count("\n") == 1
    assert "configured as tied" in out
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["decoder"]["tie_word_embeddings"] is False
    assert describe(tmp_path / "out")["problems"] == []


def test_the_module_is_a_command_too(folder, tmp_path):
    command = [sys.executable, "-m", "jax_encdec.convert", str(folder), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_memory_does_not_grow_with_the_model(tmp_path):
    # 80 MB of weights, no tensor above 4 MB.
    kind = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 10}
    part = tiny_pairs.bert(**kind)
    config = tiny_pairs.config().replace(encoder=part, decoder=part)
    shapes = EncoderDecoderModel(config).param_shapes()
    from flax.traverse_util import flatten_dict

    from jax_encdec.pretrained import write_order

    entries = write_order(config, flatten_dict(shapes))
    zeros = [(n, i, lambda i=i: np.ones(i.shape, np.float32)) for n, i, _ in entries]
    write_safetensors(tmp_path / "a", zeros)
    (tmp_path / "a" / "config.json").write_text(json.dumps(config.to_dict()))
    code = (
        "import resource, sys\n"
        "from jax_encdec.convert.convert import convert\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak(); convert(sys.argv[1], sys.argv[2]); print(peak() - before)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a"), str(tmp_path / "b")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    size = (tmp_path / "b" / "model.safetensors").stat().st_size
    assert size > 70e6
    assert int(done.stdout) * 1024 < 25e6


def test_sizes_are_parsed():
    assert [size(t) for t in ("5GB", "500 MB", "2GiB", "1.5k", "123")] == [
        5 * 10**9, 5 * 10**8, 2**31, 1500, 123,
    ]  # fmt: skip
