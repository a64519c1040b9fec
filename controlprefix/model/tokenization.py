"""From requests and examples to token ids."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from controlprefix.errors import ContextLengthError, RequestError
from controlprefix.request import Example, Request


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """Token ids of an example.

    Attributes:
        prompt: What the model reads: never empty.
        completion: What it should write, without an end token.
    """

    prompt: tuple[int, ...]
    completion: tuple[int, ...]


class RequestEncoder:
    """Turns requests into the token ids that one model expects."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.is_encoder_decoder = bool(model.config.is_encoder_decoder)
        generation = model.generation_config
        ends = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else []
        declared = generation.eos_token_id if generation is not None else None
        self.end_ids: tuple[int, ...] = tuple(
            dict.fromkeys([*_as_list(ends), *_as_list(declared)])  # the tokenizer's first
        )
        pad = tokenizer.pad_token_id
        self.pad_id: int = pad if isinstance(pad, int) else (*self.end_ids, 0)[0]
        text_config = model.config.get_text_config()
        self.context: int | None = getattr(text_config, "max_position_embeddings", None)

    def prompt_ids(self, request: Request) -> tuple[int, ...]:
        """The tokens that the completion follows.

        Raises:
            RequestError: If the tokenizer has no chat template and messages need one.
            ContextLengthError: If they and `max_new_tokens` do not fit the context.
        """
        ids = self._prompt_ids(request)
        new = 0 if isinstance(request, Example) else request.max_new_tokens
        needed = max(len(ids), new) if self.is_encoder_decoder else len(ids) + new
        if self.context is not None and new and needed > self.context:
            raise ContextLengthError(
                f"the prompt has {len(ids)} tokens and asks for {new} more, but the context of "
                f"this model is {self.context}; shorten the prompt or lower max_new_tokens"
            )
        return tuple(ids)

    def encode(self, example: Example) -> EncodedExample:
        """Prompt and completion of an example.

        Raises:
            ContextLengthError: If together they do not fit the context.
        """
        prompt = self.prompt_ids(example)
        completion = self._tokenizer(example.completion, add_special_tokens=False)["input_ids"]
        longest = max(len(prompt), len(completion) + 1)
        total = longest if self.is_encoder_decoder else len(prompt) + len(completion) + 1
        if self.context is not None and total > self.context:
            raise ContextLengthError(
                f"an example has {len(prompt)} + {len(completion)} tokens, but the context of this "
                f"model is {self.context}; shorten it"
            )
        return EncodedExample(prompt, tuple(completion))

    def pieces(self, text: str, most: int) -> Iterator[tuple[EncodedExample, bool]]:
        """A text as examples without a prompt, so many tokens each; and which is the last."""
        ids = tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        most = most if self.context is None else min(most, max(1, self.context - 2))
        start = tuple(self._start())
        for at in range(0, len(ids), most):
            yield EncodedExample(start, ids[at : at + most]), at + most >= len(ids)

    def text_ids(self, text: str) -> tuple[int, ...]:
        """A text as a prompt would begin with it: without an end token."""
        ids = list(self._tokenizer(text)["input_ids"])
        while len(ids) > 1 and ids[-1] in self.end_ids and not self.is_encoder_decoder:
            ids.pop()
        return tuple(ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated tokens, without special ones."""
        text = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        assert isinstance(text, str)
        return text

    @property
    def has_chat_template(self) -> bool:
        """Whether prompts are wrapped as messages."""
        return bool(getattr(self._tokenizer, "chat_template", None))

    def _prompt_ids(self, request: Request) -> Sequence[int]:
        if request.messages is not None and not self.has_chat_template:
            raise RequestError(
                "this model has no chat template, so it takes a prompt, not messages"
            )
        if request.raw or not self.has_chat_template:
            return self.text_ids(request.prompt) if request.prompt else self._start()
        turns = (
            [m.model_dump() for m in request.messages]
            if request.messages is not None
            else [{"role": "user", "content": request.prompt or ""}]
        )
        text = self._tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=False
        )
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _start(self) -> Sequence[int]:
        """What comes before a text that has no prompt."""
        if self.is_encoder_decoder:
            return list(self._tokenizer("")["input_ids"]) or [self.pad_id]
        start = self._tokenizer.bos_token_id
        return [start if isinstance(start, int) else (*self.end_ids, 0)[0]]


def pad_rows(rows: Sequence[Sequence[int]], pad_id: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask of rows of different lengths, `(rows, longest)` each."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        where = slice(longest - len(row), longest) if left else slice(len(row))
        ids[i, where] = torch.tensor(row, dtype=torch.long)
        mask[i, where] = 1
    return ids, mask


def _as_list(ids: int | Sequence[int] | None) -> list[int]:
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)
