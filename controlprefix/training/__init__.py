"""Learning prefixes: the same assembly and attention as in use, with gradients."""

from controlprefix.training.loop import TrainingReport, TrainingRow, TrainingSettings, train
from controlprefix.training.preparation import Learned, Start, prepare, require_examples

__all__ = [
    "Learned",
    "Start",
    "TrainingReport",
    "TrainingRow",
    "TrainingSettings",
    "prepare",
    "require_examples",
    "train",
]
