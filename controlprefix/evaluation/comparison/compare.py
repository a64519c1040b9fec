"""compare: train every method on the same rows, and measure what each does and costs."""

import gc
import hashlib
import importlib.metadata
import json
import math
import platform
import random
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import psutil
import torch

from controlprefix._io import atomic_path, progress_bar
from controlprefix._version import __version__
from controlprefix.data import Columns, Rows, as_examples
from controlprefix.engine import ControlPrefix
from controlprefix.errors import StoreError, TrainingDataError, UnsupportedModelError, known_names
from controlprefix.evaluation.classifier import AttributeClassifier
from controlprefix.evaluation.comparison import adapters, measures
from controlprefix.evaluation.comparison.methods import (
    ControlPrefixMethod,
    FewShot,
    Instruction,
    Method,
    Plain,
    Problem,
)
from controlprefix.evaluation.comparison.report import ComparisonReport
from controlprefix.evaluation.harness import base_model_nlls
from controlprefix.example import Example
from controlprefix.training.held_out import split_examples

_FILE = "comparison.json"
_TASK = "comparison"
_SPARE = 1.2  # memory that must be available, times what is needed

MethodMaker = Callable[[Problem], Method]


def _peft(config: str, rates: Sequence[float], *, from_text: bool = False, **fixed: Any) -> Any:
    """A method of PEFT that takes a number of virtual tokens, or the layers of attention."""

    def make(package: Any, num_slots: int, layers: Sequence[str]) -> Any:
        options = dict(fixed)
        if config in ("PrefixTuningConfig", "CartridgeConfig", "PromptTuningConfig"):
            options["num_virtual_tokens"] = num_slots
        if config == "LoraConfig":
            options["target_modules"] = list(layers)
        return getattr(package, config)(task_type="CAUSAL_LM", **options)

    return {"config": make, "rates": rates, "from_text": from_text}


_LORA: Final = _peft("LoraConfig", (1e-3, 3e-3, 1e-2), r=8, lora_alpha=16)

METHODS: Final[dict[str, MethodMaker]] = {
    "plain": Plain,
    "instruction": Instruction,
    "few-shot": FewShot,
    "controlprefix": ControlPrefixMethod,
    "controlprefix, task only": partial(ControlPrefixMethod, labels=False),
    "controlprefix, contrast": partial(ControlPrefixMethod, contrast=0.3),
    "controlprefix, off context": partial(ControlPrefixMethod, off_context=0.1),
    "PEFT prefix tuning": partial(
        adapters.PeftMethod, **_peft("PrefixTuningConfig", (1e-2, 3e-2, 1e-1))
    ),
    "PEFT prefix tuning from text": partial(
        adapters.PeftMethod, **_peft("PrefixTuningConfig", (3e-3, 1e-2, 3e-2), from_text=True)
    ),
    "PEFT cartridge": partial(
        adapters.PeftMethod, **_peft("CartridgeConfig", (1e-2, 3e-2, 1e-1), from_text=True)
    ),
    "PEFT prompt tuning": partial(
        adapters.PeftMethod,
        **_peft("PromptTuningConfig", (3e-2, 1e-1, 3e-1), prompt_tuning_init="RANDOM"),
    ),
    "PEFT IA3": partial(adapters.PeftMethod, **_peft("IA3Config", (3e-3, 1e-2, 3e-2))),
    "PEFT BEFT": partial(adapters.PeftMethod, **_peft("BeftConfig", (3e-3, 1e-2, 3e-2))),
    "PEFT LoRA r8": partial(adapters.LoraMethod, **_LORA),
    "bottleneck adapters": adapters.BottleneckAdapter,
    "BitFit": adapters.BitFit,
    "full fine-tuning": adapters.FullFineTuning,
    "prefix, then LoRA": partial(adapters.PrefixThenLora, **_LORA),
    "LoRA, then prefix": partial(adapters.LoraThenPrefix, **_LORA),
}


def compare(
    cp: ControlPrefix,
    rows: Rows,
    *,
    columns: Columns | None = None,
    validation: float | Rows = 0.1,
    test: float | Rows = 0.2,
    methods: Sequence[str] | None = None,
    steps: int = 24,
    batch_size: int = 8,
    num_slots: int = 8,
    seeds: Sequence[int] = (0,),
    num_rates: int = 3,
    num_rows: int = 48,
    max_new_tokens: int = 32,
    instruction: str | None = None,
    classifiers: Sequence[AttributeClassifier] = (),
    general: Rows | None = None,
    other_prompts: Sequence[str] | None = None,
    folder: str | Path | None = None,
    command: str = "",
    progress: bool = True,
) -> ComparisonReport:
    """Train every method on the same rows in as many steps, and compare them on held-out rows.

    Each method uses the learning rate, of three, with the lowest loss on the validation rows.
    Methods without labels train an adapter per label where rows have 2 to 4 labels of one
    attribute, else one for all rows. Users of the rows are ignored. A method that the model or
    the rows do not allow, or that does not fit the memory, is skipped, and the report says why.

    Args:
        cp: Its model is compared. Its store is neither read nor changed.
        rows: Rows to train on, in any form (see `controlprefix.data.as_examples`).
        columns: Which columns of the rows hold what, if they have other names.
        validation: Rows that choose the learning rate, or the share of `rows` that does.
        test: Rows to measure on, or the share of `rows`.
        methods: Names from `METHODS`; left out, all.
        steps, batch_size: How each method is trained.
        num_slots: Slots of a prefix, and virtual tokens of PEFT's methods.
        seeds: Each trains every method once; the first chooses the learning rates.
        num_rates: How many of a method's three learning rates are tried, from the middle one.
        num_rows: Test rows and validation rows to use, at most.
        max_new_tokens: Maximum length of the texts that are generated.
        instruction: What instructed models are told; `{labels}` stands for a row's labels.
        classifiers: Attribute classifiers, trained on other texts, for rows with labels.
        general: Texts that people wrote for no task, to measure forgetting.
        other_prompts: Prompts of another task, to measure divergence; left out, general ones.
        folder: Where results are kept as they are measured: an interrupted run continues there.
        command: The command line, for the report.
        progress: Show a progress bar.

    Returns:
        The figures of each method and seed; `save` writes a page, tables and a plot.

    Raises:
        TrainingDataError: If rows are too few, or an option is invalid.
        UnsupportedModelError: If the model is an encoder-decoder.
        MissingDependencyError: If a package of the extra `compare` is not installed.
        StoreError: If the folder holds another comparison, or cannot be written.
    """
    names = list(METHODS if methods is None else methods)
    for name in names:
        if name not in METHODS:
            raise TrainingDataError(
                f"there is no method {name!r} to compare; {known_names(name, list(METHODS))}"
            )
    if not names or not seeds or min(steps, batch_size, num_slots, num_rows) < 1:
        raise TrainingDataError(
            "a comparison needs a method, a seed, and at least 1 step, row and slot"
        )
    if not 1 <= num_rates <= 3:
        raise TrainingDataError(f"num_rates is {num_rates}; it must be 1, 2 or 3")
    frozen = cp.frozen_model
    if frozen.is_encoder_decoder:
        raise UnsupportedModelError("a comparison needs a decoder-only model")
    adapters.peft_package()
    problem = Problem(
        frozen,
        *_split(_examples(rows, columns), validation, test, columns, num_rows),
        instruction=instruction,
        steps=steps,
        batch_size=batch_size,
        num_slots=num_slots,
        max_new_tokens=max_new_tokens,
    )
    options = {
        "steps": steps,
        "batch_size": batch_size,
        "num_slots": num_slots,
        "num_rates": num_rates,
        "max_new_tokens": max_new_tokens,
        "instruction": instruction,
        "rows": {name: len(getattr(problem, name)) for name in ("training", "validation", "test")},
        "data": _hash(problem),
        "model": f"{type(frozen.model).__name__}, {_size(frozen.model)}",
        "fingerprint": frozen.fingerprint,
        "dtype": str(frozen.dtype).removeprefix("torch."),
    }
    state = _State(None if folder is None else Path(folder) / _FILE, options, command)
    general_rows = [] if general is None else _examples(general, None)[:num_rows]
    elsewhere = measures.elsewhere(problem, general_rows, other_prompts)
    runner = _Runner(problem, state, elsewhere, {c.attribute: c for c in classifiers}, num_rates)
    total = sum(len(seeds) + num_rates - 1 if METHODS[name](problem).rates else 1 for name in names)
    with progress_bar("compare", total, visible=progress) as update:
        done = 0
        for name in names:
            with warnings.catch_warnings():  # PEFT's, of what it leaves out
                warnings.simplefilter("ignore")
                for note in runner.measure(name, seeds):
                    done += 1
                    update(min(done, total), f"{name}: {note}")
    return ComparisonReport.from_dict(state.results)


class _Runner:
    """Trains and measures one method after another; what the state has is not repeated."""

    def __init__(
        self,
        problem: Problem,
        state: "_State",
        elsewhere: measures.Elsewhere,
        classifiers: Mapping[str, AttributeClassifier],
        num_rates: int,
    ) -> None:
        self.problem, self.state, self.elsewhere = problem, state, elsewhere
        self.classifiers = classifiers
        self.num_rates = num_rates
        self.plain_cp = ControlPrefixMethod(problem).cp

    def measure(self, name: str, seeds: Sequence[int]) -> Iterator[str]:
        """Measure a method; yields what was done after each training."""
        result = self.state.method(name)
        method = METHODS[name](self.problem)
        reason = method.unavailable() or _too_large(method)
        if reason is not None:
            result["skipped"] = reason
            self.state.save()
            yield f"skipped, {reason}"
            return
        try:
            yield from self._measure(name, result, seeds)
        except (torch.OutOfMemoryError, ValueError, NotImplementedError) as error:
            # PEFT refuses architectures that it does not know by a ValueError.
            result["skipped"] = str(error).splitlines()[0] if str(error) else type(error).__name__
            self.state.save()
            yield f"skipped, {result['skipped']}"

    def _measure(self, name: str, result: dict[str, Any], seeds: Sequence[int]) -> Iterator[str]:
        rates = _from_the_middle(METHODS[name](self.problem).rates)[: self.num_rates]
        losses: dict[str, float] = result.setdefault("validation", {})
        runs: dict[str, measures.Figures] = result.setdefault("runs", {})
        best: _Trained | None = None
        for rate in rates:
            if str(rate) not in losses:
                trained = self._train(name, rate, seeds[0])
                loss = measures.nats_per_token(trained.method, self.problem.validation)
                losses[str(rate)] = round(loss, 5)
                if losses[str(rate)] == min(losses.values()):
                    if best is not None:
                        best.close()
                    best = trained
                else:
                    trained.close()
                self.state.save()
            yield f"learning rate {rate:g}"
        best_rate = float(min(losses, key=lambda rate: losses[rate])) if losses else 0.0
        for number, seed in enumerate(seeds if rates else seeds[:1]):
            if str(seed) not in runs:
                is_kept = best is not None and best.rate == best_rate and not number
                trained = best if best and is_kept else self._train(name, best_rate, seed)
                self._record(result, trained.method, seed)
                trained.close()
                self.state.save()
            if number or not rates:  # the first seed is that of the learning rates
                yield f"seed {seed}"

    def _train(self, name: str, rate: float, seed: int) -> "_Trained":
        torch.manual_seed(seed)
        method = METHODS[name](self.problem)
        method.train(rate=rate, seed=seed)
        return _Trained(method, rate)

    def _record(self, result: dict[str, Any], method: Method, seed: int) -> None:
        """Measure a trained method."""
        problem, elsewhere = self.problem, self.elsewhere
        rows = problem.test
        figures: measures.Figures = {"nats": measures.nats_per_token(method, rows)}
        if problem.few_labels:
            labels = problem.attributes[problem.few_labels]
            following = dict(zip(labels, labels[1:] + labels[:1], strict=True))
            swapped = [
                row.model_copy(
                    update={"attributes": {problem.few_labels: following[str(problem.label(row))]}}
                )
                for row in rows
            ]
            figures["nats, other label"] = measures.nats_per_token(method, swapped)
        unseen = [row for row in rows if not problem.has_labels(row)]
        if 0 < len(unseen) < len(rows):
            figures["nats, unseen"] = measures.nats_per_token(method, unseen)
        texts = measures.texts_of(method, rows, seed)
        figures |= measures.text_figures(rows, texts)
        figures |= measures.accuracy_figures(rows, texts, self.classifiers)
        plainness = statistics.fmean(base_model_nlls(self.plain_cp, texts))
        if math.isfinite(plainness):  # not if all texts are empty
            figures["base-model nats"] = plainness
        for key, others in (("written", elsewhere.written), ("answers", elsewhere.answers)):
            value = measures.divergence(method, others)
            figures[f"divergence, {key}"] = value if value is not None else 0.0
        if elsewhere.general:
            general = measures.nats_per_token(method, self._in_context(elsewhere.general))
            plain = measures.nats_per_token(Plain(problem), elsewhere.general)
            figures["forgetting"] = general - plain
        off = measures.divergence(method, elsewhere.written[:4], off=True)
        if off is not None:
            figures["divergence, off"] = off
        figures["tokens per second"] = measures.tokens_per_second(method)
        if method.rates:
            figures |= {
                "parameters": method.num_parameters,
                "stored": method.num_stored,
                "bytes per adaptation": 2 * method.num_stored / method.num_adaptations,
                "step seconds": method.costs.seconds / problem.steps,
                "peak MiB": method.costs.peak_mib,
            }
        result.setdefault("runs", {})[str(seed)] = {k: round(v, 5) for k, v in figures.items()}
        samples = [
            {"prompt": row.prompt or "", "labels": dict(row.attributes), "text": text}
            for row, text in zip(rows[:4], texts[:4], strict=True)
        ]
        result.setdefault("texts", samples)

    def _in_context(self, rows: Sequence[Example]) -> list[Example]:
        """Rows with the task and labels of training rows, so that an adaptation is on."""
        contexts = self.problem.training
        return [
            contexts[i % len(contexts)].model_copy(
                update={
                    "prompt": row.prompt,
                    "messages": row.messages,
                    "raw": row.raw,
                    "completion": row.completion,
                }
            )
            for i, row in enumerate(rows)
        ]


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


class _State:
    """The results so far, in a file if there is a folder."""

    def __init__(self, path: Path | None, options: dict[str, Any], command: str) -> None:
        self.path = path
        self.results: dict[str, Any] = {"options": options, "methods": {}}
        if path is not None and path.is_file():
            try:
                saved = json.loads(path.read_text(encoding="utf-8"))
                earlier = saved["options"]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise StoreError(f"cannot read the comparison {path}: {error}") from error
            different = [key for key in options if earlier.get(key) != options[key]]
            if different:
                raise StoreError(
                    f"{path} holds a comparison with another {', '.join(different)}; give another "
                    "folder"
                )
            self.results = saved
        self.results["about"] = {
            "command": command,
            "date": datetime.now(UTC).date().isoformat(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "versions": {
                "controlprefix": __version__,
                **{
                    name: importlib.metadata.version(name)
                    for name in ("torch", "transformers", "peft")
                },
            },
        }

    def method(self, name: str) -> dict[str, Any]:
        """The results of a method."""
        result: dict[str, Any] = self.results["methods"].setdefault(name, {})
        return result

    def save(self) -> None:
        """Write the file."""
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(self.path) as temporary:
                temporary.write_text(json.dumps(self.results, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise StoreError(f"cannot write the comparison to {self.path}: {error}") from error


def _examples(rows: Rows, columns: Columns | None) -> list[Example]:
    """Rows of one task, without users."""
    return [
        row.model_copy(update={"task": row.task or _TASK, "user": None, "strengths": {}})
        for row in as_examples(rows, columns=columns)
    ]


def _split(
    rows: list[Example],
    validation: float | Rows,
    test: float | Rows,
    columns: Columns | None,
    num_rows: int,
) -> tuple[list[Example], list[Example], list[Example]]:
    """Rows to train on, to choose learning rates by, and to measure on."""
    tasks = {row.task for row in rows}
    if len(tasks) > 1:
        raise TrainingDataError(
            f"the rows are of {len(tasks)} tasks ({', '.join(sorted(map(str, tasks)))}); compare "
            "methods on one task at a time"
        )
    parts = []
    for name, share in (("test", test), ("validation", validation)):
        if isinstance(share, float | int):
            if not 0 < share < 1:
                raise TrainingDataError(f"{name} is {share}; give rows, or a share between 0 and 1")
            split = split_examples(rows, [()] * len(rows), float(share), seed=0)
            part = [rows[i] for i in split.held_out]
            rows = [rows[i] for i in split.training]
        else:
            part = _examples(share, columns)
            part = [row.model_copy(update={"task": next(iter(tasks))}) for row in part]
        if not part:
            raise TrainingDataError(f"there are no {name} rows; give more rows, or {name} rows")
        rng = random.Random(0)
        parts.append(rng.sample(part, min(num_rows, len(part))))
    return rows, parts[1], parts[0]


def _hash(problem: Problem) -> str:
    rows = [problem.training, problem.validation, problem.test]
    text = json.dumps([[row.model_dump_json(exclude_unset=True) for row in part] for part in rows])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _size(model: torch.nn.Module) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:,.0f} M parameters"


def _too_large(method: Method) -> str | None:
    """Why a method's training would not fit the memory."""
    device = method.problem.frozen.device
    if device.type == "cuda":
        available = torch.cuda.mem_get_info(device)[0]
    else:
        available = psutil.virtual_memory().available
    required = _SPARE * method.required_bytes()
    if required <= available:
        return None
    return f"it needs about {required / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are free"


def _from_the_middle(rates: Sequence[float]) -> list[float]:
    """The middle rate first, then those beside it."""
    middle = len(rates) // 2
    return sorted(rates, key=lambda rate: abs(rates.index(rate) - middle))
