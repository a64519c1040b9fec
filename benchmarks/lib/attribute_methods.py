"""Methods that request several labels at once, all trained on the same rows."""

import argparse
import copy
import importlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy
import torch
from transformers import DynamicCache

from controlprefix import Example, Request
from controlprefix.evaluation import best_texts, pseudo_label
from controlprefix.evaluation.comparison.measures import TEMPERATURE
from controlprefix.evaluation.comparison.methods import Problem
from controlprefix.evaluation.comparison.peft_methods import LORA, PEFT_KINDS, PeftMethod
from controlprefix.prefixes import Form
from controlprefix.training import StepInfo

from lib.attribute_studies import BATCH_SIZE, IN_WORDS, Combination, Study, attributes_of, parts_of
from lib.datasets import shuffled
from lib.models import engine

PARTS = "part"  # the attribute whose labels are such as `topic=sports`


class Method:
    """One way to request several labels at once; this one leaves the model as it is.

    Attributes:
        coefficients: Values of a coefficient to choose from, or none.
        nll_limit: A method whose texts its own must not exceed in base-model NLL.
    """

    coefficients: Sequence[float] = ()
    nll_limit: str | None = None

    def __init__(self, study: Study, options: argparse.Namespace) -> None:
        self.study, self.options = study, options
        self.coefficient = 1.0
        self.cp = engine(study.frozen)

    def train(self) -> None:
        """Train on the study's rows."""

    def write(self, combination: Combination, count: int, seed: int) -> list[str]:
        """Texts with those labels."""
        return self.sample(self.cp.model, count, seed)

    def sample(
        self,
        model: Any,
        count: int,
        seed: int,
        slots: Sequence[tuple[torch.Tensor, torch.Tensor]] = (),
    ) -> list[str]:
        """Texts from an empty prompt by transformers alone, after keys and values in the cache."""
        tokenizer, device = self.cp.tokenizer, self.cp.model.device
        options: dict[str, Any] = {}
        if slots:
            rows = [(k.expand(count, -1, -1, -1), v.expand(count, -1, -1, -1)) for k, v in slots]
            options["past_key_values"] = DynamicCache(
                ddp_cache_data=rows, config=self.cp.model.config
            )
        num_slots = slots[0][0].shape[2] if slots else 0
        torch.manual_seed(seed)
        with torch.no_grad():
            output = model.generate(
                input_ids=torch.full((count, 1), int(tokenizer.bos_token_id), device=device),
                attention_mask=torch.ones(count, num_slots + 1, dtype=torch.long, device=device),
                max_new_tokens=self.options.new_tokens,
                do_sample=True,
                temperature=TEMPERATURE,
                top_k=0,
                pad_token_id=self.study.frozen.pad_id,
                **options,
            )
        texts = tokenizer.batch_decode(output[:, 1:], skip_special_tokens=True)
        return [str(text).split("\n")[0].strip() for text in texts]

    def generate(self, requests: Sequence[dict[str, Any]], seed: int) -> list[str]:
        """Texts of requests, through the library."""
        rows = [
            Request(
                **{"prompt": self.cp.tokenizer.bos_token, "raw": True, **fields},
                max_new_tokens=self.options.new_tokens,
                temperature=TEMPERATURE,
                seed=seed * 10_000 + i,
                stop=["\n"],
            )
            for i, fields in enumerate(requests)
        ]
        return [completion.text.strip() for completion in self.cp.generate(rows, batch_size=128)]


class RealTexts(Method):
    """Rows of the test splits, with one label each, cut to the length of samples."""

    def texts(self, count: int) -> list[tuple[Combination, str]]:
        """Texts and their labels."""
        rows = shuffled(self.study.test_rows, 0)[:count]
        ids = [self.cp.tokenizer.encode(row.completion) for row in rows]
        limit = self.options.new_tokens
        cut = self.cp.tokenizer.batch_decode([own[:limit] for own in ids])
        return [(attributes_of(row), str(text)) for row, text in zip(rows, cut, strict=True)]


def instruction(combination: Combination) -> dict[str, Any]:
    """A request that says the labels in words."""
    labels = ", ".join(IN_WORDS.get(label, label) for label in combination.values())
    return {"prompt": f"Write one sentence that is {labels}. Write nothing else.", "raw": False}


class Instruction(Method):
    """An instruction in the prompt."""

    def write(self, combination: Combination, count: int, seed: int) -> list[str]:
        return self.generate([instruction(combination)] * count, seed)


class FewShot(Method):
    """Two training rows per label in the prompt."""

    def write(self, combination: Combination, count: int, seed: int) -> list[str]:
        requests = []
        for i in range(count):
            shots = [
                row.completion
                for part in parts_of(combination)
                for row in shuffled((r for r in self.study.rows if r.label == part), seed + i)[:2]
            ]
            requests.append({"prompt": "".join(f"{text}\n" for text in shots)})
        return self.generate(requests, seed)


class ControlPrefixMethod(Method):
    """This library.

    Args:
        study, options: As for every method.
        separate: Train each attribute alone, without a task prefix.
        form: Form of the prefixes.
        pseudo_labels: Fill in the labels that rows leave out.
        mixing: How a request mixes labels.
        against: Steer away from the other labels of each attribute.
        instructed: Add the instruction.
        coefficients: Strengths to choose from.
        nll_limit: As in `Method`.
    """

    def __init__(
        self,
        study: Study,
        options: argparse.Namespace,
        *,
        separate: bool = False,
        form: Form = "joint",
        pseudo_labels: bool = False,
        mixing: str = "attention",
        against: bool = False,
        instructed: bool = False,
        coefficients: Sequence[float] = (),
        nll_limit: str | None = None,
    ) -> None:
        super().__init__(study, options)
        self.separate, self.pseudo_labels, self.instructed = separate, pseudo_labels, instructed
        self.form, self.mixing, self.against = form, mixing, against
        self.coefficients, self.nll_limit = coefficients, nll_limit

    def train(self) -> None:
        attributes = list(self.study.labels)
        for group in [[a] for a in attributes] if self.separate else [attributes]:
            rows = [
                Example(
                    prompt="",
                    raw=True,
                    completion=row.completion,
                    task=None if self.separate else "text",
                    attributes=attributes_of(row),
                )
                for row in self.study.rows
                if attributes_of(row).keys() <= set(group)
            ]
            self.cp.train(
                pseudo_label(rows) if self.pseudo_labels else rows,
                learn=("attributes",) if self.separate else ("task", "attributes"),
                num_slots=self.options.num_slots,
                form=self.form,
                steps=-(-self.options.steps * len(group) // len(attributes)),
                batch_size=BATCH_SIZE,
                contrast=0.3,
                validation=0,
                progress=False,
            )

    def request(self, combination: Combination) -> dict[str, Any]:
        """The fields of a request for a combination."""
        weights = {}
        for attribute, label in combination.items():
            weights[attribute] = {label: self.coefficient}
            others = [x for x in self.study.labels[attribute] if x != label]
            if self.against:
                weights[attribute] |= dict.fromkeys(others, -self.coefficient / len(others))
        return {
            "task": None if self.separate else "text",
            "attributes": weights,
            "mixing": self.mixing,
            **(instruction(combination) if self.instructed else {}),
        }

    def write(self, combination: Combination, count: int, seed: int) -> list[str]:
        return self.generate([self.request(combination)] * count, seed)


class Continued(ControlPrefixMethod):
    """This library: the prefixes of a trained method, trained further with a reward.

    Attributes:
        start: Name of that method.
    """

    start = "controlprefix"

    def train_from(self, other: Method) -> None:
        """Start from another method's prefixes."""
        for kind in ("task", "attribute"):
            for name in other.cp.names(kind):
                self.cp.put(kind, name, other.cp.get(kind, name))
        self.train_further()

    def train_further(self) -> None:
        """Train the stored prefixes."""

    def requests(self, method: ControlPrefixMethod) -> list[Request]:
        """A request for each combination of labels, as another method makes it."""
        return [
            Request(
                prompt=str(self.cp.tokenizer.bos_token),
                raw=True,
                max_new_tokens=self.options.new_tokens,
                stop=("\n",),
                **method.request(combination),
            )
            for combination in self.study.combinations()
        ]

    def rows(self, count: int | None = None) -> list[Example]:
        """Training rows of the study."""
        return [
            Example(
                prompt="",
                raw=True,
                completion=row.completion,
                task="text",
                attributes=attributes_of(row),
            )
            for row in self.study.rows[:count]
        ]


class SelfTrained(Continued):
    """Then texts of logits for and against that a reward prefers, beside training rows."""

    teacher_coefficient = 2.0

    def train_further(self) -> None:
        teacher = ControlPrefixMethod(self.study, self.options, mixing="logits", against=True)
        teacher.coefficient = self.teacher_coefficient
        texts = best_texts(
            self.cp,
            [
                request.model_copy(update={"temperature": TEMPERATURE})
                for request in self.requests(teacher)
            ],
            self.study.reward,
            num_samples=self.options.pool,
            keep=self.options.keep,
            batch_size=128,
        )
        # What a completion follows in training: nothing, as in the rows.
        examples = [text.model_copy(update={"prompt": ""}) for text in texts]
        self.cp.train(
            [*examples, *self.rows(len(examples))],
            learn=("task", "attributes"),
            init="stored",
            steps=self.options.self_steps,
            batch_size=BATCH_SIZE,
            contrast=0.3,
            validation=0,
            progress=False,
        )


class Reinforced(Continued):
    """Then rewards of composed requests."""

    def train_further(self) -> None:
        self.cp.reinforce(
            self.requests(self),
            reward=self.study.reward,
            demonstrations=self.rows(),
            steps=self.options.reward_steps,
            batch_size=self.options.requests,
            num_samples=self.options.samples,
            diversity=self.options.diversity,
            kl=self.options.kl,
            demonstrated=self.options.demonstrated,
            progress=False,
            on_step=_print_tenth,
        )


class SelfTrainedReinforced(Reinforced):
    """Then both."""

    start = "controlprefix, self-trained"


def _print_tenth(step: StepInfo) -> None:
    if step.step == 1 or step.step % 10 == 0:
        figures = {name: round(value, 3) for name, value in step.metrics.items()}
        print(f"step {step.step} of {step.num_steps}: {figures}", flush=True)


class _OnePerPart(Problem):
    """The rows of a study, with an adapter for each label of each attribute."""

    few_labels = PARTS  # however many


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
        problem = _OnePerPart(
            self.study.frozen,
            rows,
            (),
            (),
            steps=self.options.steps,
            batch_size=BATCH_SIZE,
            num_slots=self.options.num_slots,
        )
        kind = {**PEFT_KINDS, "PEFT LoRA r8": LORA}[self.adapter]
        self.method = PeftMethod(problem, kind=kind)
        self.method.train(rate=self.learning_rate, seed=0)
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


LOGITS: dict[str, Any] = {"mixing": "logits", "coefficients": (0.5, 1.0, 2.0)}
JOINT = "controlprefix"
SELF_TRAINED = "controlprefix, self-trained"
REINFORCED = "controlprefix, reinforced"
BOTH = "controlprefix, self-trained and reinforced"
PSEUDO_LABELS = "controlprefix, pseudo-labels"
SEPARATE = "controlprefix, trained separately"
own = partial(partial, ControlPrefixMethod)
METHODS: dict[str, Callable[..., Method]] = {
    "real texts": RealTexts,
    "plain": Method,
    "instruction": Instruction,
    "few-shot": FewShot,
    JOINT: ControlPrefixMethod,
    "controlprefix, chosen strength": own(coefficients=(1.0, 1.5, 2.0)),
    "controlprefix, decoupled": own(form="decoupled"),
    "controlprefix, logits": own(**LOGITS),
    "controlprefix, logits, for and against": own(**LOGITS, against=True),
    SELF_TRAINED: SelfTrained,
    REINFORCED: Reinforced,
    BOTH: SelfTrainedReinforced,
    PSEUDO_LABELS: own(pseudo_labels=True, coefficients=(1.0, 1.5, 2.0)),
    "controlprefix, pseudo-labels, for and against": own(
        **LOGITS, pseudo_labels=True, against=True
    ),
    SEPARATE: own(separate=True),
    "controlprefix and an instruction": own(**LOGITS, separate=True, against=True, instructed=True),
    "controlprefix and an instruction, NLL as the instruction's": own(
        mixing="logits",
        coefficients=(0.25, 0.5, 1.0),
        separate=True,
        against=True,
        instructed=True,
        nll_limit="instruction",
    ),
    "union of PEFT prefixes": PrefixUnion,
    "sum of LoRA adapters": LoraSum,
    "repeng": SteeringVectors,
}
TRAINED_AS = {  # methods that differ from another in their requests only
    "controlprefix, chosen strength": JOINT,
    "controlprefix, logits": JOINT,
    "controlprefix, logits, for and against": JOINT,
    "controlprefix, pseudo-labels, for and against": PSEUDO_LABELS,
    "controlprefix and an instruction": SEPARATE,
    "controlprefix and an instruction, NLL as the instruction's": SEPARATE,
}


def trained(
    name: str, study: Study, options: argparse.Namespace, earlier: dict[str, Method]
) -> Method:
    """A trained method; it shares the prefixes of an earlier one that was trained alike."""
    method = METHODS[name](study, options)
    if isinstance(method, Continued):
        if method.start not in earlier:
            trained(method.start, study, options, earlier)
        method.train_from(earlier[method.start])
        earlier[name] = method
        return method
    trained_as = TRAINED_AS.get(name, name)
    if trained_as in earlier:
        method.cp = earlier[trained_as].cp
    else:
        method.train()
        earlier[trained_as] = method
    return method
