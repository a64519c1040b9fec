"""Ways to adapt one frozen model, trained and measured alike."""

from controlprefix.evaluation.comparison.compare import METHODS, compare
from controlprefix.evaluation.comparison.report import ComparisonReport

__all__ = ["METHODS", "ComparisonReport", "compare"]
