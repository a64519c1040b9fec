"""Data files: JSON Lines of examples, users and labelled texts; plain text files."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from controlprefix.errors import TrainingDataError
from controlprefix.request import Example


def read_examples(path: str | Path, **defaults: Any) -> list[Example]:
    """Read the examples of a JSON Lines file; blank lines are skipped.

    Args:
        path: The file.
        **defaults: Fields for lines that do not have them, such as `task="email"`.

    Raises:
        TrainingDataError: If the file cannot be read, or with the line that is not an example.
    """
    examples = []
    for number, fields in _objects(path):
        try:
            examples.append(Example(**{**defaults, **fields}))
        except TrainingDataError as error:
            raise TrainingDataError(f"{path} line {number}: {error}") from error
    if not examples:
        raise TrainingDataError(f"{path} has no examples")
    return examples


def read_texts(paths: Sequence[str | Path]) -> list[str]:
    """Read plain text files, one text per line.

    Raises:
        TrainingDataError: If a file cannot be read, or none has a text.
    """
    texts = [line.strip() for path in paths for line in _lines(path) if line.strip()]
    if not texts:
        raise TrainingDataError(f"no text in {', '.join(map(str, paths))}")
    return texts


def read_users(path: str | Path) -> dict[str, list[str]]:
    """Read a JSON Lines file of `{"user": …, "text": …}`.

    Returns:
        Each user's texts, in order.

    Raises:
        TrainingDataError: If the file cannot be read, or with the line of another form.
    """
    users: dict[str, list[str]] = {}
    for number, fields in _objects(path):
        user, text = fields.get("user"), fields.get("text")
        if not isinstance(user, str) or not isinstance(text, str) or len(fields) != 2:
            raise TrainingDataError(
                f'{path} line {number}: not of the form {{"user": "ana", "text": "…"}}'
            )
        users.setdefault(user, []).append(text)
    if not users:
        raise TrainingDataError(f"{path} has no texts")
    return users


def read_labelled(path: str | Path) -> dict[str, list[tuple[str, str]]]:
    """Read a JSON Lines file of `{"text": …, "attributes": {"formality": "formal"}}`.

    Returns:
        Per attribute, texts with their label.

    Raises:
        TrainingDataError: If the file cannot be read, or with the line of another form.
    """
    labelled: dict[str, list[tuple[str, str]]] = {}
    for number, fields in _objects(path):
        text, attributes = fields.get("text"), fields.get("attributes")
        if not (
            isinstance(text, str)
            and isinstance(attributes, dict)
            and all(isinstance(label, str) for label in attributes.values())
        ):
            raise TrainingDataError(
                f'{path} line {number}: not of the form {{"text": "…", "attributes": '
                '{"formality": "formal"}}'
            )
        for attribute, label in attributes.items():
            labelled.setdefault(attribute, []).append((text, label))
    if not labelled:
        raise TrainingDataError(f"{path} has no labelled texts")
    return labelled


def _objects(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each line's number and JSON object; blank lines are skipped."""
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TrainingDataError(f"{path} line {number}: not JSON: {error}") from error
        if not isinstance(fields, dict):
            raise TrainingDataError(f"{path} line {number}: not a JSON object")
        yield number, fields


def _lines(path: str | Path) -> list[str]:
    """Lines end at \\n only, as in JSON Lines: other separators may occur inside a text."""
    try:
        return Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingDataError(f"cannot read {path}: {error}") from error
