"""ControlPrefix: what a request gives, alone, in any batch, streamed, and after a change."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from controlprefix import (
    Completion,
    ContextLengthError,
    ControlPrefix,
    ControlPrefixError,
    Example,
    GeometryMismatchError,
    Message,
    Prefix,
    PrefixFormatError,
    Request,
    RequestError,
    TrainingDataError,
    UnknownNameError,
    UnsupportedModelError,
)
from controlprefix.model.loading import _is_slow_on_cpu
from controlprefix.request_fields import RequestFields

from helpers import stocked
from models import ALL, build, byte_tokenizer


def mixed_requests() -> list[Request]:
    return [
        Request(prompt="Tell Sam.", task="email", user="ana", max_new_tokens=9),
        Request(prompt="Hi", max_new_tokens=5),
        Request(
            prompt="A longer prompt than the others.",
            task="email",
            attributes={"formality": {"formal": 0.7, "informal": 0.3}, "tone": "warm"},
            strengths={"tone": 2.0, "task": 0.5},
            temperature=1.3,
            top_k=40,
            seed=5,
            max_new_tokens=12,
        ),
        Request(prompt="Hi", user="bo", top_p=0.9, seed=6, repetition_penalty=1.3),
        Request(prompt="Hi", user="bo", temperature=2.0, min_p=0.01, seed=7, max_new_tokens=20),
        Request(prompt="Tell Sam.", user="bo", num_beams=3, max_new_tokens=6),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_a_request_gives_the_same_in_a_mixed_batch_as_alone(name: str) -> None:
    cp = stocked(
        ControlPrefix.from_pretrained(build(name), tokenizer=byte_tokenizer(), store="sqlite://")
    )
    requests = mixed_requests()
    together = cp.generate(requests)
    assert together == [cp.generate(request) for request in requests]
    assert together == cp.generate(requests, batch_size=2)
    assert len({c.text for c in together}) == len(together)


def test_settings_beside_a_prompt_are_those_of_a_request(cp: ControlPrefix) -> None:
    stocked(cp)
    fields: RequestFields = {"task": "email", "user": "ana", "max_new_tokens": 8}
    assert cp.generate("Hi", **fields) == cp.generate(Request(prompt="Hi", **fields))
    assert cp.generate(["Hi", "Ho"], **fields)[0] == cp.generate("Hi", **fields)
    with pytest.raises(RequestError, match="user: fields beside a Request"):
        cp.generate(Request(prompt="Hi"), user="ana")
    assert cp.generate([]) == []


@pytest.mark.slow
def test_a_completion_says_what_it_was_made_with(cp: ControlPrefix) -> None:
    stocked(cp)
    completion = cp.generate(
        "Hi", task="email", attributes={"tone": {"warm": 0.5}}, strengths={"tone": 3}, user="ana"
    )
    assert [(p.kind, p.name, p.version, p.strength) for p in completion.parts] == [
        ("task", "email", 1, 1.0),
        ("attribute", "tone=warm", 1, 1.5),
        ("user", "ana", 1, 1.0),
    ]
    assert completion.num_prompt_tokens == 2


def test_strength_zero_is_the_plain_model(cp: ControlPrefix) -> None:
    stocked(cp)
    plain = cp.generate("Hello", max_new_tokens=16)
    absent = cp.generate("Hello", max_new_tokens=16, user="ana", strengths={"user": 0})
    assert absent.text == plain.text
    assert cp.generate("Hello", max_new_tokens=16, user="ana").text != plain.text


def test_limits_and_stops_hold_for_each_row(cp: ControlPrefix) -> None:
    stocked(cp)
    long = cp.generate("Hello", user="ana", max_new_tokens=30)
    middle = long.text[4:6]
    requests = [
        Request(prompt="Hello", user="ana", max_new_tokens=30),
        Request(prompt="Hello", user="ana", max_new_tokens=3),
        Request(prompt="Hello", user="ana", max_new_tokens=30, stop=[middle]),
    ]
    whole, short, stopped = cp.generate(requests)
    assert whole == long
    assert short.num_tokens == 3
    assert short.finish_reason == "length"
    assert stopped.text == long.text[: long.text.find(middle)]
    assert stopped.finish_reason == "stop"
    assert "".join(cp.stream(requests[2])) == stopped.text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_a_stream_gives_the_text_of_generate(name: str) -> None:
    cp = stocked(
        ControlPrefix.from_pretrained(build(name), tokenizer=byte_tokenizer(), store="sqlite://")
    )
    for request in mixed_requests()[:5]:
        assert "".join(cp.stream(request)) == cp.generate(request).text
    with pytest.raises(RequestError, match="cannot be streamed"):
        next(cp.stream("Hi", num_beams=2))


def test_leaving_a_stream_early_ends_its_generation(cp: ControlPrefix) -> None:
    stocked(cp)
    before = threading.active_count()
    stream = cp.stream("Hello", user="ana", max_new_tokens=200, temperature=3.0, seed=1)
    next(stream)
    stream.close()
    assert threading.active_count() == before
    assert not any("controlprefix_place" in vars(m) for m in cp.model.modules())


@pytest.mark.slow
def test_streams_of_different_users_at_once_stay_apart(cp: ControlPrefix) -> None:
    stocked(cp)
    requests = [
        Request(prompt="Hello", user=user, max_new_tokens=20) for user in ("ana", "bo", None)
    ]
    alone = [cp.generate(request).text for request in requests]
    streams = [cp.stream(request) for request in requests]
    texts = ["", "", ""]
    live = set(range(3))
    while live:  # one piece of each in turn
        for i in sorted(live):
            piece = next(streams[i], None)
            if piece is None:
                live.discard(i)
            else:
                texts[i] += piece
    assert texts == alone

    results: dict[int, list[Completion]] = {}

    def work(i: int) -> None:
        results[i] = [cp.generate(requests[i]) for _ in range(4)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [{c.text for c in results[i]} for i in range(3)] == [{text} for text in alone]


def test_any_transformers_call_is_steered_inside_assembled(cp: ControlPrefix) -> None:
    stocked(cp)
    ids = torch.tensor([cp.tokenizer("Hello")["input_ids"]])
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 2}
    generate: Any = cp.model.generate
    with cp.assembled([Request(prompt="-", user="ana"), Request(prompt="-", user="bo")]) as batch:
        assert batch.num_rows == 2
        together = generate(torch.cat([ids, ids]), **options, num_beams=2)
    for i, user in enumerate(("ana", "bo")):
        with cp.assembled(Request(prompt="-", user=user)):
            alone = generate(ids, **options, num_beams=2)
        assert together[i, : alone.shape[1]].tolist() == alone[0].tolist()
    with cp.assembled(Request(prompt="-", user="ana")):
        greedy = generate(ids, **options)
    text = cp.generate("Hello", raw=True, user="ana", max_new_tokens=8).text
    assert cp.tokenizer.decode(greedy[0, ids.shape[1] :], skip_special_tokens=True) == text


def test_a_new_version_is_used_at_once_and_a_rollback_too(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/prefixes.db"
    model, tokenizer = build("llama"), byte_tokenizer()
    here, elsewhere = (
        ControlPrefix.from_pretrained(model, tokenizer=tokenizer, store=url) for _ in range(2)
    )

    def write() -> tuple[str, int]:
        completion = here.generate("Hello", user="ana", max_new_tokens=12)
        return completion.text, completion.parts[0].version

    for seed in (1, 2):
        prefix = Prefix.random(here.geometry, num_slots=4, scale=1.0, seed=seed)
        elsewhere.put("user", "ana", prefix)
        if seed == 1:
            first = write()
    second = write()
    assert (first[1], second[1]) == (1, 2)
    assert first[0] != second[0]
    elsewhere.rollback("user", "ana", to=1)
    assert write() == first
    assert elsewhere.forget_user("ana") == 2
    with pytest.raises(UnknownNameError):
        write()


def test_a_forgotten_and_enrolled_again_user_has_nothing_of_the_old(cp: ControlPrefix) -> None:
    """Version numbers begin again at 1, so a cached version 1 must not come back."""
    old, new = (Prefix.random(cp.geometry, num_slots=4, scale=1.0, seed=s) for s in (1, 2))
    other = ControlPrefix(cp.frozen_model, cp.store)
    cp.put("user", "ana", old)
    before = cp.generate("Hello", user="ana", max_new_tokens=12).text
    other.forget_user("ana")
    other.put("user", "ana", new)
    after = cp.generate("Hello", user="ana", max_new_tokens=12).text
    assert after != before
    assert after == other.generate("Hello", user="ana", max_new_tokens=12).text


def test_tenants_do_not_see_each_others_users(tmp_path: Path) -> None:
    url, model = f"sqlite:///{tmp_path}/prefixes.db", build("llama")
    own_store, other = (
        ControlPrefix.from_pretrained(model, tokenizer=byte_tokenizer(), store=url, tenant=t)
        for t in ("mine", "theirs")
    )
    own_store.put("user", "ana", Prefix.random(own_store.geometry, num_slots=2))
    with pytest.raises(UnknownNameError, match="no user 'ana'"):
        other.generate("Hello", user="ana")


def test_unknown_names_say_what_exists(cp: ControlPrefix) -> None:
    stocked(cp)
    for fields, message in (
        ({"task": "emial"}, "no task 'emial' in the store; known: email; did you mean 'email'?"),
        (
            {"user": "anna"},
            "no user 'anna' in the store; enroll or train the user, or check the store and the "
            "tenant",
        ),
        (
            {"attributes": {"formalty": "formal"}},
            "unknown attribute 'formalty'; known: formality, tone; did you mean 'formality'?",
        ),
        (
            {"attributes": {"formality": "fromal"}},
            "attribute 'formality' has no label 'fromal'; it has: formal, informal; "
            "did you mean 'formal'?",
        ),
    ):
        with pytest.raises(UnknownNameError) as caught:
            cp.generate(["fine", Request(prompt="Hi", **fields)])
        assert str(caught.value) == f"row 2: {message}"
        with pytest.raises(UnknownNameError) as caught:
            cp.generate("Hi", **fields)
        assert str(caught.value) == message


@pytest.mark.slow
def test_prefixes_of_other_models_are_refused(tmp_path: Path) -> None:
    url, tokenizer = f"sqlite:///{tmp_path}/prefixes.db", byte_tokenizer()
    item = ControlPrefix.from_pretrained(build("llama"), tokenizer=tokenizer, store=url)
    other_weights, other_shape = (
        ControlPrefix.from_pretrained(model, tokenizer=tokenizer, store=url)
        for model in (build("llama", seed=1), build("qwen3"))
    )
    prefix = Prefix.random(item.geometry, num_slots=2)
    item.put("user", "ana", prefix)
    with pytest.raises(GeometryMismatchError, match="was made for the weights"):
        other_weights.put("user", "ana", prefix)
    with pytest.raises(GeometryMismatchError, match="kv heads"):
        other_shape.put("user", "ana", prefix)
    with pytest.raises(UnknownNameError, match="has no prefix for this model, only for other"):
        other_weights.generate("Hi", user="ana")
    broken = Prefix.random(item.geometry, num_slots=2)
    broken.slots["decoder"][0, 0] = float("nan")
    with pytest.raises(PrefixFormatError, match="NaN"):
        item.put("user", "ana", broken)
    half = ControlPrefix.from_pretrained(
        build("llama", dtype=torch.float16), tokenizer=tokenizer, store=url
    )
    too_large = Prefix.random(half.geometry, num_slots=2, scale=1e9)
    with pytest.raises(PrefixFormatError, match="infinite values .* as torch.float16"):
        half.put("user", "ana", too_large)
    assert item.versions("user", "ana")[-1].version == 1


def test_a_prompt_that_does_not_fit_the_context_is_refused(cp: ControlPrefix) -> None:
    with pytest.raises(
        ContextLengthError, match="is 256 tokens, but the prompt has 300 and asks for 128 more"
    ):
        cp.generate("x" * 300)
    with pytest.raises(ContextLengthError, match="prompt has 200 and asks for 100 more"):
        cp.generate(["fine", "x" * 200], max_new_tokens=100)
    with pytest.raises(ContextLengthError, match="an example has"):
        cp.score([Example(prompt="x", completion="y" * 300)])
    assert cp.generate("x" * 246, max_new_tokens=10).num_prompt_tokens == 246


def test_what_is_no_request_or_text_is_refused(cp: ControlPrefix) -> None:
    not_requests: tuple[Any, ...] = (None, 3, [None], [{"prompt": "Hi"}])
    for not_request in not_requests:
        with pytest.raises(RequestError, match="expected a prompt .str. or a Request"):
            cp.generate(not_request)
    with pytest.raises(RequestError, match="expected a"), cp.assembled(3):  # type: ignore[arg-type]
        pass
    with pytest.raises(TrainingDataError, match="row 1: expected an Example or a dict"):
        cp.score([Request(prompt="Hi")])
    with pytest.raises(TrainingDataError, match="a text of user 'ana' must be a str, got int"):
        cp.enroll("ana", ["Hi", 3])
    with pytest.raises(RequestError, match="from an empty text"):
        cp.prefix_from_text(" ")
    with pytest.raises(ContextLengthError, match="the text has 300 tokens"):
        cp.prefix_from_text("x" * 300)
    assert len(cp.score(e for e in [Example(prompt="Hi", completion="you")])) == 1


def test_messages_need_a_chat_template_and_prompts_use_it() -> None:
    model = build("llama")
    plain = ControlPrefix.from_pretrained(model, tokenizer=byte_tokenizer(), store="sqlite://")
    chat = ControlPrefix.from_pretrained(
        model, tokenizer=byte_tokenizer(chat=True), store="sqlite://"
    )
    messages = (Message(role="user", content="Hi"),)
    with pytest.raises(RequestError, match="has no chat template"):
        plain.generate(Request(messages=messages))
    as_messages = chat.generate(Request(messages=messages, max_new_tokens=9))
    as_prompt = chat.generate("Hi", max_new_tokens=9)
    rendered = "<s>user: Hi</s><s>assistant: "
    as_raw = chat.generate(rendered, raw=True, max_new_tokens=9)
    assert as_messages == as_prompt == as_raw
    assert chat.generate("Hi", raw=True, max_new_tokens=9).num_prompt_tokens == 2


def test_what_is_no_language_model_is_refused() -> None:
    from transformers import BertConfig, BertModel

    bert = BertModel(
        BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
        )
    )
    with pytest.raises(UnsupportedModelError, match="BertModel does not generate text"):
        ControlPrefix.from_pretrained(bert, tokenizer=byte_tokenizer(), store="sqlite://")
    with pytest.raises(UnsupportedModelError, match="a folder or a PreTrainedModel, got int"):
        ControlPrefix.from_pretrained(3, store="sqlite://")  # type: ignore[arg-type]
    with pytest.raises(ControlPrefixError, match="cannot load a model from 'no/such-model'"):
        ControlPrefix.from_pretrained("no/such-model", store="sqlite://")
    with pytest.raises(ControlPrefixError, match="give tokenizer="):
        ControlPrefix.from_pretrained(build("llama"), store="sqlite://")


@pytest.mark.slow
def test_tokens_are_counted_to_the_stop_text_in_any_batch(cp: ControlPrefix) -> None:
    long = Request(prompt="abc", raw=True, max_new_tokens=40, repetition_penalty=1.5)
    text = cp.generate(long).text
    short = long.model_copy(update={"stop": (text[4:6],)})
    assert cp.generate([short, long])[0] == cp.generate(short)
    assert cp.generate(short).num_tokens < 40


def test_processors_without_torchs_operations_for_a_dtype_load_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())  # as on Apple's
    assert _is_slow_on_cpu(torch.bfloat16)
    assert _is_slow_on_cpu(torch.float16)
    assert not _is_slow_on_cpu(torch.float32)


@pytest.mark.parametrize(
    ("dtype", "is_slow", "expected"),
    [
        ("auto", True, torch.float32),
        ("auto", False, torch.bfloat16),
        (torch.bfloat16, True, torch.bfloat16),
    ],
)
def test_a_dtype_that_the_cpu_lacks_is_loaded_in_float32_unless_asked_for(
    dtype: torch.dtype | str,
    is_slow: bool,
    expected: torch.dtype,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    build("llama", dtype=torch.bfloat16).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr("controlprefix.model.loading._is_slow_on_cpu", lambda dtype: is_slow)
    cp = ControlPrefix.from_pretrained(tmp_path, store="sqlite://", dtype=dtype)
    assert {p.dtype for p in cp.model.parameters()} == {expected}
    exact = ControlPrefix.from_pretrained(tmp_path, store="sqlite://", dtype=torch.float32)
    assert cp.geometry.fingerprint == exact.geometry.fingerprint
