"""Prefixes made from texts: exact where they can be, and it is said where not."""

import pytest
import torch

from controlprefix import (
    ControlPrefix,
    ControlPrefixError,
    Request,
)
from controlprefix.model.steering import Steering
from controlprefix.model.text_prefix import prefix_from_tokens

from helpers import engine, frozen
from models import ALL, build, byte_tokenizer


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox"])
def test_a_prefix_from_a_text_equals_prompting_with_it(name: str) -> None:
    cp = ControlPrefix.from_pretrained(build(name), tokenizer=byte_tokenizer(), store="sqlite://")
    text, then = "Write like a pirate.", "Hello there"
    prefix = cp.prefix_from_text(text)
    ids = [cp.tokenizer(part)["input_ids"] for part in (text, then)]
    cp.put("user", "pirate", prefix)
    with torch.no_grad():
        expected = cp.model(torch.tensor([ids[0] + ids[1]])).logits[0, len(ids[0]) :]
        with cp.assembled(Request(prompt="-", user="pirate")):
            steered = cp.model(torch.tensor([ids[1]])).logits[0]
    assert prefix.num_slots == len(ids[0])
    assert torch.allclose(steered, expected, atol=1e-4)
    assert cp.prefix_from_text(text, max_slots=4).num_slots == 4
    assert prefix.is_exact


@pytest.mark.parametrize("name", ["gpt2", "ministral3", "bart", "t5"])
def test_a_prefix_from_a_text_says_where_it_is_not_exact(name: str) -> None:
    cp = ControlPrefix.from_pretrained(build(name), tokenizer=byte_tokenizer(), store="sqlite://")
    assert cp.prefix_from_text("Write like a pirate.").is_exact is False


def test_a_text_is_read_from_zero_where_negative_positions_are_nonsense() -> None:
    """Ministral 3 scales queries by the logarithm of their position."""
    for attention in ("sdpa", "eager"):
        model = build("ministral3", attention=attention)
        prefix = prefix_from_tokens(frozen(model), [5, 6, 7])
        with torch.no_grad(), Steering.for_model(model).recorded() as calls:
            model(torch.tensor([[5, 6, 7]]))
        assert torch.allclose(prefix.layer("decoder", 2)[1], calls[2].value[0], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_enrolling_makes_a_usable_prefix_at_once(name: str) -> None:
    cp = ControlPrefix.from_pretrained(build(name), tokenizer=byte_tokenizer(), store="sqlite://")
    assert cp.enroll("ana", ["I write like this.", "And like that."]) == 1
    assert cp.enroll("ana", ["Another text."], num_slots=5) == 2
    assert cp.get("user", "ana", version=2).num_slots == 5
    assert cp.enroll("ana", "One text.") == 3
    text = [version.details["enrolled"]["texts"] for version in cp.versions("user", "ana")]
    assert text == [2, 1, 1]
    plain = cp.generate("Hello", max_new_tokens=12)
    assert cp.generate("Hello", user="ana", max_new_tokens=12).text != plain.text
    with pytest.raises(ControlPrefixError, match="there is no text of user 'bo'"):
        cp.enroll("bo", ["  "])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_text_may_fill_the_context(name: str) -> None:
    cp = engine(name)
    context = cp.frozen_model.request_tokenizer.context_length
    assert context is not None
    text = "abcdefgh" * context
    ids = cp.frozen_model.request_tokenizer.text_ids(text)
    text = text[: context - (len(ids) - len(text))]
    prefix = cp.prefix_from_text(text)
    assert prefix.num_slots == context
    assert prefix.is_exact is (name == "llama")
