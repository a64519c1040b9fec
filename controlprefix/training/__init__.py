"""Learning prefixes: the same assembly and attention as in use, with gradients."""

from controlprefix.training.loop import TrainingBatchRow, TrainingReport, TrainingSettings, train
from controlprefix.training.parameters import DirectSlots

__all__ = ["DirectSlots", "TrainingBatchRow", "TrainingReport", "TrainingSettings", "train"]
