"""Tokenizers and models as they are shipped: their pad, start, end and forced tokens."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from controlprefix import ControlPrefix, Example, Request
from controlprefix.errors import ContextLengthError, RequestError
from controlprefix.model.languages import decoder_start_ids

from helpers import engine
from models import VOCAB, build, byte_tokenizer

MODEL = build("llama")


def test_a_pad_id_outside_the_vocabulary_is_not_used() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    while len(tokenizer) <= VOCAB:
        tokenizer.add_tokens([f"<extra {len(tokenizer)}>"])
    tokenizer.pad_token = f"<extra {len(tokenizer) - 1}>"
    cp = engine(tokenizer=tokenizer)
    prompts = [Request(prompt=text, raw=True, max_new_tokens=3) for text in ("a", "abcdef")]
    assert [c.text for c in cp.generate(prompts)] == [cp.generate(p).text for p in prompts]
    with pytest.raises(RequestError, match="token id .* embeddings"):
        cp.generate(tokenizer.pad_token, raw=True)


@pytest.mark.parametrize("without", ["bos_token", "eos_token", "pad_token"])
@pytest.mark.parametrize("name", ["llama", "bart"])
def test_tokenizers_without_some_special_token_work(name: str, without: str) -> None:
    tokenizer = byte_tokenizer()
    setattr(tokenizer, without, None)
    cp = engine(name, tokenizer=tokenizer)
    requests = [Request(prompt=text, raw=True, max_new_tokens=3) for text in ("a", "abcdef")]
    assert [c.text for c in cp.generate(requests)] == [cp.generate(r).text for r in requests]
    rows = [Example(prompt="a", task="t", completion="b")] * 4
    cp.train(rows, num_slots=2, steps=1, progress=False)
    cp.enroll("ana", ["some text of hers"])


@pytest.mark.parametrize("forced", [None, 7])
def test_generate_score_and_train_read_the_same_decoder_sequence(forced: int | None) -> None:
    model = build("bart")
    model.generation_config.forced_bos_token_id = forced
    cp = ControlPrefix.from_pretrained(model, tokenizer=byte_tokenizer(), store="sqlite://")
    prompt = torch.tensor([cp.frozen_model.request_tokenizer.prompt_ids(Request(prompt="q"))])
    generate: Any = model.generate
    expected = generate(prompt, max_new_tokens=6, do_sample=False)[0]
    assert (int(expected[1]) == forced) == (forced is not None)
    completion = cp.generate("q", max_new_tokens=6 - (forced is not None))
    first = 1 if forced is None else 2
    assert completion.text == cp.tokenizer.decode(expected[first:], skip_special_tokens=True)

    ids = cp.tokenizer("abc")["input_ids"]
    start = [0, *([] if forced is None else [forced])]
    with torch.no_grad():
        logits = model(input_ids=prompt, decoder_input_ids=torch.tensor([[*start, *ids]])).logits
    log_probs = logits.log_softmax(-1)[0, len(start) - 1 : -1]
    expected_score = log_probs.gather(1, torch.tensor(ids)[:, None]).sum().item()
    (score,) = cp.score([Example(prompt="q", completion="abc")])
    assert score.log_likelihood == pytest.approx(expected_score, abs=1e-4)


def test_a_start_token_is_taken_from_where_it_is_or_its_lack_is_said() -> None:
    model = build("bart")
    example = Example(prompt="a", completion="b")
    cp = ControlPrefix.from_pretrained(model, tokenizer=byte_tokenizer(), store="sqlite://")
    expected = cp.score([example])
    model.config.decoder_start_token_id = None
    model.generation_config.decoder_start_token_id = 0
    assert cp.score([example]) == expected
    model.generation_config.decoder_start_token_id = None
    model.generation_config.bos_token_id = model.config.bos_token_id = None
    with pytest.raises(TypeError, match="decoder_start_token_id"):
        cp.score([example])


def test_an_end_id_beyond_the_embeddings_is_not_used() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<x{i}>" for i in range(45)])
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    cp = engine(tokenizer=tokenizer)
    assert tokenizer.eos_token_id not in cp.frozen_model.request_tokenizer.end_ids
    rows = [Example(prompt="a", completion="b", task="t")] * 4
    cp.train(rows, num_slots=2, steps=1, validation=0, progress=False)
    assert cp.generate("a", task="t", max_new_tokens=2).num_tokens <= 2


@pytest.mark.slow
def test_what_is_forced_first_takes_its_position() -> None:
    model = build("bart")
    model.generation_config.forced_bos_token_id = 77
    cp = ControlPrefix.from_pretrained(model, tokenizer=byte_tokenizer(), store="sqlite://")
    limit = cp.frozen_model.request_tokenizer.context_length
    assert limit is not None
    options: dict[str, Any] = {"raw": True, "logit_bias": {1: -100.0}}
    assert cp.generate("hello", max_new_tokens=limit - 1, **options).num_tokens == limit - 1
    with pytest.raises(ContextLengthError):
        cp.generate("hello", max_new_tokens=limit, **options)


def test_a_bias_of_a_token_that_the_model_has_not_is_refused() -> None:
    cp = engine()
    with pytest.raises(RequestError, match="logit_bias has the token id 99999"):
        cp.generate("hi", raw=True, max_new_tokens=2, logit_bias={99999: 1.0})


def test_a_composite_model_starts_as_its_decoders_config_says() -> None:
    model: Any = build("bart")
    for source in (model.generation_config, model.config):
        source.decoder_start_token_id = source.bos_token_id = None
    model.config.decoder = SimpleNamespace(decoder_start_token_id=7)
    assert decoder_start_ids(model) == (7,)
