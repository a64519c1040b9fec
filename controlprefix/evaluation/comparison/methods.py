"""Methods that adapt one model to rows, behind one interface: prompts, and this library's own."""

import contextlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from controlprefix.attributes.ordinal import by_attribute, is_inside
from controlprefix.embeddings import load_embedder
from controlprefix.engine import ControlPrefix
from controlprefix.errors import ControlPrefixError
from controlprefix.evaluation.comparison.costs import Costs
from controlprefix.example import Example
from controlprefix.labels import weighted_labels
from controlprefix.model import FrozenModel
from controlprefix.model.tokenization import TokenizedExample
from controlprefix.prefixes import Kind, Part, Prefix, PrefixKey
from controlprefix.request import Request, When
from controlprefix.store import PrefixStore
from controlprefix.training import Learnable
from controlprefix.training.initialization import as_decoupled

NUM_SHOTS = 4
NUM_ADAPTATIONS = 8  # in the batch whose speed is measured
_MAX_LABELS = 4


@dataclass(frozen=True)
class ComparisonSetup:
    """The rows, the model and the training settings that all methods get.

    Attributes:
        frozen: The model.
        training, validation, test: Rows of a single task each.
        instruction: The instruction of instructed models, or None.
        steps, batch_size, num_slots: How each method is trained.
        max_new_tokens: Maximum length of a text.
    """

    frozen: FrozenModel
    training: Sequence[Example]
    validation: Sequence[Example]
    test: Sequence[Example]
    instruction: str | None = None
    steps: int = 24
    batch_size: int = 8
    num_slots: int = 8
    max_new_tokens: int = 32

    @cached_property
    def attributes(self) -> dict[str, list[str]]:
        """Attribute -> its labels in training rows."""
        labels: dict[str, set[str]] = {}
        for row in self.training:
            for attribute, label, _ in weighted_labels(row.attributes):
                labels.setdefault(attribute, set()).add(label)
        return {attribute: sorted(names) for attribute, names in sorted(labels.items())}

    @cached_property
    def label_attribute(self) -> str | None:
        """The attribute of which methods without attributes train an adapter per label."""
        if len(self.attributes) != 1:
            return None
        ((attribute, labels),) = self.attributes.items()
        rows = (*self.training, *self.validation, *self.test)
        is_few = 2 <= len(labels) <= _MAX_LABELS
        return attribute if is_few and set(map(self.label, rows)) <= set(labels) else None

    def label(self, row: Example) -> str | None:
        """The label of a row, if its attribute is that of all rows."""
        names = [label for _, label, _ in weighted_labels(row.attributes)]
        return names[0] if len(names) == 1 else None

    def has_labels(self, row: Example) -> bool:
        """Whether training rows have all labels of a row."""
        return all(
            label in self.attributes.get(attribute, ())
            for attribute, label, _ in weighted_labels(row.attributes)
        )

    @cached_property
    def is_single_line(self) -> bool:
        """Whether no completion has a line break, so that texts are cut at the first."""
        return not any("\n" in row.completion.strip() for row in self.training)


class Method:
    """The model as it is; other methods override what they change.

    Attributes:
        rates: Learning rates to choose from; none if nothing is trained.
        num_parameters: Values that training changes, after `train`.
        num_stored: Values to keep, after `train`.
        num_adaptations: How many adapters or prefixes those are.
        costs: What the training cost.
        is_mixed: Whether rows of one batch can have different adaptations.
        end_of_text: What ends a text, where no end token does.
    """

    rates: Sequence[float] = ()
    is_mixed = True
    end_of_text = ""

    def __init__(self, setup: ComparisonSetup) -> None:
        self.setup = setup
        self.num_parameters = self.num_stored = 0
        self.num_adaptations = 1
        self.costs = Costs()

    def unavailable(self) -> str | None:
        """Why the method does not apply to the model or the rows, if it does not."""
        return None

    def required_bytes(self) -> int:
        """About how much memory its training needs beyond the model, with an earlier one kept."""
        return 0

    def train(self, *, rate: float, seed: int) -> None:
        """Train on the training rows."""

    def reworded(self, row: Example) -> Example:
        """The row as the adapted model reads it."""
        return row

    def tokenized(self, row: Example) -> TokenizedExample:
        """Token ids of the row as the adapted model reads it."""
        return self.setup.frozen.request_tokenizer.example_ids(self.reworded(row))

    def group(self, row: Example) -> str | None:
        """Rows of one group can share a batch."""
        return None

    @contextlib.contextmanager
    def applied(self, rows: Sequence[Example]) -> Iterator[nn.Module]:
        """The adapted model, for a batch of rows of one group."""
        yield self.setup.frozen.model

    @contextlib.contextmanager
    def switched_off(self, rows: Sequence[Example]) -> Iterator[nn.Module | None]:
        """The adapted model without its adaptation; None if that needs another copy of it."""
        yield self.setup.frozen.model

    @contextlib.contextmanager
    def many_applied(self) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
        """The model with another adaptation per row of a batch, and options of `generate`."""
        yield self.setup.frozen.model, {}

    def close(self) -> None:
        """Free the memory of what was trained."""


class Plain(Method):
    """The model as it is."""


class Instruction(Method):
    """An instruction in the prompt."""

    def unavailable(self) -> str | None:
        if self.setup.instruction is None and not self.setup.attributes:
            return "there is no instruction"
        return None

    def reworded(self, row: Example) -> Example:
        labels = ", ".join(label for _, label, _ in weighted_labels(row.attributes))
        text = self.setup.instruction or "Write a text that is {labels}. Write nothing else."
        return _preceded(row, text.replace("{labels}", labels))


class FewShot(Method):
    """Training rows, of the same label where there are few labels, in the prompt."""

    end_of_text = "\n\n"

    def reworded(self, row: Example) -> Example:
        rng = random.Random(f"{row.prompt}{row.completion}")
        pool = self.setup.training
        if self.setup.label_attribute:
            label = self.setup.label(row)
            pool = [other for other in pool if self.setup.label(other) == label]
        shots = rng.sample(list(pool), min(NUM_SHOTS, len(pool)))
        end = self.end_of_text
        text = "".join(f"{_prompt_of(shot)}{_joined(shot.completion)}{end}" for shot in shots)
        return row.model_copy(
            update={"prompt": f"{text}{_prompt_of(row)}", "raw": True, "messages": None}
        )


class ControlPrefixMethod(Method):
    """This library: a task prefix, and one per label if rows have labels.

    Args:
        setup: As for every method.
        labels: Whether labels have prefixes of their own, where rows have labels.
        nearest: Whether the nearest trained labels stand in for one that has no prefix, as in
            Control Prefixes; otherwise it is left out.
        when: Whether prefixes apply to every prompt, or learn which prompts they are for.
        **settings: Fields of `TrainingSettings`.

    Reference:
        Clive et al., "Control Prefixes", 2021, https://arxiv.org/abs/2110.08329.
    """

    def __init__(
        self,
        setup: ComparisonSetup,
        *,
        labels: bool = True,
        nearest: bool = False,
        when: When = "always",
        **settings: Any,
    ) -> None:
        super().__init__(setup)
        self.nearest = nearest
        self.when: When = when
        self.labels = labels and bool(setup.attributes)
        self.is_without_labels = not labels
        self.settings = settings
        is_direct = settings.get("parameterization") == "direct"
        self.rates = (1e-2, 2e-2, 4e-2) if is_direct else (2.5e-4, 5e-4, 1e-3)

    @cached_property
    def cp(self) -> ControlPrefix:
        """The model, with a store of the method's own."""
        return ControlPrefix(self.setup.frozen, PrefixStore("sqlite://"))

    def unavailable(self) -> str | None:
        if self.settings.get("contrast") and not self.setup.label_attribute:
            return f"it compares labels, and the rows have not 2 to {_MAX_LABELS} of one attribute"
        if self.is_without_labels and not self.setup.attributes:
            return "the rows have no labels to leave out"
        if self.nearest and all(map(self.setup.has_labels, self.setup.test)):
            return "the test rows have no label that was not trained"
        if self.when == "relevant" and not all(map(prompt_text, self.setup.training)):
            return "the rows have no prompts by which to tell when it is meant"
        if self.when == "relevant" and len(set(map(prompt_text, self.setup.training))) < 8:
            return "the rows have too few different prompts by which to tell when it is meant"
        if self.nearest or self.when == "relevant":
            try:
                load_embedder()
            except ControlPrefixError as error:
                return str(error)
        return None

    def train(self, *, rate: float, seed: int) -> None:
        learn: tuple[Learnable, ...] = ("task", "attributes") if self.labels else ("task",)
        rows = list(map(self.reworded, self.setup.training))
        with self.costs.watched():
            report = self.cp.train(
                rows,
                learn=learn,
                num_slots=self.setup.num_slots,
                steps=self.setup.steps,
                batch_size=self.setup.batch_size,
                learning_rate=rate,
                validation=0,
                seed=seed,
                progress=False,
                **self.settings,
            )
        if self.when == "relevant":
            prompts = list(map(prompt_text, rows))
            for kind, name in self._stored():
                self.cp.learn_relevance(kind, name, prompts)
        self.num_parameters = report.num_parameters
        prefixes = list(self.prefixes())
        self.num_adaptations = len(prefixes)
        self.num_stored = sum(
            slots.numel() for prefix in prefixes for slots in prefix.slots.values()
        )
        gates = [prefix.relevance for prefix in prefixes if prefix.relevance is not None]
        self.num_stored += sum(gate.own.numel() + gate.others.numel() for gate in gates)

    def prefixes(self) -> Iterator[Prefix]:
        """All that were trained."""
        return (self.cp.get(kind, name) for kind, name in self._stored())

    def _stored(self) -> list[tuple[Kind, str]]:
        kinds: tuple[Kind, ...] = ("task", "attribute")
        return [(kind, name) for kind in kinds for name in self.cp.names(kind)]

    def reworded(self, row: Example) -> Example:
        return row if self.labels else row.model_copy(update={"attributes": {}})

    def request(self, row: Example, strength: float = 1.0) -> Request:
        """A request with the prefixes of a row that were trained."""
        names = self.cp.names("attribute")
        stored = by_attribute(PrefixKey("attribute", name) for name in names)
        labels: dict[str, dict[str, float]] = {}
        for attribute, label, weight in weighted_labels(self.reworded(row).attributes):
            own = stored.get(attribute, set())
            has_stand_in = self.nearest and bool(own)
            if label in own or is_inside(label, own) or has_stand_in:
                labels.setdefault(attribute, {})[label] = weight * strength
        strengths = {} if strength == 1.0 else {"task": strength}
        prompt = prompt_text(row) if self.when == "relevant" else ""
        return Request(
            prompt=prompt,
            raw=True,
            when=self.when,
            task=row.task,
            attributes=labels,
            strengths=strengths,
            unseen="nearest" if self.nearest else "refuse",
        )

    @contextlib.contextmanager
    def applied(self, rows: Sequence[Example]) -> Iterator[nn.Module]:
        with self.cp.assembled([self.request(row) for row in rows]):
            yield self.cp.model

    @contextlib.contextmanager
    def switched_off(self, rows: Sequence[Example]) -> Iterator[nn.Module | None]:
        with self.cp.assembled([self.request(row, 0.0) for row in rows]):
            yield self.cp.model

    @contextlib.contextmanager
    def many_applied(self) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
        frozen = self.setup.frozen
        num_slots = self.setup.num_slots * (2 if self.labels else 1)
        prefixes = [
            Prefix.random(frozen.geometry, num_slots=num_slots, seed=i)
            for i in range(NUM_ADAPTATIONS)
        ]
        if self.settings.get("form") == "decoupled":
            prefixes = [as_decoupled(prefix) for prefix in prefixes]
        parts = [[Part(prefix)] for prefix in prefixes]
        with frozen.attached(frozen.assemble(parts)):
            yield frozen.model, {}


def prompt_text(row: Example) -> str:
    """What a row's prompt, or its last message, says."""
    return row.texts[-1].strip()


def _prompt_of(row: Example) -> str:
    """The prompt of a row as a line of a few-shot prompt."""
    return "".join(f"{text.strip()}\n" for text in row.texts if text.strip())


def _joined(completion: str) -> str:
    """A completion without the empty lines that end one in a few-shot prompt."""
    return "\n".join(line for line in completion.strip().split("\n") if line.strip())


def _preceded(row: Example, text: str) -> Example:
    """A row with a text in front of its prompt or of its last message."""
    if row.messages:
        last = row.messages[-1]
        changed = last.model_copy(update={"content": f"{text}\n\n{last.content}"})
        return row.model_copy(update={"messages": (*row.messages[:-1], changed)})
    prompt = f"{text}\n\n{row.prompt}" if row.prompt else text
    return row.model_copy(update={"prompt": prompt, "raw": False})
