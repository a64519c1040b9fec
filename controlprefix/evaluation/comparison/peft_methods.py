"""Methods of PEFT, alone and together with a prefix."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from torch import Tensor, nn

from controlprefix._io import requires_extra
from controlprefix.engine import ControlPrefix
from controlprefix.evaluation.comparison.adapters import AdapterMethod
from controlprefix.evaluation.comparison.methods import (
    NUM_ADAPTATIONS,
    ComparisonSetup,
    ControlPrefixMethod,
)
from controlprefix.example import Example
from controlprefix.model import FrozenModel
from controlprefix.model.tokenization import TokenizedExample
from controlprefix.prefixes import Part, Prefix
from controlprefix.store import PrefixStore


def peft_package() -> Any:
    """The package peft.

    Raises:
        MissingDependencyError: If it is not installed.
    """
    with requires_extra("compare", "a comparison with adapters"):
        import peft

    return peft


@dataclass(frozen=True)
class PeftKind:
    """A kind of adapter of PEFT.

    Attributes:
        config: Name of its configuration class.
        rates: Learning rates to choose from.
        from_text: Start from the keys and values of training texts.
        options: Further fields of the configuration.
    """

    config: str
    rates: Sequence[float]
    from_text: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def add_adapter(
        self,
        frozen: FrozenModel,
        model: nn.Module,
        rows: Sequence[TokenizedExample],
        num_slots: int,
    ) -> nn.Module:
        """The model with an untrained adapter of the kind.

        Args:
            frozen: What the model is a copy of.
            model: Is changed.
            rows: Rows whose completions the adapter may start from.
            num_slots: Number of virtual tokens, if it has any.
        """
        peft = peft_package()
        options = dict(self.options)
        if self.config in ("PrefixTuningConfig", "CartridgeConfig", "PromptTuningConfig"):
            options["num_virtual_tokens"] = num_slots
        if self.config == "LoraConfig":
            options["target_modules"] = linear_layers(frozen)
        config = getattr(peft, self.config)(task_type="CAUSAL_LM", **options)
        adapted: nn.Module = peft.get_peft_model(model, config)
        if self.from_text:
            from peft.tuners.cartridge.utils import initialize_kv_prefix_from_text

            decode = frozen.tokenizer.decode
            text = "\n".join(str(decode([*row.completion])) for row in rows[:num_slots])
            initialize_kv_prefix_from_text(
                adapted, frozen.tokenizer, text=text, use_chat_template=False
            )
        return adapted


LORA: Final = PeftKind("LoraConfig", (1e-3, 3e-3, 1e-2), options={"r": 8, "lora_alpha": 16})
PEFT_KINDS: Final[Mapping[str, PeftKind]] = {
    "PEFT prefix tuning": PeftKind("PrefixTuningConfig", (1e-2, 3e-2, 1e-1)),
    "PEFT prefix tuning from text": PeftKind("PrefixTuningConfig", (3e-3, 1e-2, 3e-2), True),
    "PEFT cartridge": PeftKind("CartridgeConfig", (1e-2, 3e-2, 1e-1), True),
    "PEFT prompt tuning": PeftKind(
        "PromptTuningConfig", (3e-2, 1e-1, 3e-1), options={"prompt_tuning_init": "RANDOM"}
    ),
    "PEFT IA3": PeftKind("IA3Config", (3e-3, 1e-2, 3e-2)),
    "PEFT BEFT": PeftKind("BeftConfig", (3e-3, 1e-2, 3e-2)),
}


class PeftMethod(AdapterMethod):
    """An adapter of PEFT.

    Args:
        setup: As for every method.
        kind: Which.
    """

    def __init__(self, setup: ComparisonSetup, *, kind: PeftKind) -> None:
        super().__init__(setup)
        self.kind = kind
        self.rates = kind.rates

    def add_adapter(self, model: nn.Module, rows: Sequence[TokenizedExample]) -> nn.Module:
        return self.kind.add_adapter(self.setup.frozen, model, rows, self.setup.num_slots)

    @contextlib.contextmanager
    def switched_off(self, rows: Sequence[Example]) -> Iterator[nn.Module | None]:
        model: Any = self.models[self.group(rows[0])]
        with model.disable_adapter():
            yield model


class LoraMethod(PeftMethod):
    """LoRA, of which PEFT can apply another to each row of a batch."""

    is_mixed = True

    @contextlib.contextmanager
    def many_applied(self) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
        model: Any = next(iter(self.models.values()))
        names = [f"copy{i}" for i in range(NUM_ADAPTATIONS)]
        for name in names:
            model.add_adapter(name, model.peft_config["default"])
        try:
            yield model, {"adapter_names": names}
        finally:
            for name in names:
                model.delete_adapter(name)


class _HalfOfTheSteps(PeftMethod):
    """LoRA that leaves half of the steps to a prefix."""

    @property
    def num_steps(self) -> int:
        return max(1, self.setup.steps // 2)


class PrefixThenLora(_HalfOfTheSteps):
    """A task prefix in half of the steps, then a LoRA adapter that reads it.

    Reference:
        Kim et al., "Preserving Pre-trained Representation Space: On Effectiveness of Prefix-tuning
        for Large Multi-modal Models" (PT-PEFT), 2024, https://arxiv.org/abs/2411.00029; there the
        prefix is trained further too.
    """

    def train(self, *, rate: float, seed: int) -> None:
        halves = replace(self.setup, steps=self.num_steps)
        prefix = ControlPrefixMethod(halves, labels=False)
        prefix.train(rate=5e-4, seed=seed)
        self.costs = prefix.costs
        self.prefix = next(prefix.prefixes())
        super().train(rate=rate, seed=seed)
        self.num_parameters += prefix.num_parameters
        self.num_stored += prefix.num_stored

    def add_adapter(self, model: nn.Module, rows: Sequence[TokenizedExample]) -> nn.Module:
        base = self.setup.frozen
        frozen = FrozenModel(model, base.tokenizer, base.chat_template_kwargs)  # type: ignore[arg-type]
        return _Steered(super().add_adapter(model, rows), frozen, self.prefix)

    @contextlib.contextmanager
    def switched_off(self, rows: Sequence[Example]) -> Iterator[nn.Module | None]:
        steered: Any = self.models[self.group(rows[0])]
        with steered.inner.disable_adapter():
            yield steered.inner


class LoraThenPrefix(_HalfOfTheSteps):
    """A LoRA adapter in half of the steps, merged, then a task prefix for the merged model."""

    def train(self, *, rate: float, seed: int) -> None:
        super().train(rate=rate, seed=seed)
        setup = self.setup
        for label, model in self.models.items():
            merged: Any = model.merge_and_unload()  # type: ignore[operator]
            merged.requires_grad_(False)
            base = setup.frozen
            frozen = FrozenModel(merged, base.tokenizer, base.chat_template_kwargs)
            cp = ControlPrefix(frozen, PrefixStore("sqlite://"))
            rows = [
                row.model_copy(update={"attributes": {}})
                for row in setup.training
                if label in (None, setup.label(row))
            ]
            steps = -(-setup.steps // (2 * len(self.models)))
            with self.costs.watched():
                report = cp.train(
                    rows,
                    learn="task",
                    num_slots=setup.num_slots,
                    steps=steps,
                    batch_size=setup.batch_size,
                    validation=0,
                    seed=seed,
                    progress=False,
                )
            prefix = cp.get("task", str(rows[0].task))
            self.num_parameters += report.num_parameters
            self.num_stored += sum(slots.numel() for slots in prefix.slots.values())
            self.models[label] = _Steered(merged, frozen, prefix)

    @contextlib.contextmanager
    def switched_off(self, rows: Sequence[Example]) -> Iterator[nn.Module | None]:
        yield None  # the adapter is merged


class _Steered(nn.Module):
    """A module with a prefix in front of every row."""

    def __init__(self, inner: nn.Module, frozen: FrozenModel, prefix: Prefix) -> None:
        super().__init__()
        self.inner = inner
        # A function, so that the module is not told of the frozen model's parameters twice.
        self._rows = lambda num_rows: frozen.attached(frozen.assemble([[Part(prefix)]] * num_rows))

    def forward(self, input_ids: Tensor, **inputs: Any) -> Any:
        """Call the module."""
        with self._rows(len(input_ids)):
            return self.inner(input_ids=input_ids, **inputs)

    def generate(self, input_ids: Tensor, **options: Any) -> Any:
        """Generate with the module."""
        with self._rows(len(input_ids)):
            return self.inner.generate(input_ids=input_ids, **options)  # type: ignore[operator]


def linear_layers(frozen: FrozenModel) -> list[str]:
    """Names of the linear layers inside attention, such as `q_proj`."""
    model = frozen.model
    names = {
        name.rpartition(".")[2]: None
        for path in frozen.steering.attention_paths
        for name, module in model.get_submodule(path).named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    }
    return list(names)
