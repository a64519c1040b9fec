"""Rows of any form -> examples."""

import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from controlprefix.data.files import Record, read_records
from controlprefix.errors import TrainingDataError, known_names, shortened
from controlprefix.request import Example, label_text

# Examples, dicts, a path, a `datasets.Dataset`, or a DataFrame of pandas or polars.
Rows = Iterable[Any] | str | os.PathLike[str]

_OWN_FIELDS = tuple(Example.model_fields)
_RENAMED = ("text", "prompt", "completion", "user", "task")
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_FORMS = (
    '{"prompt": "…", "completion": "…"}, {"text": "…"} or {"messages": […]}, each with "task", '
    '"attributes" and "user" as needed'
)


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns of rows hold what, where they are not named like the fields of an example.

    Other columns are ignored, unless only `task` is named here.

    Attributes:
        text: A text without a prompt, to be learned as a whole.
        prompt, completion, task: The fields of an example, as is the name of the user.
        attributes: Per attribute, the column of its labels.
    """

    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    user: str | None = None
    task: str | None = None
    attributes: Mapping[str, str] = field(default_factory=dict)

    def applied(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """A row's fields under the names of an example's fields."""
        names = [name for name in _RENAMED if getattr(self, name) is not None]
        columns = {name: getattr(self, name) for name in names}
        taken = {*columns.values(), *self.attributes.values()}
        result = {name: value for name, value in fields.items() if name not in taken}
        if self.attributes or set(names) - {"task"}:
            result = {k: v for k, v in result.items() if k in (*_OWN_FIELDS, "text")}
        result |= {name: fields[column] for name, column in columns.items() if column in fields}
        labels = {
            attribute: fields[column]
            for attribute, column in self.attributes.items()
            if column in fields
        }
        return result | ({"attributes": result.get("attributes", {}) | labels} if labels else {})

    def require_in(self, existing: Collection[str], *, has_task: bool) -> None:
        """Check that the columns exist.

        Args:
            existing: All columns of the rows.
            has_task: Whether there is a task for rows without one.

        Raises:
            TrainingDataError: With those that exist.
        """
        optional = {"task"} if has_task else set()
        named = [getattr(self, name) for name in _RENAMED if name not in optional]
        for column in [*named, *self.attributes.values()]:
            if column is not None and column not in existing:
                columns = known_names(column, existing)
                raise TrainingDataError(f"the rows have no column {column!r}; they have: {columns}")


def as_examples(
    rows: Rows, *, columns: Columns | None = None, defaults: Mapping[str, Any] | None = None
) -> list[Example]:
    """Rows of any form as examples.

    A row is an `Example`, or a mapping in one of these forms, each with the other fields of an
    `Example` as needed:

    - `prompt` (or `messages`) and `completion`, which may be a list of several references;
    - `text`: a text without a prompt;
    - `messages` that end with the assistant's, as for OpenAI's fine-tuning: that one is learned.

    Args:
        rows: A list of rows, a `datasets.Dataset`, a DataFrame, or the path of a file (see
            `controlprefix.data.files`).
        columns: Which columns hold what, if they have other names.
        defaults: Fields for rows that do not have them, such as `{"task": "email"}`.

    Raises:
        TrainingDataError: With all rows that are no examples, or if there are no rows.
    """
    examples: list[Example] = []
    problems: list[str] = []
    records = list(_records(rows))
    if columns is not None:
        existing = {name for row in records if isinstance(row, Record) for name in row.fields}
        columns.require_in(existing, has_task="task" in (defaults or {}))
    for row in records:
        if isinstance(row, Example):
            examples.append(row)
            continue
        try:
            if row.problem:
                raise ValueError(row.problem)
            own = _examples_of(row.fields, columns, defaults or {})
            examples += [example.from_source(row.place) for example in own]
        except (ValueError, TypeError) as error:  # TrainingDataError is a ValueError
            problems.append(f"{row.place}: {error}")
    if problems:
        many = f"{len(problems)} rows cannot be used:\n" if len(problems) > 1 else ""
        raise TrainingDataError(f"{many}{shortened(problems, chr(10))}\nA row is {_FORMS}")
    if not examples:
        source = rows if isinstance(rows, (str, os.PathLike)) else "the list of rows"
        raise TrainingDataError(f"{source} has no examples")
    return examples


def _records(rows: Rows) -> Iterator[Example | Record]:
    """The rows of any source, each with its place.

    Raises:
        TrainingDataError: If it is no source of rows.
    """
    if isinstance(rows, (str, os.PathLike)):
        yield from read_records(os.fspath(rows))
        return
    if isinstance(rows, Example):
        raise TrainingDataError("expected a list of rows, got one Example; put it into a list")
    if isinstance(rows, Mapping):
        splits = shortened([repr(name) for name in rows])
        raise TrainingDataError(f"expected rows, got a mapping of {splits}; give one of its values")
    for number, row in enumerate(_iterable(rows), 1):
        if isinstance(row, Example):
            yield row
        elif isinstance(row, Mapping):
            fields = {
                str(k): plain for k, v in row.items() if (plain := _plain_value(v)) is not None
            }
            yield Record(f"row {number}", fields)
        else:
            problem = f"expected an Example or a dict, got {type(row).__name__}"
            yield Record(f"row {number}", {}, problem)


def _iterable(rows: Any) -> Iterable[Any]:
    """The rows of a list, or of an object that is told by its methods."""
    by_method: dict[str, Callable[[], Any]] = {
        "to_dicts": lambda: rows.to_dicts(),  # polars
        "to_pylist": lambda: rows.to_pylist(),  # pyarrow
    }
    for name, convert in by_method.items():
        if hasattr(rows, name):
            return list(convert())
    if hasattr(rows, "to_dict") and hasattr(rows, "columns"):  # pandas
        return list(rows.to_dict("records"))
    if not isinstance(rows, Iterable):
        raise TrainingDataError(f"expected rows, got {type(rows).__name__}; give a list of rows")
    return rows


def _plain_value(value: Any) -> Any:
    """A cell as plain Python; None where a DataFrame has no value."""
    if hasattr(value, "tolist"):  # numpy
        value = value.tolist()
    if type(value).__name__ in {"NAType", "NaTType"}:
        return None
    if isinstance(value, float) and math.isnan(value):
        return None
    return value


def _examples_of(
    fields: Mapping[str, Any], columns: Columns | None, defaults: Mapping[str, Any]
) -> list[Example]:
    """The examples of one row: one per reference."""
    own = dict(fields) if columns is None else columns.applied(fields)
    if "text" in own:
        if "completion" in own or "prompt" in own or "messages" in own:
            raise ValueError("has a text and a prompt or completion; leave the text out")
        own |= {"prompt": "", "raw": True, "completion": own.pop("text")}
    elif "messages" in own and "completion" not in own:
        own |= _of_conversation(own["messages"])
    for name in ("user", "task"):
        if isinstance(own.get(name), (int, float)):
            own[name] = label_text(own[name])
    completions = own.get("completion")
    if isinstance(completions, (list, tuple)):
        if not completions:
            raise ValueError("completion is an empty list; give one text or several")
        return [Example(**{**defaults, **own, "completion": text}) for text in completions]
    return [Example(**{**defaults, **own})]


def _of_conversation(messages: Any) -> dict[str, Any]:
    """The fields of a conversation whose last message is to be learned.

    Raises:
        ValueError: If it does not end with the assistant's message, or uses tools.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or len(messages) < 2:
        raise ValueError("messages must be a list that ends with the assistant's message")
    plain = []
    for message in messages:
        role = message.get("role") if isinstance(message, Mapping) else None
        if role not in _ROLES or message.get("tool_calls") or message.get("function_call"):
            raise ValueError(
                f"a message has the role {role!r}; roles that can be learned from are: "
                f"{', '.join(_ROLES)}, without tool calls"
            )
        plain.append({"role": _ROLES[role], "content": _content(message.get("content"))})
    if plain[-1]["role"] != "assistant":
        raise ValueError("messages must end with the assistant's message, which is learned")
    return {"messages": plain[:-1], "completion": plain[-1]["content"]}


def _content(content: Any) -> Any:
    """A message's text, which may be given in parts."""
    if not isinstance(content, (list, tuple)):
        return content
    parts = [part for part in content if isinstance(part, Mapping)]
    if len(parts) < len(content) or any(part.get("type") != "text" for part in parts):
        raise ValueError("a message has parts that are no text")
    return "".join(chain.from_iterable(str(part.get("text", "")) for part in parts))
