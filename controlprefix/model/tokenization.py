"""RequestTokenizer: requests and examples -> token ids, and generated ids -> text."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from controlprefix.errors import ContextLengthError, RequestError
from controlprefix.request import Example, Request


@dataclass(frozen=True, slots=True)
class TokenizedExample:
    """Token ids of an example.

    Attributes:
        prompt: Ids that the model is given; never empty.
        completion: Ids that it should generate, without an end token.
    """

    prompt: tuple[int, ...]
    completion: tuple[int, ...]


class RequestTokenizer:
    """Turns requests into the token ids that one model expects.

    Args:
        model: For its config and generation config.
        tokenizer: Its tokenizer.

    Attributes:
        is_encoder_decoder: Whether an encoder reads the prompt.
        end_ids: Ids that end a completion, the tokenizer's own first.
        pad_id: Id to pad rows with.
        context_length: Maximum number of positions; None if there is no limit.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.is_encoder_decoder = bool(model.config.is_encoder_decoder)
        generation = model.generation_config
        eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else []
        model_eos = generation.eos_token_id if generation is not None else None
        self.end_ids: tuple[int, ...] = tuple(dict.fromkeys([*_as_list(eos), *_as_list(model_eos)]))
        pad = tokenizer.pad_token_id
        self.pad_id: int = pad if isinstance(pad, int) else (*self.end_ids, 0)[0]
        text_config = model.config.get_text_config()
        self.context_length: int | None = getattr(text_config, "max_position_embeddings", None)

    @property
    def end_id(self) -> int | None:
        """The id that training teaches as the end of a completion."""
        return next(iter(self.end_ids), None)

    @property
    def has_chat_template(self) -> bool:
        """Whether prompts are wrapped as messages."""
        return bool(getattr(self._tokenizer, "chat_template", None))

    def prompt_ids(self, request: Request) -> tuple[int, ...]:
        """The ids that the completion follows.

        Raises:
            RequestError: If the tokenizer has no chat template and messages need one.
            ContextLengthError: If they and `max_new_tokens` do not fit the context.
        """
        ids = self._prompt_ids(request)
        num_new = 0 if isinstance(request, Example) else request.max_new_tokens
        needed = max(len(ids), num_new) if self.is_encoder_decoder else len(ids) + num_new
        if self.context_length is not None and num_new and needed > self.context_length:
            raise ContextLengthError(
                f"the prompt has {len(ids)} tokens and asks for {num_new} more, but the context "
                f"of this model is {self.context_length}; shorten the prompt or lower "
                "max_new_tokens"
            )
        return tuple(ids)

    def example_ids(self, example: Example) -> TokenizedExample:
        """Prompt and completion of an example.

        Raises:
            ContextLengthError: If together they do not fit the context.
        """
        prompt = self.prompt_ids(example)
        completion = self._tokenizer(example.completion, add_special_tokens=False)["input_ids"]
        longest = max(len(prompt), len(completion) + 1)
        needed = longest if self.is_encoder_decoder else len(prompt) + len(completion) + 1
        if self.context_length is not None and needed > self.context_length:
            raise ContextLengthError(
                f"an example has {len(prompt)} + {len(completion)} tokens, but the context of this "
                f"model is {self.context_length}; shorten it"
            )
        return TokenizedExample(prompt, tuple(completion))

    def chunks(self, text: str, max_tokens: int) -> Iterator[tuple[TokenizedExample, bool]]:
        """Cut a text into examples without a prompt.

        Args:
            text: Any text.
            max_tokens: Tokens per chunk.

        Yields:
            Each chunk, and whether it is the last.
        """
        ids = tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        if self.context_length is not None:
            max_tokens = min(max_tokens, max(1, self.context_length - 2))
        start = tuple(self._start_ids())
        for at in range(0, len(ids), max_tokens):
            is_last = at + max_tokens >= len(ids)
            yield TokenizedExample(start, ids[at : at + max_tokens]), is_last

    def text_ids(self, text: str) -> tuple[int, ...]:
        """The ids of a text at the start of a prompt, without an end token."""
        ids = list(self._tokenizer(text)["input_ids"])
        while len(ids) > 1 and ids[-1] in self.end_ids and not self.is_encoder_decoder:
            ids.pop()
        return tuple(ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated ids, without special tokens."""
        text = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        assert isinstance(text, str)
        return text

    def _prompt_ids(self, request: Request) -> Sequence[int]:
        if request.messages is not None and not self.has_chat_template:
            raise RequestError(
                "this model has no chat template, so it takes a prompt, not messages"
            )
        if request.raw or not self.has_chat_template:
            return self.text_ids(request.prompt) if request.prompt else self._start_ids()
        messages = (
            [message.model_dump() for message in request.messages]
            if request.messages is not None
            else [{"role": "user", "content": request.prompt or ""}]
        )
        text = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _start_ids(self) -> Sequence[int]:
        """The ids in front of a text that has no prompt."""
        if self.is_encoder_decoder:
            return list(self._tokenizer("")["input_ids"]) or [self.pad_id]
        start = self._tokenizer.bos_token_id
        return [start if isinstance(start, int) else (*self.end_ids, 0)[0]]


def pad_rows(rows: Sequence[Sequence[int]], pad_id: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Pad rows of token ids to the longest.

    Args:
        rows: At least one.
        pad_id: Id of the padding.
        left: Pad in front, as generation needs it, rather than behind.

    Returns:
        Ids and attention mask, `(num_rows, longest)` each.
    """
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        columns = slice(longest - len(row), longest) if left else slice(len(row))
        ids[i, columns] = torch.tensor(row, dtype=torch.long)
        mask[i, columns] = 1
    return ids, mask


def _as_list(ids: int | Sequence[int] | None) -> list[int]:
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)
