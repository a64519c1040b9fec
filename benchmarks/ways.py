"""Ways to have several labels at once, all learned from the same rows: ours and others'."""

import argparse
import copy
import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy
import torch
from quality import PEFT, Data, Peft, Row, judge, labelled, model, shuffled, tokenizer
from sklearn.pipeline import Pipeline
from train import END, PAD
from transformers import DynamicCache

from controlprefix import ControlPrefix, Example, Request
from controlprefix.evaluation import AttributeClassifier, pseudo_label
from controlprefix.evaluation.harness import base_model_nlls

Combination = Mapping[str, str]  # attribute -> label

SETS: dict[str, dict[str, str]] = {
    "aspects": dict.fromkeys(
        ("sentiment", "topic", "toxicity"), "aspects_sentiment_topic_toxicity"
    ),
    "styles": {
        "formality": "formality_pavlick",
        "sentiment": "sentiment_yelp",
        "politeness": "politeness_stanford",
    },
}
SAID = {
    "world": "about world politics",
    "sports": "about sports",
    "business": "about business",
    "sci/tech": "about science and technology",
    "nontoxic": "decent, without insults",
    "toxic": "rude and insulting",
}
SAMPLING = {"temperature": 0.8}


@dataclass(frozen=True)
class Study:
    """A set of attributes.

    Attributes:
        labels: Of each attribute.
        rows: To learn from, each with one label (`topic=sports`).
        words, meanings: A judge of each attribute.
        unseen: Rows of the test splits, like `rows`.
    """

    name: str
    labels: dict[str, list[str]]
    rows: list[Row]
    words: dict[str, Pipeline]
    meanings: dict[str, AttributeClassifier]
    unseen: list[Row]

    @cached_property
    def base_model_nll(self) -> float:
        """Of the unseen rows, nats per token under the plain model."""
        cp = ControlPrefix.from_pretrained(model(), tokenizer=tokenizer(), store="sqlite://")
        return statistics.fmean(base_model_nlls(cp, [row.completion for row in self.unseen]))

    def combinations(self) -> list[Combination]:
        return [
            dict(zip(self.labels, chosen, strict=True))
            for chosen in itertools.product(*self.labels.values())
        ]


@cache
def study(folder: Path, name: str, num: int) -> Study:
    """As many rows of each attribute are learned from; up to 4,000 others teach its judges."""
    labels: dict[str, list[str]] = {}
    rows: list[Row] = []
    unseen: list[Row] = []
    words, meanings = {}, {}
    for attribute, file in SETS[name].items():
        found = shuffled(labelled(folder, file, attribute, "train"), 0)
        labels[attribute] = sorted({str(row.label) for row in found})
        share = num // len(SETS[name])
        rows += [replace(row, label=f"{attribute}={row.label}") for row in found[:share]]
        others = found[share : share + 4000]
        test = shuffled(labelled(folder, file, attribute, "test"), 0)[:128]
        unseen += [replace(row, label=f"{attribute}={row.label}") for row in test]
        words[attribute] = judge(others)
        meanings[attribute] = AttributeClassifier.train(
            attribute, [row.completion for row in others], [str(row.label) for row in others]
        )
    return Study(name, labels, shuffled(rows, 0), words, meanings, unseen)


def pairs(combination: Combination) -> list[str]:
    return [f"{attribute}={label}" for attribute, label in combination.items()]


class Way:
    """One way to have several labels at once; this one leaves the model alone."""

    coefficients: Sequence[float] = ()
    as_plain_as: str | None = None  # the way whose texts its own are to be no less fluent than

    def __init__(self, study: Study, options: argparse.Namespace) -> None:
        self.study, self.options = study, options
        self.coefficient = 1.0
        self.cp = ControlPrefix.from_pretrained(model(), tokenizer=tokenizer(), store="sqlite://")

    def learn(self) -> None:
        """From the study's rows."""

    def write(self, combination: Combination, count: int, seed: int) -> list[str]:
        """Texts with those labels."""
        return self.drawn(self.cp.model, count, seed)

    def drawn(
        self,
        source: Any,
        count: int,
        seed: int,
        slots: Sequence[tuple[torch.Tensor, torch.Tensor]] = (),
    ) -> list[str]:
        """From nothing, by transformers alone; with keys and values already in the cache."""
        ids = torch.full((count, 1), tokenizer().bos_token_id)
        more: dict[str, Any] = {}
        if slots:
            full = [(k.expand(count, -1, -1, -1), v.expand(count, -1, -1, -1)) for k, v in slots]
            more["past_key_values"] = DynamicCache(ddp_cache_data=full, config=model().config)
        before = slots[0][0].shape[2] if slots else 0
        torch.manual_seed(seed)
        with torch.no_grad():
            written = source.generate(
                input_ids=ids,
                attention_mask=torch.ones(count, before + 1, dtype=torch.long),
                max_new_tokens=self.options.new_tokens,
                do_sample=True,
                top_k=0,
                eos_token_id=END,
                pad_token_id=PAD,
                **SAMPLING,
                **more,
            )
        texts = tokenizer().batch_decode(written[:, 1:], skip_special_tokens=True)
        return [text.split("\n")[0].strip() for text in texts]

    def asked(self, requests: Sequence[dict[str, Any]], seed: int) -> list[str]:
        """By the library."""
        rows = [
            Request(
                **{"prompt": tokenizer().bos_token, "raw": True, **one},
                max_new_tokens=self.options.new_tokens,
                seed=seed * 10_000 + i,
                stop=["\n"],
                **SAMPLING,
            )
            for i, one in enumerate(requests)
        ]
        return [one.text.strip() for one in self.cp.generate(rows, batch_size=32)]


def instruction(combination: Combination) -> dict[str, Any]:
    told = ", ".join(SAID.get(label, label) for label in combination.values())
    prompt = f"Write one sentence that is {told}. Write nothing else."
    return {"prompt": prompt, "raw": False}


class Instructed(Way):
    def write(self, combination: Combination, count: int, seed: int) -> list[str]:
        return self.asked([instruction(combination)] * count, seed)


class FewShot(Way):
    def write(self, combination: Combination, count: int, seed: int) -> list[str]:
        some = []
        for i in range(count):
            shown = [
                row.completion
                for pair in pairs(combination)
                for row in shuffled((r for r in self.study.rows if r.label == pair), seed + i)[:2]
            ]
            some.append({"prompt": "".join(f"{text}\n" for text in shown)})
        return self.asked(some, seed)


class Ours(Way):
    """Task and labels learned together, or each attribute alone."""

    def __init__(
        self,
        *given: Any,
        apart: bool = False,
        filled: bool = False,
        mixing: str = "attention",
        against: bool = False,
        told: bool = False,
        coefficients: Sequence[float] = (),
        as_plain_as: str | None = None,
    ) -> None:
        super().__init__(*given)
        self.apart, self.filled, self.told = apart, filled, told
        self.mixing, self.against = mixing, against
        self.coefficients, self.as_plain_as = coefficients, as_plain_as

    def learn(self) -> None:
        attributes = list(self.study.labels)
        for group in [[one] for one in attributes] if self.apart else [attributes]:
            rows = [
                Example(
                    prompt="",
                    raw=True,
                    completion=row.completion,
                    task=None if self.apart else "text",
                    attributes=dict([str(row.label).split("=")]),
                )
                for row in self.study.rows
                if str(row.label).partition("=")[0] in group
            ]
            self.cp.train(
                pseudo_label(rows) if self.filled else rows,
                learn=("attributes",) if self.apart else ("task", "attributes"),
                num_slots=self.options.num_slots,
                steps=math.ceil(self.options.steps * len(group) / len(attributes)),
                batch_size=8,
                contrast=0.3,
                validation=0,
                progress=False,
            )

    def request(self, combination: Combination) -> dict[str, Any]:
        """With the labels that are not meant below 0, where that is wanted."""
        weights = {
            attribute: {
                label: self.coefficient,
                **{
                    other: -self.coefficient / (len(self.study.labels[attribute]) - 1)
                    for other in self.study.labels[attribute]
                    if other != label and self.against
                },
            }
            for attribute, label in combination.items()
        }
        return {
            "task": None if self.apart else "text",
            "attributes": weights,
            "mixing": self.mixing,
            **(instruction(combination) if self.told else {}),
        }

    def write(self, combination: Combination, count: int, seed: int) -> list[str]:
        return self.asked([self.request(combination)] * count, seed)


class PerLabel(Way):
    """An adapter of PEFT for each label, learned from its rows."""

    kind, rate = "", 0.0

    def learn(self) -> None:
        made = {key: value for key, value in PEFT[self.kind].items() if key != "rates"}
        about: Any = {"instruction": None, "few_labels": True, "dev": (), "test": ()}
        data = Data(self.study.name, "text", None, train=self.study.rows, **about)
        options = argparse.Namespace(num_slots=self.options.num_slots, batch=8)
        self.adapters = Peft(self.cp, data, options, rate=self.rate, **made)
        self.adapters.learn(0, self.options.steps)


class PrefixUnion(PerLabel):
    """PEFT's prefixes, one after the other in the cache."""

    kind, rate = "PEFT prefix tuning from text", 0.03

    def write(self, combination: Combination, count: int, seed: int) -> list[str]:
        caches = [
            self.adapters.models[pair].get_prompt(batch_size=1) for pair in pairs(combination)
        ]
        slots = [
            (
                torch.cat([one.layers[i].keys for one in caches], dim=2).detach(),
                torch.cat([one.layers[i].values for one in caches], dim=2).detach(),
            )
            for i in range(len(caches[0].layers))
        ]
        return self.drawn(self.cp.model, count, seed, slots)


class LoraSum(PerLabel):
    """What the labels' LoRAs add to the weights, times a coefficient: 1/3 is their average."""

    kind, rate = "PEFT LoRA r8", 0.003
    coefficients = (1 / 3, 2 / 3, 1.0)

    def write(self, combination: Combination, count: int, seed: int) -> list[str]:
        merged = copy.deepcopy(self.cp.model)
        for pair in pairs(combination):
            for name, module in self.adapters.models[pair].base_model.model.named_modules():
                if hasattr(module, "get_delta_weight"):
                    weight = merged.get_submodule(name).weight
                    with torch.no_grad():
                        weight += self.coefficient * module.get_delta_weight("default").to(weight)
        return self.drawn(merged, count, seed)


class Steering(Way):
    """repeng's vectors, added up: for each label, its texts against those of the others."""

    coefficients = (0.5, 1.0, 2.0, 3.0)

    def learn(self) -> None:
        numpy.float_ = numpy.float64  # type: ignore[attr-defined]  # repeng 0.4 knows NumPy 1
        from repeng import ControlModel, ControlVector, DatasetEntry

        self.model = ControlModel(copy.deepcopy(self.cp.model), list(range(-5, -24, -1)))
        self.vectors = {}
        for attribute, labels in self.study.labels.items():
            own = [r for r in self.study.rows if str(r.label).startswith(f"{attribute}=")]
            for label in labels:
                liked = [r.completion for r in own if r.label == f"{attribute}={label}"]
                others = [r.completion for r in own if r.label != f"{attribute}={label}"]
                count = min(len(liked), len(others), 128)
                self.vectors[f"{attribute}={label}"] = ControlVector.train(
                    self.model,
                    tokenizer(),
                    [
                        DatasetEntry(*both)
                        for both in zip(liked[:count], others[:count], strict=True)
                    ],
                )

    def write(self, combination: Combination, count: int, seed: int) -> list[str]:
        vectors = [self.vectors[pair] for pair in pairs(combination)]
        total = vectors[0]
        for one in vectors[1:]:
            total = total + one
        self.model.set_control(total, self.coefficient)
        return self.drawn(self.model, count, seed)


GUIDED: dict[str, Any] = {"mixing": "logits", "coefficients": (0.5, 1.0, 2.0)}
WAYS: dict[str, Callable[..., Way]] = {
    "plain": Way,
    "instruction": Instructed,
    "few-shot": FewShot,
    "ours": Ours,
    "ours, strength chosen": lambda *given: Ours(*given, coefficients=(1.0, 1.5, 2.0)),
    "ours, mixed in logits": lambda *given: Ours(*given, **GUIDED),
    "ours, mixed in logits, for and against": lambda *given: Ours(*given, **GUIDED, against=True),
    "ours, labels filled in": lambda *given: Ours(
        *given, filled=True, coefficients=(1.0, 1.5, 2.0)
    ),
    "ours, filled in, for and against": lambda *given: Ours(
        *given, **GUIDED, filled=True, against=True
    ),
    "ours, learned apart": lambda *given: Ours(*given, apart=True),
    "ours and an instruction": lambda *given: Ours(
        *given, **GUIDED, apart=True, against=True, told=True
    ),
    "ours and an instruction, as plain": lambda *given: Ours(
        *given,
        mixing="logits",
        coefficients=(0.25, 0.5, 1.0),
        apart=True,
        against=True,
        told=True,
        as_plain_as="instruction",
    ),
    "union of PEFT prefixes": PrefixUnion,
    "LoRA of labels added": LoraSum,
    "repeng": Steering,
}
SAME_LEARNING = {
    **dict.fromkeys(
        (
            "ours, strength chosen",
            "ours, mixed in logits",
            "ours, mixed in logits, for and against",
        ),
        "ours",
    ),
    "ours, filled in, for and against": "ours, labels filled in",
    "ours and an instruction": "ours, learned apart",
    "ours and an instruction, as plain": "ours, learned apart",
}


def learned(name: str, study: Study, options: argparse.Namespace, known: dict[str, Way]) -> Way:
    """The way, ready; those that differ in asking alone learn once."""
    way = WAYS[name](study, options)
    twin = known.get(SAME_LEARNING.get(name, name))
    if twin is not None:
        way.cp = twin.cp
    else:
        way.learn()
    known.setdefault(SAME_LEARNING.get(name, name), way)
    return way
