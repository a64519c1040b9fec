"""What is measured of a trained method."""

import random
import re
import statistics
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from controlprefix._io import requires_extra
from controlprefix.data import parse_table
from controlprefix.data.general import general_prompts
from controlprefix.errors import ContextLengthError
from controlprefix.evaluation.classifier import AttributeClassifier
from controlprefix.evaluation.comparison import adapter_training
from controlprefix.evaluation.comparison.costs import now
from controlprefix.evaluation.comparison.methods import (
    NUM_ADAPTATIONS,
    ComparisonSetup,
    Method,
    prompt_text,
)
from controlprefix.evaluation.metrics import distinct_n, spaced, words_of
from controlprefix.evaluation.simplification import sari
from controlprefix.evaluation.slot_errors import slot_errors
from controlprefix.example import Example
from controlprefix.labels import weighted_labels
from controlprefix.model.log_probs import kl_divergences
from controlprefix.model.tokenization import TokenizedExample
from controlprefix.training.held_out import prompt_identity
from controlprefix.training.settings import TooLong

TEMPERATURE = 0.8
_BATCH_SIZE = 16
_NUM_SPEED_TOKENS = 16
_NUM_PLAIN_TEXTS = 16
_PLAIN_TOKENS = 32
_BLEU_WORDS = 4  # of the longest n-grams that it counts
_REWRITTEN = 0.5  # of the references' words, that their prompt has
_ROUGE = {"ROUGE-1": "rouge1", "ROUGE-2": "rouge2", "ROUGE-L": "rougeL"}
_RANK_SHARE = 0.9  # of the sum of the singular values

Figures = dict[str, float]


class Elsewhere(NamedTuple):
    """Rows of no task, to see what a method does to other work.

    Attributes:
        written: Texts that the plain model wrote from nothing.
        answers: The plain model's answers to general prompts, or to prompts of another task.
        general: Texts that people wrote, or none.
    """

    written: Sequence[Example]
    answers: Sequence[Example]
    general: Sequence[Example]


def elsewhere(
    setup: ComparisonSetup,
    general: Sequence[Example],
    other_prompts: Sequence[str] | None,
    too_long: TooLong,
) -> Elsewhere:
    """Let the plain model write the texts that divergences are measured on.

    Raises:
        ContextLengthError: If one of the other prompts has no room for an answer, and is refused.
    """
    tokenizer = setup.frozen.request_tokenizer
    starts = [Example(prompt="", raw=True, completion="-")] * _NUM_PLAIN_TEXTS
    prompts = [
        Example(prompt=prompt, completion="-")
        for prompt in (other_prompts or general_prompts(measuring=True))[:_NUM_PLAIN_TEXTS]
    ]
    long = [
        row for row in prompts if not tokenizer.has_room(tokenizer.prompt_ids(row), _PLAIN_TOKENS)
    ]
    if long and too_long == "refuse":
        raise ContextLengthError(
            f"{long[0].prompt!r:.80}, one of other_prompts, leaves no room for an answer of "
            f"{_PLAIN_TOKENS} tokens; shorten it, or give too_long='skip'"
        )
    prompts = [row for row in prompts if row not in long]

    def completed(rows: Sequence[Example], temperature: float | None) -> list[Example]:
        texts = adapter_training.sample(
            setup.frozen.model,
            setup.frozen,
            [tokenizer.prompt_ids(row) for row in rows],
            max_new_tokens=_PLAIN_TOKENS,
            seed=0,
            temperature=temperature,
        )
        return [
            row.model_copy(update={"completion": text})
            for row, text in zip(rows, texts, strict=True)
            if text.strip()
        ]

    return Elsewhere(completed(starts, 1.0), completed(prompts, None), general)


def nats_per_token(method: Method, rows: Sequence[Example]) -> float:
    """Negative log-likelihood of the rows' completions, without end tokens."""
    scored = nats_of_rows(method, rows)
    return sum(nats for nats, _ in scored) / max(1, sum(count for _, count in scored))


def nats_of_rows(method: Method, rows: Sequence[Example]) -> list[tuple[float, int]]:
    """Per row, the negative log-likelihood of its completion and the number of its tokens."""
    tokenizer = method.setup.frozen.request_tokenizer
    places = {id(row): i for i, row in enumerate(rows)}
    scored = [(0.0, 0)] * len(rows)
    for batch in _batches(method, rows):
        with method.applied(batch) as model:
            tokens = [method.tokenized(row) for row in batch]
            nats = adapter_training.nll_of_rows(model, tokens, tokenizer)
        for row, value, example in zip(batch, nats, tokens, strict=True):
            scored[places[id(row)]] = value, len(example.completion)
    return scored


def in_context(setup: ComparisonSetup, texts: Sequence[Example]) -> list[Example]:
    """Texts with the task and labels of training rows, so that an adaptation is on."""
    contexts = list(setup.training)
    random.Random(0).shuffle(contexts)  # rows may be sorted by label
    return [
        contexts[i % len(contexts)].model_copy(
            update={
                "prompt": text.prompt,
                "messages": text.messages,
                "raw": text.raw,
                "completion": text.completion,
            }
        )
        for i, text in enumerate(texts)
    ]


def divergence(method: Method, texts: Sequence[Example], *, off: bool = False) -> float | None:
    """Mean KL divergence (nats per token) of the adapted model from the plain one.

    Each text is read with the prefixes or the adapter of a training row.

    Args:
        method: A trained method.
        texts: Prompts and completions.
        off: Compare the adapted model with its adaptation switched off.

    Returns:
        The divergence; None where the adaptation cannot be switched off, or no text has a token.

    Reference:
        The measure R⁻ of "Cartridges++" (Apple, 2026).
    """
    setup = method.setup
    tokenizer = setup.frozen.request_tokenizer
    rows = in_context(setup, texts)
    divergences: list[float] = []
    for batch in _batches(method, rows):
        own: list[TokenizedExample] = [tokenizer.example_ids(row) for row in batch]
        plain, _ = adapter_training.completion_logits(setup.frozen.model, own, tokenizer)
        block = method.switched_off(batch) if off else method.applied(batch)
        with block as model:
            if model is None:
                return None
            read = own if off else [method.tokenized(row) for row in batch]
            logits, _ = adapter_training.completion_logits(model, read, tokenizer)
        if off and torch.equal(logits, plain):
            divergences += [0.0] * len(plain)
            continue
        with torch.no_grad():
            divergences += kl_divergences(logits, plain).tolist()
    return statistics.fmean(divergences) if divergences else None


class Spectrum(NamedTuple):
    """The singular values of the last layer's states of some texts.

    Attributes:
        rank: Effective rank: the share of the singular values, from the largest on, that make up
            .9 of their sum; the mean over texts.
        cumulated: Per text, the cumulated singular values as shares of their sum.
    """

    rank: float
    cumulated: Sequence[Tensor]

    def gap(self, other: "Spectrum") -> float:
        """The largest difference between two cumulated spectra, the mean over texts."""
        pairs = zip(self.cumulated, other.cumulated, strict=True)
        return statistics.fmean(float((own - its).abs().max()) for own, its in pairs)


def spectrum(method: Method, texts: Sequence[Example]) -> Spectrum | None:
    """The spectrum of representations of texts that a training row's adaptation is applied to.

    Args:
        method: A trained method.
        texts: Prompts and completions.

    Returns:
        The spectrum; None if no text has two tokens.

    Reference:
        "PT-PEFT", 2024, https://arxiv.org/abs/2411.00029.
    """
    tokenizer = method.setup.frozen.request_tokenizer
    by_text: dict[int, Tensor] = {}
    rows = in_context(method.setup, texts)
    for batch in _batches(method, rows):
        with method.applied(batch) as model:
            tokens = [method.tokenized(row) for row in batch]
            states = adapter_training.completion_states(model, tokens, tokenizer)
        for row, own in zip(batch, states, strict=True):
            if len(own) > 1:
                values = torch.linalg.svdvals(own)
                by_text[id(row)] = values.cumsum(0) / values.sum()
    cumulated = [by_text[id(row)] for row in rows if id(row) in by_text]  # not by batches
    if not cumulated:
        return None
    ranks = [(int((own < _RANK_SHARE).sum()) + 1) / len(own) for own in cumulated]
    return Spectrum(statistics.fmean(ranks), cumulated)


def distinct_requests(rows: Sequence[Example]) -> list[Example]:
    """The first row of each prompt and labels, and all rows without a prompt."""
    requests: dict[Hashable, Example] = {}
    for number, row in enumerate(rows):
        requests.setdefault(_request_identity(row) or number, row)
    return list(requests.values())


def rows_of_requests(rows: Sequence[Example], requests: Sequence[Example]) -> list[Example]:
    """All rows of some of their distinct requests."""
    identities = {_request_identity(request) for request in requests} - {None}
    ids = set(map(id, requests))
    return [row for row in rows if id(row) in ids or _request_identity(row) in identities]


def _request_identity(row: Example) -> Hashable:
    """What rows have in common whose completions answer one request; None without a prompt."""
    prompt = prompt_identity(row)
    return (prompt, tuple(sorted(weighted_labels(row.attributes)))) if prompt else None


def texts_of(method: Method, rows: Sequence[Example], seed: int) -> list[str]:
    """A text per row: greedy after a prompt, else sampled."""
    setup = method.setup
    texts: dict[int, str] = {}
    places = {id(row): i for i, row in enumerate(rows)}
    with_prompt = [row for row in rows if prompt_identity(row)]
    without = [row for row in rows if not prompt_identity(row)]
    for group, temperature in ((with_prompt, None), (without, TEMPERATURE)):
        for number, batch in enumerate(_batches(method, group)):
            with method.applied(batch) as model:
                written = adapter_training.sample(
                    model,
                    setup.frozen,
                    [method.tokenized(row).prompt for row in batch],
                    max_new_tokens=setup.max_new_tokens,
                    seed=1000 * seed + number,
                    temperature=temperature,
                )
            for row, text in zip(batch, written, strict=True):
                text = text.strip().split(method.end_of_text)[0] if method.end_of_text else text
                line = text.strip().split("\n")[0] if setup.is_single_line else text
                texts[places[id(row)]] = line.strip()
    return [texts[i] for i in range(len(rows))]


def text_figures(
    rows: Sequence[Example], requests: Sequence[Example], texts: Sequence[str]
) -> Figures:
    """BLEU, chrF and ROUGE where rows have prompts, and the texts' diversity and length.

    BLEU is left out where no reference has the four words that it counts, and SARI where
    references take less than half of their words from the prompt, so that nothing is rewritten.
    Characters of scripts without spaces count as words.

    Args:
        rows: Rows; the completions of those with one prompt and labels are its references.
        requests: Their distinct requests.
        texts: A text for each request.
    """
    figures = {
        "distinct-2": distinct_n(texts, 2),
        "words": statistics.fmean(len(words_of(text)) for text in texts),
    }
    if not all(prompt_identity(row) for row in rows):
        return figures
    with requires_extra("compare", "a comparison of texts"):
        import sacrebleu

    completions: dict[Hashable, list[str]] = {}
    for row in rows:
        completions.setdefault(_request_identity(row), []).append(spaced(row.completion))
    texts = [spaced(text) for text in texts]
    references = [completions[_request_identity(request)] for request in requests]
    most = max(map(len, references))
    # None where a row has fewer: an empty text would be a reference of no length.
    padded = [[*own, *[None] * (most - len(own))] for own in references]
    columns: Any = [list(column) for column in zip(*padded, strict=True)]
    scorer = _rouge_scorer(references)
    overlaps = [scorer.score_multi(own, text) for own, text in zip(references, texts, strict=True)]
    try:
        tables = [parse_table(request.prompt or "") for request in requests]
        figures["slot errors"] = slot_errors(texts, tables).rate
    except ValueError:  # the prompts are no tables
        pass
    if any(len(text.split()) >= _BLEU_WORDS for own in references for text in own):
        figures["BLEU"] = sacrebleu.corpus_bleu(texts, columns).score
    sources = [spaced(prompt_text(request)) for request in requests]
    if "slot errors" not in figures and _are_rewritten(sources, references):
        figures["SARI"] = sari(sources, texts, references)
    rouge = {
        name: 100 * statistics.fmean(scores[kind].fmeasure for scores in overlaps)
        for name, kind in _ROUGE.items()
    }
    return {"chrF": sacrebleu.corpus_chrf(texts, columns).score, **rouge, **figures}


def _are_rewritten(sources: Sequence[str], references: Sequence[Sequence[str]]) -> bool:
    """Whether references take half of their words or more from the texts that were given."""
    shares = []
    for source, own in zip(sources, references, strict=True):
        words = set(words_of(source))
        shares += [
            statistics.fmean(word in words for word in words_of(text))
            for text in own
            if words_of(text)
        ]
    return bool(shares) and statistics.fmean(shares) >= _REWRITTEN


class _UnicodeWords:
    """A tokenizer of rouge-score for other scripts than Latin, which its own leaves out."""

    def tokenize(self, text: str) -> list[str]:
        """Lower-case words."""
        return re.findall(r"[^\W_]+", text.casefold())


def _rouge_scorer(references: Sequence[Sequence[str]]) -> Any:
    """ROUGE with the package's own words and stems, if the references are mostly in Latin."""
    with requires_extra("compare", "a comparison of texts"):
        from rouge_score.rouge_scorer import RougeScorer

    letters = [c for own in references for text in own for c in text if c.isalpha()]
    is_latin = sum(c.isascii() for c in letters) >= len(letters) / 2
    if is_latin:
        return RougeScorer([*_ROUGE.values()], use_stemmer=True)
    return RougeScorer([*_ROUGE.values()], tokenizer=_UnicodeWords())


def accuracy_figures(
    rows: Sequence[Example], texts: Sequence[str], classifiers: Mapping[str, AttributeClassifier]
) -> Figures:
    """How often classifiers find the labels that texts were requested with."""
    figures = {}
    for attribute, classifier in classifiers.items():
        requested = [row.attributes.get(attribute) for row in rows]
        ids = [i for i, label in enumerate(requested) if label in classifier.labels]
        if ids:
            best = classifier.probabilities([texts[i] or " " for i in ids]).argmax(dim=1)
            hits = [
                classifier.labels[j] == requested[i]
                for i, j in zip(ids, best.tolist(), strict=True)
            ]
            figures[f"accuracy, {attribute}"] = statistics.fmean(hits)
    return figures


def tokens_per_second(method: Method) -> float:
    """New tokens per second of 8 rows that each have another adaptation.

    A method whose adaptations cannot share a batch writes one row after another.
    """
    setup = method.setup
    row = (setup.validation or setup.training)[0]
    prompt = method.tokenized(row).prompt
    prompts = [prompt] * NUM_ADAPTATIONS
    batches = [prompts] if method.is_mixed else [[prompt]] * NUM_ADAPTATIONS
    seconds = []
    with method.many_applied() as (model, options):
        for _ in range(2):  # the first warms up
            start = now()
            for batch in batches:
                adapter_training.sample(
                    model,
                    setup.frozen,
                    batch,
                    max_new_tokens=_NUM_SPEED_TOKENS,
                    min_new_tokens=_NUM_SPEED_TOKENS,
                    seed=0,
                    temperature=None,
                    **options,
                )
            seconds.append(now() - start)
    return NUM_ADAPTATIONS * _NUM_SPEED_TOKENS / seconds[-1]


def _batches(method: Method, rows: Sequence[Example]) -> Iterator[list[Example]]:
    """Batches of rows of one group and of similar length."""
    groups: dict[str | None, list[Example]] = {}
    for row in rows:
        groups.setdefault(method.group(row), []).append(row)
    for group in groups.values():
        group.sort(key=lambda row: len(row.prompt or "") + len(row.completion))
        for first in range(0, len(group), _BATCH_SIZE):
            yield group[first : first + _BATCH_SIZE]
