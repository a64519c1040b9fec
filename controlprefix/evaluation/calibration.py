"""Dials: strengths as positions at which the measured attribute moves evenly."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from controlprefix.attributes import attribute_name
from controlprefix.engine import ControlPrefix
from controlprefix.errors import RequestError, TrainingDataError
from controlprefix.evaluation.classifier import Judge
from controlprefix.evaluation.harness import CurvePoint, fluencies
from controlprefix.evaluation.metrics import estimate
from controlprefix.prefixes.container import PayloadDtype
from controlprefix.request import Request

GRID = (0.0, 0.03, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
_STEPS = 10  # points of a dial from 0 to 1
_COARSE, _FAINT = 0.15, 1e-5  # share of the effect, and strength, below which none is tried
_LEAST = 0.05  # of chance, that a label must move to be worth a dial


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was measured and what came of it.

    Attributes:
        responses: In the order of strengths.
        dial: `(position, strength)`, from (0, 0).
        version: Of the prefix that carries the dial.
    """

    responses: tuple[CurvePoint, ...]
    dial: tuple[tuple[float, float], ...]
    version: int


def responses(
    cp: ControlPrefix,
    request: Request,
    attribute: str,
    label: str,
    judge: Judge,
    *,
    prompts: Sequence[str] = (),
    strengths: Sequence[float] = GRID,
    samples: int = 64,
    calibrated: bool = False,
    seed: int = 0,
) -> tuple[CurvePoint, ...]:
    """Measure what strengths of a label do.

    Args:
        cp: With the label's prefix.
        request: All else that is asked: a task, a user, settings of the sampling, and a
            prompt, in place of which `prompts` are asked in turn, where there are some.
        attribute, label: Whose strength.
        judge: Of that attribute.
        prompts: See `request`.
        strengths: To try; at least two.
        samples: Texts at each.
        calibrated: They are positions of the label's dial.
        seed: Of the sampling; the same draws at each strength.
    """
    if samples < 1:
        raise TrainingDataError(f"samples is {samples}; it must be 1 or more")
    if label not in judge.labels:
        raise TrainingDataError(
            f"the judge tells {', '.join(judge.labels)}, not {label!r}; give another judge"
        )
    for field in ("strengths", "schedules"):
        if attribute in getattr(request, field):
            raise RequestError(
                f"the request's {field} name {attribute!r}, which is what is measured; leave it out"
            )
    asks = [prompts[i % len(prompts)] if prompts else request.prompt for i in range(samples)]
    groups = asks if prompts else None
    found = []
    for strength in sorted(strengths):
        asked = [
            request.model_copy(
                update={
                    "prompt": asks[i],
                    "attributes": {**request.attributes, attribute: {label: float(strength)}},
                    "calibrated": calibrated,
                    "seed": seed + i,
                    "temperature": request.temperature or 0.8,
                }
            )
            for i in range(samples)
        ]
        texts = [one.text for one in cp.generate(asked, batch_size=32)]
        chances = judge.chances(texts)[:, judge.labels.index(label)].tolist()
        fluency = statistics.fmean(fluencies(cp, texts))
        found.append(CurvePoint(strength, estimate(chances, groups), fluency))
    return tuple(found)


def calibrate(
    cp: ControlPrefix,
    request: Request,
    attribute: str,
    label: str,
    judge: Judge,
    *,
    prompts: Sequence[str] = (),
    strengths: Sequence[float] = GRID,
    samples: int = 64,
    seed: int = 0,
) -> Calibration:
    """Measure a label's response, and store its prefix with a dial that makes it even.

    At position d of the dial the chance of the label, as the judge has it, has gone d of the
    way from where it is without the label to where it is at strength 1; positions beyond 1 go
    as far as was measured. Requests with `calibrated=True` then mean positions.

    Args:
        cp, request, attribute, label, judge, prompts, samples, seed: As in `responses`.
        strengths: To try, none below 0; 0 and 1 must be among them. Smaller ones are tried
            too while the smallest does much of what 1 does.

    Raises:
        TrainingDataError: If the label does nothing that the judge could see for sure.
        VersionConflictError: If another version was published meanwhile.
    """
    if not {0.0, 1.0} <= set(strengths) or min(strengths) < 0:
        raise TrainingDataError(
            "strengths must hold 0 and 1, between which a dial is even, and none below 0"
        )
    if request.mixing != "attention":
        raise TrainingDataError("a dial is one of attention; leave mixing out of the request")
    name = attribute_name(attribute, label)
    prefix = cp.get("attribute", name)
    (current,) = (one for one in cp.versions("attribute", name) if one.current)

    def measure(some: Sequence[float]) -> tuple[CurvePoint, ...]:
        how: dict[str, Any] = {"prompts": prompts, "samples": samples, "seed": seed}
        return responses(cp, request, attribute, label, judge, strengths=some, **how)

    measured = measure(strengths)
    # Slots that attract much attention do most of their work at strengths near 0.
    while _first_step(measured) > _COARSE and measured[1].strength > _FAINT:
        measured = (measured[0], *measure([measured[1].strength / 4]), *measured[1:])
    at = {one.strength: one.chance for one in measured}
    unsure = math.hypot(at[0.0].high - at[0.0].low, at[1.0].high - at[1.0].low) / 2
    dial = even_dial([one.strength for one in measured], [one.chance.mean for one in measured])
    if not dial or at[1.0].mean - at[0.0].mean <= unsure:
        raise TrainingDataError(
            f"{name} moves the judge's chance from {at[0.0].mean:.2f} to {at[1.0].mean:.2f}, where "
            f"{unsure:.2f} may be chance, so there is nothing to make even; train it longer, with "
            "contrast, or give more samples"
        )
    details = {
        "calibrated": {
            "judge": {"accuracy": judge.accuracy},
            "responses": [(one.strength, round(one.chance.mean, 4)) for one in measured],
            "samples": samples,
            "seed": seed,
        }
    }
    version = cp.put(
        "attribute",
        name,
        replace(prefix, dial=dial),
        details=details,
        dtype=cast(PayloadDtype, current.dtype),
        replaces=current.version,
    )
    return Calibration(measured, dial, version)


def _first_step(measured: Sequence[CurvePoint]) -> float:
    """How much of what strength 1 does the smallest above 0 does."""
    full = next(one.chance.mean for one in measured if one.strength == 1.0)
    start, first = (one.chance.mean for one in measured[:2])
    return (first - start) / (full - start) if full - start >= _LEAST else 0.0


def even_dial(
    strengths: Sequence[float], effects: Sequence[float]
) -> tuple[tuple[float, float], ...]:
    """Positions and strengths such that the effect is even in the position.

    Slots that attract `m` times as much attention as all else have the share `w m / (1 + w m)` of
    it at strength `w`; heads differ in `m`, which stretches that. So the effect is taken to go as
    `(1 + m) w^a / (1 + m w^a)` with the `m` and `a` that fit best: noise in single measurements
    moves them little, and the dial cannot turn around.

    Args:
        strengths: In order, none below 0, 1 or more among them.
        effects: Measured at each.

    Returns:
        `(position, strength)` from (0, 0) up; nothing where strength 1 has no effect.
    """
    pull, bend, effect = _fitted(strengths, effects)
    if effect < _LEAST:
        return ()
    most = max(strengths)
    last = (1 + pull) * most**bend / (1 + pull * most**bend)
    positions = [i / _STEPS for i in range(1, math.floor(last * _STEPS + 1e-9) + 1)]
    strength = {at: min(most, (at / (1 + pull - pull * at)) ** (1 / bend)) for at in positions}
    return ((0.0, 0.0), *{**strength, 1.0: 1.0}.items())


def _fitted(strengths: Sequence[float], effects: Sequence[float]) -> tuple[float, float, float]:
    """`m`, `a`, and what strength 1 adds: least squares over a grid, the straight line first."""
    w, found = (torch.tensor(one, dtype=torch.float64) for one in (strengths, effects))
    pulls = torch.cat([torch.zeros(1), torch.logspace(-2, 4, 121)]).double()
    bends = torch.tensor([1.0, *(i / 10 for i in range(3, 21) if i != 10)], dtype=torch.float64)
    powers = w ** bends[:, None, None]
    shares = (1 + pulls[:, None]) * powers / (1 + pulls[:, None] * powers)  # (bends, pulls, w)
    apart, wanted = shares - shares.mean(dim=-1, keepdim=True), found - found.mean()
    added = (apart * wanted).sum(dim=-1) / apart.square().sum(dim=-1)
    errors = (added[..., None] * apart - wanted).square().sum(dim=-1)
    best = int((errors <= errors.min() + 1e-12).flatten().nonzero()[0])
    bend, pull = divmod(best, len(pulls))
    return float(pulls[pull]), float(bends[bend]), float(added[bend, pull])
