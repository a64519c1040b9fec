"""Control ratios of a pair of texts: how a text relates to its source, as ordinal attributes."""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from controlprefix._io import requires_extra
from controlprefix.errors import MissingDependencyError, TrainingDataError
from controlprefix.example import Example

RATIOS = ("length", "similarity", "word_rank", "tree_depth")
_NUM_RANKED = 50_000  # words with a rank; rarer ones share the last


def control_ratios(
    source: str,
    text: str,
    *,
    names: Sequence[str] = RATIOS,
    language: str = "en",
    parse: Callable[[str], Any] | None = None,
) -> dict[str, float]:
    """How a text relates to its source.

    Args:
        source, text: A text and what was made of it, such as its simplification.
        names: Which ratios; left out, all that can be computed.
        language: The language of both, for the ranks of words, as a code that wordfreq knows.
        parse: A spaCy pipeline with a dependency parser, if trees are to be compared.

    Returns:
        `length`: characters of the text, relative to the source. `similarity`: 1 less the share of
        characters that an optimal alignment replaces. `word_rank`: the third quartile of the
        logarithmic frequency ranks of words, relative to the source: the lower, the more common.
        With `parse`, `tree_depth`: the depth of the dependency tree, relative to the source. Each
        rounded to two decimals.

    Raises:
        TrainingDataError: If a text has no words.
        MissingDependencyError: If the extra is not installed.

    Example:
        >>> control_ratios("He resided in an opulent domicile.", "He lived in a rich home.")
        {'length': 0.71, 'similarity': 0.71, 'word_rank': 0.69}

    Reference:
        Martin et al., "Controllable Sentence Simplification", 2020,
        https://arxiv.org/abs/1910.02677 (length, word rank, tree depth), and "MUSS", 2020,
        https://arxiv.org/abs/2005.00352 (similarity by replacements); Clive et al., 2021,
        https://arxiv.org/abs/2110.08329 (as attributes of prefixes).
    """
    with requires_extra("simplification", "a control ratio"):
        from rapidfuzz.distance import Levenshtein

    if unknown := set(names) - set(RATIOS):
        raise TrainingDataError(
            f"no ratio is called {min(unknown)!r}; there are {', '.join(RATIOS)}"
        )
    if not source.strip() or not text.strip():
        raise TrainingDataError("a control ratio needs two texts, but one is empty")
    ratios = {}
    if "length" in names:
        ratios["length"] = len(text) / len(source)
    if "similarity" in names:
        replaced = sum(op.tag == "replace" for op in Levenshtein.editops(source, text))
        ratios["similarity"] = 1 - replaced / min(len(source), len(text))
    if "word_rank" in names:
        ratios["word_rank"] = _word_rank(text, language) / _word_rank(source, language)
    if "tree_depth" in names and parse is not None:
        ratios["tree_depth"] = _tree_depth(parse(text)) / _tree_depth(parse(source))
    return {name: round(value, 2) for name, value in ratios.items()}


def with_ratios(
    examples: Sequence[Example],
    sources: Sequence[str] | None = None,
    names: Sequence[str] = RATIOS[:3],
    *,
    language: str = "en",
    parse: Callable[[str], Any] | None = None,
) -> list[Example]:
    """Examples with control ratios as numbers of attributes, which training learns as a scale.

    Args:
        examples: Rows.
        sources: What each row's completion was made of; left out, its prompt.
        names: Which ratios.
        language, parse: See `control_ratios`.

    Raises:
        TrainingDataError: If there is not one source per example, a ratio does not exist, or
            `tree_depth` has no parser.
        MissingDependencyError: If the extra is not installed.
    """
    if sources is None:
        sources = [example.texts[-1] for example in examples]
    if len(examples) != len(sources):
        raise TrainingDataError(
            f"{len(sources)} sources for {len(examples)} examples; give one per example"
        )
    if "tree_depth" in names and parse is None:
        raise TrainingDataError("tree_depth needs a parser: give `parse`, such as a spaCy pipeline")
    labelled = []
    for example, source in zip(examples, sources, strict=True):
        ratios = control_ratios(
            source, example.completion, names=names, language=language, parse=parse
        )
        numbers = {name: str(ratios[name]) for name in names}
        attributes = {**example.attributes, **numbers}
        labelled.append(example.model_copy(update={"attributes": attributes}))
    return labelled


def _word_rank(text: str, language: str) -> float:
    """The third quartile of the logarithmic ranks of a text's words, at least log 2."""
    ranks = _ranks(language)
    try:
        words = _word_list().tokenize(text, language)
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"wordfreq needs the package {error.name} to read {language!r}"
        ) from error
    logs = sorted(math.log(1 + ranks.get(word, _NUM_RANKED)) for word in words)
    return logs[min(len(logs) - 1, round(0.75 * (len(logs) - 1)))] if logs else math.log(2)


def _word_list() -> Any:
    with requires_extra("simplification", "a word's rank"):
        import wordfreq

    return wordfreq


@cache
def _ranks(language: str) -> dict[str, int]:
    try:
        words = _word_list().top_n_list(language, _NUM_RANKED)
    except LookupError:
        raise TrainingDataError(f"wordfreq knows no word list for {language!r}") from None
    return {word: rank for rank, word in enumerate(words, 1)}


def _tree_depth(document: Any) -> int:
    """The depth of the deepest dependency tree of a parsed text, at least 1."""

    def depth(token: Any) -> int:
        return 1 + max(map(depth, token.children), default=0)

    return max((depth(sentence.root) for sentence in document.sents), default=1)
