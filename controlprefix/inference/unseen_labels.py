"""Labels that nobody has trained: what stands in for them, and how sure that is.

Reference:
    Clive et al., "Control Prefixes", 2021, section on WebNLG's unseen categories: the control
    prefix of the known category whose word vector is nearest, and one for out-of-vocabulary.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from controlprefix.attributes import (
    AttributeSpace,
    WeightedLabel,
    attribute_name,
    weighted_labels,
)
from controlprefix.embeddings import embeddings
from controlprefix.request import Request, StandIn

NEAR = 0.3  # cosine of sentence embeddings, below which nothing is near
_MOST = 3  # labels in a mixture
_SHARPNESS = 10.0  # of the mixture: e-fold for each 0.1 of cosine

AnyRequest = TypeVar("AnyRequest", bound=Request)
Embed = Callable[[Sequence[str]], Tensor]


class Nearest(NamedTuple):
    """Known labels and their shares, which add up to 1; none if nothing is near."""

    shares: Mapping[str, float]
    similarity: float


def nearest(
    wanted: WeightedLabel,
    known: Collection[str],
    space: AttributeSpace | None = None,
    *,
    embed: Embed = embeddings,
) -> Nearest:
    """The labels of the same attribute that mean about the same, by their sentence embeddings.

    Args:
        wanted: A label without a prefix.
        known: Names of those with one, such as `tone=warm`.
        space: For descriptions, which say more than a name, and whether there may be several.
        embed: Texts → embeddings of length 1.
    """
    labels = sorted(n.partition("=")[2] for n in known if n.startswith(f"{wanted.attribute}="))
    if not labels:
        return Nearest({}, 0.0)
    texts = [described(wanted.attribute, one, space) for one in (wanted.label, *labels)]
    embedded = embed(texts)
    cosines = embedded[1:] @ embedded[0]
    about = space.attributes.get(wanted.attribute) if space else None
    most = 1 if about is not None and about.exclusive else _MOST
    order = cosines.argsort(descending=True)[:most]
    near = [int(i) for i in order if cosines[i] >= NEAR]
    if not near:
        return Nearest({}, float(cosines.max()))
    shares = torch.softmax(_SHARPNESS * cosines[near], dim=0).tolist()
    return Nearest(
        {labels[i]: share for i, share in zip(near, shares, strict=True)}, float(cosines.max())
    )


def described(attribute: str, label: str, space: AttributeSpace | None) -> str:
    """What a label means, in words.

    Example:
        >>> described("tone", "stern", None)
        'The tone is stern.'
    """
    about = space.attributes.get(attribute) if space else None
    known = about.labels.get(label) if about else None
    if known and known.description:
        return known.description
    return f"The {attribute} is {label}."


def stood_in(
    request: AnyRequest,
    known: Collection[str],
    space: AttributeSpace | None,
    make: Callable[[str, str], None],
) -> tuple[AnyRequest, tuple[StandIn, ...]]:
    """A request whose labels without a prefix are replaced as it asks, and by what.

    Args:
        request: As it was asked.
        known: Names of labels with a prefix.
        space: For descriptions.
        make: Has a prefix of a text for a name that no store has.
    """
    if request.unseen == "refuse":
        return request, ()
    chosen: dict[str, dict[str, float]] = {}
    notes = []
    for one in weighted_labels(request.attributes):
        shares: Mapping[str, float] = {one.label: 1.0}
        if one.name not in known:
            note, shares = _stand_in(one, request, known, space, make)
            notes.append(note)
        for label, share in shares.items():
            labels = chosen.setdefault(one.attribute, {})
            labels[label] = labels.get(label, 0.0) + share * one.weight
    kept = {"task", "user", *chosen}
    changes = {
        "attributes": chosen,
        "strengths": {name: one for name, one in request.strengths.items() if name in kept},
        "schedules": {name: one for name, one in request.schedules.items() if name in kept},
    }
    return request.model_copy(update=changes), tuple(notes)


def _stand_in(
    wanted: WeightedLabel,
    request: Request,
    known: Collection[str],
    space: AttributeSpace | None,
    make: Callable[[str, str], None],
) -> tuple[StandIn, Mapping[str, float]]:
    if request.unseen == "text":
        text = described(wanted.attribute, wanted.label, space)
        label = f"{wanted.label} (from its text)"
        make(attribute_name(wanted.attribute, label), text)
        note = StandIn(label=wanted.name, how="text", used={text: 1.0}, similarity=1.0)
        return note, {label: 1.0}
    found = nearest(wanted, known, space)
    note = StandIn(
        label=wanted.name,
        how="nearest" if found.shares else "left out",
        used={attribute_name(wanted.attribute, one): n for one, n in found.shares.items()},
        similarity=found.similarity,
    )
    return note, found.shares
