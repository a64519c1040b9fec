"""What a text is like, as numbers: a sentence embedding, and how it is written."""

import math
import re
import string
from collections.abc import Sequence

import torch
from torch import Tensor

from controlprefix.embeddings import DEFAULT, MAX_LETTERS, embeddings
from controlprefix.errors import ControlPrefixError

_STYLE = "style-1"  # a decoder must not be given other features than it learned from
# What says how one writes and not of what, in English; elsewhere they are absent, which is fine.
_WORDS = """
    i me my you he she it we they the a an and but or so because that this is was be have do
    not no very really just like lol ok oh well gonna im dont cant u ur haha of to in on for
    with at from if when as then there what who how all
""".split()  # noqa: SIM905


class TextFeatures:
    """Computes the features of texts; `name` says which those are.

    Args:
        embedder: A model of sentence-transformers: its name, or a folder.
    """

    def __init__(self, embedder: str = DEFAULT) -> None:
        self.embedder = embedder
        self.name = f"{embedder}+{_STYLE}"

    @classmethod
    def named(cls, name: str) -> "TextFeatures":
        """Those that a decoder learned from.

        Raises:
            ControlPrefixError: If this version computes others.
        """
        embedder, _, style = name.rpartition("+")
        if style != _STYLE or not embedder:
            raise ControlPrefixError(
                f"the decoder learned from features {name!r}, which this version does not compute; "
                "learn the decoder again"
            )
        return cls(embedder)

    def of(self, texts: Sequence[str]) -> Tensor:
        """`(texts, features)`, float32.

        Raises:
            ControlPrefixError: As `controlprefix.embeddings.embeddings`.
        """
        style = torch.tensor([style_of(text[:MAX_LETTERS]) for text in texts])
        return torch.cat([embeddings(texts, self.embedder), style], dim=1)


def style_of(text: str) -> list[float]:
    """How a text is written: shares of small words, marks and capitals, lengths, habits."""
    lowered = text.lower()
    words = re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)?", lowered)
    num_words, num_letters = max(1, len(words)), max(1, len(text))
    sentences = [one for one in re.split(r"[.!?]+", text) if one.strip()]
    return [
        *(words.count(word) / num_words for word in _WORDS),
        *(text.count(mark) / num_letters for mark in string.punctuation + "\n"),
        text.count("...") / num_words,
        sum(letter.isupper() for letter in text) / num_letters,
        sum(letter.isdigit() for letter in text) / num_letters,
        sum(not letter.isascii() for letter in text) / num_letters,
        sum(map(len, words)) / num_words,
        len(set(words)) / num_words,
        math.log(num_words),
        math.log(num_words / max(1, len(sentences))),
        len(re.findall(r"\bi\b", text)) / num_words,
        len(re.findall(r"[.!?]\s+[a-z]", text)) / num_words,
        len(re.findall(r"(\w)\1\1", text)) / num_words,
    ]
