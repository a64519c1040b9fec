"""EvaluationReport: the results of an evaluation, and their HTML page."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from controlprefix._io import finite
from controlprefix.evaluation.metrics import Estimate
from controlprefix.reports import (
    comparison_in_words,
    few_rows_note,
    figure_of,
    render,
    to_png,
    write_report,
)

ACCURACY_HEADER = (
    "label",
    ("requested with it ↑", "share of texts in which the classifier finds the label"),
    ("without", "the same requests without any label"),
    ("in words", "whether the two differ by more than chance"),
    ("people's texts", "what the classifier finds in the rows' own texts with that label"),
    ("monotonicity ↑", "rank correlation of strength and probability: 1 is a dial, 0 none"),
)
QUALITY_HEADER = ("", "with labels", "without", "people's texts")
_CLASSIFIER_HEADER = (
    "attribute",
    ("accuracy ↑", "share of held-out texts whose label it finds"),
    ("calibration error ↓", "how far its probabilities are from how often it is right"),
)


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
class TextQuality:
    """What some texts are like.

    Attributes:
        base_model_nll: Negative log-likelihood of the texts under the model without prefixes,
            nats per token.
        distinct_1, distinct_2, self_bleu: Their diversity.
        words: Mean number of words.
    """

    base_model_nll: Estimate
    distinct_1: float
    distinct_2: float
    self_bleu: float
    words: float


@dataclass(frozen=True, slots=True)
class TextSample:
    """Some texts of a label.

    Attributes:
        requested: The label.
        rows: Prompt, text with the label, text of the same request without labels, and the row's
            own text, of each.
    """

    requested: str
    rows: tuple[tuple[str, str, str, str], ...]


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """The results of an evaluation. Labels are named `formality=formal`.

    Attributes:
        classifiers: Per attribute, accuracy and calibration error of its classifier.
        attribute_accuracy: Per label, how often the classifier predicts it for texts that were
            requested with it; `attribute_accuracy_without`: for the same requests without
            attributes; `attribute_accuracy_references`: for the rows' own texts.
        not_classified: Labels that rows ask for and no result counts: without a classifier
            that knows them, or only in mixtures.
        curves: Per label, what strengths of it alone do.
        monotonicity: Per label, the rank correlation of strength and probability.
        cross_talk: Per label, how much strength 1 against 0 adds to the probability of every
            label.
        quality: What the texts are like; `quality_without`: those of the same requests without
            attributes; `quality_references`: the rows' own.
        content: Similarity to the rows' own completions (sentence embeddings), and chrF.
        users: Per user with two rows or more, how much nearer (cosine of sentence embeddings)
            texts with the user's prefix are to the user's completions of other rows than texts
            without it.
        num_rows: Rows that were requested.
        samples: Some texts of each label.
        about: What it was made with: model, store, versions of prefixes, command, date.
    """

    classifiers: dict[str, dict[str, float]]
    attribute_accuracy: dict[str, Estimate]
    attribute_accuracy_without: dict[str, Estimate]
    attribute_accuracy_references: dict[str, Estimate]
    not_classified: tuple[str, ...]
    curves: dict[str, list[CurvePoint]]
    monotonicity: dict[str, float]
    cross_talk: dict[str, dict[str, Estimate]]
    quality: TextQuality
    quality_without: TextQuality
    quality_references: TextQuality
    content: dict[str, Estimate]
    users: dict[str, Estimate]
    num_rows: int
    samples: tuple[TextSample, ...]
    about: dict[str, Any]

    def save(self, folder: str | Path) -> Path:
        """Write `report.json`, its plots as PNG, and `report.html`, which contains all.

        Returns:
            The HTML file.

        Raises:
            StoreError: If the folder cannot be written.
            MissingDependencyError: If matplotlib or jinja2 is not installed.
        """
        plots = {"curves": _plot_curves(self), "cross_talk": _plot_cross_talk(self)}
        html = _render(self, plots)
        results = json.dumps(finite(self.to_dict()), indent=2) + "\n"
        images = {f"{name}.png": image for name, image in plots.items()}
        write_report(folder, {"report.json": results, **images, "report.html": html})
        return Path(folder) / "report.html"

    def to_dict(self) -> dict[str, Any]:
        """All results in a form that JSON can hold."""
        return asdict(self)


def _render(report: EvaluationReport, plots: dict[str, bytes]) -> str:
    accuracy = [
        (
            name,
            _interval(estimate),
            _interval(without := report.attribute_accuracy_without[name]),
            comparison_in_words(estimate, without),
            _interval(report.attribute_accuracy_references[name]),
            f"{report.monotonicity[name]:.2f}",
        )
        for name, estimate in report.attribute_accuracy.items()
    ]
    sides = (report.quality, report.quality_without, report.quality_references)
    quality = [
        (title, *(_number(getattr(side, name), digits) for side in sides))
        for title, name, digits in (
            ("base-model NLL, nats per token (lower: plainer)", "base_model_nll", 2),
            ("distinct words (higher: more varied)", "distinct_1", 2),
            ("distinct pairs of words (higher: more varied)", "distinct_2", 2),
            ("self-BLEU (lower: more varied)", "self_bleu", 1),
            ("words per text", "words", 1),
        )
    ]
    others = [
        *((f"{name} to the rows' own texts", _interval(v)) for name, v in report.content.items()),
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
        "evaluation.html",
        plots,
        report=report,
        about=report.about,
        few=few_rows_note(report.num_rows),
        accuracy_header=ACCURACY_HEADER,
        accuracy=accuracy,
        quality_header=QUALITY_HEADER,
        quality=quality,
        others=others,
        classifier_header=_CLASSIFIER_HEADER,
        classifiers=classifiers,
    )


def _number(value: Estimate | float, digits: int) -> str:
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{value:.{digits}f}"
    return _interval(value)


def _interval(estimate: Estimate) -> str:
    return estimate.text()


def _plot_curves(report: EvaluationReport) -> bytes:
    figure = figure_of((8, 3.5))
    left, right = figure.subplots(1, 2)
    for name, points in report.curves.items():
        strengths = [point.strength for point in points]
        means = [point.probability.mean for point in points]
        (line,) = left.plot(strengths, means, marker="o", label=_escape(name))
        low = [max(0.0, point.probability.low) for point in points]
        high = [min(1.0, point.probability.high) for point in points]
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
