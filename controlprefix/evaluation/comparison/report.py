"""ComparisonReport: the results of a comparison, as JSON, Markdown, LaTeX, a plot and a page."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from controlprefix.evaluation.metrics import bootstrap_mean
from controlprefix.reports import few_rows_note, figure_of, render, to_png, write_report


class Column(NamedTuple):
    """A figure in a table.

    Attributes:
        key: Its name in the results; that of accuracies continues with the attribute.
        title: Its heading.
        digits: Decimal places.
        better: Whether `low` or `high` values are better, if either is.
        explanation: What it is, in a sentence.
    """

    key: str
    title: str
    digits: int
    better: str
    explanation: str

    @property
    def heading(self) -> str:
        """The title, with an arrow towards better values."""
        return self.title + {"low": " ↓", "high": " ↑"}.get(self.better, "")


QUALITY = (
    Column("nats", "loss", 3, "low", "nats per token of held-out completions"),
    Column(
        "nats, other label",
        "loss, other label",
        3,
        "",
        "nats per token of the same completions under another label",
    ),
    Column("nats, unseen", "loss, unseen", 3, "low", "of rows with labels that were not trained"),
    Column("accuracy", "accuracy", 2, "high", "how often a classifier finds the requested label"),
    Column("BLEU", "BLEU", 1, "high", "overlap with the references, 0 to 100 (sacrebleu)"),
    Column("chrF", "chrF", 1, "high", "overlap of characters, 0 to 100 (sacrebleu)"),
    Column("ROUGE-1", "ROUGE-1", 1, "high", "overlap of words, 0 to 100 (rouge-score)"),
    Column("ROUGE-2", "ROUGE-2", 1, "high", "overlap of pairs of words, 0 to 100 (rouge-score)"),
    Column("ROUGE-L", "ROUGE-L", 1, "high", "longest common subsequence, 0 to 100 (rouge-score)"),
    Column("SARI", "SARI", 1, "high", "words of the prompt kept, deleted and added, 0 to 100"),
    Column("BLEU, unseen", "BLEU, unseen", 1, "high", "of rows with labels that were not trained"),
    Column("chrF, unseen", "chrF, unseen", 1, "high", "of rows with labels that were not trained"),
    Column("slot errors", "slot errors", 2, "low", "values of tables missing or invented, share"),
    Column("base-model nats", "base-model NLL", 2, "", "nats per token of its texts, plain model"),
    Column("distinct-2", "distinct-2", 2, "", "share of word pairs of its texts that differ"),
    Column("words", "words", 1, "", "words per text"),
)
_BEHIND = Column(
    "behind",
    "behind the best",
    3,
    "low",
    "mean over rows of how much higher their nats per token are than the best method's, with a "
    "95 % interval (bootstrap over prompts)",
)
KEPT = (
    Column(
        "divergence, written",
        "R⁻, free text",
        3,
        "low",
        "KL divergence (nats per token) of the adapted model on texts that the plain model wrote",
    ),
    Column(
        "divergence, answers",
        "R⁻, other prompts",
        3,
        "low",
        "the same, on the plain model's answers to prompts of no task or of another one",
    ),
    Column(
        "forgetting", "forgetting", 3, "low", "what it adds to the nats per token of general texts"
    ),
    Column(
        "effective rank",
        "effective rank",
        3,
        "",
        "share of the singular values of the last layer's states that make up .9 of their sum, on "
        "those answers",
    ),
    Column(
        "spectrum gap",
        "spectrum gap",
        3,
        "low",
        "largest difference of those cumulated singular values from the plain model's",
    ),
    Column(
        "divergence, off",
        "R⁻, off",
        3,
        "low",
        "the divergence when switched off; 0: exactly the plain model; empty: needs another copy",
    ),
)
COSTS = (
    Column("parameters", "trained values", 0, "low", "values that training changes"),
    Column("stored", "stored values", 0, "low", "values to keep, for all labels together"),
    Column(
        "bytes per adaptation", "bytes each", 0, "low", "bytes per task, label or user in 16 bits"
    ),
    Column("step seconds", "s per step", 2, "low", "seconds per training step"),
    Column("peak MiB", "peak MiB", 0, "low", "memory of training beyond the model's own"),
    Column(
        "tokens per second",
        "tokens/s, 8 ways",
        0,
        "high",
        "new tokens per second of 8 rows that each have another adaptation",
    ),
)
SECTIONS = {
    "Quality": QUALITY,
    "What it does to other texts": KEPT,
    "Cost": COSTS,
}


@dataclass(frozen=True)
class ComparisonReport:
    """The results of a comparison.

    Attributes:
        options: What was compared: settings, number of rows, model, a hash of the data.
        methods: Per method: `validation` (learning rate -> loss), `runs` (seed -> figures),
            `texts` (a few rows) or `skipped` (why).
        about: Command, date, device and versions.
    """

    options: dict[str, Any]
    methods: dict[str, dict[str, Any]]
    about: dict[str, Any]

    @classmethod
    def from_dict(cls, results: Mapping[str, Any]) -> Self:
        """The report of results as `to_dict` returns them."""
        return cls(results["options"], results["methods"], results.get("about", {}))

    def to_dict(self) -> dict[str, Any]:
        """All results in a form that JSON can hold."""
        return asdict(self)

    @property
    def skipped(self) -> dict[str, str]:
        """Why methods were not measured."""
        return {name: m["skipped"] for name, m in self.methods.items() if "skipped" in m}

    def figures(self, method: str, key: str) -> list[float]:
        """A figure of each seed; of `accuracy` its mean over attributes."""
        values = []
        for run in self.methods[method].get("runs", {}).values():
            per_attribute = [
                v for name, v in run.items() if name == key or name.startswith(f"{key}, ")
            ]
            exact = [run[key]] if key in run else per_attribute if key == "accuracy" else []
            if exact:
                values.append(statistics.fmean(exact))
        return values

    def tables(self) -> list[tuple[str, list[Column], list[tuple[str, list[tuple[str, bool]]]]]]:
        """Per section: its title, its columns, and per method the cells and whether they lead."""
        names = [name for name, method in self.methods.items() if method.get("runs")]
        behind = self._behind_best(names)
        tables = []
        for title, columns in SECTIONS.items():
            header = [c for c in columns if any(self.figures(name, c.key) for name in names)]
            best = {c.key: self._best(names, c) for c in header}
            rows = [
                (
                    name,
                    [
                        (_mean_and_spread(self.figures(name, c.key), c.digits), name in best[c.key])
                        for c in header
                    ],
                )
                for name in names
                if any(self.figures(name, c.key) for c in header)
            ]
            if columns is QUALITY and behind:
                header.insert(1, _BEHIND)
                for name, cells in rows:
                    cells.insert(1, (behind.get(name, ""), False))
            if header:
                tables.append((title, header, rows))
        return tables

    def _behind_best(self, names: Sequence[str]) -> dict[str, str]:
        """How far each method's loss is behind that of the best one, row by row."""
        nats: dict[str, list[float]] = {}
        for name in names:
            by_seed = self.methods[name].get("row nats", {})
            if by_seed := [by_seed[seed] for seed in self.methods[name]["runs"] if seed in by_seed]:
                nats[name] = [statistics.fmean(row) for row in zip(*by_seed, strict=True)]
        if len(nats) < max(2, len(names)):  # the best may be among those without
            return {}
        best = min(nats, key=lambda name: statistics.fmean(nats[name]))
        prompts = self.methods[best]["row prompts"]
        differences = {
            name: [value - other for value, other in zip(own, nats[best], strict=True)]
            for name, own in nats.items()
        }
        return {
            name: "" if name == best else bootstrap_mean(values, prompts).text(".3f")
            for name, values in differences.items()
        }

    def _best(self, names: Sequence[str], column: Column) -> set[str]:
        """The methods whose mean is best, as far as the digits show."""
        if not column.better:
            return set()
        means = {
            name: round(statistics.fmean(values), column.digits)
            for name in names
            if name != "plain" and (values := self.figures(name, column.key))
        }
        if len(set(means.values())) < 2:
            return set()
        leader = (min if column.better == "low" else max)(means.values())
        return {name for name, mean in means.items() if mean == leader}

    def markdown(self) -> str:
        """The tables as Markdown; the best values are bold."""
        parts = []
        for title, header, rows in self.tables():
            lines = [
                _row("method", *(c.heading for c in header)),
                "|" + " --- |" * (len(header) + 1),
            ]
            for name, cells in rows:
                marked = (f"**{cell}**" if best and cell else cell for cell, best in cells)
                lines.append(_row(name, *marked))
            notes = "; ".join(f"{c.title}: {c.explanation}" for c in header)
            parts.append(f"### {title}\n\n" + "\n".join(lines) + f"\n\n{notes}.")
        if self.skipped:
            reasons = "\n".join(f"- {name}: {reason}" for name, reason in self.skipped.items())
            parts.append(f"### Skipped\n\n{reasons}")
        return "\n\n".join(parts) + "\n"

    def latex(self) -> str:
        """The tables as LaTeX, for the packages booktabs and amsmath."""
        parts = []
        for title, header, rows in self.tables():
            lines = [
                r"\begin{tabular}{l" + "r" * len(header) + "}",
                r"\toprule",
                " & ".join(["method", *(_tex(c.heading) for c in header)]) + r" \\",
                r"\midrule",
            ]
            for name, cells in rows:
                marked = (
                    rf"\textbf{{{_tex(cell)}}}" if best and cell else _tex(cell)
                    for cell, best in cells
                )
                lines.append(" & ".join([_tex(name), *marked]) + r" \\")
            parts.append("\n".join([f"% {title}", *lines, r"\bottomrule", r"\end{tabular}"]))
        return "\n\n".join(parts) + "\n"

    def save(self, folder: str | Path) -> Path:
        """Write `report.html`, `report.json`, `report.md`, `report.tex` and `report.png`.

        Returns:
            The HTML file.

        Raises:
            StoreError: If the folder cannot be written.
            MissingDependencyError: If matplotlib or jinja2 is not installed.
        """
        image = self._plot()
        html = self._html(image)
        write_report(
            folder,
            {
                "report.json": json.dumps(self.to_dict(), indent=2) + "\n",
                "report.md": self.markdown(),
                "report.tex": self.latex(),
                "report.png": image,
                "report.html": html,
            },
        )
        return Path(folder) / "report.html"

    def _html(self, image: bytes) -> str:
        rates = [
            f"{name} {min(losses, key=lambda rate: losses[rate])}"
            for name, method in self.methods.items()
            if (losses := {r: v for r, v in method.get("validation", {}).items() if v is not None})
        ]
        return render(
            "comparison.html",
            {"plot": image},
            options=self.options,
            about={
                "model": f"{self.options['model']} in {self.options['dtype']}",
                "weights": self.options["fingerprint"][:12],
                "data": self.options["data"],
                **self.about,
            },
            tables=self.tables(),
            few=few_rows_note(self.options["rows"]["test"]),
            skipped=self.skipped,
            rates=rates,
            texts={
                name: [
                    (", ".join(map(str, t["labels"].values())), t["prompt"], t["text"])
                    for t in m["texts"]
                ]
                for name, m in self.methods.items()
                if m.get("texts")
            },
        )

    def _plot(self) -> bytes:
        figure = figure_of((9, 5))
        axes = figure.subplots()
        for name in self.methods:
            nats, elsewhere = (self.figures(name, k) for k in ("nats", "divergence, answers"))
            if nats and elsewhere:
                x, y = statistics.fmean(elsewhere), statistics.fmean(nats)
                marker = "*" if "controlprefix" in name else "o"
                color = f"C{len(axes.lines) % 10}"
                filled = color if len(axes.lines) < 10 else "none"
                axes.plot(
                    [x], [y], marker, color=color, markerfacecolor=filled, markersize=9, label=name
                )
        axes.set_xlabel("R⁻: nats per token on answers to other prompts (lower is better)")
        axes.set_ylabel("loss: nats per held-out token (lower is better)")
        axes.set_xscale("symlog", linthresh=0.01)
        if axes.lines:
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
        return to_png(figure)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _mean_and_spread(values: Sequence[float], digits: int) -> str:
    """Mean, and the standard deviation if it is visible in that many digits."""
    if not values:
        return ""
    mean = f"{statistics.fmean(values):,.{digits}f}"
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{mean} ± {deviation:,.{digits}f}" if deviation >= 0.5 * 10**-digits else mean


def _tex(text: str) -> str:
    """Text with the characters that LaTeX reads as commands written out."""
    names = {
        "&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "±": r"$\pm$", "R⁻": r"$R^-$",
        "↓": r"$\downarrow$", "↑": r"$\uparrow$",
    }  # fmt: skip
    for character, name in names.items():
        text = text.replace(character, name)
    return text
