"""Write `speed.md`, `store.md` and `serving.md` in `docs/results/` from the JSON files there.

It measures nothing. The first table of speed is put into the README too, and short ones of what
prefixes learn, of control, of servers and of what users' prefixes are worth; tests compare them.
"""

import json
import re
from statistics import mean
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
    (RESULTS / "store.md").write_text("\n".join(of_store(files["store"], files["payloads"])) + "\n")
    (RESULTS / "serving.md").write_text("\n".join(of_servers(files)) + "\n")
    readme = RESULTS.parent.parent / "README.md"
    text = readme.read_text()
    for name, rows in (
        ("speed", in_short(measured)),
        ("learned", learned(files["training"]["data"])),
        ("personal", personal(files["personal"]["ways"])),
        ("control", control(files["control"])),
        ("serving", servers(files)),
    ):
        table = "\n".join([f"<!-- {name} -->", "", *rows, "", f"<!-- /{name} -->"])
        text = re.sub(f"<!-- {name} -->.*<!-- /{name} -->", table, text, flags=re.DOTALL)
    readme.write_text(text)


def learned(data: dict[str, Any]) -> list[str]:
    """What prefixes learn, in short: means over seeds."""
    columns = (
        ("formality", "nats", "nats"),
        ("formality", "control, formality_pavlick", "control"),
        ("sentiment", "nats", "nats"),
        ("sentiment", "control, sentiment_yelp", "control"),
        ("e2e", "nats", "nats"),
        ("webnlg", "nats", "nats"),
    )
    titles = " | ".join(f"{name}: {title}" for name, _, title in columns)
    rows = [f"| | {titles} |", "| --- |" + " --- |" * len(columns)]
    for way in data["formality"]:
        cells = []
        for name, key, _ in columns:
            runs = data[name].get(way, {}).values()
            digits = 3 if key == "nats" else 2
            cells.append(f"{mean(run[key] for run in runs):.{digits}f}" if runs else "")
        rows.append(f"| {way} | {' | '.join(cells)} |")
    return rows


def personal(ways: dict[str, Any]) -> list[str]:
    """What a prefix of one's own is worth, in short: from 16 texts."""
    rows = [
        "| | nats | with another's | seconds | bytes |",
        "| --- | --- | --- | --- | --- |",
    ]
    for way, by_count in ways.items():
        found = by_count.get("16") or by_count["0"]
        seconds = found.get("seconds a user")
        cells = (
            f"{found['nats']:.3f}",
            f"{found['nats, shuffled']:.3f}" if "nats, shuffled" in found else "",
            f"{seconds:.2f}" if seconds and "16" in by_count else "",
            f"{found['bytes a user']:,.0f}" if "bytes a user" in found else "",
        )
        rows.append(f"| {way} | {' | '.join(cells)} |")
    return rows


def control(found: dict[str, Any]) -> list[str]:
    """Several attributes at once, in short."""
    sets = ("aspects", "styles")
    titles = [f"{name}: {title}" for name in sets for title in ("control", "fluency")]
    rows = [f"| | {' | '.join(titles)} |", "| --- |" + " --- |" * len(titles)]
    for way in found["aspects"]["ways"]:
        cells = []
        for name in sets:
            one = found[name]["ways"].get(way)
            cells += [f"{one['control, mean']:.3f}", f"{one['fluency']:.2f}"] if one else ["", ""]
        rows.append(f"| {way} | {' | '.join(cells)} |")
    return rows


ENGINES = {"serving": "transformers", "serving_vllm": "vLLM"}


def servers(files: dict[str, Any]) -> list[str]:
    """Throughput and delays of servers under load."""
    rows = [
        "| engine | requests | tokens/s against none with a prefix | first text: p50, p99 (s) | "
        "a token: p50, p99 (s) |",
        "| --- | --- | --- | --- | --- |",
    ]
    for file, engine in ENGINES.items():
        for name, one in files.get(file, {}).get("contenders", {}).items():
            spread = f"{one['ratio']:.2f} ({min(one['ratios']):.2f} to {max(one['ratios']):.2f})"
            cells = [spread]
            for title in ("first text", "each token"):
                both = [one.get(f"{title} {share}") for share in ("p50", "p99")]
                cells.append(", ".join(f"{value:.2f}" for value in both if value is not None))
            rows.append(f"| {engine} | {name} | {' | '.join(cells)} |")
    return rows


def of_servers(files: dict[str, Any]) -> list[str]:
    """The page about servers."""
    lines = [
        "# Servers under load",
        "",
        "SmolLM2-135M in bfloat16, 16 slots a user, users drawn by Zipf's law (1.1). Contenders "
        "take turns: as fast as they can for tokens a second (median of rounds, and the lowest "
        "and highest round), then at random moments at seven tenths of what the first can take "
        "for the delays. Load generator and servers share the machine.",
        "",
        *servers(files),
    ]
    for file in ENGINES:
        if one := files.get(file):
            about = ", ".join(f"{name} {value}" for name, value in one["options"].items())
            failed = sum(found["failed"] for found in one["contenders"].values())
            lines += [
                "",
                f"`{one['command']}` on {place(one)}: {about}; {one['rate']} requests a second at "
                f"random moments; {failed} failed.",
            ]
    return lines


def of_store(store: dict[str, Any], payloads: dict[str, Any]) -> list[str]:
    """The page about the store."""
    found = store["store"]
    lines = [
        "# The store",
        "",
        f"`{store['command']}` on {place(store)}: medians and 99th percentiles. Small: the size a "
        "user code will have; large: 16 slots of a 135 M model in int8. *Cold* is read from the "
        "database (whose pages the system may hold), checked, and turned into float32; *warm* is "
        "in memory, and the database is asked only whether that is still current, which SQLite "
        "answers by itself and PostgreSQL is asked for unless the store is opened with "
        "`exact=False`. What a cold user adds to the first token is *fetch of 1, cold*. Memory is "
        "the process's peak up to there, all the measuring included.",
        "",
        f"| | {' | '.join(found)} |",
        "| --- |" + " --- |" * len(found),
    ]
    for name in next(iter(found.values())):
        cells = [
            f"{one['p50']:.2f} ({one['p99']:.2f})" if isinstance(one, dict) else f"{one:,}"
            for one in (column[name] for column in found.values())
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        "## Smaller payloads",
        "",
        f"`{payloads['command']}`: prefixes trained for {payloads['steps']} steps with seed "
        f"{payloads['seed']} on the demo's messages, stored in each dtype, read back, and scored "
        "on the held-out messages.",
        "",
        "| payload | bytes of 16 slots | nats per token | against bfloat16 |",
        "| --- | --- | --- | --- |",
    ]
    as_is = payloads["payloads"]["bfloat16"]["nats per token"]
    for name, one in payloads["payloads"].items():
        nats = one["nats per token"]
        size = one["bytes of 16 slots"]
        lines.append(f"| {name} | {size:,} | {nats:.4f} | {nats - as_is:+.4f} |")
    return lines


def place(one: dict[str, Any]) -> str:
    """Where something was measured."""
    machine = one["machine"]
    return machine["gpu"] or f"{machine['processor']}, {machine['threads']} threads"


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
    for one in measured["generate-smollm2-cpu-400"]["comparisons"]:
        if one["measure"] == "next token seconds" and one["contender"] == "48 own slots":
            what = f"the same behind 400 tokens, {one['case']}, 48 own slots a row"
            rows.append(f"| {what} | plain model | {ratio(one)} |")
    for one in measured["peers-smollm2-cpu"]["comparisons"]:
        if one["measure"] == "all requests seconds":
            what, peer = one["case"].split(", against ")
            rows.append(f"| {what} | {peer} | {ratio(one)} |")
    for one in measured["train-smollm2-cpu"]["comparisons"]:
        if one["contender"] == "controlprefix":
            names = {"step seconds": "a training step", "peak MiB": "peak memory of training"}
            rows.append(f"| {names[one['measure']]} | PEFT prefix tuning | {ratio(one)} |")
    users = measured["users"]["comparisons"]
    for one in users:
        if one["measure"] == "user seconds" and one["contender"].startswith("ours, "):
            nats = next(
                o for o in users if o["contender"] == one["contender"] and o["measure"] == "nats"
            )
            what = f"users an hour: {one['contender'][6:]}, {nats['value']:.2f} nats"
            peer = f"{measured['users']['reference']} each, {nats['reference']:.2f} nats"
            rows.append(f"| {what} | {peer} | {ratio(one)} |")
    return rows


def details(one: dict[str, Any]) -> list[str]:
    """Everything in one file."""
    machine = one["machine"]
    lines = [
        f"`{one['command']}` on {place(one)}; torch {machine['torch']}, transformers "
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
