"""The report of a run: a pure function of the files in the run folder.

    config.toml     every option, resolved
    sessions.jsonl  one line per start and per end: hardware, versions, model, data, why it ended
    metrics.jsonl   the numbers
    samples/        tables of sources, references and predictions
      -> report.md with curves/*.svg and *.png; and `model_card.py`'s model/README.md

So a report can be written again at any time, and a resumed run's covers all of its parts.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax_encdec import hub
from jax_encdec.errors import InputError
from jax_encdec.training.progress import duration, plain

PACKAGES = ("jax_encdec", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
PACKAGES += ("safetensors", "tokenizers", "rouge-score", "sacrebleu")
MAX_CELL = 300
_SCORES = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "rougeLsum": "ROUGE-Lsum"}
_SCORES |= {"bleu": "BLEU", "chrf": "chrF", "exact_match": "exact match"}


# Reading a run folder -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Record:
    """What the files of a run folder say."""

    folder: Path
    config: str
    """config.toml, as it stands."""
    starts: Sequence[Mapping[str, Any]]
    ends: Sequence[Mapping[str, Any]]
    """One for each start; empty where the run was killed."""
    train: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]]
    test: Mapping[str, Any] | None
    samples: str
    """The last table of samples, or nothing."""

    @property
    def start(self) -> Mapping[str, Any]:
        """What the last start found: hardware, versions, model, data."""
        return self.starts[-1] if self.starts else {}

    @property
    def last(self) -> Mapping[str, Any]:
        """The last evaluation there is, of the test split if possible."""
        return self.test or (self.evaluations[-1] if self.evaluations else {})


def read_record(folder: Path | str) -> Record:
    """Read a run folder.

    Raises:
        InputError: the folder holds no run.
    """
    folder = Path(folder)
    if not (folder / "sessions.jsonl").is_file():
        raise InputError(f"{folder} holds no run: it has no sessions.jsonl")
    metrics = _lines(folder / "metrics.jsonl")
    starts: list[dict[str, Any]] = []
    ends: list[dict[str, Any]] = []
    for line in _lines(folder / "sessions.jsonl"):
        if "started" in line:
            starts.append(line)
            ends.append({})
        elif ends:
            ends[-1] = line
    config = folder / "config.toml"
    tables = sorted((folder / "samples").glob("step-*.md"))
    tests = [line for line in metrics if line["kind"] == "test"]
    return Record(
        folder=folder,
        config=config.read_text(encoding="utf-8") if config.is_file() else "",
        starts=starts,
        ends=ends,
        train=[line for line in metrics if line["kind"] == "train"],
        evaluations=[line for line in metrics if line["kind"] == "evaluate"],
        test=tests[-1] if tests else None,
        samples=tables[-1].read_text(encoding="utf-8") if tables else "",
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file; one cut short by a kill is left out."""
    found = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def write_session(folder: Path, values: Mapping[str, Any]) -> None:
    """Append a line to sessions.jsonl."""
    with (folder / "sessions.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(plain(values), ensure_ascii=False) + "\n")


def environment() -> dict[str, Any]:
    """Hardware and versions of this process."""
    import jax

    device = jax.devices()[0]
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "platform": device.platform,
        "device_kind": device.device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_gib": _memory(),
        "system": platform.platform(terse=True),
        "versions": versions,
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _memory() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


# Curves -------------------------------------------------------------------------------------------


def draw_curves(record: Record) -> list[str]:
    """Draw loss and scores into curves/, as SVG and PNG.

    Returns:
        The names of the curves drawn; none where matplotlib is not installed, or with no numbers.
    """
    try:
        import matplotlib  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        return []
    drawn = []
    losses = {
        "training": _series(record.train, "loss"),
        "validation": _series(record.evaluations, "loss"),
    }
    if any(losses.values()):
        _draw(record.folder, "loss", losses, {}, "loss, nats per target token")
        drawn.append("loss")
    names = [name for name in _SCORES if _series(record.evaluations, name)]
    for curve, own in (("rouge", "rouge"), ("scores", "")):
        chosen = [n for n in names if n.startswith("rouge") == bool(own)]
        lines = {_SCORES[n]: _series(record.evaluations, n) for n in chosen}
        if lines:
            last = record.evaluations[-1]
            flat = {_SCORES[n]: last[f"lead_{n}"] for n in chosen if last.get(f"lead_{n}")}
            _draw(record.folder, curve, lines, flat, "validation, dotted: lead baseline")
            drawn.append(curve)
    return drawn


def _series(lines: Iterable[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(line["step"], line[key]) for line in lines if line.get(key) is not None]


def _draw(
    folder: Path,
    name: str,
    lines: Mapping[str, Sequence[tuple[int, float]]],
    levels: Mapping[str, float],
    label: str,
) -> None:
    """Draw series over steps, with dotted levels of the same colours."""
    import io

    import matplotlib  # pyright: ignore[reportMissingImports]

    # No pyplot: no window, no global state.
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for number, (title, points) in enumerate(lines.items()):
        if not points:
            continue
        steps, values = zip(*points, strict=True)
        marker = "o" if len(points) < 40 else ""
        axes.plot(steps, values, label=title, marker=marker, markersize=3, color=f"C{number}")
        if title in levels:
            axes.axhline(levels[title], linestyle=":", color=f"C{number}")
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.legend()
    (folder / "curves").mkdir(exist_ok=True)
    for kind in ("svg", "png"):
        data = io.BytesIO()
        # The same numbers give the same file.
        with matplotlib.rc_context({"svg.hashsalt": name}):
            dated = {"Date": None} if kind == "svg" else {}
            figure.savefig(data, format=kind, dpi=120, metadata=dated)
        hub.write_bytes(folder / "curves" / f"{name}.{kind}", data.getvalue())


# Tables -------------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; what stands in a cell cannot break it."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell(value) for value in row) + " |" for row in lines) + "\n"


def cell(value: Any) -> str:
    """One line of Markdown, cut to a readable length."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    text = " ".join(str(value).split())
    if len(text) > MAX_CELL:
        text = text[: MAX_CELL - 4] + " ..."
    for mark, escaped in (("\\", "\\\\"), ("|", "\\|"), ("<", "&lt;"), ("`", "\\`"), ("*", "\\*")):
        text = text.replace(mark, escaped)
    return text


def sample_table(samples: Iterable[Any]) -> str:
    """Sources, references and predictions, attributes of each sample, side by side."""
    rows = [(s.source, s.reference, s.prediction) for s in samples]
    return table(("source", "reference", "prediction"), rows)


def score_rows(record: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Name, value and lead baseline of each score of an evaluation; its loss."""
    rows = [
        (title, f"{record[name]:.2f}", _number(record.get(f"lead_{name}")))
        for name, title in _SCORES.items()
        if record.get(name) is not None
    ]
    if record.get("loss") is not None:
        rows.append(("loss, nats per token", f"{record['loss']:.4f}", ""))
    return rows


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _median(values: Sequence[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None


# The report ---------------------------------------------------------------------------------------


def write_report(folder: Path | str) -> Path:
    """Write report.md and the curves of a run folder, from what its files say.

    Raises:
        InputError: the folder holds no run.
    """
    record = read_record(folder)
    curves = draw_curves(record)
    path = record.folder / "report.md"
    hub.write_bytes(path, report_text(record, curves).encode())
    return path


def report_text(record: Record, curves: Sequence[str]) -> str:
    """The report; `curves` are the names of the pictures drawn."""
    parts = [f"# Training report: {title(record)}\n", _summary(record)]
    parts += ["## Results\n", _results(record)]
    parts += ["## Curves\n", _pictures(record, curves)]
    if record.samples:
        parts += ["## Sample predictions\n", record.samples]
    parts += ["## Speed\n", _speed(record)]
    parts += ["## Model and data\n", facts_table(record)]
    parts += ["## Hardware, versions, seeds\n", reproducibility(record)]
    if len(record.starts) > 1 or any(start.get("notes") for start in record.starts):
        parts += ["## Sessions\n", _sessions(record)]
    parts += ["## Configuration\n", f"```toml\n{shown_config(record)}\n```\n"]
    return "\n".join(parts)


def title(record: Record) -> str:
    """What the model is, in a few words."""
    model = record.start.get("model", {})
    return str(model.get("name") or "an encoder-decoder")


def shown_config(record: Record) -> str:
    """config.toml without where the run was written, which is no part of what it did."""
    lines = record.config.strip().splitlines()
    return "\n".join(line for line in lines if not line.startswith("output = "))


def _summary(record: Record) -> str:
    start, end = record.start, record.ends[-1] if record.ends else {}
    seconds = sum(e.get("seconds") or 0.0 for e in record.ends)
    step = end.get("step", record.train[-1]["step"] if record.train else 0)
    parts = [f"{step:,} of {start.get('total_steps', step):,} steps"]
    if record.train and record.train[-1].get("epoch") is not None:
        parts.append(f"{record.train[-1]['epoch']:.2f} epochs")
    parts.append(f"{duration(seconds)} in all")
    text = ", ".join(parts) + "."
    return f"{text} It ended because {end['why']}.\n" if end.get("why") else f"{text}\n"


def _results(record: Record) -> str:
    parts = []
    if record.test:
        parts.append(f"Test, after step {record.test['step']:,}:\n")
        parts.append(table(("", "model", "lead baseline"), score_rows(record.test)))
    if record.evaluations:
        names = [
            n for n in ("loss", *_SCORES) if any(e.get(n) is not None for e in record.evaluations)
        ]
        rows = [[f"{e['step']:,}", *(e.get(n) for n in names)] for e in record.evaluations]
        last = record.evaluations[-1]
        if any(last.get(f"lead_{n}") is not None for n in names):
            rows.append(["lead baseline", *(last.get(f"lead_{n}") for n in names)])
        parts.append("Validation:\n")
        parts.append(table(["step", *(_SCORES.get(n, n) for n in names)], rows))
    if not parts:
        last = record.train[-1]["loss"] if record.train else None
        said = "" if last is None else f" The last training loss is {last:.4f}."
        return f"There was no validation data.{said}\n"
    return "\n".join(parts)


def _pictures(record: Record, curves: Sequence[str]) -> str:
    if curves:
        return "\n".join(f"![{name}](curves/{name}.svg)\n" for name in curves)
    if not (record.train or record.evaluations):
        return "No step was logged.\n"
    rows = record.train[:: max(1, len(record.train) // 20)]
    return (
        "There are no pictures: they need matplotlib (`pip install 'jax_encdec[train]'`).\n\n"
        + table(("step", "training loss"), [(f"{r['step']:,}", r.get("loss")) for r in rows])
    )


def _speed(record: Record) -> str:
    rows: list[tuple[str, str]] = []
    for key, name, form in (
        ("tokens_per_second", "tokens per second, median (source and target)", "{:,.0f}"),
        ("model_tflops_per_second", "model TFLOP/s, median", "{:.4g}"),
        ("model_flop_utilization", "model FLOP utilisation, median", "{:.1%}"),
    ):
        middle = _median([r[key] for r in record.train if r.get(key) is not None])
        if middle is not None:
            rows.append((name, form.format(middle)))
        elif key == "model_flop_utilization":
            rows.append((name, "not given: no published peak for this device"))
    rows.append(("training", duration(sum(r.get("seconds") or 0.0 for r in record.train))))
    rows.append(("compiling", duration(sum(r.get("compile_seconds") or 0.0 for r in record.train))))
    evaluating = sum(e.get("seconds") or 0.0 for e in record.evaluations)
    rows.append(("evaluating", duration(evaluating)))
    return table(("", ""), rows)


def facts_table(record: Record) -> str:
    """Model, data, optimizer and execution of the last session, as a table."""
    rows = []
    for part in ("model", "data", "optimizer", "execution"):
        for key, value in (record.start.get(part) or {}).items():
            shown = f"{value:,}" if isinstance(value, int) and value >= 10_000 else _shown(value)
            rows.append((f"{part}: {key}", shown))
    return table(("", ""), rows)


def _shown(value: Any) -> Any:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_shown(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(str(_shown(v)) for v in value)
    return value


def reproducibility(record: Record) -> str:
    """Hardware, versions and seeds of the last session, as a table."""
    start = record.start
    where = f"{start.get('devices')} x {start.get('device_kind')} ({start.get('platform')})"
    rows = [
        ("date", start.get("started")),
        (
            "devices",
            f"{where}, {start.get('processes')} process(es), mesh {_shown(start.get('mesh'))}",
        ),
        ("host", f"{start.get('cpu')}, {start.get('cores')} cores, {start.get('memory_gib')} GiB"),
        ("system", start.get("system")),
        ("versions", _shown(start.get("versions"))),
        ("seed", start.get("seed")),
        ("data", (start.get("data") or {}).get("fingerprint")),
    ]
    return table(("", ""), [(a, b) for a, b in rows if b is not None])


def _sessions(record: Record) -> str:
    rows = []
    for start, end in zip(record.starts, record.ends, strict=True):
        why = end.get("why") or "it was killed"
        at = f"{start.get('devices')} x {start.get('device_kind')}"
        notes = "; ".join(start.get("notes") or ())
        rows.append((start["started"], f"{start.get('from_step', 0):,}", at, why, notes))
    return table(("started", "from step", "on", "ended because", "notes"), rows)
