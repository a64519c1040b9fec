"""How to learn: every number a run is asked with, checked."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self, get_args

from torch import Tensor

from controlprefix.errors import TrainingDataError, known_names
from controlprefix.prefixes.geometry import Site
from controlprefix.prefixes.prefix import Prefix
from controlprefix.store import PrefixKey
from controlprefix.training.parameterization import Parameterization, ParameterizationName

PARAMETERIZATIONS: tuple[str, ...] = get_args(ParameterizationName)


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """How to learn.

    Attributes:
        epochs: Passes over the training rows, unless `steps` is given.
        steps: Optimizer steps in all.
        batch_size: Rows a step, over all processes.
        micro_batch: Rows at a time on a device, where memory is short; the gradients of a
            step are added up. Left out, as many as there are.
        learning_rate: Of AdamW, at its highest: after a linear warm-up over the
            first tenth of the steps, before a cosine decay to a tenth. In units of the
            model's own keys and values (their root mean square, head by head). Left out,
            the one measured to be good for the parameterization.
        weight_decay: Of AdamW. Parameters are changes to the start, so it pulls there.
        max_grad_norm: Gradients are clipped to this norm.
        parameterization: How slots are produced while training, by name: see
            `controlprefix.training.parameterization`.
        width: Of the networks' hidden layers.
        slot_dropout: Chance of each slot to be left out of a step.
        freeze_first_slot: Leave each prefix's first slot as it begins, as a place for
            attention that has nowhere to go (a sink).
        contrast: Weight, from 0 to below 1, of making a label's text unlikely under the
            other labels of its attribute; the rest is that of making it likely under its own.
        validation: Fraction of the rows held out to choose the best step by; 0
            keeps the last step.
        evaluations: How often to look at the held-out rows.
        patience: Stop after so many looks without a better one.
        gradient_checkpointing: Compute activations again in the backward pass, for
            less memory and the same gradients.
        save_every: Steps between states written to a run's folder.
        seed: Of the split and the order of rows.
    """

    epochs: float = 3.0
    steps: int | None = None
    batch_size: int = 8
    micro_batch: int | None = None
    learning_rate: float | None = None
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    parameterization: ParameterizationName = "shared"
    width: int = 512
    slot_dropout: float = 0.0
    freeze_first_slot: bool = False
    contrast: float = 0.0
    validation: float = 0.1
    evaluations: int = 5
    patience: int | None = None
    gradient_checkpointing: bool = False
    save_every: int = 50
    seed: int = 0

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Self:
        """Settings by name.

        Raises:
            TrainingDataError: If there is none of that name, or a value is out of range.
        """
        known = {field.name for field in fields(cls)}
        for name in settings.keys() - known:
            raise TrainingDataError(
                f"unknown setting {name!r}; there are: {known_names(name, known)}"
            )
        return cls(**settings)

    def __post_init__(self) -> None:
        if self.parameterization not in PARAMETERIZATIONS:
            known = known_names(str(self.parameterization), PARAMETERIZATIONS)
            raise TrainingDataError(
                f"there is no parameterization {self.parameterization!r}; there are: {known}"
            )
        for name, kind, want in (
            ("steps", int, "a whole number"),
            ("micro_batch", int, "a whole number"),
            ("patience", int, "a whole number"),
            ("batch_size", int, "a whole number"),
            ("width", int, "a whole number"),
            ("evaluations", int, "a whole number"),
            ("save_every", int, "a whole number"),
            ("seed", int, "a whole number"),
            ("epochs", (int, float), "a number"),
            ("learning_rate", (int, float), "a number"),
            ("weight_decay", (int, float), "a number"),
            ("max_grad_norm", (int, float), "a number"),
            ("slot_dropout", (int, float), "a number"),
            ("contrast", (int, float), "a number"),
            ("validation", (int, float), "a number"),
        ):
            value = getattr(self, name)
            if value is None and name in _MAY_BE_LEFT_OUT:
                continue
            if not isinstance(value, kind):
                raise TrainingDataError(f"{name} is {value!r}; it must be {want}")
            ok, want = _RANGES[name]
            if not ok(value):
                raise TrainingDataError(f"{name} is {value}; it must be {want}")

    @property
    def rate(self) -> float:
        """The learning rate: the one asked for, or the one for the parameterization."""
        return self.learning_rate or _RATES[self.parameterization]

    def parameterized(
        self, start: Mapping[PrefixKey, Prefix], scale: Mapping[Site, Tensor]
    ) -> Parameterization:
        """Prefixes to learn, as they start."""
        return Parameterization(
            self.parameterization,
            start,
            scale,
            width=self.width,
            slot_dropout=self.slot_dropout,
            freeze_first_slot=self.freeze_first_slot,
            seed=self.seed,
        )

    def as_dict(self) -> dict[str, Any]:
        """By name, with the learning rate that is used."""
        return {**asdict(self), "learning_rate": self.rate}


_RATES = {"direct": 2e-2, "mlp": 5e-4, "shared": 5e-4, "shared-kv": 5e-4}
_MAY_BE_LEFT_OUT = ("steps", "micro_batch", "patience", "learning_rate")


def _above_0(value: float) -> bool:
    return 0 < value < math.inf


def _from_0_to_below_1(value: float) -> bool:
    return 0 <= value < 1


_RANGES = {
    **dict.fromkeys(
        ("steps", "micro_batch", "patience", "batch_size", "width", "evaluations", "save_every"),
        (_above_0, "above 0"),
    ),
    **dict.fromkeys(("epochs", "learning_rate", "max_grad_norm"), (_above_0, "above 0")),
    "weight_decay": (lambda value: 0 <= value < math.inf, "0 or more"),
    **dict.fromkeys(
        ("slot_dropout", "contrast", "validation"),
        (_from_0_to_below_1, "at least 0 and below 1"),
    ),
    "seed": (lambda value: 0 <= value < 1 << 63, "0 or more, and below 2**63"),
}
