"""Labels that are numbers: known neighbours, mixtures in between, an error outside."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlprefix import (
    AttributeSpace,
    ControlPrefix,
    Example,
    Request,
    RequestError,
    TrainingDataError,
    UnknownNameError,
)
from controlprefix.attributes.ordinal import anchors, as_number, between

from helpers import QUICK, engine


@given(st.lists(st.integers(-50, 50), min_size=2, max_size=6, unique=True), st.floats(0, 1))
def test_a_mixture_has_the_number_as_its_mean(points: list[int], at: float) -> None:
    number = min(points) + at * (max(points) - min(points))
    label = f"{number:.4f}"
    number = float(label)
    if not min(points) <= number <= max(points):
        return
    shares = between("n", label, [str(point) for point in points])
    assert sum(shares.values()) == pytest.approx(1)
    assert sum(float(name) * share for name, share in shares.items()) == pytest.approx(
        number, abs=1e-3
    )
    used = [float(name) for name in shares]
    assert not any(min(used) < point < max(used) for point in points)


def test_what_is_a_number() -> None:
    assert as_number("1e400") is None  # not finite
    assert [as_number(x) for x in ("0.8", "-2", "5e-05", "0", "1e+20")] == [0.8, -2, 5e-5, 0, 1e20]
    no_numbers = ("", "nan", "inf", "01000", "007", "0.8.1", "v1", "1 ", "-", "1e", "--1", "²")
    assert all(as_number(x) is None for x in no_numbers)


def test_anchors_cover_the_range_and_are_few() -> None:
    numbers = [math.sin(i) for i in range(400)]
    labels = anchors(numbers)
    assert len(labels) == 5
    values = [float(label) for label in labels]
    assert (values[0], values[-1]) == (min(numbers), max(numbers))
    assert values == sorted(values)


@pytest.mark.slow
def test_a_request_for_a_number_is_the_mixture_of_its_neighbours() -> None:
    cp = engine()
    rows = [
        Example(prompt=f"Say {i}", attributes={"length": length}, completion="la " * (1 + i % 3))
        for i, length in enumerate([0.2, 0.6, 1] * 3)
    ]
    report = cp.train(rows, **{**QUICK, "validation": 0})
    assert sorted(report.saved) == [f"attribute 'length={x}'" for x in ("0.2", "0.6", "1")]
    between_two = cp.generate("Say it", attributes={"length": 0.7}, max_new_tokens=8)
    mixture = cp.generate(
        "Say it", attributes={"length": {"0.6": 0.75, "1": 0.25}}, max_new_tokens=8
    )
    assert between_two.text == mixture.text
    (note,) = between_two.stand_ins
    assert (note.label, note.how, note.used) == (
        "length=0.7",
        "interpolated",
        {"0.6": 0.75, "1": 0.25},
    )
    exact = cp.generate("Say it", attributes={"length": "0.60"}, max_new_tokens=8)
    assert exact.text == cp.generate("Say it", attributes={"length": 0.6}, max_new_tokens=8).text
    half = Request(prompt="Say it", attributes={"length": {0.7: 0.5}})
    assert [part.strength for part in cp.resolve(half).request.named_parts] == [0.375, 0.125]
    for outside in (0.1, 1.5):
        with pytest.raises(RequestError, match="is outside of what the attribute has: 0.2 to 1"):
            cp.generate("Say it", attributes={"length": outside})


@pytest.mark.slow
def test_many_numbers_are_learned_as_few_labels() -> None:
    cp = engine()
    rows = [
        {"prompt": f"Say {i}", "attributes": {"length": 0.2 + i / 20}, "completion": "la"}
        for i in range(20)
    ]
    report = cp.train(rows, **{**QUICK, "validation": 0})
    assert len(report.saved) == 5
    assert {"attribute 'length=0.2'", "attribute 'length=1.15'"} <= set(report.saved)
    cp.generate("Say it", attributes={"length": 0.33}, max_new_tokens=2)


@pytest.mark.slow
def test_a_label_that_is_no_number_stands_beside_numbers() -> None:
    cp = engine()
    rows = [
        {"prompt": f"Say {i}", "attributes": {"length": i}, "completion": "la"} for i in range(20)
    ]
    rows.append({"prompt": "Say nothing", "attributes": {"length": "n/a"}, "completion": "-"})
    report = cp.train(rows, **{**QUICK, "validation": 0})
    assert len(report.saved) == 6
    for label in (2.5, "n/a"):
        cp.generate("Say it", attributes={"length": label}, max_new_tokens=2)
    again = cp.train(rows, init="stored", **{**QUICK, "validation": 0})
    assert again.saved.keys() == report.saved.keys()


@pytest.mark.slow
def test_the_attribute_space_fixes_the_labels_of_numbers() -> None:
    space = AttributeSpace.model_validate({"attributes": {"length": {"labels": ["0.5", "1.5"]}}})
    plain = engine()
    cp = ControlPrefix.from_pretrained(
        plain.model, tokenizer=plain.tokenizer, store="sqlite://", attributes=space
    )
    rows = [
        {"prompt": f"Say {i}", "attributes": {"length": 0.5 + i / 10}, "completion": "la"}
        for i in range(10)
    ]
    report = cp.train(rows, **{**QUICK, "validation": 0})
    assert sorted(report.saved) == ["attribute 'length=0.5'", "attribute 'length=1.5'"]
    with pytest.raises(RequestError, match="outside"):
        cp.train([{**rows[0], "attributes": {"length": 2}}], **QUICK)
    cp.put("attribute", "length=1", cp.get("attribute", "length=0.5"))  # not in the space
    parts = cp.resolve(Request(prompt="x", attributes={"length": 1})).parts
    assert sorted(part.used.name for part in parts) == ["length=0.5", "length=1.5"]


@pytest.mark.parametrize(("start", "step"), [(2000, 1), (2020.0, 0.1), (1e20, 1e15), (-3, 0.3)])
def test_anchors_do_not_collapse_in_a_narrow_range(start: float, step: float) -> None:
    assert len(anchors([start + i * step for i in range(20)])) == 5


def rows_of(numbers: list[float]) -> list[dict[str, Any]]:
    return [
        {"prompt": f"Say {i}", "completion": "la", "task": "d", "attributes": {"n": n}}
        for i, n in enumerate(numbers)
    ]


@pytest.mark.slow
def test_an_attribute_that_is_trained_again_keeps_its_labels() -> None:
    cp = engine()
    settings = {**QUICK, "steps": 12, "batch_size": 8, "validation": 0}
    cp.train(rows_of([float(i) for i in range(20)]), **settings)
    first = set(cp.names("attribute"))
    report = cp.train(rows_of([i * 1.5 for i in range(20)]), **settings)
    labels = {f"attribute {name!r}" for name in first}
    assert set(report.saved) == {*labels, "attribute 'n=28.5'", "task 'd'"}
    used = cp.generate("Say", attributes={"n": 12}, max_new_tokens=1).parts
    assert {part.version for part in used} == {2}


@pytest.mark.slow
def test_rows_over_stored_labels_attend_to_their_mixtures() -> None:
    cp = engine()
    cp.train(rows_of([1.0, 3.0] * 4), **{**QUICK, "validation": 0})
    report = cp.train(rows_of([2.0, 1.5, 3.0]), learn="task", **{**QUICK, "validation": 0})
    assert not report.left_out
    checked = cp.train(rows_of([1.0, 3.0] * 4), **{**QUICK, "validation": rows_of([2.0])})
    assert not checked.left_out
    with pytest.raises(TrainingDataError, match="outside of what the attribute has"):
        cp.train(rows_of([1.0, 3.0] * 4), **{**QUICK, "validation": rows_of([99.0])})


@pytest.mark.slow
def test_a_sweep_trains_the_same_labels_as_a_training_run() -> None:
    cp = engine()
    rows = rows_of([float(i) for i in range(40)])
    report = cp.sweep(rows, num_slots=(2,), steps=2, validation=0.2, progress=False)
    assert len(report.points) == 1


@pytest.mark.slow
def test_codes_with_zeros_in_front_are_names() -> None:
    cp = engine()
    rows = [
        {"text": f"la {i}", "task": "d", "attributes": {"zip": f"010{i:02}"}} for i in range(12)
    ]
    report = cp.train(rows, **{**QUICK, "steps": 12, "validation": 0})
    assert len(report.saved) == 13


@pytest.mark.slow
def test_numbers_are_interpolated_however_labels_are_combined() -> None:
    cp = engine()
    cp.train(rows_of([1.0, 3.0] * 4), **{**QUICK, "validation": 0})
    for fields in ({"mixing": "logits"}, {"unseen": "nearest"}, {"strengths": {"n": 0.5}}):
        completion = cp.generate("Say", attributes={"n": 2}, max_new_tokens=2, **fields)
        assert {part.name for part in completion.parts} == {"n=1", "n=3"}


def test_trained_again_numbers_between_are_mixtures_and_others_become_labels() -> None:
    cp = engine()

    def train(*numbers: float) -> set[str]:
        rows = [
            {"prompt": f"p{i}", "completion": "x", "attributes": {"len": number}}
            for i, number in enumerate(numbers)
        ]
        cp.train(rows, learn="attributes", **{**QUICK, "steps": 1, "validation": 0.0})
        return set(cp.names("attribute"))

    assert train(0, 10) == {"len=0", "len=10"}
    assert train(3, 7, 5) == {"len=0", "len=10"}
    assert train(3, 12, 15) == {"len=0", "len=10", "len=12", "len=15"}


def test_a_number_that_lies_outside_is_named_with_its_row() -> None:
    cp = engine()
    rows = [
        {"prompt": f"p{i}", "completion": "x", "attributes": {"len": i}, "task": "t"}
        for i in range(3)
    ]
    cp.train(rows, **{**QUICK, "steps": 1, "validation": 0.0})
    outside = {**rows[0], "attributes": {"len": 9}}
    with pytest.raises(RequestError, match=r"^row 4: len=9 is outside of"):
        cp.score([*rows, outside])
    with pytest.raises(UnknownNameError, match=r"^row 4: .*nobody"):
        cp.score([*rows, {**rows[0], "user": "nobody"}])
    with pytest.raises(TrainingDataError, match=r"^validation, row 2: len=9 is outside"):
        cp.train(rows, validation=[rows[0], outside], **{**QUICK, "steps": 1})
    with pytest.raises(RequestError, match=r"^len=9"):
        cp.generate("x", attributes={"len": 9})
