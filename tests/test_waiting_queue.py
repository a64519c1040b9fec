"""Who is next: turns of tenants, order within one, rows that must fit, chunks of prompts."""

import contextlib
import time
from collections import Counter
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlprefix import ControlPrefix, OverloadedError, Prefix, Request, RequestError
from controlprefix.inference import batcher as batcher_module
from controlprefix.inference.prefill_queue import PrefillQueue
from controlprefix.inference.waiting_queue import WaitingQueue

from models import build, byte_tokenizer

Item = tuple[str, int, int, int]  # tenant, number, rows, tokens


def line_of(*items: Item) -> WaitingQueue[Item]:
    line = WaitingQueue[Item](lambda item: item[2], lambda item: item[3])
    for item in items:
        line.add(item[0], item)
    return line


def take_all(line: WaitingQueue[Item], rows: int = 100) -> list[Item]:
    taken = []
    while (item := line.take(rows, dict.fromkeys(line.tenants, rows))) is not None:
        taken.append(item)
    return taken


def test_a_tenant_keeps_its_order_and_tenants_take_turns_by_tokens() -> None:
    heavy: list[Item] = [("heavy", i, 1, 100) for i in range(4)]
    light: list[Item] = [("light", i, 1, 10) for i in range(4)]
    order = take_all(line_of(*heavy, *light))
    assert order == [heavy[0], *light, *heavy[1:]]


def test_a_newcomer_is_next_and_has_saved_nothing_up() -> None:
    line = line_of(*(("old", i, 1, 10) for i in range(40)))
    for _ in range(20):
        line.take(1, {"old": 1})
    for i in range(40):
        line.add("new", ("new", i, 1, 10))
    taken = take_all(line)
    assert taken[0][0] == "new" or taken[1][0] == "new"
    assert Counter(item[0] for item in taken[:20])["new"] in range(9, 13)


def test_small_requests_pass_a_large_one_but_not_forever() -> None:
    large: Item = ("a", 0, 32, 10)
    line = line_of(large, *(("a", i, 1, 1) for i in range(1, 200)))
    passed = 0
    while (item := line.take(4, {"a": 32})) is not None:
        assert item != large
        passed += 1
    assert 0 < passed < 199
    assert line.take(32, {"a": 32}) == large


def test_a_tenant_without_free_rows_holds_nobody_up() -> None:
    line = line_of(*(("a", i, 1, 1) for i in range(300)), *(("b", i, 1, 1) for i in range(300)))
    taken = 0
    while (item := line.take(4, {"a": 0, "b": 4})) is not None:
        assert item[0] == "b"
        taken += 1
    assert taken == 300


def test_rows_are_not_kept_for_what_its_tenants_quota_does_not_let_in() -> None:
    large: Item = ("a", 0, 4, 1)
    line = line_of(large, *(("b", i, 1, 1) for i in range(300)))
    for i in range(300):
        item = line.take(16, {"a": 3, "b": 16})
        assert item is not None, i
        assert item[0] == "b"
    line.add("a", ("a", 1, 1, 1))  # must not pass it for ever
    assert line.take(16, {"a": 3}) is None
    assert line.take(16, {"a": 4}) == large


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 4), st.integers(1, 50))))
def test_nothing_is_lost_or_taken_twice(entries: list[tuple[str, int, int]]) -> None:
    items: list[Item] = [(tenant, i, rows, n) for i, (tenant, rows, n) in enumerate(entries)]
    line = line_of(*items)
    removed = line.remove(lambda item: item[1] % 3 == 0)
    assert sorted(removed) == sorted(item for item in items if item[1] % 3 == 0)
    assert len(line) == len(items) - len(removed)
    taken = take_all(line, rows=4)
    assert len(line) == 0
    assert sorted(taken) == sorted(item for item in items if item[1] % 3)
    for tenant in "abc":
        numbers = [item[1] for item in taken if item[0] == tenant]
        assert numbers == sorted(numbers)


def sequence(num_tokens: int, tenant: str = "a", rows: int = 1) -> Any:
    result = Mock()  # compared by identity, as sequences are
    result.prompt, result.rows, result.resolved.tenant = range(num_tokens), [[]] * rows, tenant
    result.row_keys = [(id(result), i) for i in range(rows)]
    return result


def run(queue: PrefillQueue, served: dict[str, float], decoding: set[str], steps: int) -> list[Any]:
    """The sequences whose chunk each step was."""
    order = []
    for _ in range(steps):
        prefill = queue.next(lambda tenant: served[tenant], decoding)
        order.append(prefill and prefill.sequences[0])
        if prefill:
            with queue.next_chunk(prefill, None):
                pass
            if prefill.num_done == prefill.length:
                queue.drop(prefill)
    return order


def test_short_prompts_are_prefilled_together_and_overtake_long_ones() -> None:
    queue = PrefillQueue(512)
    long = [sequence(8000), sequence(6000)]
    for prompt in long:
        queue.add([prompt])
    served = {"a": 0.0}
    assert set(run(queue, served, set(), 4)) == set(long)
    short = [sequence(10) for _ in range(20)]
    queue.add(short)
    order = run(queue, served, {"a"}, 2)
    assert short[0] in order
    assert not set(queue.sequences) & set(short)  # all in one chunk
    assert set(order + run(queue, served, {"a"}, 1)) & set(long)


def test_a_prompt_waits_for_none_of_a_tenant_that_was_served_more() -> None:
    queue = PrefillQueue(512)
    many, own = [sequence(20, "heavy") for _ in range(60)], sequence(30, "light")
    queue.add([*many, own])
    order = run(queue, {"heavy": 1000.0, "light": 4.0}, set(), 2)
    assert order[0] is own
    assert own not in queue.sequences
    assert order[1] in many


def test_who_was_served_more_leaves_steps_to_those_who_decode() -> None:
    queue = PrefillQueue(512)
    queue.add([sequence(100_000, "heavy")])
    order = run(queue, {"heavy": 1000.0, "light": 4.0}, {"light"}, 16)
    assert sum(step is not None for step in order) == 4
    assert None not in run(queue, {"heavy": 1000.0, "light": 4.0}, {"heavy"}, 16)
    assert queue.num_joining_rows(lambda _: 0.0, {"light"}) == 0


def test_what_was_begun_together_is_removed_together() -> None:
    queue = PrefillQueue(512)
    sequences = [sequence(10) for _ in range(3)]
    queue.add(sequences)
    assert queue.remove(lambda s: s is sequences[0]) == [sequences[0]]
    prefill = queue.next(lambda _: 0.0, set())
    assert prefill is not None
    prefill.batch = object()  # type: ignore[assignment]  # as after `prepare`
    assert queue.remove(lambda s: s is sequences[1]) == []
    assert queue.remove(lambda _: True) == sequences[1:]
    assert not queue.sequences


@pytest.mark.slow
def test_a_tenant_cannot_fill_the_line_of_a_shared_batch() -> None:
    cp = ControlPrefix.from_pretrained(
        build("llama"), tokenizer=byte_tokenizer(), store="sqlite://"
    )
    batcher = cp._generator.batcher(max_sequences=2, max_waiting=8, max_sequences_per_tenant=1)
    try:
        request = cp.resolve(Request(prompt="a", raw=True, max_new_tokens=200))
        accepted = []

        def fill() -> None:
            for _ in range(20):
                accepted.append(batcher.submit(request))

        with pytest.raises(OverloadedError, match="7 requests of this tenant"):
            fill()
        other = batcher.submit(replace(request, tenant="other"))
        for ticket in accepted:
            ticket.cancel()
        assert other.result().num_tokens
    finally:
        batcher.close()


def test_a_request_of_more_rows_than_the_batch_has_is_refused() -> None:
    cp = ControlPrefix.from_pretrained(
        build("llama"), tokenizer=byte_tokenizer(), store="sqlite://"
    )
    batcher = cp._generator.batcher(max_sequences=2, max_sequences_per_tenant=16)
    for seed, label in enumerate(("a", "b", "c")):
        cp.put("attribute", f"tone={label}", Prefix.random(cp.geometry, num_slots=2, seed=seed))
    tones = {"tone": {"a": 1.0, "b": 1.0, "c": 1.0}}
    request = Request(prompt="a", raw=True, attributes=tones, mixing="logits", max_new_tokens=2)
    with contextlib.closing(batcher), pytest.raises(RequestError, match=r"needs 4 rows.* use 2"):
        batcher.submit(cp.resolve(request))


@pytest.mark.slow
@pytest.mark.parametrize("active_seconds", [60.0, 0.0])
def test_a_tenant_has_fewer_rows_while_another_is_active(
    monkeypatch: pytest.MonkeyPatch, active_seconds: float
) -> None:
    monkeypatch.setattr(batcher_module, "_ACTIVE_S", active_seconds)
    cp = ControlPrefix.from_pretrained(
        build("llama"), tokenizer=byte_tokenizer(), store="sqlite://"
    )
    batcher = cp._generator.batcher(
        max_sequences=8, max_sequences_per_tenant=7, max_sequences_beside_others=2
    )
    rows: list[Counter[str]] = []
    step = batcher._step

    def counted() -> None:
        step()
        counts = Counter[str]()
        for sequence in batcher._running():
            counts[sequence.resolved.tenant] += len(sequence.rows)
        rows.append(counts)

    monkeypatch.setattr(batcher, "_step", counted)
    try:
        request = cp.resolve(Request(prompt="a", raw=True, max_new_tokens=20))
        with batcher._wake:  # no step between these
            alone = [batcher.submit(request) for _ in range(14)]
        for ticket in alone:
            ticket.result()
        assert max(counts[request.tenant] for counts in rows) == 7
        rows.clear()
        with batcher._wake:
            batcher.submit(replace(request, tenant="other"))
            tickets = [batcher.submit(request) for _ in range(6)]
        for ticket in tickets:
            ticket.result()
        expected = 2 if active_seconds else 6
        assert max(counts[request.tenant] for counts in rows) == expected
    finally:
        batcher.close()
    # A request that needs more rows begins when its tenant has no others.
    batcher._waiting.add("wide", Mock())
    batcher._submitted_at = dict.fromkeys(("wide", "other"), time.monotonic())
    assert batcher._quotas({}) == {"wide": 7}
    assert batcher._quotas({"wide": 1}) == {"wide": 1 if active_seconds else 6}
