"""Rows of any form -> examples."""

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from controlprefix.data.files import Record, read_records
from controlprefix.data.messages import (
    is_conversation,
    listed,
    plain_messages,
)
from controlprefix.data.tables import is_missing, is_table, linearize, require_triples
from controlprefix.errors import TrainingDataError, known_names, shortened
from controlprefix.example import Example, Preference
from controlprefix.labels import label_text
from controlprefix.request import Request

# Examples, dicts, a path, a `datasets.Dataset`, or a DataFrame of pandas or polars.
Rows = Iterable[Any] | str | os.PathLike[str]

_TABLES = ("table", "triples")  # in place of a prompt
_OWN_FIELDS = {
    Preference: {*Preference.model_fields, *_TABLES},
    Example: {*Example.model_fields, *_TABLES, "text"},
    Request: {*Example.model_fields, *_TABLES, "text"},
}
_RENAMED = ("text", "prompt", "completion", "user", "task")
_INSTEAD_OF = {  # what may be in place of a column that is named
    "text": {"prompt", "messages", "prompt_ids", "completion", *_TABLES},
    "prompt": {"text", "messages", "prompt_ids", *_TABLES},
    "completion": {"text"},
}
_PREFERENCE_FORM = (
    '{"prompt": "…", "chosen": "…", "rejected": "…"}, each with "task", "attributes" and "user" '
    "as needed"
)
_FORMS = (
    '{"prompt": "…", "completion": "…"}, {"text": "…"} or {"messages": […]}, each with "task", '
    '"attributes" and "user" as needed'
)


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns of rows hold what, where they are not named like the fields of an example.

    Columns that are no fields of an example are ignored, unless only `task` is named here; so are
    those that would be in place of what is named, such as `messages` beside a named prompt.

    Attributes:
        text: A text without a prompt, to be learned as a whole.
        prompt: Column of prompts.
        completion: Column of completions.
        user: Column of the names of users.
        task: Column of tasks.
        attributes: Per attribute, the column of its labels.
    """

    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    user: str | None = None
    task: str | None = None
    attributes: Mapping[str, str] = field(default_factory=dict)

    @property
    def named(self) -> set[str]:
        """All columns that are named here."""
        names = (getattr(self, name) for name in _RENAMED)
        return {name for name in names if name is not None} | {*self.attributes.values()}

    def applied(self, fields: Mapping[str, Any], row_type: type[Request]) -> dict[str, Any]:
        """A row's fields under the names of the fields of examples, requests or preferences."""
        names = [name for name in _RENAMED if getattr(self, name) is not None]
        columns = {name: getattr(self, name) for name in names}
        taken = self.named
        result = {name: value for name, value in fields.items() if name not in taken}
        if self.attributes or set(names) - {"task"}:
            result = {k: v for k, v in result.items() if k in _OWN_FIELDS[row_type]}
        for name in names:
            result = {k: v for k, v in result.items() if k not in _INSTEAD_OF.get(name, ())}
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
    - `table` or `triples` in place of `prompt`: see `controlprefix.data.linearize`;
    - `messages` that end with the assistant's, as for OpenAI's fine-tuning: that one is learned.

    Args:
        rows: A list of rows, a `datasets.Dataset`, a DataFrame, or the path of a file (see
            `controlprefix.data.files`).
        columns: Which columns hold what, if they have other names.
        defaults: Fields for rows that do not have them, such as `{"task": "email"}`.

    Raises:
        TrainingDataError: With all rows that are no examples, or if there are no rows.
    """
    return _read(rows, columns, defaults or {}, Example)


def as_requests(
    rows: Rows, *, columns: Columns | None = None, defaults: Mapping[str, Any] | None = None
) -> list[Request]:
    """Rows of any form as requests.

    A row is a `Request`, or a mapping as for `as_examples` that may lack the completion. One
    with a completion is an `Example`.

    Args:
        rows, columns, defaults: As in `as_examples`.

    Raises:
        TrainingDataError: With all rows that are no requests, or if there are no rows.
    """
    return _read(rows, columns, defaults or {}, Request)


def as_preferences(
    rows: Rows, *, columns: Columns | None = None, defaults: Mapping[str, Any] | None = None
) -> list[Preference]:
    """Rows of any form as preferences.

    A row is a `Preference`, or a mapping with `prompt` (or `messages`), `chosen` and `rejected`,
    as TRL has them; these two may be conversations that end with the assistant's message.

    Args:
        rows, columns, defaults: As in `as_examples`.

    Raises:
        TrainingDataError: With all rows that are no preferences, or if there are no rows.
    """
    return _read(rows, columns, defaults or {}, Preference)


_Row = TypeVar("_Row", bound=Request)
_NAMES = {Request: "a Request", Example: "an Example", Preference: "a Preference"}


def _read(
    rows: Rows, columns: Columns | None, defaults: Mapping[str, Any], row_type: type[_Row]
) -> list[_Row]:
    """The rows of any source as examples, or as requests."""
    read: list[_Row] = []
    problems: list[str] = []
    records = list(_records(rows))
    if columns is not None:
        existing = {name for row in records if isinstance(row, Record) for name in row.fields}
        if existing:
            columns.require_in(existing, has_task="task" in defaults)
    for number, row in enumerate(records, 1):
        if isinstance(row, row_type):
            missing = {n: v for n, v in defaults.items() if getattr(row, n) is None}
            read.append(row.model_copy(update=missing) if missing else row)
            continue
        try:
            if isinstance(row, Request):
                raise ValueError(f"expected {_NAMES[row_type]} or a dict, got {type(row).__name__}")
            if row.problem:
                raise ValueError(row.problem)
            own = _rows_of(_without_gaps(row.fields), columns, defaults, row_type)
            read += [example.from_source(row.place) for example in own]
        except (ValueError, TypeError) as error:  # TrainingDataError is a ValueError
            place = row.place(number) if isinstance(row, Request) else row.place
            problems.append(f"{place}: {error}")
    if problems:
        many = f"{len(problems)} rows cannot be used:\n" if len(problems) > 1 else ""
        forms = _PREFERENCE_FORM if row_type is Preference else _FORMS
        raise TrainingDataError(f"{many}{shortened(problems, chr(10))}\nA row is {forms}")
    if not read:
        source = rows if isinstance(rows, (str, os.PathLike)) else "the list of rows"
        raise TrainingDataError(f"{source} has no examples")
    return read


def _records(rows: Rows) -> Iterator[Request | Record]:
    """The rows of any source, each with its place.

    Raises:
        TrainingDataError: If it is no source of rows.
    """
    if isinstance(rows, (str, os.PathLike)):
        yield from read_records(os.fspath(rows))
        return
    if isinstance(rows, Request):
        name = type(rows).__name__
        raise TrainingDataError(f"expected a list of rows, got one {name}; put it into a list")
    if isinstance(rows, Mapping):
        splits = shortened([repr(name) for name in rows])
        raise TrainingDataError(f"expected rows, got a mapping of {splits}; give one of its values")
    class_names = _class_names(rows)
    for number, row in enumerate(_iterable(rows), 1):
        if isinstance(row, (Request, Record)):
            yield row
        elif isinstance(row, Mapping):
            fields = {str(name): value for name, value in row.items()}
            yield Record(f"row {number}", {**fields, **class_names(fields)})
        else:
            problem = f"expected an Example or a dict, got {type(row).__name__}"
            yield Record(f"row {number}", {}, problem)


def _iterable(rows: Any) -> Iterable[Any]:
    """The rows of a list, or of an object that is recognized by its methods."""
    if hasattr(rows, "to_dicts"):  # polars
        return list(rows.to_dicts())
    if hasattr(rows, "to_pylist"):  # pyarrow
        return list(rows.to_pylist())
    if hasattr(rows, "to_dict") and hasattr(rows, "columns"):  # pandas
        repeated = [str(name) for name, count in Counter(rows.columns).items() if count > 1]
        if repeated:
            raise TrainingDataError(f"two columns are named {repeated[0]!r}")
        return list(rows.to_dict("records"))
    if hasattr(rows, "features") and hasattr(rows, "with_format"):  # datasets
        rows = rows.with_format(None)
    if not isinstance(rows, Iterable):
        raise TrainingDataError(f"expected rows, got {type(rows).__name__}; give a list of rows")
    return rows


def _class_names(rows: Any) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """What names the classes that a `datasets.Dataset` holds as numbers."""
    features = getattr(rows, "features", None)
    names: dict[str, Sequence[str]] = {
        column: feature.names
        for column, feature in (features.items() if isinstance(features, Mapping) else ())
        if hasattr(feature, "int2str")
    }

    def named(fields: Mapping[str, Any]) -> dict[str, Any]:
        numbers = {column: fields[column] for column in names if fields.get(column) is not None}
        # A class that is not known is -1.
        return {c: names[c][number] if number >= 0 else None for c, number in numbers.items()}

    return named


def _without_gaps(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A row without cells that have no value, also among its attributes."""
    plain = {name: _plain(value) for name, value in fields.items() if not is_missing(value)}
    for name in ("attributes", "strengths", "schedules", "chat_template_kwargs", "logit_bias"):
        if isinstance(plain.get(name), Mapping):
            plain[name] = _without_missing(plain[name])
    return plain


def _without_missing(values: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping without keys that have no value, as Arrow gives all keys to each row."""
    own: dict[str, Any] = {}
    for name, value in values.items():
        if is_missing(value):
            continue
        if isinstance(value, Mapping):  # a mixture of labels
            inner = {key: weight for key, weight in value.items() if not is_missing(weight)}
            if value and not inner:
                continue
            value = inner
        own[name] = value
    return own


def _plain(value: Any) -> Any:
    """A cell with lists in place of arrays, which pandas has of Parquet's lists."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return value


def _rows_of(
    fields: Mapping[str, Any],
    columns: Columns | None,
    defaults: Mapping[str, Any],
    row_type: type[_Row],
) -> list[_Row]:
    """The examples of one row, one per reference; or a request, if it has no completion."""
    own = dict(fields) if columns is None else columns.applied(fields, row_type)
    if own.get("images") is not None:
        own["images"] = listed(own["images"])
    if row_type is Preference:
        own = _preference_fields(own)
    if row_type is not Preference and is_conversation(own.get("completion")):
        own["completion"] = _answer(own["completion"])
    if "text" in own:
        if "completion" in own or "prompt" in own or "messages" in own:
            raise ValueError("has a text and a prompt or completion; leave the text out")
        own |= {"prompt": "", "raw": True, "completion": own.pop("text")}
    elif row_type is not Preference and is_conversation(own.get("prompt")):
        if "messages" in own:
            raise ValueError("has messages and a prompt of messages; leave one of them out")
        own["messages"] = plain_messages(own.pop("prompt"))
    elif "messages" in own and row_type is not Preference:
        messages = plain_messages(own["messages"])
        own["messages"] = messages
        is_answered = len(messages) > 1 and messages[-1]["role"] == "assistant"
        if row_type is not Example and own.get("continue_final_message"):
            is_answered = False  # a beginning
        if "completion" not in own and (is_answered or row_type is Example):
            if not is_answered:
                raise ValueError("messages must end with the assistant's message, which is learned")
            own |= {"messages": messages[:-1], "completion": messages[-1]["content"]}
    for name in _TABLES:
        if name in own:
            if "prompt" in own:
                raise ValueError(f"has a prompt and {name}; leave one of them out")
            if name == "triples":
                require_triples(own[name])
            own["prompt"] = linearize(own.pop(name))
    if row_type is not Preference and is_table(own.get("prompt")):
        own["prompt"] = linearize(own["prompt"])
    for name in ("user", "task"):
        if isinstance(own.get(name), (int, float)):
            own[name] = label_text(own[name])
    completions = own.get("completion")
    if isinstance(completions, (list, tuple)):
        if not completions:
            raise ValueError("completion is an empty list; give one text or several")
        return [cast(_Row, Example(**{**defaults, **own, "completion": t})) for t in completions]
    if row_type is Preference or ("completion" not in own and row_type is not Example):
        return [row_type(**{**defaults, **own})]
    return [cast(_Row, Example(**{**defaults, **own}))]


def _answer(messages: Any) -> Any:
    """The text of a completion that is a message, as TRL has it.

    Raises:
        ValueError: If it is not one message of the assistant.
    """
    answer, *others = plain_messages(messages)
    if others or answer["role"] != "assistant":
        raise ValueError("a completion of messages must be one message, the assistant's")
    return answer["content"]


def _preference_fields(own: dict[str, Any]) -> dict[str, Any]:
    """A preference's fields, where its texts may be conversations.

    Raises:
        ValueError: If the conversations differ before their last messages.
    """
    if "messages" in own:
        own = {**own, "messages": plain_messages(own["messages"])}
    if isinstance(own.get("prompt"), (list, tuple)):
        own = {**own, "messages": plain_messages(own["prompt"])}
        del own["prompt"]
    own, answers = dict(own), dict[str, Any]()
    for name in ("chosen", "rejected"):
        if not isinstance(own.get(name), (list, tuple)):
            continue
        if not own[name]:
            raise ValueError(f"{name} is an empty list; give a text, or messages")
        *before, last = plain_messages(own[name])
        if last["role"] != "assistant":
            raise ValueError(f"{name} must end with the assistant's message")
        if before:
            # Some data sets repeat the user's message as the prompt, or the whole conversation.
            if own.get("prompt") in [message["content"] for message in before]:
                del own["prompt"]
            if own.get("messages") == plain_messages(own["chosen"]) != before:
                own["messages"] = before
            if own.setdefault("messages", before) != before:
                raise ValueError(
                    "chosen, rejected and the prompt differ before their last messages"
                )
        answers[name] = last["content"]
    return own | answers
