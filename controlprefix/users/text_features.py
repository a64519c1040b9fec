"""Text features for predicting user codes: a sentence embedding, and style statistics."""

import math
import re
import string
import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from controlprefix.embeddings import (
    DEFAULT_EMBEDDER,
    MAX_CHARACTERS,
    embed,
    require_trusted,
    trust,
)
from controlprefix.errors import ControlPrefixError

# Part of the name of the features: a decoder must only get the features it was trained with.
_STYLE_VERSION = "style-2"
_NUM_BUCKETS = 256  # of character n-grams, which tell style in any language
# Function words of English: they tell how someone writes, not what about.
_FUNCTION_WORDS = """
    i me my you he she it we they the a an and but or so because that this is was be have do
    not no very really just like lol ok oh well gonna im dont cant u ur haha of to in on for
    with at from if when as then there what who how all
""".split()  # noqa: SIM905


class TextFeatures:
    """Computes the features of texts.

    Args:
        embedder: A sentence-transformers model: its name, or a folder.

    Attributes:
        name: Identifies the embedder and the style statistics.
    """

    def __init__(self, embedder: str = DEFAULT_EMBEDDER) -> None:
        trust(embedder)
        self._embedder = embedder
        self.name = f"{embedder}+{_STYLE_VERSION}"

    @classmethod
    def by_name(cls, name: str) -> "TextFeatures":
        """The features that a decoder was trained with.

        Raises:
            ControlPrefixError: If this version computes other ones, or if the decoder names an
                embedding model that is not trusted here: its file may come from elsewhere.
        """
        embedder, _, style = name.rpartition("+")
        if style != _STYLE_VERSION or not embedder:
            raise ControlPrefixError(
                f"the decoder was trained with features {name!r}, which this version does not "
                "compute; train the decoder again"
            )
        require_trusted(embedder, "the decoder")
        return cls(embedder)

    def of_users(self, users: Mapping[str, Sequence[str]]) -> dict[str, Tensor]:
        """Features of users' texts, `(num_texts, num_features)` each: see `compute`."""
        return {user: self.compute(texts) for user, texts in users.items()}

    def compute(self, texts: Sequence[str]) -> Tensor:
        """Features of texts, `(num_texts, num_features)`, float32.

        Raises:
            ControlPrefixError: As `controlprefix.embeddings.embed`.
        """
        own = [text[:MAX_CHARACTERS] for text in texts]
        style = torch.tensor([[*style_features(text), *character_features(text)] for text in own])
        return torch.cat([embed(texts, self._embedder), style], dim=1)


def style_features(text: str) -> list[float]:
    """Style statistics: shares of function words, punctuation and capitals; lengths; habits."""
    words = re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)?", text.lower())
    num_words, num_characters = max(1, len(words)), max(1, len(text))
    sentences = [sentence for sentence in re.split(r"[.!?]+", text) if sentence.strip()]
    return [
        *(words.count(word) / num_words for word in _FUNCTION_WORDS),
        *(text.count(mark) / num_characters for mark in string.punctuation + "\n"),
        text.count("...") / num_words,
        sum(character.isupper() for character in text) / num_characters,
        sum(character.isdigit() for character in text) / num_characters,
        sum(not character.isascii() for character in text) / num_characters,
        sum(map(len, words)) / num_words,
        len(set(words)) / num_words,
        math.log(num_words),
        math.log(num_words / max(1, len(sentences))),
        len(re.findall(r"\bi\b", text)) / num_words,
        len(re.findall(r"[.!?]\s+[a-z]", text)) / num_words,
        len(re.findall(r"(\w)\1\1", text)) / num_words,
    ]


def character_features(text: str) -> list[float]:
    """Square roots of the shares of character n-grams (n from 1 to 3), hashed into buckets.

    Reference:
        Character n-grams are the strongest single features of authorship: Stamatatos, "A survey
        of modern authorship attribution methods", 2009, https://doi.org/10.1002/asi.21001.
        Hashing: Weinberger et al., 2009, https://arxiv.org/abs/0902.2206.
    """
    plain = " ".join(text.split())
    counts = [0] * _NUM_BUCKETS
    for size in (1, 2, 3):
        for start in range(len(plain) - size + 1):
            # Python's own hash differs between processes.
            counts[zlib.crc32(plain[start : start + size].encode()) % _NUM_BUCKETS] += 1
    total = max(1, sum(counts))
    return [math.sqrt(count / total) for count in counts]
