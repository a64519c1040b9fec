"""The server: OpenAI's own client unmodified, tenants apart, honest refusals, nothing lost."""

import contextlib
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
import torch

from controlprefix.evaluation import AttributeClassifier

from servers import MESSAGES, TOKENIZER, Served, expected


@pytest.mark.slow
def test_template_variables_and_continued_messages_reach_the_prompt(served: Served) -> None:
    answer = {"role": "assistant", "content": "Dear"}
    bodies: list[dict[str, Any]] = [
        {"messages": MESSAGES},
        {"messages": MESSAGES, "chat_template_kwargs": {"add_generation_prompt": False}},
        {"messages": [*MESSAGES, answer]},
        {"messages": [*MESSAGES, answer], "continue_final_message": True},
    ]
    lengths = []
    for body in bodies:
        url = f"{served.base}/v1/chat/completions"
        response = httpx.post(url, json={"model": "tiny", "max_tokens": 2, **body})
        assert response.status_code == 200, response.text
        lengths.append(response.json()["usage"]["prompt_tokens"])
    opening = len(TOKENIZER("<s>assistant: ")["input_ids"])
    assert lengths[0] - lengths[1] == opening
    assert lengths[2] - lengths[3] == opening + 1  # and the end of the message
    refused = httpx.post(
        f"{served.base}/v1/chat/completions",
        json={"model": "tiny", "messages": MESSAGES, "continue_final_message": True},
    )
    assert refused.status_code == 400


@pytest.mark.slow
def test_the_openai_client_gets_what_generate_gives(served: Served, store: str) -> None:
    client = served.client()
    outcome = client.chat.completions.create(
        model="tiny/email",
        messages=MESSAGES,
        user="ana",
        max_tokens=16,
        temperature=0,
        extra_body={"attributes": {"tone": "warm"}, "strengths": {"user": 0.5}},
    )
    text = expected(
        store, prompt="Tell Sam.", task="email", user="ana", max_new_tokens=16,
        attributes={"tone": "warm"}, strengths={"user": 0.5},
    )  # fmt: skip
    assert outcome.choices[0].message.content == text
    assert outcome.model == "tiny/email"
    assert outcome.usage is not None
    assert outcome.usage.completion_tokens <= 16
    plain = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=16, temperature=0
    )
    assert plain.choices[0].message.content != text
    stream = client.chat.completions.create(
        model="tiny/email", messages=MESSAGES, user="ana", max_tokens=16, temperature=0,
        stream=True, stream_options={"include_usage": True},
        extra_body={"attributes": {"tone": "warm"}, "strengths": {"user": 0.5}},
    )  # fmt: skip
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert chunks[-1].usage == outcome.usage
    assert {c.choices[0].finish_reason for c in chunks if c.choices} >= {
        outcome.choices[0].finish_reason
    }


def test_an_answer_says_what_stood_in_for_a_label(served: Served) -> None:
    request: dict[str, Any] = {
        "model": "tiny", "prompt": "abc", "max_tokens": 4, "temperature": 0, "n": 2,
        "extra_body": {"attributes": {"tone": "odd"}, "unseen": "text"},
    }  # fmt: skip
    ask = served.client().completions.create
    text = ask(**request).model_dump()["stand_ins"]
    assert [item["used"] for item in text] == [{"The tone is odd.": 1.0}]
    chunks = [chunk.model_dump() for chunk in ask(stream=True, **request)]
    assert [item for chunk in chunks for item in chunk.get("stand_ins", ())] == text * 2
    request["extra_body"] = {**request["extra_body"], "unseen": "distill"}
    with pytest.raises(openai.BadRequestError, match="trains a prefix"):
        ask(**request)


def test_sampling_is_seeded_and_n_gives_different_choices(served: Served) -> None:
    ask = served.client().completions.create
    how: dict[str, Any] = {"model": "tiny", "prompt": "abc", "max_tokens": 12, "seed": 5}
    first, again = (ask(n=3, **how) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in again.choices]
    assert len(set(texts)) == 3
    assert ask(**how).choices[0].text == texts[0]
    two = ask(model="tiny", prompt=["abc", "defg"], max_tokens=4, temperature=0)
    assert len(two.choices) == 2
    assert two.usage is not None
    assert two.usage.prompt_tokens == 7


def test_log_probabilities_stop_texts_and_limits(served: Served) -> None:
    client = served.client()
    result = client.completions.create(
        model="tiny", prompt="abc", max_tokens=5, temperature=0, logprobs=2
    ).choices[0]
    assert result.logprobs is not None
    assert result.logprobs.token_logprobs is not None
    assert len(result.logprobs.token_logprobs) <= 5
    assert all(
        token_logprob is not None and token_logprob <= 0
        for token_logprob in result.logprobs.token_logprobs
    )
    chat = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=3, temperature=0, logprobs=True, top_logprobs=4
    ).choices[0]
    assert chat.logprobs is not None
    assert chat.logprobs.content is not None
    assert all(len(token_logprob.top_logprobs) == 4 for token_logprob in chat.logprobs.content)
    whole = client.completions.create(model="tiny", prompt="abc", max_tokens=20, temperature=0)
    text = whole.choices[0].text
    cut = client.completions.create(
        model="tiny", prompt="abc", max_tokens=20, temperature=0, stop=text[3:5]
    )
    assert cut.choices[0].text == text[: text.index(text[3:5])]
    assert cut.choices[0].finish_reason == "stop"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"model": "gpt-4"}, 404, "no model 'gpt-4' here; there is 'tiny'"),
        ({"model": "tiny/emial"}, 404, "no task 'emial' in the store; known: email"),
        ({"user": "eve"}, 404, "no user 'eve'"),
        ({"extra_body": {"attributes": {"tone": "wram"}}}, 404, "did you mean 'warm'"),
        ({"max_tokens": 10**6}, 400, "this server generates 2048 at most"),
        ({"n": 10**9}, 400, "n: "),
        ({"extra_body": {"attributes": {"tone": {"warm": 1e200}}}}, 400, "up to 1e+06"),
        ({"stop": "a" * 1000}, 400, "of up to 256 characters"),
        ({"user": "ana", "extra_body": {"schedules": {"user": [[0, 1], [10**400, 0]]}}}, 400, ""),
        ({"n": 100}, 400, "100 choices; this server gives 16 at most"),
        ({"temperature": 9}, 400, "temperature"),
        ({"tools": [{"type": "function", "function": {"name": "x"}}]}, 400, "tools is not supp"),
        ({"presence_penalty": 3.0}, 400, "presence_penalty"),
        ({"messages": []}, 400, "messages"),
        ({"extra_body": {"strengths": {"mood": 1}}}, 400, "strengths names 'mood'"),
        ({"messages": [{"role": "user", "content": "x" * 9999}]}, 400, "maximum context length is"),
    ],
)
def test_mistakes_are_told_in_openais_form(
    served: Served, change: dict[str, Any], status: int, message: str
) -> None:
    fields: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 4, **change}
    for stream in (False, True):
        with pytest.raises(openai.APIStatusError) as caught:
            served.client().chat.completions.create(stream=stream, **fields)
        assert caught.value.status_code == status
        assert message in str(caught.value.body["message"])  # type: ignore[index]


@pytest.mark.slow
def test_malformed_and_oversized_bodies_are_refused(served: Served) -> None:
    post = f"{served.base}/v1/chat/completions"
    for body in (b"{", b"[]", b"null", b"\xff\xfe", b'{"model": 1}'):
        answer = httpx.post(post, content=body)
        assert answer.status_code == 400, body
        assert answer.json()["error"]["type"] == "invalid_request_error"
    big = httpx.post(post, content=b'{"x": "' + b"a" * (2 << 20) + b'"}')
    assert big.status_code == 413

    def endless() -> Iterator[bytes]:
        for _ in range(64):
            yield b"a" * (1 << 17)

    metrics = httpx.get(f"{served.base}/metrics").text
    assert re.search(r'controlprefix_requests_total\{path="[^"]*",status="413"\} [1-9]', metrics)
    with contextlib.suppress(httpx.WriteError):  # if it hangs up on us, that is as good
        assert httpx.post(post, content=endless()).status_code == 413
    assert httpx.get(f"{served.base}/health").json() == {"status": "ok"}


@pytest.mark.slow
def test_users_are_enrolled_seen_and_forgotten(served: Served) -> None:
    at = f"{served.base}/v1/users/zoe"
    assert httpx.put(at, json={"texts": ["hi, zoe here", "zoe again"]}).json() == {
        "user": "zoe",
        "version": 1,
    }
    assert httpx.get(at).json()["versions"][0]["current"] is True
    client = served.client()
    client.chat.completions.create(model="tiny", messages=MESSAGES, user="zoe", max_tokens=2)
    assert httpx.delete(at).json() == {"name": "zoe", "num_versions": 1}
    assert httpx.get(at).status_code == 404
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="tiny", messages=MESSAGES, user="zoe", max_tokens=2)
    assert httpx.put(at, json={"texts": []}).status_code == 400
    assert httpx.put(at, json={"texts": [" "]}).status_code == 400
    assert httpx.put(at, json={"texts": ["x"], "x": 1}).status_code == 400
    assert "tone" in httpx.get(f"{served.base}/v1/attributes").json()["attributes"]


@pytest.mark.slow
def test_models_metrics_and_the_openapi_page(served: Served) -> None:
    assert {item.id for item in served.client().models.list()} == {"tiny", "tiny/email"}
    assert served.client().models.retrieve("tiny/email").id == "tiny/email"
    assert httpx.get(f"{served.base}/ready").status_code == 200
    served.client().completions.create(model="tiny", prompt="x", max_tokens=3)
    metrics = httpx.get(f"{served.base}/metrics").text
    assert 'controlprefix_requests_total{path="/v1/completions",status="200"}' in metrics
    assert "controlprefix_completion_tokens_total" in metrics
    assert "/v1/users/{user}" in httpx.get(f"{served.base}/openapi.json").json()["paths"]
    assert httpx.get(f"{served.base}/docs").status_code == 200
    assert httpx.get(f"{served.base}/nowhere").status_code == 404


@pytest.mark.slow
def test_texts_are_classified(store: str) -> None:
    classifier = AttributeClassifier(
        "tone", ("cold", "warm"), torch.zeros(384, 2), torch.tensor([0.0, 1.0]), 1.0, 0.0
    )
    classifying = Served(store, open_tenant="mine", classifiers=[classifier])
    try:
        result = httpx.post(
            f"{classifying.base}/v1/classify", json={"texts": ["hi", ""]}, timeout=60
        ).json()
        assert [sum(item["tone"].values()) for item in result["results"]] == pytest.approx([1, 1])
        assert result["results"][0]["tone"]["warm"] > 0.7
        assert httpx.post(f"{classifying.base}/v1/classify", json={"texts": []}).status_code == 400
        lone = b'{"texts": ["\\ud800"]}'
        assert httpx.post(f"{classifying.base}/v1/classify", content=lone).status_code == 400
    finally:
        classifying.close()


@pytest.mark.slow
def test_many_clients_at_once_get_what_each_gets_alone(served: Served) -> None:
    def ask(i: int) -> str:
        parts: dict[str, Any] = {"user": "ana"} if i % 2 else {}
        outcome = served.client().completions.create(
            model="tiny/email" if i % 3 else "tiny",
            prompt="y" * (1 + i % 7),
            max_tokens=8 + i % 9,
            seed=i,
            **parts,
        )
        return outcome.choices[0].text

    alone = [ask(i) for i in range(24)]
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, range(24))) == alone
