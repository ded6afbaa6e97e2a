"""What `jax-encdec plan` says of BERT-base and BERT-large pairs on TPU pods that are not here.

    python benchmarks/plan_table.py --output benchmarks/results/plan-2026-11-21

Writes OUTPUT.json, row by row, so that a run that was stopped goes on; and OUTPUT.md. Needs libtpu
(pip install 'jax_encdec[plan]'), about a minute and 3 GiB of memory per row, and no TPU.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

from jax_encdec import BertConfig, EncoderDecoderConfig
from jax_encdec.cli.plan import size
from jax_encdec.training.config import ExecutionConfig
from jax_encdec.training.plan import Planner, PlanRequest

ROWS_PER_CHIP = 16
SOURCE, TARGET = 512, 128
SIZES = {
    "base": BertConfig(),
    "large": BertConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    ),
}
MACHINES = {
    "v5e:4x4": ("v5e:4x4", 1, 16, "fsdp=16"),
    "v5e:16x16": ("v5e:16x16", 1, 256, "fsdp=256"),
    "2 x v5e:4x4": ("v5e:4x4", 2, 32, "replica=2,fsdp=16"),
}


def request(name: str, machine: str, remat: str) -> PlanRequest:
    topology, slices, chips, mesh = MACHINES[machine]
    bert = SIZES[name]
    ids = {"decoder_start_token_id": 101, "pad_token_id": 0, "eos_token_id": 102}
    return PlanRequest(
        model=EncoderDecoderConfig(encoder=bert, decoder=bert, **ids),
        topology=topology,
        slices=slices,
        batch_size=ROWS_PER_CHIP * chips,
        source_length=SOURCE,
        target_length=TARGET,
        execution=ExecutionConfig(mesh=mesh, dtype="bfloat16", remat=remat),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--remat", default="full")
    args = parser.parse_args()
    file = args.output.with_suffix(".json")
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"rows": {}}
    found |= {
        "versions": {p: importlib.metadata.version(p) for p in ("jax", "jaxlib", "libtpu")},
        "host": {"cpus": os.cpu_count(), "machine": platform.machine()},
    }
    todo = [
        (f"{name}, {machine}", request(name, machine, args.remat))
        for machine in MACHINES
        for name in SIZES
    ]
    for label, asked in todo:
        if label in found["rows"]:
            continue
        began, cpu = time.perf_counter(), _cpu()
        with Planner(asked) as planner:
            row = planner.plan(asked).to_json()
        row["wall_seconds"], row["cpu_seconds"] = time.perf_counter() - began, _cpu() - cpu
        found["rows"][label] = row
        file.write_text(json.dumps(found, indent=1) + "\n")
        args.output.with_suffix(".md").write_text(table(found))
        print(label, f"{row['wall_seconds']:.0f} s", flush=True)


def _cpu() -> float:
    times = os.times()
    return times.children_user + times.children_system


def table(found: dict[str, Any]) -> str:
    lines = [
        f"# Plans for BERT2BERT, {SOURCE} + {TARGET} tokens, {ROWS_PER_CHIP} rows per chip",
        "",
        "AdamW over float32 masters, bfloat16 computation, dropout, layers scanned and "
        "rematerialised (remat full), FSDP over each slice, replicas across slices. "
        "`jax-encdec plan --effort low`, "
        + ", ".join(f"{k} {v}" for k, v in found["versions"].items())
        + ". Bytes are per chip; utilisation is an upper bound from published figures, and counts "
        "no FLOP twice, so that recomputation alone leaves three quarters.",
        "",
        "| pair | machine | parameters | state | temporaries | total | fits | gathered | reduced "
        "| across slices | TFLOP per step | utilisation at most | limited by | compiled |",
        "|---|---|--:|--:|--:|--:|---|--:|--:|--:|--:|--:|---|--:|",
    ]
    for label, row in found["rows"].items():
        name, machine = label.split(", ")
        memory, sums = row["memory"], {"gathered": 0, "reduced": 0, "across": 0}
        for c in row["collectives"] or ():
            kind = "gathered" if c["kind"] == "all-gather" else "reduced"
            sums["across" if c["across_slices"] else kind] += c["bytes"]
        bound, share = row["bound"], row["utilisation_at_most"]
        limits = ("compute", "memory", "links", "network")
        limit = max(limits, key=lambda n: bound[n]) if bound else ""
        cells = [
            f"BERT-{name}",
            machine,
            f"{row['parameters'] / 1e6:.0f} M",
            size(memory["parameters"] + memory["moments"]),
            size(memory["temporaries"]) if "temporaries" in memory else "",
            f"{size(row['needed'])} of {size(row['usable'])}",
            "yes" if row["fits"] else "no",
            *(size(sums[k]) for k in ("gathered", "reduced", "across")),
            f"{row['flops']['train_step'] / 1e12:,.1f}",
            f"{share:.0%}" if share else "",
            limit,
            f"{row['cpu_seconds']:.0f} s of CPU",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    said: dict[str, list[str]] = {}
    for label, row in found["rows"].items():
        for note in row["notes"]:
            said.setdefault(note, []).append(label)
        for p in row["placements"]:
            said.setdefault(f"`{p['path']}`: {p['note']}", []).append(label)
    if said:
        lines += ["", *(f"- {'; '.join(rows)}: {note}" for note, rows in said.items())]
    lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
