"""Detect opposite labels from their words, since embeddings place opposites near each other.

Reference:
    Valence of words: Hutto & Gilbert, "VADER", 2014, as in the package vaderSentiment.
"""

import re
from collections.abc import Mapping
from functools import cache

from controlprefix._io import requires_extra

_NEGATIONS = ("un", "in", "im", "il", "ir", "dis", "non", "anti", "mis")
_NOT = {"not", "no", "never", "without", "less"}
_MIN_VALENCE = 0.5  # of VADER's -4 to 4


def are_opposed(first: str, second: str) -> bool | None:
    """Whether two labels are opposites: True or False where words say so, None where they do not.

    They do if one is the other with a negation in front (`formal` and `informal`), or if both
    have a good or a bad sense.

    Example:
        >>> are_opposed("formal", "informal"), are_opposed("terse", "verbose")
        (True, None)
    """
    start, end = (" ".join(_words(label)) for label in (first, second))
    if _is_negation(start, end) or _is_negation(end, start):
        return True
    valences = _valence(start), _valence(end)
    if min(map(abs, valences)) < _MIN_VALENCE:
        return None
    return valences[0] * valences[1] < 0


def _words(label: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", label.lower())


def _is_negation(negated: str, label: str) -> bool:
    """Whether a label is another one with a negation in front."""
    if not label:
        return False
    return any(
        negated in (f"{prefix}{label}", f"{prefix} {label}") for prefix in (*_NEGATIONS, *_NOT)
    )


def _valence(text: str) -> float:
    """The sum of the valences of words; a negation in front of a word turns it round."""
    total, sign = 0.0, 1.0
    for word in text.split():
        if word in _NOT:
            sign = -1.0
            continue
        total += sign * _valence_of_word(word)
        sign = 1.0
    return total


def _valence_of_word(word: str) -> float:
    lexicon = _lexicon()
    if word in lexicon:
        return lexicon[word]
    for prefix in _NEGATIONS:
        if f"{prefix}{word}" in lexicon:  # polite, from impolite
            return -lexicon[f"{prefix}{word}"]
        if word.startswith(prefix) and word.removeprefix(prefix) in lexicon:
            return -lexicon[word.removeprefix(prefix)]
    return 0.0


@cache
def _lexicon() -> Mapping[str, float]:
    with requires_extra("embeddings", "the nearest labels"):
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    lexicon: Mapping[str, float] = SentimentIntensityAnalyzer().lexicon
    return lexicon
