"""Other libraries' ways to request several labels at once, trained on the same rows."""

import copy
import importlib
from typing import Any

import numpy
import torch

from controlprefix import Example
from controlprefix.evaluation.comparison.methods import ComparisonSetup
from controlprefix.evaluation.comparison.peft_methods import LORA, PEFT_KINDS, PeftMethod

from lib.attribute_baselines import Method
from lib.attribute_studies import BATCH_SIZE, Combination, attributes_of, parts_of

PARTS = "part"  # the attribute whose labels are such as `topic=sports`


class _OnePerPart(ComparisonSetup):
    """The rows of a study, with an adapter for each label of each attribute."""

    label_attribute = PARTS  # however many


class AdapterPerLabel(Method):
    """An adapter of PEFT for each label, trained on its rows."""

    adapter = ""
    learning_rate = 0.0

    def train(self) -> None:
        rows = [
            Example(
                prompt="",
                raw=True,
                completion=row.completion,
                attributes={PARTS: str(row.label)},
            )
            for row in self.study.rows
        ]
        setup = _OnePerPart(
            self.study.frozen,
            rows,
            (),
            (),
            steps=self.options.steps,
            batch_size=BATCH_SIZE,
            num_slots=self.options.num_slots,
        )
        kind = {**PEFT_KINDS, "PEFT LoRA r8": LORA}[self.adapter]
        self.method = PeftMethod(setup, kind=kind)
        self.method.train(rate=self.learning_rate, seed=self.seed)
        self.adapters: dict[Any, Any] = dict(self.method.models)


class PrefixUnion(AdapterPerLabel):
    """The labels' PEFT prefixes, one after another in the cache."""

    adapter, learning_rate = "PEFT prefix tuning from text", 0.03

    def write(self, combination: Combination, count: int, seed: int) -> list[str]:
        caches: list[Any] = [
            self.adapters[part].get_prompt(batch_size=1) for part in parts_of(combination)
        ]
        slots = [
            (
                torch.cat([cache.layers[i].keys for cache in caches], dim=2).detach(),
                torch.cat([cache.layers[i].values for cache in caches], dim=2).detach(),
            )
            for i in range(len(caches[0].layers))
        ]
        return self.sample(self.cp.model, count, seed, slots)


class LoraSum(AdapterPerLabel):
    """The labels' LoRA weights added up, times a coefficient; 1/3 is their average."""

    adapter, learning_rate = "PEFT LoRA r8", 0.003
    coefficients = (1 / 3, 2 / 3, 1.0)

    def write(self, combination: Combination, count: int, seed: int) -> list[str]:
        merged = copy.deepcopy(self.cp.model)
        for part in parts_of(combination):
            base: Any = self.method.models[part].base_model
            for name, module in base.model.named_modules():
                if hasattr(module, "get_delta_weight"):
                    weight: Any = merged.get_submodule(name).weight
                    delta = module.get_delta_weight("default").to(weight)
                    with torch.no_grad():
                        weight.add_(delta, alpha=self.coefficient)
        return self.sample(merged, count, seed)


class SteeringVectors(Method):
    """The labels' repeng vectors added up; each from its texts against those of other labels."""

    coefficients = (0.5, 1.0, 2.0, 3.0)

    def train(self) -> None:
        numpy.float_ = numpy.float64  # type: ignore[attr-defined]  # repeng 0.4 needs NumPy 1
        repeng: Any = importlib.import_module("repeng")
        num_layers = self.cp.model.config.num_hidden_layers
        layers = list(range(-num_layers // 6, -3 * num_layers // 4 - 1, -1))
        self.model = repeng.ControlModel(copy.deepcopy(self.cp.model), layers)
        self.vectors = {}
        for attribute, labels in self.study.labels.items():
            rows = [row for row in self.study.rows if attribute in attributes_of(row)]
            for label in labels:
                part = f"{attribute}={label}"
                positive = [r.completion for r in rows if r.label == part]
                negative = [r.completion for r in rows if r.label != part]
                pairs = list(zip(positive, negative, strict=False))[:128]
                self.vectors[part] = repeng.ControlVector.train(
                    self.model, self.cp.tokenizer, [repeng.DatasetEntry(*pair) for pair in pairs]
                )

    def write(self, combination: Combination, count: int, seed: int) -> list[str]:
        first, *others = [self.vectors[part] for part in parts_of(combination)]
        self.model.set_control(sum(others, start=first), self.coefficient)
        return self.sample(self.model, count, seed)
