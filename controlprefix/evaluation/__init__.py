"""What prefixes do, measured: attribute classifiers, calibrated dials, evaluation reports."""

from controlprefix.evaluation.best_texts import best_texts
from controlprefix.evaluation.calibration import Calibration, calibrate, strength_curve
from controlprefix.evaluation.classifier import AttributeClassifier, pseudo_label
from controlprefix.evaluation.harness import evaluate
from controlprefix.evaluation.metrics import Estimate
from controlprefix.evaluation.report import CurvePoint, EvaluationReport
from controlprefix.evaluation.revealed_groups import RevealedGroups
from controlprefix.evaluation.simplification import grade_level, sari
from controlprefix.evaluation.slot_errors import SlotErrors, slot_errors
from controlprefix.evaluation.users import evaluate_users
from controlprefix.evaluation.users_report import UserResult, UsersEvaluation

__all__ = [
    "AttributeClassifier",
    "Calibration",
    "CurvePoint",
    "Estimate",
    "EvaluationReport",
    "RevealedGroups",
    "SlotErrors",
    "UserResult",
    "UsersEvaluation",
    "best_texts",
    "calibrate",
    "evaluate",
    "evaluate_users",
    "grade_level",
    "pseudo_label",
    "sari",
    "slot_errors",
    "strength_curve",
]
