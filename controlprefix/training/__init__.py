"""Learning prefixes: the same assembly and attention as in use, with gradients."""

from controlprefix.training.initialization import typical_size
from controlprefix.training.loop import train
from controlprefix.training.objectives import TrainingRow
from controlprefix.training.parameterization import ParameterizationName
from controlprefix.training.preparation import (
    Given,
    Learned,
    Start,
    require_examples,
)
from controlprefix.training.run import TrainingReport
from controlprefix.training.settings import TrainingSettings
from controlprefix.training.shortening import ShorteningReport
from controlprefix.training.sweep import SweepPoint, SweepReport
from controlprefix.training.trainer import Trainer, instructed, to_distill

__all__ = [
    "Given",
    "Learned",
    "ParameterizationName",
    "ShorteningReport",
    "Start",
    "SweepPoint",
    "SweepReport",
    "Trainer",
    "TrainingReport",
    "TrainingRow",
    "TrainingSettings",
    "instructed",
    "require_examples",
    "to_distill",
    "train",
    "typical_size",
]
