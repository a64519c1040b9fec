"""Training prefixes: the same assembly and attention as in generation, with gradients."""

from typing import TYPE_CHECKING

from controlprefix._lazy import lazy_exports

if TYPE_CHECKING:
    from controlprefix.training.initialization import Initialization, Initializations
    from controlprefix.training.loop import train
    from controlprefix.training.objectives import TrainingRow
    from controlprefix.training.preparation import Learnable, require_examples
    from controlprefix.training.run import TrainingReport
    from controlprefix.training.settings import (
        ParameterizationName,
        TrainingOptions,
        TrainingSettings,
    )
    from controlprefix.training.shortening import ShorteningReport
    from controlprefix.training.sweep import SweepPoint, SweepReport
    from controlprefix.training.trainer import Trainer

_HOMES = {
    "Initialization": "initialization",
    "Initializations": "initialization",
    "Learnable": "preparation",
    "ParameterizationName": "settings",
    "ShorteningReport": "shortening",
    "SweepPoint": "sweep",
    "SweepReport": "sweep",
    "Trainer": "trainer",
    "TrainingOptions": "settings",
    "TrainingReport": "run",
    "TrainingRow": "objectives",
    "TrainingSettings": "settings",
    "require_examples": "preparation",
    "train": "loop",
}

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

__getattr__ = lazy_exports(__name__, _HOMES)
