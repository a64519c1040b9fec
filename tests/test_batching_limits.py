"""Running batches: what is refused, what fails alone, and rows that are counted."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from batches import engine

from controlprefix import (
    ControlPrefix,
    OverloadedError,
    Request,
    RequestError,
    UnknownNameError,
)
from controlprefix.inference.continuous_batching import ContinuousBatcher
from controlprefix.inference.json_constraint import JsonConstraint

from models import build, byte_tokenizer

NO_END = {1: -100.0}


@pytest.fixture(scope="module")
def cp() -> Iterator[ControlPrefix]:
    built = engine()
    yield built
    built.store.close()


@pytest.mark.slow
def test_a_request_that_cannot_be_carried_out_fails_alone(
    cp: ControlPrefix, monkeypatch: pytest.MonkeyPatch
) -> None:
    batcher = cp.batcher(max_sequences=4)
    with pytest.raises(UnknownNameError, match="no user 'eve'"):
        batcher.submit(cp.resolve(Request(prompt="x", user="eve")))
    with pytest.raises(RequestError, match="beam search cannot join"):
        batcher.submit(cp.resolve(Request(prompt="x", num_beams=2)))
    forward = ContinuousBatcher._forward

    def failing(self: ContinuousBatcher, batch: Any, **inputs: Any) -> Any:
        if (inputs["input_ids"] == 126).any():  # the byte of one prompt
            raise MemoryError("too long")
        return forward(self, batch, **inputs)

    monkeypatch.setattr(ContinuousBatcher, "_forward", failing)
    good = Request(prompt="abc", raw=True, max_new_tokens=40)
    running = batcher.submit(cp.resolve(good))
    next(iter(running))
    bad = batcher.submit(cp.resolve(Request(prompt=cp.tokenizer.decode([126]) * 3, raw=True)))
    with pytest.raises(MemoryError):
        bad.result()
    assert running.result().text == cp.generate(good).text
    assert batcher.submit(cp.resolve(good)).result().text == cp.generate(good).text
    batcher.close()


@pytest.mark.slow
def test_a_full_queue_refuses_and_closing_finishes_what_there_is(cp: ControlPrefix) -> None:
    batcher = cp.batcher(max_sequences=1, max_waiting=2)
    long = Request(prompt="x", raw=True, max_new_tokens=60, repetition_penalty=1.5)
    tickets = [batcher.submit(cp.resolve(long))]
    next(iter(tickets[0]))
    tickets += [batcher.submit(cp.resolve(long)) for _ in range(2)]
    with pytest.raises(OverloadedError, match="2 requests are waiting already"):
        batcher.submit(cp.resolve(long))
    assert batcher.close()
    assert len({ticket.result().text for ticket in tickets}) == 1
    with pytest.raises(OverloadedError, match="shutting down"):
        batcher.submit(cp.resolve(long))
    hasty = cp.batcher(max_sequences=1)
    tickets = [hasty.submit(cp.resolve(long)) for _ in range(3)]
    assert not hasty.close(timeout_s=0.0)
    assert tickets[2].result().num_tokens < 60


@pytest.mark.slow
def test_a_deliver_function_that_fails_cancels_only_its_own_request(cp: ControlPrefix) -> None:
    batcher = cp.batcher(max_sequences=2)

    def failing(event: object) -> None:
        raise ValueError("no one home")

    long = Request(prompt="x", raw=True, max_new_tokens=60, repetition_penalty=1.5)
    with pytest.raises(RequestError, match="given to its deliver function"):
        batcher.submit(cp.resolve(long), deliver=failing).result()
    assert batcher.submit(cp.resolve(long)).result() == cp.generate(long)
    assert batcher.close()


def test_a_request_cannot_take_more_rows_than_there_are(cp: ControlPrefix) -> None:
    away = Request(
        prompt="x", raw=True, task="note", user="ana", strengths={"task": -1, "user": -1}
    )
    batcher = cp.batcher(max_sequences=2)
    with pytest.raises(RequestError, match="needs 3 rows"):
        batcher.submit(cp.resolve(away))
    batcher.close()
    with pytest.raises(RequestError, match="65 labels; a request may name 64"):
        Request(prompt="x", attributes={"tone": {f"l{i}": 1.0 for i in range(65)}})


@pytest.mark.slow
def test_a_failure_while_joining_ends_every_ticket(
    cp: ControlPrefix, monkeypatch: pytest.MonkeyPatch
) -> None:
    batcher = cp.batcher(max_sequences=4)
    long = Request(prompt="x", raw=True, max_new_tokens=200, repetition_penalty=1.5)
    with monkeypatch.context() as patch:
        patch.setattr("controlprefix.inference.batch_cache.arrange_rows", lambda *_: 1 / 0)
        for ticket in [batcher.submit(cp.resolve(long)) for _ in range(3)]:
            with pytest.raises(RuntimeError, match="ZeroDivisionError: division by zero") as caught:
                ticket.result()
            assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert batcher.submit(cp.resolve(long)).result() == cp.generate(long)
    assert batcher.close()
    assert batcher.load == (0, 0)


def test_what_a_row_does_to_its_logits_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    cp = ControlPrefix.from_pretrained(
        build("llama"), tokenizer=byte_tokenizer(), store="sqlite://"
    )
    good = Request(prompt="a", raw=True, max_new_tokens=20, logit_bias={1: -100.0})
    bad = good.model_copy(update={"json_schema": {}})
    expected = cp.generate(good).text

    def failing(self: JsonConstraint, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise IndexError("out of bounds")

    monkeypatch.setattr(JsonConstraint, "__call__", failing)
    with contextlib.closing(cp.batcher()) as batcher:
        tickets = [batcher.submit(cp.resolve(request)) for request in (good, bad, good)]
        with pytest.raises(IndexError, match="out of bounds"):
            tickets[1].result()
        assert [tickets[i].result().text for i in (0, 2)] == [expected] * 2


@pytest.mark.parametrize(
    "field",
    [
        {"top_k": 1 << 70},
        {"logit_bias": {10**30: 1.0}},
        {"max_new_tokens": 1 << 63},
        {"prompt_ids": [1 << 64], "prompt": None, "raw": False},
        {"num_beams": 10**6},
    ],
)
def test_numbers_that_no_tensor_holds_are_refused(field: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        Request(**{"prompt": "a", "raw": True, **field})


@pytest.mark.slow
def test_the_rows_of_a_running_request_are_all_counted(cp: ControlPrefix) -> None:
    fields: dict[str, Any] = {"raw": True, "max_new_tokens": 60, "logit_bias": NO_END}
    away = Request(prompt="x", user="ana", strengths={"user": -1}, **fields)
    rows, runs = [], threading.Event()
    with contextlib.closing(cp.batcher(max_sequences=3)) as batcher:

        def deliver(_: object) -> None:
            rows.append(batcher.load[0])
            runs.set()

        batcher.submit(cp.resolve(away), deliver=deliver)
        assert runs.wait(60)
        assert batcher.submit(cp.resolve(away)).result() == cp.generate(away)
    assert max(rows) == 2
