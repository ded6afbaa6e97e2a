"""Files of any size: in order, no line lost or doubled whatever kills the process, few programs."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
import tiny_pairs
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_encdec import EncoderDecoderModel, GenerationConfig, InputError, Text2TextPipeline
from jax_encdec import file_generation as fg
from jax_encdec.cli import main
from jax_encdec.decoding.programs import compiled_programs
from jax_encdec.pipeline import TextError
from jax_encdec.prediction_files import PredictionFile, Printed, rows
from jax_encdec.text_files import Record, TextFile
from jax_encdec.tokenization import LADDER

CHILD = Path(__file__).with_name("generating_child.py")
TEXTS = list(tiny_pairs.texts(60))


@pytest.fixture(scope="module")
def pipe() -> Text2TextPipeline:
    model, params = tiny_pairs.pair()
    return Text2TextPipeline(model, params, tiny_pairs.tokenizers())


@pytest.fixture(scope="module")
def predictions(pipe) -> list[str]:
    return pipe(TEXTS)


@pytest.fixture
def small_windows(monkeypatch) -> None:
    monkeypatch.setattr(fg, "WINDOW", 3)  # of 3 x 4 texts


def write(path: Path, texts=TEXTS) -> Path:
    path.write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def beside(path: Path) -> list[str]:
    """What there is beside a file."""
    return sorted(p.name for p in path.parent.iterdir() if p.name.startswith(path.name + "."))


@pytest.mark.usefixtures("small_windows")
def test_predictions_are_in_the_order_of_the_texts(pipe, predictions, tmp_path):
    source, out = write(tmp_path / "in.txt"), tmp_path / "out.jsonl"
    done = pipe.generate_file(source, out, batch_size=4)
    assert read(out) == [
        {"source": s, "prediction": p} for s, p in zip(TEXTS, predictions, strict=True)
    ]
    assert (done.texts, done.resumed) == (60, 0)
    assert done.tokens == 60 * 12  # This random model ends no text before its time.
    assert beside(out) == []


@pytest.mark.usefixtures("small_windows")
def test_what_is_drawn_does_not_depend_on_batches_or_files(pipe, tmp_path):
    source, out = write(tmp_path / "in.txt"), tmp_path / "out.jsonl"
    options = {"do_sample": True, "num_return_sequences": 2, "key": jax.random.key(3)}
    pipe.generate_file(source, out, batch_size=4, **options)
    assert [row["prediction"] for row in read(out)] == pipe(TEXTS, **options)


def test_a_thousand_texts_compile_no_more_programs_than_there_are_rungs(tmp_path):
    positions = 96
    config = tiny_pairs.config().replace(
        encoder=tiny_pairs.bert(max_position_embeddings=positions), decoder=tiny_pairs.bert()
    )
    model = EncoderDecoderModel(config, GenerationConfig(max_new_tokens=3))
    pipe = Text2TextPipeline(model, model.init_params(jax.random.key(0)), tiny_pairs.tokenizers())
    rng = random.Random(0)
    texts = ["1 " * rng.randint(1, positions - 2) for _ in range(1000)]
    assert max(len(ids) for ids in pipe.encode(texts)) == positions
    source = write(tmp_path / "in.txt", texts)
    pipe(["1"])  # What happens to be compiled by the first call of all, eagerly.
    compiled = []

    def listener(name, *_, fun_name="", **__):
        if "backend_compile" in name:
            compiled.append(fun_name)

    before = len(compiled_programs())
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        done = pipe.generate_file(source, tmp_path / "out.txt", batch_size=8)
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert done.texts == 1000
    rungs = [rung for rung in LADDER if rung <= positions]
    assert [program.source_length for program in compiled_programs()[before:]] == rungs[::-1]
    # Beside them, what brings the weights into the layout of inference, once; and nothing else.
    assert compiled.count("jit(_generate)") == len(rungs)
    assert len(compiled) <= len(rungs) + 1, compiled


@pytest.mark.usefixtures("small_windows")
def test_no_more_than_a_few_windows_are_held(pipe):
    texts = TEXTS * 5
    taken = 0

    class Counted:
        def __iter__(self):
            nonlocal taken
            for taken, text in enumerate(texts, 1):
                yield Record(text, f"text {taken}")

    class Watched(Printed):
        ahead = 0

        def commit(self, window, sources, results):
            super().commit(window, sources, results)
            self.ahead = max(self.ahead, taken - self.done)

    sink = Watched(io.StringIO())
    pipe.generate_records(Counted(), sink, batch_size=4)
    assert sink.done == len(texts) == 300
    # Batches made ahead, one in the thread's hands, and the window it is taken from.
    assert 0 < sink.ahead <= (fg._AHEAD + 1) * 4 + 3 * 4


# Killed ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_pairs.save(tmp_path_factory.mktemp("models") / "pair")


def test_killed_at_random_moments_it_comes_to_the_same_bytes(folder, tmp_path, predictions):
    source, out, whole = write(tmp_path / "in.txt"), tmp_path / "o.csv", tmp_path / "whole.csv"
    environment = os.environ | {
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs"),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }

    def start(output: Path, pause: float) -> subprocess.Popen:
        arguments = ["generate", "--model", folder, "--input", source, "--output", output]
        arguments += ["--batch-size", "4"]
        command = [sys.executable, CHILD, pause, 3, *arguments]
        return subprocess.Popen(
            list(map(str, command)), env=environment, stderr=subprocess.PIPE, text=True
        )

    process = start(whole, 0)
    _, err = process.communicate()
    assert process.returncode == 0, err
    rng = random.Random()
    seen = []
    for target in (0.1, 0.4, 0.7):  # of the way, and a bit: between and within windows
        process = start(out, 0.03)
        while process.poll() is None and sum(size(tmp_path, out)) < target * whole.stat().st_size:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.06))
        process.send_signal(signal.SIGKILL)
        _, err = process.communicate()
        assert process.returncode == -signal.SIGKILL, err
        assert not out.exists()
        seen.append(size(tmp_path, out)[0])
    assert seen == sorted(seen)
    assert seen[-1] > 0
    process = start(out, 0)
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert "60 predictions" in err
    assert "of them by an earlier run" in err
    assert out.read_bytes() == whole.read_bytes()
    assert beside(out) == []
    assert [row["prediction"] for row in csv_rows(out)] == predictions


def size(folder: Path, out: Path) -> tuple[int, int]:
    """Bytes of what stands beside an unfinished output."""
    found = []
    for name in (f"{out.name}.partial", f"{out.name}.partial.journal"):
        try:
            found.append((folder / name).stat().st_size)
        except FileNotFoundError:
            found.append(0)
    return found[0], found[1]


def csv_rows(path: Path) -> list[dict[str, str]]:
    import csv

    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.usefixtures("small_windows")
def test_interrupted_it_says_how_to_go_on(folder, predictions, tmp_path, monkeypatch, capsys):
    source, out = write(tmp_path / "in.txt"), tmp_path / "o.txt"
    arguments = ["generate", "--model", folder, "--input", source, "--output", out]
    arguments = list(map(str, [*arguments, "--batch-size", 4]))
    run, runs = Text2TextPipeline.run, 0

    def interrupted(*given):
        nonlocal runs
        runs += 1
        if runs == 6:
            raise KeyboardInterrupt
        return run(*given)

    monkeypatch.setattr(Text2TextPipeline, "run", interrupted)
    assert main(arguments) == 130
    err = capsys.readouterr().err
    assert f"what is done is kept in {out}.partial; the same command goes on" in err
    assert main(arguments) == 0
    assert "60 predictions" in capsys.readouterr().err
    assert runs < 6 + 15  # Not all 15 batches again.
    assert out.read_text().splitlines() == predictions


class Died(BaseException):
    """As if the process had been killed: nothing is cleaned up."""


@settings(max_examples=60, deadline=None)
@given(data=st.data(), kind=st.sampled_from(["jsonl", "csv", "txt"]))
def test_dead_at_any_write_it_goes_on_where_it_was(data, kind, tmp_path_factory):
    """Without a model: what a process leaves when it dies at any point, torn writes included."""
    folder = tmp_path_factory.mktemp("dead")
    texts = [f"text {i} é" for i in range(data.draw(st.integers(1, 13)))]
    window, batch = 4, 2
    out = folder / f"out.{kind}"

    def work(path: Path, die_at: int) -> int:
        """Predict from where it stands, and die after `die_at` steps; return the steps taken."""
        steps = 0

        def step():
            nonlocal steps
            steps += 1
            if steps > die_at:
                sink._close_files()  # As the system does.
                raise Died

        sink = PredictionFile(path, {"options": {"a": 1}})
        sink.resume(f"{sink.done}" if sink.done else "")
        for first in range(sink.done, len(texts), window):
            chunk = texts[first : first + window]
            digest = f"{first + len(chunk)}"
            results = sink.found(digest)
            for start in range(0, len(chunk), batch):
                numbers = range(first + start, min(first + start + batch, first + len(chunk)))
                if all(n in results for n in numbers):
                    continue
                step()
                made = {n: [f"of {texts[n]}\n{n}"] for n in numbers}
                sink.add(digest, made)
                results |= made
            step()
            sink.commit(digest, chunk, [results[first + i] for i in range(len(chunk))])
        step()
        sink.finish()
        return steps

    whole = folder / f"whole.{kind}"
    total = work(whole, 10**6)
    for _ in range(data.draw(st.integers(1, 3))):
        try:
            work(out, data.draw(st.integers(0, total)))
        except Died:
            partial, journal = (folder / name for name in beside(out))
            if data.draw(st.booleans()):  # The line that was being written.
                lines = journal.read_bytes()
                tail = lines[:-1].rfind(b"\n") + 1
                torn = data.draw(st.integers(0, len(lines) - tail))
                journal.write_bytes(lines[: tail + torn] if tail else lines)
            if data.draw(st.booleans()):
                with open(partial, "ab") as file:
                    file.write(data.draw(st.binary(max_size=20)))
        else:
            break
    else:
        work(out, 10**6)
    assert out.read_bytes() == whole.read_bytes()
    assert beside(out) == []
    shutil.rmtree(folder)


# Refused -----------------------------------------------------------------------------------------


@pytest.fixture
def begun(pipe, tmp_path, small_windows) -> tuple[Path, Path]:
    """Input and output of a run that met a text too long after two windows."""
    source, out = tmp_path / "in.txt", tmp_path / "out.jsonl"
    write(source, [*TEXTS[:30], "1 " * 60, *TEXTS[31:]])
    with pytest.raises(TextError, match=r"in.txt, line 31 has 62 tokens, the limit is 48"):
        pipe.generate_file(source, out, batch_size=4)
    assert len(read(tmp_path / "out.jsonl.partial")) == 24
    return source, out


def test_a_text_too_long_ends_the_run_and_what_was_done_is_kept(pipe, predictions, begun):
    source, out = begun
    done = pipe.generate_file(source, out, batch_size=4, truncation=True)
    assert (done.texts, done.resumed) == (60, 24)
    made = [row["prediction"] for row in read(out)]
    assert made[:30] == predictions[:30]
    assert made[31:] == predictions[31:]


def test_a_text_mended_further_on_is_no_other_input(pipe, predictions, begun):
    source, out = begun
    write(source)
    assert pipe.generate_file(source, out, batch_size=4).resumed == 24
    assert [row["prediction"] for row in read(out)] == predictions


def test_another_run_is_refused_and_begins_anew_when_told(pipe, predictions, begun, tmp_path):
    source, out = begun
    for options, message in (
        ({"batch_size": 8}, r"begun with batch_size 4, not 8; repeat that command .* restart=True"),
        ({"num_beams": 2}, r"begun with num_beams null, not 2"),
        ({"do_sample": True, "key": jax.random.key(0)}, r"begun with key null, not \[0, 0\]"),
    ):
        with pytest.raises(InputError, match=message):
            pipe.generate_file(source, out, **({"batch_size": 4} | options))
    model, params = tiny_pairs.pair()
    other = Text2TextPipeline(
        model, jax.tree.map(lambda x: x + 1e-6, params), tiny_pairs.tokenizers()
    )
    with pytest.raises(InputError, match="begun with another model"):
        other.generate_file(source, out, batch_size=4)
    write(source, ["another", *TEXTS[1:]])
    with pytest.raises(InputError, match="another input: its first 24 texts"):
        pipe.generate_file(source, out, batch_size=4)
    write(source, TEXTS[:20])
    with pytest.raises(InputError, match="another input: its first 24 texts"):
        pipe.generate_file(source, out, batch_size=4)
    assert len(read(tmp_path / "out.jsonl.partial")) == 24
    assert pipe.generate_file(source, out, batch_size=4, restart=True).resumed == 0
    assert [row["prediction"] for row in read(out)] == predictions[:20]


def test_damaged_sidecars_are_named(pipe, begun):
    source, out = begun
    partial, journal = (out.with_name(name) for name in beside(out))
    content, lines = partial.read_bytes(), journal.read_bytes()
    partial.write_bytes(content[:-1])
    with pytest.raises(InputError, match=r"partial is shorter than its journal says"):
        pipe.generate_file(source, out, batch_size=4)
    partial.write_bytes(content)
    for damaged in (b"", b"{}\n", b"\xff\n", b"[]\n", lines + b"5\n"):
        journal.write_bytes(damaged)
        with pytest.raises(InputError, match=r"journal is damaged; pass restart=True"):
            pipe.generate_file(source, out, batch_size=4)
    journal.unlink()
    with pytest.raises(InputError, match="is there without its journal"):
        pipe.generate_file(source, out, batch_size=4)
    assert partial.read_bytes() == content


def test_two_processes_do_not_write_one_file(tmp_path):
    out = tmp_path / "out.txt"
    with PredictionFile(out, {}) as sink:
        sink.add("w", {0: ["a"]})
        with pytest.raises(InputError, match="another process is writing it"):
            PredictionFile(out, {})
        assert len(beside(out)) == 2
    with PredictionFile(out, {}) as sink:
        assert sink.found("w") == {0: ["a"]}


def test_killed_before_its_journal_was_removed_it_begins_anew(tmp_path):
    out = tmp_path / "out.txt"
    for _ in range(2):
        with PredictionFile(out, {}) as sink:
            assert sink.done == 0
            sink.commit("w", ["a"], [["b"]])
            left = sink.journal.read_bytes()
            sink.finish()
        sink.journal.write_bytes(left)
    assert out.read_text() == "b\n"


def test_malformed_lines_are_named_before_anything_is_run(tmp_path, capsys):
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "a"}\n' * 5000 + '{"text": 5}\n')
    arguments = ["--model", "absent", "--input", source, "--output", tmp_path / "o.jsonl"]
    assert main(["generate", *map(str, arguments)]) == 2
    assert "in.jsonl, line 5001: the text must be a string; got int" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]
    source.write_text('{"text": "\\ud800"}\n')
    with pytest.raises(InputError, match="line 1 is not valid Unicode"):
        list(TextFile(source))


def test_the_first_window_refused_leaves_nothing(pipe, tmp_path):
    source, out = write(tmp_path / "in.txt", ["1 May", "1 " * 60]), tmp_path / "out.jsonl"
    with pytest.raises(TextError, match="line 2 has 62 tokens"):
        pipe.generate_file(source, out)
    assert [p.name for p in tmp_path.iterdir()] == ["in.txt"]


# To a stream, with a bar -------------------------------------------------------------------------


@pytest.mark.usefixtures("small_windows")
def test_a_stream_gets_windows_and_a_bar_says_how_fast(pipe, predictions, tmp_path, capsys):
    out = io.StringIO()
    source = TextFile(write(tmp_path / "in.txt"))
    pipe.generate_records(source, Printed(out), batch_size=4, total=60, progress=True)
    assert out.getvalue() == rows(".txt", TEXTS, [[p] for p in predictions], True)
    err = capsys.readouterr().err
    assert "60/60" in err
    assert "tokens/s" in err
