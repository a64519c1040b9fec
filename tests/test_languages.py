"""Languages of multilingual encoder-decoders: per request, the same in every engine."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MBartTokenizer, NllbTokenizer

from controlprefix import ControlPrefix, Example, Prefix, Request, RequestError, TrainingDataError
from controlprefix.model.languages import Languages
from controlprefix.training.context_fit import cut_example_ids

from helpers import QUICK, engine, letters_reward
from models import build

_CHARACTERS = "abcdefghijklmnopqrstuvwxyz"


def nllb_tokenizer(**settings: Any) -> NllbTokenizer:
    """NLLB's own tokenizer with its 200 languages, over letters."""
    control = ["<s>", "<pad>", "</s>", "<unk>", "▁", *_CHARACTERS]
    tokenizer = NllbTokenizer(vocab={t: i for i, t in enumerate(control)}, merges=[], **settings)
    assert len(tokenizer) < 300
    return tokenizer


def multilingual(name: str) -> ControlPrefix:
    tokenizer = nllb_tokenizer()
    changes = {
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "decoder_start_token_id": tokenizer.eos_token_id,
    }
    cp = ControlPrefix.from_pretrained(
        build(name, **changes), tokenizer=tokenizer, store="sqlite://"
    )
    letters = {tokenizer.convert_tokens_to_ids(letter) for letter in _CHARACTERS}
    others = [i for i in range(300) if i not in letters]  # so that texts are not empty
    cp.model.generation_config.suppress_tokens = others
    cp.put("user", "ana", Prefix.random(cp.geometry, num_slots=3, scale=0.5, seed=1))
    return cp


REQUESTS = [
    Request(prompt="the sea", target_language="fra_Latn"),
    Request(prompt="the sea", target_language="deu_Latn"),
    Request(prompt="a very long sea", source_language="ita_Latn", target_language="fra_Latn"),
    Request(prompt="the sea"),
    Request(prompt="ships", source_language="ita_Latn"),
    Request(prompt="ships", target_language="deu_Latn", user="ana"),
]
REQUESTS = [request.model_copy(update={"max_new_tokens": 6}) for request in REQUESTS]


def test_a_completion_that_is_cut_leaves_room_for_the_language() -> None:
    cp = multilingual("m2m_100")
    tokenizer = cp.frozen_model.request_tokenizer
    example = Example(prompt="the sea", completion="the sea " * 200, target_language="fra_Latn")
    ids = cut_example_ids(example, tokenizer)
    assert not ids.is_whole
    assert tokenizer.has_room(ids.prompt, len(ids.completion))
    assert not tokenizer.has_room(ids.prompt, len(ids.completion) + 1)


@pytest.mark.parametrize("name", ["bart", "m2m_100"])
def test_generation_is_that_of_transformers_with_the_same_languages(name: str) -> None:
    cp = multilingual(name)
    model: Any = cp.model
    for request in REQUESTS[:5]:
        tokenizer = nllb_tokenizer(src_lang=request.source_language or "eng_Latn")
        start = [tokenizer.eos_token_id]
        if request.target_language:
            start.append(tokenizer.convert_tokens_to_ids(request.target_language))
        with torch.no_grad():
            expected = model.generate(
                **tokenizer(str(request.prompt), return_tensors="pt"),
                decoder_input_ids=torch.tensor([start]),
                max_new_tokens=6,
                do_sample=False,
                num_beams=1,
                forced_eos_token_id=None,
            )
        text = tokenizer.decode(expected[0], skip_special_tokens=True)
        assert cp.generate(request).text == text


@pytest.mark.parametrize("name", ["bart", "m2m_100"])
def test_rows_of_several_languages_are_those_that_each_is_alone(name: str) -> None:
    cp = multilingual(name)
    alone = [cp.generate(request).text for request in REQUESTS]
    assert len(set(alone)) >= 3
    assert [completion.text for completion in cp.generate(REQUESTS)] == alone
    assert ["".join(cp.stream(request)) for request in REQUESTS] == alone
    batcher = cp.batcher()
    try:
        tickets = [batcher.submit(cp.resolve(request)) for request in REQUESTS]
        assert [ticket.result().text for ticket in tickets] == alone
    finally:
        batcher.close()


@pytest.mark.parametrize("name", ["bart", "m2m_100"])
def test_scores_follow_the_start_of_each_rows_decoder(name: str) -> None:
    cp = multilingual(name)
    model: Any = cp.model
    examples = [
        Example(**request.model_dump(exclude_unset=True), completion="mer" * (1 + i % 3))
        for i, request in enumerate(REQUESTS[:5])
    ]
    scores = cp.score(examples)
    for example, score in zip(examples, scores, strict=True):
        tokenizer = nllb_tokenizer(src_lang=example.source_language or "eng_Latn")
        targets = tokenizer(example.completion, add_special_tokens=False)["input_ids"]
        start = [tokenizer.eos_token_id]
        if example.target_language:
            start.append(tokenizer.convert_tokens_to_ids(example.target_language))
        with torch.no_grad():
            logits = model(
                **tokenizer(str(example.prompt), return_tensors="pt"),
                decoder_input_ids=torch.tensor([[*start, *targets[:-1]]]),
            ).logits[0, len(start) - 1 :]
        own = logits.log_softmax(-1).gather(1, torch.tensor(targets)[:, None])
        assert score.log_likelihood == pytest.approx(float(own.sum()), abs=1e-3)


@pytest.mark.slow
def test_training_takes_rows_of_several_languages() -> None:
    cp = multilingual("bart")
    examples = [
        Example(
            prompt="sea",
            target_language=language,
            completion={"fra_Latn": "mer", "deu_Latn": "meer", None: "sea"}[language],
            task="translate",
        )
        for language in ("fra_Latn", "deu_Latn", None)
        for _ in range(2)
    ]
    before = sum(
        score.log_likelihood
        for score in cp.score([e.model_copy(update={"task": None}) for e in examples])
    )
    cp.train(examples, **{**QUICK, "steps": 30, "validation": 0})
    after = sum(score.log_likelihood for score in cp.score(examples))
    assert after > before + 5
    cp.reinforce(
        [
            Request(prompt="sea", target_language=x, task="translate", max_new_tokens=4)
            for x in ("fra_Latn", None)
        ],
        reward=letters_reward,
        steps=2,
        batch_size=2,
        progress=False,
    )


def test_source_tokens_are_those_of_a_tokenizer_set_to_that_language() -> None:
    cp = multilingual("bart")
    tokenizer = cp.frozen_model.request_tokenizer
    for language in ("ita_Latn", "zho_Hans"):
        request = Request(prompt="sea", source_language=language)
        own = nllb_tokenizer(src_lang=language)
        inner = tokenizer.inner_ids("sea")
        assert tokenizer.prompt_ids(request) == (
            own.convert_tokens_to_ids(language),
            *inner,
            own.eos_token_id,
        )


@pytest.mark.slow
def test_languages_that_there_are_not() -> None:
    cp = multilingual("bart")
    with pytest.raises(RequestError, match="no language 'french'.*ace_Arab"):
        cp.generate(Request(prompt="sea", target_language="french"))
    with pytest.raises(RequestError, match="no language '</s>'"):
        cp.generate(Request(prompt="sea", source_language="</s>"))
    with pytest.raises(RequestError, match="no token of 'eng_Latn'"):
        cp.generate(Request(prompt_ids=[5, 6], source_language="fra_Latn"))
    with pytest.raises(RequestError, match="tokenizer has no languages"):
        engine("bart").generate(Request(prompt="sea", target_language="fra_Latn"))
    with pytest.raises(RequestError, match="for encoder-decoders"):
        engine().generate(Request(prompt="sea", target_language="fra_Latn"))


def test_the_first_mbart_starts_with_the_language_itself() -> None:
    control = ("<s>", "<pad>", "</s>", "<unk>", "▁", *_CHARACTERS)
    tokenizer = MBartTokenizer(vocab=[(token, -1.0) for token in control])
    languages = Languages(tokenizer)
    romanian, german = languages.id_of("ro_RO"), languages.id_of("de_DE")
    assert languages.start_ids(0, "de_DE") == (german,)
    assert languages.start_ids(romanian, "ro_RO") == (romanian,)
    others = Languages(nllb_tokenizer())
    french = others.id_of("fra_Latn")
    assert others.start_ids(2, "fra_Latn") == (2, french)
    assert others.start_ids(others.id_of("deu_Latn"), "fra_Latn") == (french,)


def test_another_target_language_is_another_run(tmp_path: Path) -> None:
    cp = multilingual("m2m_100")
    rows = [Example(prompt="the sea", completion=text, task="t") for text in ("ab", "cd", "ef")]
    cp.train(rows, folder=tmp_path, **QUICK)
    targeted = [row.model_copy(update={"target_language": "fra_Latn"}) for row in rows]
    with pytest.raises(TrainingDataError, match="other examples"):
        cp.train(targeted, folder=tmp_path, resume=True, **QUICK)
