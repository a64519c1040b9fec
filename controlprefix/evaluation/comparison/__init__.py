"""Ways to adapt one frozen model, trained and measured alike."""

from controlprefix.evaluation.comparison.compare import compare
from controlprefix.evaluation.comparison.report import ComparisonReport
from controlprefix.evaluation.comparison.runner import METHODS, require_methods

__all__ = ["METHODS", "ComparisonReport", "compare", "require_methods"]
