"""Data: files, data frames and lists of rows -> examples and texts."""

from controlprefix.data.ratios import control_ratios, with_ratios
from controlprefix.data.rows import (
    Columns,
    Rows,
    as_examples,
    as_preferences,
    as_requests,
)
from controlprefix.data.summary import DataSummary, summarize
from controlprefix.data.tables import linearize, parse_table
from controlprefix.data.texts import (
    TextSplit,
    UserTexts,
    as_texts,
    read_labelled,
    read_texts,
    read_texts_by_user,
    read_users,
)

__all__ = [
    "Columns",
    "DataSummary",
    "Rows",
    "TextSplit",
    "UserTexts",
    "as_examples",
    "as_preferences",
    "as_requests",
    "as_texts",
    "control_ratios",
    "linearize",
    "parse_table",
    "read_labelled",
    "read_texts",
    "read_texts_by_user",
    "read_users",
    "summarize",
    "with_ratios",
]
