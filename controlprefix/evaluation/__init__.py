"""What prefixes do, measured: judges, dials, and a report of control, cross-talk and fluency."""

from controlprefix.evaluation.dials import Calibration, calibrate, responses
from controlprefix.evaluation.harness import CurvePoint, EvaluationReport, evaluate
from controlprefix.evaluation.judges import Judge, filled_in

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
