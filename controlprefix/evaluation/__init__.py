"""What prefixes do, measured: judges, dials, and a report of control, cross-talk and fluency."""

from controlprefix.evaluation.dials import Calibration, Response, calibrate, responses
from controlprefix.evaluation.harness import EvaluationReport, evaluate
from controlprefix.evaluation.judges import Judge

__all__ = [
    "Calibration",
    "EvaluationReport",
    "Judge",
    "Response",
    "calibrate",
    "evaluate",
    "responses",
]
