"""Decoding speed against PyTorch Transformers: cold start and steady state, interleaved.

    python benchmarks/decode.py [--sizes small,base] [--rounds 5] [--output results/...json]

Both sides load the same random BERT2BERT from the same folder and generate exactly 64 tokens, in
processes of their own that stay alive; rounds alternate between them, and what is reported is the
median and the ratio ours / PyTorch's, round by round. Cold start is a fresh process each time:
imports, loading and the first call. Two threads, pinned; a busy neighbour would slow PyTorch more
than us and flatter us, so the script measures how quiet the machine is and says so.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import resource
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

THREADS = 2
NEW_TOKENS = 64
SOURCE = 128
VOCAB = 30522
SIZES = {"small": (256, 4, 4), "base": (768, 12, 12)}  # width, layers, heads
CELLS = [(batch, beams) for batch in (1, 8) for beams in (1, 4)]


def make_pair(size: str, folder: Path) -> None:
    """Save a random pair that both sides open."""
    import jax

    from jax_encdec import BertConfig, EncoderDecoderConfig, EncoderDecoderModel

    width, layers, heads = SIZES[size]
    part = BertConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
    )
    config = EncoderDecoderConfig(
        encoder=part, decoder=part, decoder_start_token_id=101, pad_token_id=0, eos_token_id=102
    )
    model = EncoderDecoderModel(config)
    model.save_pretrained(folder, model.init_params(jax.random.key(0)))


def source(batch: int):
    """Source tokens and mask `[batch, 128]`."""
    import numpy as np

    rng = np.random.default_rng(batch)
    return rng.integers(1000, VOCAB, (batch, SOURCE)), np.ones((batch, SOURCE), np.int64)


def open_torch(folder: str):
    """A function (batch, beams) -> sequences, by PyTorch Transformers."""
    import torch
    import transformers

    torch.set_num_threads(THREADS)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.EncoderDecoderModel.from_pretrained(folder).eval()

    def run(batch: int, beams: int):
        ids, mask = source(batch)
        with torch.inference_mode():
            return model.generate(
                input_ids=torch.tensor(ids),
                attention_mask=torch.tensor(mask),
                num_beams=beams,
                do_sample=False,
                min_new_tokens=NEW_TOKENS,
                max_new_tokens=NEW_TOKENS,
            ).tolist()

    return run


def open_ours(folder: str):
    """A function (batch, beams) -> sequences, by jax_encdec."""
    from jax_encdec import EncoderDecoderModel

    model, params = EncoderDecoderModel.from_pretrained(folder)

    def run(batch: int, beams: int):
        ids, mask = source(batch)
        return model.generate(
            params,
            ids,
            attention_mask=mask,
            num_beams=beams,
            min_new_tokens=NEW_TOKENS,
            max_new_tokens=NEW_TOKENS,
        ).sequences.tolist()

    return run


OPENERS = {"pytorch": open_torch, "ours": open_ours}


def work(side: str, folder: str, pipe) -> None:
    """A process of one side: answers (batch, beams) with (seconds, sequences, peak MiB)."""
    started = time.perf_counter()
    run = OPENERS[side](folder)
    pipe.send(time.perf_counter() - started)
    while (cell := pipe.recv()) is not None:
        started = time.perf_counter()
        sequences = run(*cell)
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        pipe.send((seconds, sequences, peak))


class Side:
    """A live process of one side."""

    def __init__(self, side: str, folder: str):
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        started = time.perf_counter()
        self.process = context.Process(target=work, args=(side, folder, other), daemon=True)
        self.process.start()
        self.loaded = self.pipe.recv()
        self.ready = time.perf_counter() - started

    def run(self, cell):
        self.pipe.send(cell)
        return self.pipe.recv()

    def close(self):
        self.pipe.send(None)
        self.process.join()


def quietness() -> float:
    """Wall time over processor time of two busy processes: 1.0 on a quiet machine."""
    with multiprocessing.get_context("spawn").Pool(THREADS) as pool:
        return max(pool.map(_spin, range(THREADS)))


def _spin(_: int) -> float:
    wall, cpu = time.perf_counter(), time.process_time()
    while time.process_time() - cpu < 1.0:
        sum(range(1000))
    return (time.perf_counter() - wall) / (time.process_time() - cpu)


def measure(size: str, rounds: int, cold_rounds: int) -> dict:
    """All cells of one size."""
    with tempfile.TemporaryDirectory() as folder:
        maker = multiprocessing.get_context("spawn").Process(
            target=make_pair, args=(size, Path(folder))
        )
        maker.start()
        maker.join()
        cold = {side: [] for side in OPENERS}
        for _ in range(cold_rounds):
            for side in OPENERS:
                process = Side(side, folder)
                first, _, _ = process.run((1, 1))
                cold[side].append({"until_loaded": process.ready, "first_call": first})
                process.close()
        sides = {side: Side(side, folder) for side in OPENERS}
        cells = []
        for cell in CELLS:
            times, outputs, first = {s: [] for s in sides}, {}, {}
            for side, process in sides.items():
                first[side], outputs[side], _ = process.run(cell)
            for _ in range(rounds):
                for side, process in sides.items():
                    seconds, outputs[side], _ = process.run(cell)
                    times[side].append(seconds)
            ratios = [a / b for a, b in zip(times["ours"], times["pytorch"], strict=True)]
            width = NEW_TOKENS + 1
            same = sum(
                a[:width] == b[:width]
                for a, b in zip(outputs["ours"], outputs["pytorch"], strict=True)
            )
            tokens = cell[0] * NEW_TOKENS
            cells.append(
                {
                    "batch": cell[0],
                    "beams": cell[1],
                    "ratio": statistics.median(ratios),
                    "ratio_range": [min(ratios), max(ratios)],
                    "seconds": {s: statistics.median(t) for s, t in times.items()},
                    "tokens_per_second": {
                        s: tokens / statistics.median(t) for s, t in times.items()
                    },
                    "first_call_of_this_shape": first,
                    "rows_with_same_tokens": f"{same}/{cell[0]}",
                }
            )
            print(line(size, cells[-1]), flush=True)
        peaks = {side: process.run(CELLS[0])[2] for side, process in sides.items()}
        for process in sides.values():
            process.close()
    return {"size": size, "cold": cold, "cells": cells, "peak_mib": peaks}


def line(size: str, cell: dict) -> str:
    """One cell in words."""
    seconds = cell["seconds"]
    return (
        f"{size:5} batch {cell['batch']} beams {cell['beams']}: ours {seconds['ours']:.3f} s, "
        f"PyTorch {seconds['pytorch']:.3f} s, ratio {cell['ratio']:.2f} "
        f"({cell['ratio_range'][0]:.2f} to {cell['ratio_range'][1]:.2f}), "
        f"same tokens {cell['rows_with_same_tokens']}"
    )


def processor() -> str:
    """The processor's name."""
    try:
        for text in Path("/proc/cpuinfo").read_text().splitlines():
            if text.startswith("model name"):
                return text.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", default="small,base")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cold-rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    report = {
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "threads": THREADS,
        "python": platform.python_version(),
        "versions": {p: version(p) for p in ("jax", "flax", "torch", "transformers", "jax_encdec")},
        "task": f"BERT2BERT, float32, vocabulary {VOCAB}, {SOURCE} source, {NEW_TOKENS} new tokens",
        "wall_over_processor_time_before": quietness(),
    }
    report["results"] = [measure(s, args.rounds, args.cold_rounds) for s in args.sizes.split(",")]
    report["wall_over_processor_time_after"] = quietness()
    for result in report["results"]:
        for side, runs in result["cold"].items():
            loaded = statistics.median(r["until_loaded"] for r in runs)
            first = statistics.median(r["first_call"] for r in runs)
            print(
                f"{result['size']:5} cold {side}: {loaded:.1f} s to import and load, then "
                f"{first:.1f} s for the first call"
            )
        print(f"{result['size']:5} peak memory MiB: {result['peak_mib']}")
    noise = max(report["wall_over_processor_time_before"], report["wall_over_processor_time_after"])
    print(f"machine: {report['processor']}, {THREADS} threads, wall/processor time {noise:.2f}")
    if noise > 1.1:
        print("WARNING: the machine was busy with something else; these numbers flatter us")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
