"""Training prefixes: the same assembly and attention as in generation, with gradients."""

from controlprefix.training.initialization import Initialization, Initializations
from controlprefix.training.loop import train
from controlprefix.training.objectives import TrainingRow
from controlprefix.training.parameterization import ParameterizationName
from controlprefix.training.preparation import Learnable, require_examples
from controlprefix.training.run import TrainingReport
from controlprefix.training.settings import TrainingOptions, TrainingSettings
from controlprefix.training.shortening import ShorteningReport
from controlprefix.training.sweep import SweepPoint, SweepReport
from controlprefix.training.trainer import Trainer

__all__ = [
    "Initialization",
    "Initializations",
    "Learnable",
    "ParameterizationName",
    "ShorteningReport",
    "SweepPoint",
    "SweepReport",
    "Trainer",
    "TrainingOptions",
    "TrainingReport",
    "TrainingRow",
    "TrainingSettings",
    "require_examples",
    "train",
]
