"""Training prefixes: the same assembly and attention as in generation, with gradients."""

from typing import TYPE_CHECKING

from controlprefix._lazy import lazy_exports

if TYPE_CHECKING:
    from controlprefix.training.control import Callback, RunControl, StepInfo
    from controlprefix.training.feedback_trainer import FeedbackTrainer
    from controlprefix.training.initialization import Initialization, Initializations
    from controlprefix.training.loop import train
    from controlprefix.training.objectives import TrainingRow
    from controlprefix.training.policy import Reward
    from controlprefix.training.preparation import Learnable
    from controlprefix.training.report import TrainingReport
    from controlprefix.training.settings import (
        ParameterizationName,
        PolicySettings,
        PreferenceOptions,
        PreferenceSettings,
        ReinforcementOptions,
        TrainingOptions,
        TrainingSettings,
    )
    from controlprefix.training.shortening import ShorteningReport
    from controlprefix.training.sweep import SweepPoint, SweepReport
    from controlprefix.training.trainable import PrefixModel
    from controlprefix.training.trainer import Trainer

_HOMES = {
    "Callback": "control",
    "RunControl": "control",
    "StepInfo": "control",
    "FeedbackTrainer": "feedback_trainer",
    "Initialization": "initialization",
    "Initializations": "initialization",
    "Learnable": "preparation",
    "ParameterizationName": "settings",
    "PolicySettings": "settings",
    "PreferenceOptions": "settings",
    "PreferenceSettings": "settings",
    "PrefixModel": "trainable",
    "ReinforcementOptions": "settings",
    "Reward": "policy",
    "ShorteningReport": "shortening",
    "SweepPoint": "sweep",
    "SweepReport": "sweep",
    "Trainer": "trainer",
    "TrainingOptions": "settings",
    "TrainingReport": "report",
    "TrainingRow": "objectives",
    "TrainingSettings": "settings",
    "train": "loop",
}

__all__ = [
    "Callback",
    "FeedbackTrainer",
    "Initialization",
    "Initializations",
    "Learnable",
    "ParameterizationName",
    "PolicySettings",
    "PreferenceOptions",
    "PreferenceSettings",
    "PrefixModel",
    "ReinforcementOptions",
    "Reward",
    "RunControl",
    "ShorteningReport",
    "StepInfo",
    "SweepPoint",
    "SweepReport",
    "Trainer",
    "TrainingOptions",
    "TrainingReport",
    "TrainingRow",
    "TrainingSettings",
    "train",
]

__getattr__ = lazy_exports(__name__, _HOMES)
