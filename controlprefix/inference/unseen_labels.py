"""Labels that have no prefix: the nearest trained labels, or a prefix made from a text.

Reference:
    Clive et al., "Control Prefixes", 2021, https://arxiv.org/abs/2110.08329, on WebNLG's
    unseen categories: the prefix of the known category with the nearest word vector.
"""

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from controlprefix.attributes import AttributeSpace
from controlprefix.attributes.ordinal import as_number, between, is_inside, is_ordinal
from controlprefix.completion import StandIn
from controlprefix.embeddings import embed
from controlprefix.errors import RequestError
from controlprefix.inference.polarity import are_opposed
from controlprefix.labels import RESERVED_PARTS, WeightedLabel, weighted_labels
from controlprefix.prefixes import PrefixKey
from controlprefix.request import AnyRequest, Request

MIN_SIMILARITY = 0.3  # cosine of sentence embeddings, below which no label counts as near
_MAX_TEXT_CHARACTERS = 2000
_DISTILLED = " (distilled "  # in the name of a label that was distilled on demand
_MAX_LABELS = 3  # labels in a mixture
_MAX_POLES = 2  # labels of an attribute that may be opposites, where no space says so
_SOFTMAX_SCALE = 10.0  # shares grow by e for each 0.1 of cosine

Embed = Callable[[Sequence[str]], Tensor]
MakePrefix = Callable[[PrefixKey, str], None]


class NearestLabels(NamedTuple):
    """Trained labels and their shares, which add up to 1; empty if none is near."""

    shares: Mapping[str, float]
    similarity: float


def nearest_labels(
    label: WeightedLabel,
    trained: Collection[PrefixKey],
    space: AttributeSpace | None = None,
    *,
    embed: Embed = embed,
) -> NearestLabels:
    """The trained labels of the same attribute with the most similar descriptions.

    Embeddings know topics, not polarity: opposites are as near to each other as synonyms. So a
    label that words say is the opposite is left out, and so is one that has an opposite (or is
    one of two labels at most), unless words say that it has the same polarity, and its opposite
    the other one. A single label counts only if the space describes both.

    Args:
        label: A label without a prefix.
        trained: Keys of the labels with one.
        space: For descriptions, which say more than a name, and exclusive attributes.
        embed: Texts -> embeddings of length 1.
    """
    opposites = _opposites(label.attribute, space)
    own = {key.label for key in trained if key.attribute == label.attribute}
    existing = {name for name in own if _DISTILLED not in name}
    paired = set().union(*opposites)
    if len(existing) <= _MAX_POLES:  # most likely the poles of a dial
        paired |= existing
    entry = space.attributes.get(label.attribute) if space else None
    described = {name for name, own in entry.labels.items() if own.description} if entry else set()
    opposed = partial(_are_opposed, label.attribute, label.label, space=space)
    candidates = []
    for name in sorted(existing):
        is_opposite = opposed(name)
        if {name, label.label} in opposites or is_opposite:
            continue
        partners = set().union(*(pair for pair in opposites if name in pair)) - {name}
        if len(existing) == _MAX_POLES:
            partners |= existing - {name}
        # Words alone do not say that there is no opposite: "active" and "passive" sound good.
        is_certain = all(map(opposed, partners)) if partners else {name, label.label} <= described
        on_its_side = is_opposite is False and is_certain
        if name in paired and not on_its_side:  # it may be the opposite
            continue
        candidates.append(name)
    if not candidates:
        return NearestLabels({}, 0.0)
    texts = [describe(label.attribute, name, space) for name in (label.label, *candidates)]
    embeddings = embed(texts)
    cosines = embeddings[1:] @ embeddings[0]
    max_labels = 1 if entry is not None and entry.exclusive else _MAX_LABELS
    best = cosines.argsort(descending=True)[:max_labels]
    near = [int(i) for i in best if cosines[i] >= MIN_SIMILARITY]
    if not near:
        return NearestLabels({}, float(cosines.max()))
    shares = torch.softmax(_SOFTMAX_SCALE * cosines[near], dim=0).tolist()
    by_label = {candidates[i]: share for i, share in zip(near, shares, strict=True)}
    return NearestLabels(by_label, float(cosines.max()))


def _are_opposed(
    attribute: str, first: str, second: str, space: AttributeSpace | None
) -> bool | None:
    """Whether labels are opposites, by their names, or else by their descriptions."""
    by_name = are_opposed(first, second)
    entry = space.attributes.get(attribute) if space else None
    if by_name is not None or entry is None:
        return by_name
    labels = entry.labels
    texts = [labels[name].description if name in labels else "" for name in (first, second)]
    return are_opposed(texts[0] or first, texts[1] or second)


def _opposites(attribute: str, space: AttributeSpace | None) -> list[set[str]]:
    """The pairs of an attribute's labels that the space calls opposites."""
    entry = space.attributes.get(attribute) if space else None
    labels = entry.labels if entry else {}
    return [{name, label.opposite} for name, label in labels.items() if label.opposite is not None]


def describe(attribute: str, label: str, space: AttributeSpace | None) -> str:
    """A label's description in the attribute space, or a sentence that names it.

    Example:
        >>> describe("tone", "stern", None)
        'The tone is stern.'
    """
    in_space = space.attributes.get(attribute) if space else None
    entry = in_space.labels.get(label) if in_space else None
    if entry and entry.description:
        return entry.description
    return f"The {attribute} is {label}."


def replace_unseen(
    request: AnyRequest,
    trained: Collection[PrefixKey],
    space: AttributeSpace | None,
    make_prefix: MakePrefix,
    distill: MakePrefix | None = None,
) -> tuple[AnyRequest, tuple[StandIn, ...]]:
    """Replace a request's labels without a prefix, as its `unseen` says.

    Args:
        request: The request.
        trained: Keys of the labels with a prefix.
        space: For descriptions.
        make_prefix: Makes a prefix of a text for a key that no store has.
        distill: Stores a prefix that does what a text says, unless there is one.

    Returns:
        The request with other labels, and what was used.
    """
    if request.unseen == "refuse":
        return request, ()
    attributes: dict[str, dict[str, float]] = {}
    stand_ins = []
    for label in weighted_labels(request.attributes):
        shares: Mapping[str, float] = {label.label: 1.0}
        if label.key not in trained and not _is_between(label, trained):
            stand_in, shares = _stand_in(label, request, trained, space, make_prefix, distill)
            stand_ins.append(stand_in)
        for name, share in shares.items():
            labels = attributes.setdefault(label.attribute, {})
            labels[name] = labels.get(name, 0.0) + share * label.weight
    names = {*RESERVED_PARTS, *attributes}
    changes = {
        "attributes": attributes,
        "strengths": {part: value for part, value in request.strengths.items() if part in names},
        "schedules": {part: value for part, value in request.schedules.items() if part in names},
    }
    return request.model_copy(update=changes), tuple(stand_ins)


def _is_between(label: WeightedLabel, trained: Collection[PrefixKey]) -> bool:
    """Whether a label is a number that will be interpolated between trained ones."""
    labels = [key.label for key in trained if key.attribute == label.attribute]
    return is_inside(label.label, labels)


def _stand_in(
    label: WeightedLabel,
    request: Request,
    trained: Collection[PrefixKey],
    space: AttributeSpace | None,
    make_prefix: MakePrefix,
    distill: MakePrefix | None,
) -> tuple[StandIn, Mapping[str, float]]:
    if request.unseen in ("text", "distill"):
        text = describe(label.attribute, label.label, space)
        if len(text) > _MAX_TEXT_CHARACTERS:
            raise RequestError(
                f"the text for a label of {label.attribute!r} has {len(text):,} characters; a "
                f"prefix is made from up to {_MAX_TEXT_CHARACTERS:,}: use cp.prefix_from_text, and "
                "store it"
            )
        if request.unseen == "distill":
            if distill is None:
                raise RequestError("unseen='distill' trains a prefix, which is not possible here")
            # Another description is another prefix.
            digest = hashlib.sha256(text.encode()).hexdigest()[:8]
            name = f"{label.label}{_DISTILLED}{digest})"
            distill(PrefixKey.for_label(label.attribute, name), text)
            stand_in = StandIn(
                label=label.key.name, how="distilled", used={text: 1.0}, similarity=1.0
            )
            return stand_in, {name: 1.0}
        requested = {own.label for own in weighted_labels(request.attributes)}
        name = f"{label.label} (from its text)"
        while name in requested:
            name += "'"
        make_prefix(PrefixKey.for_label(label.attribute, name), text)
        stand_in = StandIn(label=label.key.name, how="text", used={text: 1.0}, similarity=1.0)
        return stand_in, {name: 1.0}
    existing = [key.label for key in trained if key.attribute == label.attribute]
    if as_number(label.label) is not None and is_ordinal(existing):
        between(label.attribute, label.label, existing)  # it is out of range
    entry = space.attributes.get(label.attribute) if space else None
    own = entry.labels.get(label.label) if entry else None
    if own and own.opposite and not request.schedules and request.num_beams == 1:
        opposite = PrefixKey.for_label(label.attribute, own.opposite)
        if opposite in trained and not request.calibrated:
            stand_in = StandIn(
                label=label.key.name, how="opposite", used={opposite.name: -1.0}, similarity=1.0
            )
            return stand_in, {own.opposite: -1.0}
    nearest = nearest_labels(label, trained, space)
    used = {
        PrefixKey.for_label(label.attribute, name).name: share
        for name, share in nearest.shares.items()
    }
    stand_in = StandIn(
        label=label.key.name,
        how="nearest" if used else "left out",
        used=used,
        similarity=nearest.similarity,
    )
    return stand_in, nearest.shares
