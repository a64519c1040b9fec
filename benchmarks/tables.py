"""Write the pages and tables of all results from the JSON files in `docs/results/`.

It measures nothing. The pages `speed.md`, `store.md` and `serving.md` are written whole, and the
tables of the README and docs/results.md between their markers (`<!-- name -->` … `<!-- /name -->`).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from lib.interleaved import Comparison
from lib.results import ROOT, arguments
from lib.tables import header, line

ENGINES = ("transformers", "vllm")
README_ROWS = (  # beginnings of rows of the speed table
    "a decode step of 8 rows, 48 own slots each",
    "32 users, 32 tokens each",
    "8 users, 32 tokens each, 1000 tokens",
    "a training step",
)


def read_results(folder: Path) -> dict[str, Any]:
    """All result files by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def speed(files: Mapping[str, Any]) -> list[tuple[str, str, Comparison]]:
    """What, against, and the comparison, for the short table."""
    rows: list[tuple[str, str, Comparison]] = []
    contenders = ("16 own slots", "48 own slots", "16 own slots, 16 shared")
    for row in comparisons(files, "decoding-smollm2-cpu", "next token seconds"):
        if row.contender in contenders:
            rows.append((f"a decode step of {row.case}, {row.contender} each", "plain model", row))
    for row in comparisons(files, "decoding-smollm2-cpu-400", "next token seconds"):
        if row.contender == "48 own slots":
            what = f"the same after 400 tokens, {row.case}, 48 own slots each"
            rows.append((what, "plain model", row))
    for row in comparisons(files, "peers-smollm2-cpu", "all requests seconds"):
        what, peer = row.case.split(", against ")
        rows.append((what, peer, row))
    titles = {"step seconds": "a training step", "peak MiB": "peak memory of training"}
    forms = {"controlprefix": "`direct`", "controlprefix, shared network": "`shared`, the default"}
    for row in comparisons(files, "training-smollm2-cpu"):
        if form := forms.get(row.contender):
            rows.append((f"{titles[row.measure]} ({form})", "PEFT prefix tuning", row))
    nll = {row.contender: row for row in comparisons(files, "user-training-speed", "nll")}
    for row in comparisons(files, "user-training-speed", "user seconds"):
        name = row.contender
        if name.startswith("controlprefix, "):
            what = f"users per hour: {name.partition(', ')[2]}, {nll[name].value:.2f} nats"
            peer = f"{files['user-training-speed']['reference']}, {nll[name].reference:.2f} nats"
            rows.append((what, peer, row))
    return rows


def comparisons(
    files: Mapping[str, Any], name: str, measure: str | None = None
) -> list[Comparison]:
    """The comparisons of a result file, of one measure or of all."""
    rows = [Comparison(**row) for row in files.get(name, {}).get("comparisons", ())]
    return [row for row in rows if measure in (None, row.measure)]


def speed_table(files: Mapping[str, Any]) -> str:
    lines = [line(what, against, str(row)) for what, against, row in speed(files)]
    return "\n".join([header("what", "against", "ratio (quartiles)"), *lines])


def peers_table(files: Mapping[str, Any]) -> str:
    """The rows of the speed table that the README has."""
    lines = [
        line(what, against, str(row))
        for what, against, row in speed(files)
        if f"{what}, {against}".startswith(README_ROWS)
    ]
    return "\n".join([header("what", "against", "ratio (quartiles)"), *lines])


def speed_page(files: Mapping[str, Any]) -> str:
    """All comparisons."""
    parts = [
        "# Speed",
        "Ratios of interleaved runs, with quartiles; above 1 is faster (or, for MiB, more). "
        "Absolute times of a shared machine mean little. Written by `python benchmarks/tables.py`.",
        speed_table(files),
    ]
    for name, results in files.items():
        if "comparisons" not in results:
            continue
        columns = ("case", "contender", "measure", f"against {results['reference']}")
        lines = [
            line(row.case, row.contender, row.measure, str(row)) for row in comparisons(files, name)
        ]
        parts += [f"## {name}", provenance(results)]
        if lines:
            parts.append("\n".join([header(*columns), *lines]))
        if results["notes"]:
            parts.append("\n".join(f"- {note}" for note in results["notes"]))
        if name.startswith(("decoding-", "peers-")):
            parts.append(f"![Ratios of {name}]({name}.png)")
    return "\n\n".join(parts)


def provenance(results: Mapping[str, Any]) -> str:
    """Command, commit, date, model and machine of a result file."""
    machine = results["machine"]
    place = machine["gpu"] or f"{machine['processor']}, {machine['threads']} threads"
    model = f"{results['model']}; " if results.get("model") else ""
    return (
        f"`{results['command']}` at commit {results['commit']}, {results['date']}: {model}{place}; "
        f"torch {machine['torch']}, transformers {machine['transformers']}."
    )


def store_page(files: Mapping[str, Any]) -> str:
    """The store at size, and storage dtypes."""
    columns = files["store"]["store"]
    lines = [header("", *columns)]
    for name in next(iter(columns.values())):
        cells = [
            f"{value['p50']:.2f} ({value['p99']:.2f})" if isinstance(value, dict) else f"{value:,}"
            for value in (column[name] for column in columns.values())
        ]
        lines.append(line(name, *cells))
    dtypes = files["storage-dtypes"]
    reference = dtypes["dtypes"]["bfloat16"]["nats per token"]
    dtype_lines = [header("dtype", "bytes of 16 slots", "nats per token", "against bfloat16")]
    for name, figures in dtypes["dtypes"].items():
        nats = figures["nats per token"]
        size = f"{figures['bytes of 16 slots']:,}"
        dtype_lines.append(line(name, size, f"{nats:.4f}", f"{nats - reference:+.4f}"))
    return "\n\n".join(
        [
            "# The store",
            provenance(files["store"]),
            "Medians and 99th percentiles. *small*: about the size of a user code; *large*: 16 "
            "slots of a 135 M model in int8. *cold* is read from the database, checked, and "
            "converted to float32; *warm* is in memory, and the database is only asked whether "
            "that version is still current. What a cold user adds to the first token is *fetch of "
            "1, cold*. Memory is the peak of the process, the measurement included.",
            "\n".join(lines),
            "## Storage dtypes",
            provenance(dtypes),
            f"Prefixes trained for {dtypes['steps']} steps with seed {dtypes['seed']} on the "
            "demo's messages, stored in each dtype, read back, and scored on held-out messages.",
            "\n".join(dtype_lines),
        ]
    )


def serving_table(files: Mapping[str, Any]) -> str:
    """Throughput and latencies of servers."""
    titles = ("engine", "requests", "tokens/s against no prefix")
    lines = [header(*titles, "first text: p50, p99 (s)", "each token: p50, p99 (s)")]
    for engine in ENGINES:
        for name, figures in files.get(f"serving-{engine}", {}).get("contenders", {}).items():
            low, high = min(figures["ratios"]), max(figures["ratios"])
            cells = [f"{figures['ratio']:.2f} ({low:.2f} to {high:.2f})"]
            for title in ("first text", "each token"):
                values = [figures.get(f"{title} {share}") for share in ("p50", "p99")]
                cells.append(", ".join(f"{value:.2f}" for value in values if value is not None))
            lines.append(line(engine, name, *cells))
    return "\n".join(lines)


def serving_page(files: Mapping[str, Any]) -> str:
    """Servers under load."""
    parts = [
        "# Servers under load",
        "SmolLM2-135M, 16 slots per user, users drawn from a Zipf distribution (exponent 1.1). "
        "Contenders take turns: with a fixed number of concurrent requests for tokens per second "
        "(median of rounds, with the lowest and highest); then with Poisson arrivals at 0.7 of the "
        "first contender's rate for latencies. Load generator and servers share the machine.",
        serving_table(files),
    ]
    for engine in ENGINES:
        if results := files.get(f"serving-{engine}"):
            options = ", ".join(f"{name} {value}" for name, value in results["options"].items())
            num_failed = sum(figures["failed"] for figures in results["contenders"].values())
            rate = results["requests per second"]
            parts.append(
                f"{provenance(results)} {options}; {rate} requests per second at random times; "
                f"{num_failed} failed."
            )
    return "\n\n".join(parts)


def quality_table(files: Mapping[str, Any]) -> str:
    """Means over seeds of the main figures."""
    columns = (
        ("formality", "nats", "loss", 3),
        ("formality", "accuracy, ", "accuracy", 2),
        ("sentiment", "nats", "loss", 3),
        ("sentiment", "accuracy, ", "accuracy", 2),
        ("e2e", "nats", "loss", 3),
        ("webnlg", "nats", "loss", 3),
    )
    lines = [header("method", *(f"{name}: {title}" for name, _, title, _ in columns))]
    for method in files["comparison-formality-60"]["methods"]:
        cells = []
        for data_set, key, _, digits in columns:
            result = files[f"comparison-{data_set}-60"]["methods"].get(method, {})
            runs = result.get("runs", {}).values()
            # Accuracy is by the classifiers of all sets of rows.
            is_mean = key.endswith(", ")
            values = [
                value
                for run in runs
                for name, value in run.items()
                if (name.startswith(key) if is_mean else name == key)
            ]
            cells.append(f"{mean(values):.{digits}f}" if runs else "")
        lines.append(line(method, *cells))
    return "\n".join(lines)


def attributes_table(files: Mapping[str, Any]) -> str:
    """Accuracy and base-model NLL of both studies."""
    studies = files["attributes"]["studies"]
    titles = [f"{name}: {title}" for name in studies for title in ("accuracy", "base-model NLL")]
    lines = [header("method", *titles)]
    for method in next(iter(studies.values()))["methods"]:
        cells = []
        for study in studies.values():
            figures = study["methods"].get(method, {})
            for key, digits in (("accuracy, mean", 3), ("base-model nll", 2)):
                cells.append(f"{figures[key]:.{digits}f}" if figures else "")
        lines.append(line(method, *cells))
    return "\n".join(lines)


def authors_table(files: Mapping[str, Any]) -> str:
    """The figures from 16 posts."""
    columns = (
        ("nll", 3),
        ("nll, another's", 3),
        ("seconds per user", 2),
        ("bytes per user", 0),
    )
    lines = [header("method", "NLL", "NLL, another's", "seconds", "bytes")]
    for name, by_count in files["authors"]["methods"].items():
        figures = by_count.get("16") or by_count["0"]
        cells = [f"{figures[k]:,.{d}f}" if k in figures else "" for k, d in columns]
        lines.append(line(name, *cells))
    return "\n".join(lines)


TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "peers": peers_table,
    "speed": speed_table,
    "serving": serving_table,
    "quality": quality_table,
    "attributes": attributes_table,
    "authors": authors_table,
}
DOCUMENTS = {
    "README.md": ("peers",),
    "docs/results.md": ("speed", "serving", "quality", "attributes", "authors"),
}
PAGES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "speed": speed_page,
    "store": store_page,
    "serving": serving_page,
}


def fill_markers(text: str, tables: Mapping[str, str]) -> str:
    """A document with the tables between their markers."""
    for name, table in tables.items():
        before, start, rest = text.partition(f"<!-- {name} -->")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        if not start or not end:
            raise SystemExit(f"the markers of the table {name!r} are not both there")
        text = f"{before}<!-- {name} -->\n\n{table}\n\n<!-- /{name} -->{after}"
    return text


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments(__doc__).parse_args(argv)
    folder: Path = options.results
    files = read_results(folder)
    for name, page in PAGES.items():
        (folder / f"{name}.md").write_text(page(files) + "\n")
    for document, names in DOCUMENTS.items():
        tables = {name: TABLES[name](files) for name in names}
        path = ROOT / document
        path.write_text(fill_markers(path.read_text(), tables))


if __name__ == "__main__":
    main()
