"""Images: read as the processor reads them, beside prefixes, and alone as in a batch."""

import base64
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest
import torch
from PIL import Image

from controlprefix import ControlPrefix, Example, Message, Request, RequestError, TrainingDataError
from controlprefix.data import as_examples
from controlprefix.inference.continuous_batching import ContinuousBatcher
from controlprefix.model.condensed_text import prefix_from_text
from controlprefix.model.images import ImagePrompt
from controlprefix.model.log_probs import token_log_probs
from controlprefix.prefixes import Part
from controlprefix.store import PrefixStore

from helpers import QUICK, engine, random_prefix
from image_models import NAMES, image_model, picture, png

if TYPE_CHECKING:
    from servers import Served

LIMIT: dict[str, Any] = {"max_new_tokens": 6}


def build(name: str) -> ControlPrefix:
    model, tokenizer, processor = image_model(name)
    cp = ControlPrefix.from_pretrained(
        model, tokenizer=tokenizer, processor=processor, store="sqlite://"
    )
    for seed, user in enumerate(("ana", "bo"), 1):
        cp.put("user", user, random_prefix(model, 3, seed))
    return cp


@pytest.fixture(scope="module", params=NAMES)
def cp(request: pytest.FixtureRequest) -> ControlPrefix:
    return build(request.param)


@pytest.fixture(scope="module")
def llava() -> ControlPrefix:
    return build("llava")


def mixed() -> list[Request]:
    return [
        Request(prompt="What is this?", images=[picture(0)], user="ana", **LIMIT),
        Request(prompt="Hello, how are you today?", user="bo", **LIMIT),
        Request(prompt="Compare.", images=[picture(1), picture(2, 30, 60)], user="bo", **LIMIT),
        Request(prompt="And this one?", images=[picture(0)], **LIMIT),
    ]


def scored() -> list[Example]:
    return [
        Example(**request.model_dump(exclude={"max_new_tokens"}), completion="a red square")
        for request in mixed()
    ]


@pytest.mark.parametrize("name", ["llava", "idefics3", "gemma3"])
def test_prompts_are_those_of_the_processor(name: str) -> None:
    model, tokenizer, processor = image_model(name)
    cp = ControlPrefix.from_pretrained(
        model, tokenizer=tokenizer, processor=processor, store="sqlite://"
    )
    images = [picture(1), picture(2)]
    parts = [*[{"type": "image"}] * 2, {"type": "text", "text": "Compare."}]
    messages: Any = [{"role": "user", "content": parts}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    expected = processor(text=text, images=images, return_tensors="pt", add_special_tokens=False)
    prompt = cp.frozen_model.request_tokenizer.prompt_ids(Request(prompt="Compare.", images=images))
    assert isinstance(prompt, ImagePrompt)
    assert list(prompt) == expected["input_ids"][0].tolist()
    # Idefics3 has images of a row along its second dimension; the model flattens both.
    assert torch.equal(
        prompt.features["pixel_values"].flatten(0, -4),
        expected["pixel_values"].flatten(0, -4),
    )
    # Without a prefix the model is the plain one.
    plain = model.generate(  # type: ignore[operator]
        **expected, max_new_tokens=6, do_sample=False
    )
    new = plain[0, len(prompt) :].tolist()
    completion = cp.generate(Request(prompt="Compare.", images=images, **LIMIT))
    assert completion.text == cp.frozen_model.request_tokenizer.decode(new)


def test_tokens_of_images_that_are_not_there_are_refused(llava: ControlPrefix) -> None:
    """One row's would be counted as another's image."""
    images = [picture(1)]
    tokenizer = llava.frozen_model.request_tokenizer
    own = tokenizer.prompt_ids(Request(prompt="x", raw=True, images=images))
    image = max(own, key=list(own).count)
    with pytest.raises(RequestError, match="tokens of images, and its images take"):
        llava.generate(Request(prompt="<image>\nDescribe it.", raw=True, images=images))
    for wrong in (
        Request(prompt="the <image> tag", raw=True),
        Request(prompt_ids=own),
        Request(prompt_ids=(5, image)),
    ):
        with pytest.raises(RequestError, match="has no image; give images"):
            llava.generate(wrong)
    # In a message it is text.
    assert llava.generate(Request(prompt="the <image> tag", **LIMIT)).num_tokens


@pytest.mark.slow
def test_rows_with_and_without_images_are_alone_in_a_batch(cp: ControlPrefix) -> None:
    requests, examples = mixed(), scored()
    together = [completion.text for completion in cp.generate(requests)]
    assert together == [cp.generate(request).text for request in requests]
    scores = [score.log_likelihood for score in cp.score(examples)]
    alone = [cp.score([example])[0].log_likelihood for example in examples]
    assert scores == pytest.approx(alone, abs=2e-3)
    without = [cp.score([e.model_copy(update={"images": ()})])[0].log_likelihood for e in examples]
    differs = [abs(a - b) > 0.01 for a, b in zip(alone, without, strict=True)]
    assert differs == [True, False, True, True]


@pytest.mark.slow
def test_a_stream_is_the_text_of_generate(cp: ControlPrefix) -> None:
    for request in mixed():
        assert "".join(cp.stream(request)) == cp.generate(request).text


@pytest.mark.slow
def test_a_running_batch_takes_images(cp: ControlPrefix) -> None:
    requests = mixed()
    expected = [cp.generate(request).text for request in requests]
    guided = requests[2].model_copy(update={"strengths": {"user": -0.5}})
    batcher = cp.batcher(max_sequences=5, max_prefill_tokens=8)
    assert isinstance(batcher, ContinuousBatcher)
    try:
        tickets = [batcher.submit(cp.resolve(request)) for request in [*requests, guided] * 2]
        expected += [cp.generate(guided).text]
        assert [ticket.result().text for ticket in tickets] == expected * 2
        recorded = batcher.submit(cp.resolve(requests[0]), top_log_probs=0)
        assert "".join(recorded) == expected[0]
        tokens = cp.frozen_model.request_tokenizer
        prompt = tokens.prompt_ids(requests[0])
        new = [entry.token for entry in recorded.tokens]
        with cp.assembled([requests[0]]):
            log_probs = token_log_probs(cp.frozen_model, [prompt], [new])[0]
        assert [t.log_prob for t in recorded.tokens] == pytest.approx(
            log_probs.flatten().tolist(), abs=1e-3
        )
        long = requests[0].model_copy(update={"max_new_tokens": 400})
        ticket = batcher.submit(cp.resolve(long))
        ticket.cancel()
        assert ticket.result().num_tokens < 400
    finally:
        assert batcher.close()


@pytest.mark.parametrize("name", ["llava", "idefics3"])
def test_the_prefix_of_a_text_is_the_text_before_the_image(name: str) -> None:
    cp = build(name)
    frozen = cp.frozen_model
    tokenizer = frozen.request_tokenizer
    prompt = tokenizer.prompt_ids(Request(prompt="What?", images=[picture(0)]))
    assert isinstance(prompt, ImagePrompt)
    text = tokenizer.text_ids("It is a dark night. ")
    whole = ImagePrompt.of((*text, *prompt), prompt)
    target = tokenizer.inner_ids("a red square")
    expected = token_log_probs(frozen, [whole], [target])[0]
    prefix = prefix_from_text(frozen, "It is a dark night. ")
    assert prefix.is_exact
    with frozen.attached(frozen.assemble([[Part(prefix)]])):
        steered = token_log_probs(frozen, [prompt], [target])[0]
    torch.testing.assert_close(steered, expected, atol=1e-3, rtol=0)


@pytest.mark.slow
def test_prefixes_are_trained_on_images(cp: ControlPrefix) -> None:
    before = {name: value.clone() for name, value in cp.model.state_dict().items()}
    rows = [
        Example(prompt="What is this?", images=[picture(i)], completion=text, task="caption")
        for i, text in enumerate(["one", "two", "one", "two"])
    ]
    report = cp.train(rows, **{**QUICK, "steps": 40})
    assert report.losses[-1] < report.losses[0]
    assert all(torch.equal(value, before[name]) for name, value in cp.model.state_dict().items())
    likelihood = sum(score.log_likelihood for score in cp.score(rows))
    num_tokens = sum(score.num_tokens for score in cp.score(rows))
    assert -likelihood / num_tokens < report.losses[0]


@pytest.mark.slow
def test_other_images_are_other_training_data(llava: ControlPrefix) -> None:
    hashes = set()
    for seed in (0, 0, 1):
        rows = [
            Example(prompt="What?", images=[picture(seed + i)], completion="one", task="t")
            for i in range(2)
        ]
        hashes.add(llava.train(rows, **QUICK).data_hash)
    assert len(hashes) == 2


def test_images_of_messages_are_in_their_order(llava: ControlPrefix) -> None:
    tokenizer = llava.frozen_model.request_tokenizer
    first, second, third = (png(picture(i)) for i in range(3))
    messages = [
        Message(role="user", content="One", images=(first,)),
        Message(role="assistant", content="Yes"),
        Message(role="user", content="Two", images=(third,)),
    ]
    prompt = tokenizer.prompt_ids(Request(messages=messages, images=[second]))
    one_by_one = [
        tokenizer.prompt_ids(Request(prompt="x", images=[image])).features["pixel_values"]  # type: ignore[attr-defined]
        for image in (first, second, third)
    ]
    assert isinstance(prompt, ImagePrompt)
    assert torch.equal(prompt.features["pixel_values"], torch.cat(one_by_one))
    image_token = llava.tokenizer.convert_tokens_to_ids("<image>")
    raw = tokenizer.prompt_ids(Request(prompt="Look.", images=[first], raw=True))
    assert raw[:6] == (*[image_token] * 4, *tokenizer.inner_ids("\nL"))


def test_a_typed_placeholder_is_text(llava: ControlPrefix) -> None:
    tokenizer = llava.frozen_model.request_tokenizer
    prompt = tokenizer.prompt_ids(Request(prompt="What is <image>?", images=[picture(0)]))
    assert isinstance(prompt, ImagePrompt)
    assert prompt.count(llava.tokenizer.convert_tokens_to_ids("<image>")) == 4
    assert "What is <image>?" in llava.tokenizer.decode(list(prompt))


def test_images_come_from_paths_bytes_and_uris(llava: ControlPrefix, tmp_path: Path) -> None:
    content = png(picture(0))
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    uri = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    forms: list[Any] = [content, path, str(path), uri, {"bytes": content, "path": None}]
    assert {Request(prompt="x", images=[form]).images for form in forms} == {(content,)}
    rows = tmp_path / "rows.jsonl"
    row = {"prompt": "What?", "images": [str(path)], "completion": "a square"}
    rows.write_text(json.dumps(row))
    (example,) = as_examples(rows)
    assert example.images == (content,)
    assert llava.score([example])[0].num_tokens == 8


def test_feedback_on_images_is_kept(llava: ControlPrefix) -> None:
    row = {"prompt": "What?", "images": [picture(0)], "chosen": "one", "rejected": "two"}
    llava.keep_feedback([{**row, "user": "ana"}])
    (preference,) = llava.feedback("ana")
    assert preference.images == (png(picture(0)),)


@pytest.mark.slow
def test_mistakes_are_clear_errors(llava: ControlPrefix, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="reads no images"):
        engine("llama").generate(Request(prompt="What?", images=[picture(0)]))
    with pytest.raises(RequestError, match="decoder-only models"):
        engine("bart").generate(Request(prompt="What?", raw=True, images=[picture(0)]))
    with pytest.raises(RequestError, match="image 1 cannot be read"):
        llava.generate(Request(prompt="What?", images=[b"no image"]))
    for wrong, words in (
        ("https://example.com/a.png", "not downloaded"),
        (str(tmp_path / "none.png"), "No such file"),
        ("data:text/plain,hello", "data:image"),
        ("data:image/png;base64,*", "not base64"),
        (5, "not int"),
    ):
        with pytest.raises(RequestError, match=words):
            Request(prompt="x", images=[wrong])
    with pytest.raises(RequestError, match="prompt_ids"):
        Request(prompt_ids=[1], images=[picture(0)])
    with pytest.raises(RequestError, match="last message, and there is none"):
        Request(messages=[Message(role="system", content="x")], images=[picture(0)])
    with pytest.raises(RequestError, match="64"):
        Request(prompt="x", images=[b"x"] * 65)
    with pytest.raises(TrainingDataError, match="No such file"):
        Example(prompt="x", images=["none.png"], completion="y")
    with pytest.raises(RequestError, match="prompt log-probabilities"):
        llava.prompt_log_probs([Request(prompt="x", images=[picture(0)])])
    huge = png(Image.new("L", (20_000, 6_000)))
    with pytest.raises(RequestError, match="pixels in all; with image 1|cannot be read"):
        llava.generate(Request(prompt="x", images=[huge]))
    large = png(Image.new("1", (9_000, 6_000)))  # two together are too large
    with pytest.raises(RequestError, match="with image 2 they have 108,000,000"):
        llava.generate(Request(prompt="x", images=[large, large]))
    llava.frozen_model.tokenizer.chat_template, template = (
        "{% for m in messages %}{{ m.content[-1].text }}{% endfor %}",
        llava.frozen_model.tokenizer.chat_template,
    )
    try:
        with pytest.raises(RequestError, match="0 of 1 images"):
            llava.generate(Request(prompt="x", images=[picture(0)]))
    finally:
        llava.frozen_model.tokenizer.chat_template = template


def test_the_processor_is_that_of_the_loaded_model(
    llava: ControlPrefix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, Any]] = []

    def record(source: str, **options: Any) -> Any:
        calls.append((source, options))
        raise OSError("none there")

    monkeypatch.setattr("controlprefix.model.loading.AutoProcessor.from_pretrained", record)
    llava.model.save_pretrained(tmp_path / "m")
    llava.frozen_model.tokenizer.save_pretrained(tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    cp = ControlPrefix.from_pretrained("m", store="sqlite://", trust_remote_code=True)
    monkeypatch.chdir("/")
    with pytest.raises(RequestError, match="none there"):
        cp.generate(Request(prompt="x", images=[picture(0)]))
    assert calls == [(str(tmp_path / "m"), {"trust_remote_code": True})]


@pytest.mark.slow
def test_the_server_takes_images_of_the_request_alone(tmp_path: Path) -> None:
    from servers import Served  # needs packages that are not installed where vLLM is tested

    built = build("llava")
    url = f"sqlite:///{tmp_path}/prefixes.db"
    cp = ControlPrefix(built.frozen_model, PrefixStore(url))
    cp.put("user", "ana", random_prefix(built.model, 3))
    path = tmp_path / "picture.png"
    path.write_bytes(png(picture(0)))
    uri = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    expected = cp.generate(Request(prompt="What?", images=[path], user="ana", **LIMIT)).text
    served = Served(url, built.frozen_model, open_tenant="default")
    try:

        def ask(image: str, stream: bool = False) -> Any:
            parts = [
                {"type": "text", "text": "What?"},
                {"type": "image_url", "image_url": {"url": image}},
            ]
            messages: Any = [{"role": "user", "content": parts}]
            return served.client().chat.completions.create(
                model="tiny",
                messages=messages,
                extra_body={"user": "ana"},
                max_tokens=6,
                temperature=0,
                stream=stream,
            )

        assert ask(uri).choices[0].message.content == expected
        chunks = [chunk.choices[0].delta.content or "" for chunk in ask(uri, stream=True)]
        assert "".join(chunks) == expected
        for elsewhere in ("https://example.com/a.png", str(path), path.as_uri()):
            with pytest.raises(openai.BadRequestError, match="part of the request"):
                ask(elsewhere)
        parts = [{"type": "input_image", "image_url": uri}, {"type": "input_text", "text": "What?"}]
        answer = served.client().responses.create(
            model="tiny",
            input=[{"role": "user", "content": parts}],  # type: ignore[list-item,misc]
            extra_body={"user": "ana"},
            max_output_tokens=6,
            temperature=0,
        )
        assert answer.output_text == expected
    finally:
        served.close()
        cp.store.close()


def test_a_server_of_texts_refuses_images(served: "Served") -> None:
    uri = f"data:image/png;base64,{base64.b64encode(png(picture(0))).decode()}"
    parts = [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": uri}}]
    body = {"model": "tiny", "messages": [{"role": "user", "content": parts}]}
    response = httpx.post(f"{served.base}/v1/chat/completions", json=body, timeout=60)
    assert response.status_code == 400
    assert "reads no images" in response.json()["error"]["message"]


@pytest.mark.slow
def test_no_client_makes_a_server_read_a_file(served: "Served", tmp_path: Path) -> None:
    path = tmp_path / "secret.png"
    path.write_bytes(png(picture(0)))
    message = {"role": "user", "content": "x", "images": [str(path)]}
    part = {"type": "image_url", "image_url": {"url": str(path)}}
    answers = [
        httpx.post(f"{served.base}/v1/{route}", json=body, timeout=60)
        for route, body in (
            ("feedback", {"user": "bob", "messages": [message], "chosen": "a", "rejected": "b"}),
            ("chat/completions", {"model": "tiny", "messages": [message], "images": [str(path)]}),
            ("chat/completions", {"model": "tiny", "messages": [{**message, "content": [part]}]}),
            ("completions", {"model": "tiny", "prompt": "x", "images": [str(path)]}),
            ("responses", {"model": "tiny", "input": [{"role": "user", "content": [part]}]}),
        )
    ]
    assert [answer.status_code for answer in answers] == [201, 400, 400, 400, 400]
    with PrefixStore(served.url, tenant="mine") as store:
        (feedback,) = store.feedback("bob")  # the field is not one of a message over HTTP
    assert "images" not in feedback
