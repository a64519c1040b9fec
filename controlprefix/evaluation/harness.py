"""The harness: a store and test rows in; control, curves, cross-talk, fluency, variety out."""

import hashlib
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from controlprefix.engine import ControlPrefix
from controlprefix.errors import StoreError, TrainingDataError
from controlprefix.evaluation import page
from controlprefix.evaluation.judges import Judge
from controlprefix.evaluation.metrics import (
    Estimate,
    chrf,
    distinct,
    estimate,
    self_bleu,
    similarity,
    spearman,
)
from controlprefix.request import Example, Request

STRENGTHS = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
_AT_A_TIME = 32


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """What a strength does.

    Attributes:
        strength: Of the label alone.
        chance: That the judge gives the label, in the mean over texts.
        fluency: Nats a token of the texts under the plain model: lower is plainer.
    """

    strength: float
    chance: Estimate
    fluency: float


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """What was found. Labels are named `formality=formal`.

    Attributes:
        judges: For each attribute, how good its judge is on held-out texts.
        control: For each label, how often the judge finds it in texts asked with it;
            `control_without`: in the same texts asked without attributes.
        curves: For each label, what strengths of it alone do.
        monotonic: For each label, the rank correlation of strength and chance.
        cross_talk: For each label at strength 1 against 0, what it adds to the chance of
            every judged label, its own first of all.
        fluency: Nats a token of the texts, as asked, under the plain model.
        distinct_1, distinct_2, self_bleu: How varied the texts are.
        content: Similarity to the rows' own completions (sentence embeddings), and chrF.
        users: For users with rows, the similarity of their texts to their own completions,
            less that to other users'.
        num_rows: That were asked.
    """

    judges: dict[str, dict[str, float]]
    control: dict[str, Estimate]
    control_without: dict[str, Estimate]
    curves: dict[str, list[CurvePoint]]
    monotonic: dict[str, float]
    cross_talk: dict[str, dict[str, float]]
    fluency: Estimate
    distinct_1: float
    distinct_2: float
    self_bleu: float
    content: dict[str, Estimate]
    users: dict[str, float] = field(default_factory=dict)
    num_rows: int = 0

    def save(self, folder: str | Path) -> Path:
        """Write `report.json`, its plots as PNG, and `report.html`, which holds all.

        Returns:
            The HTML file.

        Raises:
            StoreError: If the folder cannot be written.
        """
        return page.write(Path(folder), self)

    def as_dict(self) -> dict[str, Any]:
        """All figures, as JSON can carry them."""
        return asdict(self)


def evaluate(
    cp: ControlPrefix,
    rows: Iterable[Example],
    judges: Sequence[Judge],
    *,
    strengths: Sequence[float] = STRENGTHS,
    curve_rows: int = 32,
    max_new_tokens: int = 48,
    temperature: float | None = 0.8,
    seed: int = 0,
    folder: str | Path | None = None,
    progress: bool = True,
) -> EvaluationReport:
    """Ask for every row's completion, and have judges say what came out.

    Args:
        cp: With the prefixes that the rows name.
        rows: Requests with a completion each to compare with; none that was learned from.
        judges: Of the attributes that count, learned from other texts than the prefixes.
        strengths: Of the curves; 0 and 1 are needed for the cross-talk.
        curve_rows: Rows that the curves are asked for, at each strength of each label.
        max_new_tokens, temperature: Of every text.
        seed: Of the sampling.
        folder: Where texts are kept as they come: a run that was broken off goes on there.
        progress: Show a progress bar.

    Raises:
        TrainingDataError: If there are no rows, or none with a judged attribute.
        StoreError: If the folder cannot be written.
    """
    rows = list(rows)
    by_attribute = {judge.attribute: judge for judge in judges}
    asked = {
        (attribute, label): [row for row in rows if row.attributes.get(attribute) == label]
        for attribute, judge in by_attribute.items()
        for label in judge.labels
    }
    asked = {key: some for key, some in asked.items() if some}
    if not asked:
        raise TrainingDataError(
            f"no row has a label of {', '.join(map(repr, by_attribute)) or 'a judged attribute'}; "
            "give rows and judges of the same attributes"
        )
    if curve_rows < 1:
        raise TrainingDataError(f"curve_rows is {curve_rows}; it must be 1 or more")
    if not {0.0, 1.0} <= set(strengths):
        raise TrainingDataError("strengths must hold 0 and 1, which the others are compared with")
    writer = _Writer(cp, folder, max_new_tokens, temperature, seed)
    plain = [_without_attributes(row) for row in rows]
    curves = {
        (attribute, label, strength): [
            row.model_copy(update={"attributes": {attribute: {label: float(strength)}}})
            for row in plain[:curve_rows]
        ]
        for attribute, label in asked
        for strength in strengths
    }
    writer.write([*rows, *plain, *(row for some in curves.values() for row in some)], progress)

    texts, without = writer.texts(rows), writer.texts(plain)
    own = dict(zip(map(id, rows), texts, strict=True))
    bare = dict(zip(map(id, rows), without, strict=True))
    control: dict[str, Estimate] = {}
    control_without: dict[str, Estimate] = {}
    for (attribute, label), some in asked.items():
        judge = by_attribute[attribute]
        for found, source in ((control, own), (control_without, bare)):
            best = judge.chances([source[id(row)] for row in some]).argmax(dim=1)
            hits = (best == judge.labels.index(label)).float().tolist()
            found[f"{attribute}={label}"] = estimate(hits)
    points: dict[str, list[CurvePoint]] = {}
    cross_talk: dict[str, dict[str, float]] = {}
    for attribute, label in asked:
        name, judge = f"{attribute}={label}", by_attribute[attribute]
        points[name] = []
        for strength in sorted(strengths):
            some_texts = writer.texts(curves[attribute, label, strength])
            chances = judge.chances(some_texts)[:, judge.labels.index(label)].tolist()
            fluency = statistics.fmean(fluencies(cp, some_texts))
            points[name].append(CurvePoint(strength, estimate(chances), fluency))
        at = {s: writer.texts(curves[attribute, label, s]) for s in (0.0, 1.0)}
        cross_talk[name] = {
            f"{other.attribute}={one}": float(difference)
            for other in judges
            for one, difference in zip(
                other.labels,
                other.chances(at[1.0]).mean(0) - other.chances(at[0.0]).mean(0),
                strict=True,
            )
        }
    references = [row.completion for row in rows]
    return EvaluationReport(
        judges={
            name: {
                "accuracy": judge.accuracy,
                "calibration_error": judge.calibration_error,
            }
            for name, judge in by_attribute.items()
        },
        control=control,
        control_without=control_without,
        curves=points,
        monotonic={
            name: spearman([p.strength for p in curve], [p.chance.mean for p in curve])
            for name, curve in points.items()
        },
        cross_talk=cross_talk,
        fluency=estimate(fluencies(cp, texts)),
        distinct_1=distinct(texts, 1),
        distinct_2=distinct(texts, 2),
        self_bleu=self_bleu(texts),
        content={
            "similarity": estimate(similarity(texts, references)),
            "chrF": estimate(chrf(texts, references)),
        },
        users=_users(rows, texts),
        num_rows=len(rows),
    )


def fluencies(cp: ControlPrefix, texts: Sequence[str]) -> list[float]:
    """Nats a token of each text that is not empty, under the plain model."""
    written = [text for text in texts if text.strip()]
    if not written:
        return [float("nan")]
    scores = cp.score([Example(prompt="", raw=True, completion=text) for text in written])
    return [-one.log_likelihood / max(1, one.num_tokens) for one in scores]


class _Writer:
    """Generates texts once for each request, and keeps them in a folder as they come."""

    FILE = "texts.jsonl"

    def __init__(
        self,
        cp: ControlPrefix,
        folder: str | Path | None,
        max_new_tokens: int,
        temperature: float | None,
        seed: int,
    ) -> None:
        self._cp = cp
        self._path = None if folder is None else Path(folder) / self.FILE
        self._settings = {"max_new_tokens": max_new_tokens, "temperature": temperature}
        self._seed = seed
        self._known: dict[str, str] = self._read()
        self._parts: dict[str, str] = {}

    def write(self, rows: Sequence[Example], progress: bool) -> None:
        """Generate what is missing."""
        missing = {
            key: request
            for key, request in ((self._key(one), one) for one in map(self._request, rows))
            if key not in self._known
        }
        keys = sorted(missing, key=lambda key: len(missing[key].prompt or ""))
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, disable=not progress) as bar:
            task = bar.add_task("texts", total=len(keys))
            for at in range(0, len(keys), _AT_A_TIME):
                some = keys[at : at + _AT_A_TIME]
                done = self._cp.generate([missing[key] for key in some], batch_size=_AT_A_TIME)
                self._keep({key: one.text for key, one in zip(some, done, strict=True)})
                bar.update(task, advance=len(some))

    def texts(self, rows: Sequence[Example]) -> list[str]:
        """What was generated for rows."""
        return [self._known[self._key(self._request(row))] for row in rows]

    def _request(self, row: Example) -> Request:
        fields = row.model_dump(exclude_unset=True, exclude={"completion", *self._settings})
        if not fields.get("prompt", "x"):
            fields["prompt"] = self._cp.tokenizer.bos_token or " "
        settings = {name: value for name, value in self._settings.items() if value is not None}
        draw = hashlib.sha256(f"{self._seed}:{row.prompt}:{row.completion}".encode()).digest()
        return Request(**{**fields, **settings, "seed": int.from_bytes(draw[:4], "big")})

    def _key(self, request: Request) -> str:
        """Of all that a text depends on, the versions of prefixes too."""
        fields = {"task": request.task, "attributes": request.attributes, "user": request.user}
        named = json.dumps(fields, sort_keys=True)
        if named not in self._parts:
            self._parts[named] = repr(self._cp.parts_of(request))
        about = (self._cp.geometry.fingerprint, request.model_dump_json(), self._parts[named])
        return hashlib.sha256(repr(about).encode()).hexdigest()

    def _read(self) -> dict[str, str]:
        if self._path is None or not self._path.exists():
            return {}
        found = {}
        for line in self._path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                one = json.loads(line)
                found[one["key"]] = one["text"]
            except (ValueError, KeyError, TypeError):
                continue  # a line cut short by a kill
        return found

    def _keep(self, texts: Mapping[str, str]) -> None:
        self._known.update(texts)
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                for key, text in texts.items():
                    file.write("\n" + json.dumps({"key": key, "text": text}))
        except OSError as error:
            raise StoreError(f"cannot write to {self._path}: {error}") from error


def _without_attributes(row: Example) -> Example:
    strengths = {k: v for k, v in row.strengths.items() if k in ("task", "user")}
    return row.model_copy(update={"attributes": {}, "strengths": strengths})


def _users(rows: Sequence[Example], texts: Sequence[str]) -> dict[str, float]:
    """How much nearer each user's texts are to their own completions than to others'."""
    from controlprefix.embeddings import embeddings

    users = sorted({row.user for row in rows if row.user is not None})
    if len(users) < 2:
        return {}
    written, said = embeddings([text or " " for text in texts]), [row.completion for row in rows]
    cosines = written @ embeddings(said).T
    found = {}
    for user in users:
        mine = [i for i, row in enumerate(rows) if row.user == user]
        others = [i for i, row in enumerate(rows) if row.user not in (None, user)]
        near, far = cosines[mine][:, mine].mean(), cosines[mine][:, others].mean()
        found[user] = float(near - far)
    return found
