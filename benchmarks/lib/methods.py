"""Methods that make one frozen model write the texts of a data set, behind one interface."""

import argparse
import copy
import random
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel, get_peft_model

from controlprefix import ControlPrefix, Example, Request
from controlprefix.model.tokenization import TokenizedExample
from controlprefix.prefixes import Kind
from controlprefix.training.run import learning_rate_schedule

from lib import peft_training
from lib.datasets import DataSet, Row

TEMPERATURE = 0.8
NUM_SHOTS = 4


class Method:
    """The plain model; other methods override `train` and `example`.

    Args:
        cp: A model with a store of its own.
        data: The data set.
        options: `num_slots`, `batch_size` and `new_tokens`.

    Attributes:
        num_parameters, num_stored: Values that are trained, and values that are kept.
    """

    def __init__(self, cp: ControlPrefix, data: DataSet, options: argparse.Namespace) -> None:
        self.cp, self.data, self.options = cp, data, options
        self.num_parameters = self.num_stored = 0

    def train(self, seed: int, steps: int) -> None:
        """Train on the training rows."""

    def example(self, row: Row, label: str | None) -> Example:
        """The row as the model reads it, with a label."""
        return Example(
            prompt=row.prompt, raw=not row.prompt, completion=row.completion, **self.parts(label)
        )

    def parts(self, label: str | None) -> dict[str, Any]:
        """The fields of a request that name prefixes."""
        return {}

    def nll(self, rows: Sequence[Row], labels: Sequence[str | None]) -> float:
        """Nats per token of the completions, with these labels, without end tokens."""
        examples = [self.example(row, label) for row, label in zip(rows, labels, strict=True)]
        scores = self.cp.score(examples)
        return -sum(s.log_likelihood for s in scores) / sum(s.num_tokens for s in scores)

    def write(self, rows: Sequence[Row], labels: Sequence[str | None]) -> list[str]:
        """A text per row: greedy after a prompt, else sampled from the beginning."""
        requests = []
        for i, (row, label) in enumerate(zip(rows, labels, strict=True)):
            fields = self.example(row, label).model_dump(exclude_unset=True, exclude={"completion"})
            fields["prompt"] = fields["prompt"] or self.cp.tokenizer.bos_token
            if not row.prompt:
                fields |= {"temperature": TEMPERATURE, "seed": i}
            requests.append(Request(**fields, max_new_tokens=self.options.new_tokens, stop=["\n"]))
        return [c.text.strip() for c in self.cp.generate(requests, batch_size=32)]


class Instruction(Method):
    """An instruction in the prompt."""

    def example(self, row: Row, label: str | None) -> Example:
        labelled = Row(row.completion, row.prompt, label)
        return Example(prompt=self.data.instruction(labelled), completion=row.completion)


class FewShot(Method):
    """Training rows of the label in the prompt."""

    def example(self, row: Row, label: str | None) -> Example:
        rng = random.Random(f"{row.prompt}{row.completion}")
        pool = [r for r in self.data.train if not self.data.has_few_labels or r.label == label]
        shots = rng.sample(pool, min(NUM_SHOTS, len(pool)))
        if not row.prompt:
            prompt = "".join(f"{shot.completion}\n" for shot in shots)
            return Example(prompt=prompt, raw=True, completion=row.completion)
        prompt = "".join(f"Facts: {s.prompt}\nText: {s.completion}\n\n" for s in shots)
        return Example(
            prompt=f"{prompt}Facts: {row.prompt}\nText:",
            raw=True,
            completion=f" {row.completion}",
        )


class ControlPrefixMethod(Method):
    """This library: a task prefix, and one per label unless `labels` is false."""

    def __init__(
        self,
        cp: ControlPrefix,
        data: DataSet,
        options: argparse.Namespace,
        *,
        labels: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__(cp, data, options)
        self.attribute = data.attribute if labels else None
        self.settings = settings

    def parts(self, label: str | None) -> dict[str, Any]:
        fields: dict[str, Any] = {"task": self.data.task}
        if self.attribute and f"{self.attribute}={label}" in self.cp.names("attribute"):
            fields["attributes"] = {self.attribute: label}
        return fields

    def train(self, seed: int, steps: int) -> None:
        examples = [
            Example(
                prompt=row.prompt,
                raw=not row.prompt,
                completion=row.completion,
                task=self.data.task,
                attributes={self.attribute: row.label} if self.attribute and row.label else {},
            )
            for row in self.data.train
        ]
        report = self.cp.train(
            examples,
            learn=("task", "attributes") if self.attribute else ("task",),
            num_slots=self.options.num_slots,
            steps=steps,
            batch_size=self.options.batch_size,
            validation=0,
            seed=seed,
            progress=False,
            **self.settings,
        )
        self.num_parameters = report.num_parameters
        kinds: tuple[Kind, ...] = ("task", "attribute")
        self.num_stored = sum(
            slots.numel()
            for kind in kinds
            for name in self.cp.names(kind)
            for slots in self.cp.get(kind, name).slots.values()
        )


class PeftMethod(Method):
    """An adapter of PEFT: one for all rows, or one per label."""

    def __init__(
        self,
        cp: ControlPrefix,
        data: DataSet,
        options: argparse.Namespace,
        *,
        name: str,
        learning_rate: float,
    ) -> None:
        super().__init__(cp, data, options)
        self.config = peft_training.METHODS[name]["config"](options.num_slots)
        self.from_text = peft_training.METHODS[name].get("from_text", False)
        self.learning_rate = learning_rate
        self.models: dict[str | None, PeftModel] = {}

    def train(self, seed: int, steps: int) -> None:
        labels: list[str | None] = [None]
        if self.data.has_few_labels:
            labels = [*self.data.labels()]
        self.models.clear()
        for label in labels:
            rows = [row for row in self.data.train if label in (None, row.label)]
            torch.manual_seed(seed)
            model = get_peft_model(copy.deepcopy(self.cp.model), copy.deepcopy(self.config))
            if self.from_text:
                text = "\n".join(row.completion for row in rows[: self.options.num_slots])
                peft_training.initialize_from_text(model, self.cp.tokenizer, text)
            share = -(-steps // len(labels))
            peft_training.train(
                model,
                [self.tokenized(row) for row in rows],
                batch_size=self.options.batch_size,
                learning_rate=self.learning_rate,
                steps=share,
                seed=seed,
                schedule=learning_rate_schedule(share),
            )
            self.models[label] = model
            self.num_parameters += sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.num_stored = self.num_parameters

    def tokenized(self, row: Row) -> TokenizedExample:
        """Token ids of the row's prompt and completion."""
        return self.cp.frozen_model.request_tokenizer.example_ids(self.example(row, None))

    def nll(self, rows: Sequence[Row], labels: Sequence[str | None]) -> float:
        total, num_tokens = 0.0, 0
        for label, model in self.models.items():
            own_rows = [
                self.tokenized(row)
                for row, row_label in zip(rows, labels, strict=True)
                if label in (None, row_label)
            ]
            nats, count = peft_training.nll(model, own_rows)
            total, num_tokens = total + nats, num_tokens + count
        return total / num_tokens

    def write(self, rows: Sequence[Row], labels: Sequence[str | None]) -> list[str]:
        texts = [""] * len(rows)
        for label, model in self.models.items():
            prompts = {
                i: self.tokenized(rows[i]).prompt
                for i, row_label in enumerate(labels)
                if label in (None, row_label)
            }
            order = sorted(prompts, key=lambda i: len(prompts[i]))
            for first in range(0, len(order), 16):
                batch = order[first : first + 16]
                outputs = peft_training.sample(
                    model,
                    self.cp.tokenizer,
                    [prompts[i] for i in batch],
                    max_new_tokens=self.options.new_tokens,
                    seed=first,
                    temperature=None if rows[batch[0]].prompt else TEMPERATURE,
                )
                for i, text in zip(batch, outputs, strict=True):
                    texts[i] = text.split("\n")[0].strip()
        return texts
