"""Markdown tables of results."""

from collections.abc import Mapping, Sequence

Column = tuple[str, str, int]  # key, title, decimal places


def table(first: str, rows: Mapping[str, Mapping[str, float]], columns: Sequence[Column]) -> str:
    """A table with a line per row; values that a row lacks are left empty.

    Columns that no row has are left out.
    """
    columns = [c for c in columns if any(c[0] in values for values in rows.values())]
    lines = [header(first, *(title for _, title, _ in columns))]
    for name, values in rows.items():
        cells = [f"{values[key]:,.{d}f}" if key in values else "" for key, _, d in columns]
        lines.append(line(name, *cells))
    return "\n".join(lines)


def header(*titles: str) -> str:
    """The first two lines of a table."""
    return f"{line(*titles)}\n|{' --- |' * len(titles)}"


def line(*cells: str) -> str:
    """One line of a table."""
    return f"| {' | '.join(cells)} |"
