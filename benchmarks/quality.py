"""What prefixes learn, against other ways to the same end: equal rows, equal order, equal steps.

Data are JSON Lines, gzipped, in the folder given first: formality_pavlick and
formality_squinky, sentiment_yelp, e2e, webnlg, each `.train`, `.dev` and `.test`. Where labels
are few (formality, sentiment), methods without parts learn an adapter a label, in as many
steps together; elsewhere one of all rows. Learning rates of the others are the best of
three on formality's dev split (`--rates`), ours are the library's defaults. The judges learn
from training rows that no method sees.

Run it with `python benchmarks/quality.py DATA`. What is done already is not done again;
`--fresh` begins anew.
"""

import argparse
import copy
import gzip
import json
import math
import random
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import sacrebleu
import torch
from peft import (
    CartridgeConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    PromptTuningInit,
    TaskType,
    get_peft_model,
)
from peft.tuners.cartridge.utils import initialize_kv_prefix_from_text
from rich.console import Console
from side_by_side import RESULTS, record
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from train import END, PAD

from controlprefix import ControlPrefix, Example, Request
from controlprefix.model.tokenization import TokenizedExample
from controlprefix.training import TrainingSettings
from controlprefix.training.run import learning_rate_schedule

CAUSAL = TaskType.CAUSAL_LM
FILE = RESULTS / "training.json"
MAX_LETTERS = 240


@dataclass(frozen=True)
class Row:
    """A text to write: after a prompt, or under a label, or both."""

    completion: str
    prompt: str = ""
    label: str | None = None
    refs: tuple[str, ...] = ()
    seen: bool = True


@dataclass(frozen=True)
class Data:
    """One data set.

    Attributes:
        task, attribute: As the prefixes are called.
        instruction: What an instructed model is told, for a label.
        few_labels: Whether the others learn an adapter a label.
        judges: Name -> a classifier of labels.
    """

    name: str
    task: str
    attribute: str | None
    instruction: Callable[[Row], str]
    few_labels: bool
    train: Sequence[Row]
    dev: Sequence[Row]
    test: Sequence[Row]
    judges: dict[str, Pipeline] = field(default_factory=dict)


def lines(folder: Path, name: str, split: str) -> list[dict[str, Any]]:
    path = folder / f"{name}.{split}.jsonl.gz"
    if not path.is_file():
        raise SystemExit(f"{path} is missing; give the folder of the data sets")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def shuffled(rows: Iterable[Row], seed: int) -> list[Row]:
    listed = list(rows)
    return random.Random(seed).sample(listed, len(listed))


def judge(rows: Sequence[Row]) -> Pipeline:
    """A linear classifier of words and pairs of words."""
    made = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
        LogisticRegression(C=10, max_iter=1000),
    )
    return made.fit([row.completion for row in rows], [row.label for row in rows])


def labelled(folder: Path, name: str, attribute: str, split: str) -> list[Row]:
    rows = [(one["text"], one["attrs"].get(attribute)) for one in lines(folder, name, split)]
    return [
        Row(text, label=label)
        for text, label in rows
        if label not in (None, "neutral") and len(text) <= MAX_LETTERS
    ]


@cache
def load_data(folder: Path, name: str, seed: int, num: int) -> Data:
    """The data set; the first `num` training rows are for the methods, the others for judges."""
    rng = random.Random(seed)
    if name in ("formality", "sentiment"):
        file = {"formality": "formality_pavlick", "sentiment": "sentiment_yelp"}[name]
        task = {"formality": "sentence", "sentiment": "review"}[name]
        train, dev, test = (
            shuffled(labelled(folder, file, name, split), seed)
            for split in ("train", "dev", "test")
        )
        judges = {file: judge(train[num:])}
        if name == "formality":
            judges["formality_squinky"] = judge(
                labelled(folder, "formality_squinky", "formality", "train")
            )
        about = {"sentence": "a sentence", "review": "a sentence of a restaurant review"}[task]

        def instruction(row: Row) -> str:
            return f"Write {about} that is {row.label}. Write nothing else."

        return Data(name, task, name, instruction, True, train[:num], dev, test, judges)

    def texts(split: str) -> list[Row]:
        if name == "e2e":
            return [
                Row(rng.choice(one["refs"]), one["mr"], None, tuple(one["refs"]))
                for one in lines(folder, "e2e", split)
            ]
        return [
            Row(
                rng.choice(one["refs"]),
                "; ".join(" | ".join(part.replace("_", " ") for part in t) for t in one["triples"]),
                one["category"],
                tuple(one["refs"]),
                one["seen_category"],
            )
            for one in lines(folder, "webnlg", split)
            if one["size"] <= 3
        ]

    train, dev, test = (shuffled(texts(split), seed) for split in ("train", "dev", "test"))
    attribute = "category" if name == "webnlg" else None
    return Data(
        name,
        "describe",
        attribute,
        lambda row: f"Write one or two sentences that say these facts and no others: {row.prompt}",
        False,
        train[:num],
        dev,
        test,
    )


# --- the ways -----------------------------------------------------------------------------


class Way:
    """One way to have the model write what the data set wants."""

    def __init__(self, cp: ControlPrefix, data: Data, options: argparse.Namespace) -> None:
        self.cp, self.data, self.options = cp, data, options
        self.num_parameters = self.num_kept = 0

    def learn(self, seed: int, steps: int) -> None:
        """From the training rows."""

    def example(self, row: Row, label: str | None) -> Example:
        """The row as it is read, under a label."""
        return Example(
            prompt=row.prompt, raw=not row.prompt, completion=row.completion, **self.parts(label)
        )

    def parts(self, label: str | None) -> dict[str, Any]:
        return {}

    def nats(self, rows: Sequence[Row], labels: Sequence[str | None]) -> float:
        """A token, end tokens not counted."""
        examples = [self.example(*one) for one in zip(rows, labels, strict=True)]
        scores = self.cp.score(examples)
        return -sum(s.log_likelihood for s in scores) / sum(s.num_tokens for s in scores)

    def write(self, rows: Sequence[Row], labels: Sequence[str | None]) -> list[str]:
        """A text for each row, under a label: greedy where there is a prompt, else drawn."""
        requests = []
        for i, (row, label) in enumerate(zip(rows, labels, strict=True)):
            fields = self.example(row, label).model_dump(exclude_unset=True, exclude={"completion"})
            drawn = {} if row.prompt else {"temperature": 0.8, "seed": i}
            prompt = fields.pop("prompt") or self.cp.tokenizer.bos_token
            requests.append(
                Request(
                    prompt=prompt,
                    **fields,
                    max_new_tokens=self.options.new_tokens,
                    stop=["\n"],
                    **drawn,
                )
            )
        return [one.text.strip() for one in self.cp.generate(requests, batch_size=32)]


class Instructed(Way):
    def example(self, row: Row, label: str | None) -> Example:
        asked = Row(row.completion, row.prompt, label)
        return Example(prompt=self.data.instruction(asked), completion=row.completion)


class FewShot(Way):
    def example(self, row: Row, label: str | None) -> Example:
        rng = random.Random(f"{row.prompt}{row.completion}")
        pool = [one for one in self.data.train if not self.data.few_labels or one.label == label]
        shown = rng.sample(pool, 4)
        if row.prompt:
            told = "".join(f"Facts: {one.prompt}\nText: {one.completion}\n\n" for one in shown)
            return Example(
                prompt=f"{told}Facts: {row.prompt}\nText:",
                raw=True,
                completion=f" {row.completion}",
            )
        told = "".join(f"{one.completion}\n" for one in shown)
        return Example(prompt=told, raw=True, completion=row.completion)


class Ours(Way):
    """Our prefixes: of the task alone, or with the labels'."""

    def __init__(
        self,
        *given: Any,
        labels: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__(*given)
        self.labels = labels and self.data.attribute is not None
        self.settings = settings

    def parts(self, label: str | None) -> dict[str, Any]:
        chosen = {}
        known = self.cp.names("attribute")
        if self.labels and f"{self.data.attribute}={label}" in known:
            chosen = {"attributes": {self.data.attribute: label}}
        return {"task": self.data.task, **chosen}

    def learn(self, seed: int, steps: int) -> None:
        examples = [
            Example(
                prompt=row.prompt,
                raw=not row.prompt,
                completion=row.completion,
                task=self.data.task,
                attributes={self.data.attribute: row.label} if self.labels else {},
            )
            for row in self.data.train
        ]
        report = self.cp.train(
            examples,
            learn=("task", "attributes") if self.labels else ("task",),
            num_slots=self.options.num_slots,
            steps=steps,
            batch_size=self.options.batch,
            validation=0,
            seed=seed,
            progress=False,
            **self.settings,
        )
        self.num_parameters = report.num_parameters
        self.num_kept = sum(
            slots.numel()
            for kind in ("task", "attribute")
            for name in self.cp.names(kind)
            for slots in self.cp.get(kind, name).slots.values()
        )


class Peft(Way):
    """An adapter of PEFT: one of all rows, or one a label."""

    def __init__(
        self,
        *given: Any,
        config: Callable[[argparse.Namespace], Any],
        rate: float,
        text: bool = False,
    ) -> None:
        super().__init__(*given)
        self.config, self.rate, self.text = config, rate, text
        self.models: dict[str | None, PeftModel] = {}

    def tokenized(self, example: Example) -> TokenizedExample:
        return self.cp.frozen_model.request_tokenizer.example_ids(example)

    def learn(self, seed: int, steps: int) -> None:
        labels: list[str | None] = [None]
        if self.data.few_labels:
            labels = [*sorted({str(row.label) for row in self.data.train})]
        self.models.clear()
        for label in labels:
            rows = [row for row in self.data.train if label in (None, row.label)]
            torch.manual_seed(seed)
            model = get_peft_model(copy.deepcopy(self.cp.model), self.config(self.options))
            if self.text:
                text = "\n".join(row.completion for row in rows[: self.options.num_slots])
                initialize_kv_prefix_from_text(
                    model, self.cp.tokenizer, text=text, use_chat_template=False
                )
            encoded = [self.tokenized(self.example(row, None)) for row in rows]
            share = math.ceil(steps / len(labels))
            peft_steps(model, encoded, self.options.batch, self.rate, share, seed)
            self.models[label] = model.eval()
            self.num_parameters += sum(p.numel() for p in model.parameters() if p.requires_grad)
            self.num_kept = self.num_parameters

    def nats(self, rows: Sequence[Row], labels: Sequence[str | None]) -> float:
        total, count = 0.0, 0
        for label, model in self.models.items():
            mine = [
                self.tokenized(self.example(row, None))
                for row, wanted in zip(rows, labels, strict=True)
                if label in (None, wanted)
            ]
            mine.sort(key=lambda one: len(one.prompt) + len(one.completion))
            for at in range(0, len(mine), 16):
                ids, mask, targets = padded(mine[at : at + 16], end=False)
                with torch.no_grad():
                    logits = model(input_ids=ids, attention_mask=mask).logits
                logits = logits[:, -ids.shape[1] :].float()  # prompt tuning adds positions
                losses = torch.nn.functional.cross_entropy(
                    logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), reduction="none"
                )
                total += float(losses.sum())
                count += int((targets[:, 1:] != -100).sum())
        return total / count

    def write(self, rows: Sequence[Row], labels: Sequence[str | None]) -> list[str]:
        texts = [""] * len(rows)
        for label, model in self.models.items():
            mine = [i for i, wanted in enumerate(labels) if label in (None, wanted)]
            prompts = {i: self.tokenized(self.example(rows[i], None)).prompt for i in mine}
            mine.sort(key=lambda i: len(prompts[i]))
            for at in range(0, len(mine), 16):
                chosen = mine[at : at + 16]
                longest = max(len(prompts[i]) for i in chosen)
                ids = torch.tensor(
                    [[PAD] * (longest - len(prompts[i])) + [*prompts[i]] for i in chosen]
                )
                mask = torch.tensor(
                    [[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in chosen]
                )
                torch.manual_seed(at)
                drawn: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_k": 0}
                written = model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    max_new_tokens=self.options.new_tokens,
                    eos_token_id=END,
                    pad_token_id=PAD,
                    **({"do_sample": False} if rows[chosen[0]].prompt else drawn),
                )
                new = written[:, longest:] if written.shape[1] > longest else written
                for i, row in zip(chosen, new, strict=True):
                    text = str(self.cp.tokenizer.decode(row, skip_special_tokens=True))
                    texts[i] = text.split("\n")[0].strip()
        return texts


def padded(
    rows: Sequence[TokenizedExample], *, end: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, mask and labels, padded on the right as PEFT's documentation does."""
    full = [[*row.prompt, *row.completion, *([END] if end else [])] for row in rows]
    longest = max(map(len, full))
    ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in full])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in full])
    labels = ids.masked_fill(mask == 0, -100)
    for i, row in enumerate(rows):
        labels[i, : len(row.prompt)] = -100
    return ids, mask, labels


def passes(
    rows: Sequence[TokenizedExample], batch: int, order: random.Random
) -> Iterator[list[TokenizedExample]]:
    """Over and over, in another order each time."""
    while True:
        mixed = order.sample(list(rows), len(rows))
        yield from (mixed[at : at + batch] for at in range(0, len(mixed), batch))


def peft_steps(
    model: PeftModel,
    rows: Sequence[TokenizedExample],
    batch: int,
    rate: float,
    steps: int,
    seed: int,
) -> None:
    """With AdamW, and the same warm-up and decay as ours."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(wanted, lr=rate, weight_decay=0.0)
    model.train()
    stream = passes(rows, batch, random.Random(seed))
    multiplier = learning_rate_schedule(steps)
    for step in range(1, steps + 1):
        ids, mask, labels = padded(next(stream), end=True)
        for group in optimizer.param_groups:
            group["lr"] = rate * multiplier(step)
        optimizer.zero_grad()
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(wanted, 1.0)
        optimizer.step()


PREFIX = partial(PrefixTuningConfig, task_type=CAUSAL)
LORA = ["q_proj", "k_proj", "v_proj", "o_proj"]
PEFT: dict[str, dict[str, Any]] = {
    "PEFT prefix tuning": {
        "config": lambda o: PREFIX(num_virtual_tokens=o.num_slots),
        "rates": (1e-2, 3e-2, 1e-1),
    },
    "PEFT prefix tuning from text": {
        "config": lambda o: PREFIX(num_virtual_tokens=o.num_slots),
        "text": True,
        "rates": (3e-3, 1e-2, 3e-2),
    },
    "PEFT cartridge": {
        "config": lambda o: CartridgeConfig(task_type=CAUSAL, num_virtual_tokens=o.num_slots),
        "text": True,
        "rates": (1e-2, 3e-2, 1e-1),
    },
    "PEFT prompt tuning": {
        "config": lambda o: PromptTuningConfig(
            task_type=CAUSAL,
            num_virtual_tokens=o.num_slots,
            prompt_tuning_init=PromptTuningInit.RANDOM,
        ),
        "rates": (3e-2, 1e-1, 3e-1),
    },
    "PEFT LoRA r8": {
        "config": lambda o: LoraConfig(task_type=CAUSAL, r=8, lora_alpha=16, target_modules=LORA),
        "rates": (1e-3, 3e-3, 1e-2),
    },
}
OURS: dict[str, dict[str, Any]] = {
    "ours, task alone": {"labels": False},
    "ours, direct": {"parameterization": "direct"},
    "ours, shared": {},
    "ours, shared, contrast": {"contrast": 0.3},  # of 0, 0.3 and 0.6, on formality's dev split
}
PLAIN: dict[str, type[Way]] = {"plain": Way, "instruction": Instructed, "few-shot": FewShot}


def ways(
    data: Data, options: argparse.Namespace, rates: dict[str, float]
) -> dict[str, Callable[[], Way]]:
    """Name -> how to begin it, with a store of its own."""

    def begin(way: Callable[..., Way], **settings: Any) -> Callable[[], Way]:
        def begun() -> Way:
            cp = ControlPrefix.from_pretrained(model(), tokenizer=tokenizer(), store="sqlite://")
            return way(cp, data, options, **settings)

        return begun

    found = {name: begin(way) for name, way in PLAIN.items()}
    for name, made in OURS.items():
        wanted = {"labels": data.attribute is not None, "contrast": data.few_labels}
        if all(wanted.get(setting, True) for setting in made):
            found[name] = begin(Ours, **made)
    for name, made in PEFT.items():
        kept = {key: value for key, value in made.items() if key != "rates"}
        found[name] = begin(Peft, **kept, rate=rates[name])
    return found


@cache
def loaded() -> Any:
    from controlprefix.model.loading import load

    return load("smollm2")


def model() -> Any:
    return loaded()[0]


def tokenizer() -> Any:
    return loaded()[1]


def measure(way: Way, data: Data, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Everything about one way on one data set."""
    rows = data.test[: options.rows]
    way.learn(seed, options.steps)
    found: dict[str, float] = {"nats": way.nats(rows, [row.label for row in rows])}
    if way.num_parameters:
        found |= {"parameters": way.num_parameters, "kept": way.num_kept}
    if data.few_labels:
        labels = sorted({str(row.label) for row in data.train})
        swap = {label: labels[1 - i] for i, label in enumerate(labels)}
        found["nats, other label"] = way.nats(rows, [swap[str(row.label)] for row in rows])
        wanted = [label for label in labels for _ in range(options.texts)]
        texts = way.write([Row(str(i), label=label) for i, label in enumerate(wanted)], wanted)
        for name, classifier in data.judges.items():
            judged = classifier.predict([text or " " for text in texts])
            found[f"control, {name}"] = statistics.mean(map(float, judged == wanted))
    else:
        texts = []
        for name, chosen in (
            ("", [row for row in rows if row.seen][: options.texts]),
            (", unseen", [row for row in rows if not row.seen][: options.texts]),
        ):
            if not chosen:
                continue
            if name:
                found["nats" + name] = way.nats(
                    [r for r in rows if not r.seen], [r.label for r in rows if not r.seen]
                )
            written = way.write(chosen, [row.label for row in chosen])
            most = max(len(row.refs) for row in chosen)
            refs = [[(*row.refs, *[""] * most)[i] for row in chosen] for i in range(most)]
            found["BLEU" + name] = sacrebleu.corpus_bleu(written, refs).score
            found["chrF" + name] = sacrebleu.corpus_chrf(written, refs).score
            texts += written
    plain = Way(way.cp, data, options)
    whole = [Row(text) for text in texts if text]
    found["fluency"] = plain.nats(whole, [None] * len(whole)) if whole else math.nan
    found["words"] = statistics.mean(len(text.split()) for text in texts)
    return found


def choose_rates(folder: Path, options: argparse.Namespace, found: dict[str, Any]) -> None:
    """For each adapter of PEFT, add the dev loss of each rate that is missing, on formality."""
    data = load_data(folder, "formality", 0, options.steps * options.batch)
    rows = data.dev[: options.rows]
    for name, made in PEFT.items():
        for rate in made["rates"]:
            known = found.setdefault(name, {})
            if str(rate) in known:
                continue
            way = ways(data, options, dict.fromkeys(PEFT, rate))[name]()
            way.learn(0, options.steps)
            known[str(rate)] = round(way.nats(rows, [row.label for row in rows]), 4)
            print(f"rate {rate} of {name}: {known[str(rate)]}", flush=True)


OUR_RATES = (2.5e-4, 5e-4, 1e-3)


def try_our_rates(folder: Path, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """For each data set, the dev loss of our prefixes at each rate."""
    found: dict[str, dict[str, float]] = {}
    for name in ("formality", "sentiment", "e2e"):
        data = load_data(folder, name, 0, options.steps * options.batch)
        rows = data.dev[: options.rows]
        for rate in OUR_RATES:
            cp = ControlPrefix.from_pretrained(model(), tokenizer=tokenizer(), store="sqlite://")
            way = Ours(cp, data, options, learning_rate=rate)
            way.learn(0, options.steps)
            nats = round(way.nats(rows, [row.label for row in rows]), 4)
            found.setdefault(name, {})[str(rate)] = nats
            print(f"rate {rate} on {name}: {nats}", flush=True)
    return found


COLUMNS = (
    ("nats", "nats", 3),
    ("nats, unseen", "nats, unseen", 3),
    ("nats, other label", "other label", 3),
    ("control, formality_pavlick", "control", 2),
    ("control, formality_squinky", "control (squinky)", 2),
    ("control, sentiment_yelp", "control", 2),
    ("BLEU", "BLEU", 1),
    ("chrF", "chrF", 1),
    ("BLEU, unseen", "BLEU, unseen", 1),
    ("chrF, unseen", "chrF, unseen", 1),
    ("fluency", "fluency", 2),
    ("parameters", "learned", 0),
    ("kept", "kept", 0),
)


def page(results: dict[str, Any]) -> str:
    """The results as Markdown, written by this script alone."""
    about = results["options"]
    parts = [
        "# What prefixes learn",
        f"SmolLM2-135M in bfloat16, {about['steps']} steps of {about['batch']} rows, "
        f"{about['slots']} slots, {about['rows']} test rows, {about['texts']} texts a label (or in "
        "all). Means over seeds, with the standard deviation where there are several. Written by "
        f"`{results['command']}` with `training.json` beside it.",
        "**nats**: a token of held-out texts, under the right label; **other label**: under the "
        "wrong one (higher is better there). **control**: how often a judge (linear, TF-IDF, "
        "learned from rows that no method saw) finds the label in texts written under it. "
        "**fluency**: nats per token of the written texts under the plain model. **learned**, "
        "**kept**: numbers, for all labels together, while learning and in use: a network of "
        "`shared` is dropped. Time and memory of a step stand in `speed.md`, where they were "
        "measured side by side.",
    ]
    for name in results["data"]:
        found = results["data"][name]
        columns = [
            c for c in COLUMNS if any(c[0] in run for way in found.values() for run in way.values())
        ]
        parts.append(f"## {name}")
        table = [
            f"| way | {' | '.join(title for _, title, _ in columns)} | seeds |",
            "| --- |" + " --- |" * (len(columns) + 1),
        ]
        for way, runs in found.items():
            cells = [cell([run.get(key) for run in runs.values()], d) for key, _, d in columns]
            table.append(f"| {way} | {' | '.join(cells)} | {len(runs)} |")
        parts.append("\n".join(table))
    rates = [
        f"| {name} | " + " | ".join(f"{loss:.3f} at {rate}" for rate, loss in losses.items()) + " |"
        for name, losses in results["rates"].items()
    ]
    if results.get("our rates"):
        header = " | ".join(str(rate) for rate in OUR_RATES)
        ours = [
            f"| {name} | {' | '.join(f'{losses[str(rate)]:.3f}' for rate in OUR_RATES)} |"
            for name, losses in results["our rates"].items()
        ]
        parts += [
            "## Our learning rate",
            "Nats a token on dev splits, `shared`; the default is "
            f"{TrainingSettings().peak_learning_rate}, everywhere.",
            "\n".join([f"| data | {header} |", "| --- |" + " --- |" * len(OUR_RATES), *ours]),
        ]
    parts += [
        "## Learning rates of the others",
        "Nats a token on formality's dev split after as many steps; the lowest was used "
        "everywhere.",
        "\n".join(["| way | | | |", "| --- | --- | --- | --- |", *rates]),
    ]
    return "\n\n".join(parts) + "\n"


def cell(values: Sequence[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    mean = f"{statistics.mean(known):,.{digits}f}"
    spread = statistics.stdev(known) if len(known) > 1 else 0.0
    return f"{mean} ± {spread:,.{digits}f}" if spread >= 0.5 * 10**-digits else mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of the data sets")
    parser.add_argument("--data", nargs="+", default=["formality", "sentiment", "e2e", "webnlg"])
    parser.add_argument("--ways", nargs="+", help="left out: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--num-slots", type=int, default=8)
    parser.add_argument("--rows", type=int, default=96, help="of the test split")
    parser.add_argument("--texts", type=int, default=96, help="written a label, or in all")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--our-rates", action="store_true", help="try ours at five rates instead")
    parser.add_argument("--fresh", action="store_true", help="measure all again")
    options = parser.parse_args()
    kept = ("steps", "batch", "num_slots", "rows", "texts", "new_tokens")
    about = {name.removeprefix("num_"): getattr(options, name) for name in kept}
    results: dict[str, Any] = {"options": about, "rates": {}, "data": {}}
    if FILE.exists() and not options.fresh:
        before = json.loads(FILE.read_text())
        if before["options"] != about:
            raise SystemExit(f"{FILE} was measured with {before['options']}; give --fresh")
        results = before
    if not options.our_rates:
        choose_rates(options.folder, options, results["rates"])
    if options.our_rates:
        results["our rates"] = try_our_rates(options.folder, options)
        path = record("training", results)
        path.with_suffix(".md").write_text(page(json.loads(path.read_text())))
        return
    rates = {name: float(min(one, key=one.get)) for name, one in results["rates"].items()}
    for seed in options.seeds:
        for name in options.data:
            data = load_data(options.folder, name, seed, options.steps * options.batch)
            for label, begin in ways(data, options, rates).items():
                runs = results["data"].setdefault(name, {}).setdefault(label, {})
                if str(seed) in runs or (options.ways and label not in options.ways):
                    continue
                torch.manual_seed(seed)
                runs[str(seed)] = measure(begin(), data, seed, options)
                shown = {key: round(value, 3) for key, value in runs[str(seed)].items()}
                Console(width=200).print(f"{name}, {label}, seed {seed}: {shown}")
                path = record("training", results)
                results = json.loads(path.read_text())
                path.with_suffix(".md").write_text(page(results))


if __name__ == "__main__":
    main()
