"""Decoding speed: jax_encdec against PyTorch Transformers and CTranslate2, on one machine.

    python benchmarks/decode.py                       # everything, about an hour
    python benchmarks/decode.py --sizes small --families bert --parts steady --rounds 5
    python benchmarks/decode.py --parts none          # print what has been measured
    python benchmarks/decode.py --flax-python PYTHON  # Transformers' last Flax classes, too

Every side runs the same random weights in a process of its own that stays alive and generates
exactly 64 tokens, from a vocabulary of 30522. Rounds alternate between the sides; what is reported
is the median of seconds, and of the ratio ours / theirs round by round. Two threads, pinned. A
busy neighbour slows PyTorch ten times and flatters us, so that the script refuses to begin on a
busy machine and says how busy it was during each cell. `cold` starts fresh processes: imports,
loading and the first call, with and without compiled programs on disk, and the peak of memory.
The floor is what a generation costs at least at the rates of memory and arithmetic measured here.

What is measured is merged, cell by cell, into one results file, so that parts can be run one after
the other; beside it goes a table, .md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import platform
import statistics
import subprocess
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import decode_machine as machine
from decode_sides import (
    NEW_TOKENS,
    RUNS,
    SHAPES,
    SIDES,
    VOCAB,
    Cell,
    Side,
    convert,
    convert_to_flax,
    make,
)

CELLS = [
    (length, batch, beams) for length in (128, 512) for batch in (1, 8) for beams in (1, 4)
]  # fmt: skip
COLD: Cell = (128, 1, 1)
BUSY = 0.1  # Processors kept busy by others, from which on a number is marked.
PAIRS = {  # Whom each of ours is held against.
    "ours": ("pytorch", "pytorch-bf16", "flax", "ctranslate2", "ctranslate2-int8"),
    "ours-bf16": ("ours", "pytorch-bf16", "ctranslate2-int8"),
}
CACHED = ("ours", "ours-bf16", "flax")  # Who can keep compiled programs on disk.
PARTS = ("rates", "steady", "cold")


def name_of(cell: Cell) -> str:
    """`s128b1k4`: source 128, batch 1, 4 beams."""
    return "s{}b{}k{}".format(*cell)


def spawn(function: Any, *arguments: Any) -> None:
    """Run in a process that ends, so that this one stays small."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{function.__name__} failed")


def steady(sides: dict[str, Side], cell: Cell, rounds: int) -> dict:
    """Rounds of one cell, each side once a round."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    first, outputs = {}, {}
    for name, side in sides.items():
        first[name], outputs[name], _ = side.run(cell)
    watch = machine.Neighbours([side.pid for side in sides.values()])
    busy = []
    for _ in range(rounds):
        watch.start()
        for name, side in sides.items():
            seconds, outputs[name], _ = side.run(cell)
            times[name].append(seconds)
            time.sleep(0.02)  # Let the threads that wait in a loop go to sleep.
        busy.append(watch.stop())
    width = NEW_TOKENS + 1
    same = {}
    for name in sides:
        rows = zip(outputs["ours"], outputs[name], strict=True) if "ours" in sides else ()
        same[name] = sum(a[:width] == b[:width] for a, b in rows)
    return {
        "rounds": rounds,
        "seconds": {name: statistics.median(t) for name, t in times.items()},
        "all_seconds": times,
        "tokens_per_second": {
            name: cell[1] * NEW_TOKENS / statistics.median(t) for name, t in times.items()
        },
        "ratio": {
            f"{ours}/{theirs}": quotient(times[ours], times[theirs])
            for ours, rivals in PAIRS.items()
            for theirs in rivals
            if ours in sides and theirs in sides
        },
        "first_call_of_this_shape": first,
        "rows_with_the_tokens_of_ours": same,
        "processors_busy_with_others": max(busy),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def quotient(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """The median of the ratios round by round, and their range."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


def cold(names: list[str], folder: Path, cell: Cell, rounds: int, pythons: dict[str, str]) -> dict:
    """Fresh processes: seconds until loaded, of the first call, and peak memory."""
    kinds = {name: (name, None) for name in names}
    with tempfile.TemporaryDirectory() as programs:
        for name in names:
            if name in CACHED:
                kinds[f"{name}, warm cache"] = (name, Path(programs))
                side = Side(name, folder, Path(programs), pythons.get(name), cell[1] * cell[2])
                side.run(cell)
                side.close()
        found: dict[str, dict[str, list[float]]] = {
            kind: {"loaded": [], "first_call": [], "peak_mib": []} for kind in kinds
        }
        for _ in range(rounds):
            for kind, (name, cache) in kinds.items():
                side = Side(name, folder, cache, pythons.get(name), cell[1] * cell[2])
                first, _, peak = side.run(cell)
                side.close()
                numbers = {"loaded": side.loaded, "first_call": first, "peak_mib": peak}
                for key, value in numbers.items():
                    found[kind][key].append(value)
    return found


# Tables ------------------------------------------------------------------------------------------


def tables(report: dict) -> str:
    """What has been measured, as Markdown."""
    lines = [
        "# Decoding, measured by `benchmarks/decode.py`",
        "",
        f"{report['processor']}, {machine.THREADS} threads, pinned; {report['python']}; "
        + ", ".join(f"{name} {number}" for name, number in report["versions"].items())
        + f". Vocabulary {VOCAB}, exactly {NEW_TOKENS} new tokens; small: 256 wide, 4 + 4 layers; "
        "base: 768 wide, 12 + 12. `s128b8k4`: source 128, batch 8, 4 beams. Medians over rounds.",
    ]
    for group, cells in by_group(report.get("steady", {})).items():
        names = [n for n in SIDES if any(n in cell["seconds"] for cell in cells.values())]
        ratios = [r for ours, others in PAIRS.items() for r in (f"{ours}/{o}" for o in others)]
        ratios = [r for r in ratios if any(r in cell["ratio"] for cell in cells.values())]
        rows = []
        for name, cell in cells.items():
            busy = cell["processors_busy_with_others"]
            row = [name + (f" (busy: {busy:.2f})" if busy > BUSY else "")]
            row += [number(cell["seconds"].get(n), "{:.3f}") for n in names]
            row.append(number(cell["tokens_per_second"].get("ours"), "{:,.0f}"))
            row += [number(cell["ratio"].get(r, {}).get("median"), "{:.2f}") for r in ratios]
            row.append(number(over_floor(cell), "{:.1f}"))
            same = cell["rows_with_the_tokens_of_ours"]
            of = same.get("ours", 0)
            row.append(", ".join(f"{n} {k}/{of}" for n, k in same.items() if n != "ours"))
            rows.append(row)
        head = ["cell", *(f"{n} s" for n in names), "ours tokens/s", *ratios, "ours / floor"]
        lines += ["", f"## {group}, steady", "", *table([*head, "rows with our tokens"], rows)]
    for key, kinds in report.get("cold", {}).items():
        rows = []
        reference = kinds.get("pytorch")
        for kind, runs in kinds.items():
            until = whole(runs)
            row = [kind, f"{statistics.median(runs['loaded']):.2f}"]
            row += [f"{statistics.median(runs['first_call']):.2f}", f"{until:.2f}"]
            row += [f"{until / whole(reference):.2f}" if reference else ""]
            row += [f"{statistics.median(runs['peak_mib']):,.0f}"]
            rows.append(row)
        head = ["", "until loaded s", "first call s", "both s", "/ pytorch", "peak MiB"]
        lines += ["", f"## {key}, a fresh process", "", *table(head, rows)]
    if "rates" in report:
        read = report["rates"]["read_bytes_per_second"]
        speed = report["rates"]["float32_operations_per_second"]
        lines += ["", "## The machine", ""]
        for size, found in read.items():
            best = max(found.values()) / 1e9
            lines.append(f"- reads {int(size) / 2**20:,.0f} MiB of weights at {best:.1f} GB/s")
        lines.append(f"- float32 matrix products: {max(speed.values()) / 1e9:,.0f} GFLOP/s")
    return "\n".join(lines) + "\n"


def by_group(cells: dict[str, dict]) -> dict[str, dict[str, dict]]:
    """`bert/small/s128b1k1` -> `bert/small` -> `s128b1k1`."""
    groups: dict[str, dict[str, dict]] = {}
    for key in sorted(cells, key=lambda k: [k.split("/")[0], k.split("/")[1] != "small", k]):
        group, name = key.rsplit("/", 1)
        groups.setdefault(group, {})[name] = cells[key]
    return groups


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]]


def number(value: float | None, form: str) -> str:
    """A number, or nothing."""
    return "" if value is None else form.format(value)


def over_floor(cell: dict) -> float | None:
    """How many times the floor ours takes."""
    if "floor_seconds" not in cell or "ours" not in cell["seconds"]:
        return None
    return cell["seconds"]["ours"] / cell["floor_seconds"]


def whole(runs: dict[str, list[float]]) -> float:
    """Seconds from the start of a process to its first result."""
    pairs = zip(runs["loaded"], runs["first_call"], strict=True)
    return statistics.median(a + b for a, b in pairs)


# The command -------------------------------------------------------------------------------------


def listed(known: Any, text: str, option: str) -> list[str]:
    """The names that a comma-separated option asks for."""
    names = text.split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"{option}: expected some of {', '.join(known)}; got {unknown[0]!r}")
    return names


def versions(flax_python: str | None) -> dict[str, str]:
    """Of all that is compared."""
    found = {}
    if flax_python:
        code = (
            "import platform; from importlib.metadata import version as v; print(v('flax'), 'with',"
            "'transformers', v('transformers'), 'and jax', v('jax'), '(Python',"
            "platform.python_version() + ')')"
        )
        try:
            asked = subprocess.run(
                [flax_python, "-c", code], check=True, capture_output=True, text=True
            )
        except (OSError, subprocess.CalledProcessError):
            raise SystemExit(
                f"--flax-python: expected a Python that has flax, jax and transformers 4; got "
                f"{flax_python!r}"
            ) from None
        found["flax"] = asked.stdout.strip()
    for package in ("jax_encdec", "jax", "torch", "transformers", "ctranslate2"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def main() -> None:
    """Measure what was asked for, merge it, print it."""
    today = datetime.date.today().isoformat()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--families", default="bert,bart")
    parser.add_argument("--sizes", default="small,base")
    parser.add_argument("--cells", default=",".join(map(name_of, CELLS)))
    parser.add_argument("--sides", help="whom to run, `ours` with them; by default all there are")
    parser.add_argument("--flax-python", metavar="PATH", help="of the side flax, which needs it")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of them, or none")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cold-rounds", type=int, default=3)
    parser.add_argument("--models", type=Path, help="keep the random models here, for more runs")
    parser.add_argument("--anyway", action="store_true", help="on a busy machine, too")
    here = Path(__file__).parent / "results"
    parser.add_argument("--output", type=Path, default=here / f"decode-{today}-cpu.json")
    args = parser.parse_args()
    cells = {name_of(cell): cell for cell in CELLS}
    families = listed(RUNS, args.families, "--families")
    sizes = listed(SHAPES, args.sizes, "--sizes")
    wanted = listed(cells, args.cells, "--cells")
    parts = [] if args.parts == "none" else listed(PARTS, args.parts, "--parts")
    pythons = {"flax": args.flax_python} if args.flax_python else {}
    everyone = [name for name in SIDES if name != "flax" or name in pythons]
    sides = listed(everyone, args.sides or ",".join(everyone), "--sides")
    machine.pin()
    report: dict = json.loads(args.output.read_text()) if args.output.exists() else {}
    if parts:
        noise = machine.quietness()
        print(f"wall over processor time of {machine.THREADS} busy processes: {noise:.2f}")
        if noise > 1.05 and not args.anyway:
            raise SystemExit("the machine is busy: come back, or pass --anyway")
        report |= {
            "processor": machine.processor(),
            "threads": machine.THREADS,
            "python": f"Python {platform.python_version()}",
            "versions": report.get("versions", {}) | versions(args.flax_python),
        }

    def save() -> None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=1) + "\n")
        args.output.with_suffix(".md").write_text(tables(report))

    if "rates" in parts:
        footprints = [
            machine.step_weights("bert", width, layers, VOCAB) * machine.BYTES
            for width, layers, _ in SHAPES.values()
        ]
        report["rates"] = machine.rates(footprints)
        save()
    for family in families if {"steady", "cold"} & set(parts) else ():
        names = [name for name in RUNS[family] if name in sides]
        for size in sizes:
            with tempfile.TemporaryDirectory() as temporary:
                folder = (args.models or Path(temporary)) / f"{family}-{size}"
                if not (folder / "config.json").exists():
                    spawn(make, family, size, folder)
                wants = any(name.startswith("ctranslate2") for name in names)
                if wants and not (folder / "ctranslate2-int8").exists():
                    spawn(convert, folder)
                if "flax" in names and not (folder / "flax").exists():
                    spawn(convert_to_flax, folder)
                if "cold" in parts:
                    key = f"{family}/{size}/{name_of(COLD)}"
                    found = cold(names, folder, COLD, args.cold_rounds, pythons)
                    report.setdefault("cold", {}).setdefault(key, {}).update(found)
                    save()
                if "steady" in parts:
                    live = {name: Side(name, folder, None, pythons.get(name)) for name in names}
                    for name in wanted:
                        cell = cells[name]
                        found = steady(live, cell, args.rounds)
                        if "rates" in report:
                            found["floor_seconds"] = machine.floor(
                                family, SHAPES[size], VOCAB, cell, NEW_TOKENS, report["rates"]
                            )
                        key = f"{family}/{size}/{name}"
                        report.setdefault("steady", {})[key] = found
                        save()
                        shown = {n: round(s, 3) for n, s in found["seconds"].items()}
                        print(f"{key}: {shown}", flush=True)
                    for side in live.values():
                        side.close()
    print(tables(report) if report else "nothing has been measured yet")


if __name__ == "__main__":
    main()
