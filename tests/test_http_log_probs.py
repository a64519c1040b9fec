"""Tokens, log-probabilities, echoes and JSON in OpenAI's API."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlprefix import ControlPrefix, Example, Request
from controlprefix.model.log_probs import TokenLogProbs
from controlprefix.model.token_bytes import TokenBytes
from controlprefix.serving.log_probs import text_log_probs
from controlprefix.store import PrefixStore

from helpers import Instance, frozen
from models import byte_tokenizer, sentencepiece_tokenizer, wordpiece_tokenizer
from servers import (
    MODEL,
    TOKENIZER,
    Served,
    chat,
    complete,
    events,
)


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_bytes_of_tokens_joined_are_the_text(served: Served, seed: int) -> None:
    fields = {"logprobs": True, "top_logprobs": 3, "max_tokens": 24, "temperature": 1, "seed": seed}
    (choice,) = chat(served, **fields).json()["choices"]
    content = choice["logprobs"]["content"]
    special = TOKENIZER.all_special_tokens  # left out of the text
    joined = b"".join(bytes(t["bytes"]) for t in content if t["token"] not in special)
    assert joined.decode(errors="replace") == choice["message"]["content"]
    for token in content:
        assert token["token"].encode() == bytes(token["bytes"]) or token["token"][:6] == "bytes:"
    streamed = [
        token
        for event in events(chat(served, stream=True, **fields))
        for choice in event["choices"]
        for token in (choice["logprobs"] or {"content": []})["content"]
    ]
    assert streamed == content


def test_streamed_log_probabilities_come_with_their_text(served: Served) -> None:
    fields = {"logprobs": True, "max_tokens": 24, "temperature": 0}
    text = tokens = b""
    num_chunks_with_both = 0
    for event in events(chat(served, stream=True, **fields)):
        (choice,) = event["choices"]
        text += choice["delta"].get("content", "").encode()
        own = (choice["logprobs"] or {"content": []})["content"]
        tokens += b"".join(bytes(token["bytes"]) for token in own)
        assert len(tokens) <= len(text) or choice["finish_reason"]
        num_chunks_with_both += bool(own and choice["delta"].get("content"))
    assert num_chunks_with_both > 5


@pytest.mark.slow
def test_text_log_probabilities_have_offsets_and_no_collisions(served: Served) -> None:
    fields = {"logprobs": 5, "max_tokens": 24, "temperature": 1.0, "seed": 3}
    (choice,) = complete(served, **fields).json()["choices"]
    log_probs = choice["logprobs"]
    for token, top, value, offset in zip(*(log_probs[name] for name in (
        "tokens", "top_logprobs", "token_logprobs", "text_offset")), strict=True):  # fmt: skip
        assert len(top) in (5, 6)
        assert top[token] == value
        if not token.startswith("bytes:"):
            assert choice["text"][offset:].startswith(token)
    streamed = events(complete(served, stream=True, **fields))
    parts = [e["choices"][0]["logprobs"] for e in streamed if e["choices"][0]["logprobs"]]
    for name, values in log_probs.items():
        assert [x for part in parts for x in part[name]] == values


@pytest.mark.parametrize(
    ("tokenizer", "text"),
    [
        (byte_tokenizer(), "a 😀 日本\r\n x"),
        (sentencepiece_tokenizer(), "the é 😀 ab\n"),
        (wordpiece_tokenizer(), "hello we don"),
    ],
)
def test_token_bytes_of_each_kind_of_tokenizer(tokenizer: Any, text: str) -> None:
    names = TokenBytes(tokenizer)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert b"".join(map(names, ids)).decode().strip() == text.strip()
    assert names(tokenizer.vocab_size + 1000) == b""


@pytest.mark.slow
def test_token_ids_and_echo_give_the_scores_of_the_library(served: Served, store: str) -> None:
    cp = ControlPrefix(frozen(MODEL, TOKENIZER), PrefixStore(store, tenant="mine"))
    text = "abc defg"
    ids = list(cp.frozen_model.request_tokenizer.prompt_ids(Request(prompt=text, raw=True)))
    fields: dict[str, Any] = {"user": "ana", "attributes": {"tone": "warm"}}
    for prompt in (text, ids, [text], [ids]):
        answer = complete(
            served, prompt=prompt, echo=True, logprobs=1, max_tokens=1, temperature=0, **fields
        ).json()["choices"][0]
        log_probs = answer["logprobs"]["token_logprobs"]
        assert log_probs[0] is None
        assert len(log_probs) == len(ids) + 1
        assert answer["text"].startswith(text)
        # as lm-evaluation-harness reads a loglikelihood: the prompt's tokens after the context
        example = Example(prompt=text[:3], raw=True, completion=text[3:], **fields)
        num_context = len(ids) - len(text[3:])
        expected = cp.score([example])[0].log_likelihood
        assert sum(log_probs[num_context:-1]) == pytest.approx(expected, abs=1e-4)
    same = complete(served, prompt=ids, max_tokens=6, temperature=0).json()["choices"]
    assert same == complete(served, prompt=text, max_tokens=6, temperature=0).json()["choices"]
    cp.store.close()


def test_log_probabilities_of_prompts_are_bounded_in_memory(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served.gateway._prompt_echo, "_max_tokens", 4)
    assert complete(served, prompt="abcd", echo=True, logprobs=1).status_code == 200
    assert complete(served, prompt="abcde", echo=True).status_code == 200
    refused = complete(served, prompt=["a", "abcde"], echo=True, logprobs=1)
    assert refused.status_code == 400
    assert "5 tokens" in refused.text
    guided = {"attributes": {"tone": {"warm": 1.0}}, "mixing": "logits"}
    refused = complete(served, prompt="abcd", echo=True, logprobs=1, **guided)
    assert refused.status_code == 400
    assert "4 tokens in each of 2 rows" in refused.text


@pytest.mark.slow
def test_echo_in_streams_and_without_new_tokens(served: Served) -> None:
    nothing = complete(served, prompt=["abc", "de"], echo=True, logprobs=0, max_tokens=0).json()
    assert [choice["text"] for choice in nothing["choices"]] == ["abc", "de"]
    assert nothing["usage"]["completion_tokens"] == 0
    assert [len(c["logprobs"]["tokens"]) for c in nothing["choices"]] == [3, 2]
    fields = {"echo": True, "max_tokens": 5, "logprobs": 2, "temperature": 0, "n": 2}
    whole = complete(served, **fields).json()["choices"]
    streamed = events(complete(served, stream=True, **fields))
    for i, choice in enumerate(whole):
        own = [e["choices"][0] for e in streamed if e["choices"][0]["index"] == i]
        assert "".join(part["text"] for part in own) == choice["text"]
        tokens = [t for part in own if part["logprobs"] for t in part["logprobs"]["tokens"]]
        assert tokens == choice["logprobs"]["tokens"]
        offsets = [t for part in own if part["logprobs"] for t in part["logprobs"]["text_offset"]]
        assert offsets == choice["logprobs"]["text_offset"]
    prompts: list[Any] = [[], [[]], [1, -2], [999_999], ["a", [1]]]
    for wrong in prompts:
        refused = complete(served, prompt=wrong)
        assert refused.status_code == 400
        assert "constrained" not in refused.text


def test_lm_evaluation_harness_gets_the_scores_of_the_library(
    served: Served, store: str, tmp_path: Path
) -> None:
    completions = pytest.importorskip("lm_eval.models.openai_completions")
    pytest.importorskip("aiohttp")
    pytest.importorskip("tenacity")
    TOKENIZER.save_pretrained(tmp_path)
    lm = completions.LocalCompletionsAPI(
        base_url=f"{served.base}/v1/completions",
        model="tiny/email",
        tokenizer_backend="huggingface",
        tokenizer=str(tmp_path),
        batch_size=2,
        max_length=256,
    )
    texts = [("The sky is", " blue"), ("Two and", " two are four"), ("So it", " goes")]
    requests: Any = [Instance(*pair) for pair in texts]
    values = [value for value, _ in lm.loglikelihood(requests, disable_tqdm=True)]
    cp = ControlPrefix(frozen(MODEL, TOKENIZER), PrefixStore(store, tenant="mine"))
    examples = [Example(prompt=c, raw=True, completion=t, task="email") for c, t in texts]
    assert values == pytest.approx([s.log_likelihood for s in cp.score(examples)], abs=1e-3)
    cp.store.close()


def test_tokens_of_one_text_are_told_apart() -> None:
    names: Any = SimpleNamespace(text=lambda _: "a", in_text=lambda _: b"a")
    token = TokenLogProbs(5, -1.0, ((7, -0.5), (5, -1.0)))
    assert text_log_probs([token], names).top_logprobs == [{"a": -1.0, "token_id:7": -0.5}]
