"""Rows that do not fit the model's context: refused, cut or skipped."""

import bisect
from collections.abc import Sequence
from typing import NamedTuple

from controlprefix.errors import ContextLengthError, RequestError, TrainingDataError
from controlprefix.example import Example
from controlprefix.model.tokenization import RequestTokenizer, TokenizedExample
from controlprefix.training.settings import TooLong


class FittedExamples(NamedTuple):
    """Examples that fit the context, with their token ids.

    Attributes:
        examples, tokenized: In the order of the rows, without skipped ones. A cut example is
            whole in `examples` and cut in `tokenized`.
        num_cut, num_skipped: Rows that did not fit.
    """

    examples: list[Example]
    tokenized: list[TokenizedExample]
    num_cut: int = 0
    num_skipped: int = 0


def fit_to_context(
    examples: Sequence[Example], tokenizer: RequestTokenizer, too_long: TooLong
) -> FittedExamples:
    """Tokenize examples.

    Args:
        examples: The rows.
        tokenizer: The model's.
        too_long: See `TrainingSettings`.

    Raises:
        ContextLengthError: With the rows that do not fit, if they are refused.
        RequestError: With the rows that cannot be tokenized.
        TrainingDataError: If all rows were skipped.
    """
    if too_long == "refuse":
        try:
            return FittedExamples(list(examples), tokenizer.ids_of_examples(examples))
        except ContextLengthError as error:
            raise ContextLengthError(
                f"{error}\nto cut or skip such rows, give too_long='cut' or 'skip' (--too-long)"
            ) from None
    fitted = FittedExamples([], [])
    num_cut = num_skipped = 0
    for number, example in enumerate(examples, 1):
        try:
            ids = tokenizer.example_ids(example)
        except ContextLengthError:
            try:
                cut = cut_example_ids(example, tokenizer) if too_long == "cut" else None
            except ContextLengthError:  # too many messages, none of which is long
                cut = None
            if cut is None:
                num_skipped += 1
                continue
            ids = cut
            num_cut += 1
        except RequestError as error:
            raise type(error)(f"{example.place(number)}: {error}") from None
        fitted.examples.append(example)
        fitted.tokenized.append(ids)
    if examples and not fitted.examples:
        advice = "none can be cut" if too_long == "cut" else "give shorter rows"
        raise TrainingDataError(
            f"none of the {len(examples)} rows fits the model's context of "
            f"{tokenizer.context_length} tokens; {advice}"
        )
    return fitted._replace(num_cut=num_cut, num_skipped=num_skipped)


def cut_completion_ids(
    example: Example, prompt: Sequence[int], tokenizer: RequestTokenizer
) -> TokenizedExample:
    """The completion of an example, cut so that it fits behind a prompt that does.

    Args:
        example: An example.
        prompt: Ids of its prompt, which may be cut.
        tokenizer: The tokenizer of a model whose context is limited.
    """
    assert tokenizer.context_length is not None, "without a limit every example fits"
    whole = tokenizer.inner_ids(example.completion)
    room = tokenizer.context_length - 1 - tokenizer.num_before(prompt)
    completion = tuple(whole[: max(1, room)])
    is_whole = example.is_whole and len(completion) == len(whole)
    return TokenizedExample(tuple(prompt), completion, is_whole)


def cut_example_ids(example: Example, tokenizer: RequestTokenizer) -> TokenizedExample:
    """Prompt and completion of an example, cut so that they fit the context.

    The completion keeps at least half of the context. The prompt loses the end of its longest
    text, so that the chat template around it stays whole.

    Args:
        example: An example.
        tokenizer: The tokenizer of a model whose context is limited.

    Raises:
        RequestError: As `RequestTokenizer.prompt_ids`.
        ContextLengthError: If the template alone does not fit.
    """
    context = tokenizer.context_length
    assert context is not None, "without a limit every example fits"
    prompt = tokenizer.prompt_ids(example)
    whole = tokenizer.inner_ids(example.completion)
    room = context - 1 - tokenizer.num_before(prompt)
    completion = tuple(whole[: max(room, context // 2)])
    if not tokenizer.has_room(prompt, len(completion)):
        texts = example.texts
        longest = max(range(len(texts)), key=lambda i: len(texts[i]))

        def shortened(num_characters: int) -> tuple[int, ...]:
            text = texts[longest][:num_characters]
            if example.messages is None:
                return tokenizer.prompt_ids(example.model_copy(update={"prompt": text}))
            messages = list(example.messages)
            messages[longest] = messages[longest].model_copy(update={"content": text})
            return tokenizer.prompt_ids(example.model_copy(update={"messages": tuple(messages)}))

        counts = range(1, len(texts[longest]) + 1)
        num_fitting = bisect.bisect_left(
            counts, True, key=lambda n: not tokenizer.has_room(shortened(n), len(completion))
        )
        if num_fitting == 0:
            raise ContextLengthError(
                f"the chat template leaves no room for a prompt in the context of {context}"
            )
        prompt = shortened(num_fitting)
    is_whole = example.is_whole and len(completion) == len(whole)
    return TokenizedExample(prompt, completion, is_whole)
