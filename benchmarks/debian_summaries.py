"""Learning on real data, against the clock: Debian's package descriptions to one-line synopses.

    python benchmarks/debian_summaries.py FOLDER [--minutes 25] [--output RECORD.json]

A BERT2BERT starts from all-MiniLM-L6-v2 (`real_text.py` has it from PyPI), is trained by
`jax_encdec.training` for the given time, and summarises every text of the test split with beam
search. Beside its ROUGE stand that of each source's first sentence, and of the sentence that scores
best, which nobody can know without the reference. The clock counts compilation and the evaluations
under way; not what comes before, reading and tokenizing, nor the test at the end.

Synopses alone teach slowly what cross-attention is for. So the model learns to repeat the first
sentence of a description, too, where the source says so (`COPY`), from the same descriptions. The
rate is to reach zero when the time is up: a short run, which the clock counts, measures the speed.

FOLDER keeps downloads, the runs, the model and the test split. Needs `pip install
jax_encdec[train]` and apt.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import debian_text
import numpy as np
import real_text

# The recipe, found on the validation split; what was tried: results/debian-summaries-tried.md.
ENCODER_LAYERS = (0, 1, 2, 3)
DECODER_LAYERS = (0, 1)
SOURCE, TARGET = 48, 24  # most tokens to learn from, special ones included
BATCH = 12
RATE = 5e-4
CROSS_ATTENTION_FACTOR = 3.0
WARMUP = 40  # steps
COPY = "first sentence: "  # opens sources whose first sentence is the target
BUCKETS = (SOURCE,), (16, TARGET)  # lengths that sources and targets are padded to
DECODING = {
    "num_beams": 4,
    "no_repeat_ngram_size": 3,
    "early_stopping": True,
    "max_length": 32,
}

LENGTH_PENALTIES = (0.6, 0.8, 1.0, 1.3)  # of which validation texts choose one
ROUGE = ("rouge1", "rouge2", "rougeL")

PROBE = 48  # steps that measure the speed
SPARE = 0.94  # of the time is planned for: evaluations, and programs to compile, need the rest
CURVE = 6  # points of the validation curve
CURVE_ROWS = 320  # texts whose loss each of them is
SHOWN = 10

LARGE_PAGES = ":".join(
    f"glibc.malloc.{name}={value}"
    for name, value in (
        ("hugetlb", 1),
        ("mmap_max", 0),
        ("trim_threshold", 10**11),
        ("top_pad", 2**28),
    )
)

Pairs = list[tuple[str, str]]
"""Descriptions and synopses."""


# Data --------------------------------------------------------------------------------------------

_NO_PROGRAM = re.compile(
    r"\b(transitional|dummy|meta-?package|debug(ging)? symbols)\b", re.IGNORECASE
)
_NO_SECTIONS = ("debug", "metapackages", "oldlibs")


def splits(lists: Path) -> dict[str, Pairs]:
    """Pairs to learn from, to choose by and to test on, by package name.

    Two packages of a project at most, and projects stay whole: `libfoo1` and `libfoo-doc` are of
    one split. A synopsis must be a phrase that is not a part of the description, and new.
    """
    english = {}
    for path in sorted(lists.glob("*_Translation-en")):
        for record in debian_text.records(path):
            synopsis, _, text = record.get("Description-en", "").partition("\n")
            english[record.get("Description-md5", "")] = (synopsis.strip(), paragraphs(text))
    packages = [r for path in sorted(lists.glob("*_Packages")) for r in debian_text.records(path)]

    parts: dict[str, Pairs] = {"train": [], "validation": [], "test": []}
    seen: tuple[set[str], set[str]] = (set(), set())
    taken = collections.Counter()
    for package in sorted(packages, key=lambda record: record["Package"]):
        project = package.get("Source", package["Package"]).split()[0]
        target, source = english.get(package.get("Description-md5", "none"), ("", ""))
        if package.get("Section", "").split("/")[-1] in _NO_SECTIONS or taken[project] == 2:
            continue
        lower = source.lower(), target.lower()
        words = len(source.split()), len(target.split())
        new = lower[0] not in seen[0] and lower[1] not in seen[1]
        fits = words[0] >= 20 and 3 <= words[1] <= 15 and lower[1] not in lower[0]
        if new and fits and not _NO_PROGRAM.search(source) and not _NO_PROGRAM.search(target):
            for known, text in zip(seen, lower, strict=True):
                known.add(text)
            taken[project] += 1
            parts[_split_of(project)].append((source, target))
    return parts


def _split_of(project: str) -> str:
    percent = int(hashlib.sha256(project.encode()).hexdigest()[:8], 16) % 100
    return "test" if percent < 5 else "validation" if percent < 10 else "train"


def paragraphs(text: str) -> str:
    """The lines of a description as one line per paragraph and list item."""
    found: list[list[str]] = [[]]
    for line in text.split("\n"):
        words = line.strip()
        if words in ("", "."):
            found.append([])
            continue
        if re.match(r"[*+o\-•] +\S", words):
            found.append([])
        found[-1].append(words)
    return "\n".join(" ".join(" ".join(lines).split()) for lines in found if lines)


def first_sentences(pairs: Pairs, tokenizer: Any) -> Pairs:
    """Descriptions, marked, with their own first sentences, where these fit whole."""
    from jax_encdec.training.scores import lead_baseline

    sources = [source for source, _ in pairs]
    leads = lead_baseline(sources)
    lengths = map(len, tokenizer.encode(leads))
    return [
        (COPY + source, lead)
        for source, lead, length in zip(sources, leads, lengths, strict=True)
        if length <= TARGET
    ]


# Start -------------------------------------------------------------------------------------------


def pair(minilm: Path) -> tuple[Any, Any]:
    """A pair of the encoder's layers: the model and its parameters.

    MiniLM's last two layers, made for whole sentences, no longer tell which word stood where, and
    are left out. Cross-attention starts as the self-attention before it.
    """
    from jax_encdec import warm_start
    from jax_encdec.execution import Execution
    from jax_encdec.training.models import with_dropout

    joined = warm_start.join(
        minilm,
        minilm,
        encoder_layers=ENCODER_LAYERS,
        decoder_layers=DECODER_LAYERS,
        cross_attention="self",
    )
    # Straight-line layers are faster on CPU, and a pass or two over the data need no dropout.
    config = with_dropout(joined.model.config, 0.0)
    return joined.model.clone(config=config, execution=Execution(scan_layers=False)), joined.params


def with_ready_head(params: Any, targets: np.ndarray) -> Any:
    """The parameters with a head that can copy; no checkpoint held one.

    It starts as nearly the identity (GELU is straight around zero, and the norm undoes the scale),
    so that states meet the word embeddings at once, and with the frequencies of the words in
    `targets`, token ids, as its bias.
    """
    import jax

    head = params["decoder"]["head"]
    width, vocabulary = len(head["transform"]["bias"]), len(head["bias"])
    bias = np.log(np.bincount(targets, minlength=vocabulary) + 0.05)
    ready = {
        "transform": {"kernel": 0.1 * np.eye(width), "bias": np.zeros(width)},
        "norm": {"scale": np.full(width, 0.5), "bias": np.zeros(width)},
        "bias": bias - bias.mean(),
    }
    ready = jax.tree.map(lambda new, old: new.astype(old.dtype), ready, head)
    return {**params, "decoder": {**params["decoder"], "head": ready}}


# Training ----------------------------------------------------------------------------------------


def configuration(
    folder: Path, seed: int, *, steps: int, minutes: float = 1.0, curve: bool = False
) -> Any:
    """The whole run but model and data, which are passed beside it."""
    from jax_encdec.training.config import (
        DataConfig,
        EvaluationConfig,
        RunConfig,
        TrainingConfig,
    )
    from jax_encdec.training.optimizer_config import Group, OptimizerConfig

    return TrainingConfig(
        data=DataConfig(
            batch_size=BATCH,
            max_source_length=SOURCE,
            max_target_length=TARGET,
            source_buckets=BUCKETS[0],
            target_buckets=BUCKETS[1],
        ),
        optimizer=OptimizerConfig(
            name="adamw",
            learning_rate=RATE,
            warmup_steps=min(WARMUP, steps // 2),
            schedule="linear",
            weight_decay=0.01,
            b2=0.98,
            clip_norm=1.0,
            groups=(
                Group(name="words", pattern="*/embedding/token", frozen_steps=-1),
                Group(
                    name="cross-attention",
                    pattern="decoder/*/cross_attention",
                    factor=CROSS_ATTENTION_FACTOR,
                ),
            ),
        ),
        run=RunConfig(
            output=str(folder),
            overwrite=True,
            steps=steps,
            max_minutes=minutes,
            seed=seed,
            log_every=20,
            evaluate_every=max(1, steps // CURVE) if curve else 0,
            save_every=None,
            keep=1,
            keep_best=0,
            final="last",
            progress=sys.stderr.isatty(),
        ),
        evaluation=EvaluationConfig(samples=0, metrics=("rouge",), **DECODING),
    )


def run(folder: Path, minutes: float, steps: int | None, seed: int, rows: int | None) -> Any:
    """Fetch, train, test: the record."""
    import jax

    from jax_encdec.tokenization import TokenizerPair
    from jax_encdec.training.dataset import tokenize
    from jax_encdec.training.evaluation import evaluate
    from jax_encdec.training.loop import train
    from jax_encdec.training.report import environment

    # The programs that the short run compiles serve the long one.
    jax.config.update("jax_compilation_cache_dir", str((folder / "compiled").resolve()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

    minilm = real_text.weights(folder)
    lists = debian_text.fetch(folder / "apt", ("en",))
    parts = splits(lists)
    sizes = {name: len(part) for name, part in parts.items()}
    print(", ".join(f"{size} to {name}" for name, size in sizes.items()), flush=True)
    tests = [json.dumps({"source": text, "target": synopsis}) for text, synopsis in parts["test"]]
    (folder / "test.jsonl").write_text("\n".join(tests) + "\n")  # for precision.py
    # They are ordered by name, and the first ones are not like the rest.
    parts["curve"] = parts["validation"][:: len(parts["validation"]) // CURVE_ROWS]
    parts["test"] = parts["test"][:rows]
    model, params = pair(minilm)
    tokenizers = TokenizerPair.from_pretrained(minilm)
    copies = first_sentences(parts["train"], tokenizers.source)
    parts["both"] = parts["train"] + copies
    limits = configuration(folder, seed, steps=1).data
    data = {n: tokenize(part, tokenizers, limits, model=model) for n, part in parts.items()}
    params = with_ready_head(params, data["train"].target.values)

    def fit(name: str, steps: int, seconds: float, validation: Any = None) -> Any:
        drawn = validation is not None
        return train(
            configuration(folder / name, seed, steps=steps, minutes=seconds / 60, curve=drawn),
            model=model,
            params=params,
            tokenizers=tokenizers,
            train_data=data["both"],
            validation_data=validation,
        )

    began = time.monotonic()
    left = 60 * minutes
    if steps is None:
        each = seconds_per_step(fit("probe", PROBE, left).folder)
        left -= time.monotonic() - began
        steps = max(PROBE, int(SPARE * left / each))
        print(f"{each:.3f} s per step: {steps} steps in the {left:.0f} s left", flush=True)
    result = fit("run", steps, left, data["curve"])
    lines = metrics(result.folder)
    trained = minutes - left / 60 + max(line.get("elapsed_seconds", 0.0) for line in lines) / 60

    def scored(part: str, penalty: float) -> Any:
        decoding = configuration(folder, seed, steps=1).evaluation
        decoding = dataclasses.replace(decoding, length_penalty=penalty)
        return evaluate(model, result.params, tokenizers, data[part], decoding)

    chosen_by = {}
    for penalty in LENGTH_PENALTIES:
        scores = scored("curve", penalty).scores
        chosen_by[penalty] = {name: scores[name] for name in ROUGE}
        print(f"validation, length_penalty {penalty}: {listed(scores)}", flush=True)
    penalty = max(chosen_by, key=lambda key: sum(chosen_by[key].values()))
    tested = scored("test", penalty)
    apart = max(1, len(data["test"]) // SHOWN)
    return {
        "date": datetime.date.today().isoformat(),
        **environment(),
        "weights": real_text.PACKAGE,
        "texts": {"of": debian_text.release(lists), **sizes},
        "seed": seed,
        "options": {
            "encoder_layers": ENCODER_LAYERS,
            "decoder_layers": DECODER_LAYERS,
            "source_tokens": SOURCE,
            "target_tokens": TARGET,
            "batch": BATCH,
            "rate": RATE,
            "cross_attention_factor": CROSS_ATTENTION_FACTOR,
            "decoding": {**DECODING, "length_penalty": penalty},
            "allocator": os.environ.get("GLIBC_TUNABLES"),
        },
        "minutes": {
            "asked": minutes,
            "trained": trained,
            "to measure the speed": minutes - left / 60,
        },
        "steps": {"planned": steps, "taken": result.step, "stopped": result.stopped},
        "rows": {"seen": result.step * BATCH, "synopses": sizes["train"], "copies": len(copies)},
        "curve": {
            "train": curve(lines, "train"),
            "validation": curve(lines, "evaluate"),
        },
        "validation": chosen_by,
        "test": tested.to_dict() | {"intervals": dict(tested.intervals)},
        "samples": [tested.predictions[i]._asdict() for i in range(0, len(data["test"]), apart)],
    }


def listed(scores: Mapping[str, float], prefix: str = "") -> str:
    """ROUGE-1, -2 and -L, in columns."""
    return "".join(f"{scores[prefix + name]:8.2f}" for name in ROUGE)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def curve(lines: list[dict[str, Any]], kind: str) -> list[tuple[int, float]]:
    """Step and loss of each line of a kind."""
    return [(line["step"], line["loss"]) for line in lines if line["kind"] == kind]


def seconds_per_step(folder: Path) -> float:
    """Of a run, without compilation."""
    lines = [line for line in metrics(folder) if line["kind"] == "train"]
    return sum(line["seconds"] for line in lines) / sum(line["steps"] for line in lines)


# The command -------------------------------------------------------------------------------------


def with_large_pages() -> None:
    """Begin this program anew with glibc set to keep what is freed, in large pages.

    XLA asks for its buffers anew at each step; that the kernel clears them page by page took a
    sixth of the time. glibc reads this once, before the program.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        environment = os.environ | {"GLIBC_TUNABLES": LARGE_PAGES}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def main() -> None:
    """Train, test, and print scores beside the baselines' and some predictions."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="keeps downloads, the run and the model")
    parser.add_argument("--minutes", type=float, default=25.0, help="of training (25)")
    parser.add_argument("--steps", type=int, help="to take, instead of as time allows")
    parser.add_argument("--rows", type=int, help="texts to test on, by default all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file for the record")
    args = parser.parse_args()
    with_large_pages()
    args.folder.mkdir(parents=True, exist_ok=True)
    record = run(args.folder, args.minutes, args.steps, args.seed, args.rows)
    for sample in record["samples"]:
        print(f"\n{sample['source'][:300]}\n  wanted: {sample['reference']}")
        print(f"  made:   {sample['prediction']}")
    seen, minutes = record["rows"]["seen"], record["minutes"]["trained"]
    print(f"\n{record['test']['predictions']} texts, after {seen} rows in {minutes:.1f} minutes")
    print(f"{'ROUGE':24}{'1':>8}{'2':>8}{'L':>8}")
    for title, prefix in (
        ("this model", ""),
        ("first sentence", "lead_"),
        ("best sentence", "best_sentence_"),
    ):
        print(f"{title:24}{listed(record['test'], prefix)}")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        real_text.write_json(args.output, record)


if __name__ == "__main__":
    main()
