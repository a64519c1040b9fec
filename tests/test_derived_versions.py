"""Versions that are made from others: what they keep of them, and whose data is in them."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from controlprefix import ControlPrefix, Example, Prefix, PrefixFormatError
from controlprefix.prefixes import PrefixKey, Relevance
from controlprefix.store import NewVersion, VersionRef

from helpers import QUICK, engine

ROWS = [
    Example(prompt=f"Greet {i}", task="greet", completion="Good day.", user="ana") for i in range(6)
]
OWN = [row.model_copy(update={"user": None}) for row in ROWS]
SHORT: dict[str, Any] = {**QUICK, "steps": 2, "num_slots": 4, "validation": 0}


def relevance() -> Relevance:
    rows = torch.eye(12)
    return Relevance(rows[:8], rows[8:], 0.5, 0.0, "all-MiniLM-L6-v2")


@pytest.fixture
def cp() -> ControlPrefix:
    """A task that was learned from ana's rows, with a relevance."""
    cp = engine()
    cp.put("user", "ana", Prefix.random(cp.geometry, num_slots=2, seed=1))
    cp.train(ROWS, learn="task", **SHORT)
    gated = replace(cp.get("task", "greet"), relevance=relevance())
    origin = VersionRef(cp.geometry.fingerprint, 1)
    cp.store.put([NewVersion(PrefixKey("task", "greet"), gated, derived_from=origin)])
    return cp


def trained_further(cp: ControlPrefix) -> None:
    cp.train(OWN, learn="task", init="stored", **SHORT)


def shortened(cp: ControlPrefix) -> None:
    cp.shorten("task", "greet", OWN, keep=0.1)


def reinforced(cp: ControlPrefix) -> None:
    requests = [{"prompt": "Greet", "task": "greet", "max_new_tokens": 4}] * 2
    cp.reinforce(requests, reward=lambda _, texts: [float(len(t)) for t in texts], steps=1,
                 num_samples=2, progress=False)  # fmt: skip


def put_again(cp: ControlPrefix) -> None:
    cp.put("task", "greet", cp.get("task", "greet"))


@pytest.mark.slow
def test_a_shortened_prefix_is_not_called_calibrated(cp: ControlPrefix) -> None:
    dialed = replace(cp.get("task", "greet"), dial=((0.0, 0.0), (1.0, 0.5)))
    cp.put("task", "greet", dialed, details={"calibrated": {"seed": 0}, "note": "x"})
    shortened(cp)
    details = cp.version_info("task", "greet").details
    assert details.keys() == {"note", "shortened"}


@pytest.mark.slow
@pytest.mark.parametrize("change", [trained_further, shortened, reinforced, put_again])
def test_what_a_version_is_made_from_is_remembered(
    cp: ControlPrefix, change: Callable[[ControlPrefix], None]
) -> None:
    change(cp)
    assert cp.versions("task", "greet")[-1].version == 3
    own = cp.get("task", "greet").relevance
    assert own is not None
    assert torch.equal(own.own, relevance().own)
    cp.forget_user("ana")
    assert [info.num_forgotten for info in cp.versions("task", "greet")] == [1, 1, 1]
    change(cp)  # also of one that was marked before
    assert cp.versions("task", "greet")[-1].num_forgotten == 1


def test_a_fresh_start_has_nothing_of_earlier_versions(cp: ControlPrefix) -> None:
    cp.train(OWN, learn="task", **SHORT)
    cp.forget_user("ana")
    assert [info.num_forgotten for info in cp.versions("task", "greet")] == [1, 1, 0]
    assert cp.get("task", "greet").relevance is None


def test_a_dial_goes_with_the_slots_it_was_measured_with(
    cp: ControlPrefix, caplog: pytest.LogCaptureFixture
) -> None:
    dialled = replace(cp.get("task", "greet"), dial=((0.0, 0.0), (1.0, 0.5)))
    cp.put("task", "greet", dialled)
    with caplog.at_level(logging.WARNING):
        trained_further(cp)
    assert "its dial is gone: calibrate it again" in caplog.text
    assert cp.get("task", "greet").dial == ()


def test_shortening_keeps_details_and_storage_and_replaces_what_it_read(cp: ControlPrefix) -> None:
    prefix = cp.get("task", "greet")
    cp.put("task", "greet", prefix, details={"note": "kept"}, dtype="int8")
    cp.shorten("task", "greet", OWN, keep=0.1)
    current = cp.versions("task", "greet")[-1]
    assert current.details["note"] == "kept"
    assert current.dtype == "int8"


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"dial": ((0.0, 0.0), (0.5, float("nan")), (1.0, 1.0))},
        {"dial": ((0.0, 0.0),)},
        {"dial": ((0.0, 0.0), (1e-300, 1.0))},
        {"dial": ((0.0, 0.0), (1.0, 1e9))},
        {"dial": ((0.1, 0.0), (1.0, 1.0))},
        {"relevance": replace(relevance(), min_lead=float("nan"))},
        {"relevance": replace(relevance(), own=torch.eye(5))},
        {"relevance": replace(relevance(), others=torch.zeros(0, 12))},
    ],
)
def test_what_nobody_could_read_is_not_made(cp: ControlPrefix, change: dict[str, Any]) -> None:
    with pytest.raises(PrefixFormatError, match="dial that does not rise|relevance whose sizes"):
        replace(cp.get("task", "greet"), **change)


@pytest.mark.slow
def test_forgetting_a_user_marks_what_was_shortened_on_their_texts(cp: ControlPrefix) -> None:
    cp.put("user", "bo", cp.prefix_from_text("a text"))
    rows = [row.model_copy(update={"user": "bo"}) for row in OWN]
    cp.shorten("task", "greet", rows, keep=0.1)
    before = cp.versions("task", "greet")[-1].num_forgotten
    cp.forget_user("bo")
    assert cp.versions("task", "greet")[-1].num_forgotten == before + 1
