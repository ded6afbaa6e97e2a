"""Which self-attention cache a decode step should have, measured.

`ancestry`: the beams of a source share a pool of slots that never move, and a mask follows each
beam's path through it. `reorder`: every beam has a cache of its own, and all are gathered by the
beams' parents at every step, as is usual; greedy search needs no order. Either reads all its slots
at every step, masked, or the `live` prefix that is in use (`attention.Prefix`).

One decoder's self-attention, all layers, alone: keys and values are written, caches ordered, and
attended to, in a compiled loop as `generate` has it, without the projections around it. Steps are
measured at the beginning and at the end of the capacity. Forms alternate within a round; what is
reported is the median, and the median of the ratios to `ancestry` round by round. On a CPU two
threads, pinned, on a quiet machine; on other platforms (JAX_PLATFORMS) as it is.

What is measured is merged, cell by cell, into one results file; beside it goes a table, .md.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import json
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import decode_machine as machine

SIZES = {"small": (4, 4, 64), "base": (12, 12, 64)}  # layers, heads, head_dim
BATCHES, BEAMS, CAPACITIES = (1, 8), (1, 4), (64, 128, 512)
FORMS = ("ancestry", "ancestry live", "reorder", "reorder live")
STEPS = 16


def program(size: str, batch: int, beams: int, capacity: int, form: str) -> Any:
    """A function that runs STEPS steps from a given one on: the seconds that one takes."""
    import jax
    import jax.numpy as jnp

    from jax_encdec import attention as attn
    from jax_encdec.config import Attention
    from jax_encdec.decoding.engine import live_prefixes

    layers, heads, width = SIZES[size]
    config = Attention(source="self", heads=heads, head_dim=width)
    kind, live = form.split()[0], form.endswith("live")
    shared = kind == "ancestry" and beams > 1
    pools, lanes = (batch, beams) if shared else (batch * beams, 1)
    prefixes = live_prefixes("cpu", batch * beams, capacity) if live else ()
    sizes = tuple(steps * lanes for steps in prefixes or (capacity,))

    def step(t: Any, carry: Any, parents: Any) -> Any:
        x, caches, path = carry
        visible = jnp.broadcast_to(jnp.arange(capacity) <= t, (pools, 1, capacity))
        if shared:
            own = jnp.arange(lanes, dtype=jnp.int32)
            path = jnp.take_along_axis(path, parents[t][:, :, None], axis=1)
            row = jnp.broadcast_to(own, (batch, lanes))
            path = jax.lax.dynamic_update_index_in_dim(path, row, t, axis=2)
            visible = (path[..., None] == own) & visible[..., None]
            visible = visible.reshape(batch, lanes, capacity * lanes)
        order = (jnp.arange(batch)[:, None] * beams + parents[t]).reshape(-1)

        def taken(leaf: Any) -> Any:
            return leaf.at[order].get(mode="promise_in_bounds")

        prefix, new = attn.Prefix.of(sizes, (t + 1) * lanes), []
        for cache in caches:
            if kind == "reorder":
                cache = jax.tree.map(taken, cache)
            rows = jnp.swapaxes(x, 1, 2)
            cache = cache.write(attn.KV(0.9 * rows, rows), t * lanes)
            new.append(cache)
            y = attn.cached_attention(config, x, cache, visible, None, width**-0.5, prefix)
            x = 0.5 * (x + y)
        return x, new, path

    def run(carry: Any, parents: Any, begin: Any) -> Any:
        body = functools.partial(step, parents=parents)
        return jax.lax.fori_loop(begin, begin + STEPS, body, carry)

    x = jax.random.normal(jax.random.key(0), (pools, lanes, heads, width))
    shapes = [(pools, heads, width, capacity * lanes), (pools, heads, capacity * lanes, width)]
    caches = [attn.Cache(*map(jnp.zeros, shapes)) for _ in range(layers)]
    parents = jax.random.randint(jax.random.key(1), (capacity, batch, beams), 0, beams)
    carry = [(x, caches, jnp.zeros((batch, lanes, capacity), jnp.int32))]
    compiled = jax.jit(run, donate_argnums=0).lower(*carry, parents, jnp.int32(0)).compile()

    def seconds(begin: int) -> float:
        start = time.perf_counter()
        carry.append(jax.block_until_ready(compiled(carry.pop(), parents, jnp.int32(begin))))
        return (time.perf_counter() - start) / STEPS

    return seconds


def measure(size: str, batch: int, beams: int, capacity: int, rounds: int) -> dict:
    """Seconds a step takes in each form, at the beginning and at the end."""
    forms = [form for form in FORMS if beams > 1 or form.startswith("ancestry")]
    compiling, runs = {}, {}
    for form in forms:
        start = time.perf_counter()
        runs[form] = program(size, batch, beams, capacity, form)
        compiling[form] = time.perf_counter() - start
    found: dict[str, Any] = {"seconds_to_compile": compiling}
    for place, begin in {"beginning": 0, "end": capacity - STEPS}.items():
        times: dict[str, list[float]] = {form: [] for form in forms}
        for i in range(rounds + 1):
            for form, run in runs.items():
                taken = run(begin)
                if i:  # The first round warms up.
                    times[form].append(taken)
        found[place] = {
            form: {
                "seconds": statistics.median(own),
                "of_ancestry": statistics.median(
                    a / b for a, b in zip(own, times["ancestry"], strict=True)
                ),
                "all_seconds": own,
            }
            for form, own in times.items()
        }
    return found


def tables(report: dict) -> str:
    """What has been measured, as Markdown."""
    head = ["cell", "step", "ancestry µs", *FORMS[1:], "to compile, s"]
    lines = [
        "# Self-attention caches, measured by `benchmarks/decode_caches.py`",
        "",
        f"{report['device']}, {report['threads']}; {report['python']}, jax {report['jax']}. "
        f"All layers of one decode step, {STEPS} steps at the beginning and at the end of the "
        "capacity T, medians over rounds; other forms as ratios to `ancestry`. `small`: 4 layers "
        "of 4 heads, `base`: 12 of 12; `b8k4`: batch 8, 4 beams.",
        "",
        f"| {' | '.join(head)} |",
        f"|{' --- |' * len(head)}",
    ]
    for name, cell in report["cells"].items():
        compiling = cell["seconds_to_compile"]
        for place in ("beginning", "end"):
            forms = cell[place]
            row = [name, place, f"{1e6 * forms['ancestry']['seconds']:,.0f}"]
            row += [f"{forms[f]['of_ancestry']:.2f}" if f in forms else "" for f in FORMS[1:]]
            row.append(", ".join(f"{compiling[f]:.1f}" for f in FORMS if f in compiling))
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure the cells asked for, merge them, print them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cells", help="some of them, like small/t512b8k4, comma-separated")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--anyway", action="store_true", help="on a busy machine, too")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    cells = {
        f"{size}/t{capacity}b{batch}k{beams}": (size, batch, beams, capacity)
        for size, capacity, batch, beams in itertools.product(SIZES, CAPACITIES, BATCHES, BEAMS)
    }
    wanted = args.cells.split(",") if args.cells else list(cells)
    if unknown := [name for name in wanted if name not in cells]:
        raise SystemExit(f"--cells: no cell {unknown[0]!r}; there are {', '.join(cells)}")
    machine.pin()
    noise = machine.quietness()
    if noise > 1.05 and not args.anyway:
        raise SystemExit(f"the machine is busy ({noise:.2f}): come back, or pass --anyway")
    import jax

    kind, today = jax.default_backend(), datetime.date.today().isoformat()
    name = f"decode-caches-{today}-{kind}.json"
    output = args.output or Path(__file__).parent / "results" / name
    report: dict = json.loads(output.read_text()) if output.exists() else {"cells": {}}
    report |= {
        "device": machine.processor() if kind == "cpu" else jax.devices()[0].device_kind,
        "threads": f"{machine.THREADS} threads, pinned",
        "python": f"Python {platform.python_version()}",
        "jax": version("jax"),
    }
    for name in wanted:
        found = measure(*cells[name], args.rounds)
        report["cells"][name] = found | {"rounds": args.rounds, "wall_over_processor_time": noise}
        report["cells"] = {name: report["cells"][name] for name in cells if name in report["cells"]}
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=1) + "\n")
        output.with_suffix(".md").write_text(tables(report))
    print(tables(report))


if __name__ == "__main__":
    main()
