"""A training step on an accelerator: bfloat16, packed rows, against PyTorch eager and compiled.

    python benchmarks/train_accelerator.py [--size large] [--rows 32] [--output results/...json]

The pair is BERT-large twice, lengths 512 and 128, AdamW over float32 masters. Ours packs four pairs
of 128 and 32 tokens into each row; PyTorch, which cannot, gets the same pairs as rows of their own
without one pad, under bfloat16 autocast. Utilisation counts the operations of those unpacked rows
(`training/flops.py`) over the chip's published rate (`training/chips.py`) for all sides, so that
what packing computes in vain does not count. Rounds are interleaved, as in `train_step.py`.

Without an accelerator it says so and measures nothing; `--device cpu --size tiny` tries the code.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from train_step import CLIP, DECAY, RATE, SIZES, VOCAB, Side, alternate, make_pair

SHAPES = SIZES | {"large": (1024, 24, 16), "tiny": (64, 2, 2)}
LENGTHS = {"large": (512, 128), "base": (512, 128), "tiny": (64, 32)}
PACKED = 4
"""Pairs in one row."""


def pairs_of(size: str, rows: int, step: int) -> dict[str, Any]:
    """`PACKED * rows` pairs of the batch number `step`, one per row, none padded."""
    import numpy as np

    rng = np.random.default_rng(step)
    source, target = (length // PACKED for length in LENGTHS[size])
    ids = rng.integers(1000, VOCAB, (PACKED * rows, source)).astype(np.int32)
    labels = rng.integers(1000, VOCAB, (PACKED * rows, target)).astype(np.int32)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": labels}


def packed(pairs: dict[str, Any]) -> dict[str, Any]:
    """The same pairs, `PACKED` to a row, told apart by segment ids."""
    import numpy as np

    out = {name: x.reshape(-1, PACKED * x.shape[1]) for name, x in pairs.items()}
    for name, like in (("segment_ids", "input_ids"), ("decoder_segment_ids", "labels")):
        ids = np.repeat(np.arange(1, PACKED + 1, dtype=np.int32), pairs[like].shape[1])
        out[name] = np.broadcast_to(ids, out[like].shape).copy()
    return out


def open_ours(folder: str, size: str, rows: int, device: str):
    """A function of the step's number that takes the step, and what there is to tell."""
    import jax
    import jax.numpy as jnp

    from jax_encdec import EncoderDecoderModel
    from jax_encdec.execution import Execution
    from jax_encdec.training.chips import peak_flops
    from jax_encdec.training.flops import model_flops
    from jax_encdec.training.optimizer import OptimizerConfig, make_optimizer
    from jax_encdec.training.sharding import make_mesh
    from jax_encdec.training.step import init_state, make_train_step

    model, params = EncoderDecoderModel.from_pretrained(folder)
    model = model.clone(dtype=jnp.bfloat16, execution=Execution(scan_layers=False))
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
    compiled = step.lower(state, packed(pairs_of(size, rows, 0))).compile()
    seconds = time.perf_counter() - started
    source, target = (length // PACKED for length in LENGTHS[size])
    kind = jax.devices()[0].device_kind

    def run(number: int) -> float:
        nonlocal state
        state, metrics = compiled(state, packed(pairs_of(size, rows, number)))
        jax.block_until_ready(state)
        return float(metrics["loss"])

    return run, {
        "compile_seconds": seconds,
        "device": kind,
        "flops": model_flops(model, PACKED * rows, source, target).train_step,
        "peak_flops": peak_flops(kind),
    }


def open_torch(folder: str, size: str, rows: int, device: str, *, compiled: bool):
    """The same by PyTorch Transformers, eager or compiled."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    where = "cuda" if device == "gpu" else "cpu"
    model = transformers.EncoderDecoderModel.from_pretrained(folder).train().to(where)
    called = torch.compile(model) if compiled else model
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, eps=1e-8, fused=True)

    def run(number: int) -> float:
        arrays = pairs_of(size, rows, number)
        batch = {name: torch.tensor(x, dtype=torch.long).to(where) for name, x in arrays.items()}
        with torch.autocast(where, dtype=torch.bfloat16):
            loss = called(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()  # waits for the device

    started = time.perf_counter()
    run(0)
    return run, {"first_step_seconds": time.perf_counter() - started}


OPENERS = {
    "eager": partial(open_torch, compiled=False),
    "compiled": partial(open_torch, compiled=True),
    "ours": open_ours,
}


def accelerator(asked: str) -> str | None:
    """The platform to measure on, of JAX, in a process that ends; None: there is none."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(_platform)
    return asked if asked == "cpu" else found if found != "cpu" else None


def _platform() -> str:
    import jax

    return jax.default_backend()


def main() -> int:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="large", choices=tuple(LENGTHS))
    parser.add_argument("--rows", type=int, default=32, help="packed rows in a batch")
    parser.add_argument("--sides", default="eager,compiled,ours", help=f"of {', '.join(OPENERS)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="of one round")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu"))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # all sides share its memory
    device = accelerator(args.device)
    if device is None:
        print("JAX sees no accelerator on this machine: nothing was measured", file=sys.stderr)
        return 1
    names = args.sides.split(",")
    if device == "tpu":
        names = [name for name in names if name == "ours"]
        print("a TPU: ours only, PyTorch is not measured there", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        maker = multiprocessing.get_context("spawn").Process(
            target=make_pair, args=(0.0, Path(folder), SHAPES[args.size])
        )
        maker.start()
        maker.join()
        sides = {n: Side(OPENERS[n], folder, args.size, args.rows, device) for n in names}
        about = {name: side.about for name, side in sides.items()}
        runs = alternate(sides, args.rounds, args.steps)
    ours = about.get("ours", {})
    report: dict[str, Any] = {
        "versions": {p: version(p) for p in ("jax", "torch", "transformers", "jax_encdec")},
        "size": args.size,
        "packed_rows": args.rows,
        "lengths": LENGTHS[args.size],
        "pairs_per_row": PACKED,
        "about": about,
        "first_and_last_loss": {},
        "seconds": {},
        "utilisation": {},
    }
    for name in names:
        seconds = statistics.median(run["seconds"] for run in runs[name][1:])
        report["seconds"][name] = seconds
        report["first_and_last_loss"][name] = [runs[name][i]["losses"][i] for i in (0, -1)]
        text = f"{name:9}: {1000 * seconds:8.1f} ms a step"
        if ours.get("peak_flops"):
            report["utilisation"][name] = ours["flops"] / seconds / ours["peak_flops"]
            text += f", {report['utilisation'][name]:.1%} of the published rate"
        print(text)
    print(f"device: {ours.get('device', device)}")
    if args.output:
        args.output.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
