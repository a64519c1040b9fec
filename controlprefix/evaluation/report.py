"""A report as one HTML file that needs nothing else, with its plots beside it as PNG."""

import base64
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from controlprefix.errors import ControlPrefixError, StoreError

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 52rem; padding: 0 1rem;
       color: #222; background: #fff; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid #ddd; padding: .25rem .75rem; text-align: left; }
td { font-variant-numeric: tabular-nums; }
img { max-width: 100%; }
.note { color: #666; }
"""


def write(folder: Path, report: Any) -> Path:
    """Write `report.json`, `curves.png`, `cross_talk.png` and `report.html`.

    Raises:
        StoreError: If the folder cannot be written.
        ControlPrefixError: If matplotlib is not installed.
    """
    plots = {"curves": _curves(report), "cross_talk": _cross_talk(report)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        figures = json.dumps(_without_nan(report.as_dict()), indent=2)
        (folder / "report.json").write_text(figures + "\n")
        for name, image in plots.items():
            (folder / f"{name}.png").write_bytes(image)
        path = folder / "report.html"
        path.write_text(_html(report, plots), encoding="utf-8")
    except OSError as error:
        raise StoreError(f"cannot write the report to {folder}: {error}") from error
    return path


def _without_nan(value: Any) -> Any:
    """What was not measured, as null: JSON has no NaN."""
    if isinstance(value, dict):
        return {name: _without_nan(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _html(report: Any, plots: Mapping[str, bytes]) -> str:
    judges = [
        (name, f"{one['accuracy']:.2f}", f"{one['calibration_error']:.2f}")
        for name, one in report.judges.items()
    ]
    control = [
        (name, _spread(one), _spread(report.control_without[name]), f"{report.monotonic[name]:.2f}")
        for name, one in report.control.items()
    ]
    others = [
        ("fluency, nats a token under the plain model", _spread(report.fluency)),
        ("different words", f"{report.distinct_1:.2f}"),
        ("different pairs of words", f"{report.distinct_2:.2f}"),
        ("self-BLEU", "–" if math.isnan(report.self_bleu) else f"{report.self_bleu:.1f}"),
        *((f"content, {name}", _spread(one)) for name, one in report.content.items()),
        *(
            (f"nearer to what {user} wrote elsewhere than without {user}", _spread(one))
            for user, one in report.users.items()
        ),
    ]
    unknown = ", ".join(report.not_judged)
    left_out = f"No figure counts {unknown}: no judge knows it, or it came in mixtures only."
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>What the prefixes do</title><style>{_STYLE}</style></head><body>",
            f"<h1>What the prefixes do</h1><p>{report.num_rows} rows. In brackets: 95 % "
            "confidence intervals; rows of one prompt count as one.</p>",
            f'<p class="note">{html.escape(left_out)}</p>' if unknown else "",
            "<h2>Control</h2>",
            "<p>How often the judge finds a label in texts that were asked with it.</p>",
            _table(("label", "asked with it", "asked without", "rises with strength"), control),
            '<p class="note">Rises with strength: rank correlation of strength and chance.</p>',
            "<h2>Strength</h2>",
            _image(plots["curves"], "Chance of each label, and fluency, over strength"),
            "<h2>Cross-talk</h2>",
            "<p>What a label at strength 1, against 0, adds to the chance of each. Pale: the 95 % "
            "confidence interval holds 0.</p>",
            _image(plots["cross_talk"], "A matrix of labels turned and labels judged"),
            "<h2>The texts</h2>",
            _table(("measure", "found"), others),
            "<h2>The judges</h2>",
            _table(("attribute", "accuracy on held-out texts", "calibration error"), judges),
            "</body></html>",
        ]
    )


def _spread(one: Any) -> str:
    return f"{one.mean:.2f} ({one.low:.2f} to {one.high:.2f})"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _image(data: bytes, alternative: str) -> str:
    encoded = base64.b64encode(data).decode()
    return f'<img alt="{html.escape(alternative)}" src="data:image/png;base64,{encoded}">'


def _curves(report: Any) -> bytes:
    figure = _figure((8, 3.5))
    left, right = figure.subplots(1, 2)
    for name, points in report.curves.items():
        x = [point.strength for point in points]
        y = [point.chance.mean for point in points]
        (line,) = left.plot(x, y, marker="o", label=_plain(name))
        low, high = [p.chance.low for p in points], [p.chance.high for p in points]
        left.fill_between(x, low, high, color=line.get_color(), alpha=0.15)
        right.plot(x, [point.fluency for point in points], marker="o", color=line.get_color())
    for axes, title in ((left, "chance of the label"), (right, "nats a token, plain model")):
        axes.set_xscale("symlog", linthresh=0.1)
        axes.set_xlabel("strength")
        axes.set_title(title)
    left.set_ylim(0, 1)
    left.legend(fontsize="small")
    return _png(figure)


def _cross_talk(report: Any) -> bytes:
    turned = list(report.cross_talk)
    judged = list(next(iter(report.cross_talk.values())))
    found = [[report.cross_talk[one][other] for other in judged] for one in turned]
    numbers = [[one.mean for one in row] for row in found]
    figure = _figure((2 + 0.9 * len(judged), 1.5 + 0.6 * len(turned)))
    axes = figure.subplots()
    axes.imshow(numbers, cmap="RdBu", vmin=-1, vmax=1)
    axes.set_xticks(range(len(judged)), map(_plain, judged), rotation=30, ha="right")
    axes.set_yticks(range(len(turned)), map(_plain, turned))
    axes.set_xlabel("judged")
    axes.set_ylabel("turned")
    for i, row in enumerate(found):
        for j, one in enumerate(row):
            color = "#999" if one.low <= 0 <= one.high else "#000"
            axes.text(j, i, f"{one.mean:+.2f}", ha="center", va="center", color=color)
    return _png(figure)


def _plain(label: str) -> str:
    """For matplotlib, which reads formulas between dollars, and hides what begins with "_"."""
    return " " * label.startswith("_") + label.replace("$", r"\$")


def _figure(size: tuple[float, float]) -> Any:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ControlPrefixError(
            "a report needs matplotlib: pip install 'controlprefix[eval]'"
        ) from error
    return Figure(figsize=size, layout="constrained", dpi=120)


def _png(figure: Any) -> bytes:
    written = io.BytesIO()
    figure.savefig(written, format="png")
    return written.getvalue()
