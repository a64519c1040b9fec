"""The harness: a store and test rows in; control, curves, cross-talk, fluency, variety out."""

import hashlib
import json
import random
import statistics
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from controlprefix.attributes import weighted_labels
from controlprefix.embeddings import embeddings
from controlprefix.engine import ControlPrefix
from controlprefix.errors import StoreError, TrainingDataError
from controlprefix.evaluation import report as page
from controlprefix.evaluation.classifier import Judge
from controlprefix.evaluation.metrics import (
    Estimate,
    chrf,
    distinct,
    estimate,
    self_bleu,
    share,
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
        not_judged: Labels that rows ask for and no figure counts: without a judge that knows
            them, or only in mixtures.
        curves: For each label, what strengths of it alone do.
        monotonic: For each label, the rank correlation of strength and chance.
        cross_talk: For each label at strength 1 against 0, what it adds to the chance of
            every judged label, row by row.
        fluency: Nats a token of the texts, as asked, under the plain model.
        distinct_1, distinct_2, self_bleu: How varied the texts are.
        content: Similarity to the rows' own completions (sentence embeddings), and chrF.
        users: For users with two rows or more, how much nearer (cosine of sentence embeddings)
            their texts are to their completions of other rows than the same rows' texts asked
            without the user.
        num_rows: That were asked.
    """

    judges: dict[str, dict[str, float]]
    control: dict[str, Estimate]
    control_without: dict[str, Estimate]
    not_judged: tuple[str, ...]
    curves: dict[str, list[CurvePoint]]
    monotonic: dict[str, float]
    cross_talk: dict[str, dict[str, Estimate]]
    fluency: Estimate
    distinct_1: float
    distinct_2: float
    self_bleu: float
    content: dict[str, Estimate]
    users: dict[str, Estimate]
    num_rows: int

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

    Rows are asked as requests would be; those without attributes, and those of the curves, are
    without the attribute space's defaults too. Intervals hold 95 %, and count rows of one prompt
    as one piece of evidence.

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
    rows, cp = cp.completed(list(rows)), cp.without_defaults()
    by_attribute = {judge.attribute: judge for judge in judges}
    asked = {
        (attribute, label): [i for i, row in enumerate(rows) if _label(row, attribute) == label]
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
    prompts = [_prompt(row) or i for i, row in enumerate(rows)]
    plain = [_without(row, row.attributes) for row in rows]
    nobody = {i: _without(rows[i], ["user"]) for mine in _by_user(rows).values() for i in mine}
    drawn = random.Random(seed).sample(range(len(rows)), min(curve_rows, len(rows)))
    its_prompts = [prompts[i] for i in drawn]
    curves = {
        (attribute, label, strength): [
            plain[i].model_copy(update={"attributes": {attribute: {label: float(strength)}}})
            for i in drawn
        ]
        for attribute, label in asked
        for strength in strengths
    }
    of_curves = [row for some in curves.values() for row in some]
    writer.write([*rows, *plain, *nobody.values(), *of_curves], progress)

    texts, without = writer.texts(rows), writer.texts(plain)
    control: dict[str, Estimate] = {}
    control_without: dict[str, Estimate] = {}
    for (attribute, label), some in asked.items():
        judge = by_attribute[attribute]
        for found, source in ((control, texts), (control_without, without)):
            best = judge.chances([source[i] for i in some]).argmax(dim=1)
            hits = (best == judge.labels.index(label)).tolist()
            found[f"{attribute}={label}"] = share(hits, [prompts[i] for i in some])
    points: dict[str, list[CurvePoint]] = {}
    cross_talk: dict[str, dict[str, Estimate]] = {}
    for attribute, label in asked:
        name, judge = f"{attribute}={label}", by_attribute[attribute]
        points[name] = []
        for strength in sorted(strengths):
            some_texts = writer.texts(curves[attribute, label, strength])
            chances = judge.chances(some_texts)[:, judge.labels.index(label)].tolist()
            fluency = statistics.fmean(fluencies(cp, some_texts))
            points[name].append(CurvePoint(strength, estimate(chances, its_prompts), fluency))
        at = {s: writer.texts(curves[attribute, label, s]) for s in (0.0, 1.0)}
        cross_talk[name] = {
            f"{other.attribute}={one}": estimate(difference.tolist(), its_prompts)
            for other in judges
            for one, difference in zip(
                other.labels, (other.chances(at[1.0]) - other.chances(at[0.0])).T, strict=True
            )
        }
    without_user = {i: writer.texts([row])[0] for i, row in nobody.items()}
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
        not_judged=tuple(
            sorted(
                {
                    one.name
                    for row in rows
                    for one in weighted_labels(row.attributes)
                    if (one.attribute, one.label) not in asked
                }
            )
        ),
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
            "similarity": estimate(similarity(texts, references), prompts),
            "chrF": estimate(chrf(texts, references), prompts),
        },
        users=_users(rows, texts, without_user, prompts),
        num_rows=len(rows),
    )


def fluencies(cp: ControlPrefix, texts: Sequence[str]) -> list[float]:
    """Nats a token of each text that is not empty, under the plain model."""
    cp = cp.without_defaults()
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
        settings = {name: value for name, value in self._settings.items() if value is not None}
        draw = hashlib.sha256(f"{self._seed}:{row.prompt}:{row.completion}".encode()).digest()
        return Request(**{**fields, **settings, "seed": int.from_bytes(draw[:4], "big")})

    def _key(self, request: Request) -> str:
        """Of all that a text depends on, the contents of prefixes too."""
        names = request.task, request.attributes, request.user, request.unseen
        named = json.dumps(names, sort_keys=True)
        if named not in self._parts:
            self._parts[named] = self._cp.digest_of(request)
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


def _label(row: Example, attribute: str) -> str | None:
    """The one label of an attribute that a row asks for, if it is one."""
    named = {
        one.label: one.weight
        for one in weighted_labels(row.attributes)
        if one.attribute == attribute and one.weight
    }
    ((label, weight), *others) = named.items() or ((None, 0.0),)
    return label if weight > 0 and not others else None


def _prompt(row: Example) -> Hashable:
    return row.prompt or row.messages


def _without(row: Example, parts: Collection[str]) -> Example:
    """A row without its attributes or its user."""
    left = {
        "attributes": {name: one for name, one in row.attributes.items() if name not in parts},
        "user": None if "user" in parts else row.user,
        "strengths": {name: one for name, one in row.strengths.items() if name not in parts},
    }
    return row.model_copy(update=left)


def _by_user(rows: Sequence[Example]) -> dict[str, list[int]]:
    """The rows of each user who has two or more."""
    found: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        if row.user is not None:
            found.setdefault(row.user, []).append(i)
    return {user: mine for user, mine in sorted(found.items()) if len(mine) > 1}


def _users(
    rows: Sequence[Example],
    texts: Sequence[str],
    without: Mapping[int, str],
    prompts: Sequence[Hashable],
) -> dict[str, Estimate]:
    """How much nearer a user's prefix brings texts to what they wrote, in other rows."""
    found = {}
    for user, mine in _by_user(rows).items():
        said = embeddings([rows[i].completion for i in mine])
        nearer = embeddings([texts[i] or " " for i in mine]) - embeddings(
            [without[i] or " " for i in mine]
        )
        cosines = nearer @ said.T
        others = (cosines.sum(dim=1) - cosines.diagonal()) / (len(mine) - 1)
        found[user] = estimate(others.tolist(), [prompts[i] for i in mine])
    return found
