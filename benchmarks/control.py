"""Control of several attributes at once, dials, unseen labels and conflicts.

Two sets of attributes, learned from rows that have one label each, and asked for in every
combination: `aspects` (sentiment of film reviews, topic of news, toxicity) and `styles`
(formality, sentiment of restaurant reviews, politeness). All ways see the same rows in as many
steps. Texts begin at nothing, so all that they are comes from what steers them. Two judges of
each attribute, linear over words and over sentence embeddings, learn from rows that no way
sees; one says the average control, the other checks it. What a way can be tuned in (a
coefficient) is chosen by other draws than those reported.

repeng asks for NumPy 1, and is left out unless it is there: `pip install --no-deps repeng==0.4.0`.

Run it with `python benchmarks/control.py DATA`, or a part with `--part aspects`. What is done
already is not done again; `--fresh` begins anew.
"""

import argparse
import copy
import itertools
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy
import torch
from quality import (
    END,
    PAD,
    PEFT,
    Data,
    Peft,
    Row,
    judge,
    labelled,
    load_data,
    loaded,
    model,
    shuffled,
    tokenizer,
)
from rich.console import Console
from side_by_side import RESULTS, record
from sklearn.pipeline import Pipeline
from transformers import DynamicCache

from controlprefix import ControlPrefix, Example, Part, Prefix, Request
from controlprefix.batching import Prepared
from controlprefix.evaluation import Judge, calibrate, evaluate, filled_in, responses
from controlprefix.evaluation.harness import fluencies
from controlprefix.evaluation.metrics import distinct, spearman
from controlprefix.guidance import Guidance, Term

FILE = RESULTS / "control.json"
Combination = Mapping[str, str]  # attribute -> label

SETS: dict[str, dict[str, str]] = {
    "aspects": dict.fromkeys(
        ("sentiment", "topic", "toxicity"), "aspects_sentiment_topic_toxicity"
    ),
    "styles": {
        "formality": "formality_pavlick",
        "sentiment": "sentiment_yelp",
        "politeness": "politeness_stanford",
    },
}
SAID = {
    "world": "about world politics",
    "sports": "about sports",
    "business": "about business",
    "sci/tech": "about science and technology",
    "nontoxic": "decent, without insults",
    "toxic": "rude and insulting",
}
SAMPLING = {"temperature": 0.8}


@dataclass(frozen=True)
class Study:
    """A set of attributes.

    Attributes:
        labels: Of each attribute.
        rows: To learn from, each with one label (`topic=sports`).
        words, meanings: A judge of each attribute.
        unseen: Rows of the test splits, like `rows`.
        fluency: Of those, nats a token under the plain model.
    """

    name: str
    labels: dict[str, list[str]]
    rows: list[Row]
    words: dict[str, Pipeline]
    meanings: dict[str, Judge]
    unseen: list[Row]
    fluency: float

    def combinations(self) -> list[Combination]:
        return [
            dict(zip(self.labels, chosen, strict=True))
            for chosen in itertools.product(*self.labels.values())
        ]


@cache
def study(folder: Path, name: str, num: int) -> Study:
    """As many rows of each attribute are learned from; up to 4,000 others teach its judges."""
    labels: dict[str, list[str]] = {}
    rows: list[Row] = []
    unseen: list[Row] = []
    words, meanings = {}, {}
    for attribute, file in SETS[name].items():
        found = shuffled(labelled(folder, file, attribute, "train"), 0)
        labels[attribute] = sorted({str(row.label) for row in found})
        share = num // len(SETS[name])
        rows += [replace(row, label=f"{attribute}={row.label}") for row in found[:share]]
        others = found[share : share + 4000]
        test = shuffled(labelled(folder, file, attribute, "test"), 0)[:128]
        unseen += [replace(row, label=f"{attribute}={row.label}") for row in test]
        words[attribute] = judge(others)
        meanings[attribute] = Judge.learn(
            attribute, [row.completion for row in others], [str(row.label) for row in others]
        )
    cp = ControlPrefix.from_pretrained(model(), tokenizer=tokenizer(), store="sqlite://")
    fluency = statistics.fmean(fluencies(cp, [row.completion for row in unseen]))
    return Study(name, labels, shuffled(rows, 0), words, meanings, unseen, fluency)


def pairs(combination: Combination) -> list[str]:
    return [f"{attribute}={label}" for attribute, label in combination.items()]


# --- the ways -----------------------------------------------------------------------------


class Way:
    """One way to have several labels at once; this one leaves the model alone."""

    coefficients: Sequence[float] = ()

    def __init__(self, study: Study, options: argparse.Namespace) -> None:
        self.study, self.options = study, options
        self.coefficient = 1.0
        self.cp = ControlPrefix.from_pretrained(model(), tokenizer=tokenizer(), store="sqlite://")

    def learn(self) -> None:
        """From the study's rows."""

    def write(self, combination: Combination, count: int, seed: int) -> list[str]:
        """Texts with those labels."""
        return self.drawn(self.cp.model, count, seed)

    def drawn(
        self,
        source: Any,
        count: int,
        seed: int,
        slots: Sequence[tuple[torch.Tensor, torch.Tensor]] = (),
    ) -> list[str]:
        """From nothing, by transformers alone; with keys and values already in the cache."""
        ids = torch.full((count, 1), tokenizer().bos_token_id)
        more: dict[str, Any] = {}
        if slots:
            full = [(k.expand(count, -1, -1, -1), v.expand(count, -1, -1, -1)) for k, v in slots]
            more["past_key_values"] = DynamicCache(ddp_cache_data=full, config=model().config)
        before = slots[0][0].shape[2] if slots else 0
        torch.manual_seed(seed)
        with torch.no_grad():
            written = source.generate(
                input_ids=ids,
                attention_mask=torch.ones(count, before + 1, dtype=torch.long),
                max_new_tokens=self.options.new_tokens,
                do_sample=True,
                top_k=0,
                eos_token_id=END,
                pad_token_id=PAD,
                **SAMPLING,
                **more,
            )
        texts = tokenizer().batch_decode(written[:, 1:], skip_special_tokens=True)
        return [text.split("\n")[0].strip() for text in texts]

    def asked(self, requests: Sequence[dict[str, Any]], seed: int) -> list[str]:
        """By the library."""
        rows = [
            Request(
                **{"prompt": tokenizer().bos_token, "raw": True, **one},
                max_new_tokens=self.options.new_tokens,
                seed=seed * 10_000 + i,
                stop=["\n"],
                **SAMPLING,
            )
            for i, one in enumerate(requests)
        ]
        return [one.text.strip() for one in self.cp.generate(rows, batch_size=32)]


def instruction(combination: Combination) -> dict[str, Any]:
    told = ", ".join(SAID.get(label, label) for label in combination.values())
    prompt = f"Write one sentence that is {told}. Write nothing else."
    return {"prompt": prompt, "raw": False}


class Instructed(Way):
    def write(self, combination: Combination, count: int, seed: int) -> list[str]:
        return self.asked([instruction(combination)] * count, seed)


class FewShot(Way):
    def write(self, combination: Combination, count: int, seed: int) -> list[str]:
        some = []
        for i in range(count):
            shown = [
                row.completion
                for pair in pairs(combination)
                for row in shuffled((r for r in self.study.rows if r.label == pair), seed + i)[:2]
            ]
            some.append({"prompt": "".join(f"{text}\n" for text in shown)})
        return self.asked(some, seed)


class Ours(Way):
    """Task and labels learned together, or each attribute alone."""

    def __init__(
        self,
        *given: Any,
        apart: bool = False,
        filled: bool = False,
        mixing: str = "attention",
        against: bool = False,
        told: bool = False,
        coefficients: Sequence[float] = (),
    ) -> None:
        super().__init__(*given)
        self.apart, self.filled, self.told = apart, filled, told
        self.mixing, self.against = mixing, against
        self.coefficients = coefficients

    def learn(self) -> None:
        attributes = list(self.study.labels)
        for group in [[one] for one in attributes] if self.apart else [attributes]:
            rows = [
                Example(
                    prompt="",
                    raw=True,
                    completion=row.completion,
                    task=None if self.apart else "text",
                    attributes=dict([str(row.label).split("=")]),
                )
                for row in self.study.rows
                if str(row.label).partition("=")[0] in group
            ]
            self.cp.train(
                filled_in(rows) if self.filled else rows,
                learn=("attributes",) if self.apart else ("task", "attributes"),
                num_slots=self.options.slots,
                steps=math.ceil(self.options.steps * len(group) / len(attributes)),
                batch_size=8,
                contrast=0.3,
                validation=0,
                progress=False,
            )

    def request(self, combination: Combination) -> dict[str, Any]:
        """With the labels that are not meant below 0, where that is wanted."""
        weights = {
            attribute: {
                label: self.coefficient,
                **{
                    other: -self.coefficient / (len(self.study.labels[attribute]) - 1)
                    for other in self.study.labels[attribute]
                    if other != label and self.against
                },
            }
            for attribute, label in combination.items()
        }
        return {
            "task": None if self.apart else "text",
            "attributes": weights,
            "mixing": self.mixing,
            **(instruction(combination) if self.told else {}),
        }

    def write(self, combination: Combination, count: int, seed: int) -> list[str]:
        return self.asked([self.request(combination)] * count, seed)


class PerLabel(Way):
    """An adapter of PEFT for each label, learned from its rows."""

    kind, rate = "", 0.0

    def learn(self) -> None:
        made = {key: value for key, value in PEFT[self.kind].items() if key != "rates"}
        about: Any = {"instruction": None, "few_labels": True, "dev": (), "test": ()}
        data = Data(self.study.name, "text", None, train=self.study.rows, **about)
        options = argparse.Namespace(slots=self.options.slots, batch=8)
        self.adapters = Peft(self.cp, data, options, rate=self.rate, **made)
        self.adapters.learn(0, self.options.steps)


class PrefixUnion(PerLabel):
    """PEFT's prefixes, one after the other in the cache."""

    kind, rate = "PEFT prefix tuning from text", 0.03

    def write(self, combination: Combination, count: int, seed: int) -> list[str]:
        caches = [
            self.adapters.models[pair].get_prompt(batch_size=1) for pair in pairs(combination)
        ]
        slots = [
            (
                torch.cat([one.layers[i].keys for one in caches], dim=2).detach(),
                torch.cat([one.layers[i].values for one in caches], dim=2).detach(),
            )
            for i in range(len(caches[0].layers))
        ]
        return self.drawn(self.cp.model, count, seed, slots)


class LoraSum(PerLabel):
    """What the labels' LoRAs add to the weights, times a coefficient: 1/3 is their average."""

    kind, rate = "PEFT LoRA r8", 0.003
    coefficients = (1 / 3, 2 / 3, 1.0)

    def write(self, combination: Combination, count: int, seed: int) -> list[str]:
        merged = copy.deepcopy(self.cp.model)
        for pair in pairs(combination):
            for name, module in self.adapters.models[pair].base_model.model.named_modules():
                if hasattr(module, "get_delta_weight"):
                    weight = merged.get_submodule(name).weight
                    with torch.no_grad():
                        weight += self.coefficient * module.get_delta_weight("default").to(weight)
        return self.drawn(merged, count, seed)


class Steering(Way):
    """repeng's vectors, added up: for each label, its texts against those of the others."""

    coefficients = (0.5, 1.0, 2.0, 3.0)

    def learn(self) -> None:
        numpy.float_ = numpy.float64  # repeng 0.4 knows NumPy 1
        from repeng import ControlModel, ControlVector, DatasetEntry

        self.model = ControlModel(copy.deepcopy(self.cp.model), list(range(-5, -24, -1)))
        self.vectors = {}
        for attribute, labels in self.study.labels.items():
            own = [r for r in self.study.rows if str(r.label).startswith(f"{attribute}=")]
            for label in labels:
                liked = [r.completion for r in own if r.label == f"{attribute}={label}"]
                others = [r.completion for r in own if r.label != f"{attribute}={label}"]
                count = min(len(liked), len(others), 128)
                self.vectors[f"{attribute}={label}"] = ControlVector.train(
                    self.model,
                    tokenizer(),
                    [
                        DatasetEntry(*both)
                        for both in zip(liked[:count], others[:count], strict=True)
                    ],
                )

    def write(self, combination: Combination, count: int, seed: int) -> list[str]:
        vectors = [self.vectors[pair] for pair in pairs(combination)]
        total = vectors[0]
        for one in vectors[1:]:
            total = total + one
        self.model.set_control(total, self.coefficient)
        return self.drawn(self.model, count, seed)


GUIDED: dict[str, Any] = {"mixing": "logits", "coefficients": (0.5, 1.0, 2.0)}
WAYS: dict[str, Callable[..., Way]] = {
    "plain": Way,
    "instruction": Instructed,
    "few-shot": FewShot,
    "ours": Ours,
    "ours, strength chosen": lambda *given: Ours(*given, coefficients=(1.0, 1.5, 2.0)),
    "ours, mixed in logits": lambda *given: Ours(*given, **GUIDED),
    "ours, mixed in logits, for and against": lambda *given: Ours(*given, **GUIDED, against=True),
    "ours, labels filled in": lambda *given: Ours(
        *given, filled=True, coefficients=(1.0, 1.5, 2.0)
    ),
    "ours, filled in, for and against": lambda *given: Ours(
        *given, **GUIDED, filled=True, against=True
    ),
    "ours, learned apart": lambda *given: Ours(*given, apart=True),
    "ours and an instruction": lambda *given: Ours(
        *given, **GUIDED, apart=True, against=True, told=True
    ),
    "union of PEFT prefixes": PrefixUnion,
    "LoRA of labels added": LoraSum,
    "repeng": Steering,
}
SAME_LEARNING = dict.fromkeys(
    ("ours, strength chosen", "ours, mixed in logits", "ours, mixed in logits, for and against"),
    "ours",
) | {
    "ours, filled in, for and against": "ours, labels filled in",
    "ours and an instruction": "ours, learned apart",
}


def judged(
    study: Study, texts: Sequence[tuple[Combination, str]], cp: ControlPrefix
) -> dict[str, float]:
    """Control by both judges, fluency and variety of texts that were asked with labels."""
    found: dict[str, float] = {}
    written = [text or " " for _, text in texts]
    right: dict[str, list[bool]] = {}
    for attribute in study.labels:
        wanted = [combination.get(attribute) for combination, _ in texts]
        said = list(study.words[attribute].predict(written))
        asked = [i for i, label in enumerate(wanted) if label]
        right[attribute] = [said[i] == wanted[i] for i in asked]
        if not asked:
            continue
        found[f"control, {attribute}"] = statistics.fmean(right[attribute])
        other = study.meanings[attribute]
        best = other.chances(written).argmax(dim=1).tolist()
        hits = [other.labels[best[i]] == wanted[i] for i in asked]
        found[f"other judge, {attribute}"] = statistics.fmean(hits)
    for name in ("control", "other judge"):
        some = [value for key, value in found.items() if key.startswith(f"{name}, ")]
        found[f"{name}, mean"] = statistics.fmean(some)
    if len({len(one) for one in right.values()}) == 1:
        found["all right"] = statistics.fmean(map(all, zip(*right.values(), strict=True)))
    found["fluency"] = statistics.fmean(fluencies(cp, [text for text in written if text.strip()]))
    found["distinct-2"] = distinct(written, 2)
    found["words"] = statistics.fmean(len(text.split()) for text in written)
    return found


def measure(way: Way, study: Study, options: argparse.Namespace) -> dict[str, float]:
    combinations = study.combinations()
    chosen: dict[str, float] = {}
    if way.coefficients:
        tried = {}
        for coefficient in way.coefficients:
            way.coefficient = coefficient
            texts = drawn_texts(way, combinations, max(2, options.texts // 4), seed=1)
            tried[coefficient] = judged(study, texts, way.cp)
        fluent = {c: one for c, one in tried.items() if one["fluency"] <= study.fluency}
        plainest = min(tried, key=lambda c: tried[c]["fluency"])
        way.coefficient = max(
            fluent or [plainest], key=lambda coefficient: tried[coefficient]["control, mean"]
        )
        chosen["coefficient"] = way.coefficient
    texts = drawn_texts(way, combinations, options.texts, seed=0)
    for combination, text in texts[:: options.texts]:
        Console(width=200, highlight=False, markup=False).print(combination, repr(text))
    found = {**judged(study, texts, way.cp), **chosen}
    if isinstance(way, Ours):  # each label alone: what do the others take from it?
        alone = [{a: label} for a, labels in study.labels.items() for label in labels]
        texts = drawn_texts(way, alone, options.texts, seed=2)
        found["alone, mean"] = judged(study, texts, way.cp)["control, mean"]
    return found


def drawn_texts(
    way: Way, combinations: Sequence[Combination], count: int, seed: int
) -> list[tuple[Combination, str]]:
    return [
        (combination, text)
        for i, combination in enumerate(combinations)
        for text in way.write(combination, count, seed * 100 + i)
    ]


# --- dials --------------------------------------------------------------------------------

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 2.0, 4.0)
ADVERBS = {0.0: "", 0.25: "a little ", 0.5: "somewhat ", 0.75: "rather ", 1.0: "", 2.0: "very "}
ADVERBS[4.0] = "extremely "


def dials(ours: Ours, options: argparse.Namespace) -> dict[str, Any]:
    """Kinds of dials on the same prefix: what each position does to the judged attribute."""
    attribute, label, other = "formality", "formal", "informal"
    judge, cp = ours.study.meanings[attribute], ours.cp
    task = cp.get("task", "text")
    one, opposite = (cp.get("attribute", f"{attribute}={name}") for name in (label, other))

    def mass(w: float) -> list[Part]:
        return [Part(task), Part(one, w)]

    def share(w: float) -> list[Part]:
        """The part's share of what attention gives: its values, times w."""
        return [Part(task), Part(mixed(one, one, lambda x, _: x, lambda x, _: w * x))]

    def between(w: float) -> list[Part]:
        """Keys and values between those of the opposite label and its own."""

        def mean(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return w * x + (1 - w) * y

        return [Part(task), Part(mixed(one, opposite, mean, mean))]

    def guided(w: float) -> Guidance:
        rows = [[Part(task)], [Part(task), Part(one)]]
        return Guidance(rows, [0, 0], [[Term(1, w)]])

    plain: dict[str, Callable[[float], list[Part]]] = {
        "attention mass": mass,
        "share of the output": share,
        "between opposite keys and values": between,
    }
    batcher = cp.batcher(max_rows=64)

    def steered(w: float, guidance: Guidance) -> list[str]:
        tickets = [
            batcher.submit(
                Request(
                    prompt=tokenizer().bos_token,
                    raw=True,
                    max_new_tokens=options.new_tokens,
                    stop=["\n"],
                    seed=i,
                    **SAMPLING,
                ),
                prepare=lambda _: Prepared(guidance, ""),
            )
            for i in range(options.dial_texts)
        ]
        return [ticket.result().text.strip() for ticket in tickets]

    def adverb(w: float) -> list[str]:
        told = f"{ADVERBS[w]}{label}" if w else ""
        prompt = f"Write one {told} sentence. Write nothing else.".replace("  ", " ")
        asked = [{"prompt": prompt, "raw": False}] * options.dial_texts
        return ours.asked(asked, 0)

    kinds: dict[str, Callable[[float], list[str]]] = {
        **{
            name: lambda w, make=make: steered(w, Guidance([make(w)], [0], [[]]))
            for name, make in plain.items()
        },
        "logit guidance": lambda w: steered(w, guided(w)),
        "adverbs in an instruction": adverb,
    }
    found: dict[str, Any] = {}
    for name, texts_at in kinds.items():
        points = []
        for w in STRENGTHS:
            texts = [text or " " for text in texts_at(w)]
            chance = judge.chances(texts)[:, judge.labels.index(label)].mean()
            points.append((w, float(chance), statistics.fmean(fluencies(cp, texts))))
        found[name] = curve(points)
        print(name, found[name], flush=True)
    batcher.close()
    request = Request(
        prompt=tokenizer().bos_token,
        raw=True,
        task="text",
        max_new_tokens=options.new_tokens,
        stop=["\n"],
        temperature=0.8,
    )
    many = {"samples": options.dial_texts * 2, "judge": judge}
    calibrate(cp, request, attribute, label, seed=10_000, **many)
    points = [
        (one.strength, one.chance.mean, one.fluency)
        for one in responses(
            cp,
            request,
            attribute,
            label,
            strengths=(0.0, 0.25, 0.5, 0.75, 1.0),
            calibrated=True,
            seed=20_000,
            **many,
        )
    ]
    found["attention mass, calibrated"] = curve(points)
    return found


def mixed(
    one: Prefix,
    other: Prefix,
    keys: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    values: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> Prefix:
    """Layer by layer."""
    both = [
        (one.layer("decoder", i), other.layer("decoder", i))
        for i in range(len(one.geometry.decoder))
    ]
    return Prefix.from_layers(
        one.geometry, decoder=[(keys(a[0], b[0]), values(a[1], b[1])) for a, b in both]
    )


def curve(points: Sequence[tuple[float, float, float]]) -> dict[str, Any]:
    """How even the way from 0 to 1 is, whether it ever falls, and how far it goes."""
    at = {w: chance for w, chance, _ in points}
    span = at[1.0] - at[0.0]
    within = [(w, (c - at[0.0]) / span) for w, c, _ in points if 0 < w < 1] if span else []
    return {
        "points": [[w, round(c, 3), round(f, 3)] for w, c, f in points],
        "spearman": round(spearman([w for w, _, _ in points], [c for _, c, _ in points]), 3),
        "effect": round(span, 3),
        "uneven": round(max((abs(share - w) for w, share in within), default=math.nan), 3),
    }


def cross_talk(ours: Ours, options: argparse.Namespace) -> dict[str, Any]:
    """What a label alone adds to the chance of every other, against none; and in real texts."""
    judges = list(ours.study.meanings.values())
    found: dict[str, Any] = {}
    for mixing in ("attention", "logits"):
        rows = [
            Example(
                prompt="",
                raw=True,
                completion=row.completion,
                task="text",
                attributes=dict([str(row.label).split("=")]),
                mixing=mixing,
                stop=["\n"],
            )
            for row in ours.study.unseen[:: len(ours.study.unseen) // options.dial_texts]
        ]
        report = evaluate(
            ours.cp,
            rows,
            judges,
            strengths=(0.0, 1.0),
            curve_rows=options.dial_texts,
            max_new_tokens=options.new_tokens,
            progress=False,
        )
        found[mixing] = report.cross_talk
    texts = [row.completion for row in ours.study.unseen]
    chances = {
        f"{one.attribute}={label}": column
        for one in judges
        for label, column in zip(one.labels, one.chances(texts).T, strict=True)
    }
    found["real texts"] = {}
    for wanted in chances:
        own = torch.tensor([row.label == wanted for row in ours.study.unseen])
        others = torch.tensor(
            [
                str(row.label).partition("=")[0] == wanted.partition("=")[0]
                for row in ours.study.unseen
            ]
        )
        found["real texts"][wanted] = {
            label: float(column[own].mean() - column[others & ~own].mean())
            for label, column in chances.items()
        }
    return found


# --- conflicts and unseen labels ----------------------------------------------------------


def conflicts(ours: Ours, options: argparse.Namespace) -> dict[str, Any]:
    """A user who writes informally is asked to be formal: who wins, at which strengths."""
    rows = [row for row in ours.study.rows if row.label == "formality=informal"]
    examples = [
        Example(prompt="", raw=True, completion=row.completion, task="text", user="gruff")
        for row in rows
    ]
    ours.cp.train(
        examples, learn="user", num_slots=8, steps=40, batch_size=8, validation=0, progress=False
    )
    judge = ours.study.meanings["formality"]
    found = {}
    for user, formal in ((1, 0), (1, 1), (1, 2), (1, 4), (0.5, 1), (0.25, 1), (0.1, 1), (0, 1)):
        asked = {
            "task": "text",
            "user": "gruff",
            "attributes": {"formality": {"formal": float(formal)}},
            "strengths": {"user": float(user)},
        }
        texts = ours.asked([asked] * options.dial_texts, 3)
        chance = float(
            judge.chances([t or " " for t in texts])[:, judge.labels.index("formal")].mean()
        )
        found[f"user {user:g}, formal {formal:g}"] = round(chance, 3)
        print(user, formal, chance, flush=True)
    return found


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
            num_slots=options.slots,
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
            best = judge.chances([text or " " for text in texts]).argmax(dim=1).tolist()
            hits = statistics.fmean(judge.labels[i] == label for i in best)
            found.setdefault(name, {})[label] = round(hits, 3)
        print(label, {name: one[label] for name, one in found.items()}, flush=True)
    return found


def unseen_categories(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """WebNLG's categories that no training row has: nats a token of what is to be said."""
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
    cp.train(rows, num_slots=options.slots, steps=options.steps, validation=0, progress=False)
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


# --- the page -----------------------------------------------------------------------------

COLUMNS = (
    ("control, mean", "control", 3),
    ("other judge, mean", "other judge", 3),
    ("all right", "all right", 3),
    ("alone, mean", "alone", 3),
    ("fluency", "fluency", 2),
    ("distinct-2", "distinct-2", 2),
    ("coefficient", "coefficient", 2),
)


def page(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    about = results["options"]
    parts = [
        "# Several attributes at once, dials, unseen labels",
        f"SmolLM2-135M in bfloat16, {about['steps']} steps of 8 rows in all (labels of a way that "
        f"learns each alone share them), {about['slots']} slots a prefix, {about['texts']} texts a "
        f"combination, {about['new_tokens']} tokens at most. Seed 0. Mixing in logits rules out "
        "tokens a hundred times less likely than the likeliest: of that and a thousand, which were "
        "tried on `aspects`, the better one. Written by "
        f"`{results['command']}` with `control.json` beside it.",
    ]
    for name in SETS:
        found = results.get(name, {}).get("ways", {})
        if not found:
            continue
        attributes = ", ".join(SETS[name])
        accuracy = "; ".join(
            f"{attribute} {one:.2f}" for attribute, one in results[name]["judges"].items()
        )
        parts += [
            f"## {name}: {attributes}",
            "**control**: how often a judge (linear over words) finds the label that was asked "
            "for, in the mean over attributes; **all right**: all at once; **alone**: each label "
            "asked for without others. **other judge**: linear over sentence embeddings (right "
            f"on held-out rows: {accuracy}). **fluency**: nats a token under the plain model, "
            f"lower is plainer; real texts have {results[name]['fluency']:.2f}. **coefficient**: "
            "chosen by control on other draws, of those no less fluent than real texts.",
            table(found, [c for c in COLUMNS if any(c[0] in one for one in found.values())]),
        ]
        each = [(f"control, {attribute}", attribute, 2) for attribute in SETS[name]]
        parts.append(table(found, each))
    if "cross-talk" in results:
        parts += [
            "## Cross-talk",
            "What a label alone, at strength 1, adds to the judge's chance of that label (*own*), "
            "and at most to that of a label of another attribute (*other*), against the task "
            "alone (`controlprefix eval`); in real texts, against those with the other labels. "
            "Learned jointly on `styles`.",
            table(*cross_talk_rows(results["cross-talk"])),
        ]
    if "dials" in results:
        rows = {
            name: {
                **{f"{w:g}": chance for w, chance, _ in one["points"]},
                "spearman": one["spearman"],
                "uneven": one["uneven"],
                "fluency": {w: f for w, _, f in one["points"]}[1.0],
            }
            for name, one in results["dials"].items()
        }
        columns = [(f"{w:g}", f"{w:g}", 2) for w in STRENGTHS]
        columns += [("spearman", "Spearman", 2), ("uneven", "uneven", 2), ("fluency", "fluency", 2)]
        parts += [
            "## Dials",
            f"Formality learned alone, in {about['steps'] // 2} steps. Chance that the judge "
            "gives `formality=formal`, at positions of each kind of dial on one prefix. "
            "**uneven**: the farthest from a straight line between 0 and 1, as a share of the "
            "effect. **fluency** at 1.",
            table(rows, columns),
        ]
    if "conflicts" in results:
        lines = [f"| {name} | {chance:.2f} |" for name, chance in results["conflicts"].items()]
        parts += [
            "## A conflict",
            "A user learned from informal texts, asked for `formality=formal`: the chance that the "
            "judge gives it, at strengths of both.",
            "\n".join(["| strengths | formal |", "| --- | --- |", *lines]),
        ]
    if {"held back", "unseen categories"} & results.keys():
        parts.append("## Labels that nobody learned")
    if "held back" in results:
        labels = list(next(iter(results["held back"].values())))
        columns = [(label, label, 2) for label in labels]
        parts += [
            "A topic is left out of training and then asked for: how often the judge finds it.",
            table(results["held back"], [*columns, ("mean", "mean", 2)]),
        ]
    if "unseen categories" in results:
        lines = [f"| {name} | {nats:.3f} |" for name, nats in results["unseen categories"].items()]
        parts += [
            "WebNLG's unseen categories: nats a token of the reference.",
            "\n".join(["| in their place | nats |", "| --- | --- |", *lines]),
        ]
    return "\n\n".join(parts) + "\n"


def cross_talk_rows(
    found: Mapping[str, Mapping[str, Mapping[str, float]]],
) -> tuple[dict[str, dict[str, float]], list[tuple[str, str, int]]]:
    rows: dict[str, dict[str, float]] = {}
    for source, matrix in found.items():
        for wanted, added in matrix.items():
            attribute = wanted.partition("=")[0]
            others = [abs(x) for label, x in added.items() if label.partition("=")[0] != attribute]
            rows.setdefault(wanted, {})[f"own, {source}"] = added[wanted]
            rows[wanted][f"other, {source}"] = max(others)
    names = {"attention": "side by side", "logits": "in logits", "real texts": "real texts"}
    columns = [
        (f"{what}, {source}", f"{what}, {names[source]}", 2)
        for source in found
        for what in ("own", "other")
    ]
    rows["mean"] = {
        key: statistics.fmean(row[key] for row in rows.values()) for key, _, _ in columns
    }
    return rows, columns


def table(rows: Mapping[str, Mapping[str, float]], columns: Sequence[tuple[str, str, int]]) -> str:
    lines = [
        f"| way | {' | '.join(title for _, title, _ in columns)} |",
        "| --- |" + " --- |" * len(columns),
    ]
    for name, one in rows.items():
        shown = {**one}
        if "mean" in {key for key, _, _ in columns} and "mean" not in shown:
            shown["mean"] = statistics.fmean(one.values())
        cells = [f"{shown[key]:.{digits}f}" if key in shown else "" for key, _, digits in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


# --- all of it ----------------------------------------------------------------------------


def learned(name: str, study: Study, options: argparse.Namespace, known: dict[str, Way]) -> Way:
    """The way, ready; those that differ in asking alone learn once."""
    way = WAYS[name](study, options)
    twin = known.get(SAME_LEARNING.get(name, name))
    if twin is not None:
        way.cp = twin.cp
    else:
        way.learn()
    known.setdefault(SAME_LEARNING.get(name, name), way)
    return way


PARTS = (
    "aspects",
    "styles",
    "cross-talk",
    "dials",
    "conflicts",
    "held back",
    "unseen categories",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of the data sets")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--texts", type=int, default=16, help="a combination")
    parser.add_argument("--dial-texts", type=int, default=48, help="a position of a dial")
    parser.add_argument("--topics", type=int, default=2, help="held back, each in its turn")
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--fresh", action="store_true", help="measure all again")
    options = parser.parse_args()
    kept = ("steps", "slots", "texts", "dial_texts", "new_tokens")
    about: dict[str, Any] = {name: getattr(options, name) for name in kept}
    about["coefficients"] = "by control, of the fluent"  # a file of another rule is not mixed in
    if FILE.exists() and not options.fresh:
        before = json.loads(FILE.read_text())
        if before["options"] != about:
            raise SystemExit(f"{FILE} was measured with {before['options']}; give --fresh")
    elif options.fresh:
        FILE.unlink(missing_ok=True)

    def saved(change: Callable[[dict[str, Any]], object]) -> None:
        results = json.loads(FILE.read_text()) if FILE.exists() else {"options": about}
        change(results)
        path = record(
            "control", {k: v for k, v in results.items() if k not in {"machine", "command"}}
        )
        path.with_suffix(".md").write_text(page(json.loads(path.read_text())))

    def is_done(*names: str) -> bool:
        found = json.loads(FILE.read_text()) if FILE.exists() else {}
        for name in names:
            found = found.get(name, {})
        return bool(found)

    loaded()
    for name in [part for part in options.part if part in SETS]:
        one = study(options.folder, name, options.steps * 8)
        accuracy = {attribute: judge.accuracy for attribute, judge in one.meanings.items()}
        of_set = {"judges": accuracy, "fluency": round(one.fluency, 3)}
        saved(lambda r, n=name, a=of_set: r.setdefault(n, {"ways": {}}).update(a))
        known: dict[str, Way] = {}
        for label in WAYS:
            if is_done(name, "ways", label) or (label == "repeng" and not find_spec("repeng")):
                continue
            figures = measure(learned(label, one, options, known), one, options)
            print(name, label, {k: round(v, 3) for k, v in figures.items()}, flush=True)
            saved(lambda r, n=name, w=label, f=figures: r[n]["ways"].update({w: f}))
    if "cross-talk" in options.part and not is_done("cross-talk"):
        ours = Ours(study(options.folder, "styles", options.steps * 8), options)
        ours.learn()
        result = cross_talk(ours, options)
        saved(lambda r, f=result: r.update({"cross-talk": f}))
    on_styles: dict[str, Callable[[Ours, argparse.Namespace], dict[str, Any]]] = {
        "dials": dials,
        "conflicts": conflicts,
    }
    wanted = [part for part in on_styles if part in options.part and not is_done(part)]
    if wanted:
        whole = study(options.folder, "styles", options.steps * 8)
        rows = [row for row in whole.rows if str(row.label).startswith("formality=")]
        alone = replace(whole, labels={"formality": whole.labels["formality"]}, rows=rows)
        ours = Ours(alone, argparse.Namespace(**{**vars(options), "steps": options.steps // 2}))
        ours.learn()
        for part in wanted:
            result = on_styles[part](ours, options)
            saved(lambda r, p=part, f=result: r.update({p: f}))
    of_data: dict[str, Callable[[Path, argparse.Namespace], dict[str, Any]]] = {
        "held back": held_back,
        "unseen categories": unseen_categories,
    }
    for part in [part for part in of_data if part in options.part and not is_done(part)]:
        result = of_data[part](options.folder, options)
        print(part, result, flush=True)
        saved(lambda r, p=part, f=result: r.update({p: f}))


if __name__ == "__main__":
    main()
