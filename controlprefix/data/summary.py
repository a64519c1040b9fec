"""Summary of rows: what was understood of them, before anything is trained."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from controlprefix.errors import RequestError, TrainingDataError, shortened
from controlprefix.example import Example
from controlprefix.labels import weighted_labels

CountTokens = Callable[[Example], tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Lengths:
    """Shortest, median and longest, in tokens or in words."""

    shortest: int
    median: int
    longest: int


@dataclass(frozen=True, slots=True)
class DataSummary:
    """What rows hold.

    Attributes:
        num_rows: Examples; a row with several references is one for each.
        num_prompts: Different prompts.
        num_without_prompt: Texts to be learned as a whole.
        num_duplicates: Examples that are equal to an earlier one.
        prompt_lengths, completion_lengths: In `unit`.
        unit: `tokens`, or `words` without a tokenizer.
        tasks, users: Rows per name.
        labels: Rows per label, per attribute.
        too_long: Places of the rows that do not fit the model's context.
    """

    num_rows: int
    num_prompts: int
    num_without_prompt: int
    num_duplicates: int
    prompt_lengths: Lengths
    completion_lengths: Lengths
    unit: str
    tasks: dict[str, int]
    users: dict[str, int]
    labels: dict[str, dict[str, int]]
    too_long: tuple[str, ...]


def summarize(
    examples: Sequence[Example],
    *,
    num_tokens: CountTokens | None = None,
    fits: Callable[[Example], bool] = lambda example: True,
) -> DataSummary:
    """Count what examples hold.

    Args:
        examples: At least one.
        num_tokens: Tokens of an example's prompt and completion; left out, words are counted.
        fits: Whether an example fits the model's context.

    Raises:
        TrainingDataError: With the examples whose tokens cannot be counted.
    """
    lengths: list[tuple[int, int]] = []
    problems: list[str] = []
    for i, example in enumerate(examples, 1):
        try:
            lengths.append((num_tokens or _num_words)(example))
        except RequestError as error:
            problems.append(f"{example.place(i)}: {error}")
    if problems:
        many = f"{len(problems)} rows cannot be used:\n" if len(problems) > 1 else ""
        raise TrainingDataError(f"{many}{shortened(problems, chr(10))}")
    prompts = [(_prompt(example), _images(example)) for example in examples]
    contents = Counter(example.model_dump_json() for example in examples)
    labels: dict[str, Counter[str]] = {}
    for example in examples:
        for label in weighted_labels(example.attributes):
            labels.setdefault(label.attribute, Counter())[label.label] += 1
    return DataSummary(
        num_rows=len(examples),
        num_prompts=len({prompt for prompt in prompts if any(prompt)}),
        num_without_prompt=sum(not any(prompt) for prompt in prompts),
        num_duplicates=len(examples) - len(contents),
        prompt_lengths=_lengths([prompt for prompt, _ in lengths]),
        completion_lengths=_lengths([completion for _, completion in lengths]),
        unit="words" if num_tokens is None else "tokens",
        tasks=_by_count(Counter(e.task for e in examples if e.task is not None)),
        users=_by_count(Counter(e.user for e in examples if e.user is not None)),
        labels={attribute: _by_count(counts) for attribute, counts in labels.items()},
        too_long=tuple(e.place(i) for i, e in enumerate(examples, 1) if not fits(e)),
    )


def _prompt(example: Example) -> str:
    if example.prompt_ids is not None:
        return " ".join(map(str, example.prompt_ids))
    if example.messages is None:
        return example.prompt or ""
    return "\n".join(f"{message.role}: {message.content}" for message in example.messages)


def _images(example: Example) -> tuple[bytes, ...]:
    return tuple(image for message in example.conversation for image in message.images)


def _num_words(example: Example) -> tuple[int, int]:
    return len(_prompt(example).split()), len(example.completion.split())


def _lengths(values: Sequence[int]) -> Lengths:
    return Lengths(min(values), round(median(values)), max(values))


def _by_count(counts: Counter[str]) -> dict[str, int]:
    return dict(counts.most_common())
