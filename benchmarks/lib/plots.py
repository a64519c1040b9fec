"""Plots of results, drawn from the JSON files alone."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

STYLE: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


def comparisons(path: Path, measure: str) -> list[dict[str, Any]]:
    """The rows of a result file that have one measure."""
    return [row for row in json.loads(path.read_text())["comparisons"] if row["measure"] == measure]


def decoding(path: Path) -> None:
    """Speed of one decode step as a share of the plain model's, over the number of rows."""
    steps = comparisons(path, "next token seconds")
    with rc_context(STYLE):
        figure = Figure(figsize=(6, 3.2), layout="constrained")
        axes: Axes = figure.subplots()
        for name in dict.fromkeys(row["contender"] for row in steps):
            points = [row for row in steps if row["contender"] == name]
            rows = [int(point["case"].split()[0]) for point in points]
            (line,) = axes.plot(
                rows,
                [point["ratio"] for point in points],
                marker="o",
                markersize=4,
                linestyle="--" if "shared" in name else "-",
                label=name,
            )
            axes.fill_between(
                rows,
                [point["low"] for point in points],
                [point["high"] for point in points],
                color=line.get_color(),
                alpha=0.1,
                linewidth=0,
            )
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xscale("log", base=2)
        ticks = sorted({int(row["case"].split()[0]) for row in steps})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_ylim(bottom=0)
        axes.set(xlabel="rows in the batch", ylabel="speed of a decode step, plain = 1")
        axes.legend(fontsize=7, ncols=2, frameon=False)
        figure.savefig(path.with_suffix(".png"), dpi=150)


def peers(path: Path) -> None:
    """The speed of this library as a multiple of each peer's."""
    rows = comparisons(path, "all requests seconds")
    names = [row["case"].split("against ")[1] for row in rows]
    ratios = [row["ratio"] for row in rows]
    spread = [
        [row["ratio"] - row["low"] for row in rows],
        [row["high"] - row["ratio"] for row in rows],
    ]
    with rc_context(STYLE):
        figure = Figure(figsize=(6, 0.4 + 0.4 * len(rows)), layout="constrained")
        axes: Axes = figure.subplots()
        bars = axes.barh(names, ratios, xerr=spread, height=0.6, ecolor="gray")
        axes.bar_label(bars, [f"{ratio:.1f}×" for ratio in ratios], padding=6)
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_xlim(0.5, 2 * max(ratios))
        axes.set(xlabel="speed of controlprefix, peer = 1")
        figure.savefig(path.with_suffix(".png"), dpi=150)


def dials(path: Path) -> None:
    """The probability of each label over the strength, plain and calibrated."""
    results = json.loads(path.read_text())["dials"]
    with rc_context(STYLE):
        figure = Figure(figsize=(6, 2.6), layout="constrained")
        axes = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
        for label, kinds in results.items():
            panel: Axes = axes[list(results).index(label)]
            for name in ("attention mass", "attention mass, calibrated"):
                points = [(w, p) for w, p, _ in kinds.get(name, {}).get("points", ()) if w <= 1]
                if points:
                    panel.plot([w for w, _ in points], [p for _, p in points], "o-", label=name)
            panel.set(xlabel=f"strength of {label}", ylim=(0, 1))
        axes[0].set_ylabel("probability of the label")
        axes[0].legend(frameon=False, fontsize=7)
        figure.savefig(path.with_suffix(".png"), dpi=150)


def curves(
    path: Path,
    points: Mapping[str, Sequence[tuple[float, float]]],
    *,
    xlabel: str,
    ylabel: str,
    log: bool = False,
) -> None:
    """Lines with a marker at each point, one per name."""
    with rc_context(STYLE):
        figure = Figure(figsize=(6, 3.6), layout="constrained")
        axes: Axes = figure.subplots()
        for name, values in points.items():
            axes.plot([x for x, _ in values], [y for _, y in values], "o-", label=name)
        if log:
            axes.set_xscale("log", base=2)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.legend(frameon=False)
        figure.savefig(path, dpi=150)
