"""Rows that do not fit the model's context: refused, cut or skipped."""

from collections.abc import Sequence
from typing import NamedTuple

from controlprefix.errors import ContextLengthError, TrainingDataError
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
                f"{error}\nto cut or skip such rows, give too_long='cut' or 'skip'"
            ) from None
    fitted = FittedExamples([], [])
    num_cut = num_skipped = 0
    for example in examples:
        try:
            (ids,) = tokenizer.ids_of_examples([example])
        except ContextLengthError:
            try:
                cut = tokenizer.cut_example_ids(example) if too_long == "cut" else None
            except ContextLengthError:  # too many messages, none of which is long
                cut = None
            if cut is None:
                num_skipped += 1
                continue
            ids = cut
            num_cut += 1
        fitted.examples.append(example)
        fitted.tokenized.append(ids)
    if examples and not fitted.examples:
        raise TrainingDataError(
            f"none of the {len(examples)} rows fits the model's context of "
            f"{tokenizer.context_length} tokens; too_long='cut' cuts what can be cut"
        )
    return fitted._replace(num_cut=num_cut, num_skipped=num_skipped)
