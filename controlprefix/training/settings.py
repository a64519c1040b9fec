"""TrainingSettings: the hyperparameters of a run, validated."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from controlprefix.data import Rows
from controlprefix.errors import TrainingDataError, validation_message
from controlprefix.prefixes import Form
from controlprefix.training.control import RunOptions

ParameterizationName = Literal["direct", "mlp", "shared", "shared-kv"]
TooLong = Literal["refuse", "cut", "skip"]

_PositiveInt = Annotated[int, Field(ge=1)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Fraction = Annotated[float, Field(ge=0, lt=1)]

_DEFAULT_LEARNING_RATES = {"direct": 2e-2, "mlp": 5e-4, "shared": 5e-4, "shared-kv": 5e-4}


@dataclass(
    frozen=True,
    config=ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True),
)
class TrainingSettings:
    """Hyperparameters of a training run. Make one with `from_options`."""

    epochs: _Positive = 3.0
    """Passes over the training rows, unless `steps` is given."""

    steps: _PositiveInt | None = None
    """Optimizer steps in total."""

    batch_size: _PositiveInt = 8
    """Rows per step, over all processes."""

    micro_batch_size: _PositiveInt | None = None
    """Rows per forward pass on a device, if memory is short; gradients are accumulated."""

    learning_rate: _Positive | None = None
    """Peak learning rate of AdamW, after a linear warm-up over the first tenth of the steps and
    before a cosine decay to a tenth, in units of the size of the model's own keys and values.
    Left out, the tested default of the parameterization."""

    weight_decay: _NonNegative = 0.0
    """Weight decay of AdamW, towards the initialization."""

    max_grad_norm: _Positive = 1.0
    """Norm to which gradients are clipped."""

    parameterization: ParameterizationName = "shared"
    """How slots are produced during training (see `controlprefix.training.parameterization`)."""

    form: Form = "joint"
    """The form of new prefixes: one softmax over their slots and the tokens, or one of their own
    (see `Prefix`); stored and given ones keep theirs."""

    hidden_size: _PositiveInt = 512
    """Size of the networks' hidden layers."""

    slot_dropout: _Fraction = 0.0
    """Probability of leaving a slot out of a step."""

    nested: bool = False
    """Leave the last slots out of some steps, at random, so that the first ones serve alone at any
    number: see `Prefix.first`; as in Matryoshka representation learning (Kusupati et al., 2022,
    https://arxiv.org/abs/2205.13147)."""

    contrast: _Fraction = 0.0
    """Weight, from 0 to below 1, of making a label's text unlikely under the other labels of its
    attribute."""

    off_context: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Share of the target tokens, 0 to 0.5, on which the model should stay as it is without the
    trained prefixes: its own answers to general prompts."""

    validation: _Fraction = 0.1
    """Fraction of the rows held out to choose the best step, by prompt and by user; 0 keeps the
    last step."""

    too_long: TooLong = "refuse"
    """What to do with rows that do not fit the model's context: refuse them all, cut them (the
    end of the prompt or of the completion), or skip them."""

    num_evaluations: _PositiveInt = 5
    """Validation passes during a run, beside the one before the first step."""

    patience: _PositiveInt | None = None
    """Early stopping after this many validation passes without improvement."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, the same gradients. Other threads
    must not use the same model meanwhile: transformers switches its KV cache off."""

    save_steps: _PositiveInt = 50
    """Steps between checkpoints."""

    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    """Seed of the split, the order of rows, networks' weights, slot dropout and sampled texts."""

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """Make settings from options by name.

        Raises:
            TrainingDataError: If an option does not exist, or is out of range.
        """
        try:
            return cls(**options)
        except ValidationError as error:
            names = [field.name for field in fields(cls)]
            message = validation_message(error, names, "a training run", show_values=True)
            raise TrainingDataError(message) from None

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate asked for, or the default of the parameterization."""
        return self.learning_rate or _DEFAULT_LEARNING_RATES[self.parameterization]

    def to_dict(self) -> dict[str, Any]:
        """All settings by name, with the learning rate that is used."""
        return {**asdict(self), "learning_rate": self.peak_learning_rate}


@dataclass(
    frozen=True,
    config=ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True),
)
class PreferenceSettings:
    """Hyperparameters of learning from preferences. Make one with `split_off`."""

    beta: _Positive = 0.1
    """DPO's β: what the log-likelihood margin over the reference, in nats, is multiplied by."""

    likelihood_weight: _NonNegative = 0.1
    """Weight of the negative log-likelihood of chosen completions, which keeps them likely."""

    reference: Literal["start", "plain"] = "start"
    """What a completion's likelihood is compared with: the same request under the prefixes at the
    run's start, or without those that are trained."""

    @classmethod
    def split_off(cls, options: Mapping[str, Any]) -> tuple[Self, dict[str, Any]]:
        """The settings among some options, and the other options.

        Raises:
            TrainingDataError: If a value is out of range.
        """
        return split_settings(cls, options, "learning from preferences")


@dataclass(
    frozen=True,
    config=ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True),
)
class PolicySettings:
    """Hyperparameters of reinforcement learning. Make one with `split_off`."""

    num_samples: Annotated[int, Field(ge=2)] = 4
    """Samples per request and step; each is compared with the mean of the others."""

    kl: _NonNegative = 0.05
    """Weight of the KL divergence (nats per token) from the reference."""

    reference: Literal["start", "plain"] = "start"
    """What the divergence is from: the same request under the prefixes at the run's start, or
    without those that are trained."""

    diversity: _NonNegative = 1.0
    """Weight of a further reward: the share of a sample's token pairs (bigrams) that no other
    sample of the step has."""

    demonstration_weight: _NonNegative = 0.1
    """Weight of the negative log-likelihood of demonstrations, if there are any."""

    demonstrated: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of a step's requests that are replaced by demonstrations' own, of which one sample
    starts with the first part of the demonstration (Prefix-RFT)."""

    @classmethod
    def split_off(cls, options: Mapping[str, Any]) -> tuple[Self, dict[str, Any]]:
        """The settings among some options, and the other options.

        Raises:
            TrainingDataError: If a value is out of range.
        """
        return split_settings(cls, options, "reinforcement learning")


_Settings = TypeVar("_Settings")


def split_settings(
    settings_class: type[_Settings], options: Mapping[str, Any], what: str
) -> tuple[_Settings, dict[str, Any]]:
    """The settings of a pydantic dataclass among some options, and the other options.

    Raises:
        TrainingDataError: If a value is out of range.
    """
    names = list(settings_class.__dataclass_fields__)  # type: ignore[attr-defined]  # a dataclass
    own = {name: value for name, value in options.items() if name in names}
    try:
        settings = settings_class(**own)
    except ValidationError as error:
        message = validation_message(error, names, what, show_values=True)
        raise TrainingDataError(message) from None
    return settings, {name: value for name, value in options.items() if name not in names}


class TrainingOptions(RunOptions, total=False):
    """Keyword arguments of the training functions: `TrainingSettings` and `RunControl`."""

    epochs: float
    steps: int | None
    batch_size: int
    micro_batch_size: int | None
    learning_rate: float | None
    weight_decay: float
    max_grad_norm: float
    parameterization: ParameterizationName
    form: Form
    hidden_size: int
    slot_dropout: float
    nested: bool
    contrast: float
    off_context: float
    validation: float | Rows  # rows where examples are trained on, not texts of users
    too_long: TooLong
    num_evaluations: int
    patience: int | None
    gradient_checkpointing: bool
    save_steps: int
    seed: int


class PreferenceOptions(TrainingOptions, total=False):
    """Keyword arguments of `train_preferences`: `PreferenceSettings` and those of training."""

    beta: float
    likelihood_weight: float
    reference: Literal["start", "plain"]


class ReinforcementOptions(TrainingOptions, total=False):
    """Keyword arguments of `reinforce`: `PolicySettings` and those of the training functions."""

    num_samples: int
    kl: float
    reference: Literal["start", "plain"]
    diversity: float
    demonstration_weight: float
    demonstrated: float
