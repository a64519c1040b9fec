"""Example and Preference: requests whose completions are known."""

from typing import Any

from controlprefix.errors import RequestError, TrainingDataError
from controlprefix.request import Request


class Example(Request):
    """A Request whose completion is known: to train on, or to score.

    Raises:
        TrainingDataError: If a field is unknown, missing or out of range.
    """

    completion: str
    """The text that answers the prompt."""

    is_whole: bool = True
    """Whether the completion ends there. Where it was cut, as at a limit of tokens, no end token is
    learned."""

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except RequestError as error:
            raise TrainingDataError(str(error)) from None

    def _check_prompt(self) -> None:
        if self.schedules:
            raise ValueError("schedules apply while generating; an example has its text already")
        if not self.completion.strip():
            raise ValueError("the completion is empty; an example needs the text to learn")
        super()._check_prompt()


class Preference(Request):
    """A Request with two completions, one of which is better: to learn from feedback.

    Raises:
        TrainingDataError: If a field is unknown, missing or out of range.
    """

    chosen: str
    """The better text."""

    rejected: str
    """The text that it is preferred to."""

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except RequestError as error:
            raise TrainingDataError(str(error)) from None

    def examples(self) -> tuple[Example, Example]:
        """The request with the chosen completion, and with the rejected one."""
        fields = {
            name: getattr(self, name) for name in self.model_fields_set - {"chosen", "rejected"}
        }
        texts = (self.chosen, self.rejected)
        chosen, rejected = (
            Example(**fields, completion=text).from_source(self._source) for text in texts
        )
        return chosen, rejected

    def _check_prompt(self) -> None:
        if self.schedules:
            raise ValueError("schedules apply while generating; a preference has its texts already")
        if not self.chosen.strip() or not self.rejected.strip():
            raise ValueError("chosen or rejected is empty; a preference needs both texts")
        if self.chosen == self.rejected:
            raise ValueError("chosen and rejected are the same text; there is nothing to prefer")
        super()._check_prompt()
