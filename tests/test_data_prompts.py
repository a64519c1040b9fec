"""Rows whose prompts are conversations, token ids, or too long."""

import json
from pathlib import Path

import pytest

from controlprefix import (
    ContextLengthError,
    ControlPrefix,
    Example,
    RequestError,
    TrainingDataError,
)
from controlprefix.data import (
    as_examples,
    as_requests,
    summarize,
)
from controlprefix.training.context_fit import cut_example_ids, fit_to_context

from helpers import QUICK, engine
from models import byte_tokenizer


def test_fine_tuning_chats_teach_the_last_answer() -> None:
    chat = {
        "messages": [
            {"role": "developer", "content": "Be kind."},
            {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
            {"role": "assistant", "content": "Hello!", "weight": 1},
        ],
        "user": "ana",
    }
    (example,) = as_examples([chat])
    assert example.messages is not None
    assert [(m.role, m.content) for m in example.messages] == [
        ("system", "Be kind."),
        ("user", "Hi"),
    ]
    assert (example.completion, example.user) == ("Hello!", "ana")
    for wrong, message in (
        (chat["messages"][:2], "must end with the assistant's message"),
        ([{"role": "tool", "content": "x"}, *chat["messages"]], "a message has the role 'tool'"),
        ("Hi", "messages must be a list"),
        ([*chat["messages"][:2], {"role": "assistant", "content": "x", "weight": 0}], "weight 0"),
    ):
        with pytest.raises(TrainingDataError, match=message):
            as_examples([{"messages": wrong}])


@pytest.mark.slow
def test_rows_that_are_too_long_are_refused_cut_or_skipped(tmp_path: Path) -> None:
    cp = engine()  # its context is 256
    path = tmp_path / "rows.jsonl"
    lengths = [(5, 5), (5, 400), (400, 5), (200, 200)]
    path.write_text(
        "\n".join(json.dumps({"prompt": "p" * p, "completion": "c" * c}) for p, c in lengths)
    )
    settings = {**QUICK, "steps": 1, "validation": 0}
    with pytest.raises(ContextLengthError, match="line 2") as caught:
        cp.train(path, task="t", **settings)
    assert "line 3" in str(caught.value)
    assert "line 4" in str(caught.value)
    assert "too_long='cut'" in str(caught.value)
    skipped = cp.train(path, task="t", too_long="skip", **settings)
    assert (skipped.num_examples, skipped.num_skipped, skipped.num_cut) == (1, 3, 0)
    cut = cp.train(path, task="t", too_long="cut", **settings)
    assert (cut.num_examples, cut.num_skipped, cut.num_cut) == (4, 0, 3)
    tokenizer = cp.frozen_model.request_tokenizer
    for (p, c), example in zip(lengths, as_examples(path), strict=True):
        if p + c < 256:
            continue
        ids = cut_example_ids(example, tokenizer)
        assert len(ids.prompt) + len(ids.completion) + 1 == 256
        assert len(ids.completion) >= min(c, 128)
        assert ids.is_whole == (len(ids.completion) == c)
    short = [{"prompt": "p" * 400, "completion": "x"}]
    with pytest.raises(TrainingDataError, match="none of the 1 rows fits"):
        cp.train(short, task="t", too_long="skip", **settings)


def test_one_chat_is_a_row_and_not_a_list_of_them(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}
    for name in ("chat.json", "chat.jsonl", "chat"):
        path = tmp_path / name
        path.write_text(json.dumps(chat))
        (example,) = as_examples(path)
        assert example.completion == "yo"
    chat["messages"][-1]["weight"] = 0  # type: ignore[assignment]
    with pytest.raises(TrainingDataError, match="has weight 0"):
        as_examples([chat])
    separate = {
        "messages": [{"role": "developer", "content": "x"}, {"role": "user", "content": "y"}],
        "completion": "z",
    }
    (example,) = as_examples([separate])
    assert example.messages is not None
    assert example.messages[0].role == "system"
    nothing = {"role": "user", "content": [{"type": "text", "text": None}]}
    with pytest.raises(TrainingDataError, match="parts that are neither texts nor images"):
        as_examples([{"messages": [nothing], "completion": "z"}])


def test_a_prompt_may_be_a_conversation() -> None:
    messages = [{"role": "system", "content": "Be kind"}, {"role": "user", "content": "Hi, Bob"}]
    (example,) = as_examples([{"prompt": messages, "completion": "Hello"}])
    assert [(m.role, m.content) for m in example.messages or ()] == [
        ("system", "Be kind"),
        ("user", "Hi, Bob"),
    ]
    (request,) = as_requests([{"prompt": messages}])
    assert request.messages == example.messages


def test_a_conversation_that_cannot_be_cut_is_skipped() -> None:
    cp = engine()
    cp = ControlPrefix.from_pretrained(
        cp.model, tokenizer=byte_tokenizer(chat=True), store="sqlite://"
    )
    messages = [{"role": ("user", "assistant")[i % 2], "content": "ab"} for i in range(101)]
    rows = [{"messages": messages, "completion": "x"}, {"prompt": "hi", "completion": "y"}]
    settings = {**QUICK, "steps": 1, "validation": 0, "too_long": "cut"}
    report = cp.train(rows, task="t", **settings)
    assert (report.num_examples, report.num_skipped) == (1, 1)


def test_a_row_that_cannot_be_read_is_named_where_long_ones_are_skipped() -> None:
    tokenizer = engine().frozen_model.request_tokenizer
    rows = [
        Example(prompt="x", completion="y"),
        Example(prompt="x", completion="y", target_language="fra_Latn"),
    ]
    for too_long in ("refuse", "skip", "cut"):
        with pytest.raises(RequestError, match="row 2: source_language"):
            fit_to_context(rows, tokenizer, too_long)


def test_token_ids_are_a_prompt() -> None:
    rows = [Example(prompt_ids=(1, 2, i), completion="x") for i in range(3)]
    summary = summarize(rows)
    assert (summary.num_prompts, summary.num_without_prompt) == (3, 0)
