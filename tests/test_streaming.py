"""What is written: streams, stop texts, seeds, and logits that are no numbers."""

from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from controlprefix import ControlPrefix, Request
from controlprefix.errors import ModelOutputError
from controlprefix.inference.stopping import (
    IncrementalDetokenizer,
    completion_from_tokens,
    has_stop,
)
from controlprefix.model.tokenization import RequestTokenizer

from models import build, byte_tokenizer, sentencepiece_tokenizer, wordpiece_tokenizer

MODEL = build("llama")
TOKENIZERS = [byte_tokenizer, sentencepiece_tokenizer, wordpiece_tokenizer]


def test_a_special_token_among_the_bytes_of_a_character_does_not_end_a_stream() -> None:
    tokenizer = sentencepiece_tokenizer()
    reader = RequestTokenizer(MODEL, tokenizer)
    names = ["<0x0D>", "<unk>", "<0xA2>", "a", "b", "c"]
    new = [tokenizer.vocab[name] for name in names]
    request = Request(prompt="a", max_new_tokens=len(new))
    text = IncrementalDetokenizer(reader, request)
    pieces = [text.update(new[:n])[0] for n in range(1, len(new) + 1)]
    assert "".join(pieces) == completion_from_tokens(reader, request, [1], new).text


def test_half_a_character_is_no_stop_text() -> None:
    reader = RequestTokenizer(MODEL, byte_tokenizer())
    new = list(reader.inner_ids("é ok"))
    request = Request(prompt="a", max_new_tokens=len(new) + 1, stop=("\ufffd",))
    text = IncrementalDetokenizer(reader, request)
    updates = [text.update(new[:n]) for n in range(1, len(new) + 1)]
    assert "".join(piece for piece, _ in updates) == "é ok"
    assert not any(finished for _, finished in updates)
    assert not any(has_stop(reader, request, new[:n]) for n in range(1, len(new) + 1))


TEXTS = st.text(
    st.sampled_from("ab .,'\n\r\t!?") | st.sampled_from("é日本語한😀👍🏽عر\u0301"),
    min_size=1,
    max_size=24,
)


def streamed(reader: RequestTokenizer, request: Request, ids: list[int]) -> tuple[str, str]:
    stream, text = IncrementalDetokenizer(reader, request), ""
    for count in range(1, len(ids) + 1):
        added, finished = stream.update(ids[:count])
        text += added
        if finished:
            ids = ids[:count]
            break
    return text, completion_from_tokens(reader, request, [0], ids).text


@pytest.mark.slow
@pytest.mark.parametrize("make", TOKENIZERS)
@given(text=TEXTS, draws=st.lists(st.integers(3, 290), max_size=30))
@settings(max_examples=60)
def test_a_stream_joined_is_the_text(
    make: Callable[[], PreTrainedTokenizerFast], text: str, draws: list[int]
) -> None:
    tokenizer = make()
    reader = RequestTokenizer(build("llama"), tokenizer)
    for ids in (tokenizer(text, add_special_tokens=False)["input_ids"], draws):
        if ids := [token for token in ids if token < len(tokenizer)]:
            joined, expected = streamed(reader, Request(prompt="q", max_new_tokens=len(ids)), ids)
            assert joined == expected


@pytest.mark.parametrize("make", TOKENIZERS)
def test_words_of_real_text_stream_with_their_spaces(
    make: Callable[[], PreTrainedTokenizerFast],
) -> None:
    tokenizer = make()
    reader = RequestTokenizer(build("llama"), tokenizer)
    ids = tokenizer("do n't , we ' re the a b\nthe", add_special_tokens=False)["input_ids"]
    joined, expected = streamed(reader, Request(prompt="q", max_new_tokens=len(ids) + 1), [*ids, 1])
    assert joined == expected


@pytest.mark.parametrize("stop", ["😀😀😀😀", "日本語", "END", "\r\n"])
def test_a_stop_text_is_found_at_the_step_it_appears(stop: str) -> None:
    tokenizer = byte_tokenizer()
    reader = RequestTokenizer(build("llama"), tokenizer)
    request = Request(prompt="q", stop=[stop])
    ids = tokenizer(f"é{'x' * 40}{stop}yz")["input_ids"]
    steps = [has_stop(reader, request, ids[:count]) for count in range(1, len(ids) + 1)]
    assert steps.index(True) + 1 == len(ids) - 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_one_seed_gives_one_text_in_every_engine_in_bfloat16(name: str) -> None:
    model = build(name, dtype=torch.bfloat16)
    cp = ControlPrefix.from_pretrained(model, tokenizer=byte_tokenizer(), store="sqlite://")
    fields: dict[str, Any] = {"temperature": 1.0, "top_p": 0.9, "max_new_tokens": 8}
    requests = [Request(prompt="hi", raw=True, seed=seed, **fields) for seed in range(24)]
    expected = [cp.generate(request).text for request in requests]
    assert len(set(expected)) > 12
    with closing(cp.batcher()) as batcher:
        assert [
            batcher.submit(cp.resolve(request)).result().text for request in requests
        ] == expected
    assert ["".join(cp.stream(request)) for request in requests] == expected


def test_a_damaged_weight_is_an_error_of_the_request() -> None:
    model = build("llama")
    head: Any = model.get_output_embeddings()
    head.weight.data[7] = float("nan")
    cp = ControlPrefix.from_pretrained(model, tokenizer=byte_tokenizer(), store="sqlite://")
    with pytest.raises(ModelOutputError):
        cp.generate("hi", raw=True, max_new_tokens=4)


@pytest.mark.parametrize("name", ["llama", "gemma3", "bart"])
def test_logits_that_are_no_numbers_are_an_error_of_their_row(name: str) -> None:
    model = build(name)
    reader: Any = model.get_encoder() if name == "bart" else model
    head: Any = reader.get_input_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    head.weight.data[byte_tokenizer()("~")["input_ids"][0]] = float("nan")  # read by one prompt
    cp = ControlPrefix.from_pretrained(model, tokenizer=byte_tokenizer(), store="sqlite://")
    output: Any = model.get_output_embeddings()
    output.weight = torch.nn.Parameter(output.weight.detach().nan_to_num(), requires_grad=False)
    good, bad = (Request(prompt=text, raw=True, max_new_tokens=3) for text in ("a", "~"))
    expected = cp.generate(good).text
    for request in (bad, [good, bad]):
        with pytest.raises(ModelOutputError, match="no numbers"):
            cp.generate(request)
    for limit in (1, 3):  # also where the token before the error would have been the last
        with pytest.raises(ModelOutputError):
            list(cp.stream(bad.model_copy(update={"max_new_tokens": limit})))
    with closing(cp.batcher()) as batcher:
        tickets = [batcher.submit(cp.resolve(request)) for request in (good, bad, good)]
        assert tickets[0].result().text == tickets[2].result().text == expected
        with pytest.raises(ModelOutputError):
            tickets[1].result()
        assert batcher.submit(cp.resolve(good)).result().text == expected


@pytest.mark.slow
@pytest.mark.parametrize("make", TOKENIZERS)
@given(texts=st.lists(TEXTS, min_size=8, max_size=30), stop=st.sampled_from(["", "ab", "日本"]))
@settings(max_examples=20)
def test_a_long_stream_joined_is_the_text(
    make: Callable[[], PreTrainedTokenizerFast], texts: list[str], stop: str
) -> None:
    tokenizer = make()
    reader = RequestTokenizer(build("llama"), tokenizer)
    ids = tokenizer(" ".join(texts), add_special_tokens=False)["input_ids"]
    ids = [token for token in ids if token < len(tokenizer)]
    request = Request(prompt="q", max_new_tokens=max(1, len(ids)), stop=[stop] if stop else [])
    if ids:
        joined, expected = streamed(reader, request, ids)
        assert joined == expected


def test_the_work_of_a_stream_does_not_grow_with_the_text() -> None:
    reader = RequestTokenizer(build("llama"), byte_tokenizer())
    numbers: list[int] = []
    decode = reader.decode
    reader.decode = lambda ids: numbers.append(len(ids)) or decode(ids)  # type: ignore[method-assign,func-returns-value]
    ids = byte_tokenizer()("the words of a long text " * 80)["input_ids"]
    joined, expected = streamed(reader, Request(prompt="q", max_new_tokens=len(ids)), ids)
    assert joined == expected
    assert len(numbers) <= 1.1 * len(ids)
    assert max(numbers[:-1]) < 50


def test_what_was_held_back_is_given_out_at_the_end() -> None:
    cp = ControlPrefix.from_pretrained(
        build("llama"), tokenizer=byte_tokenizer(), store="sqlite://"
    )
    tokenizer = cp.frozen_model.request_tokenizer
    request = Request(prompt="Hi", stop=("end",), max_new_tokens=40)
    text = IncrementalDetokenizer(tokenizer, request)
    ids = list(cp.tokenizer("the en")["input_ids"])
    assert text.update(ids) == ("the ", False)  # a stop text may have begun
    assert text.rest("the en") == "en"
    assert text.rest("the en") == ""
