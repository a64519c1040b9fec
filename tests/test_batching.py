"""Continuous batching: a sequence's output does not depend on which others join or leave."""

import contextlib
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from batches import CHANGES, engine, requests
from torch.utils._python_dispatch import TorchDispatchMode

from controlprefix import (
    ControlPrefix,
    Prefix,
    Request,
    RequestError,
)
from controlprefix.inference import batcher as batcher_module
from controlprefix.inference.batcher import BatchedRequest
from controlprefix.inference.continuous_batching import ContinuousBatcher
from controlprefix.inference.prefill_queue import PrefillQueue
from controlprefix.inference.static_batching import StaticBatcher
from controlprefix.model.log_probs import token_log_probs

from models import ENCODER_DECODER, RECURRENT, STATIC, VOCAB, build, byte_tokenizer

NO_END = {1: -100.0}


@pytest.fixture(scope="module")
def cp() -> Iterator[ControlPrefix]:
    built = engine()
    yield built
    built.store.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "gpt2",
        "qwen3",
        "mistral",
        "gemma3",
        "gemma4",
        *CHANGES,
        *RECURRENT,
        *ENCODER_DECODER,
    ],
)
def test_sequences_that_join_and_leave_generate_what_they_generate_alone(name: str) -> None:
    cp = engine(name)
    request_list = requests(40)
    alone = [cp.generate(request) for request in request_list]
    batcher = cp.batcher(max_sequences=5, max_prefill_tokens=40)
    assert isinstance(batcher, ContinuousBatcher)
    draw = random.Random(1)
    tickets = []
    for request in request_list:
        tickets.append(batcher.submit(cp.resolve(request)))
        if draw.random() < 0.3:
            time.sleep(0.01)
    result = [ticket.result() for ticket in tickets]
    assert batcher.close()
    for item, expected in zip(result, alone, strict=True):
        assert item == expected


@pytest.mark.slow
def test_streamed_pieces_add_up_to_the_text(cp: ControlPrefix) -> None:
    batcher = cp.batcher(max_sequences=8)
    request_list = requests(12, seed=3)
    tickets = [batcher.submit(cp.resolve(request)) for request in request_list]
    for ticket, request in zip(tickets, request_list, strict=True):
        pieces = list(ticket)
        assert "".join(pieces) == ticket.result().text == cp.generate(request).text
    batcher.close()


@pytest.mark.slow
def test_a_cancelled_sequence_leaves_and_the_others_stay(cp: ControlPrefix) -> None:
    batcher = cp.batcher(max_sequences=2)
    long = Request(prompt="x", raw=True, max_new_tokens=200, repetition_penalty=1.5)
    expected = cp.generate(long).text
    first, second, third = (batcher.submit(cp.resolve(long)) for _ in range(3))
    next(iter(first))
    first.cancel()
    third.cancel()  # which is still waiting
    assert len(first.result().text) < len(expected)
    assert third.result().num_tokens == 0
    assert second.result().text == expected
    batcher.close()
    assert batcher.load == (0, 0)


@pytest.mark.parametrize("name", ENCODER_DECODER)
def test_log_probabilities_of_an_encoder_decoder_add_up_to_the_score(name: str) -> None:
    cp = engine(name)
    request = Request(prompt="abc", raw=True, max_new_tokens=6, user="ana", logit_bias=NO_END)
    other = Request(prompt="defghij" * 4, raw=True, max_new_tokens=9, user="bo")
    with contextlib.closing(cp.batcher()) as batcher:
        tickets = [batcher.submit(cp.resolve(r), top_log_probs=0) for r in (other, request)]
        text = tickets[1].result().text
    prompt = cp.frozen_model.request_tokenizer.prompt_ids(request)
    new = [item.token for item in tickets[1].tokens]
    with cp.assembled([request]):
        expected, _ = token_log_probs(cp.frozen_model, [prompt], [new])
    assert [t.log_prob for t in tickets[1].tokens] == pytest.approx(expected[0].tolist(), abs=1e-3)
    assert text == cp.generate(request).text


def test_log_probabilities_are_those_of_the_model(cp: ControlPrefix) -> None:
    batcher = cp.batcher()
    request = Request(prompt="abc", raw=True, max_new_tokens=6, user="ana")
    ticket = batcher.submit(cp.resolve(request), top_log_probs=3)
    outcome = ticket.result()
    batcher.close()
    ids = torch.tensor([[*cp.tokenizer("abc")["input_ids"], *(t.token for t in ticket.tokens)]])
    with torch.no_grad(), cp.assembled(request):
        expected = cp.model(ids).logits[0].log_softmax(-1)
    start = ids.shape[1] - len(ticket.tokens)
    assert len(ticket.tokens) >= outcome.num_tokens
    for i, item in enumerate(ticket.tokens):
        row = expected[start + i - 1]
        assert item.log_prob == pytest.approx(float(row[item.token]), abs=1e-3)
        assert [token for token, _ in item.top] == row.topk(3).indices.tolist()


@pytest.mark.slow
def test_many_threads_submit_at_once(cp: ControlPrefix) -> None:
    request_list = requests(24, seed=5)
    expected = [cp.generate(request).text for request in request_list]
    batcher, result = cp.batcher(max_sequences=6), [""] * len(request_list)

    def ask(i: int) -> None:
        result[i] = batcher.submit(cp.resolve(request_list[i])).result().text

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(request_list))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    batcher.close()
    assert result == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", STATIC)
def test_models_whose_cached_rows_cannot_move_run_one_batch_after_another(name: str) -> None:
    cp = engine(name)
    request_list = requests(12)
    alone = [cp.generate(request) for request in request_list]
    batcher = cp.batcher(max_sequences=5)
    assert isinstance(batcher, StaticBatcher)
    tickets = [batcher.submit(cp.resolve(request)) for request in request_list]
    with pytest.raises(RequestError, match="log-probabilities are not supported"):
        batcher.submit(cp.resolve(request_list[0]), top_log_probs=1)
    for ticket, expected in zip(tickets, alone, strict=True):
        assert "".join(ticket) == ticket.result().text
        assert ticket.result() == expected
    assert batcher.close()
    assert batcher.load == (0, 0)


@pytest.mark.parametrize("name", STATIC)
def test_a_static_batch_streams_and_cancels(name: str) -> None:
    cp = engine(name)
    letters = dict.fromkeys(cp.tokenizer("abcdefghijklmnopqrstuvwxyz")["input_ids"], 50.0)
    how: dict[str, Any] = {"max_new_tokens": 60, "logit_bias": letters, "user": "ana"}
    short, long = (Request(prompt=text, **how) for text in ("hello", "good morning"))
    batcher = cp.batcher()
    assert isinstance(batcher, StaticBatcher)
    lengths: list[int] = []
    first = batcher.submit(cp.resolve(short), deliver=lambda event: lengths.append(len(str(event))))
    second = batcher.submit(cp.resolve(long))
    cancelled = batcher.submit(cp.resolve(long))
    for text in cancelled:
        assert len(text) < 30  # a piece of it
        cancelled.cancel()
    assert cancelled.result().num_tokens < 60
    assert second.result().text == cp.generate(long).text
    assert batcher.close()
    assert len(lengths) > 10  # pieces, and the completion
    assert not first.is_cancelled


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"suppress_tokens": [*range(3, 200)]},
        {"no_repeat_ngram_size": 1},
        {"min_new_tokens": 9, "eos_token_id": [1, *range(3, 150)]},
        {"bad_words_ids": [[token] for token in range(3, 200)]},
        {"temperature": 0.3, "top_k": 2, "repetition_penalty": 5.0, "do_sample": True},
        {"forced_eos_token_id": 1},
        {"min_length": 11, "eos_token_id": [1, *range(3, 150)]},
        {"no_repeat_ngram_size": 1, "eos_token_id": [1, *range(3, 150)], "min_new_tokens": 5},
        {"encoder_no_repeat_ngram_size": 1},
        {"encoder_repetition_penalty": 3.0},
        {"stop_strings": ["\x07"], "do_sample": True},
        {"prompt_lookup_num_tokens": 3, "do_sample": True},
        {"penalty_alpha": 0.6, "top_k": 4, "do_sample": True},
        {"token_healing": True, "is_assistant": True, "do_sample": True},
        {"guidance_scale": 1.5, "do_sample": True},
        {"cache_implementation": "offloaded", "do_sample": True},
    ],
)
@pytest.mark.parametrize("name", ["llama", "bart"])
def test_the_models_generation_config_means_the_same_in_every_engine(
    settings: dict[str, Any],
    name: str,
) -> None:
    model = build(name)
    cp = ControlPrefix.from_pretrained(model, tokenizer=byte_tokenizer(), store="sqlite://")
    plain = cp.generate("hello", raw=True, max_new_tokens=12)
    model.generation_config.update(**settings)
    cp = ControlPrefix.from_pretrained(model, tokenizer=byte_tokenizer(), store="sqlite://")
    limits = {"hello": 12, "a": 10}
    requests = [
        Request(prompt=text, raw=True, max_new_tokens=limit) for text, limit in limits.items()
    ]
    expected = [result.text for result in cp.generate(requests)]
    assert [cp.generate(request).text for request in requests] == expected
    if "stop_strings" in settings:
        assert "\x07" not in "".join(expected)
    elif not any(name.startswith("encoder_") for name in settings):
        assert (expected[0] == plain.text) == ("do_sample" in settings)
    assert ["".join(cp.stream(request)) for request in requests] == expected
    with contextlib.closing(cp.batcher()) as batcher:
        tickets = [batcher.submit(cp.resolve(request)) for request in requests]
        assert [ticket.result().text for ticket in tickets] == expected


class Operations(TorchDispatchMode):
    """Counts what is launched, and what makes the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.launched = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.launched[str(func)] += 1
        return func(*args, **(kwargs or {}))

    @property
    def num_waits(self) -> int:
        """`item()`, `nonzero()` and the like; `tolist()` of the chosen tokens is not seen here."""
        names = ("aten._local_scalar_dense.default", "aten.nonzero.default", "aten.equal.default")
        return sum(self.launched[name] for name in names)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "max_waits"),
    [({}, 1), ({"repetition_penalty": 1.2}, 1), ({"temperature": 0.8, "top_p": 0.9, "seed": 1}, 3)],
)
def test_a_decode_step_launches_and_waits_as_often_for_many_rows_as_for_few(
    cp: ControlPrefix, settings: dict[str, Any], max_waits: int
) -> None:
    def operations(num_rows: int) -> Operations:
        batcher: Any = cp.batcher(max_sequences=num_rows)
        decode_step, steps = batcher._decode_step, []

        def counted() -> None:
            is_steady = batcher._batch is not None and len(batcher._rows) == num_rows
            with Operations() as operations:
                decode_step()
            if is_steady:
                steps.append(operations)

        batcher._decode_step = counted
        tickets = [
            batcher.submit(
                cp.resolve(
                    Request(
                        prompt=prompt, user=user, max_new_tokens=60, logit_bias=NO_END, **settings
                    )
                )
            )
            # Of different lengths: a batch without any padding needs no mask.
            for prompt, user in [("hello", "ana"), ("hello there", "bo")] * (num_rows // 2)
        ]
        for ticket in tickets:
            ticket.result()
        batcher.close()
        return min(steps, key=lambda step: step.launched.total())  # the cache grows now and then

    few, many = operations(2), operations(24)
    assert many.launched == few.launched
    assert many.num_waits <= max_waits


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen3_next", "bart"])
def test_choices_of_a_prompt_are_prefilled_once(name: str) -> None:
    """And each is what it is alone; the same prompt under other slots is another row."""
    cp = engine(name)
    fields: dict[str, Any] = {"raw": True, "max_new_tokens": 6, "temperature": 1.0, "task": "note"}
    rows = [
        Request(prompt=prompt, user=user, seed=seed, **fields)
        for prompt in ("x" * 50, "a longer prompt " * 4)
        for user in ("ana", "bo")
        for seed in range(4)
    ]
    rows += [Request(prompt="x" * 50, strengths={"task": -0.5}, **fields, seed=9)] * 2
    expected = [cp.generate(row).text for row in rows]
    batcher = cp.batcher(max_sequences=32)
    assert isinstance(batcher, ContinuousBatcher)
    forward, num_rows = batcher._forward, []

    def noting(batch: Any, **inputs: Any) -> Any:
        ids = inputs.get("input_ids")  # an encoder-decoder decodes without them
        if ids is not None and ids.shape[1] > 1:
            num_rows.append(len(ids))
        return forward(batch, **inputs)

    batcher._forward = noting  # type: ignore[method-assign]
    try:
        with batcher._wake:  # all are waiting before the first step
            tickets = [batcher.submit(cp.resolve(row)) for row in rows]
        assert [ticket.result().text for ticket in tickets] == expected
        assert sum(num_rows) <= 6  # 4 prompts with slots, and 2 rows of a strength below 0
    finally:
        batcher.close()


def test_choices_with_other_schedules_are_read_apart(cp: ControlPrefix) -> None:
    fields: dict[str, Any] = {"raw": True, "max_new_tokens": 8, "user": "ana", "logit_bias": NO_END}
    schedule_requests = [
        Request(prompt="x" * 50, schedules={"user": [(0, multiplier)]}, **fields)
        for multiplier in (0.0, 3.0)
    ]
    expected = [cp.generate(request).text for request in schedule_requests]
    assert expected[0] != expected[1]
    with contextlib.closing(cp.batcher()) as batcher:
        with batcher._wake:  # both are waiting before the first step
            tickets = [batcher.submit(cp.resolve(request)) for request in schedule_requests]
        assert [ticket.result().text for ticket in tickets] == expected


@pytest.mark.slow
def test_requests_that_come_one_after_another_are_prefilled_together(
    cp: ControlPrefix, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batcher_module, "_GATHERING_S", 0.2)
    monkeypatch.setattr(batcher_module, "_MAX_GATHERING_S", 20.0)
    sizes: list[int] = []
    add = PrefillQueue.add

    def noting(self: PrefillQueue, sequences: list[BatchedRequest]) -> None:
        sizes.extend([len(sequences)] if sequences else [])
        add(self, sequences)

    monkeypatch.setattr(PrefillQueue, "add", noting)
    resolved = [cp.resolve(request) for request in requests(3)]
    with contextlib.closing(cp.batcher(max_sequences=4)) as batcher:
        tickets = [batcher.submit(own) for own in resolved]
        for ticket in tickets:
            ticket.result()
        assert sizes == [3]
        # As many as there are rows are not waited for, and closing does not wait.
        monkeypatch.setattr(batcher_module, "_GATHERING_S", 1e6)
        monkeypatch.setattr(batcher_module, "_MAX_GATHERING_S", 1e6)
        with batcher._wake:  # the batch sees all of them, or none
            tickets = [batcher.submit(own) for own in [resolved[0]] * 4]
        assert [ticket.result() for ticket in tickets]
        tickets.append(batcher.submit(resolved[0]))
    assert tickets[-1].result()


@pytest.mark.slow
def test_a_late_request_has_its_own_positions_in_a_rotary_decoder_behind_an_encoder() -> None:
    size: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "vocab_size": VOCAB}
    module = {**size, **heads, **ids, "query_pre_attn_scalar": 8}
    config = transformers.T5GemmaConfig(
        encoder=transformers.T5GemmaModuleConfig(**module),
        decoder=transformers.T5GemmaModuleConfig(**module, is_decoder=True),
        vocab_size=VOCAB,
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.T5GemmaForConditionalGeneration(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.data *= 4 if parameter.ndim > 1 else 1
    cp = ControlPrefix.from_pretrained(model, tokenizer=byte_tokenizer(), store="sqlite://")
    cp.put("user", "ana", Prefix.random(cp.geometry, num_slots=3, scale=1.0, seed=1))
    early = Request(prompt="defg" * 4, raw=True, max_new_tokens=100, logit_bias=NO_END)
    late = Request(prompt="abc", raw=True, max_new_tokens=6, user="ana", logit_bias=NO_END)
    with contextlib.closing(cp.batcher()) as batcher:
        first = batcher.submit(cp.resolve(early), top_log_probs=0)
        while len(first.tokens) < 20:
            time.sleep(0.001)
        ticket = batcher.submit(cp.resolve(late), top_log_probs=0)
        ticket.result()
    prompt = cp.frozen_model.request_tokenizer.prompt_ids(late)
    with cp.assembled(late):
        new = [item.token for item in ticket.tokens]
        expected, _ = token_log_probs(cp.frozen_model, [prompt], [new])
    assert [t.log_prob for t in ticket.tokens] == pytest.approx(expected[0].tolist(), abs=1e-4)
