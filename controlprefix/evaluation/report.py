"""EvaluationReport: the results of an evaluation, and their HTML page."""

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from controlprefix._io import requires_extra
from controlprefix.errors import StoreError
from controlprefix.evaluation.metrics import Estimate

PAGE_STYLE = """\
:root { color-scheme: light dark; --line: #ddd; --soft: #666; --best: #e7f3ea; }
@media (prefers-color-scheme: dark) { :root { --line: #444; --soft: #aaa; --best: #1e3a28; } }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
.wide { overflow-x: auto; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .6rem; text-align: left;
         vertical-align: top; }
th[title] { text-decoration: underline dotted; cursor: help; }
td { font-variant-numeric: tabular-nums; }
.best { background: var(--best); font-weight: 600; }
img { max-width: 100%; background: #fff; }
pre { overflow-x: auto; }
.note { color: var(--soft); }
"""

_TEMPLATE = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>What the prefixes do</title>
<style>{{ style | safe }}</style></head><body>
{% macro table(header, rows) %}
<div class="wide"><table>
<thead><tr>{% for cell in header %}<th>{{ cell }}</th>{% endfor %}</tr></thead><tbody>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{% endmacro %}
<h1>What the prefixes do</h1>
<p>{{ report.num_rows }} rows. In brackets: 95 % confidence intervals; rows with the same prompt
count as one.</p>
{% if report.not_classified %}<p class="note">Not counted: {{ report.not_classified | join(", ") }};
no classifier knows them, or they occurred in mixtures only.</p>{% endif %}
<h2>Attribute accuracy</h2>
<p>How often the classifier predicts a label for texts that were requested with it.</p>
{{ table(("label", "requested with it", "requested without", "monotonicity"), accuracy) }}
<p class="note">Monotonicity: rank correlation of strength and probability.</p>
<h2>Strength</h2>
<img alt="Probability of each label, and base-model NLL, over strength" src="{{ images.curves }}">
<h2>Cross-talk</h2>
<p>How much a label at strength 1, against 0, adds to the probability of each label. Grey: the
95 % confidence interval contains 0.</p>
<img alt="A matrix of labels set and labels measured" src="{{ images.cross_talk }}">
<h2>Texts</h2>
{{ table(("metric", "value"), texts) }}
<h2>Classifiers</h2>
{{ table(("attribute", "accuracy on held-out texts", "calibration error"), classifiers) }}
</body></html>
"""


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """What a strength of a label does.

    Attributes:
        strength: Strength of the label alone.
        probability: Mean probability of the label by the classifier.
        base_model_nll: Mean negative log-likelihood of the texts under the model without
            prefixes, nats per token: lower is plainer.
    """

    strength: float
    probability: Estimate
    base_model_nll: float


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """The results of an evaluation. Labels are named `formality=formal`.

    Attributes:
        classifiers: Per attribute, accuracy and calibration error of its classifier.
        attribute_accuracy: Per label, how often the classifier predicts it for texts that were
            requested with it; `attribute_accuracy_without`: for the same requests without
            attributes.
        not_classified: Labels that rows ask for and no result counts: without a classifier
            that knows them, or only in mixtures.
        curves: Per label, what strengths of it alone do.
        monotonicity: Per label, the rank correlation of strength and probability.
        cross_talk: Per label, how much strength 1 against 0 adds to the probability of every
            label.
        base_model_nll: Negative log-likelihood of the texts under the model without prefixes,
            nats per token.
        distinct_1, distinct_2, self_bleu: Diversity of the texts.
        content: Similarity to the rows' own completions (sentence embeddings), and chrF.
        users: Per user with two rows or more, how much nearer (cosine of sentence embeddings)
            texts with the user's prefix are to the user's completions of other rows than texts
            without it.
        num_rows: Rows that were requested.
    """

    classifiers: dict[str, dict[str, float]]
    attribute_accuracy: dict[str, Estimate]
    attribute_accuracy_without: dict[str, Estimate]
    not_classified: tuple[str, ...]
    curves: dict[str, list[CurvePoint]]
    monotonicity: dict[str, float]
    cross_talk: dict[str, dict[str, Estimate]]
    base_model_nll: Estimate
    distinct_1: float
    distinct_2: float
    self_bleu: float
    content: dict[str, Estimate]
    users: dict[str, Estimate]
    num_rows: int

    def save(self, folder: str | Path) -> Path:
        """Write `report.json`, its plots as PNG, and `report.html`, which contains all.

        Returns:
            The HTML file.

        Raises:
            StoreError: If the folder cannot be written.
            MissingDependencyError: If matplotlib or jinja2 is not installed.
        """
        return _write_page(Path(folder), self)

    def to_dict(self) -> dict[str, Any]:
        """All results in a form that JSON can hold."""
        return asdict(self)


def _write_page(folder: Path, report: EvaluationReport) -> Path:
    """Write `report.json`, `curves.png`, `cross_talk.png` and `report.html`."""
    plots = {"curves": _plot_curves(report), "cross_talk": _plot_cross_talk(report)}
    html = _render(report, plots)
    results = json.dumps(_nan_to_null(report.to_dict()), indent=2) + "\n"
    images = {f"{name}.png": image for name, image in plots.items()}
    return write_report(folder, {"report.json": results, **images, "report.html": html})


def write_report(folder: Path, files: Mapping[str, str | bytes]) -> Path:
    """Write the files of a report; returns the path of `report.html`.

    Raises:
        StoreError: If the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            (folder / name).write_bytes(data)
    except OSError as error:
        raise StoreError(f"cannot write the report to {folder}: {error}") from error
    return folder / "report.html"


def render(template: str, images: Mapping[str, bytes], **values: Any) -> str:
    """A page of a report, with its images in it.

    Args:
        template: In Jinja's language; it has `style` and `images`.
        images: PNG files by name.
        **values: What else it has.

    Raises:
        MissingDependencyError: If jinja2 is not installed.
    """
    with requires_extra("eval", "an HTML report"):
        from jinja2 import Environment

    urls = {
        name: f"data:image/png;base64,{base64.b64encode(image).decode()}"
        for name, image in images.items()
    }
    page = Environment(autoescape=True).from_string(template)
    return page.render(style=PAGE_STYLE, images=urls, **values)


def _nan_to_null(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {name: _nan_to_null(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_nan_to_null(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _render(report: EvaluationReport, plots: dict[str, bytes]) -> str:
    accuracy = [
        (
            name,
            _interval(estimate),
            _interval(report.attribute_accuracy_without[name]),
            f"{report.monotonicity[name]:.2f}",
        )
        for name, estimate in report.attribute_accuracy.items()
    ]
    texts = [
        ("base-model NLL, nats per token", _interval(report.base_model_nll)),
        ("distinct words", f"{report.distinct_1:.2f}"),
        ("distinct pairs of words", f"{report.distinct_2:.2f}"),
        ("self-BLEU", "–" if math.isnan(report.self_bleu) else f"{report.self_bleu:.1f}"),
        *((f"content, {name}", _interval(value)) for name, value in report.content.items()),
        *(
            (f"nearer to other texts of {user} than without {user}", _interval(value))
            for user, value in report.users.items()
        ),
    ]
    classifiers = [
        (name, f"{metrics['accuracy']:.2f}", f"{metrics['calibration_error']:.2f}")
        for name, metrics in report.classifiers.items()
    ]
    return render(
        _TEMPLATE, plots, report=report, accuracy=accuracy, texts=texts, classifiers=classifiers
    )


def _interval(estimate: Estimate) -> str:
    return f"{estimate.mean:.2f} ({estimate.low:.2f} to {estimate.high:.2f})"


def _plot_curves(report: EvaluationReport) -> bytes:
    figure = figure_of((8, 3.5))
    left, right = figure.subplots(1, 2)
    for name, points in report.curves.items():
        strengths = [point.strength for point in points]
        means = [point.probability.mean for point in points]
        (line,) = left.plot(strengths, means, marker="o", label=_escape(name))
        low = [point.probability.low for point in points]
        high = [point.probability.high for point in points]
        color = line.get_color()
        left.fill_between(strengths, low, high, color=color, alpha=0.15)
        nll = [point.base_model_nll for point in points]
        right.plot(strengths, nll, marker="o", color=color)
    for axes, title in ((left, "probability of the label"), (right, "base-model NLL, nats/token")):
        axes.set_xscale("symlog", linthresh=0.1)
        axes.set_xlabel("strength")
        axes.set_title(title)
    left.set_ylim(0, 1)
    left.legend(fontsize="small")
    return to_png(figure)


def _plot_cross_talk(report: EvaluationReport) -> bytes:
    rows = list(report.cross_talk)
    columns = list(next(iter(report.cross_talk.values())))
    estimates = [[report.cross_talk[row][column] for column in columns] for row in rows]
    means = [[estimate.mean for estimate in row] for row in estimates]
    figure = figure_of((2 + 0.9 * len(columns), 1.5 + 0.6 * len(rows)))
    axes = figure.subplots()
    axes.imshow(means, cmap="RdBu", vmin=-1, vmax=1)
    axes.set_xticks(range(len(columns)), map(_escape, columns), rotation=30, ha="right")
    axes.set_yticks(range(len(rows)), map(_escape, rows))
    axes.set_xlabel("measured")
    axes.set_ylabel("requested")
    for i, row in enumerate(estimates):
        for j, estimate in enumerate(row):
            color = "#999" if estimate.low <= 0 <= estimate.high else "#000"
            axes.text(j, i, f"{estimate.mean:+.2f}", ha="center", va="center", color=color)
    return to_png(figure)


def _escape(label: str) -> str:
    """matplotlib renders text between dollars as formulas, and hides labels that start with _."""
    return " " * label.startswith("_") + label.replace("$", r"\$")


def figure_of(size: Sequence[float]) -> Any:
    """An empty matplotlib figure.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
    """
    with requires_extra("eval", "a report"):
        from matplotlib.figure import Figure

    return Figure(figsize=(size[0], size[1]), layout="constrained", dpi=120)


def to_png(figure: Any) -> bytes:
    """A matplotlib figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
