r"""The README's table of families, from what the tests of families recorded.

    pytest -m '' tests/test_families.py tests/test_flax_files.py tests/test_keras_files.py \
        --junitxml families.xml
    python benchmarks/family_table.py families.xml

The first command writes which tests passed, with the differences that they measured; the second
keeps that as `benchmarks/results/families-<date>.json` and rewrites the table in the README. A
test compares the two, so that the table says no more than the newest record.
"""

from __future__ import annotations

import argparse
import datetime
import json
import xml.etree.ElementTree as ET
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
README, RESULTS = ROOT / "README.md", ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- families: written by benchmarks/family_table.py -->\n", "<!-- /families -->"
_HEADER = """\
| family | encoder | decoder | whole model | files of | export | logits within | limits |
|---|---|---|---|---|---|---|---|
"""
_ROLES = ("encoder", "decoder", "whole")
_ALWAYS = {".bin", "old .bin", "msgpack"}  # beside safetensors: said above the table


def collect(report: Path) -> dict:
    """What a run of `tests/test_families.py` verified, family by family.

    Raises:
        SystemExit: a test failed, or the report holds none.
    """
    families: dict[str, dict] = {}
    pairs = []
    for case in ET.parse(report).getroot().iter("testcase"):
        if any(case.find(tag) is not None for tag in ("failure", "error", "skipped")):
            raise SystemExit(f"{case.get('name')} did not pass; the table needs a clean run")
        facts = {p.get("name"): p.get("value", "") for p in case.iter("property")}
        name = case.get("name", "")
        if name.startswith("test_random_pair"):
            pairs.append(
                {
                    "pair": facts["pair"],
                    "logits": float(facts["logits"]),
                    "near_ties": int(facts["near_ties"]),
                }
            )
        if "family" not in facts:
            continue
        entry = families.setdefault(facts["family"], {"reads": []})
        for item in case.iter("property"):
            if item.get("name") == "reads" and item.get("value") not in entry["reads"]:
                entry["reads"].append(item.get("value"))
        role = next((role for role in _ROLES if name.startswith(f"test_{role}[")), None)
        if role is None:
            continue
        part = entry.setdefault(role, {"logits": 0.0, "near_ties": 0, "tests": 0})
        part["logits"] = max(part["logits"], float(facts["logits"]))
        part["near_ties"] += int(facts["near_ties"])
        part["tests"] += 1
        part["export"] = facts["export"]
    if not families:
        raise SystemExit(f"{report} holds no tests of families")
    return {
        "date": datetime.date.today().isoformat(),
        "versions": {p: version(p) for p in ("jax", "torch", "transformers")},
        "families": dict(sorted(families.items())),
        "random_pairs": pairs,
    }


def newest() -> dict:
    """The newest record."""
    return json.loads(max(RESULTS.glob("families-*.json")).read_text())


def table(record: dict) -> str:
    """The README's table."""
    from jax_encdec.families import FAMILIES

    rows = []
    for name, entry in record["families"].items():
        parts = {role: entry[role] for role in _ROLES if role in entry}
        if not parts:
            raise SystemExit(f"{name} was tested in no role; run tests/test_families.py, too")
        if not set(entry["reads"]) >= _ALWAYS:
            raise SystemExit(f"{name} was not tested in every format; run tests/test_families.py")
        equal = [role for role, part in parts.items() if part["export"] == "equal"]
        cells = [
            name,
            *("verified" if role in parts else "" for role in _ROLES),
            ", ".join(["PyTorch", *(kind for kind in entry["reads"] if kind not in _ALWAYS)]),
            f"reopened; as {' and '.join(equal)}, equal" if equal else "reopened",
            f"{max(part['logits'] for part in parts.values()):.0e}",
            FAMILIES[name].limits,
        ]
        rows.append(f"| {' | '.join(cells)} |\n".replace("  ", " "))
    return _HEADER + "".join(rows)


def rewritten(readme: str, record: dict) -> str:
    """The README with the table of this record."""
    before, rest = readme.split(BEGIN)
    return before + BEGIN + table(record) + END + rest.split(END)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("report", type=Path, help="junit XML of tests/test_families.py")
    record = collect(parser.parse_args().report)
    path = RESULTS / f"families-{record['date']}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    README.write_text(rewritten(README.read_text(), record))
    print(
        f"{len(record['families'])} families, {len(record['random_pairs'])} random pairs -> {path}"
    )


if __name__ == "__main__":
    main()
