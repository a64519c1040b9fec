"""Attribute classifiers, dials and the harness: figures that mean what they say."""

import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from controlprefix import (
    AttributeSpace,
    ControlPrefix,
    ControlPrefixError,
    Example,
    Message,
    Prefix,
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
from controlprefix.evaluation.harness import _quality, _user_similarity, base_model_nll
from controlprefix.evaluation.word_classifier import WordClassifier

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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
        cp.generate("x", raw=True, attributes={"pitch": {"low": 0.5}}, calibrated=True)
    for same in (0.0, 1.0):  # in positions as in strengths
        cp.generate("x", raw=True, attributes={"pitch": {"low": same}}, calibrated=True)
    louder = request.model_copy(update={"strengths": {"pitch": 2.0}})
    with pytest.raises(RequestError, match="strengths name 'pitch', whose strength is measured"):
        strength_curve(cp, louder, "pitch", "high", classifier)
    messages = request.model_copy(
        update={"prompt": None, "messages": (Message(role="user", content="x"),)}
    )
    with pytest.raises(RequestError, match="which has messages or token ids"):
        strength_curve(cp, messages, "pitch", "high", classifier, prompts=["a", "b"])


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


def test_empty_texts_have_no_nll_and_stop_nothing(cp: ControlPrefix) -> None:
    quality = _quality(cp, ["abc", "", "def ghi"], ["a", "b", "c"])
    alone = [base_model_nll(cp, [text]) for text in ("abc", "def ghi")]
    assert quality.base_model_nll.mean == pytest.approx(sum(alone) / 2, abs=1e-5)
    assert math.isnan(_quality(cp, ["", " "], ["a", "b"]).base_model_nll.mean)


def test_classifiers_name_attributes_and_labels_as_requests_do() -> None:
    decomposed, texts = "cafe\u0301", ["quite calm"] * 5 + ["very loud"] * 5
    classifier = AttributeClassifier(
        decomposed, (decomposed, "x"), torch.ones(3, 2), torch.zeros(2), 1.0, 0.0
    )
    words = WordClassifier.train(decomposed, texts, [decomposed] * 5 + ["x"] * 5)
    for own in (classifier, words):
        assert own.attribute == "caf\u00e9"
        assert sorted(own.labels) == ["caf\u00e9", "x"]


@pytest.mark.slow
def test_strengths_are_measured_on_samples_not_beams(
    cp: ControlPrefix, classifier: AttributeClassifier
) -> None:
    beams = Request(prompt="x", max_new_tokens=2, num_beams=2)
    with pytest.raises(TrainingDataError, match="num_beams=2, but texts are sampled"):
        calibrate(cp, beams, classifier.attribute, classifier.labels[0], classifier)


@pytest.mark.slow
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


def test_copies_of_a_text_are_held_out_together() -> None:
    """Labels at random: only texts that were trained on can be told."""
    draw = random.Random(0)
    texts = ["".join(draw.choices("helo AHOY", k=12)) for _ in range(40)]
    labels = [draw.choice(["low", "high"]) for _ in texts]
    apart = AttributeClassifier.train("pitch", texts, labels)
    copied = AttributeClassifier.train("pitch", texts * 4, labels * 4)
    assert apart.accuracy < 0.9
    assert copied.accuracy == apart.accuracy


def test_copies_with_several_labels_are_counted_once() -> None:
    texts = ["aaaa", "aaab", "aaba", "abaa", "baaa", *(f"hello{i}" for i in range(6))]
    labels = ["low"] * 4 + ["high"] + ["low"] * 6
    classifier = AttributeClassifier.train("pitch", texts + texts[:5], labels + ["high"] * 5)
    assert 0 <= classifier.accuracy <= 1
