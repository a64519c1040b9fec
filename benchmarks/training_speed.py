"""A training step and its peak memory, against PEFT: same examples, batch size and slots.

All start from random slots, so that only the steps are compared.
"""

import copy
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from peft import LoraConfig, PrefixTuningConfig, TaskType, get_peft_model

from controlprefix import Prefix
from controlprefix.data import as_examples
from controlprefix.evaluation.comparison import adapter_training
from controlprefix.evaluation.comparison.peft_methods import linear_layers
from controlprefix.model import FrozenModel
from controlprefix.model.tokenization import TokenizedExample
from controlprefix.prefixes import PrefixKey
from controlprefix.training import RunControl, TrainingRow, TrainingSettings, train
from controlprefix.training.initialization import scale_of
from controlprefix.training.parameterization import parameterize

from lib.interleaved import Measures, compare, now, peak_mib
from lib.models import add_model_options, load_from
from lib.results import ROOT, arguments, save_comparisons

DATA = ROOT / "controlprefix" / "cli" / "demo_data" / "messages.train.jsonl"


def controlprefix_epoch(
    frozen: FrozenModel,
    rows: Sequence[TokenizedExample],
    *,
    num_slots: int,
    batch_size: int,
    **options: Any,
) -> None:
    """Train one task prefix for one epoch."""
    key = PrefixKey("task", "message")
    start = Prefix.random(frozen.geometry, num_slots=num_slots, seed=0)
    steps = -(-len(rows) // batch_size)
    end_id = frozen.request_tokenizer.end_id
    settings = TrainingSettings(steps=steps, batch_size=batch_size, validation=0, **options)
    train(
        frozen,
        [TrainingRow.from_example(row, end_id, (), ((key, 1.0),)) for row in rows],
        parameterize(settings, {key: start}, scale_of(start)),
        settings=settings,
        control=RunControl(progress=False),
    )


def measure(work: Callable[[], None], steps: int) -> Measures:
    """Seconds per step, and peak memory."""
    durations: list[float] = []

    def run() -> None:
        start = now()
        work()
        durations.append(now() - start)

    peak = peak_mib(run)
    return {"step seconds": durations[0] / steps, "peak MiB": peak}


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, rounds=3)
    add_model_options(parser)
    parser.add_argument("--num-slots", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--examples", type=int, default=64)
    options = parser.parse_args(argv)

    frozen = load_from(options)
    examples = random.Random(0).sample(list(as_examples(DATA)), options.examples)
    rows = [frozen.request_tokenizer.example_ids(example) for example in examples]
    steps = -(-len(rows) // options.batch_size)
    causal = TaskType.CAUSAL_LM
    prefix = PrefixTuningConfig(
        task_type=causal, num_virtual_tokens=options.num_slots, init_weights=None
    )
    lora = LoraConfig(task_type=causal, r=8, target_modules=linear_layers(frozen))

    def controlprefix(**settings: Any) -> Callable[[], Measures]:
        work = partial(
            controlprefix_epoch,
            frozen,
            rows,
            num_slots=options.num_slots,
            batch_size=options.batch_size,
            **settings,
        )
        return partial(measure, work, steps)

    def peft(config: Any) -> Callable[[], Measures]:
        # PEFT changes the model that it wraps, so each configuration has a copy.
        work = partial(
            adapter_training.train,
            get_peft_model(copy.deepcopy(frozen.model), config),
            rows,
            frozen.request_tokenizer,
            batch_size=options.batch_size,
            learning_rate=1e-3,
            steps=steps,
            seed=0,
        )
        return partial(measure, work, steps)

    contenders = {
        "PEFT prefix tuning": peft(prefix),
        "controlprefix": controlprefix(parameterization="direct"),
        "controlprefix, checkpointing": controlprefix(
            parameterization="direct", gradient_checkpointing=True
        ),
        "controlprefix, shared network": controlprefix(),
        "PEFT LoRA r8": peft(lora),
    }
    lengths = sorted(len(row.prompt) + len(row.completion) for row in rows)
    case = (
        f"{len(rows)} messages of {lengths[0]} to {lengths[-1]} tokens, batch size "
        f"{options.batch_size}, {options.num_slots} slots"
    )
    save_comparisons(
        options.results,
        f"training-{options.model}-{options.device}",
        compare(case, contenders, rounds=options.rounds),
        reference="PEFT prefix tuning",
        model=frozen,
    )


if __name__ == "__main__":
    main()
