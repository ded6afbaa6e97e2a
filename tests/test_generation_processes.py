"""Generation by a job of several processes: one mesh over all, one file, the results of one."""

from __future__ import annotations

import ast
import json
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_pairs
from processes import Job

from jax_encdec import Text2TextPipeline
from jax_encdec.training import distributed

CHILD = Path(__file__).with_name("generating_child.py")
TEXTS = list(tiny_pairs.texts(40))
IDS = np.random.default_rng(5).integers(5, 40, (4, 6)).tolist()
SEARCHES = [
    {"num_beams": 3, "num_return_sequences": 2},
    {"do_sample": True, "top_k": 20},
    {"max_time": 600.0},
]
FROM_PYTHON = """
import ast, sys
import jax
import numpy as np
from jax_encdec import Text2TextPipeline
from jax_encdec.training.distributed import initialize

assert initialize()
folder, mesh, ids, searches = sys.argv[1:]
pipe = Text2TextPipeline.from_pretrained(folder, mesh=mesh)
ids = np.array(ast.literal_eval(ids))
for options in ast.literal_eval(searches):
    key = jax.random.key(3) if options.get("do_sample") else None
    print(np.asarray(pipe.model.generate(pipe.params, ids, key=key, **options).sequences).tolist())
*_, last = pipe.model.stream(pipe.params, ids, num_beams=3)
print(np.asarray(last.output.sequences).tolist())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_pairs.save(tmp_path_factory.mktemp("models") / "pair")


@pytest.fixture(scope="module")
def pipe() -> Text2TextPipeline:
    model, params = tiny_pairs.pair()
    return Text2TextPipeline(model, params, tiny_pairs.tokenizers())


def test_every_process_gets_what_one_alone_would(folder, pipe, tmp_path):
    command = [sys.executable, "-c", FROM_PYTHON, str(folder), "replica=2,tensor=2"]
    with Job(tmp_path, [*command, str(IDS), str(SEARCHES)], count=2, devices=2) as job:
        job.end()
        said = [
            [ast.literal_eval(line) for line in job.output(n).splitlines() if line.startswith("[[")]
            for n in range(2)
        ]
    expected = []
    for options in (*SEARCHES, {"num_beams": 3}):
        key = jax.random.key(3) if options.get("do_sample") else None
        out = pipe.model.generate(pipe.params, np.array(IDS), key=key, **options)
        expected.append(np.asarray(out.sequences).tolist())
    assert said == [expected, expected]


def test_a_job_writes_one_file_and_goes_on_after_a_kill(folder, pipe, tmp_path):
    """Both processes generate, the first one writes; killed, the job goes on where it was."""
    source, out = tmp_path / "in.txt", tmp_path / "out.jsonl"
    source.write_text("".join(text + "\n" for text in TEXTS))
    arguments = ["generate", "--model", folder, "--input", source, "--output", out]
    arguments += ["--batch-size", "4"]

    def job(pause: float) -> Job:
        command = [sys.executable, CHILD, pause, 3, *arguments]
        return Job(tmp_path, list(map(str, command)), count=2, devices=2)

    journal = Path(f"{out}.partial.journal")
    with job(0.05) as first:
        first.until(lambda: journal.exists() and written(journal))
        first.processes[0].send_signal(signal.SIGKILL)
        first.processes[1].wait(30)
        assert first.processes[1].returncode in (distributed.EXIT_PEER_LOST, -signal.SIGABRT)
    assert not out.exists()
    with job(0) as second:
        second.end()
        assert "40 predictions" in second.errors(0)
        assert "of them by an earlier run" in second.errors(0)
        assert "predictions" not in second.errors(1)
    made = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["source"] for line in made] == TEXTS
    assert [line["prediction"] for line in made] == pipe(TEXTS)
    assert [path.name for path in tmp_path.glob("out.jsonl*")] == [out.name]


def written(journal: Path) -> int:
    """How many texts are safe, as a journal says."""
    return json.loads(journal.read_text().splitlines()[0])["texts"]


def test_all_processes_say_why_a_file_cannot_be_written(folder, tmp_path):
    source, out = tmp_path / "in.txt", tmp_path / "out.txt"
    source.write_text("a text\n")
    Path(f"{out}.partial").write_text("of somebody else\n")
    command = ["generate", "--model", folder, "--input", source, "--output", out]
    run = [sys.executable, "-m", "jax_encdec", *map(str, command)]
    with Job(tmp_path, run, count=2, devices=1) as job:
        job.end(2)
        for n in range(2):
            assert "out.txt.partial is there without its journal" in job.errors(n)
            assert "--restart" in job.errors(n)
            assert "Traceback" not in job.errors(n)
