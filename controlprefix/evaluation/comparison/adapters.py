"""Methods that change the model: adapters, BitFit and fine-tuning.

Each trains a copy of the model; where labels are few, a copy per label, in as many steps together.
"""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import elu
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from controlprefix.evaluation.comparison import adapter_training
from controlprefix.evaluation.comparison.methods import ComparisonSetup, Method
from controlprefix.example import Example
from controlprefix.model.tokenization import TokenizedExample
from controlprefix.prefixes import LayerShape
from controlprefix.training.run import learning_rate_schedule

_BOTTLENECK_SIZE = 16
_MEMORY = "controlprefix_prefix_memory"  # name of its attention function in transformers


class AdapterMethod(Method):
    """Adapters of one kind: one for all rows, or one per label.

    A kind overrides `add_adapter`.
    """

    is_mixed = False

    def __init__(self, setup: ComparisonSetup) -> None:
        super().__init__(setup)
        self.models: dict[str | None, nn.Module] = {}

    def add_adapter(self, model: nn.Module, rows: Sequence[TokenizedExample]) -> nn.Module:
        """Add an untrained adapter to a model, in place; only its parameters take gradients."""
        raise NotImplementedError

    @property
    def labels(self) -> list[str | None]:
        """Labels with an adapter each; only None: one for all rows."""
        attribute = self.setup.label_attribute
        return [*self.setup.attributes[attribute]] if attribute else [None]

    @property
    def num_steps(self) -> int:
        """Training steps of all adapters together."""
        return self.setup.steps

    def required_bytes(self) -> int:
        model = self.setup.frozen.model
        return 2 * len(self.labels) * sum(4 * p.numel() for p in model.parameters())

    def train(self, *, rate: float, seed: int) -> None:
        setup, labels = self.setup, self.labels
        share = -(-self.num_steps // len(labels))
        for label in labels:
            rows = [
                self.tokenized(row) for row in setup.training if label in (None, setup.label(row))
            ]
            torch.manual_seed(seed)
            model = self.add_adapter(copy.deepcopy(setup.frozen.model), rows)
            with self.costs.watched():
                adapter_training.train(
                    model,
                    rows,
                    setup.frozen.request_tokenizer,
                    batch_size=setup.batch_size,
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
        return self.setup.label(row) if len(self.models) > 1 else None

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


class _Switch(nn.Module):
    """What an adapter adds to a model, unless it is off."""

    is_on = True


class SwitchedAdapter(AdapterMethod):
    """Adapters that add to the model, and can be switched off."""

    @contextlib.contextmanager
    def switched_off(self, rows: Sequence[Example]) -> Iterator[nn.Module | None]:
        model = self.models[self.group(rows[0])]
        switches = [module for module in model.modules() if isinstance(module, _Switch)]
        for switch in switches:
            switch.is_on = False
        try:
            yield model
        finally:
            for switch in switches:
                switch.is_on = True


class BottleneckAdapter(SwitchedAdapter):
    """Two small matrices with a ReLU between them, added to the output of every layer.

    Reference:
        Pfeiffer et al., "AdapterFusion", 2021, https://arxiv.org/abs/2005.00247.
    """

    rates: Sequence[float] = (3e-4, 1e-3, 3e-3)

    def add_adapter(self, model: nn.Module, rows: Sequence[TokenizedExample]) -> nn.Module:
        adapters = nn.ModuleList()
        size = self.setup.frozen.model.config.get_text_config().hidden_size
        for path in self.setup.frozen.steering.attention_paths:
            layer = model.get_submodule(path.rpartition(".")[0])
            adapter = _Bottleneck(size).to(next(layer.parameters()).device)
            adapters.append(adapter)
            layer.register_forward_hook(adapter.add_to_output)
        model.bottleneck_adapters = adapters
        return model


class _Bottleneck(_Switch):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.down = nn.Linear(size, _BOTTLENECK_SIZE)
        self.up = nn.Linear(_BOTTLENECK_SIZE, size)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

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


class PrefixMemory(SwitchedAdapter):
    """A matrix per attention head, applied to the query and added to the output of attention.

    `o + φ(q) M` with φ = elu and M of zeros at first; a kv head's queries share M. The queries are
    those after rotary embedding: the paper does not say which it takes.

    Reference:
        Wang et al., "Prefix-Tuning+" (PrefixMemory-Tuning), 2025,
        https://arxiv.org/abs/2506.13674.
    """

    rates: Sequence[float] = (3e-4, 1e-3, 3e-3)

    def unavailable(self) -> str | None:
        name = self.setup.frozen.model.config._attn_implementation
        if name != "sdpa" or self.setup.frozen.is_encoder_decoder:
            return "it is added to the attention of decoders with attn_implementation='sdpa'"
        return None

    def add_adapter(self, model: nn.Module, rows: Sequence[TokenizedExample]) -> nn.Module:
        shapes = self.setup.frozen.geometry.decoder
        paths = self.setup.frozen.steering.attention_paths
        for path, shape in zip(paths, shapes, strict=True):
            module: Any = model.get_submodule(path)
            module.prefix_memory = _Memory(shape).to(next(module.parameters()).device)
        AttentionInterface.register(_MEMORY, _attend_with_memory)
        AttentionMaskInterface.register(_MEMORY, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
        changed: Any = model
        changed.set_attn_implementation(_MEMORY)
        return model


class _Memory(_Switch):
    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        zeros = torch.zeros(shape.num_kv_heads, shape.key_dim, shape.value_dim)
        self.matrices = nn.Parameter(zeros)


def _attend_with_memory(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' attention by `sdpa`, and the module's memory of the queries."""
    output, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **kwargs)
    if not module.prefix_memory.is_on:
        return output, None
    memory = module.prefix_memory.matrices.to(query.dtype)
    grouped = elu(query).unflatten(1, (memory.shape[0], -1))  # (batch, kv heads, group, n, key_dim)
    added = (grouped @ memory[:, None]).flatten(1, 2).transpose(1, 2)
    return output + added, None


class FullFineTuning(AdapterMethod):
    """All weights of a copy, in float32."""

    rates: Sequence[float] = (1e-5, 3e-5, 1e-4)

    def add_adapter(self, model: nn.Module, rows: Sequence[TokenizedExample]) -> nn.Module:
        return model.float().requires_grad_(True)

    def required_bytes(self) -> int:  # weights, gradients and AdamW's two averages
        num_values = sum(p.numel() for p in self.setup.frozen.model.parameters())
        return 4 * num_values * (2 * len(self.labels) + 3)


class BitFit(AdapterMethod):
    """The biases that the model has.

    Reference:
        Ben Zaken et al., "BitFit", 2022, https://arxiv.org/abs/2106.10199.
    """

    rates: Sequence[float] = (1e-3, 3e-3, 1e-2)

    def unavailable(self) -> str | None:
        names = [name for name, _ in self.setup.frozen.model.named_parameters()]
        return None if any(n.endswith("bias") for n in names) else "the model has no biases"

    def add_adapter(self, model: nn.Module, rows: Sequence[TokenizedExample]) -> nn.Module:
        # In float32, as other adapters are trained: small steps round to nothing in bfloat16.
        model = model.float()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("bias"))
        return model
