"""Training against PEFT: the same examples, batch size and slots, an epoch each.

All begin from random slots, so that only the steps are compared. PEFT's loop is the plain
one its documentation shows: batches in the order they come, padded to their longest row.

Run it with `python benchmarks/train.py`.
"""

import argparse
import copy
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, TaskType, get_peft_model
from shapes import NAMES, build
from side_by_side import Measures, compare, now, peak_mib, report

from controlprefix.interop import read_examples
from controlprefix.model import FrozenModel
from controlprefix.model.tokenization import TokenizedExample
from controlprefix.prefixes.prefix import Prefix
from controlprefix.store import PrefixKey
from controlprefix.training import TrainingRow, TrainingSettings, train
from controlprefix.training.initialization import scale_of

DATA = Path(__file__).parent.parent / "controlprefix" / "cli" / "demo_data" / "messages.train.jsonl"
END, PAD = 2, 0


def ours(
    frozen: FrozenModel,
    rows: Sequence[TokenizedExample],
    slots: int,
    batch: int,
    **settings: Any,
) -> None:
    """One epoch with `controlprefix`."""
    key = PrefixKey("task", "message")
    start = Prefix.random(frozen.geometry, num_slots=slots, seed=0)
    chosen = TrainingSettings(
        steps=-(-len(rows) // batch), batch_size=batch, validation=0, **settings
    )
    train(
        frozen,
        [TrainingRow.from_example(row, END, (), ((key, 1.0),)) for row in rows],
        chosen.parameterize({key: start}, scale_of(start)),
        settings=chosen,
        progress=False,
    )


def peft(model: PeftModel, rows: Sequence[TokenizedExample], batch: int) -> None:
    """One epoch with PEFT."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(wanted, lr=1e-3)
    order = random.Random(0).sample(list(rows), len(rows))
    model.train()
    for at in range(0, len(order), batch):
        chosen = [[*row.prompt, *row.completion, END] for row in order[at : at + batch]]
        longest = max(map(len, chosen))
        ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in chosen])
        labels = ids.clone()
        for i, row in enumerate(order[at : at + batch]):
            labels[i, : len(row.prompt)] = -100
            labels[i, len(chosen[i]) :] = -100
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in chosen])
        inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        loss = model(**{name: value.to(model.device) for name, value in inputs.items()}).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(wanted, 1.0)
        optimizer.step()


def epoch(work: Callable[[], None], steps: int) -> Measures:
    """Seconds a step, and peak memory."""
    took: list[float] = []

    def run() -> None:
        began = now()
        work()
        took.append(now() - began)

    peak = peak_mib(run)
    return {"step seconds": took[0] / steps, "peak MiB": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=NAMES, default="smollm2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--num-slots", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()

    model = build(options.model, options.device)
    # The other shapes read the same tokens: their vocabularies are larger.
    small = FrozenModel.from_pretrained("smollm2")
    frozen = FrozenModel(model, small.tokenizer)
    examples = random.Random(0).sample(list(read_examples(DATA)), options.examples)
    rows = [small.request_tokenizer.example_ids(example) for example in examples]
    steps = -(-len(rows) // options.batch)

    # PEFT changes the model it is given, so each has its own copy.
    prefix = PrefixTuningConfig(
        task_type=TaskType.CAUSAL_LM, num_virtual_tokens=options.num_slots, init_weights=None
    )
    lora = LoraConfig(
        task_type=TaskType.CAUSAL_LM, r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]
    )
    run = partial(epoch, steps=steps)
    given = (rows, options.num_slots, options.batch)
    contenders = {
        "PEFT prefix tuning": partial(
            run, partial(peft, get_peft_model(copy.deepcopy(model), prefix), rows, options.batch)
        ),
        "controlprefix": partial(run, partial(ours, frozen, *given, parameterization="direct")),
        "controlprefix, checkpointing": partial(
            run,
            partial(ours, frozen, *given, parameterization="direct", gradient_checkpointing=True),
        ),
        "controlprefix, shared network": partial(run, partial(ours, frozen, *given)),
        "PEFT LoRA r8": partial(
            run, partial(peft, get_peft_model(copy.deepcopy(model), lora), rows, options.batch)
        ),
    }
    lengths = sorted(len(row.prompt) + len(row.completion) for row in rows)
    case = (
        f"{len(rows)} messages of {lengths[0]} to {lengths[-1]} tokens, batches of "
        f"{options.batch}, {options.num_slots} slots"
    )
    found = compare(case, contenders, rounds=options.rounds)
    report(f"train-{options.model}-{options.device}", found, reference="PEFT prefix tuning")


if __name__ == "__main__":
    main()
