"""Chat templates: from messages to the text of a prompt, with what users typed kept as text."""

import hashlib
import inspect
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from controlprefix.errors import RequestError
from controlprefix.model.special_tokens import (
    PartialTokens,
    special_token_pattern,
    special_tokens,
)

_NO_TEMPLATE = "this model has no chat template, so it takes a prompt, not messages"
_CHANGES_TEXTS = (
    "the chat template of this model changes texts of messages in a way that special tokens in "
    "them, such as {!r}, do not survive as text; leave them out of messages"
)
_PROBE = "a message of a user"
# A request may set these options of `apply_chat_template`; the others are the operator's.
_VARIABLES_OF_REQUESTS = frozenset(
    {"add_generation_prompt", "continue_final_message", "documents", "tools"}
)
_TAGS = "think|thinking|thought|reasoning"
# In answers: templates look for them to leave thoughts out.
_THINKING = re.compile(rf"</?({_TAGS})>|\[/?THINK\]")
END_OF_THINKING = re.compile(rf"</(?:{_TAGS})>|\[/THINK\]")
_ANYTHING = re.compile(r"(?s).+")
_NOT_THINKING = re.compile(rf"(?s)(?:(?!{_THINKING.pattern}).)+")
# What a template may leave open at the end of a prompt, and how it is closed.
_OPEN_THINKING = re.compile(rf"(?:<({_TAGS})>|(\[THINK\]))\s*\Z")


def without_thoughts(answer: str) -> str:
    """An answer without the thoughts in it, as templates have earlier ones; in linear time.

    Example:
        >>> without_thoughts("<think>hm</think>Yes. <think>not closed")
        'Yes. <think>not closed'
    """
    rest, at = [], 0
    start: re.Match[str] | None = None
    for tag in _THINKING.finditer(answer):
        is_end = tag[0][1] == "/"
        if start is None:
            start = None if is_end else tag
        elif is_end and tag[1] == start[1]:
            rest.append(answer[at : start.start()])
            at, start = tag.end(), None
    return "".join([*rest, answer[at:]])


class Piece(NamedTuple):
    """A piece of a rendered prompt.

    Attributes:
        text: The text.
        is_literal: It looks like a special token but was typed by a user, so it is text.
    """

    text: str
    is_literal: bool


class _Marks:
    """Marks of texts that go through a template, and come out as pieces.

    Args:
        content: All that goes through it. Equal contents have equal marks.
        whole: Whether contents of messages are marked whole.

    Attributes:
        split: Beginnings of special tokens whose rest is in another text.
    """

    def __init__(self, content: Any, *, whole: bool = False) -> None:
        self._content = content
        self.whole = whole
        self._texts: list[str] = []
        self.split: list[str] = []

    @cached_property
    def _signs(self) -> tuple[str, str, str]:
        """What a mark starts with, ends with, and has in front of its number."""
        content = json.dumps(self._content, ensure_ascii=False, default=str)
        used = set(content)
        private = (chr(code) for code in range(0xE000, 0xF900))
        start, end = itertools.islice((c for c in private if c not in used), 2)
        # Digits, which filters of text leave alone; nobody can type the hash of his own text.
        number = int.from_bytes(hashlib.sha256(content.encode("utf-8", "replace")).digest()[:8])
        return start, end, f"{number:020d}:"

    def mark(self, text: str) -> str:
        """What stands for a text in the template."""
        start, end, nonce = self._signs
        self._texts.append(text)
        return f"{start}{nonce}{len(self._texts) - 1}{end}"

    def pieces(self, text: str) -> list[Piece]:
        """The pieces of a rendered text.

        Raises:
            RequestError: If the template has changed a mark.
        """
        if not self._texts:
            return [Piece(text, False)] if text else []
        # Templates may write lists and objects as Python or JSON does, which escapes characters.
        start, end = (f"(?:{c}|\\\\u{ord(c):04x})" for c in self._signs[:2])
        pieces = re.split(f"{start}{self._signs[2]}(\\d+){end}", text)
        rest = "".join(pieces[::2])
        if any(part in rest for part in self._signs):
            raise RequestError(_CHANGES_TEXTS.format(self._texts[0][:20]))
        return [
            Piece(self._texts[int(piece)], True) if i % 2 else Piece(piece, False)
            for i, piece in enumerate(pieces)
            if piece
        ]


class ChatTemplate:
    """Renders messages with a tokenizer's chat template.

    Args:
        tokenizer: The tokenizer.
        variables: Template variables of every prompt; a request's own come on top.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any] | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._variables = dict(variables or {})
        self._takes_parts: dict[str, bool] = {}  # by template
        self._special_tokens = special_token_pattern(tokenizer)
        self._partial_tokens = PartialTokens(special_tokens(tokenizer))
        self._is_normalized = any(
            token.special and token.normalized
            for token in getattr(tokenizer, "added_tokens_decoder", {}).values()
        )
        options = inspect.signature(tokenizer.apply_chat_template).parameters
        self._reserved = frozenset(options) - _VARIABLES_OF_REQUESTS

    @property
    def exists(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return bool(getattr(self._tokenizer, "chat_template", None))

    def render(
        self,
        messages: Sequence[Mapping[str, str]],
        variables: Mapping[str, Any],
        *,
        num_images: Sequence[int] = (),
        continue_final_message: bool = False,
        close_thinking: bool = False,
    ) -> list[Piece]:
        """The text of a prompt.

        Args:
            messages: `role` and `content` of each.
            variables: Template variables of this prompt, such as `enable_thinking`.
            num_images: Images in front of each message's text; left out, none.
            continue_final_message: End within the last message, which the completion continues,
                rather than at the start of an answer.
            close_thinking: If the template leaves a thinking block open, close it.

        Raises:
            RequestError: If there is no template, it refuses the messages, or a variable is an
                option of the tokenizer.
        """
        if not self.exists:
            raise RequestError(_NO_TEMPLATE)
        if reserved := sorted(self._reserved & variables.keys()):
            raise RequestError(
                f"chat_template_kwargs cannot have {reserved[0]!r}, which is no variable of a "
                "template but an option of the tokenizer"
            )
        marks = _Marks([messages, variables])
        marks.split = self._partial_tokens.beginnings(_typed_texts(messages, variables))
        text = self._rendered(messages, variables, marks, num_images, continue_final_message)
        pieces = marks.pieces(text)
        if not all(message["content"].strip() in text for message in messages):
            whole = _Marks([messages, variables], whole=True)
            own = self._rendered(messages, variables, whole, num_images, continue_final_message)
            self._check_tokens(pieces, own)
        if close_thinking and (match := _OPEN_THINKING.search(text)):
            closing = f"</{match[1]}>" if match[1] else "[/THINK]"
            pieces = marks.pieces(f"{text.rstrip()}\n\n{closing}\n\n")
        return pieces

    def _rendered(
        self,
        messages: Sequence[Mapping[str, str]],
        variables: Mapping[str, Any],
        marks: _Marks,
        num_images: Sequence[int],
        continue_final_message: bool,
    ) -> str:
        """What the template makes of messages and variables with their marks."""
        messages = [{**m, "content": self._marked_content(m, marks)} for m in messages]
        variables = {
            **self._variables,
            **{name: self._marked(v, marks) for name, v in variables.items()},
        }
        return self._apply(
            _in_parts(messages, num_images)
            if any(num_images)
            else self._with_content_in_parts(messages, variables),
            variables,
            continue_final_message,
        )

    def _check_tokens(self, pieces: Sequence[Piece], own: str) -> None:
        """Check that a template has written no special token that it does not write by itself.

        Args:
            pieces: What it has rendered.
            own: What it renders of marks in place of the texts of messages.

        Raises:
            RequestError: If it has, as filters that remove characters do.
        """
        if self._special_tokens is None:
            return
        written = Counter(
            token.group()
            for piece in pieces
            if not piece.is_literal
            for token in self._special_tokens.finditer(piece.text)
        )
        by_itself = Counter(token.group() for token in self._special_tokens.finditer(own))
        if added := written - by_itself:
            raise RequestError(_CHANGES_TEXTS.format(min(added)))

    def _marked_content(self, message: Mapping[str, str], marks: _Marks) -> str:
        content, is_answer = message["content"], message["role"] == "assistant"
        if not marks.whole:
            return str(self._marked(content, marks, keep=_THINKING if is_answer else None))
        pattern = _NOT_THINKING if is_answer else _ANYTHING
        return pattern.sub(lambda match: marks.mark(match[0]), content)

    def _marked(self, value: Any, marks: _Marks, *, keep: re.Pattern[str] | None = None) -> Any:
        """A value with special tokens in its texts marked, except those to keep."""

        def mark(match: re.Match[str]) -> str:
            return match[0] if keep and keep.fullmatch(match[0]) else marks.mark(match[0])

        if isinstance(value, str) and self._special_tokens is not None:
            if self._is_normalized and value:  # what becomes one is not known here
                return marks.mark(value)
            value = self._special_tokens.sub(mark, value)
            if marks.split:  # the rest of a token begins another line
                beginnings = "|".join(map(re.escape, marks.split))
                value = re.sub(rf"(?m)(?:{beginnings})(?=[^\S\n]*$)", mark, value)
            return value
        if isinstance(value, Mapping):
            return {
                self._marked(name, marks): self._marked(item, marks) for name, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self._marked(item, marks) for item in value]
        return value

    def _with_content_in_parts(
        self, messages: Sequence[Mapping[str, str]], variables: Mapping[str, Any]
    ) -> Sequence[Mapping[str, Any]]:
        """The messages in the form in which the template keeps their text."""
        template = str(self._tokenizer.chat_template)
        if template not in self._takes_parts:
            as_text = [{**message, "content": _PROBE} for message in messages]
            if self._keeps(as_text, variables):
                self._takes_parts[template] = False
            elif self._keeps(_in_parts(as_text), variables):
                self._takes_parts[template] = True
            else:  # it refuses these messages in either form
                return messages
        return _in_parts(messages) if self._takes_parts[template] else messages

    def _keeps(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> bool:
        """Whether the text of the messages is in the prompt, as text."""
        try:
            text = self._apply(messages, variables, False)
        except RequestError:
            return False
        return _PROBE in text.casefold() and "'text'" not in text

    def _apply(
        self,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any],
        continue_final_message: bool,
    ) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                **{
                    "add_generation_prompt": not continue_final_message,
                    "continue_final_message": continue_final_message,
                    **variables,
                    "tokenize": False,
                },
            )
        except Exception as error:  # a template is code of the model's authors
            raise RequestError(
                f"the chat template of this model refuses these messages: {error}"
            ) from error
        assert isinstance(text, str)
        return text


def with_images(pieces: Sequence[Piece], placeholder: str, texts: Sequence[str]) -> list[Piece]:
    """The pieces of a prompt with the texts of images in place of their placeholders.

    Raises:
        RequestError: If the template has not put a placeholder for each image.
    """
    num_placed = sum(piece.text.count(placeholder) for piece in pieces if not piece.is_literal)
    if num_placed != len(texts):
        raise RequestError(
            f"the chat template of this model has put {num_placed} of {len(texts)} images into the "
            "prompt; put them into fewer messages, or give raw=True"
        )
    remaining = iter(texts)
    return [
        piece
        if piece.is_literal
        else Piece(re.sub(re.escape(placeholder), lambda _: next(remaining), piece.text), False)
        for piece in pieces
    ]


def _typed_texts(
    messages: Sequence[Mapping[str, str]], variables: Mapping[str, Any]
) -> Iterator[str]:
    """All texts that users typed; of answers also what follows their thoughts."""
    for message in messages:
        yield message["content"]
        yield from _THINKING.split(message["content"])[2::2]
    values: list[Any] = [*variables.values()]
    while values:
        value = values.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            values += [*value, *value.values()]
        elif isinstance(value, list | tuple):
            values += value


def _in_parts(
    messages: Sequence[Mapping[str, str]], num_images: Sequence[int] = ()
) -> list[dict[str, Any]]:
    counts = num_images or [0] * len(messages)
    return [
        {**m, "content": [*[{"type": "image"}] * count, {"type": "text", "text": m["content"]}]}
        for m, count in zip(messages, counts, strict=True)
    ]
