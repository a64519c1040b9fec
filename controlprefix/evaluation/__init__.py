"""What prefixes do, measured: judges, dials, and a report of control, cross-talk and fluency."""

from controlprefix.evaluation.calibration import Calibration, calibrate, responses
from controlprefix.evaluation.classifier import Judge, filled_in
from controlprefix.evaluation.harness import CurvePoint, EvaluationReport, evaluate

__all__ = [
    "Calibration",
    "CurvePoint",
    "EvaluationReport",
    "Judge",
    "calibrate",
    "evaluate",
    "filled_in",
    "responses",
]
