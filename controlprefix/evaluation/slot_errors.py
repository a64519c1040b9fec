"""Slot errors: values of a table that a text leaves out, and values that it invents."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from controlprefix.data.tables import is_missing
from controlprefix.errors import TrainingDataError
from controlprefix.evaluation.metrics import spaced

_NOT_SAID = {"yes", "no", "true", "false"}  # such values are said in other words


class SlotErrors(NamedTuple):
    """Errors of texts, counted over their tables.

    Attributes:
        missing: Share of the tables' values that their texts do not contain.
        invented: Values of other tables that texts contain and their own tables do not, per value
            of the tables.
        num_values: How many values were looked for.
    """

    missing: float
    invented: float
    num_values: int

    @property
    def rate(self) -> float:
        """Missing and invented values together."""
        return self.missing + self.invented


def slot_errors(texts: Sequence[str], tables: Sequence[Mapping[str, Any]]) -> SlotErrors:
    """Count missing and invented values by looking for them as they are written.

    Values that are yes or no are not looked for. A text that says a value in other words counts as
    an error, so compare the rate with that of references.

    Args:
        texts: A text per table.
        tables: Names and values, such as `controlprefix.data.parse_table` reads; a name may have
            several values. None is no value.

    Returns:
        The shares.

    Raises:
        TrainingDataError: If there is not one text per table, or no value to look for.

    Example:
        >>> tables = [{"name": "Vaults", "food": "French"}, {"name": "Loch", "food": "Thai"}]
        >>> slot_errors(["Vaults has Thai food.", "Loch serves Thai food."], tables)
        SlotErrors(missing=0.25, invented=0.25, num_values=4)

    Reference:
        Wen et al., 2015, https://arxiv.org/abs/1508.01745 (slot error rate).
    """
    if len(texts) != len(tables):
        raise TrainingDataError(f"{len(texts)} texts for {len(tables)} tables; give one each")
    values: dict[str, set[str]] = {}
    for table in tables:
        for name, value in _facts(table):
            if (plain := _plain(value)) and plain not in _NOT_SAID:
                values.setdefault(name, set()).add(plain)
    num_values = missing = invented = 0
    for text, table in zip(texts, tables, strict=True):
        words = f" {_plain(text)} "
        own = {_plain(value) for _, value in _facts(table)}
        for name, value in _facts(table):
            plain = _plain(value)
            if plain in values.get(name, ()):
                num_values += 1
                missing += f" {plain} " not in words
        counted: set[str] = set()  # a value may be one of several names
        for all_values in values.values():
            others = {v for v in all_values if not any(f" {v} " in f" {o} " for o in own)}
            written = {other for other in others if f" {other} " in words}
            new = written - counted
            # A value within another, such as "french" in "french food", is said once.
            invented += sum(not any(v != w and f" {v} " in f" {w} " for w in written) for v in new)
            counted |= written
    if not num_values:
        raise TrainingDataError("the tables have no values to look for")
    return SlotErrors(missing / num_values, invented / num_values, num_values)


def _facts(table: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Each name with each of its values."""
    for name, values in table.items():
        for value in values if isinstance(values, (list, tuple)) else [values]:
            if not is_missing(value):
                yield name, str(value)


def _plain(text: str) -> str:
    """Lower-case words and numbers, with single spaces."""
    return " ".join(re.findall(r"[^\W_]+|£", spaced(text.casefold())))
