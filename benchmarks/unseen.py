"""Labels that nobody learned, asked for by name."""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from quality import Row, load_data, model, tokenizer
from ways import SAID, Ours, study

from controlprefix import ControlPrefix, Example


def held_back(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """A topic that nobody learned, asked for by its name: one topic in its turn."""
    whole = study(folder, "aspects", options.steps * 8)
    judge = whole.meanings["topic"]
    found: dict[str, Any] = {}
    for label in whole.labels["topic"][: options.topics]:
        few = [row for row in whole.rows if str(row.label).startswith("topic=")]
        rows = [row for row in few if row.label != f"topic={label}"]
        ours = Ours(replace(whole, labels={"topic": []}, rows=rows), options)
        ours.learn()
        instruction = f"Write a sentence {SAID[label]}."
        ours.cp.distill(
            instruction,
            ["Write a sentence.", "Write something.", "Say something.", "What is new?"] * 6,
            attribute="topic",
            label="distilled",
            num_slots=options.num_slots,
            steps=30,
            max_new_tokens=options.new_tokens,
            progress=False,
        )
        asked: dict[str, dict[str, Any]] = {
            "task alone": {},
            "nearest labels": {"attributes": {"topic": label}, "unseen": "nearest"},
            "its text": {"attributes": {"topic": label}, "unseen": "text"},
            "distilled": {"attributes": {"topic": "distilled"}},
        }
        for name, one in asked.items():
            texts = ours.asked([{"task": "text", **one}] * options.dial_texts, 4)
            best = judge.probabilities([text or " " for text in texts]).argmax(dim=1).tolist()
            hits = statistics.fmean(judge.labels[i] == label for i in best)
            found.setdefault(name, {})[label] = round(hits, 3)
        print(label, {name: one[label] for name, one in found.items()}, flush=True)
    return found


def unseen_categories(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """WebNLG's categories that no training row has: nats per token of what is to be said."""
    data = load_data(folder, "webnlg", 0, options.steps * 8)
    cp = ControlPrefix.from_pretrained(model(), tokenizer=tokenizer(), store="sqlite://")
    rows = [
        Example(
            prompt=row.prompt,
            completion=row.completion,
            task="describe",
            attributes={"category": row.label},
        )
        for row in data.train
    ]
    cp.train(rows, num_slots=options.num_slots, steps=options.steps, validation=0, progress=False)
    wanted = [row for row in data.test if not row.seen][:96]
    asked: dict[str, Callable[[Row], dict[str, Any]]] = {
        "task alone": lambda _: {},
        "nearest categories": lambda r: {"attributes": {"category": r.label}, "unseen": "nearest"},
        "its text": lambda r: {"attributes": {"category": r.label}, "unseen": "text"},
        "a category at random": lambda r: {
            "attributes": {"category": data.train[len(r.completion) % 50].label}
        },
    }
    found = {}
    for name, parts in asked.items():
        scores = cp.score(
            [
                Example(prompt=r.prompt, completion=r.completion, task="describe", **parts(r))
                for r in wanted
            ]
        )
        total = -sum(one.log_likelihood for one in scores)
        found[name] = round(total / sum(one.num_tokens for one in scores), 4)
    return found
