"""Data files: JSON Lines, an Example a line."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from controlprefix.errors import TrainingDataError
from controlprefix.request import Example


def read_examples(path: str | Path, **defaults: Any) -> list[Example]:
    """Read the examples of a JSON Lines file; blank lines are passed over.

    Args:
        path: Of the file.
        **defaults: Fields for lines that do not have them, such as `task="email"`.

    Raises:
        TrainingDataError: If the file cannot be read, or naming the line that is no example.
    """
    examples = []
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            if not isinstance(fields, dict):
                raise TrainingDataError("not a JSON object")
            examples.append(Example(**{**defaults, **fields}))
        except TrainingDataError as error:
            raise TrainingDataError(f"{path} line {number}: {error}") from error
        except (ValueError, RecursionError) as error:
            raise TrainingDataError(f"{path} line {number}: not JSON: {error}") from error
    if not examples:
        raise TrainingDataError(f"{path} has no examples")
    return examples


def read_texts(paths: Sequence[str | Path]) -> list[str]:
    """Read plain text files, a text a line.

    Raises:
        TrainingDataError: If a file cannot be read or none has a text.
    """
    texts = [line.strip() for path in paths for line in _lines(path) if line.strip()]
    if not texts:
        raise TrainingDataError(f"no text in {', '.join(map(str, paths))}")
    return texts


def _lines(path: str | Path) -> list[str]:
    """Lines end where JSON Lines end them; other separators may stand inside a text."""
    try:
        return Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingDataError(f"cannot read {path}: {error}") from error
