"""Pictures of results, drawn from the JSON files alone."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})


def decoding(results: Path) -> None:
    """Speed of one decoding step against the plain model, over the number of rows."""
    found = json.loads(results.read_text())["comparisons"]
    steps = [one for one in found if one["measure"] == "next token seconds"]
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for name in dict.fromkeys(one["contender"] for one in steps):
        of = [one for one in steps if one["contender"] == name]
        rows = [int(one["case"].split()[0]) for one in of]
        shared = "shared" in name
        (line,) = axes.plot(
            rows,
            [one["ratio"] for one in of],
            marker="o",
            markersize=4,
            linestyle="--" if shared else "-",
            label=name,
        )
        axes.fill_between(
            rows,
            [one["low"] for one in of],
            [one["high"] for one in of],
            color=line.get_color(),
            alpha=0.1,
            linewidth=0,
        )
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    ticks = sorted({int(one["case"].split()[0]) for one in steps})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_ylim(0, 1.2)
    axes.set(xlabel="rows in the batch", ylabel="speed of a step, plain = 1")
    axes.legend(fontsize=7, ncols=2, frameon=False)
    figure.savefig(results.with_suffix(".png"), dpi=150)
    plt.close(figure)


def peers(results: Path) -> None:
    """How many times faster than each way of doing it instead."""
    found = json.loads(results.read_text())["comparisons"]
    whole = [one for one in found if one["measure"] == "all requests seconds"]
    names = [one["case"].split("against ")[1] for one in whole]
    figure, axes = plt.subplots(figsize=(6, 0.4 + 0.4 * len(whole)), layout="constrained")
    ratios = [one["ratio"] for one in whole]
    spread = [
        [one["ratio"] - one["low"] for one in whole],
        [one["high"] - one["ratio"] for one in whole],
    ]
    bars = axes.barh(names, ratios, xerr=spread, height=0.6, ecolor="gray")
    axes.bar_label(bars, [f"{ratio:.1f}×" for ratio in ratios], padding=6)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlim(0.5, 2 * max(ratios))
    axes.set(xlabel="controlprefix is so many times faster")
    figure.savefig(results.with_suffix(".png"), dpi=150)
    plt.close(figure)
