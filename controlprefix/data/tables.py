"""Tables and facts as prompts: dicts, triples and rows of cells, in the papers' styles."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from typing import Any, Literal

from controlprefix.errors import TrainingDataError

TableStyle = Literal["brackets", "bars", "tags"]

_TAGS = re.compile(r"(?:<H> (.*?) )?<R> (.*?) <T> (.*?)(?: (?=<H> |<R> )|$)", re.DOTALL)
_BRACKETS = re.compile(r"\s*([^\[\],]+)\[([^\]]*)\]\s*(?:,|$)")


def linearize(table: Any, style: TableStyle | None = None) -> str:
    """A table, facts or a dict as one line of text.

    Args:
        table: A dict of names and values (a value may be a list; None is left out), a list of
            triples `[subject, relation, object]`, a list of pairs `[name, value]`, or a list of
            dicts with the same keys, which are the rows of a table.
        style: `brackets`: `name[The Vaults], food[French]`, as E2E writes its inputs; `bars`:
            `| Aarhus : leader : Jacob`, as Prefix-Tuning linearizes WebNLG and DART; `tags`:
            `<H> Aarhus <R> leader <T> Jacob`, as Control Prefixes does. Left out, `brackets` for
            names and values, and `bars` for triples.

    Returns:
        The line; underscores in the names of WebNLG become spaces in `bars` and `tags`. What
        separates facts is replaced inside them: in `brackets`, square brackets by round ones and
        commas in names by semicolons; in `bars`, `a : b` by `a: b`, and a bar by a slash.

    Raises:
        TrainingDataError: If it is none of these, or empty.

    Example:
        >>> linearize({"name": "The Vaults", "food": "French"})
        'name[The Vaults], food[French]'
        >>> linearize([["Aarhus", "leaderName", "Jacob_Bundsgaard"]])
        '| Aarhus : leaderName : Jacob Bundsgaard'
        >>> linearize([["Aarhus", "leaderName", "Jacob_Bundsgaard"]], "tags")
        '<H> Aarhus <R> leaderName <T> Jacob Bundsgaard'

    Reference:
        Novikova et al., 2017, https://arxiv.org/abs/1706.09254 (E2E); Li & Liang, 2021,
        https://arxiv.org/abs/2101.00190; Clive et al., 2021, https://arxiv.org/abs/2110.08329.
    """
    facts = list(_facts(table))
    if not facts:
        raise TrainingDataError("a table is empty; give at least one value")
    if style is None:
        style = "bars" if any(subject for subject, _, _ in facts) else "brackets"
    if style == "brackets":
        round_ones = str.maketrans("[]", "()")
        return ", ".join(
            f"{name.translate(round_ones).replace(',', ';')}[{value.translate(round_ones)}]"
            for _, name, value in facts
        )
    plain = [tuple(text.replace("_", " ") for text in fact) for fact in facts]
    if style == "bars":
        within = [tuple(map(_without_bars, fact)) for fact in plain]
        return " ".join(f"| {' : '.join(fact if fact[0] else fact[1:])}" for fact in within)
    if style == "tags":
        return " ".join(
            f"<H> {subject} <R> {name} <T> {value}" if subject else f"<R> {name} <T> {value}"
            for subject, name, value in plain
        )
    raise TrainingDataError(
        f"style is {style!r}, which does not exist; give brackets, bars or tags"
    )


def parse_table(text: str) -> dict[str, str | list[str]]:
    """The names and values of a line that `linearize` made, in any style.

    Several values of a name are a list. The subjects of facts are values of `subject`, once each.

    Raises:
        TrainingDataError: If the line has another style.

    Example:
        >>> parse_table("name[The Vaults], food[French], food[Thai]")
        {'name': 'The Vaults', 'food': ['French', 'Thai']}
        >>> parse_table("| Aarhus : leader : Jacob | Aarhus : river : Aarhus A")
        {'subject': 'Aarhus', 'leader': 'Jacob', 'river': 'Aarhus A'}
    """
    facts = _parsed_bars(text) or _parsed_tags(text)
    if not facts:
        return _parsed_brackets(text)
    values: dict[str, list[str]] = {}
    for subject, name, value in facts:
        if subject and subject not in values.setdefault("subject", []):
            values["subject"].append(subject)
        values.setdefault(name, []).append(value)
    return _single_values(values)


def _parsed_bars(text: str) -> list[tuple[str, str, str]]:
    """The facts of a line in the style `bars`; none if it has another one."""
    if not text.startswith("| "):
        return []
    facts = [fact.split(" : ") for fact in text[2:].split(" | ")]
    if not all(2 <= len(fact) <= 3 for fact in facts):
        return []
    return [(fact[0] if len(fact) == 3 else "", fact[-2], fact[-1]) for fact in facts]


def _parsed_tags(text: str) -> list[tuple[str, str, str]]:
    """The facts of a line in the style `tags`; none if it has another one."""
    facts = [(m[1] or "", m[2], m[3]) for m in _TAGS.finditer(text)]
    return facts if _TAGS.sub("", text) == "" else []


def _parsed_brackets(text: str) -> dict[str, str | list[str]]:
    values: dict[str, list[str]] = {}
    end = 0
    for match in _BRACKETS.finditer(text):
        if match.start() != end:
            break
        values.setdefault(match[1].strip(), []).append(match[2].strip())
        end = match.end()
    if end != len(text) or not values:
        raise TrainingDataError(
            f"{text[:60]!r} has another style than name[value], name[value], or triples in a style "
            "of linearize"
        )
    return _single_values(values)


def _single_values(values: Mapping[str, list[str]]) -> dict[str, str | list[str]]:
    return {name: own[0] if len(own) == 1 else own for name, own in values.items()}


def is_missing(value: Any) -> bool:
    """Whether a cell is what stands for no value in JSON, pandas or numpy."""
    if value is None or type(value).__name__ in {"NAType", "NaTType"}:
        return True
    return isinstance(value, Real) and math.isnan(value)


def is_table(value: Any) -> bool:
    """Whether a cell of a row holds a table or facts rather than a text."""
    if isinstance(value, Mapping):
        return True
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and all(isinstance(item, (Mapping, list, tuple)) for item in value)
    )


def _facts(table: Any) -> Iterator[tuple[str, str, str]]:
    """Subject (or nothing), name and value of each fact."""
    if isinstance(table, Mapping):
        for name, value in table.items():
            items = value if isinstance(value, (list, tuple)) else [value]
            for item in items:
                if is_missing(item):  # Arrow has a column for each name of any row
                    continue
                yield "", _cell(name), _cell(item)
        return
    if not isinstance(table, Sequence) or isinstance(table, str):
        raise TrainingDataError(f"a table is a dict or a list, not {type(table).__name__}")
    for row in table:
        if isinstance(row, Mapping):
            yield from _facts(row)
        elif isinstance(row, (list, tuple)) and len(row) in (2, 3):
            subject = _cell(row[0]) if len(row) == 3 else ""
            if not is_missing(row[-1]):
                yield subject, _cell(row[-2]), _cell(row[-1])
        else:
            raise TrainingDataError(
                f"a table has {row!r}, which is no dict, [name, value] or [subject, relation, "
                "object]"
            )


def _without_bars(text: str) -> str:
    """A text without colons and bars between spaces, which separate facts."""
    words: list[str] = []
    for word in text.split(" "):
        if word != ":":
            words.append("/" if word == "|" else word)
        elif words:
            words[-1] += ":"
    return " ".join(words)


def _cell(value: Any) -> str:
    """A cell as one line."""
    if hasattr(value, "tolist"):  # of numpy
        value = value.tolist()
    if isinstance(value, (Mapping, list, tuple)) or is_missing(value):
        raise TrainingDataError(f"a table has the cell {value!r}; cells are texts and numbers")
    return " ".join(str(value).split())


def require_triples(value: object) -> None:
    """Check that a value is a list of triples.

    Raises:
        TrainingDataError: If it is not.
    """
    for row in value if isinstance(value, (list, tuple)) else [value]:
        if not isinstance(row, (list, tuple)) or len(row) != 3:
            raise TrainingDataError(
                f"triples are lists of subject, relation and object, got {row!r:.60}"
            )
