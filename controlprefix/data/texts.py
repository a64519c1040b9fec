"""Texts of one user, of many users, and texts with labels."""

import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

from controlprefix.data.files import decoded, has_records, read_bytes
from controlprefix.data.rows import Columns, Rows, as_examples
from controlprefix.errors import TrainingDataError, known_names
from controlprefix.example import Example
from controlprefix.labels import weighted_labels
from controlprefix.prefixes.key import composed

TextSplit = Literal["line", "paragraph", "file"]
UserTexts = Mapping[str, Sequence[str]] | Iterable[tuple[str, Sequence[str]]] | Rows

_MAX_PATH = 1024  # characters
_PARAGRAPH_END = re.compile(r"\n[ \t]*\n")


def read_texts(
    paths: str | Path | Sequence[str | Path],
    *,
    split: TextSplit = "line",
    columns: Columns | None = None,
    user: str | None = None,
) -> list[str]:
    """Read texts from plain text files, or from files of rows.

    Args:
        paths: Files; `-` is standard input. A file with the suffix of a format of rows (see
            `controlprefix.data.files`) is read as rows, and its texts or completions are taken.
        split: What is a text in a plain text file: each line, each paragraph (up to an empty
            line), or the whole file.
        columns: Which columns of rows hold what, if they have other names.
        user: Of rows that name users, take those of this one.

    Raises:
        TrainingDataError: If a file cannot be read, or there is no text.
    """
    if split not in get_args(TextSplit):
        raise TrainingDataError(f"split is {split!r}; it must be one of: line, paragraph, file")
    texts: list[str] = []
    paths = [paths] if isinstance(paths, (str, os.PathLike)) else paths
    for path in paths:
        if has_records(path) or columns is not None:
            texts += _texts_of_rows(path, columns, user)
        else:
            texts += _split(decoded(str(path), read_bytes(path)), split)
    if not texts:
        raise TrainingDataError(f"no text in {', '.join(map(str, paths))}")
    return texts


def as_texts(
    source: str | Sequence[str] | Rows, *, columns: Columns | None = None, user: str | None = None
) -> list[str]:
    """Texts from a text, a list of texts, a `Path`, or rows of any form.

    Args:
        source: What holds them.
        columns, user: As in `read_texts`.

    Raises:
        TrainingDataError: If it is none of those, or a str that names a file.
    """
    if isinstance(source, str):
        if len(source) < _MAX_PATH and "\n" not in source and os.path.isfile(source):
            raise TrainingDataError(
                f"{source!r} is a file: give its Path, pathlib.Path({source!r}), to read it; a str "
                "is a text, and a list holds texts"
            )
        return [source]
    if isinstance(source, os.PathLike):
        return read_texts([Path(source)], columns=columns, user=user)
    if isinstance(source, Mapping):  # one row, or splits
        source = [source]
    if isinstance(source, Iterable) and not hasattr(source, "columns"):
        source = list(source)
        if not any(isinstance(item, (Mapping, Example)) for item in source):
            return source
    return _texts_of_rows(source, columns, user)


def read_users(
    source: UserTexts, *, columns: Columns | None = None
) -> Mapping[str, Sequence[str]] | Iterable[tuple[str, Sequence[str]]]:
    """The texts of many users.

    Args:
        source: Texts per user, pairs of a user and their texts (which are not read here), or
            rows of any form that `as_examples` takes, each with its user.
        columns: Which columns of rows hold what, if they have other names.

    Returns:
        Each user's texts, in order; or the pairs.

    Raises:
        TrainingDataError: If the rows cannot be read, or one names no user.
    """
    if isinstance(source, Mapping):
        _require_different_names(source)
        return cast(Mapping[str, Sequence[str]], source)
    if isinstance(source, Iterator) or (isinstance(source, Iterable) and _has_pairs(source)):
        first, source = _peek(cast(Iterable[Any], source))
        if first is None or _is_pair(first):
            return cast(Iterable[tuple[str, Sequence[str]]], source)
    users: dict[str, list[str]] = {}
    for i, example in enumerate(as_examples(cast(Rows, source), columns=columns), 1):
        if example.user is None:
            raise TrainingDataError(
                f'{example.place(i)} names no user; a row is {{"user": "ana", "text": "…"}}'
            )
        users.setdefault(composed(example.user), []).append(example.completion)
    return users


def read_texts_by_user(
    source: Mapping[str, Sequence[str]] | Iterable[Any] | Rows, *, columns: Columns | None = None
) -> dict[str, Sequence[str]]:
    """All users' texts: see `read_users`.

    Raises:
        TrainingDataError: If the rows cannot be read, or a user comes twice.
    """
    texts = read_users(source, columns=columns)
    pairs = list(texts.items() if isinstance(texts, Mapping) else texts)
    _require_different_names(name for name, _ in pairs)
    return dict(pairs)


def _require_different_names(users: Iterable[str]) -> None:
    """Check that no name stands twice, also with its accents composed and decomposed.

    Raises:
        TrainingDataError: If one does.
    """
    spellings: dict[str, str] = {}
    for user in users:
        name = composed(user) if isinstance(user, str) else user
        if name in spellings:
            how = "" if spellings[name] == user else ", with accents written in two ways"
            raise TrainingDataError(
                f"user {name!r} comes twice{how}; give all texts of a user together"
            )
        spellings[name] = user


def read_labelled(
    rows: Rows, *, columns: Columns | None = None
) -> dict[str, list[tuple[str, str]]]:
    """Texts with labels, from rows of any form that `as_examples` takes.

    Args:
        rows: Such as a file of `{"text": "…", "attributes": {"formality": "formal"}}`.
        columns: Which columns hold what, if they have other names.

    Returns:
        Per attribute, texts with their label.

    Raises:
        TrainingDataError: If the rows cannot be read, have no labels, or mixtures of labels.
    """
    labelled: dict[str, list[tuple[str, str]]] = {}
    for i, example in enumerate(as_examples(rows, columns=columns), 1):
        for label in weighted_labels(example.attributes):
            if not isinstance(example.attributes[label.attribute], str):
                raise TrainingDataError(
                    f"{example.place(i)} has a mixture of {label.attribute!r}; give one label"
                )
            labelled.setdefault(label.attribute, []).append((example.completion, label.label))
    if not labelled:
        raise TrainingDataError("no row has a label of an attribute")
    return labelled


def _texts_of_rows(rows: Rows, columns: Columns | None, user: str | None) -> list[str]:
    examples = as_examples(rows, columns=columns)
    users = {example.user for example in examples} - {None}
    if user is not None and users:
        examples = [row for row in examples if row.user and composed(row.user) == composed(user)]
        if not examples:
            names = known_names(user, [str(name) for name in users])
            raise TrainingDataError(f"there are no rows of user {user!r}; there are: {names}")
    return [example.completion for example in examples]


def _split(text: str, split: TextSplit) -> list[str]:
    """The texts of a plain text; lines end at \\n only."""
    text = text.replace("\r\n", "\n")
    if split == "file":
        pieces = [text]
    else:
        pieces = text.split("\n") if split == "line" else _PARAGRAPH_END.split(text)
    return [piece.strip() for piece in pieces if piece.strip()]


def _has_pairs(source: Iterable[Any]) -> bool:
    if isinstance(source, (str, os.PathLike)) or not isinstance(source, Sequence):
        return False
    return not source or _is_pair(source[0])


def _is_pair(item: Any) -> bool:
    return (
        isinstance(item, (tuple, list)) and len(item) == 2 and not isinstance(item, (str, Example))
    )


def _peek(source: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    """The first item, and all items; a list stays a list."""
    if isinstance(source, Sequence):
        return (source[0] if source else None), source
    iterator = iter(source)
    first = next(iterator, None)
    return first, () if first is None else itertools.chain([first], iterator)
