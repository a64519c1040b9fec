"""The command that trains on rewards: reinforce."""

import importlib
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from controlprefix.cli.common import app, out
from controlprefix.cli.groups import ColumnArguments, EngineArguments, grouped
from controlprefix.cli.options import objective_options, parse_list, training_options
from controlprefix.cli.runs import RunArguments, print_saved
from controlprefix.cli.train import LearnOption
from controlprefix.errors import RequestError, short_reason

if TYPE_CHECKING:
    from controlprefix.training import Reward

_FORMS = (
    "labels=rows.jsonl, classifier=tone.json,formality.json, length=10..30 (words), "
    "pattern=REGEX, json, or python=module:function"
)
_SPEC = re.compile(r"(?:(?P<weight>\d*\.?\d+)\*)?(?P<kind>\w+)(?:=(?P<value>.*))?", re.DOTALL)


@app.command()
@training_options(
    "steps",
    "batch_size",
    "micro_batch_size",
    "learning_rate",
    "gradient_checkpointing",
    "save_steps",
    "seed",
    steps=40,
    learning_rate=0.01,
)
@objective_options("PolicySettings")
@grouped
def reinforce(
    requests: Annotated[
        Path, typer.Argument(help="Requests to sample for: rows that need no completion.")
    ],
    training_fields: dict[str, Any],
    objective_fields: dict[str, Any],
    reward: Annotated[
        list[str],
        typer.Option(
            help="What to reward, repeatable: labels=ROWS (classifiers trained on a file of "
            "rows), classifier=FILES (comma-separated), length=10..30 (words), pattern=REGEX, "
            "json, or python=module:function. A weight may precede it: 0.5*json."
        ),
    ],
    demonstrations: Annotated[
        Path | None,
        typer.Option(help="Examples whose likelihood is part of the objective."),
    ] = None,
    learn: LearnOption = None,
    *,
    columns: ColumnArguments,
    run: RunArguments,
    engine: EngineArguments,
) -> None:
    """Train stored prefixes further on rewards of the texts they produce.

    A row is a request, such as {"task": "email", "attributes": {"formality": "formal"},
    "prompt": "Tell Sam I will be late.", "max_new_tokens": 40}.
    """
    from controlprefix.data import as_examples, as_requests

    names, defaults = columns.columns(), columns.defaults()
    rows = as_requests(requests, columns=names, defaults=defaults)
    examples = None
    if demonstrations is not None:
        examples = as_examples(demonstrations, columns=names, defaults=defaults)
    rewards = parse_rewards(reward)
    cp = engine.open()
    with run.recorded("reinforce", requests) as recorded:
        report = cp.reinforce(
            rows,
            reward=rewards,
            demonstrations=examples,
            learn=cast(Any, None if learn is None else parse_list(learn)),
            **recorded,
            **objective_fields,
            **training_fields,
        )
    print_saved(report)
    first, last = report.metrics[0], report.metrics[-1]
    changes = [f"{name} {first[name]:.3f} -> {last[name]:.3f}" for name in first]
    out.print(f"{len(report.losses)} steps, {report.seconds:.0f} s: {', '.join(changes)}")


def parse_rewards(specs: list[str]) -> "Reward":
    """The reward that `--reward` options name: their weighted sum.

    Raises:
        RequestError: If one has another form.
        ControlPrefixError: If what it names cannot be used.
    """
    from controlprefix.evaluation.rewards import WeightedReward

    rewards = []
    for spec in specs:
        match = _SPEC.fullmatch(spec)
        if match is None:
            raise RequestError(f"--reward {spec!r} has another form than {_FORMS}")
        weight = float(match["weight"] or 1.0)
        rewards.append((_reward(match["kind"], match["value"] or "", spec), weight))
    return rewards[0][0] if [weight for _, weight in rewards] == [1.0] else WeightedReward(rewards)


def _reward(kind: str, value: str, spec: str) -> "Reward":
    from controlprefix.data import as_examples
    from controlprefix.evaluation import rewards
    from controlprefix.evaluation.classifier import AttributeClassifier

    if kind == "labels" and value:
        return rewards.AttributeReward.train(as_examples(value))
    if kind == "classifier" and value:
        return rewards.AttributeReward([AttributeClassifier.load(p) for p in parse_list(value)])
    if kind == "length" and (bounds := re.fullmatch(r"(\d+)\.\.(\d+)", value)):
        return rewards.LengthReward(int(bounds[1]), int(bounds[2]))
    if kind == "pattern" and value:
        return rewards.PatternReward(value)
    if kind == "json" and not value:
        return rewards.JsonReward()
    if kind == "python" and ":" in value:
        return _python_reward(value)
    raise RequestError(f"--reward {spec!r} has another form than {_FORMS}")


def _python_reward(path: str) -> "Reward":
    module, _, name = path.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # also a file of the current folder
    try:
        reward: Reward = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever the module raises
        raise RequestError(f"--reward python={path}: {short_reason(error)}") from error
    if not callable(reward):
        raise RequestError(f"--reward python={path} is not a function")
    return reward
