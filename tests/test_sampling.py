"""Sampling of a batch: the distribution, each row's own settings and seed, penalties."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from controlprefix import ControlPrefix, Request, RequestError
from controlprefix.inference import drawing
from controlprefix.inference.drawing import DrawSettings, device_for, draw
from controlprefix.inference.generation_config import batch_config, own_prompt_processors
from controlprefix.inference.sampling import BatchSampler, RowSampling, SampledRow

from models import VOCAB, build, byte_tokenizer

CPU = torch.device("cpu")
SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.7},
    {"temperature": 1.5},
    {"top_k": 5},
    {"top_p": 0.8},
    {"top_p": 0.999, "temperature": 3.0},
    {"min_p": 0.2},
    {"temperature": 1.3, "top_k": 300, "top_p": 0.9, "min_p": 0.01},
    {"top_k": 1},
]


def request(**fields: Any) -> Request:
    return Request(prompt="-", **fields)


def rows_of(*settings: dict[str, Any]) -> list[SampledRow]:
    return [SampledRow(request(**fields)) for fields in settings]


def expected_probabilities(logits: Tensor, fields: dict[str, Any]) -> Tensor:
    """By transformers' own processors, in float64."""
    warpers = LogitsProcessorList()
    if "temperature" in fields:
        warpers.append(TemperatureLogitsWarper(fields["temperature"]))
    if "top_k" in fields:
        warpers.append(TopKLogitsWarper(fields["top_k"]))
    if "top_p" in fields:
        warpers.append(TopPLogitsWarper(fields["top_p"]))
    if "min_p" in fields:
        warpers.append(MinPLogitsWarper(fields["min_p"]))
    ids: Any = torch.zeros(1, 1, dtype=torch.long)
    scores: Any = logits[None].double()
    return warpers(ids, scores)[0].softmax(-1)


@pytest.mark.slow
@pytest.mark.parametrize("fields", SETTINGS, ids=str)
@pytest.mark.parametrize("size", [40, 1000])
def test_draws_have_the_distribution_of_transformers(fields: dict[str, Any], size: int) -> None:
    """A chi-square test of 50,000 draws; the seed is fixed, so it either always passes or never."""
    logits = torch.randn(size, generator=torch.Generator().manual_seed(size)) * 2
    expected = expected_probabilities(logits, fields)
    sampler = BatchSampler(rows_of(*({**fields, "seed": i} for i in range(500))), CPU)
    counts = torch.zeros(size)
    for _ in range(100):
        counts += sampler(logits.repeat(500, 1)).bincount(minlength=size)
    assert not counts[expected == 0].any()
    likely = expected * counts.sum() >= 5
    observed = [*counts[likely].tolist(), float(counts[~likely].sum())]
    number = [*(expected[likely] * counts.sum()).tolist(), float(expected[~likely].sum()) * 50_000]
    if number[-1] == 0:
        observed, number = observed[:-1], number[:-1]
    if len(observed) == 1:
        return  # only one token is possible
    assert chisquare(observed, number, sum_check=False).pvalue > 1e-4


@pytest.mark.slow
@settings(max_examples=60)
@given(st.data())
def test_a_row_draws_the_same_in_any_batch(data: st.DataObject) -> None:
    size = data.draw(st.sampled_from([3, 50, 257, 700]))
    scale = data.draw(st.sampled_from([0.1, 1.0, 20.0]))
    fields = [{**data.draw(st.sampled_from([{}, *SETTINGS])), "seed": i} for i in range(5)]
    extra: list[dict[str, Any]] = [
        {"repetition_penalty": 1.7},
        {"presence_penalty": 1.0, "frequency_penalty": -0.5},
        {"logit_bias": {0: 3.0, 2: -100.0}},
    ]
    fields = [{**f, **data.draw(st.sampled_from([{}, *extra]))} for f in fields]
    steps = torch.randn(4, 5, size, generator=torch.Generator().manual_seed(size)) * scale
    together = BatchSampler(rows_of(*fields), CPU)
    tokens = torch.stack([together(step.clone()) for step in steps], 1)
    for i, own in enumerate(fields):
        alone = BatchSampler(rows_of(own), CPU)
        assert tokens[i].tolist() == [int(alone(step[i : i + 1].clone())) for step in steps]


def test_apple_gpus_which_have_no_float64_draw_on_the_cpu() -> None:
    assert device_for(torch.device("mps")) == CPU
    assert device_for(torch.device("cuda", 1)) == torch.device("cuda", 1)


def test_few_tokens_kept_or_all_of_them_draw_alike() -> None:
    """Whether the most likely tokens are enough does not change what is drawn."""
    logits = torch.randn(64, 5000)
    for fields in ({"top_k": 100}, {"top_k": 200}, {"top_p": 1.0, "top_k": 5000}):
        rows = rows_of(*({**fields, "seed": i} for i in range(64)))
        tokens = BatchSampler(rows, CPU)(logits.clone())
        ranks = (logits > logits.gather(1, tokens[:, None])).sum(1)
        assert int(ranks.max()) < fields["top_k"]
        assert int(ranks.max()) > fields["top_k"] / 4


@pytest.mark.parametrize(
    "fields",
    [
        {"top_p": 0.9},
        {"top_p": 0.999, "temperature": 2.0},
        {"top_k": 3000, "top_p": 0.95},
        {"top_k": 5999},
        {"min_p": 1e-4, "temperature": 1.5},
    ],
)
def test_draws_are_those_of_a_complete_sort(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether 128 tokens are enough, or 2,048, or none but all."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.cat([torch.randn(16, 6000, generator=generator) * s for s in (0.2, 1.5, 6.0)])
    uniform = torch.rand(len(logits), generator=generator, dtype=torch.float64)
    settings = DrawSettings.of([request(**fields)] * len(logits), CPU)
    tokens = draw(logits, logits.amax(1), settings, uniform)
    monkeypatch.setattr(drawing, "_NUM_CANDIDATES", 6000)
    assert torch.equal(tokens, draw(logits, logits.amax(1), settings, uniform))
    ranks = (logits > logits.gather(1, tokens[:, None])).sum(1)
    assert int(ranks.max()) > 2048


@pytest.mark.parametrize(
    "fields", [{}, {"temperature": 1.0}, {"top_p": 0.9}, {"min_p": 0.1, "temperature": 50.0}]
)
def test_extreme_logits_choose_a_possible_token(fields: dict[str, Any]) -> None:
    ruled_out = torch.full((1, 300), -math.inf)
    ruled_out[0, 299] = -5.0
    assert int(BatchSampler(rows_of(fields), CPU)(ruled_out.clone())) == 299
    certain = torch.zeros(1, 300)
    certain[0, 7] = math.inf
    assert int(BatchSampler(rows_of(fields), CPU)(certain)) == 7
    huge = torch.zeros(1, 300)
    huge[0, 8] = 3e38
    assert int(BatchSampler(rows_of(fields), CPU)(huge)) == 8
    not_numbers = torch.full((1, 300), math.nan)
    assert 0 <= int(BatchSampler(rows_of(fields), CPU)(not_numbers)) < 300


def test_repetition_penalty_is_that_of_transformers() -> None:
    ids: Any = torch.tensor([[7, 5, 7, 3]])
    penalize: Any = RepetitionPenaltyLogitsProcessor(1.8)
    positive, negative = torch.zeros(1, 50), torch.full((1, 50), -9.0)
    positive[0, [7, 5, 3, 9]] = torch.tensor([3.0, 2.9, 2.8, 2.0])
    negative[0, [7, 5, 3, 9]] = torch.tensor([-3.0, -3.1, -3.2, -4.0])
    for logits in (positive, negative):
        expected = penalize(ids, logits.clone()).argmax(1)
        assert (int(logits.argmax()), int(expected)) == (7, 9)  # the penalty decides
        for num_new in (0, 2, 4):
            prompt, new = ids[0, : 4 - num_new].tolist(), ids[0, 4 - num_new :].tolist()
            row = SampledRow(request(repetition_penalty=1.8), prompt, new)
            assert BatchSampler([row], CPU)(logits.clone()).tolist() == expected.tolist()


def test_penalties_count_what_was_generated() -> None:
    """As OpenAI's API defines them: the prompt does not count for these two."""
    row = SampledRow(request(presence_penalty=1.0, frequency_penalty=0.5), prompt=[2])
    sampler = BatchSampler([row], CPU)
    logits = torch.tensor([[0.0, 2.0, 1.9]])
    tokens = [int(sampler(logits.clone())) for _ in range(5)]
    # token 1 at 2.0, 0.5, 0.0 ...; token 2 at 1.9, 0.4, -0.1 ...; token 0 at 0
    assert tokens == [1, 2, 1, 2, 0]
    again = SampledRow(request(presence_penalty=1.0, frequency_penalty=0.5), [2], tokens[:3])
    assert int(BatchSampler([again], CPU)(logits.clone())) == tokens[3]


@pytest.mark.parametrize("prompt", [[], [9, 8], [1, 0, 9], [2, 2, 2]])
def test_penalties_beside_rows_of_other_lengths_are_those_of_a_plain_sum(prompt: list[int]) -> None:
    """Also where a row has no token yet that it could write."""
    fields = {"repetition_penalty": 1.5, "presence_penalty": 0.4, "frequency_penalty": 0.3}
    row, other = (
        SampledRow(request(**fields), own) for own in (prompt, [2, 1, 2, 1, 0, 2, 1, 1, 0])
    )
    sampler = BatchSampler([other, row], CPU)
    new: list[int] = []
    for _ in range(12):
        logits = torch.tensor([2.0, 1.7, -0.5])
        expected = logits.clone()
        for token in range(3):
            if token in (*prompt, *new):
                expected[token] *= 1.5 if logits[token] < 0 else 1 / 1.5
            expected[token] -= 0.4 * (token in new) + 0.3 * new.count(token)
        new.append(int(sampler(logits.repeat(2, 1))[1]))
        assert new[-1] == int(expected.argmax())
    assert set(new) == {0, 1, 2}


def test_a_bias_is_added_and_ids_beyond_the_vocabulary_are_ignored() -> None:
    sampler = BatchSampler(rows_of({"logit_bias": {1: 5.0, 2: 100.0, 99: 100.0}}, {}), CPU)
    assert sampler(torch.tensor([[2.0, 0.0], [2.0, 0.0]])).tolist() == [1, 0]


def test_processors_of_a_row_see_its_own_tokens() -> None:
    calls: list[list[int]] = []

    def process(ids: Any, scores: Any) -> Tensor:
        calls.append(ids[0].tolist())
        result: Tensor = -scores
        return result

    new: list[int] = []
    row = SampledRow(request(), [4, 5], new, [process])
    sampler = BatchSampler([None, row], CPU)
    assert sampler(torch.tensor([[0.0, 1.0], [0.0, 1.0]])).tolist() == [1, 0]
    new.append(0)
    sampler(torch.zeros(2, 2))
    assert calls == [[4, 5], [4, 5, 0]]


def test_inside_generate_the_choice_is_the_only_possible_token() -> None:
    processor: LogitsProcessor = RowSampling(rows_of({"logit_bias": {1: 9.0}}), CPU)
    ids: Any = torch.zeros(3, 1, dtype=torch.long)
    scores: Any = torch.zeros(3, 4)
    result = processor(ids, scores)
    assert result[0].tolist() == [-math.inf, 0.0, -math.inf, -math.inf]
    assert result[1:].tolist() == torch.zeros(2, 4).tolist()


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1.0},
        {"top_p": 0.9},
        {"presence_penalty": 2.0},
        {"frequency_penalty": 2.0, "temperature": 0.9},
        {"logit_bias": {7: 4.0}},
        {"repetition_penalty": 1.5},
    ],
    ids=str,
)
def test_one_seed_gives_one_text_in_every_engine(cp: ControlPrefix, fields: dict[str, Any]) -> None:
    single = Request(prompt="hello", raw=True, max_new_tokens=20, seed=3, **fields)
    other = Request(prompt="a", raw=True, max_new_tokens=20, temperature=2.0)
    text = cp.generate([single])[0].text
    assert text != cp.generate("hello", raw=True, max_new_tokens=20).text
    assert cp.generate([other, single])[1].text == text
    assert "".join(cp.stream(single)) == text
    batcher = cp.batcher()
    tickets = [batcher.submit(cp.resolve(r)) for r in (other, single, other)]
    assert tickets[1].result().text == text
    batcher.close()


def test_the_repetition_penalty_of_beams_does_not_see_paddings() -> None:
    cp = ControlPrefix.from_pretrained(
        build("llama"), tokenizer=byte_tokenizer(), store="sqlite://"
    )
    config = batch_config(cp.frozen_model, [request(num_beams=2, repetition_penalty=5.0)] * 2)
    assert config.repetition_penalty == 5.0
    rows = [[3, 4, 5], [0, 0, 6]]
    prompts = [rows[0], rows[1][2:]]
    (penalty,) = own_prompt_processors(cp.frozen_model, config, prompts, [0, 2], 3)
    assert config.repetition_penalty is None
    vocab_size = cp.model.config.vocab_size
    scores = penalty(torch.tensor(rows), torch.ones(2, vocab_size))
    penalized = [torch.nonzero(row < 1).flatten().tolist() for row in scores]
    assert penalized == [[3, 4, 5], [6]]


def test_beams_refuse_what_they_cannot_apply() -> None:
    for fields in ({"presence_penalty": 1.0}, {"logit_bias": {1: 1.0}}, {"frequency_penalty": 1.0}):
        with pytest.raises(RequestError, match="num_beams above 1 cannot be combined with"):
            request(num_beams=2, **fields)
    with pytest.raises(RequestError, match="presence_penalty"):
        request(presence_penalty=3.0)
    with pytest.raises(RequestError, match="logit_bias"):
        request(logit_bias={-1: 3.0})


def test_tokens_of_the_prompt_that_cannot_be_written_are_not_penalized() -> None:
    model = build("llama", vocab_size=VOCAB + 8, tie_word_embeddings=False)
    head: Any = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight[:VOCAB].clone(), requires_grad=False)
    cp = ControlPrefix.from_pretrained(model, tokenizer=byte_tokenizer(), store="sqlite://")
    texts = cp.generate(
        [
            Request(prompt_ids=ids, repetition_penalty=1.2, max_new_tokens=4)
            for ids in ((70, 80, VOCAB + 4), (70, 80))
        ]
    )
    assert all(text.num_tokens for text in texts)
