"""What strengths do: kinds of dials, cross-talk between attributes, a conflict with a user."""

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from quality import tokenizer
from ways import SAMPLING, Ours

from controlprefix import Example, Part, Prefix, Request
from controlprefix.evaluation import calibrate, evaluate
from controlprefix.evaluation.calibration import strength_curve
from controlprefix.evaluation.harness import base_model_nlls
from controlprefix.evaluation.metrics import spearman
from controlprefix.inference.resolved_request import ResolvedPart, ResolvedRequest
from controlprefix.request import PartUsed

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 2.0, 4.0)
ADVERBS = {0.0: "", 0.25: "a little ", 0.5: "somewhat ", 0.75: "rather ", 1.0: "", 2.0: "very "}
ADVERBS[4.0] = "extremely "


def dials(ours: Ours, options: argparse.Namespace) -> dict[str, Any]:
    """Of each label, kinds of dials: what each position does to the judged attribute."""
    (labels,) = ours.study.labels.values()
    return {
        label: dials_of(ours, label, other, options)
        for label, other in zip(labels, reversed(labels), strict=True)
    }


def dials_of(ours: Ours, label: str, other: str, options: argparse.Namespace) -> dict[str, Any]:
    """On the same prefix."""
    (attribute,) = ours.study.labels
    judge, cp = ours.study.meanings[attribute], ours.cp
    task = cp.get("task", "text")
    one, opposite = (cp.get("attribute", f"{attribute}={name}") for name in (label, other))

    def mass(w: float) -> list[Part]:
        return [Part(task), Part(one, w)]

    def weighed(w: float) -> list[Part]:
        """Attention mass of both, as `{"formal": w, "informal": 1 - w}` asks for."""
        return [Part(task), Part(one, w), Part(opposite, max(0.0, 1 - w))]

    def share(w: float) -> list[Part]:
        """The part's share of what attention gives: its values, times w."""
        return [Part(task), Part(mixed(one, one, lambda x, _: x, lambda x, _: w * x))]

    def between(w: float) -> list[Part]:
        """Keys and values between those of the opposite label and its own."""

        def mean(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return w * x + (1 - w) * y

        return [Part(task), Part(mixed(one, opposite, mean, mean))]

    def guided(w: float) -> list[ResolvedPart]:
        used = PartUsed(kind="attribute", name=f"{attribute}={label}", version=0, strength=w)
        return [*in_attention([Part(task)]), ResolvedPart(used, Part(one), in_logit_space=True)]

    plain: dict[str, Callable[[float], list[Part]]] = {
        "attention mass": mass,
        "weights of opposites": weighed,
        "share of the output": share,
        "between opposite keys and values": between,
    }
    batcher = cp.batcher(max_sequences=64)

    def steered(parts: Sequence[ResolvedPart]) -> list[str]:
        requests = [
            Request(
                prompt=tokenizer().bos_token,
                raw=True,
                max_new_tokens=options.new_tokens,
                stop=["\n"],
                seed=i,
                **SAMPLING,
            )
            for i in range(options.curve_texts)
        ]
        tickets = [batcher.submit(ResolvedRequest(one, tuple(parts))) for one in requests]
        return [ticket.result().text.strip() for ticket in tickets]

    def adverb(w: float) -> list[str]:
        told = f"{ADVERBS[w]}{label}" if w else ""
        prompt = f"Write one {told} sentence. Write nothing else.".replace("  ", " ")
        asked = [{"prompt": prompt, "raw": False}] * options.curve_texts
        return ours.asked(asked, 0)

    def attended(make: Callable[[float], list[Part]]) -> Callable[[float], list[str]]:
        return lambda w: steered(in_attention(make(w)))

    kinds: dict[str, Callable[[float], list[str]]] = {
        **{name: attended(make) for name, make in plain.items()},
        "logit guidance": lambda w: steered(guided(w)),
        "adverbs in an instruction": adverb,
    }
    found: dict[str, Any] = {}
    for name, texts_at in kinds.items():
        points = []
        for w in STRENGTHS:
            texts = [text or " " for text in texts_at(w)]
            chance = judge.probabilities(texts)[:, judge.labels.index(label)].mean()
            points.append((w, float(chance), statistics.fmean(base_model_nlls(cp, texts))))
        found[name] = curve(points)
        print(label, name, found[name], flush=True)
    batcher.close()
    request = Request(
        prompt=tokenizer().bos_token,
        raw=True,
        task="text",
        max_new_tokens=options.new_tokens,
        stop=["\n"],
        temperature=0.8,
    )
    many: dict[str, Any] = {"num_samples": options.curve_texts, "classifier": judge}
    calibrate(cp, request, attribute, label, seed=10_000, **many)
    points = [
        (one.strength, one.probability.mean, one.base_model_nll)
        for one in strength_curve(
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


def in_attention(parts: Sequence[Part]) -> list[ResolvedPart]:
    """Parts as a request has them, under names that do not matter here."""
    return [
        ResolvedPart(
            PartUsed(kind="task", name=f"part{i}", version=0, strength=part.strength), part
        )
        for i, part in enumerate(parts)
    ]


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
        found[mixing] = {
            turned: {judged: one.mean for judged, one in row.items()}
            for turned, row in report.cross_talk.items()
        }
    texts = [row.completion for row in ours.study.unseen]
    chances = {
        f"{one.attribute}={label}": column
        for one in judges
        for label, column in zip(one.labels, one.probabilities(texts).T, strict=True)
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
            judge.probabilities([t or " " for t in texts])[:, judge.labels.index("formal")].mean()
        )
        found[f"user {user:g}, formal {formal:g}"] = round(chance, 3)
        print(user, formal, chance, flush=True)
    return found
