"""Ways to adapt one frozen model, trained and measured alike."""

from controlprefix.evaluation.comparison.compare import compare
from controlprefix.evaluation.comparison.method_runner import METHODS, require_methods
from controlprefix.evaluation.comparison.report import ComparisonReport

__all__ = ["METHODS", "ComparisonReport", "compare", "require_methods"]
