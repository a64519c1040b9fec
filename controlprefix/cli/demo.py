"""`controlprefix demo`: the main job on a real model, from examples to a mixed batch."""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from controlprefix.data import as_examples
from controlprefix.engine import ControlPrefix
from controlprefix.errors import RequestError
from controlprefix.example import Example
from controlprefix.prefixes import Kind
from controlprefix.request import Request

TASK = "message"
TENANT = "demo"  # so that the demo neither finds nor changes other prefixes
PROMPTS = ("Tell Sam I will be late for dinner.", "Ask the neighbour to turn the music down.")
SEED = 0


def run(store: str, out: Console, json_file: Path | None) -> None:
    """Train what is not stored yet, reopen the store, generate, and measure.

    Args:
        store: SQLAlchemy URL.
        out: Where to print.
        json_file: Where to write the results, if anywhere.
    """
    started = time.monotonic()
    if json_file is not None and json_file.is_dir():
        raise RequestError(f"{json_file} is a folder; name a file for --json")
    messages, users = demo_examples("messages.train"), demo_examples("users.train")
    times: dict[str, float] = {}

    out.rule("the frozen model")
    with _timed(times, "load"):
        cp = ControlPrefix.from_pretrained("smollm2", store=store, tenant=TENANT)
    parameters = sum(p.numel() for p in cp.model.parameters())
    out.print(
        f"{cp.geometry.model_name}: {parameters / 1e6:.0f} M parameters, none of which will "
        f"change; prefixes are kept in {store}, tenant {TENANT!r}"
    )

    out.rule("train")
    names: dict[Kind, set[str]] = {
        "task": {TASK},
        "attribute": {f"{a}={label}" for e in messages for a, label in e.attributes.items()},
    }
    with _timed(times, "train task and attributes"):
        if any(of_kind - set(cp.names(kind)) for kind, of_kind in names.items()):
            out.print(f"one task and five labels, jointly, from {len(messages)} examples")
            cp.train(messages, num_slots=8, steps=24, num_evaluations=2, seed=SEED)
        else:
            out.print("task and attributes: already stored")
    with _timed(times, "train users"):
        if {e.user for e in users} - set(cp.names("user")):
            out.print(f"three users, in the same batches, from {len(users)} examples")
            cp.train(
                users,
                learn=("user",),
                num_slots=8,
                steps=24,
                batch_size=4,
                learning_rate=4e-2,  # few steps need a higher one than the default
                num_evaluations=2,
                seed=SEED,
            )
        else:
            out.print("users: already stored")
    cp.store.close()

    out.rule("reopen the store, and generate")
    cp = ControlPrefix.from_pretrained(cp.model, tokenizer=cp.tokenizer, store=store, tenant=TENANT)
    requests = [_in_voice(voice, prompt) for voice in _voices() for prompt in PROMPTS]
    with _timed(times, "generate"):
        completions = cp.generate(requests)
    table = Table("the same model", *PROMPTS, show_lines=True)
    for i in range(0, len(requests), len(PROMPTS)):
        texts = (completion.text.strip() for completion in completions[i : i + len(PROMPTS)])
        table.add_row(_describe(requests[i]), *texts)
    out.print(table)
    tokens = sum(completion.num_tokens for completion in completions)
    out.print(f"{len(requests)} rows in one batch, {tokens} tokens, {times['generate']:.1f} s")

    out.rule("measured on held-out lines")
    held_out = demo_examples("messages.heldout")
    held_out_users = demo_examples("users.heldout")
    with _timed(times, "score"):
        figures = {
            "labels": _label_figures(cp, held_out),
            "users": _user_figures(cp, held_out_users),
        }
    _print_figures(out, figures)

    sizes = _sizes(cp)
    out.rule("sizes and times")
    for kind, (count, size) in sizes.items():
        out.print(f"{count} {kind} prefixes: {size:,} bytes each in the store")
    model_bytes = sum(p.numel() * p.element_size() for p in cp.model.parameters())
    out.print(f"the model they steer: {model_bytes:,} bytes")
    out.print("; ".join(f"{name} {seconds:.1f} s" for name, seconds in times.items()))
    out.print(f"{time.monotonic() - started:.0f} s in total; a second run reuses what is stored")
    out.print(f"see it with: controlprefix prefixes list --store {store} --tenant {TENANT}")
    if json_file is not None:
        record = {
            "model": cp.geometry.model_name,
            "seed": SEED,
            "nats_per_token": figures,
            "bytes": {kind: size for kind, (_, size) in sizes.items()},
            "seconds": {name: round(seconds, 1) for name, seconds in times.items()},
            "completions": [
                {"request": _describe(r), "prompt": r.prompt, "text": c.text}
                for r, c in zip(requests, completions, strict=True)
            ],
        }
        try:
            json_file.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
            json_file.write_text(text, encoding="utf-8")
        except OSError as error:
            raise RequestError(f"cannot write {json_file}: {error}") from error
        out.print(f"results written to {json_file}")


def demo_examples(name: str) -> list[Example]:
    """The examples of one of the demo's data files, which the package contains.

    Args:
        name: `messages.train`, `messages.heldout`, `users.train` or `users.heldout`.
    """
    file = resources.files("controlprefix.cli").joinpath("demo_data", f"{name}.jsonl")
    with resources.as_file(file) as path:
        return as_examples(path)


def _voices() -> list[dict[str, Any]]:
    """Request fields: none at all, then labels, a mixture, strengths, users."""
    steered: list[dict[str, Any]] = [
        {},
        *(
            {"attributes": {"formality": formality, "tone": tone}}
            for formality in ("formal", "informal")
            for tone in ("warm", "brief", "firm")
        ),
        {"attributes": {"formality": "informal", "tone": {"warm": 0.5, "firm": 0.5}}},
        *(
            {"attributes": {"formality": "formal"}, "strengths": {"formality": strength}}
            for strength in (0.1, 0.5, 2.0)
        ),
        *({"user": user} for user in ("ana", "bo", "cleo")),
        {"user": "cleo", "attributes": {"tone": "brief"}},
    ]
    return [{"task": None}, *({"task": TASK, **voice} for voice in steered)]


def _in_voice(voice: Mapping[str, Any], prompt: str) -> Request:
    # A model this small repeats itself; the penalty is the same for every row.
    return Request(prompt=prompt, max_new_tokens=48, repetition_penalty=1.15, **voice)


def _describe(request: Request) -> str:
    if request.task is None:
        return "no prefix"
    words = [f"user {request.user}"] if request.user else []
    for attribute, labels in request.attributes.items():
        weights = {} if isinstance(labels, str) else labels
        text = " + ".join(f"{w} {n}" for n, w in weights.items()) or str(labels)
        strength = request.strengths.get(attribute)
        words.append(text if strength is None else f"{text}, strength {strength}")
    return ", ".join(words) or "task only"


def _label_figures(cp: ControlPrefix, rows: Sequence[Example]) -> dict[str, dict[str, float]]:
    labels = {
        attribute: sorted({str(row.attributes[attribute]) for row in rows})
        for attribute in rows[0].attributes
    }

    def with_another(row: Example, attribute: str) -> Example:
        others = labels[attribute]
        other = others[(others.index(str(row.attributes[attribute])) + 1) % len(others)]
        return row.model_copy(update={"attributes": {**row.attributes, attribute: other}})

    bare = [row.model_copy(update={"attributes": {}}) for row in rows]
    alike = {
        "right label": _nats(cp, rows),
        "task only": _nats(cp, bare),
        "no prefix": _nats(cp, [row.model_copy(update={"task": None}) for row in bare]),
    }
    return {
        attribute: {
            **alike,
            "another label": _nats(cp, [with_another(row, attribute) for row in rows]),
        }
        for attribute in labels
    }


def _user_figures(cp: ControlPrefix, rows: Sequence[Example]) -> dict[str, dict[str, float]]:
    names = sorted({str(row.user) for row in rows})
    figures = {}
    for name in names:
        own = [row for row in rows if row.user == name]
        other = names[(names.index(name) + 1) % len(names)]
        figures[name] = {
            "right user": _nats(cp, own),
            "task only": _nats(cp, [row.model_copy(update={"user": None}) for row in own]),
            "no prefix": _nats(
                cp, [row.model_copy(update={"user": None, "task": None}) for row in own]
            ),
            "another user": _nats(cp, [row.model_copy(update={"user": other}) for row in own]),
        }
    return figures


def _nats(cp: ControlPrefix, examples: Sequence[Example]) -> float:
    """Negative log-likelihood, nats per token."""
    scores = cp.score(examples)
    total = -sum(score.log_likelihood for score in scores)
    return round(total / sum(score.num_tokens for score in scores), 3)


def _print_figures(out: Console, figures: dict[str, dict[str, dict[str, float]]]) -> None:
    for group, rows in figures.items():
        columns = list(next(iter(rows.values())))
        table = Table(f"{group}: nats per token, lower is better", *columns)
        for name, values in rows.items():
            best = min(values.values())
            cells = (Text(f"{v:.2f}", "bold" if v == best else "") for v in values.values())
            table.add_row(name, *cells)
        out.print(table)


def _sizes(cp: ControlPrefix) -> dict[str, tuple[int, int]]:
    kinds: Iterable[Kind] = ("task", "attribute", "user")
    sizes: dict[str, tuple[int, int]] = {}
    for kind in kinds:
        names = cp.names(kind)
        largest = max(cp.version_info(kind, name).size_bytes for name in names)
        sizes[kind] = (len(names), largest)
    return sizes


class _timed:
    """Records the seconds spent inside."""

    def __init__(self, times: dict[str, float], name: str) -> None:
        self._times, self._name = times, name

    def __enter__(self) -> None:
        self._started = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._times[self._name] = time.monotonic() - self._started
