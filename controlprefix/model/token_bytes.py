"""TokenBytes: the bytes that each token of a vocabulary stands for."""

import json
import re
from typing import Any

from transformers import PreTrainedTokenizerBase

_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")
_SPACE = "▁"  # how SentencePiece writes a space


class TokenBytes:
    """Finds the bytes of tokens, whatever a tokenizer writes for them.

    Bytes of consecutive tokens, joined, are those of the text, but for a space that some
    tokenizers leave out at a text's start and that others (as BERT's) write between words.

    Args:
        tokenizer: Its vocabulary may be byte-level, SentencePiece's with or without byte
            tokens, or WordPiece.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = "" if backend is None else json.dumps(json.loads(backend.to_str())["decoder"])
        self._byte_of = _byte_alphabet() if '"ByteLevel"' in decoder else None
        self._continues_words = '"WordPiece"' in decoder
        self._special = set(tokenizer.all_special_ids)
        self._literal: set[int] = {*self._special, *tokenizer.added_tokens_decoder}

    def __call__(self, token: int) -> bytes:
        """The bytes of a token.

        Args:
            token: An id.
        """
        piece: Any = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # an id that the tokenizer does not have
            return b""
        if token in self._literal:
            return str(piece).encode()
        if match := _BYTE_TOKEN.fullmatch(piece):
            return bytes([int(match[1], 16)])
        if self._byte_of is not None and all(character in self._byte_of for character in piece):
            return bytes(self._byte_of[character] for character in piece)
        if self._continues_words:
            return (piece[2:] if piece.startswith("##") else f" {piece}").encode()
        return str(piece).replace(_SPACE, " ").encode()

    def in_text(self, token: int) -> bytes:
        """The bytes of a token in a completion's text, which leaves special tokens out.

        Args:
            token: An id.
        """
        return b"" if token in self._special else self(token)

    def text(self, token: int) -> str:
        """A token as a text; as OpenAI writes them, `bytes:` and codes for part of a character.

        Args:
            token: An id.
        """
        value = self(token)
        try:
            return value.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in value)


def _byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for.

    Reference:
        Radford et al., "Language Models are Unsupervised Multitask Learners" (GPT-2), 2019.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    codes = {chr(byte): byte for byte in printable}
    return codes | {chr(256 + i): byte for i, byte in enumerate(others)}
