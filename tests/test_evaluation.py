"""Attribute classifiers, dials and the harness: figures that mean what they say."""

import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from controlprefix import (
    AttributeSpace,
    ControlPrefix,
    ControlPrefixError,
    Example,
    Prefix,
    PrefixFormatError,
    Request,
    RequestError,
    TrainingDataError,
    VersionConflictError,
    embeddings,
)
from controlprefix.evaluation import (
    AttributeClassifier,
    calibrate,
    evaluate,
    pseudo_label,
    strength_curve,
    text_cache,
)
from controlprefix.evaluation.calibration import STRENGTHS, even_dial
from controlprefix.evaluation.harness import _quality, _user_similarity, base_model_nll
from controlprefix.evaluation.metrics import (
    bootstrap_mean,
    distinct_n,
    self_bleu,
    spearman,
    wilson_proportion,
)
from controlprefix.prefixes import StorageDtype
from controlprefix.prefixes.dial import read_dial

from helpers import Histogram
from models import build, byte_tokenizer

LABELS = ("low", "high")


@pytest.fixture(autouse=True)
def letters_for_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "load_embedder", lambda embedder: Histogram())


@pytest.fixture(scope="module")
def cp() -> Iterator[ControlPrefix]:
    """Two labels that are heard: random, and large."""
    built = ControlPrefix.from_pretrained(
        build("llama"), tokenizer=byte_tokenizer(), store="sqlite://"
    )
    for seed, label in enumerate(LABELS):
        prefix = Prefix.random(built.geometry, num_slots=8, scale=2.0, seed=seed)
        built.put("attribute", f"pitch={label}", prefix)
    yield built
    built.store.close()


def asked(i: int, label: str, **more: Any) -> Request:
    fields = {"prompt": f"p{i}", "attributes": {"pitch": label}, "seed": i, **more}
    return Request(raw=True, max_new_tokens=24, temperature=0.5, **fields)


@pytest.fixture
def classifier(cp: ControlPrefix) -> AttributeClassifier:
    """Learned from what each label writes."""
    labels = [label for label in LABELS for _ in range(80)]
    requests = [asked(1000 + i, label) for i, label in enumerate(labels)]
    return AttributeClassifier.train("pitch", [item.text for item in cp.generate(requests)], labels)


def examples(count: int = 4) -> list[Example]:
    return [
        Example(prompt=f"p{i}", raw=True, attributes={"pitch": label}, completion=f"words {i}")
        for i in range(count)
        for label in LABELS
    ]


def test_a_classifier_tells_labels_and_says_how_well(tmp_path: Path) -> None:
    draw = random.Random(0)
    kinds = (("low", "helo "), ("high", "AHOY "), ("none", "123 "))
    pairs = [
        ("".join(draw.choices(subset, k=12)), item) for item, subset in kinds for _ in range(40)
    ]
    texts, labels = zip(*pairs, strict=True)
    classifier = AttributeClassifier.train("pitch", texts, labels)
    assert classifier.labels == ("high", "low", "none")
    assert classifier.accuracy == 1.0
    assert classifier.calibration_error < 0.4
    chances = classifier.probabilities(["hello hello", "AHOY AHOY", ""])
    assert chances.shape == (3, 3)
    assert torch.allclose(chances.sum(1), torch.ones(3))
    assert chances[:2].argmax(1).tolist() == [1, 0]
    classifier.save(tmp_path / "classifier.json")
    again = AttributeClassifier.load(tmp_path / "classifier.json")
    assert torch.equal(again.probabilities(["x", "AHOY"]), classifier.probabilities(["x", "AHOY"]))
    (tmp_path / "classifier.json").write_text("{}")
    with pytest.raises(ControlPrefixError, match="cannot read the classifier"):
        AttributeClassifier.load(tmp_path / "classifier.json")


@pytest.mark.parametrize(
    ("labels", "weights", "match"),
    [
        (("low", "high"), torch.full((8, 2), math.nan), "no numbers"),
        (("low", "high"), torch.zeros(8, 3), "2 labels, weights of shape"),
        (("low",), torch.zeros(8, 1), "1 labels"),
    ],
)
def test_a_classifier_that_cannot_be_is_refused(
    labels: tuple[str, ...], weights: torch.Tensor, match: str
) -> None:
    with pytest.raises(ControlPrefixError, match=match):
        AttributeClassifier("pitch", labels, weights, torch.zeros(len(labels)), 1.0, 0.0)


def test_a_classifier_of_nothing_tells_nothing() -> None:
    draw = random.Random(1)
    texts = ["".join(draw.choices("helAHOY", k=30)) for _ in range(300)]
    labels = [draw.choice("abc") for _ in texts]
    assert AttributeClassifier.train("mood", texts, labels).accuracy < 0.6
    with pytest.raises(TrainingDataError, match="two labels and 5 texts of each; .* 4 of b"):
        AttributeClassifier.train("mood", texts[:13], [*"aaaaaaaaa", *"bbbb"])


@pytest.mark.slow
def test_the_harness_finds_control_where_there_is_some(
    cp: ControlPrefix, classifier: AttributeClassifier, tmp_path: Path
) -> None:
    rows = examples(24)
    how: dict[str, Any] = {
        "strengths": (0, 0.1, 1.0), "curve_rows": 16, "max_new_tokens": 24, "progress": False,
    }  # fmt: skip
    report = evaluate(cp, rows, [classifier], folder=tmp_path, **how)
    assert report.num_rows == 48
    for name in ("pitch=low", "pitch=high"):
        assert report.attribute_accuracy[name].mean > 0.65  # 0.5 by chance; 24 texts
        assert report.curves[name][-1].probability.mean > report.curves[name][0].probability.mean
        added = report.cross_talk[name]
        assert added[name].mean > 0.03
        assert sum(item.mean for item in added.values()) == pytest.approx(0, abs=1e-5)
        assert added[name].low <= added[name].mean <= added[name].high
    without = report.attribute_accuracy_without
    assert without["pitch=low"].mean + without["pitch=high"].mean == pytest.approx(1, abs=0.05)

    page = report.save(tmp_path).read_text()
    assert 'src="data:image/png;base64,' in page
    assert "http" not in page  # it needs nothing else
    assert "48 rows are too few to tell small differences" in page
    for words in ("people&#39;s texts", "cannot tell", "tenant", "attribute pitch=low version 1"):
        assert words in page, words
    assert report.attribute_accuracy_references.keys() == without.keys()
    (_, low) = report.samples
    assert low.requested == "pitch=low"
    assert low.rows[0][3] == next(r.completion for r in rows if r.attributes["pitch"] == "low")
    assert report.about["prefixes"] == [f"attribute pitch={x} version 1" for x in ("high", "low")]
    assert json.loads((tmp_path / "report.json").read_text())["num_rows"] == 48
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_an_evaluation_goes_on_where_it_was_broken_off(
    cp: ControlPrefix,
    classifier: AttributeClassifier,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = examples(3)
    how: dict[str, Any] = {
        "strengths": (0, 1), "curve_rows": 4, "max_new_tokens": 4, "progress": False,
    }  # fmt: skip
    whole = evaluate(cp, rows, [classifier], **how)
    generate, request = cp.generate, []

    def counted(requests: Any, **more: Any) -> Any:
        request.append(len(requests))
        if len(request) == 2:
            raise KeyboardInterrupt
        return generate(requests, **more)

    monkeypatch.setattr(cp, "generate", counted)
    monkeypatch.setattr("controlprefix.evaluation.text_cache._BATCH_SIZE", 8)
    with pytest.raises(KeyboardInterrupt):
        evaluate(cp, rows, [classifier], folder=tmp_path, **how)
    with (tmp_path / text_cache._FILE).open("a") as file:
        file.write('\n{"key": "cut sho')
    resumed = evaluate(cp, rows, [classifier], folder=tmp_path, **how)
    assert resumed == whole
    before = sum(request)
    assert evaluate(cp, rows, [classifier], folder=tmp_path, **how) == whole
    assert sum(request) == before  # nothing is asked again
    prefix = cp.get("attribute", "pitch=low")
    cp.put("attribute", "pitch=low", prefix)
    again = evaluate(cp, rows, [classifier], folder=tmp_path, **how)
    assert again.about["prefixes"][1] == "attribute pitch=low version 2"
    assert replace(again, about=whole.about) == whole
    assert sum(request) == before  # another version, but the same prefix


def test_texts_of_another_store_are_not_taken_for_ones_own(
    classifier: AttributeClassifier, tmp_path: Path
) -> None:
    how: dict[str, Any] = {
        "strengths": (0, 1), "curve_rows": 2, "max_new_tokens": 4, "progress": False,
    }  # fmt: skip
    reports = []
    for seed, folder in ((1, None), (0, tmp_path), (1, tmp_path)):
        cp = ControlPrefix.from_pretrained(
            build("llama"), tokenizer=byte_tokenizer(), store="sqlite://"
        )
        for i, label in enumerate(LABELS):  # the same names and versions
            prefix = Prefix.random(cp.geometry, num_slots=8, scale=2.0, seed=seed + 2 * i)
            cp.put("attribute", f"pitch={label}", prefix)
        reports.append(evaluate(cp, examples(3), [classifier], folder=folder, **how))
    assert reports[2] == reports[0] != reports[1]


def test_plain_is_without_the_defaults_of_the_attribute_space(
    classifier: AttributeClassifier,
) -> None:
    space = AttributeSpace.parse(
        "attributes: {pitch: {labels: [low, high]}, tone: {labels: [warm], default: warm}}"
    )
    how: dict[str, Any] = {
        "strengths": (0, 1), "curve_rows": 2, "max_new_tokens": 8, "progress": False,
    }  # fmt: skip
    reports = []
    for attributes in (space.without_defaults(), space):
        cp = ControlPrefix.from_pretrained(
            build("llama"), tokenizer=byte_tokenizer(), store="sqlite://", attributes=attributes
        )
        for seed, name in enumerate(("pitch=low", "pitch=high", "tone=warm")):
            prefix = Prefix.random(cp.geometry, num_slots=8, scale=2.0, seed=seed)
            cp.put("attribute", name, prefix)
        reports.append(evaluate(cp, examples(3), [classifier], **how))
        bare_nlls = base_model_nll(cp.without_defaults(), ["some text"])
        assert base_model_nll(cp, ["some text"]) == bare_nlls
    bare, defaulted = reports
    assert defaulted.attribute_accuracy_without == bare.attribute_accuracy_without
    assert defaulted.curves == bare.curves
    assert defaulted.content != bare.content  # rows are asked as requests would be
    assert (bare.not_classified, defaulted.not_classified) == ((), ("tone=warm",))


def test_a_user_is_nearer_to_their_other_texts_only_if_the_prefix_does_it() -> None:
    rows = [
        Example(prompt=f"p{i}", raw=True, user=user, completion=text * 3)
        for i, (user, text) in enumerate([("ana", "aab"), ("ana", "aac"), ("bo", "zz")] * 2)
    ]
    prompts = [row.prompt for row in rows]
    own_topic = [row.completion for row in rows]  # of the prompt alone: with the user or without
    same = _user_similarity(rows, own_topic, dict(enumerate(own_topic)), prompts)
    assert {user: item.mean for user, item in same.items()} == pytest.approx({"ana": 0, "bo": 0})
    like_ana = ["aaaa" if row.user == "ana" else "zz" for row in rows]
    result = _user_similarity(rows, like_ana, dict.fromkeys(range(len(rows)), "qqqq"), prompts)
    assert result["ana"].low > 0.5
    other_words = [
        row.model_copy(update={"completion": text})
        for row, text in zip(rows, ("aa", "bb", "cc", "dd", "ee", "ff"), strict=True)
    ]  # a text that is its own row's reference is not therefore the user's
    result = _user_similarity(
        other_words, [row.completion for row in other_words], dict.fromkeys(range(6), "qq"), prompts
    )
    assert {user: item.mean for user, item in result.items()} == pytest.approx({"ana": 0, "bo": 0})
    assert _user_similarity(
        rows[:3], like_ana[:3], dict.fromkeys(range(3), "q"), prompts[:3]
    ).keys() == {"ana"}  # one row tells nothing


def test_rows_that_have_no_attributes_are_refused(
    cp: ControlPrefix, classifier: AttributeClassifier
) -> None:
    with pytest.raises(TrainingDataError, match="no row has a label of 'pitch'"):
        evaluate(cp, [Example(prompt="x", completion="y")], [classifier])
    with pytest.raises(TrainingDataError, match="must contain 0 and 1"):
        evaluate(cp, examples(), [classifier], strengths=(0.5, 1))


@pytest.mark.slow
def test_a_dial_moves_what_is_measured_more_evenly(
    cp: ControlPrefix, classifier: AttributeClassifier
) -> None:
    request = Request(prompt="x", raw=True, max_new_tokens=24, temperature=0.5)
    prompts = [f"p{i}" for i in range(96)]
    grid = (0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    how: dict[str, Any] = {"prompts": prompts, "num_samples": 96}
    result = calibrate(cp, request, "pitch", "high", classifier, strengths=grid, **how)
    assert result.dial[0] == (0.0, 0.0)
    assert (1.0, 1.0) in result.dial
    assert cp.get("attribute", "pitch=high").dial == result.dial
    even = (0.0, 0.25, 0.5, 0.75, 1.0)
    how |= {"strengths": even, "seed": 1000}
    curves = [
        [
            r.probability.mean
            for r in strength_curve(
                cp, request, "pitch", "high", classifier, calibrated=calibrated, **how
            )
        ]
        for calibrated in (True, False)
    ]

    def bend(curve: Sequence[float]) -> float:
        start, full = curve[0], curve[-1]
        return max(abs(y - start - x * (full - start)) for x, y in zip(even, curve, strict=True))

    assert bend(curves[0]) < bend(curves[1])
    resolved = cp.resolve(
        request.model_copy(update={"attributes": {"pitch": {"high": 0.5}}, "calibrated": True})
    )
    assert resolved.parts[0].part.strength == pytest.approx(
        cp.get("attribute", "pitch=high").strength_at(0.5)
    )
    with pytest.raises(RequestError, match="'pitch=low' version . has no dial; calibrate it"):
        cp.generate("x", raw=True, attributes={"pitch": "low"}, calibrated=True)
    louder = request.model_copy(update={"strengths": {"pitch": 2.0}})
    with pytest.raises(RequestError, match="strengths name 'pitch', whose strength is measured"):
        strength_curve(cp, louder, "pitch", "high", classifier)


@pytest.mark.slow
def test_a_dial_is_of_the_prefix_that_was_measured(
    cp: ControlPrefix, classifier: AttributeClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("controlprefix.evaluation.calibration._MIN_EFFECT", 0.01)  # small effect
    request = Request(prompt="x", raw=True, max_new_tokens=24, temperature=0.5)
    how: dict[str, Any] = {"strengths": (0, 1), "num_samples": 48}
    prefix = cp.get("attribute", "pitch=low")
    cp.put("attribute", "pitch=low", prefix, dtype="int8")
    result = calibrate(cp, request, "pitch", "low", classifier, **how)
    version, tried = result.version, [item.strength for item in result.curve]
    assert tried == sorted(tried)
    assert tried[0] == 0 < tried[1] < 1 == tried[-1]  # where 1 did it all, less is tried
    assert cp.versions("attribute", "pitch=low")[-1].dtype == "int8"
    generate = cp.generate

    def meanwhile(*inputs: Any, **more: Any) -> Any:
        if cp.versions("attribute", "pitch=low")[-1].version == version:
            cp.put("attribute", "pitch=low", prefix)
        return generate(*inputs, **more)

    monkeypatch.setattr(cp, "generate", meanwhile)
    with pytest.raises(VersionConflictError):
        calibrate(cp, request, "pitch", "low", classifier, **how)
    assert cp.versions("attribute", "pitch=low")[-1].version == version + 1
    with pytest.raises(TrainingDataError, match="may be chance"):  # three texts tell nothing
        calibrate(cp, request, "pitch", "low", classifier, strengths=(0, 1), num_samples=3)


@pytest.mark.slow
@given(
    st.lists(st.floats(0, 1), min_size=6, max_size=6),
)
def test_any_measurement_gives_a_dial_that_rises_or_none(effects: list[float]) -> None:
    strengths = [0.0, 0.05, 0.2, 1.0, 2.0, 4.0]
    dial = even_dial(strengths, effects)
    if not dial:
        return
    assert dial[0] == (0.0, 0.0)
    assert all(a[0] < b[0] and a[1] <= b[1] for a, b in pairwise(dial))
    assert max(strength for _, strength in dial) <= 4.0
    assert dict(dial)[1.0] == 1.0


def test_an_even_response_has_an_even_dial() -> None:
    strengths = [0.0, 0.25, 0.5, 1.0, 2.0]
    dial = dict(even_dial(strengths, [0.1, 0.2, 0.3, 0.5, 0.9]))
    assert dial[0.5] == pytest.approx(0.5)
    assert dial[2.0] == pytest.approx(2.0)


@pytest.mark.slow
@given(st.floats(0.5, 20), st.floats(0.5, 1.2), st.integers(0, 1000))
def test_a_dial_finds_the_response_behind_noise(pull: float, bend: float, seed: int) -> None:
    draw = random.Random(seed)
    strengths = [0.0, *(STRENGTHS[1] / 4**i for i in (5, 4, 3, 2, 1)), *STRENGTHS[1:]]

    def effect(w: float) -> float:
        return 0.3 + 0.5 * (1 + pull) * w**bend / (1 + pull * w**bend)

    dial = dict(even_dial(strengths, [effect(w) + draw.gauss(0, 0.005) for w in strengths]))
    for position in (0.2, 0.5, 0.8):
        assert effect(dial[position]) == pytest.approx(0.3 + 0.5 * position, abs=0.05)


def test_a_dial_survives_its_bytes_and_a_wrong_one_is_refused() -> None:
    cp = ControlPrefix.from_pretrained(
        build("llama"), tokenizer=byte_tokenizer(), store="sqlite://"
    )
    prefix = Prefix.random(cp.geometry, num_slots=2, seed=0)
    dialled = Prefix(cp.geometry, prefix.slots, dial=((0.0, 0.0), (0.5, 0.1), (1.0, 1.0)))
    dtypes: tuple[StorageDtype | None, ...] = (None, "int8", "bfloat16")
    for dtype in dtypes:
        back = Prefix.from_bytes(dialled.to_bytes(dtype))
        assert back.dial == dialled.dial
        assert back.to(dtype=torch.float32).dial == dialled.dial
    assert dialled.strength_at(0.75) == pytest.approx(0.55)
    assert dialled.strength_at(2.0) == pytest.approx(2.0)
    assert dialled.strength_at(-0.5) == -0.5
    wrong = ((0.0, 0.0), (0.5, 2.0), (1.0, 1.0))
    with pytest.raises(PrefixFormatError, match="a dial that does not rise"):
        Prefix(cp.geometry, prefix.slots, dial=wrong)
    with pytest.raises(PrefixFormatError, match="the file has a dial that does not rise"):
        read_dial(wrong, "the file")


def test_figures_of_texts() -> None:
    assert distinct_n(["a b c", "a b d"], 2) == 0.75
    assert distinct_n([""], 1) == 0.0
    assert self_bleu(["the cat sat on the mat"] * 3) == pytest.approx(100)
    assert self_bleu(["one two three four", "five six seven eight"]) < 5
    assert self_bleu(["水上餐厅提供中国菜"] * 2) == pytest.approx(100)
    assert distinct_n(["中国菜中国"], 1) == 0.6
    assert spearman([0, 1, 2, 3], [1, 1, 2, 2]) == pytest.approx(0.894, abs=1e-3)
    result = bootstrap_mean([0.0, 1.0] * 50)
    assert result.mean == 0.5
    assert 0.38 < result.low < 0.45
    assert 0.55 < result.high < 0.62
    twice = bootstrap_mean([0.0, 1.0] * 50, [i % 10 for i in range(100)])  # each prompt ten times
    assert (twice.mean, twice.low < 0.3, twice.high > 0.7) == (0.5, True, True)
    assert wilson_proportion([True] * 5) == pytest.approx((1.0, 0.566, 1.0), abs=1e-3)
    assert wilson_proportion([True, False] * 5, list("ab") * 5) == wilson_proportion([True, False])
    assert math.isnan(self_bleu(["one text", " "]))


def test_empty_texts_have_no_nll_and_stop_nothing(cp: ControlPrefix) -> None:
    quality = _quality(cp, ["abc", "", "def ghi"], ["a", "b", "c"])
    alone = [base_model_nll(cp, [text]) for text in ("abc", "def ghi")]
    assert quality.base_model_nll.mean == pytest.approx(sum(alone) / 2, abs=1e-5)
    assert math.isnan(_quality(cp, ["", " "], ["a", "b"]).base_model_nll.mean)


def test_few_values_have_wide_intervals() -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    alone = bootstrap_mean([0.3])
    assert (alone.mean, alone.low, alone.high) == (0.3, -math.inf, math.inf)
    assert alone.text() == "0.30 (too few for an interval)"
    assert bootstrap_mean([0.3, 0.7], ["same", "same"]).high == math.inf
    values = [0.1, 0.5, 0.2, 0.9]
    expected = scipy_stats.ttest_1samp(values, 0).confidence_interval()
    assert bootstrap_mean(values)[1:] == pytest.approx(tuple(expected), abs=1e-3)
    twice = bootstrap_mean(
        [*values, *values], [*range(4), *range(4)]
    )  # each value as a group of two
    assert twice == pytest.approx(bootstrap_mean(values))
    draw = random.Random(0)
    for count in (2, 5, 9):
        hits = sum(
            estimate.low <= 0 <= estimate.high
            for estimate in (
                bootstrap_mean([draw.gauss(0, 1) for _ in range(count)]) for _ in range(400)
            )
        )
        assert 0.91 < hits / 400 < 0.99, count


def test_one_prompt_calibrates_nothing(cp: ControlPrefix, classifier: AttributeClassifier) -> None:
    label = classifier.labels[0]
    name = f"{classifier.attribute}={label}"
    before = len(cp.versions("attribute", name))
    with pytest.raises(TrainingDataError, match="give more prompts or samples"):
        calibrate(
            cp,
            Request(prompt="x", max_new_tokens=2),
            classifier.attribute,
            label,
            classifier,
            prompts=("Hi",),
            num_samples=4,
            progress=False,
        )
    assert len(cp.versions("attribute", name)) == before


def test_what_rows_leave_open_is_filled_in_from_those_that_say_it() -> None:
    def row(text: str, **attributes: Any) -> Example:
        return Example(prompt="", raw=True, completion=text, attributes=attributes)

    labelled = [row(text, pitch=label) for text, label in (("aaaa", "low"), ("zzzz", "high"))] * 10
    other = [row(text, mood=label) for text, label in (("aaaa!", "glad"), ("zzzz?", "sad"))] * 10
    pair = row("aazz", pitch="low", mood={"glad": 0.5, "sad": 0.5})
    filled = pseudo_label([*labelled, *other, pair])
    assert [item.attributes for item in filled[:2]] == [
        {"pitch": "low", "mood": "glad"},
        {"pitch": "high", "mood": "sad"},
    ]
    assert [item.attributes for item in filled[20:22]] == [
        {"mood": "glad", "pitch": "low"},
        {"mood": "sad", "pitch": "high"},
    ]
    assert filled[-1] == pair
    assert [item.completion for item in filled] == [
        item.completion for item in [*labelled, *other, pair]
    ]
    assert pseudo_label([*labelled, *other], min_probability=1) == [*labelled, *other]
    with pytest.raises(RequestError, match="between 0 and 1"):
        pseudo_label(labelled, min_probability=1.01)
    alone = [row("a", pitch="low")] * 9
    assert pseudo_label(alone) == alone  # nothing is open
    with pytest.raises(TrainingDataError, match="two labels"):
        pseudo_label([*alone, row("b", mood="glad")])
    numbers = [row("a" * n, words=str(n)) for n in range(1, 20)]
    assert pseudo_label([*numbers, row("b")])[-1].attributes == {}
    draw = random.Random(0)
    noise = [row("".join(draw.choices("abcdef", k=8)), mood=draw.choice("xy")) for _ in range(60)]
    unlabelled = [row("".join(draw.choices("abcdef", k=8))) for _ in range(10)]
    opened = pseudo_label([*noise, *unlabelled])[60:]
    assert all(item.attributes == {} for item in opened)
