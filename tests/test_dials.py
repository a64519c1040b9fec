"""Dials: positions that are even in what is measured, whatever the response."""

import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from controlprefix import (
    AttributeSpace,
    ControlPrefix,
    Prefix,
    PrefixFormatError,
    TrainingDataError,
)
from controlprefix.evaluation.calibration import CALIBRATION_STRENGTHS, even_dial
from controlprefix.prefixes import PrefixKey, StorageDtype
from controlprefix.prefixes.dial import read_dial

from helpers import engine, random_prefix
from models import build, byte_tokenizer


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
    strengths = [
        0.0,
        *(CALIBRATION_STRENGTHS[1] / 4**i for i in (5, 4, 3, 2, 1)),
        *CALIBRATION_STRENGTHS[1:],
    ]

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


def test_a_version_says_whether_its_prefix_has_a_dial() -> None:
    cp = engine()
    prefix = random_prefix(cp.model, 2)
    with_dial = replace(prefix, dial=((0.0, 0.0), (1.0, 1.0)))
    key = PrefixKey.for_label("tone", "warm")

    def says() -> bool:
        (info,) = cp.store.prefixes("attribute")
        assert info.key == key
        return "calibrated" in info.current.details

    cp.put("attribute", "tone=warm", with_dial, details={"note": "imported"})
    assert says()
    details = {"calibrated": {"accuracy": 1.0}}
    cp.put("attribute", "tone=warm", prefix, details=details)  # of the version before
    assert not says()


def test_a_position_between_labels_is_not_distilled() -> None:
    space = AttributeSpace.parse(
        "attributes: {tone: {labels: {warm: {opposite: stern}, stern: {}}}}"
    )
    cp = ControlPrefix.from_pretrained(
        build("llama"), tokenizer=byte_tokenizer(), store="sqlite://", attributes=space
    )
    with pytest.raises(TrainingDataError, match="is a position between labels"):
        cp.distill("Be kind.", ["a", "b"], attribute="tone", label=0.5, steps=1, progress=False)
