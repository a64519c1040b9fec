"""Measures of simplified texts: SARI, and the grade level of Flesch and Kincaid."""

import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from statistics import fmean
from typing import Any

from controlprefix._io import requires_extra
from controlprefix.errors import TrainingDataError

_MAX_N = 4
_END_OF_SENTENCE = re.compile(r"[.!?…]+[\"'’”»)\]]*(?=\s|$)")
_Grams = Counter[tuple[str, ...]]


def sari(
    sources: Sequence[str], texts: Sequence[str], references: Sequence[Sequence[str]]
) -> float:
    """SARI: how well texts keep, delete and add words, compared with references.

    Per text, the mean over n-grams of 1 to 4 words of three scores: F1 of those kept and of those
    added, precision of those deleted. A score is 0 where there is nothing to add or delete, so that
    copying a source is not rewarded. Words are those of sacrebleu's tokenizer 13a, in lower case.
    Recall of n-grams that are kept is over their counts, as the paper has it, where the authors'
    script averages over distinct n-grams; values of other implementations differ by a point or
    two (on 100 sources of ASSET: 42.0 here, 40.4 by that script, 42.4 by Hugging Face).

    Args:
        sources: The texts that were simplified.
        texts: One for each source.
        references: Correct simplifications of each source, at least one.

    Returns:
        The mean over texts, 0 to 100.

    Raises:
        TrainingDataError: If the numbers differ, or a source has no reference.
        MissingDependencyError: If sacrebleu is not installed.

    Example:
        >>> round(sari(["It is accepted."], ["It is taken."], [["It is taken.", "It is ok."]]), 1)
        72.2

    Reference:
        Xu et al., "Optimizing Statistical Machine Translation for Text Simplification", 2016,
        https://aclanthology.org/Q16-1029.
    """
    if not len(sources) == len(texts) == len(references) or not texts:
        raise TrainingDataError(
            f"{len(sources)} sources, {len(texts)} texts and {len(references)} lists of "
            "references; give one of each per row, and at least one row"
        )
    if not all(references):
        raise TrainingDataError("a source has no reference; give at least one for each")
    if any(isinstance(own, str) for own in references):
        raise TrainingDataError("references are a list for each source, also where there is one")
    scores = [
        _sari_of(_words(source), _words(text), [_words(reference) for reference in own])
        for source, text, own in zip(sources, texts, references, strict=True)
    ]
    return 100 * fmean(scores)


def grade_level(texts: Sequence[str], *, language: str = "en_US") -> float:
    """The grade level of Flesch and Kincaid (FKGL): school years needed to read texts.

    Args:
        texts: Texts, taken together.
        language: Whose rules of hyphenation count syllables, as pyphen knows it.

    Returns:
        0.39 words per sentence + 11.8 syllables per word - 15.59.

    Raises:
        TrainingDataError: If they have no words.
        MissingDependencyError: If pyphen is not installed.

    Reference:
        Kincaid et al., 1975.
    """
    with requires_extra("simplification", "a grade level"):
        from pyphen import Pyphen, language_fallback

    if language_fallback(language) is None:
        raise TrainingDataError(f"pyphen has no rules of hyphenation for {language!r}")
    hyphenation = Pyphen(lang=language)
    num_sentences = num_words = num_syllables = 0
    for text in texts:
        words = re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text)
        num_words += len(words)
        sentences = _END_OF_SENTENCE.split(text)  # the last one may have no end
        num_sentences += sum(bool(re.search(r"[^\W_]", sentence)) for sentence in sentences)
        num_syllables += sum(len(hyphenation.positions(word)) + 1 for word in words)
    if not num_words:
        raise TrainingDataError("the texts have no words")
    return 0.39 * num_words / num_sentences + 11.8 * num_syllables / num_words - 15.59


@cache
def _tokenizer() -> Any:
    with requires_extra("simplification", "SARI"):
        from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    return Tokenizer13a()


def _words(text: str) -> list[str]:
    words: list[str] = _tokenizer()(text.lower()).split()
    return words


def _sari_of(source: list[str], text: list[str], references: list[list[str]]) -> float:
    by_n = []
    for n in range(1, _MAX_N + 1):
        # Every reference is one vote: source and text count once per reference.
        before, after = (
            Counter({gram: count * len(references) for gram, count in _grams(words, n).items()})
            for words in (source, text)
        )
        correct = sum((_grams(words, n) for words in references), _Grams())
        keeping, right = before & after, before & correct
        keep_precision = _mean_share(keeping & right, keeping)
        keep_recall = _share((keeping & right).total(), right.total())
        deleted = before - after
        delete_precision = _mean_share(deleted - correct, deleted)
        added, missing = set(after) - set(before), set(correct) - set(before)
        add_precision = _share(len(added & missing), len(added))
        add_recall = _share(len(added & missing), len(missing))
        keep, add = _f1(keep_precision, keep_recall), _f1(add_precision, add_recall)
        by_n.append((keep + delete_precision + add) / 3)
    return fmean(by_n)


def _grams(words: list[str], n: int) -> _Grams:
    return Counter(zip(*(words[i:] for i in range(n)), strict=False))


def _mean_share(part: _Grams, whole: _Grams) -> float:
    """The mean over n-grams of the share of each that is in a part of them; 0 without any."""
    return fmean(part[gram] / count for gram, count in whole.items()) if whole else 0.0


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0
