"""A training step against PyTorch Transformers: forward, backward, clipping, AdamW; interleaved.

    python benchmarks/train_step.py [--sizes small,base] [--rounds 7] [--output results/...json]

Both sides load the same random BERT2BERT from the same folder and take the same steps on the same
batches, in processes of their own that stay alive; rounds alternate between them, and what is
reported is the median and the ratio ours / PyTorch's, round by round. Compiling is timed apart.
Ours is what `make_train_step` and `make_optimizer` give; PyTorch's is the model in training mode
with its default attention, gradients clipped and AdamW, fused or foreach, whichever proves faster.
Losses are compared, so that both are known to do the same work. Two threads, pinned, and a check
of how quiet the machine is, as in `decode.py`.

Both sides have the same memory allocator: by default with freed memory kept, as `jax-encdec train`
has it (PyTorch gains by it as well); with `--allocator default`, as the system comes.
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
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from decode_machine import THREADS, processor, quietness

SIZES = {"small": (256, 4, 4), "base": (768, 12, 12)}
"""Width, layers, heads."""
VOCAB = 30522
SOURCE, TARGET = 128, 64
BATCH = {"small": 8, "base": 4}
STEPS = {"small": 8, "base": 2}
"""Steps of one round."""
RATE, DECAY, CLIP = 1e-4, 0.01, 1.0


def make_pair(dropout: float, folder: Path, shape: tuple[int, int, int]) -> None:
    """Save a random pair of this width, layers and heads, that all sides open."""
    import jax

    from jax_encdec import BertConfig, EncoderDecoderConfig, EncoderDecoderModel

    width, layers, heads = shape
    part = BertConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    config = EncoderDecoderConfig(
        encoder=part, decoder=part, decoder_start_token_id=101, pad_token_id=0, eos_token_id=102
    )
    model = EncoderDecoderModel(config)
    model.save_pretrained(folder, model.init_params(jax.random.key(0)))


def batch_of(size: str, step: int) -> dict[str, Any]:
    """Batch number `step`, `[rows, 128]` and `[rows, 64]`: no pads, every target counts."""
    import numpy as np

    rng = np.random.default_rng(step)
    ids = rng.integers(1000, VOCAB, (BATCH[size], SOURCE)).astype(np.int32)
    labels = rng.integers(1000, VOCAB, (BATCH[size], TARGET)).astype(np.int32)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": labels}


def open_torch(folder: str, size: str):
    """A function of the step's number that takes the step and returns its loss, by PyTorch."""
    import torch
    import transformers

    torch.set_num_threads(THREADS)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.EncoderDecoderModel.from_pretrained(folder).train()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]

    def optimizer(kind: str):
        return torch.optim.AdamW(groups, lr=RATE, eps=1e-8, **{kind: True})

    def step(number: int, optimizer) -> float:
        arrays = batch_of(size, number)
        batch = {name: torch.tensor(array, dtype=torch.long) for name, array in arrays.items()}
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def seconds(kind: str) -> float:
        candidate = optimizer(kind)
        times = []
        for number in range(4):
            started = time.perf_counter()
            step(number, candidate)
            times.append(time.perf_counter() - started)
        return min(times[1:])

    measured = {kind: seconds(kind) for kind in ("fused", "foreach")}
    model.load_state_dict(start)
    del start
    best = min(measured, key=lambda kind: measured[kind])
    chosen = optimizer(best)
    return lambda number: step(number, chosen), {"optimizer": best, "tried_seconds": measured}


def open_ours(folder: str, size: str, *, scan_layers: bool):
    """A function of the step's number that takes the step and returns its loss, by jax_encdec."""
    import jax

    from jax_encdec import EncoderDecoderModel
    from jax_encdec.execution import Execution
    from jax_encdec.training.optimizer import OptimizerConfig, make_optimizer
    from jax_encdec.training.sharding import make_mesh
    from jax_encdec.training.step import init_state, make_train_step

    model, params = EncoderDecoderModel.from_pretrained(folder)
    model = model.clone(execution=Execution(scan_layers=scan_layers))
    config = OptimizerConfig(
        name="adamw",
        learning_rate=RATE,
        schedule="constant",
        warmup_steps=0,
        weight_decay=DECAY,
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        clip_norm=CLIP,
    )
    optimizer = make_optimizer(config, model, 10_000)
    mesh = make_mesh(devices=jax.devices()[:1])
    state = init_state(model, optimizer, mesh, params=params)
    del params
    step = make_train_step(model, optimizer, mesh)
    started = time.perf_counter()
    compiled = step.lower(state, batch_of(size, 0)).compile()
    memory = compiled.memory_analysis()
    about = {
        "compile_seconds": time.perf_counter() - started,
        "temporary_mib": None if memory is None else memory.temp_size_in_bytes / 2**20,
    }

    def run(number: int) -> float:
        nonlocal state
        state, metrics = compiled(state, batch_of(size, number))
        loss = float(metrics["loss"])
        jax.block_until_ready(state)
        return loss

    return run, about


SIDES: dict[str, Callable[..., Any]] = {
    "pytorch": open_torch,
    "ours": partial(open_ours, scan_layers=False),
    "scanned": partial(open_ours, scan_layers=True),
}


def work(opener: Callable[..., Any], arguments: tuple, kept: bool, pipe) -> None:
    """A process of one side: answers (first step, count) with what they took and lost."""
    if kept:
        from jax_encdec.training.host_memory import keep_freed_memory

        keep_freed_memory()
    run, about = opener(*arguments)
    pipe.send(about)
    while (asked := pipe.recv()) is not None:
        first, count = asked
        started, used = time.perf_counter(), time.process_time()
        losses = [run(number) for number in range(first, first + count)]
        pipe.send(
            {
                "seconds": (time.perf_counter() - started) / count,
                "processor_seconds": (time.process_time() - used) / count,
                "losses": losses,
                "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            }
        )


class Side:
    """A live process of one side: `opener(*arguments)` gives its step and what is to be told."""

    def __init__(self, opener: Callable[..., Any], *arguments: Any, kept: bool = False):
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(
            target=work, args=(opener, arguments, kept, other), daemon=True
        )
        self.process.start()
        other.close()  # so that a side that dies is noticed
        self.about = self.pipe.recv()

    def run(self, first: int, count: int) -> dict:
        self.pipe.send((first, count))
        return self.pipe.recv()

    def close(self) -> None:
        self.pipe.send(None)
        self.process.join()


def alternate(sides: dict[str, Side], rounds: int, steps: int) -> dict[str, list[dict]]:
    """What each round of each side took, side after side; a first round that warms up included."""
    runs: dict[str, list[dict]] = {name: [] for name in sides}
    for i in range(rounds + 1):
        for name, side in sides.items():
            runs[name].append(side.run(i * steps, steps))
    for side in sides.values():
        side.close()
    return runs


def measure(size: str, names: list[str], rounds: int, dropout: float, kept: bool) -> dict:
    """All sides at one size."""
    steps = STEPS[size]
    with tempfile.TemporaryDirectory() as folder:
        maker = multiprocessing.get_context("spawn").Process(
            target=make_pair, args=(dropout, Path(folder), SIZES[size])
        )
        maker.start()
        maker.join()
        sides = {name: Side(SIDES[name], folder, size, kept=kept) for name in names}
        runs = alternate(sides, rounds, steps)
    losses = {name: [x for run in runs[name] for x in run["losses"]] for name in names}
    result: dict[str, Any] = {
        "size": size,
        "batch": BATCH[size],
        "lengths": [SOURCE, TARGET],
        "dropout": dropout,
        "steps_per_round": steps,
        "about": {name: side.about for name, side in sides.items()},
        "peak_mib": {name: runs[name][-1]["peak_mib"] for name in names},
        "first_and_last_loss": {name: [x[0], x[-1]] for name, x in losses.items()},
    }
    for name in names:
        counted = runs[name][1:]
        for key in ("seconds", "processor_seconds"):
            values = [run[key] for run in counted]
            result.setdefault(key, {})[name] = statistics.median(values)
            result.setdefault(f"{key}_by_round", {})[name] = values
        if name != "pytorch" and "pytorch" in names:
            pairs = zip(counted, runs["pytorch"][1:], strict=True)
            ratios = [a["seconds"] / b["seconds"] for a, b in pairs]
            result.setdefault("ratio", {})[name] = statistics.median(ratios)
            result.setdefault("ratio_range", {})[name] = [min(ratios), max(ratios)]
            gaps = [abs(a - b) / b for a, b in zip(losses[name], losses["pytorch"], strict=True)]
            result.setdefault("largest_loss_difference", {})[name] = max(gaps)
    return result


def lines(result: dict) -> str:
    """One size in words."""
    out = []
    for name, seconds in result["seconds"].items():
        text = f"{result['size']:5} {name:8}: {1000 * seconds:7.1f} ms a step"
        text += f" ({1000 * result['processor_seconds'][name]:.1f} ms of processor time)"
        if name in result.get("ratio", {}):
            low, high = result["ratio_range"][name]
            text += f", {result['ratio'][name]:.3f} of PyTorch's ({low:.3f} to {high:.3f})"
            text += f", losses within {result['largest_loss_difference'][name]:.1e}"
        out.append(text + f", peak {result['peak_mib'][name]:.0f} MiB, {result['about'][name]}")
    return "\n".join(out)


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", default="small,base")
    parser.add_argument("--sides", default="pytorch,ours", help=f"of {', '.join(SIDES)}")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--allocator", default="kept", choices=("kept", "default"))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    names = args.sides.split(",")
    report: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "threads": THREADS,
        "allocator": args.allocator,
        "python": platform.python_version(),
        "versions": {p: version(p) for p in ("jax", "flax", "torch", "transformers", "jax_encdec")},
        "environment": {
            name: os.environ[name] for name in ("XLA_FLAGS", "GLIBC_TUNABLES") if name in os.environ
        },
        "task": f"BERT2BERT, float32, vocabulary {VOCAB}, {SOURCE} source and {TARGET} target "
        f"tokens, AdamW, gradients clipped at {CLIP}",
        "wall_over_processor_time_before": quietness(),
    }
    report["results"] = []
    for size in args.sizes.split(","):
        kept = args.allocator == "kept"
        report["results"].append(measure(size, names, args.rounds, args.dropout, kept))
        print(lines(report["results"][-1]), flush=True)
    report["wall_over_processor_time_after"] = quietness()
    noise = max(report["wall_over_processor_time_before"], report["wall_over_processor_time_after"])
    print(f"machine: {report['processor']}, {THREADS} threads, wall/processor time {noise:.2f}")
    if noise > 1.1:
        print("WARNING: the machine was busy with something else; ratios of times are unreliable")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
