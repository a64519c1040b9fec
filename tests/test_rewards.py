"""Rewards, demonstrated parts and the best of sampled texts."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rewarded import OPTIONS, requests, share_of_vowels, trained

from controlprefix import (
    AttributeSpace,
    Completion,
    ControlPrefix,
    ControlPrefixError,
    Example,
    Request,
    RequestError,
    TrainingDataError,
    embeddings,
)
from controlprefix.cli.reinforce import parse_rewards
from controlprefix.evaluation import AttributeClassifier, best_texts
from controlprefix.evaluation.rewards import (
    AttributeReward,
    JsonReward,
    LengthReward,
    PatternReward,
    WeightedReward,
    requested_labels,
)
from controlprefix.evaluation.word_classifier import WordClassifier
from controlprefix.prefixes import PrefixKey
from controlprefix.training.objectives import ContrastPair, TrainingRow
from controlprefix.training.parameterization import parameterize
from controlprefix.training.policy import (
    PolicyObjective,
    _uncertain,
    distinct_shares,
)
from controlprefix.training.settings import PolicySettings, TrainingSettings

from helpers import QUICK, Histogram, engine, greetings, random_prefix, says
from models import build, byte_tokenizer


def test_checks_of_texts() -> None:
    texts = ["one two", "[1]", "one two three four five six"]
    sampled = requests(3)
    assert LengthReward(2, 4)(sampled, texts) == pytest.approx([0.0, -0.5, -0.5])
    assert PatternReward("t[wh]")(sampled, texts) == [1.0, 0.0, 1.0]
    assert JsonReward()(sampled, texts) == [0.0, 1.0, 0.0]
    both = WeightedReward([(JsonReward(), 2.0), (PatternReward("t"), 0.5)])
    assert both(sampled, texts) == [0.5, 2.0, 0.5]
    assert distinct_shares([[1, 2, 3], [1, 2, 4], [5]]) == [0.5, 0.5, 1.0]
    for bad in (lambda: LengthReward(4, 2), lambda: PatternReward("(")):
        with pytest.raises(TrainingDataError):
            bad()


class Fixed:
    """A classifier with given probabilities."""

    labels = ("formal", "informal")

    def __init__(self, attribute: str, probability: float) -> None:
        self.attribute, self.probability = attribute, probability

    def probabilities(self, texts: Sequence[str]) -> torch.Tensor:
        return torch.tensor([[self.probability, 1 - self.probability]] * len(texts))


def test_the_reward_of_labels_is_their_mean_log_probability() -> None:
    reward = AttributeReward([Fixed("formality", 0.8), Fixed("formality", 0.4)])
    formal, informal = requests(2)
    expected = (math.log(0.8) + math.log(0.4)) / 2, (math.log(0.2) + math.log(0.6)) / 2
    assert reward([formal, informal], ["", "x"]) == pytest.approx(expected)
    sure = AttributeReward([Fixed("formality", 1.0)])
    assert sure([informal], ["x"]) == pytest.approx([math.log(0.01)])
    mixed = Request(prompt="x", attributes={"formality": {"formal": 0.3, "informal": 0.7}})
    assert sure([mixed], ["x"]) == pytest.approx([math.log(0.01)])
    assert sure([Request(prompt="x")], ["x"]) == [0.0]
    with pytest.raises(TrainingDataError, match="no classifier of 'tone'"):
        sure([Request(prompt="x", attributes={"tone": "warm"})], ["x"])
    with pytest.raises(TrainingDataError, match="no label 'casual'"):
        sure([Request(prompt="x", attributes={"formality": "casual"})], ["x"])


def test_a_word_classifier_tells_labels_by_words_in_any_script() -> None:
    labels = ["a", "b"] * 10
    for first, second, new in (
        ("good day sir", "hey you", "Good evening, SIR"),
        ("您好先生", "嘿你", "先生"),
        ("really!", "really?", "no!"),
        ("\U0001f600", "\U0001f622", "ok \U0001f600"),
    ):
        classifier = WordClassifier.train("tone", [first, second] * 10, labels)
        assert classifier.labels == ["a", "b"]
        first_probability, other = classifier.probabilities([new])[0].tolist()
        assert first_probability > other
        assert first_probability + other == pytest.approx(1)
    with pytest.raises(TrainingDataError, match="5 texts"):
        WordClassifier.train("tone", ["x", "y"], ["a", "b"])


def test_the_reward_of_labelled_texts_is_that_of_embeddings_and_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(embeddings, "load_embedder", lambda embedder: Histogram())
    rows = [
        Example(prompt="", raw=True, completion=text, attributes={"formality": label})
        for text, label in (("good day", "formal"), ("hey", "informal"))
    ] * 10
    reward = AttributeReward.train(rows)
    assert {type(item) for item in reward.classifiers} == {AttributeClassifier, WordClassifier}
    formal, informal = requests(2)
    right, wrong = reward([formal, informal], ["good day", "good day"])
    assert wrong < right < 0


def test_the_command_line_names_rewards(tmp_path: Path) -> None:
    sampled = requests(1)
    reward = parse_rewards(["0.5*length=1..2", "pattern=a", "python=helpers:letters_reward"])
    assert reward(sampled, ["a b"]) == [0.0 + 1.0 + 3.0]
    for bad in ("length=3", "size=3", "python=helpers", "python=helpers:nothing", "=", "json=1"):
        with pytest.raises(ControlPrefixError, match="reward"):
            parse_rewards([bad])
    with pytest.raises(RequestError, match="regular|reward"):
        parse_rewards(["-1*json"])


@pytest.mark.slow
def test_a_demonstrated_part_is_continued_and_shortens(monkeypatch: pytest.MonkeyPatch) -> None:
    cp = trained()
    rewarded: list[str] = []

    def reward(requests: Sequence[Request], texts: Sequence[str]) -> list[float]:
        rewarded.extend(texts)
        return [float(len(text)) for text in texts]

    key = PrefixKey("task", "greet")
    initial = {key: cp.get("task", "greet")}
    settings = PolicySettings(num_samples=2, demonstrated=1.0, demonstration_weight=0.0, kl=0.1)
    target = [72, 73, 74, 75, 76, 77, 78, 79, 80, 81]
    (request,) = requests(1, max_new_tokens=12)
    row = TrainingRow([5, 6], target, (), [(key, 1.0)], request=request)
    objective = PolicyObjective(cp.frozen_model, settings, reward, initial, [row])
    prefixes = parameterize(
        TrainingSettings(parameterization="direct"),
        initial,
        {"decoder": torch.ones(cp.geometry.slot_size("decoder"))},
    )
    lengths = []
    for fraction_done in (0.0, 0.5, 1.0):
        seeds = range(6)
        pairs = [
            objective.expand(
                [ContrastPair(row._replace(targets=()))], prefixes, seed, fraction_done
            )
            for seed in seeds
        ]
        own = [pair[0].row for pair in pairs]
        for first in own:
            assert first.rollout is not None
            count = first.rollout.num_demonstrated
            assert list(first.targets[:count]) == target[:count]
            assert len(first.targets) <= 12
        assert all(pair[1].row.rollout.num_demonstrated == 0 for pair in pairs)  # type: ignore[union-attr]
        lengths.append(sum(first.rollout.num_demonstrated for first in own if first.rollout))
    assert lengths[0] == 9 * 6
    assert lengths[0] > lengths[1] > lengths[2] > 0
    decoded = cp.frozen_model.request_tokenizer.decode(target[:9])
    assert rewarded[0].startswith(decoded)


def test_only_uncertain_tokens_of_a_demonstrated_part_count() -> None:
    """The gradient at a token of the part is that of its likelihood, or none."""
    logits = torch.zeros(10, 7)
    logits[:, 0] = torch.tensor([9.0, 0, 8, 7, 6, 5, 0, 9, 9, 9])
    weights = _uncertain(logits, 6).tolist()
    assert weights == [0, 1, 0, 0, 0, 1, 1, 1, 1, 1]  # 2 of 6: the flattest ones


@pytest.mark.slow
def test_demonstrated_needs_demonstrations() -> None:
    with pytest.raises(TrainingDataError, match="demonstrations="):
        trained().reinforce(requests(), reward=share_of_vowels, demonstrated=0.5, **OPTIONS)
    cp = trained()
    report = cp.reinforce(
        requests(),
        reward=share_of_vowels,
        demonstrations=greetings(2),
        demonstrated=0.5,
        **OPTIONS,
    )
    assert report.saved


@pytest.mark.slow
def test_the_best_texts_of_requests_are_examples_without_their_mixing() -> None:
    cp = trained()
    slow = [
        Request(
            prompt=f"Say {i}",
            task="greet",
            attributes={"formality": {"formal": 2.0, "informal": -1.0}},
            mixing="logits",
            strengths={"task": 0.5},
            max_new_tokens=6,
        )
        for i in range(2)
    ]
    rewarded: dict[str, float] = {}

    def reward(requests: Any, texts: Any) -> list[float]:
        assert len({request.seed for request in requests}) == len(requests)
        values = share_of_vowels(requests, texts)
        rewarded.update(zip(texts, values, strict=True))
        return values

    examples = best_texts(cp, slow, reward, num_samples=8, keep=3, seed=1)
    assert 2 <= len(examples) <= 6
    for i in range(2):
        own = [example.completion for example in examples if example.prompt == f"Say {i}"]
        assert len(set(own)) == len(own) <= 3
        assert [rewarded[text] for text in own] == sorted((rewarded[t] for t in own), reverse=True)
    assert max(rewarded.values()) in {rewarded[example.completion] for example in examples}
    for example in examples:
        assert (example.task, example.attributes) == ("greet", {"formality": "formal"})
        assert (example.mixing, example.strengths) == ("attention", {})
    assert cp.train(examples, init="stored", **{**QUICK, "validation": 0, "steps": 1}).saved
    with pytest.raises(RequestError, match="keep is 0"):
        best_texts(cp, slow, reward, keep=0)
    with pytest.raises(RequestError, match="diversity is -1"):
        best_texts(cp, slow, reward, diversity=-1)


@pytest.mark.slow
def test_the_best_texts_that_begin_unlike_others(monkeypatch: pytest.MonkeyPatch) -> None:
    cp = trained()
    texts = ["a b c d", "a b c e", "f g", "a b c d", "", "a b c f", "k l", "f g"]
    values = [1.0, 0.9, 0.5, 1.0, 2.0, 0.8, 0.3, 0.7]

    def written(requests: Any, **_: Any) -> Any:
        return [SimpleNamespace(text=text, finish_reason="stop") for text in texts]

    def reward(requests: Any, texts: Any) -> list[float]:
        return values

    monkeypatch.setattr(cp, "generate", written)
    requests = [Request(prompt=prompt, task="greet") for prompt in ("one", "two")]

    def best(**options: Any) -> list[tuple[str, ...]]:
        examples = best_texts(cp, requests, reward, num_samples=4, keep=2, **options)
        return [
            tuple(e.completion for e in examples if e.prompt == request.prompt)
            for request in requests
        ]

    assert best() == [("a b c d", "a b c e"), ("a b c f", "f g")]
    # By pairs that are new: "a b c e" has one of four; "f g" was kept for the first request.
    assert best(diversity=1.0) == [("a b c d", "f g"), ("k l", "a b c f")]


def test_the_best_texts_stay_in_the_requested_language(monkeypatch: pytest.MonkeyPatch) -> None:
    cp = engine()
    request = Request(prompt="x", source_language="ita_Latn", target_language="deu_Latn")
    completions = [
        Completion(text=text, finish_reason="stop", num_prompt_tokens=1, num_tokens=1)
        for text in ("aa", "bb")
    ]
    completions[1] = completions[1].model_copy(update={"finish_reason": "length"})
    monkeypatch.setattr(cp, "generate", lambda requests, **_: completions[: len(requests)])
    cut, whole = best_texts(cp, [request], lambda _, texts: [0.0, 1.0], num_samples=2, keep=2)
    tokens = cp.frozen_model.request_tokenizer.example_ids
    for example, is_whole in ((cut, False), (whole, True)):
        assert example.is_whole is is_whole
        plain = example.model_copy(update={"source_language": None, "target_language": None})
        assert tokens(plain).is_whole is is_whole
    (example,) = best_texts(cp, [request], share_of_vowels, num_samples=2, keep=1)
    assert (example.source_language, example.target_language) == ("ita_Latn", "deu_Latn")


def test_characters_of_scripts_without_spaces_count_as_words() -> None:
    (reward,) = LengthReward(10, 20)([says("a")], ["今日はとても天気がいいですね"])
    assert reward == 0.0


def test_a_label_that_is_steered_away_from_is_not_requested() -> None:
    request = Request(
        prompt="a", attributes={"tone": "warm", "size": "long"}, strengths={"tone": -1}
    )
    assert requested_labels(request) == {"size": "long"}
    assert requested_labels(request.model_copy(update={"strengths": {"size": 0.0}})) == {
        "tone": "warm"
    }


def test_several_texts_are_sampled_without_beams() -> None:
    cp, beams = engine(), Request(prompt="Greet", num_beams=2)
    with pytest.raises(TrainingDataError, match="row 1 has num_beams=2, but texts are sampled"):
        best_texts(cp, [beams], lambda _, texts: [0.0] * len(texts), num_samples=2, keep=1)


def test_the_best_texts_are_labelled_as_prefixes_are_named() -> None:
    space = AttributeSpace.parse(
        "attributes: {tone: {default: warm, labels: {warm: {opposite: stern}, stern: {}}}}"
    )
    cp = ControlPrefix.from_pretrained(
        build("llama"), tokenizer=byte_tokenizer(), store="sqlite://", attributes=space
    )
    for name in ("tone=warm", "tone=stern"):
        cp.put("attribute", name, random_prefix(cp.model, 3))
    rewarded: list[dict[str, str]] = []

    def reward(requests: Any, texts: Any) -> list[float]:
        rewarded.extend(dict(requested_labels(request)) for request in requests)
        return [0.0] * len(texts)

    rows = [{"prompt": "a", "attributes": {"tone": -0.5}}, {"prompt": "b"}]
    examples = best_texts(cp, rows, reward, num_samples=2, keep=1)
    assert [example.attributes for example in examples] == [{"tone": "stern"}, {"tone": "warm"}]
    assert rewarded == [{"tone": "stern"}] * 2 + [{"tone": "warm"}] * 2


def test_a_reward_among_several_is_checked_alike() -> None:
    wrong: Any
    for wrong in (lambda _, texts: [1.0], lambda _, texts: [None] * len(texts)):
        both = WeightedReward([(LengthReward(1, 9), 1.0), (wrong, 0.5)])
        with pytest.raises(TrainingDataError, match="give one each|a number for each"):
            both([says("a")] * 2, ["a", "b"])


def test_the_weight_of_a_single_reward_counts(tmp_path: Path, monkeypatch: Any) -> None:
    (value,) = parse_rewards(["0.1*length=2..3"])([says("a")], ["one"])
    assert value == pytest.approx(-0.05)
    (tmp_path / "broken_reward.py").write_text("def f(:\n")
    (tmp_path / "raising_reward.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    for path in ("broken_reward:f", "raising_reward:f", ".broken_reward:f"):
        with pytest.raises(RequestError, match=f"--reward python={path}: "):
            parse_rewards([f"python={path}"])


def test_a_classifier_file_names_no_embedding_model_of_strangers(tmp_path: Path) -> None:
    file = tmp_path / "classifier.json"
    fields = {"attribute": "a", "labels": ["x", "y"], "embedder": "someone/model", "accuracy": 1.0}
    numbers = {"weights": [[0.0, 0.0]], "bias": [0.0, 0.0], "calibration_error": 0.0}
    file.write_text(json.dumps({**fields, **numbers}))
    with pytest.raises(ControlPrefixError, match="wants the embedding model 'someone/model'"):
        AttributeClassifier.load(file)
