"""Calibration: dials on which the measured attribute moves evenly with the position."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from controlprefix._io import progress_bar, requires_extra
from controlprefix.engine import ControlPrefix
from controlprefix.engine.arguments import checks_arguments
from controlprefix.errors import RequestError, TrainingDataError
from controlprefix.evaluation.classifier import AttributeClassifier
from controlprefix.evaluation.harness import base_model_nll
from controlprefix.evaluation.metrics import bootstrap_mean
from controlprefix.evaluation.report import CurvePoint
from controlprefix.prefixes import PrefixKey
from controlprefix.prefixes.dial import Dial, strength_at
from controlprefix.prefixes.key import composed
from controlprefix.request import Request
from controlprefix.store import NewVersion, VersionRef

CALIBRATION_STRENGTHS = (0.0, 0.03, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
_NUM_DIAL_POINTS = 10  # from 0 to 1
_MAX_FIRST_STEP = 0.15  # share of the effect; if the smallest strength has more, try smaller ones
_MIN_STRENGTH = 1e-5
_MIN_EFFECT = 0.05  # probability that a label must add to get a dial
_DEFAULT_TEMPERATURE = 0.8
_CHECKED = (0.25, 0.5, 0.75)  # positions at which a dial is measured before it is stored
_GOOD_DEVIATION = 0.15  # of the effect
_BATCH_SIZE = 32


@dataclass(frozen=True, slots=True)
class Calibration:
    """The result of a calibration.

    Attributes:
        curve: What was measured, in the order of strengths.
        dial: `(position, strength)` points, from (0, 0).
        version: The version of the prefix that has the dial.
        deviation: The largest distance of the measured probability from an even one at the
            positions 0.25, 0.5 and 0.75, as a share of the label's effect; measured with the
            dial and other seeds.
        plain_deviation: The same of strengths without a dial.
    """

    curve: tuple[CurvePoint, ...]
    dial: Dial
    version: int
    deviation: float
    plain_deviation: float


@checks_arguments
def strength_curve(
    cp: ControlPrefix,
    request: Request,
    attribute: str,
    label: str,
    classifier: AttributeClassifier,
    *,
    prompts: Sequence[str] = (),
    strengths: Sequence[float] = CALIBRATION_STRENGTHS,
    num_samples: int = 64,
    calibrated: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> tuple[CurvePoint, ...]:
    """Measure what strengths of a label do.

    Args:
        cp: With the label's prefix.
        request: Everything else: a task, a user, sampling settings, and a prompt, unless
            `prompts` are given.
        attribute, label: The label.
        classifier: The classifier of that attribute.
        prompts: Prompts to use in turn instead of the request's.
        strengths: At least one.
        num_samples: Texts per strength.
        calibrated: `strengths` are positions of the label's dial.
        seed: Seed of the sampling; the same draws at each strength.
        progress: Show progress on standard error.

    Raises:
        TrainingDataError: If `num_samples` is below 1, or the classifier does not know the label.
        RequestError: If the request has a strength or schedule of the attribute.
    """
    attribute, label = composed(attribute), composed(label)
    if num_samples < 1:
        raise TrainingDataError(f"num_samples is {num_samples}; it must be 1 or more")
    if classifier.attribute != attribute:
        raise TrainingDataError(
            f"the classifier is for {classifier.attribute!r}, not {attribute!r}; give another one"
        )
    if label not in classifier.labels:
        raise TrainingDataError(
            f"the classifier knows {', '.join(classifier.labels)}, not {label!r}; give another one"
        )
    request.require_sampling(1)
    for field in ("strengths", "schedules"):
        if attribute in getattr(request, field):
            raise RequestError(
                f"the request's {field} name {attribute!r}, whose strength is measured; leave it "
                "out"
            )
    if prompts and (request.messages is not None or request.prompt_ids is not None):
        raise RequestError(
            "prompts are texts in place of the request's, which has messages or token ids; give a "
            "request with a prompt, or leave prompts out"
        )
    sample_prompts = [
        prompts[i % len(prompts)] if prompts else request.prompt for i in range(num_samples)
    ]
    points = []
    texts_of: dict[float, list[str]] = {}
    levels = sorted(set(strengths))
    total = len(levels) * num_samples
    with progress_bar(f"texts of {attribute}={label}", total, visible=progress) as update:
        for strength in levels:
            requests = [
                request.model_copy(
                    update={
                        "prompt": prompt,
                        "attributes": {**request.attributes, attribute: {label: float(strength)}},
                        "calibrated": calibrated,
                        "seed": seed + i,
                        "temperature": request.temperature or _DEFAULT_TEMPERATURE,
                    }
                )
                for i, prompt in enumerate(sample_prompts)
            ]
            texts = texts_of[strength] = []
            for first in range(0, num_samples, _BATCH_SIZE):
                batch = requests[first : first + _BATCH_SIZE]
                texts += [c.text for c in cp.generate(batch, batch_size=_BATCH_SIZE)]
                update(sum(map(len, texts_of.values())), f"strength {strength:g}")
    for strength, texts in texts_of.items():
        column = classifier.labels.index(label)
        probabilities = classifier.probabilities(texts)[:, column].tolist()
        estimate = bootstrap_mean(probabilities, sample_prompts if prompts else None)
        points.append(CurvePoint(strength, estimate, base_model_nll(cp, texts)))
    return tuple(points)


@checks_arguments
def calibrate(
    cp: ControlPrefix,
    request: Request,
    attribute: str,
    label: str,
    classifier: AttributeClassifier,
    *,
    prompts: Sequence[str] = (),
    strengths: Sequence[float] = CALIBRATION_STRENGTHS,
    num_samples: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> Calibration:
    """Measure a label's strength curve, and store its prefix with a dial that makes it even.

    At position d of the dial, the label's probability has moved the share d of the way from
    where it is without the label to where it is at strength 1; positions 0 and 1 and those beyond
    1 are strengths. Requests with `calibrated=True` then give positions.

    Args:
        cp, request, attribute, label, classifier, prompts, num_samples, seed, progress: As in
            `strength_curve`.
        strengths: None below 0; 0 and 1 must be among them. Smaller ones are added while the
            smallest has much of the effect of 1.

    Raises:
        TrainingDataError: If strengths are missing, or the label has no significant effect.
        VersionConflictError: If another version was published meanwhile.
    """
    if not {0.0, 1.0} <= set(strengths) or min(strengths) < 0:
        raise TrainingDataError(
            "strengths must contain 0 and 1, between which a dial is even, and none below 0"
        )
    if request.mixing != "attention":
        raise TrainingDataError(
            "a dial is calibrated for mixing='attention'; leave mixing out of the request"
        )
    name = PrefixKey.for_label(attribute, label).name
    current = cp.version_info("attribute", name)
    prefix = cp.get("attribute", name, version=current.version)

    def measure(values: Sequence[float], own_seed: int = seed) -> tuple[CurvePoint, ...]:
        return strength_curve(
            cp,
            request,
            attribute,
            label,
            classifier,
            prompts=prompts,
            strengths=values,
            num_samples=num_samples,
            seed=own_seed,
            progress=progress,
        )

    curve = measure(strengths)
    # Slots that attract much attention have most of their effect at strengths near 0.
    while _first_step(curve) > _MAX_FIRST_STEP and curve[1].strength > _MIN_STRENGTH:
        curve = (curve[0], *measure([curve[1].strength / 4]), *curve[1:])
    at = {point.strength: point.probability for point in curve}
    uncertainty = math.hypot(at[0.0].high - at[0.0].low, at[1.0].high - at[1.0].low) / 2
    up_to_one = [point for point in curve if point.strength <= 1]  # what a dial makes even
    dial = even_dial(
        [point.strength for point in up_to_one], [point.probability.mean for point in up_to_one]
    )
    if math.isinf(uncertainty):
        raise TrainingDataError(
            "one sample or prompt says nothing of what is chance; give more prompts or samples"
        )
    if not dial or at[1.0].mean - at[0.0].mean <= uncertainty:
        raise TrainingDataError(
            f"{name} moves the classifier's probability from {at[0.0].mean:.2f} to "
            f"{at[1.0].mean:.2f}, where {uncertainty:.2f} may be chance, so there is no effect to "
            "make even; train it longer, with contrast, or give more samples"
        )
    strengths_of = {strength_at(dial, position): position for position in _CHECKED}
    checked = {
        strengths_of[point.strength]: point.probability.mean
        for point in measure([*strengths_of], seed + num_samples)
    }
    means = {point.strength: point.probability.mean for point in curve}
    plain = {position: _between(means, position) for position in _CHECKED}
    deviation, plain_deviation = (
        max(
            abs((value - at[0.0].mean) / (at[1.0].mean - at[0.0].mean) - position)
            for position, value in measured.items()
        )
        for measured in (checked, plain)
    )
    if deviation > max(plain_deviation, _GOOD_DEVIATION):
        raise TrainingDataError(
            f"a dial of {name} would not be more even than its strengths: at 0.25, 0.5 and 0.75 "
            f"it is off by up to {deviation:.0%} of the effect, strengths by "
            f"{plain_deviation:.0%}; give more samples, or train the label longer"
        )
    details = {
        **current.details,
        "calibrated": {
            "classifier": {"accuracy": classifier.accuracy},
            "deviation": round(deviation, 4),
            "plain_deviation": round(plain_deviation, 4),
            "curve": [(point.strength, round(point.probability.mean, 4)) for point in curve],
            "num_samples": num_samples,
            "seed": seed,
        },
    }
    new = NewVersion(
        PrefixKey.for_label(attribute, label),
        replace(prefix, dial=dial),
        details,
        current.version,
        current.storage_dtype,
        derived_from=VersionRef(cp.geometry.fingerprint, current.version),
    )
    (version,) = cp.store.put([new])
    return Calibration(curve, dial, version, deviation, plain_deviation)


def _between(means: Mapping[float, float], strength: float) -> float:
    """What was measured at a strength, or on the line between those beside it."""
    below = max(s for s in means if s <= strength)
    above = min(s for s in means if s >= strength)
    if below == above:
        return means[below]
    share = (strength - below) / (above - below)
    return means[below] + share * (means[above] - means[below])


def _first_step(curve: Sequence[CurvePoint]) -> float:
    """The share of the effect of strength 1 that the smallest strength above 0 has."""
    at_one = next(point.probability.mean for point in curve if point.strength == 1.0)
    at_zero, at_first = (point.probability.mean for point in curve[:2])
    return (at_first - at_zero) / (at_one - at_zero) if at_one - at_zero >= _MIN_EFFECT else 0.0


def even_dial(strengths: Sequence[float], effects: Sequence[float]) -> Dial:
    """Points of a dial on which the effect is even in the position.

    Slots that attract `m` times as much attention as everything else have the share
    `w m / (1 + w m)` of it at strength `w`; heads differ in `m`, which stretches the curve. So
    the effect is fitted by a Hill curve `(1 + m) w^n / (1 + m w^n)`, normalized to 1 at
    strength 1: noise in single measurements moves it little, and it is monotonic.

    Args:
        strengths: In order, none below 0, and 1 or more among them.
        effects: Measured at each.

    Returns:
        `(position, strength)` points from (0, 0) up; none if strength 1 has no effect.

    Raises:
        MissingDependencyError: If scipy is not installed.
    """
    m, n, effect = _fit_hill_curve(strengths, effects)
    if effect < _MIN_EFFECT:
        return ()
    max_strength = max(strengths)
    last = _hill(max_strength, m, n)
    num_points = math.floor(last * _NUM_DIAL_POINTS + 1e-9)
    positions = [i / _NUM_DIAL_POINTS for i in range(1, num_points + 1)]
    points = {
        position: min(max_strength, (position / (1 + m - m * position)) ** (1 / n))
        for position in positions
    }
    return ((0.0, 0.0), *{**points, 1.0: 1.0}.items())


def _hill(strength: float, m: float, n: float) -> float:
    power = strength**n
    return (1 + m) * power / (1 + m * power)


def _fit_hill_curve(
    strengths: Sequence[float], effects: Sequence[float]
) -> tuple[float, float, float]:
    """Least-squares `m`, `n`, and the effect of strength 1; a straight line if it fits as well."""
    with requires_extra("eval", "a calibration"):
        import numpy
        from scipy.optimize import least_squares

    x, y = numpy.array(strengths, dtype=float), numpy.array(effects, dtype=float)

    def curve(x: Any, /, log_m: float, n: float, effect: float, base: float) -> Any:
        m, power = numpy.exp(log_m), x**n
        return base + effect * (1 + m) * power / (1 + m * power)

    def residuals(parameters: Any) -> Any:
        return curve(x, *parameters) - y

    slope, intercept = numpy.polyfit(x, y, 1)
    best = (0.0, 1.0, float(slope))
    best_error = float(((intercept + slope * x - y) ** 2).sum())
    bounds = ([math.log(1e-2), 0.3, -1.0, -1.0], [math.log(1e4), 4.0, 1.0, 1.0])
    for start_m in (0.1, 1.0, 10.0, 100.0, 1000.0):
        start = (math.log(start_m), 1.0, min(1.0, max(-1.0, y[-1] - y[0])), y[0])
        fit = least_squares(residuals, start, bounds=bounds)
        log_m, n, effect, _ = fit.x
        error = 2 * float(fit.cost)
        if fit.success and error < best_error - 1e-9:
            best, best_error = (float(numpy.exp(log_m)), float(n), float(effect)), error
    return best
