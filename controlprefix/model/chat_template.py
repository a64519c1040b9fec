"""Chat templates: from messages to the text of a prompt, with what users typed kept as text."""

import inspect
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from controlprefix.errors import RequestError
from controlprefix.model.control_tokens import control_token_pattern

_NO_TEMPLATE = "this model has no chat template, so it takes a prompt, not messages"
_PROBE = "a message of a user"
# A request may set these options of `apply_chat_template`; the others are the operator's.
_VARIABLES_OF_REQUESTS = frozenset(
    {"add_generation_prompt", "continue_final_message", "documents", "tools"}
)
# What a template may leave open at the end of a prompt, and how it is closed.
_OPEN_THINKING = re.compile(r"(?:<(think|thinking|thought|reasoning)>|(\[THINK\]))\s*\Z")


class Piece(NamedTuple):
    """A piece of a rendered prompt.

    Attributes:
        text: The text.
        is_literal: It looks like a control token but was typed by a user, so it is text.
    """

    text: str
    is_literal: bool


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
        self._control_tokens = control_token_pattern(tokenizer)
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
        marks: list[str] = []
        nonce = f"{secrets.randbelow(10**12):012d}:"  # digits, which filters of text leave alone

        def mark(match: re.Match[str]) -> str:
            marks.append(match[0])
            return f"\ue000{nonce}{len(marks) - 1}\ue001"

        def marked(value: Any) -> Any:
            if isinstance(value, str) and self._control_tokens is not None:
                if self._is_normalized and value:  # what becomes one is not known here
                    return mark(re.match(r"(?s).*", value))  # type: ignore[arg-type]
                return self._control_tokens.sub(mark, value)
            if isinstance(value, Mapping):
                return {marked(name): marked(item) for name, item in value.items()}
            return [marked(item) for item in value] if isinstance(value, list | tuple) else value

        messages = [{**m, "content": marked(m["content"])} for m in messages]
        variables = {**self._variables, **{name: marked(v) for name, v in variables.items()}}
        text = self._apply(
            _in_parts(messages, num_images)
            if any(num_images)
            else self._with_content_in_parts(messages, variables),
            variables,
            continue_final_message,
        )
        if close_thinking and (match := _OPEN_THINKING.search(text)):
            closing = f"</{match[1]}>" if match[1] else "[/THINK]"
            text = f"{text.rstrip()}\n\n{closing}\n\n"
        pieces = re.split(f"\ue000{nonce}(\\d+)\ue001", text)
        return [
            Piece(marks[int(piece)], True) if i % 2 else Piece(piece, False)
            for i, piece in enumerate(pieces)
            if piece
        ]

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


def _in_parts(
    messages: Sequence[Mapping[str, str]], num_images: Sequence[int] = ()
) -> list[dict[str, Any]]:
    counts = num_images or [0] * len(messages)
    return [
        {**m, "content": [*[{"type": "image"}] * count, {"type": "text", "text": m["content"]}]}
        for m, count in zip(messages, counts, strict=True)
    ]
