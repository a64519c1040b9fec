"""What the model reads: chat templates, special tokens, raw prompts."""

import threading
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from controlprefix import ControlPrefix, Example, Request
from controlprefix.errors import ContextLengthError, RequestError
from controlprefix.message import Message
from controlprefix.model.chat_template import without_thoughts
from controlprefix.model.tokenization import RequestTokenizer

from helpers import says
from models import (
    build,
    byte_tokenizer,
    chat_tokenizer,
)

THINKING = "<s>assistant: <think>\n"
WORDS = ["hi", " ", "<s>", "</s>", "[SEP]", "[CLS]"]


def engine(
    tokenizer: PreTrainedTokenizerFast, name: str = "llama", **options: Any
) -> ControlPrefix:
    return ControlPrefix.from_pretrained(
        build(name), tokenizer=tokenizer, store="sqlite://", **options
    )


def prompt_text(tokenizer: PreTrainedTokenizerFast, request: Request, **options: Any) -> str:
    """The prompt of a request as the model reads it, with special tokens."""
    cp = engine(tokenizer, **options)
    text = tokenizer.decode(list(cp.frozen_model.request_tokenizer.prompt_ids(request)))
    assert isinstance(text, str)
    return text


# --- chat templates --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code", ["{{ raise_exception('no system role') }}", "{{ 1 / 0 }}", "{{ messages[0].x.y }}"]
)
def test_a_template_that_refuses_messages_says_so_in_its_own_words(code: str) -> None:
    tokenizer = chat_tokenizer(
        lambda t: "{% if messages[0].role == 'system' %}" + code + "{% endif %}" + t
    )
    cp = engine(tokenizer)
    request = Request(messages=[Message(role="system", content="x")])
    expected = "no system role" if "raise" in code else "chat template"
    with pytest.raises(RequestError, match=expected):
        cp.generate(request)
    rows = [Example(prompt="hi", task="t", completion="b")] * 3
    bad = Example(messages=request.messages, task="t", completion="b")
    with pytest.raises(RequestError, match=f"row 4: .*{expected}"):
        cp.train([*rows, bad, *rows], num_slots=2, steps=1, progress=False)
    with pytest.raises(RequestError, match="row 2: "):
        cp.score([row.model_copy(update={"task": None}) for row in (rows[0], bad)])


def test_template_variables_of_a_request_come_on_top_of_those_of_the_model() -> None:
    tokenizer = chat_tokenizer(lambda t: t + "{{ mood }}{% if not think %}|closed{% endif %}")
    hi = Request(prompt="hi", chat_template_kwargs={"mood": "happy"})
    assert prompt_text(tokenizer, hi).endswith("assistant: happy|closed")
    defaults = {"mood": "calm", "think": True}
    assert prompt_text(tokenizer, hi, chat_template_kwargs=defaults).endswith("happy")
    plain = Request(prompt="hi")
    assert prompt_text(tokenizer, plain, chat_template_kwargs=defaults).endswith("calm")
    cp = engine(tokenizer)
    prompts = [
        cp.frozen_model.request_tokenizer.example_ids(Example(prompt="a", completion="b", **extra))
        for extra in ({}, {"chat_template_kwargs": {"think": True}})
    ]
    assert prompts[0] != prompts[1]


def test_templates_that_want_content_in_parts_keep_the_text() -> None:
    tokenizer = chat_tokenizer(
        lambda _: (
            "{% for m in messages %}{{ m.role }}:{% for p in m.content %}"
            "{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
        )
    )
    assert "user:SECRET" in prompt_text(tokenizer, Request(prompt="SECRET"))


def test_the_last_message_is_continued_when_asked() -> None:
    tokenizer = chat_tokenizer()
    assert prompt_text(tokenizer, says("q", "Dear")).endswith("</s><s>assistant: ")
    continued = says("q", "Dear", continue_final_message=True)
    assert prompt_text(tokenizer, continued).endswith("<s>assistant: Dear")
    with pytest.raises(RequestError, match="continue_final_message"):
        says("q", continue_final_message=True)


@pytest.mark.parametrize("tag", ["<think>", "<reasoning>", "[THINK]"])
def test_learned_text_never_lands_in_open_thoughts(tag: str) -> None:
    tokenizer = chat_tokenizer(lambda t: t.replace("<s>assistant: ", f"<s>assistant: {tag}\n"))
    assert prompt_text(tokenizer, Request(prompt="q")).rstrip().endswith(tag)
    closing = tag[0] + "/" + tag[1:]
    answer = Example(prompt="q", completion="Dear Sam")
    assert prompt_text(tokenizer, answer).endswith(f"{tag}\n\n{closing}\n\n")
    with_thoughts = Example(prompt="q", completion=f"Hm. {closing} Dear Sam")
    assert prompt_text(tokenizer, with_thoughts).rstrip().endswith(tag)


def test_thoughts_that_a_template_leaves_out_do_not_count() -> None:
    """A conversation is refused before all of it is tokenized, but not for what is not read."""
    reader = RequestTokenizer(build("llama"), chat_tokenizer())
    thoughts = f"<think>{'hm ' * 2000}</think>"
    request = says("q", f"{thoughts}answer", "next")
    reader._require_short(request, 64)
    for texts in (("q", "hm " * 2000, "next"), ("q", "answer", thoughts)):  # users' are read
        with pytest.raises(ContextLengthError, match="the first 512 characters"):
            reader._require_short(says(*texts), 64)
    assert without_thoughts("<think>" * 200_000) == "<think>" * 200_000  # in linear time
    assert without_thoughts("a[THINK]b</think>c[/THINK]d<think>e</think>") == "ad"


def test_a_teacher_writes_no_thoughts(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = chat_tokenizer(lambda t: t.replace("<s>assistant: ", THINKING))
    cp = engine(tokenizer)
    prompts: list[str] = []
    generate = ControlPrefix.generate

    def noting(self: ControlPrefix, requests: Any, **options: Any) -> Any:
        prompts.extend(str(tokenizer.decode(list(row.prompt_ids))) for row in requests)
        return generate(self, requests, **options)

    monkeypatch.setattr(ControlPrefix, "generate", noting)
    options: dict[str, Any] = {"steps": 1, "num_slots": 2, "validation": 0, "progress": False}
    cp.distill("Be brief.", ["q"], task="t", max_new_tokens=4, **options)
    assert [prompt.endswith("<think>\n\n</think>\n\n") for prompt in prompts] == [True]


# --- special tokens --------------------------------------------------------------------------


def test_a_raw_prompt_has_one_start_token_and_keeps_its_end() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    reader = RequestTokenizer(build("llama"), tokenizer)

    def ids(text: str) -> list[int]:
        return list(reader.prompt_ids(Request(prompt=text, raw=True)))

    assert ids("hi")[0] == 0
    assert ids("<s>hi") == ids("hi")
    assert ids("hi</s>") == [*ids("hi"), 1]
    assert ids("a</s><s>b")[:1] == [0]
    assert ids("a</s><s>b").count(0) == 2
    encoder = RequestTokenizer(build("bart"), tokenizer)
    assert encoder.prompt_ids(Request(prompt="hi</s>", raw=True)) == (*ids("hi"), 1)


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "padding"])
def test_a_request_cannot_set_options_of_the_tokenizer(name: str) -> None:
    cp = engine(chat_tokenizer())
    with pytest.raises(RequestError, match=f"cannot have '{name}'"):
        cp.generate(says("hi", chat_template_kwargs={name: "x"}))


@pytest.mark.parametrize(
    ("code", "roles"),
    [
        ("{% if messages[0].role != 'system' %}{{raise_exception('no')}}{% endif %}", "system"),
        ("{% if not language %}{{raise_exception('no')}}{% endif %}", "user"),
    ],
)
def test_a_template_of_parts_that_is_particular_keeps_the_text(code: str, roles: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = code + (
        "{% for m in messages %}{{m.role}}:{% for p in m.content %}{% if p['type'] == 'text' %}"
        "{{p['text']}}{% endif %}{% endfor %};{% endfor %}"
    )
    messages = [{"role": roles, "content": "first"}, {"role": "user", "content": "hello"}]
    request = Request(messages=messages, chat_template_kwargs={"language": "en"})
    assert prompt_text(tokenizer, request) == f"{roles}:first;user:hello;"


def test_a_template_that_changes_letters_gets_text_not_parts() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{m.role}}: {{m.content|capitalize}}{% endfor %}"
    )
    assert prompt_text(tokenizer, says("tell sam")) == "user: Tell sam"
    tokenizer.chat_template = "{% for m in messages %}{{m.content|upper}}{% endfor %}"
    assert prompt_text(tokenizer, says("a</s>b")) == "A</s>B"


def test_a_template_that_renders_nothing_is_told() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% if false %}{% endif %}"
    cp = engine(tokenizer)
    for work in (cp.generate, lambda request: list(cp.stream(request))):
        with pytest.raises(RequestError, match="renders nothing"):
            work(says("hi"))
    with pytest.raises(RequestError, match="renders nothing"):
        cp.score([Example(prompt="a", completion="b")])


@pytest.mark.slow
def test_tokenizers_that_ship_truncation_and_padding_read_everything_in_threads() -> None:
    tokenizer = chat_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(8)
    tokenizer.backend_tokenizer.enable_padding(length=8)
    reader = RequestTokenizer(build("llama", max_position_embeddings=4096), tokenizer)
    failures: list[object] = []

    def read(seed: int) -> None:
        try:
            for i in range(40):
                text = "ab</s>"[: 2 + 4 * (i % 2)] * (1 + (seed * 40 + i) % 60)
                ids = reader.prompt_ids(says(text))
                if tokenizer.decode(list(ids)) != f"<s>user: {text}</s><s>assistant: ":
                    failures.append(ids)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=read, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
