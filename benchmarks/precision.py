"""What bfloat16 weights cost in quality: a trained pair on held-out text, beside its float32 self.

    python benchmarks/debian_summaries.py FOLDER         # trains a pair; or take one of your own
    python benchmarks/precision.py --model FOLDER/run/model --pairs FOLDER/test.jsonl

`model.prepare(params, rows=, precision="bfloat16")` multiplies bfloat16 weights by inputs rounded
alike, with float32 sums; which products depends on the platform and on the rows, batch x beams. So
texts are generated greedily and with beams, one, a few and many rows at a time, with both kinds of
weights: how many stay the same, and how do they score against the references (sacreBLEU's chrF,
ROUGE-L of rouge-score, means over texts)? Metrics notice little where few texts change. So the
references' own log-probability is measured, too, by the same engine, made to write them token by
token. Differences come with the 95 % interval of a paired bootstrap over texts (scipy's). On a CPU
the layout of accelerators, which rounds more of a model, is tried beside the CPU's own.

PAIRS holds lines of {"source": ..., "target": ...}. Needs `pip install jax_encdec[train]`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import real_text
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import chrf
from scipy.stats import bootstrap

from jax_encdec import EncoderDecoderModel, TokenizerPair
from jax_encdec.pipeline import decode
from jax_encdec.training.batches import IGNORE, evaluation_batches
from jax_encdec.training.data_config import DataConfig
from jax_encdec.training.dataset import tokenize
from jax_encdec.training.report import environment

WEIGHTS: dict[str, dict[str, str]] = {  # options of `prepare`
    "float32": {},
    "bfloat16": {"precision": "bfloat16"},
    "bfloat16, accelerators'": {"precision": "bfloat16", "platform": "gpu"},
}
PLAIN, LOW, LOWER = WEIGHTS
CELLS = (
    *((LOW, 1, 1), (LOW, 4, 1), (LOW, 16, 1), (LOWER, 16, 1), (PLAIN, 16, 1)),
    *((LOW, 1, 4), (LOW, 16, 4), (LOWER, 16, 4), (PLAIN, 16, 4)),
)
"""Weights, batch, beams; each is held against float32, a text at a time."""
BATCH = 16  # references at a time
ROUGE, CHRF = RougeScorer(["rougeL"], use_stemmer=True), chrf.CHRF()
METRICS: dict[str, Callable[[str, str], float]] = {
    "ROUGE-L": lambda text, wanted: 100 * ROUGE.score(wanted, text)["rougeL"].fmeasure,
    "chrF": lambda text, wanted: CHRF.sentence_score(text, [wanted]).score,
}


def in_batches(function: Callable[..., Sequence[Any]], size: int, *arrays: np.ndarray) -> list[Any]:
    """What a function of so many rows makes of each row; the last batch repeats its last one."""
    found, count = [], len(arrays[0])
    for start in range(0, count, size):
        rows = np.minimum(np.arange(start, start + size), count - 1)
        found.extend(function(*(x[rows] for x in arrays)))
    return found[:count]


def compared(after: np.ndarray, before: np.ndarray, counts: np.ndarray) -> dict[str, Any]:
    """Means, each text counted so many times, and their difference, with its 95 % interval."""

    def change(a: np.ndarray, b: np.ndarray, n: np.ndarray, axis: int = -1) -> Any:
        return (n * (a - b)).sum(axis) / n.sum(axis)

    columns = after, before, counts
    options: dict[str, Any] = {"paired": True, "vectorized": True, "method": "percentile"}
    drawn = bootstrap(columns, change, **options, batch=500, rng=np.random.default_rng(0))
    return {
        "float32": float(np.average(before, weights=counts)),
        "other": float(np.average(after, weights=counts)),
        "difference": float(change(*columns)),
        "interval": [float(x) for x in drawn.confidence_interval],
    }


@partial(jax.jit, static_argnums=0)
def follow(
    model: EncoderDecoderModel, params: Any, ids: jax.Array, mask: jax.Array, labels: jax.Array
) -> jax.Array:
    """Mean log-probabilities `[B]` of the tokens of references `[B, T]`, by the decode engine.

    A greedy search that may choose nothing else tells its logits from before it was forbidden.
    """
    wanted, there = jnp.maximum(labels, 0), labels != IGNORE

    def only(scores: jax.Array, context: Any) -> jax.Array:
        token = jnp.take(wanted, context.cur_len - context.prompt_length, axis=1)
        return jnp.where(jnp.arange(scores.shape[-1]) == token[:, None, None], 0.0, -jnp.inf)

    options: dict[str, Any] = {"num_beams": 1, "early_stopping": False, "output_logits": True}
    options |= {"max_length": 1 + labels.shape[1], "logits_processors": (only,)}
    out = model.generate(params, ids, attention_mask=mask, **options)
    logits: Any = out.logits  # of the start token first
    logits = jax.nn.log_softmax(logits[:, 1 : 1 + labels.shape[1]])  # [B, T, V]
    found = jnp.take_along_axis(logits, wanted[..., None], axis=-1)[..., 0]
    return jnp.sum(found, axis=1, where=there) / jnp.sum(there, axis=1)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Generate, score, compare: the record."""
    began = time.monotonic()
    model, params = EncoderDecoderModel.from_pretrained(args.model)
    tokenizers = TokenizerPair.from_pretrained(args.model)
    lines = args.pairs.read_bytes().splitlines()
    apart = max(1, len(lines) // args.texts)  # Files are often sorted.
    pairs = [json.loads(line) for line in lines[::apart][: args.texts]]
    limits = DataConfig(max_source_length=args.source_tokens, max_target_length=args.target_tokens)
    data = tokenize(pairs, tokenizers, limits, "test", model=model)
    references = [record.target for record in data.records()]
    whole = next(evaluation_batches(data, len(data), max_shapes=1))
    ids, mask, labels = (whole[name] for name in ("input_ids", "attention_mask", "labels"))

    @cache
    def texts(weights: str, batch: int, beams: int) -> list[str]:
        ready: Any = model.prepare(params, rows=batch * beams, **WEIGHTS[weights])

        def made(ids: np.ndarray, mask: np.ndarray) -> list[str]:
            options: dict[str, Any] = {"num_beams": beams, "early_stopping": beams > 1}
            out = model.generate(ready, ids, attention_mask=mask, **options)
            return [decode(tokenizers.target, row) for row in np.asarray(out.sequences)]

        return in_batches(made, batch, ids, mask)

    generated = []
    for weights, batch, beams in CELLS:
        made, plain = texts(weights, batch, beams), texts(PLAIN, 1, beams)
        rows = list(zip(made, plain, references, strict=True))
        changed = [{"this": a, "float32": b, "reference": r} for a, b, r in rows if a != b]
        cell: dict[str, Any] = {"weights": weights, "batch": batch, "beams": beams}
        cell |= {"same": 1 - len(changed) / len(rows), "changed": changed[:3]}
        for name, metric in METRICS.items():
            scores = np.array([(metric(a, r), metric(b, r)) for a, b, r in rows])
            cell[name] = compared(*scores.T, np.ones(len(rows)))
        generated.append(cell)
        print(f"{weights}, batch {batch}, beams {beams}: {cell['same']:.1%} the same", flush=True)

    def by_score(ids: np.ndarray, mask: np.ndarray, labels: np.ndarray) -> Any:
        return model.score(params, ids, labels, attention_mask=mask, length_penalty=1).log_probs

    ways: dict[str, Any] = {f"{PLAIN}, by model.score": by_score}
    for name, options in WEIGHTS.items():
        ways[name] = partial(follow, model, model.prepare(params, rows=BATCH, **options))
    logs = {name: np.array(in_batches(f, BATCH, ids, mask, labels)) for name, f in ways.items()}
    before, tokens = logs.pop(PLAIN), np.sum(labels != IGNORE, axis=1)
    return {
        "date": datetime.date.today().isoformat(),
        **environment(),
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "texts": {"number": len(data), "fingerprint": data.fingerprint, "cut": data.cut},
        "tokens": {"source": args.source_tokens, "target": args.target_tokens},
        "generated": generated,
        "references": {name: compared(x, before, tokens) for name, x in logs.items()},
        "seconds": time.monotonic() - began,
    }


def numbers(found: dict[str, Any], digits: int) -> str:
    """Two means and their difference, as three columns."""
    low, high = (f"{x:+.{digits}f}" for x in found["interval"])
    means = f"{found['float32']:.{digits}f} | {found['other']:.{digits}f}"
    return f"{means} | {found['difference']:+.{digits}f} ({low} to {high})"


def table(found: dict[str, Any]) -> str:
    """The record as a page."""
    lines = [
        "# bfloat16 weights beside float32, by `benchmarks/precision.py`\n",
        f"{found['cpu']}, {found['device_kind']}; "
        + ", ".join(f"{name} {number}" for name, number in found["versions"].items())
        + f". {found['texts']['number']} held-out texts, a pair of {found['parameters']:,} "
        "parameters. Each against float32, a text at a time; 95 % intervals, paired bootstrap. "
        "All of it was computed here, with accelerators' layout as well, which rounds the encoder "
        "and cross-attention's keys and values, too.\n",
        "| weights | beams | batch | same texts | "
        + " | ".join(f"{name}: float32 | this | difference" for name in METRICS)
        + " |\n|---|" + "--:|" * (3 + 3 * len(METRICS)),
    ]  # fmt: skip
    for cell in found["generated"]:
        how = f"| {cell['weights']} | {cell['beams']} | {cell['batch']} | {cell['same']:.1%} | "
        lines.append(how + " | ".join(numbers(cell[name], 2) for name in METRICS) + " |")
    lines.append("\n| log-probability of references, per token | float32 | this | difference |")
    lines.append("|---|--:|--:|--:|")
    lines += [f"| {name} | {numbers(x, 5)} |" for name, x in found["references"].items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of a trained pair")
    parser.add_argument("--pairs", type=Path, required=True, help="held-out pairs, .jsonl")
    parser.add_argument("--texts", type=int, default=400, help="to take of them, evenly (400)")
    parser.add_argument("--source-tokens", type=int, default=48, help="sources are cut to (48)")
    parser.add_argument("--target-tokens", type=int, default=24, help="references are cut to (24)")
    parser.add_argument("--output", type=Path, help="JSON file for the record, a .md beside it")
    args = parser.parse_args()
    found = run(args)
    print(page := table(found))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        real_text.write_json(args.output, found)
        args.output.with_suffix(".md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
