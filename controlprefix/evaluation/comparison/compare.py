"""compare: train every method on the same rows, and measure what each does and costs."""

import hashlib
import json
import random
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from controlprefix._io import progress_bar, requires_extra
from controlprefix.data import Columns, Rows, as_examples
from controlprefix.engine import ControlPrefix
from controlprefix.engine.arguments import checks_arguments
from controlprefix.errors import TrainingDataError, UnsupportedModelError
from controlprefix.evaluation.classifier import AttributeClassifier
from controlprefix.evaluation.comparison import measures
from controlprefix.evaluation.comparison.method_runner import METHODS, MethodRunner, require_methods
from controlprefix.evaluation.comparison.methods import ComparisonSetup
from controlprefix.evaluation.comparison.peft_methods import peft_package
from controlprefix.evaluation.comparison.report import ComparisonReport
from controlprefix.evaluation.comparison.state import ComparisonState
from controlprefix.example import Example
from controlprefix.labels import weighted_labels
from controlprefix.model.tokenization import RequestTokenizer
from controlprefix.prefixes import PrefixKey
from controlprefix.training.context_fit import fit_to_context
from controlprefix.training.held_out import split_examples, warn_of_shared_prompts

_FILE = "comparison.json"
_TASK = "comparison"
_NUM_HASHED_TEXTS = 20


@checks_arguments
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
    too_long: Literal["refuse", "skip"] = "refuse",
    folder: str | Path | None = None,
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
        validation: Rows that choose the learning rate, or the share of the rows left by `test`.
        test: Rows to measure on, or the share of `rows`.
        methods: Names from `METHODS`; left out, all.
        steps, batch_size: How each method is trained.
        num_slots: Slots of a prefix, and virtual tokens of PEFT's methods.
        seeds: Each trains every method once; the first chooses the learning rates.
        num_rates: How many of a method's three learning rates are tried, from the middle one.
        num_rows: Prompts of test rows and of validation rows to use, and general texts, at most;
            rows without a prompt count one by one.
        max_new_tokens: Maximum length of the texts that are generated.
        instruction: The instruction of instructed models; `{labels}` stands for a row's labels.
        classifiers: Attribute classifiers, trained on other texts, for rows with labels.
        general: Texts that people wrote for no task, to measure forgetting.
        other_prompts: Prompts of another task, to measure divergence, of which the first 16 are
            used; left out, general ones.
        too_long: What happens to rows that do not fit the model's context: an error, or they are
            left out.
        folder: Where results are kept as they are measured: an interrupted run continues there.
        progress: Show a progress bar.

    Returns:
        The figures of each method and seed; `save` writes a page, tables and a plot.

    Raises:
        TrainingDataError: If rows are too few, or an option is invalid.
        ContextLengthError: If a row does not fit the model's context, and rows are not skipped.
        UnsupportedModelError: If the model is an encoder-decoder.
        MissingDependencyError: If a package of the extra `compare` is not installed.
        StoreError: If the folder holds another comparison, or cannot be written.
    """
    names = list(METHODS if methods is None else methods)
    require_methods(names)
    if not names or not seeds or min(steps, batch_size, num_slots, num_rows) < 1:
        raise TrainingDataError(
            "a comparison needs a method, a seed, and at least 1 step, row and slot"
        )
    if min(seeds) < 0 or max_new_tokens < 1:
        raise TrainingDataError("seeds must be 0 or more, and max_new_tokens 1 or more")
    if not 1 <= num_rates <= 3:
        raise TrainingDataError(f"num_rates is {num_rates}; it must be 1, 2 or 3")
    frozen = cp.frozen_model
    if frozen.is_encoder_decoder:
        raise UnsupportedModelError("a comparison needs a decoder-only model")
    peft_package()
    with requires_extra("compare", "a comparison"):
        import rouge_score  # noqa: F401
        import sacrebleu  # noqa: F401
    tokenizer = frozen.request_tokenizer

    def examples_of(rows: Rows, columns: Columns | None) -> list[Example]:
        return fitting(_examples(rows, columns))

    def fitting(examples: Sequence[Example]) -> list[Example]:
        """The rows that fit; what cannot be read is told before anything is trained."""
        if too_long == "skip" and examples:
            return fit_to_context(examples, tokenizer, too_long).examples
        tokenizer.ids_of_examples(examples)
        return list(examples)

    setup = ComparisonSetup(
        frozen,
        *_split(examples_of, rows, validation, test, columns, num_rows),
        instruction=instruction,
        steps=steps,
        batch_size=batch_size,
        num_slots=num_slots,
        max_new_tokens=max_new_tokens,
    )
    general_rows = [] if general is None else _examples(general, None)
    # Those that are not used need not fit.
    general_rows = fitting(general_rows[: None if too_long == "skip" else num_rows])[:num_rows]
    for attribute, labels in setup.attributes.items():
        for label in labels:
            PrefixKey.for_label(attribute, label)  # so are names that nothing can have
    warn_of_shared_prompts([*setup.validation, *setup.test], setup.training)
    options: dict[str, Any] = {
        "steps": steps,
        "batch_size": batch_size,
        "num_slots": num_slots,
        "num_rates": num_rates,
        "max_new_tokens": max_new_tokens,
        "instruction": instruction,
        "rows": {name: len(getattr(setup, name)) for name in ("training", "validation", "test")},
        "data": _hash([setup.training, setup.validation, setup.test]),
        "prompts": _hash_of_ids(tokenizer, setup.test),
        "model": f"{type(frozen.model).__name__}, {_size(frozen.model)}",
        "fingerprint": frozen.fingerprint,
        "dtype": str(frozen.dtype).removeprefix("torch."),
    }
    options["elsewhere"] = _hash([general_rows], *(other_prompts or ()))
    options["classifiers"] = {
        classifier.attribute: _classifier_hash(classifier, setup.test) for classifier in classifiers
    }
    state = ComparisonState(None if folder is None else Path(folder) / _FILE, options)
    elsewhere = measures.elsewhere(setup, general_rows, other_prompts, too_long)
    runner = MethodRunner(setup, state, elsewhere, {c.attribute: c for c in classifiers}, num_rates)
    counts = [len(seeds) + num_rates - 1 if METHODS[name](setup).rates else 1 for name in names]
    with progress_bar("compare", sum(counts), visible=progress) as update:
        for number, name in enumerate(names):
            with warnings.catch_warnings():  # PEFT's, of what it leaves out
                warnings.simplefilter("ignore")
                for done, note in enumerate(runner.measure(name, seeds), 1):
                    update(sum(counts[:number]) + done, f"{name}: {note}")
            update(sum(counts[: number + 1]), name)
    return ComparisonReport.from_dict(state.of(names, seeds))


def _examples(rows: Rows, columns: Columns | None) -> list[Example]:
    """Rows of one task, without users.

    Raises:
        TrainingDataError: If one has more than texts.
    """
    examples = []
    for number, row in enumerate(as_examples(rows, columns=columns), 1):
        if row.prompt_ids is not None or any(message.images for message in row.conversation):
            raise TrainingDataError(
                f"{row.place(number)} has token ids or images; a comparison needs prompts that are "
                "texts, which methods write instructions and examples in front of"
            )
        update: dict[str, Any] = {"task": row.task or _TASK, "user": None, "strengths": {}}
        examples.append(row.model_copy(update=update))
    return examples


def _split(
    examples_of: Callable[[Rows, Columns | None], list[Example]],
    data: Rows,
    validation: float | Rows,
    test: float | Rows,
    columns: Columns | None,
    num_rows: int,
) -> tuple[list[Example], list[Example], list[Example]]:
    """Rows to train on, to choose learning rates by, and to measure on."""
    rows = examples_of(data, columns)
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
            labels = [[part.key for part in weighted_labels(row.attributes)] for row in rows]
            split = split_examples(rows, labels, float(share), seed=0)
            part = [rows[i] for i in split.held_out]
            rows = [rows[i] for i in split.training]
        else:
            part = examples_of(share, columns)
            part = [row.model_copy(update={"task": next(iter(tasks))}) for row in part]
        if not part:
            raise TrainingDataError(f"there are no {name} rows; give more rows, or {name} rows")
        requests = measures.distinct_requests(part)
        chosen = random.Random(0).sample(requests, min(num_rows, len(requests)))
        parts.append(measures.rows_of_requests(part, chosen))
    return rows, parts[1], parts[0]


def _classifier_hash(classifier: AttributeClassifier, rows: Sequence[Example]) -> str:
    """A hash of a classifier's labels, and of what it says of some texts."""
    texts = [row.completion for row in rows[:_NUM_HASHED_TEXTS]]
    values = classifier.probabilities(texts).round(decimals=3).tolist() if texts else []
    return hashlib.sha256(repr((tuple(classifier.labels), values)).encode()).hexdigest()


def _hash(parts: Sequence[Sequence[Example]], *texts: str) -> str:
    rows = [[row.model_dump_json(exclude_unset=True) for row in part] for part in parts]
    text = json.dumps([rows, texts])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _hash_of_ids(tokenizer: RequestTokenizer, rows: Sequence[Example]) -> str:
    """A hash of how prompts are rendered."""
    ids = [list(tokenizer.prompt_ids(row)) for row in rows[:_NUM_HASHED_TEXTS]]
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]


def _size(model: torch.nn.Module) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:,.0f} M parameters"
