"""Trains and measures one method of a comparison after another."""

import contextlib
import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import psutil
import torch

from controlprefix.engine import ControlPrefix
from controlprefix.errors import MissingDependencyError, StoreError, TrainingDataError, short_reason
from controlprefix.evaluation.classifier import AttributeClassifier
from controlprefix.evaluation.comparison import measures
from controlprefix.evaluation.comparison.adapters import (
    BitFit,
    BottleneckAdapter,
    FullFineTuning,
    PrefixMemory,
)
from controlprefix.evaluation.comparison.methods import (
    ComparisonSetup,
    ControlPrefixMethod,
    FewShot,
    Instruction,
    Method,
    Plain,
)
from controlprefix.evaluation.comparison.peft_methods import (
    LORA,
    PEFT_KINDS,
    LoraMethod,
    LoraThenPrefix,
    PeftMethod,
    PrefixThenLora,
)
from controlprefix.evaluation.comparison.state import ComparisonState
from controlprefix.evaluation.harness import base_model_nll
from controlprefix.example import Example
from controlprefix.labels import weighted_labels
from controlprefix.store import PrefixStore
from controlprefix.training.held_out import prompt_identity

# A container has these files: its limit and what it uses, in cgroup versions 2 and 1.
_CGROUP = Path("/sys/fs/cgroup")
_CGROUP_FILES = (
    (_CGROUP / "memory.max", _CGROUP / "memory.current"),
    (_CGROUP / "memory/memory.limit_in_bytes", _CGROUP / "memory/memory.usage_in_bytes"),
)
_SPARE = 1.2  # memory that must be available, times what is needed

MethodMaker = Callable[[ComparisonSetup], Method]
METHODS: Final[dict[str, MethodMaker]] = {
    "plain": Plain,
    "instruction": Instruction,
    "few-shot": FewShot,
    "controlprefix": ControlPrefixMethod,
    "controlprefix, task only": partial(ControlPrefixMethod, labels=False),
    "controlprefix, contrast": partial(ControlPrefixMethod, contrast=0.3),
    "controlprefix, off context": partial(ControlPrefixMethod, off_context=0.1),
    "controlprefix, nearest label": partial(ControlPrefixMethod, nearest=True),
    "controlprefix, when relevant": partial(ControlPrefixMethod, when="relevant"),
    "controlprefix, direct": partial(ControlPrefixMethod, parameterization="direct"),
    "controlprefix, decoupled": partial(ControlPrefixMethod, form="decoupled"),
    **{name: partial(PeftMethod, kind=kind) for name, kind in PEFT_KINDS.items()},
    "PEFT LoRA r8": partial(LoraMethod, kind=LORA),
    "prefix memory": PrefixMemory,
    "bottleneck adapters": BottleneckAdapter,
    "BitFit": BitFit,
    "full fine-tuning": FullFineTuning,
    "prefix, then LoRA": partial(PrefixThenLora, kind=LORA),
    "LoRA, then prefix": partial(LoraThenPrefix, kind=LORA),
}


def require_methods(names: Sequence[str]) -> None:
    """Check that methods exist.

    Raises:
        TrainingDataError: With those that do.
    """
    for name in names:
        if name not in METHODS:  # names contain commas
            raise TrainingDataError(
                f"there is no method {name!r} to compare; there are: {'; '.join(METHODS)}"
            )


class MethodRunner:
    """Trains and measures one method after another; what the state has is not repeated."""

    def __init__(
        self,
        setup: ComparisonSetup,
        state: ComparisonState,
        elsewhere: measures.Elsewhere,
        classifiers: Mapping[str, AttributeClassifier],
        num_rates: int,
    ) -> None:
        self.setup, self.state, self.elsewhere = setup, state, elsewhere
        self.classifiers = classifiers
        self.num_rates = num_rates
        self.plain_cp = ControlPrefix(setup.frozen, PrefixStore("sqlite://"))

    @cached_property
    def _plain_nats_of_general(self) -> float:
        return measures.nats_per_token(Plain(self.setup), self.elsewhere.general)

    @cached_property
    def _plain_spectrum(self) -> measures.Spectrum | None:
        return measures.spectrum(Plain(self.setup), self.elsewhere.answers)

    def measure(self, name: str, seeds: Sequence[int]) -> Iterator[str]:
        """Measure a method; yields what was done after each training."""
        result = self.state.method(name)
        result.pop("skipped", None)  # there may be more memory now
        method = METHODS[name](self.setup)
        needed = set(map(str, seeds if method.rates else seeds[:1]))
        is_measured = needed <= result.get("runs", {}).keys()
        reason = None if is_measured else method.unavailable() or _too_large(method)
        if reason is not None:
            result["skipped"] = reason
            self.state.save()
            yield f"skipped, {reason}"
            return
        try:
            yield from self._measure(name, result, seeds)
        except (StoreError, MissingDependencyError):
            raise
        except Exception as error:  # PEFT and torch refuse models and sizes in many ways
            result["skipped"] = short_reason(error)
            self.state.save()
            yield f"skipped, {result['skipped']}"

    def _measure(self, name: str, result: dict[str, Any], seeds: Sequence[int]) -> Iterator[str]:
        rates = _from_the_middle(METHODS[name](self.setup).rates)[: self.num_rates]
        first = result.setdefault("first_seed", seeds[0])
        if (
            rates
            and first != seeds[0]
            and not set(map(str, seeds)) <= result.get("runs", {}).keys()
        ):
            raise StoreError(
                f"the learning rates in {self.state.path} were chosen with seed {first}; begin "
                "seeds with it, or give another folder"
            )
        losses: dict[str, float | None] = result.setdefault("validation", {})
        runs: dict[str, measures.Figures] = result.setdefault("runs", {})
        best: _Trained | None = None
        for rate in rates:
            if str(rate) not in losses:
                trained, loss = self._try(name, rate, seeds[0])
                earlier = [value for value in losses.values() if value is not None]
                losses[str(rate)] = loss
                if (
                    trained is not None
                    and loss is not None
                    and loss < min(earlier, default=math.inf)
                ):
                    if best is not None:
                        best.close()
                    best = trained
                elif trained is not None:
                    trained.close()
                self.state.save()
            yield f"learning rate {rate:g}"
        finite = {rate: loss for rate, loss in losses.items() if loss is not None}
        if losses and not finite:
            raise TrainingDataError("it diverges at every learning rate")
        best_rate = float(min(finite, key=lambda rate: finite[rate])) if finite else 0.0
        for number, seed in enumerate(seeds if rates else seeds[:1]):
            if str(seed) not in runs:
                is_kept = best is not None and best.rate == best_rate and not number
                trained = best if best and is_kept else self._train(name, best_rate, seed)
                self._record(result, trained.method, seed)
                trained.close()
                self.state.save()
            if number or not rates:  # the first seed is that of the learning rates
                yield f"seed {seed}"

    def _try(self, name: str, rate: float, seed: int) -> "tuple[_Trained | None, float | None]":
        """A method trained at a rate, and its validation loss; None if it diverges."""
        try:
            trained = self._train(name, rate, seed)
        except TrainingDataError as error:
            if "the loss is" not in str(error):
                raise
            return None, None
        loss = measures.nats_per_token(trained.method, self.setup.validation)
        return trained, round(loss, 5) if math.isfinite(loss) else None

    def _train(self, name: str, rate: float, seed: int) -> "_Trained":
        torch.manual_seed(seed)
        method = METHODS[name](self.setup)
        method.train(rate=rate, seed=seed)
        return _Trained(method, rate)

    def _record(self, result: dict[str, Any], method: Method, seed: int) -> None:
        """Measure a trained method."""
        setup, elsewhere = self.setup, self.elsewhere
        rows = setup.test
        scored = measures.nats_of_rows(method, rows)
        num_tokens = sum(count for _, count in scored)
        figures: measures.Figures = {"nats": sum(nats for nats, _ in scored) / max(1, num_tokens)}
        # Rows without a prompt are independent of each other.
        prompts = [prompt_identity(row) or i for i, row in enumerate(rows)]
        numbers = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        result["row prompts"] = [numbers[prompt] for prompt in prompts]
        result.setdefault("row nats", {})[str(seed)] = [
            round(nats / max(1, count), 5) for nats, count in scored
        ]
        if setup.label_attribute:
            labels = setup.attributes[setup.label_attribute]
            following = dict(zip(labels, labels[1:] + labels[:1], strict=True))
            swapped = [
                row.model_copy(
                    update={"attributes": {setup.label_attribute: following[str(setup.label(row))]}}
                )
                for row in rows
            ]
            figures["nats, other label"] = measures.nats_per_token(method, swapped)
        unseen = [row for row in rows if not setup.has_labels(row)]
        if 0 < len(unseen) < len(rows):
            figures["nats, unseen"] = measures.nats_per_token(method, unseen)
        requests = measures.distinct_requests(rows)
        texts = measures.texts_of(method, requests, seed)
        figures |= measures.text_figures(rows, requests, texts)
        if "nats, unseen" in figures:
            own = dict(zip(map(id, requests), texts, strict=True))
            others = measures.distinct_requests(unseen)
            apart = measures.text_figures(unseen, others, [own[id(row)] for row in others])
            figures |= {f"{k}, unseen": apart[k] for k in ("BLEU", "chrF") if k in apart}
        figures |= measures.accuracy_figures(requests, texts, self.classifiers)
        nll = base_model_nll(self.plain_cp, texts)
        if math.isfinite(nll):  # not if all texts are empty
            figures["base-model nats"] = nll
        for key, completed in (("written", elsewhere.written), ("answers", elsewhere.answers)):
            value = measures.divergence(method, completed)
            if value is not None:
                figures[f"divergence, {key}"] = value
        spectrum = measures.spectrum(method, elsewhere.answers)
        if spectrum is not None and self._plain_spectrum is not None:
            figures["effective rank"] = spectrum.rank
            figures["spectrum gap"] = spectrum.gap(self._plain_spectrum)
        if elsewhere.general:
            general = measures.in_context(setup, elsewhere.general)
            nats = measures.nats_per_token(method, general)
            figures["forgetting"] = nats - self._plain_nats_of_general
        off = measures.divergence(method, elsewhere.written[:4], off=True)
        if off is not None:
            figures["divergence, off"] = off
        figures["tokens per second"] = measures.tokens_per_second(method)
        if method.rates:
            figures |= {
                "parameters": method.num_parameters,
                "stored": method.num_stored,
                "bytes per adaptation": 2 * method.num_stored / method.num_adaptations,
                "step seconds": method.costs.seconds / setup.steps,
                "peak MiB": method.costs.peak_mib,
            }
        result.setdefault("runs", {})[str(seed)] = {k: round(v, 5) for k, v in figures.items()}
        samples = [
            {"prompt": row.texts[-1], "labels": _labels_of(row), "text": text}
            for row, text in zip(requests[:4], texts[:4], strict=True)
        ]
        result.setdefault("texts", samples)


def _labels_of(row: Example) -> dict[str, str]:
    """The labels of a row in words, mixtures with their weights."""
    labels: dict[str, list[str]] = {}
    for attribute, label, weight in weighted_labels(row.attributes):
        labels.setdefault(attribute, []).append(label if weight == 1 else f"{weight:g} {label}")
    return {attribute: " + ".join(own) for attribute, own in labels.items()}


class _Trained(NamedTuple):
    """A trained method, and its learning rate."""

    method: Method
    rate: float

    def close(self) -> None:
        """Free its memory."""
        self.method.close()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _too_large(method: Method) -> str | None:
    """Why a method's training would not fit the memory."""
    device = method.setup.frozen.device
    available = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _available_bytes()
    required = _SPARE * method.required_bytes()
    if required <= available:
        return None
    return f"it needs about {required / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are free"


def _available_bytes() -> int:
    """Free memory of the machine, or of the container, whichever is less."""
    available = psutil.virtual_memory().available
    for limit, used in _CGROUP_FILES:
        with contextlib.suppress(OSError, ValueError):  # not in a container, or without a limit
            available = min(available, int(limit.read_text()) - int(used.read_text()))
    return max(0, available)


def _from_the_middle(rates: Sequence[float]) -> list[float]:
    """The middle rate first, then those beside it."""
    middle = len(rates) // 2
    return sorted(rates, key=lambda rate: abs(rates.index(rate) - middle))
