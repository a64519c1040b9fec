"""Scores: log-likelihoods under prefixes, alone and beside other threads."""

import threading

import pytest
import torch

from controlprefix import (
    ControlPrefix,
    Example,
)

from helpers import stocked
from models import ALL, build, byte_tokenizer


@pytest.mark.parametrize("name", ALL)
def test_score_is_the_sum_of_token_log_probabilities(name: str) -> None:
    cp = stocked(
        ControlPrefix.from_pretrained(build(name), tokenizer=byte_tokenizer(), store="sqlite://")
    )
    examples = [
        Example(prompt="Hi there", completion="yes"),
        Example(prompt="Hi", completion="a longer answer", user="bo"),
        Example(prompt="", raw=True, completion="text", task="email"),
    ]
    for example, score in zip(examples, cp.score(examples), strict=True):
        prompt = cp.tokenizer(example.prompt)["input_ids"] or [0]
        completion = cp.tokenizer(example.completion)["input_ids"]
        with torch.no_grad(), cp.assembled(example):
            if cp.model.config.is_encoder_decoder:
                if example.prompt == "":
                    prompt = [2]
                start = [cp.model.config.decoder_start_token_id]
                logits = cp.model(
                    input_ids=torch.tensor([prompt]),
                    decoder_input_ids=torch.tensor([start + completion[:-1]]),
                ).logits[0]
            else:
                logits = cp.model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 :]
        log_probs = logits.double().log_softmax(-1)
        expected = sum(float(log_probs[i, token]) for i, token in enumerate(completion))
        assert score.log_likelihood == pytest.approx(expected, rel=1e-4)
        assert score.num_tokens == len(completion)


@pytest.mark.slow
def test_scores_are_the_same_while_other_threads_use_the_model(cp: ControlPrefix) -> None:
    """Each pass chooses the positions whose logits it needs; another's choice must not meet it."""
    stocked(cp)
    texts = ["yes", "a longer answer", "no, never"]
    batches = [[Example(prompt="Hi", completion=t, user="ana")] * n for n, t in enumerate(texts, 1)]
    alone = [cp.score(batch) for batch in batches]
    text = cp.generate("Hi", task="email", max_new_tokens=12).text
    result: dict[int, list[object]] = {i: [] for i in range(4)}

    def work(i: int) -> None:
        for _ in range(8):
            if i < 3:
                result[i].append(cp.score(batches[i]))
            else:
                result[i].append(cp.generate("Hi", task="email", max_new_tokens=12).text)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [result[i] for i in range(3)] == [[scores] * 8 for scores in alone]
    assert result[3] == [text] * 8
