"""Write `docs/results/speed.md` from the JSON files beside it. Measures nothing.

Its first table is put into the README too; a test compares the two.
"""

import json
import re
from typing import Any

from side_by_side import RESULTS


def main() -> None:
    files = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    measured = {name: one for name, one in files.items() if "comparisons" in one}
    lines = [
        "# Speed",
        "",
        "Ratios of runs beside each other, with their quartiles; above 1 is faster (or, for MiB, "
        "more). Absolute times of a shared machine mean little. Written by "
        "`python benchmarks/summary.py` from the JSON files in this folder.",
        "",
        *in_short(measured),
    ]
    for name, one in measured.items():
        lines += ["", f"## {name}", "", *details(one)]
        if (RESULTS / f"{name}.png").exists():
            lines += ["", f"![]({name}.png)"]
    (RESULTS / "speed.md").write_text("\n".join(lines) + "\n")
    readme = RESULTS.parent.parent / "README.md"
    table = "\n".join(["<!-- speed -->", "", *in_short(measured), "", "<!-- /speed -->"])
    text = re.sub(r"<!-- speed -->.*<!-- /speed -->", table, readme.read_text(), flags=re.DOTALL)
    readme.write_text(text)


def in_short(measured: dict[str, Any]) -> list[str]:
    """The table that the README shows too."""
    rows = ["| what | against | ratio (quartiles) |", "| --- | --- | --- |"]
    generate = measured["generate-smollm2-cpu"]["comparisons"]
    for one in generate:
        if one["measure"] == "next token seconds" and one["contender"] in (
            "16 own slots",
            "48 own slots",
            "16 own slots, 16 shared",
        ):
            what = f"a decoding step of {one['case']}, {one['contender']} a row"
            rows.append(f"| {what.replace('1 rows', '1 row')} | plain model | {ratio(one)} |")
    for one in measured["peers-smollm2-cpu"]["comparisons"]:
        if one["measure"] == "all requests seconds":
            what, peer = one["case"].split(", against ")
            rows.append(f"| {what} | {peer} | {ratio(one)} |")
    for one in measured["train-smollm2-cpu"]["comparisons"]:
        if one["contender"] == "controlprefix":
            what = {"step seconds": "a training step", "peak MiB": "peak memory of training"}
            rows.append(f"| {what[one['measure']]} | PEFT prefix tuning | {ratio(one)} |")
    return rows


def details(one: dict[str, Any]) -> list[str]:
    """Everything in one file."""
    machine = one["machine"]
    where = machine["gpu"] or f"{machine['processor']}, {machine['threads']} threads"
    lines = [
        f"`{one['command']}` on {where}; torch {machine['torch']}, transformers "
        f"{machine['transformers']}.",
        "",
        f"| case | contender | measure | against {one['reference']} | quartiles |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in one["comparisons"]:
        cells = (row["case"], row["contender"], row["measure"], f"{row['ratio']:.2f}")
        lines.append(f"| {' | '.join(cells)} | {row['low']:.2f} to {row['high']:.2f} |")
    return [*lines, "", *(f"- {note}" for note in one["notes"])]


def ratio(one: dict[str, Any]) -> str:
    digits = 1 if one["ratio"] >= 3 else 2
    low, high = (f"{one[name]:.{digits}f}" for name in ("low", "high"))
    return f"{one['ratio']:.{digits}f} ({low} to {high})"


if __name__ == "__main__":
    main()
