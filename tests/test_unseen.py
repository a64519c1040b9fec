"""Labels that nobody has trained: refused, or replaced by something the answer names."""

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

from controlprefix import (
    AttributeSpace,
    ControlPrefix,
    Example,
    Prefix,
    Request,
    RequestError,
    UnknownNameError,
    embeddings,
)

from models import build, byte_tokenizer

# Two directions of meaning: stern lies by strict and firm, nothing by banana.
MEANINGS = {
    "strict": (1.0, 0.0, 0.1),
    "firm": (0.8, 0.45, 0.0),
    "warm": (-0.2, 1.0, 0.0),
    "stern": (1.0, 0.1, 0.0),
    "banana": (0.0, 0.0, 1.0),
    "friend": (-0.5, 1.0, 0.0),
}


class Meanings:
    def encode(self, texts: Sequence[str], **_: object) -> torch.Tensor:
        rows = [
            next((m for word, m in MEANINGS.items() if word in text), (0.0, 0.0, -1.0))
            for text in texts
        ]
        return torch.nn.functional.normalize(torch.tensor(rows), dim=1)


@pytest.fixture(autouse=True)
def meanings_for_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "load_embedder", lambda embedder: Meanings())


@pytest.fixture
def cp() -> Iterator[ControlPrefix]:
    built = ControlPrefix.from_pretrained(
        build("llama"), tokenizer=byte_tokenizer(), store="sqlite://"
    )
    for seed, label in enumerate(("strict", "firm", "warm")):
        prefix = Prefix.random(built.geometry, num_slots=4, scale=2.0, seed=seed)
        built.put("attribute", f"tone={label}", prefix)
    yield built
    built.store.close()


def asked(label: str, unseen: str, **more: object) -> Request:
    fields = {"attributes": {"tone": label}, "unseen": unseen, **more}
    return Request(prompt="ab", raw=True, max_new_tokens=8, **fields)


def test_an_unseen_label_is_refused_unless_asked_otherwise(cp: ControlPrefix) -> None:
    with pytest.raises(UnknownNameError, match="no label 'stern'; it has: firm, strict, warm"):
        cp.generate(asked("stern", "refuse"))


SPACE = """\
attributes:
  tone:
    labels:
      strict: {}
      firm: {}
      warm: {opposite: stern}
      stern: {opposite: warm}
      banana: {}
"""


def with_space(cp: ControlPrefix, text: str) -> ControlPrefix:
    return ControlPrefix(cp.frozen_model, cp.store, AttributeSpace.parse(text))


def test_a_trained_opposite_is_steered_away_from(cp: ControlPrefix) -> None:
    outcome = with_space(cp, SPACE).generate(asked("stern", "nearest"))
    (instead,) = outcome.stand_ins
    assert (instead.how, instead.used) == ("opposite", {"tone=warm": -1.0})
    expected = cp.generate(
        Request(prompt="ab", raw=True, max_new_tokens=8, attributes={"tone": {"warm": -1.0}})
    )
    assert outcome.text == expected.text
    # Where it cannot be steered away from, it is not taken for its opposite either.
    faded = with_space(cp, SPACE).generate(
        asked("stern", "nearest", schedules={"tone": [(0, 1.0), (4, 0.0)]})
    )
    (instead,) = faded.stand_ins
    assert instead.how == "nearest"
    assert "tone=warm" not in instead.used


def test_a_label_with_an_opposite_stands_in_only_if_words_say_on_which_side(
    cp: ControlPrefix,
) -> None:
    labels = "attributes: {tone: {labels: {strict: {opposite: %s}, firm: {}, warm: {}, stern: {}}}}"
    (instead,) = with_space(cp, labels % "warm").generate(asked("stern", "nearest")).stand_ins
    assert set(instead.used) == {"tone=firm"}
    (instead,) = with_space(cp, labels % "firm").generate(asked("stern", "nearest")).stand_ins
    assert (instead.how, instead.used) == ("left out", {})


def test_the_nearest_labels_stand_in_by_their_shares(cp: ControlPrefix) -> None:
    outcome = cp.generate(asked("stern", "nearest", strengths={"tone": 1.5}))
    (instead,) = outcome.stand_ins
    assert (instead.label, instead.how) == ("tone=stern", "nearest")
    assert instead.used.keys() == {"tone=strict", "tone=firm"}
    assert sum(instead.used.values()) == pytest.approx(1)
    assert instead.used["tone=strict"] > instead.used["tone=firm"]
    assert instead.similarity > 0.9
    by_hand = {name.partition("=")[2]: share for name, share in instead.used.items()}
    same = cp.generate(
        Request(
            prompt="ab", raw=True, max_new_tokens=8, attributes={"tone": by_hand},
            strengths={"tone": 1.5},
        )
    )  # fmt: skip
    assert outcome.text == same.text
    assert outcome.parts == same.parts
    assert same.stand_ins == ()


def test_a_label_distilled_on_demand_does_not_stand_in_for_others(cp: ControlPrefix) -> None:
    request = asked("-", "nearest").model_copy(update={"attributes": {"mood": "stern"}})
    for label in ("strict", "firm"):  # two labels may be opposites
        cp.put("attribute", f"mood={label}", Prefix.random(cp.geometry, num_slots=4, seed=9))
    (instead,) = cp.generate(request).stand_ins
    assert instead.how == "left out"
    prefix = Prefix.random(cp.geometry, num_slots=4, seed=8)
    cp.put("attribute", "mood=warm (distilled 0123abcd)", prefix)
    (instead,) = cp.generate(request).stand_ins
    assert instead.how == "left out"


def test_what_nothing_is_near_to_is_left_out(cp: ControlPrefix) -> None:
    rows = [asked("banana", "nearest", strengths={"tone": 2.0}), asked("warm", "nearest")]
    banana, warm = cp.generate(rows)
    assert banana.stand_ins[0].how == "left out"
    assert banana.stand_ins[0].used == {}
    assert banana.parts == ()
    assert banana.text == cp.generate("ab", raw=True, max_new_tokens=8).text
    assert warm.stand_ins == ()
    assert [part.name for part in warm.parts] == ["tone=warm"]
    mood = asked("x", "nearest", attributes={"mood": "calm"})
    assert cp.generate(mood).stand_ins[0].how == "left out"


@pytest.mark.slow
def test_a_label_can_be_made_of_its_text(cp: ControlPrefix) -> None:
    outcome = cp.generate(asked("banana", "text"))
    assert outcome.stand_ins[0].used == {"The tone is banana.": 1.0}
    assert [(part.name, part.version) for part in outcome.parts] == [
        ("tone=banana (from its text)", 0)
    ]
    cp.put("attribute", "tone=same", cp.prefix_from_text("The tone is banana."))
    assert outcome.text == cp.generate(asked("same", "refuse")).text
    with pytest.raises(UnknownNameError):  # it stands in for those who ask for it only
        cp.generate(asked("banana", "refuse"))
    by_its_name = asked("banana (from its text)", "refuse")
    with pytest.raises(UnknownNameError):  # also beside one who asks for it
        cp.generate([asked("banana", "text"), by_its_name])
    cp.put("attribute", "tone=banana (from its text)", cp.prefix_from_text("Another text."))
    try:
        alone = cp.generate(by_its_name)
        both = cp.generate([asked("banana", "text"), by_its_name])
        assert [completion.text for completion in both] == [outcome.text, alone.text]
        assert [completion.parts[0].version for completion in both] == [0, 1]
    finally:
        cp.remove("attribute", "tone=banana (from its text)")
    mixture = asked(
        "x", "text", attributes={"tone": {"banana": 0.5, "banana (from its text)": 0.5}}
    )
    assert len(cp.generate(mixture).parts) == 2
    assert "".join(cp.stream(asked("banana", "text"))) == outcome.text
    example = Example(prompt="ab", raw=True, completion="cd", attributes={"tone": "banana"})
    with_text = cp.score([example.model_copy(update={"unseen": "text"})])
    by_name = cp.score([example.model_copy(update={"attributes": {"tone": "same"}})])
    assert with_text == by_name


def test_the_attribute_space_says_what_a_label_means(cp: ControlPrefix) -> None:
    space = AttributeSpace.parse(
        "attributes: {tone: {labels: {warm: {description: Like a friend.}, "
        "stern: {}, cosy: {description: As to a friend.}}}}"
    )
    cp = ControlPrefix(cp.frozen_model, cp.store, space)
    outcome = cp.generate(asked("cosy", "nearest"))
    assert outcome.stand_ins[0].used == {"tone=warm": 1.0}
    assert cp.generate(asked("cosy", "text")).stand_ins[0].used == {"As to a friend.": 1.0}
    assert cp.generate(asked("strict", "nearest")).stand_ins[0].how == "left out"
    with pytest.raises(UnknownNameError, match="no label 'strict'"):
        cp.generate(asked("strict", "refuse"))  # stored, but not in the space


def test_one_label_stands_in_where_there_can_be_one(cp: ControlPrefix) -> None:
    file = "attributes: {{tone: {{exclusive: {}, labels: [strict, firm, warm]}}}}"
    parts_used = []
    for exclusive in ("false", "true"):
        space = AttributeSpace.parse(file.format(exclusive))
        cp = ControlPrefix(cp.frozen_model, cp.store, space)
        parts_used.append(cp.generate(asked("stern", "nearest")).stand_ins[0].used)
    assert set(parts_used[0]) == {"tone=strict", "tone=firm"}
    assert parts_used[1] == {"tone=strict": 1.0}


@pytest.mark.slow
def test_texts_of_many_at_once_do_not_displace_each_other(cp: ControlPrefix) -> None:
    def ask(i: int) -> tuple[str, ...]:
        labels = {f"l{i}-{j}": 1.0 for j in range(12)}
        request = asked("x", "text", attributes={"tone": labels})
        return tuple(stand_in.label for stand_in in cp.generate(request).stand_ins)

    with ThreadPoolExecutor(8) as pool:
        result = list(pool.map(ask, range(16)))
    assert result == [tuple(f"tone=l{i}-{j}" for j in range(12)) for i in range(16)]


@pytest.mark.slow
def test_a_label_is_distilled_at_its_first_use_and_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    space = AttributeSpace.model_validate(
        {"attributes": {"tone": {"labels": {"warm": {}, "stern": {"description": "Be stern."}}}}}
    )
    cp = ControlPrefix.from_pretrained(
        build("llama"), tokenizer=byte_tokenizer(), store="sqlite://", attributes=space
    )
    weights = {name: value.clone() for name, value in cp.model.state_dict().items()}
    instructions: list[str] = []
    distill = ControlPrefix.distill

    def noted(self: ControlPrefix, instruction: str, *args: Any, **options: Any) -> Any:
        instructions.append(instruction)
        assert options["steps"] == 4  # no time for more
        return distill(self, instruction, *args, **options)

    monkeypatch.setattr(ControlPrefix, "distill", noted)
    cp.distill_timeout_s = 0.0
    request = Request(prompt="hi", attributes={"tone": "stern"}, unseen="distill", max_new_tokens=4)
    with ThreadPoolExecutor(3) as pool:
        texts = {completion.text for completion in pool.map(cp.generate, [request] * 3)}
    assert texts == {cp.generate(request).text}
    assert instructions == ["Be stern. Write accordingly."]
    (name,) = cp.names("attribute")
    assert re.fullmatch(r"tone=stern \(distilled [0-9a-f]{8}\)", name)
    labels = {"warm": {}, "stern": {"description": "Be strict."}}
    changed = AttributeSpace.model_validate({"attributes": {"tone": {"labels": labels}}})
    other = ControlPrefix(cp.frozen_model, cp.store, changed)
    other.distill_timeout_s = 0.0
    other.generate(request)
    assert instructions[1:] == ["Be strict. Write accordingly."]
    assert len(cp.names("attribute")) == 2
    (stand_in,) = cp.generate(request).stand_ins
    assert (stand_in.label, stand_in.how, stand_in.used) == (
        "tone=stern",
        "distilled",
        {"Be stern.": 1.0},
    )
    assert all(torch.equal(value, weights[name]) for name, value in cp.model.state_dict().items())
    other = ControlPrefix(cp.frozen_model, cp.store.for_tenant("other"))
    assert other.names("attribute") == []


def test_a_trained_label_is_not_distilled(cp: ControlPrefix) -> None:
    resolved = cp.resolve(Request(prompt="hi", attributes={"tone": "warm"}, unseen="distill"))
    assert not resolved.stand_ins
    assert not any("distilled" in name for name in cp.names("attribute"))


def test_a_number_outside_the_range_is_refused_in_every_way(cp: ControlPrefix) -> None:
    for length in ("0.4", "0.6", "1"):
        cp.put("attribute", f"length={length}", Prefix.random(cp.geometry, num_slots=1, seed=1))
    for unseen in ("refuse", "nearest"):
        with pytest.raises(RequestError, match=r"outside of what the attribute has: 0.4 to 1"):
            cp.generate(asked("x", unseen, attributes={"length": 1.01}))


def test_a_calibrated_label_is_not_steered_away_from(cp: ControlPrefix) -> None:
    for label in ("strict", "firm", "warm"):
        with_dial = replace(cp.get("attribute", f"tone={label}"), dial=((0.0, 0.0), (1.0, 1.0)))
        cp.put("attribute", f"tone={label}", with_dial)
    asking = asked("stern", "nearest", calibrated=True)
    (instead,) = with_space(cp, SPACE).generate(asking).stand_ins
    assert instead.how == "nearest"
    assert "tone=warm" not in instead.used


def test_shares_are_added_to_labels_that_are_named_too(cp: ControlPrefix) -> None:
    asking = asked("-", "nearest", attributes={"tone": {"strict": 0.5, "stern": 1.0}})
    outcome = cp.generate(asking)
    (instead,) = outcome.stand_ins
    strengths = {part.name: part.strength for part in outcome.parts}
    assert strengths["tone=strict"] == pytest.approx(0.5 + instead.used["tone=strict"])


def test_texts_of_labels_become_a_bounded_number_of_slots(cp: ControlPrefix) -> None:
    labels = {f"{i} " + "very long " * 20: 1.0 for i in range(6)}
    requests = [
        Request(prompt="Hi", attributes={"tone": dict([item])}, unseen="text")
        for item in labels.items()
    ]
    assert cp.resolve(requests[0]).parts[0].part.prefix.num_slots > 200
    with pytest.raises(RequestError, match="more than 1,024 tokens"):
        cp.resolve(Request(prompt="Hi", attributes={"tone": labels}, unseen="text"))
