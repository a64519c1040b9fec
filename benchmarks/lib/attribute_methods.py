"""Methods that request several labels at once, all trained on the same rows."""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from controlprefix import Example, Request
from controlprefix.evaluation import best_texts, pseudo_label
from controlprefix.evaluation.comparison.measures import TEMPERATURE
from controlprefix.prefixes import Form
from controlprefix.training import StepInfo

from lib.attribute_baselines import FewShot, Instruction, Method, RealTexts, instruction
from lib.attribute_peers import LoraSum, PrefixUnion, SteeringVectors
from lib.attribute_studies import BATCH_SIZE, Combination, Study, attributes_of


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
                seed=self.seed,
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
            diversity=self.options.pool_diversity,
            batch_size=128,
            seed=100_000 * self.seed,
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
            seed=self.seed,
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
            seed=self.seed,
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
