"""Reports as HTML pages of one look: results, plots, texts, and what they were made with."""

from controlprefix.reports.page import figure_of, render, to_png, write_report
from controlprefix.reports.provenance import provenance
from controlprefix.reports.words import Interval, comparison_in_words, few_rows_note

__all__ = [
    "Interval",
    "comparison_in_words",
    "few_rows_note",
    "figure_of",
    "provenance",
    "render",
    "to_png",
    "write_report",
]
