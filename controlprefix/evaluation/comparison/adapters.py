"""Methods that change the model: PEFT's adapters, bottleneck adapters, BitFit, fine-tuning.

Each trains a copy of the model; where labels are few, a copy per label, in as many steps together.
"""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from controlprefix._io import requires_extra
from controlprefix.engine import ControlPrefix
from controlprefix.evaluation.comparison import adapter_training
from controlprefix.evaluation.comparison.methods import (
    NUM_ADAPTATIONS,
    ControlPrefixMethod,
    Method,
    Problem,
)
from controlprefix.example import Example
from controlprefix.model import FrozenModel
from controlprefix.model.tokenization import TokenizedExample
from controlprefix.prefixes import Part, Prefix
from controlprefix.store import PrefixStore
from controlprefix.training.run import learning_rate_schedule

_BOTTLENECK_SIZE = 16


def peft_package() -> Any:
    """The package peft.

    Raises:
        MissingDependencyError: If it is not installed.
    """
    with requires_extra("compare", "a comparison with adapters"):
        import peft

    return peft


class AdapterMethod(Method):
    """Adapters of one kind: one for all rows, or one per label.

    A kind overrides `adapted`.
    """

    is_mixed = False

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.models: dict[str | None, nn.Module] = {}

    def adapted(self, model: nn.Module, rows: Sequence[TokenizedExample], seed: int) -> nn.Module:
        """A copy of the model with an untrained adapter, whose parameters alone take gradients."""
        raise NotImplementedError

    @property
    def labels(self) -> list[str | None]:
        """Labels with an adapter each; only None: one for all rows."""
        attribute = self.problem.few_labels
        return [*self.problem.attributes[attribute]] if attribute else [None]

    def required_bytes(self) -> int:
        model = self.problem.frozen.model
        return len(self.labels) * sum(p.numel() * p.element_size() for p in model.parameters())

    def train(self, *, rate: float, seed: int) -> None:
        problem, labels = self.problem, self.labels
        share = -(-problem.steps // len(labels))
        for label in labels:
            rows = [
                self.tokenized(row)
                for row in problem.training
                if label in (None, problem.label(row))
            ]
            torch.manual_seed(seed)
            model = self.adapted(copy.deepcopy(problem.frozen.model), rows, seed)
            with self.costs.watched():
                adapter_training.train(
                    model,
                    rows,
                    problem.frozen.request_tokenizer,
                    batch_size=problem.batch_size,
                    learning_rate=rate,
                    steps=share,
                    seed=seed,
                    schedule=learning_rate_schedule(share),
                )
            self.models[label] = model
        self.num_parameters = sum(
            p.numel()
            for model in self.models.values()
            for p in model.parameters()
            if p.requires_grad
        )
        self.num_stored = self.num_parameters
        self.num_adaptations = len(labels)

    def group(self, row: Example) -> str | None:
        return self.problem.label(row) if len(self.models) > 1 else None

    @contextlib.contextmanager
    def applied(self, rows: Sequence[Example]) -> Iterator[nn.Module]:
        yield self.models[self.group(rows[0])]

    @contextlib.contextmanager
    def switched_off(self, rows: Sequence[Example]) -> Iterator[nn.Module | None]:
        yield None

    @contextlib.contextmanager
    def many_applied(self) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
        yield next(iter(self.models.values())), {}

    def close(self) -> None:
        self.models.clear()


class PeftMethod(AdapterMethod):
    """An adapter of PEFT.

    Args:
        problem: As for every method.
        config: A function of the package, the number of slots and the names of the linear layers
            of attention that returns its configuration.
        from_text: Start from the keys and values of training texts.
        rates: Learning rates to choose from.
    """

    def __init__(
        self, problem: Problem, *, config: Any, rates: Sequence[float], from_text: bool = False
    ) -> None:
        super().__init__(problem)
        self.config, self.from_text = config, from_text
        self.rates = rates  # type: ignore[misc]  # one class, many methods

    def adapted(self, model: nn.Module, rows: Sequence[TokenizedExample], seed: int) -> nn.Module:
        peft = peft_package()
        num_slots = self.problem.num_slots
        config = self.config(peft, num_slots, linear_layers(self.problem.frozen))
        adapted: nn.Module = peft.get_peft_model(model, config)
        if self.from_text:
            from peft.tuners.cartridge.utils import initialize_kv_prefix_from_text

            tokenizer = self.problem.frozen.tokenizer
            text = "\n".join(str(tokenizer.decode([*row.completion])) for row in rows[:num_slots])
            initialize_kv_prefix_from_text(adapted, tokenizer, text=text, use_chat_template=False)
        return adapted

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
        yield model, {"adapter_names": names}
        for name in names:
            model.delete_adapter(name)


class BottleneckAdapter(AdapterMethod):
    """Two small matrices with a ReLU between them, added to the output of every layer.

    Reference:
        Pfeiffer et al., "AdapterFusion", 2021, https://arxiv.org/abs/2005.00247.
    """

    rates: ClassVar[Sequence[float]] = (3e-4, 1e-3, 3e-3)

    def adapted(self, model: nn.Module, rows: Sequence[TokenizedExample], seed: int) -> nn.Module:
        adapters = nn.ModuleList()
        size = self.problem.frozen.model.config.get_text_config().hidden_size
        for path in self.problem.frozen.steering.attention_paths:
            layer = model.get_submodule(path.rpartition(".")[0])
            adapter = _Bottleneck(size).to(next(layer.parameters()).device)
            adapters.append(adapter)
            layer.register_forward_hook(adapter.add_to_output)
        model.bottleneck_adapters = adapters
        return model

    @contextlib.contextmanager
    def switched_off(self, rows: Sequence[Example]) -> Iterator[nn.Module | None]:
        model: Any = self.models[self.group(rows[0])]
        for adapter in model.bottleneck_adapters:
            adapter.is_on = False
        yield model
        for adapter in model.bottleneck_adapters:
            adapter.is_on = True


class _Bottleneck(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.down = nn.Linear(size, _BOTTLENECK_SIZE)
        self.up = nn.Linear(_BOTTLENECK_SIZE, size)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        self.is_on = True

    def add_to_output(self, _: nn.Module, inputs: Any, output: Any) -> Any:
        """A hook of the layer whose output it changes."""
        if not self.is_on:
            return output
        if isinstance(output, tuple):
            return (self._added(output[0]), *output[1:])
        return self._added(output)

    def _added(self, hidden: Tensor) -> Tensor:
        change = self.up(torch.relu(self.down(hidden.to(self.down.weight.dtype))))
        return hidden + change.to(hidden.dtype)


class FullFineTuning(AdapterMethod):
    """All weights of a copy, in float32."""

    rates: ClassVar[Sequence[float]] = (1e-5, 3e-5, 1e-4)

    def adapted(self, model: nn.Module, rows: Sequence[TokenizedExample], seed: int) -> nn.Module:
        return model.float().requires_grad_(True)

    def required_bytes(self) -> int:  # weights, gradients and AdamW's two averages
        num_values = sum(p.numel() for p in self.problem.frozen.model.parameters())
        return 4 * num_values * (len(self.labels) + 3)


class BitFit(AdapterMethod):
    """The biases that the model has.

    Reference:
        Ben Zaken et al., "BitFit", 2022, https://arxiv.org/abs/2106.10199.
    """

    rates: ClassVar[Sequence[float]] = (1e-3, 3e-3, 1e-2)

    def unavailable(self) -> str | None:
        names = [name for name, _ in self.problem.frozen.model.named_parameters()]
        return None if any(n.endswith("bias") for n in names) else "the model has no biases"

    def adapted(self, model: nn.Module, rows: Sequence[TokenizedExample], seed: int) -> nn.Module:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("bias"))
        return model


class PrefixThenLora(PeftMethod):
    """A task prefix in half of the steps, then a LoRA adapter that reads it.

    Reference:
        Kim et al., "Preserving Pre-trained Representation Space: On Effectiveness of Prefix-tuning
        for Large Multi-modal Models" (PT-PEFT), 2024, https://arxiv.org/abs/2411.00029; there the
        prefix is trained further too.
    """

    def train(self, *, rate: float, seed: int) -> None:
        halves = _in_half(self.problem)
        prefix = ControlPrefixMethod(halves, labels=False)
        prefix.train(rate=5e-4, seed=seed)
        self.costs = prefix.costs
        self.prefix = next(prefix.prefixes())
        whole, self.problem = self.problem, halves
        try:
            super().train(rate=rate, seed=seed)
        finally:
            self.problem = whole
        self.num_parameters += prefix.num_parameters
        self.num_stored += prefix.num_stored

    def adapted(self, model: nn.Module, rows: Sequence[TokenizedExample], seed: int) -> nn.Module:
        frozen = FrozenModel(model, self.problem.frozen.tokenizer)  # type: ignore[arg-type]
        return _Steered(super().adapted(model, rows, seed), frozen, self.prefix)

    @contextlib.contextmanager
    def switched_off(self, rows: Sequence[Example]) -> Iterator[nn.Module | None]:
        steered: Any = self.models[self.group(rows[0])]
        with steered.inner.disable_adapter():
            yield steered.inner


class LoraThenPrefix(PeftMethod):
    """A LoRA adapter in half of the steps, merged, then a task prefix for the merged model."""

    def train(self, *, rate: float, seed: int) -> None:
        whole, self.problem = self.problem, _in_half(self.problem)
        try:
            super().train(rate=rate, seed=seed)
        finally:
            self.problem = whole
        for label, model in self.models.items():
            merged: Any = model.merge_and_unload()  # type: ignore[operator]
            merged.requires_grad_(False)
            frozen = FrozenModel(merged, whole.frozen.tokenizer)
            cp = ControlPrefix(frozen, PrefixStore("sqlite://"))
            rows = [
                row.model_copy(update={"attributes": {}})
                for row in whole.training
                if label in (None, whole.label(row))
            ]
            steps = -(-whole.steps // (2 * len(self.models)))
            with self.costs.watched():
                report = cp.train(
                    rows,
                    learn="task",
                    num_slots=whole.num_slots,
                    steps=steps,
                    batch_size=whole.batch_size,
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


def _in_half(problem: Problem) -> Problem:
    """The same problem with half of the steps."""
    return replace(problem, steps=max(1, problem.steps // 2))
