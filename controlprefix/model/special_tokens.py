"""Special tokens (such as `</s>`), and texts in which they are typed as plain text."""

import copy
import functools
import re
import threading
from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

_BEFORE_A_PIECE = ("\n", ">", ";", "a")  # texts that a piece may not merge with


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What the tokenizer reads as special tokens, the longest first."""
    tokens = {str(token) for token in tokenizer.all_special_tokens}
    added = getattr(tokenizer, "added_tokens_decoder", {})
    tokens |= {token.content for token in added.values() if token.special}
    return sorted((token for token in tokens if token), key=len, reverse=True)


def special_token_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """Matches what the tokenizer reads as a special token; None if it has none."""
    tokens = special_tokens(tokenizer)
    return re.compile("|".join(map(re.escape, tokens))) if tokens else None


class PartialTokens:
    """Finds pieces of special tokens that become one where a template puts texts together.

    Args:
        tokens: The special tokens.
    """

    def __init__(self, tokens: Sequence[str]) -> None:
        self._rests: dict[str, set[str]] = {}  # by the beginning of a token, what follows it
        for token in tokens:
            for n in range(1, len(token)):
                self._rests.setdefault(token[:n], set()).add(token[n:])
        self._ends = {rest for rests in self._rests.values() for rest in rests}
        self._longest = max(map(len, tokens), default=0)

    def beginnings(self, texts: Iterable[str]) -> list[str]:
        """Beginnings of tokens at the end of a line whose rest is at the start of others.

        Args:
            texts: Texts that a template may put together in any order, by whole lines.
        """
        lines = [line for text in texts for line in text.split("\n")]
        begun: set[str] = set()
        for line in lines:
            end = line.rstrip()[-self._longest :]
            begun |= {end[i:] for i in range(len(end))} & self._rests.keys()
        if not begun:
            return []
        rests: set[str] = set()
        for line in lines:
            start = line.lstrip()[: self._longest]
            rests |= {start[:n] for n in range(1, len(start) + 1)} & self._ends
        whole = {line.strip() for line in lines}

        @functools.cache  # some of many rests are the same
        def follows(rest: str) -> bool:
            """Whether a line starts with this, or is a part of it that others continue."""
            return rest in rests or any(
                rest[:n] in whole and follows(rest[n:]) for n in range(1, len(rest))
            )

        split = [begin for begin in begun if any(map(follows, self._rests[begin]))]
        return sorted(split, key=len, reverse=True)


def special_token_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids of special tokens, without that of unknown text."""
    ids = set(tokenizer.all_special_ids)
    added = getattr(tokenizer, "added_tokens_decoder", {})
    ids |= {number for number, token in added.items() if token.special}
    return frozenset(ids - {tokenizer.unk_token_id})


class TextTokenizer:
    """Ids of texts, with special tokens read as what they are, or as text.

    Args:
        tokenizer: A tokenizer.

    Attributes:
        tokenizer: The same, without the truncation and padding that its file asks for.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = _without_truncation(tokenizer)
        self._pattern = special_token_pattern(tokenizer)
        self._special_ids = special_token_ids(tokenizer)
        self._literal_tokenizer: PreTrainedTokenizerBase | None = None
        self._lock = threading.Lock()

    def ids(self, text: str) -> list[int]:
        """Token ids of a text; special tokens in it keep their meaning."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def ids_of_text(self, text: str) -> list[int]:
        """Token ids of a text in which special tokens are treated as plain text."""
        if self._pattern is None or not self._pattern.search(text):
            ids = self.ids(text)
            if self._special_ids.isdisjoint(ids):  # else a normalizer made one
                return ids
        return self.literal_ids(text)

    def ids_of_piece(self, text: str, *, is_literal: bool, is_first: bool) -> list[int]:
        """The ids of a piece of a text.

        Args:
            text: The piece.
            is_literal: Special tokens are text too.
            is_first: Nothing is in front of it; some tokenizers begin a text with a blank.
        """
        ids_of = self.literal_ids if is_literal else self.ids
        if not is_first:
            for before in _BEFORE_A_PIECE:
                start = ids_of(before)
                ids = ids_of(before + text)
                if ids[: len(start)] == start:
                    return ids[len(start) :]
        return ids_of(text)

    def literal_ids(self, text: str) -> list[int]:
        """The ids of a text that has special tokens as text."""
        with self._lock:  # a copy, since tokenizers keep this option as a state
            if self._literal_tokenizer is None:
                self._literal_tokenizer = copy.deepcopy(self.tokenizer)
            tokenizer = self._literal_tokenizer

            def ids_of(piece: str) -> list[int]:
                options = {"add_special_tokens": False, "split_special_tokens": True}
                return list(tokenizer(piece, **options)["input_ids"])

            ids = ids_of(text)
            if self._special_ids.isdisjoint(ids):
                return ids
            # The vocabulary also has them as words, so tokenize by character.
            characters = [token for character in text for token in ids_of(character)]
            return [token for token in characters if token not in self._special_ids]


def _without_truncation(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer, or a copy without the truncation and padding that its file asks for.

    Switching them off at each call, as transformers does, fails in threads.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if getattr(backend, "truncation", None) is None and getattr(backend, "padding", None) is None:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return tokenizer
