"""Guarded enrolment: shrink a predicted code towards the mean code, by loss on held-out texts."""

from collections.abc import Sequence

import torch

from controlprefix.cancellation import raise_if_stopped
from controlprefix.model import FrozenModel
from controlprefix.prefixes import Prefix, PrefixDecoder, UserCode
from controlprefix.training.held_out import normalized
from controlprefix.users.enrolment import predict_code, prefix_from_texts
from controlprefix.users.text_losses import losses_of_texts

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


def enrolled_value(
    frozen: FrozenModel,
    texts: Sequence[str],
    decoder: PrefixDecoder | None,
    *,
    num_slots: int,
    guard: bool,
) -> tuple[Prefix | UserCode, float]:
    """What a user is enrolled with.

    Args:
        frozen: The model.
        texts: The user's texts.
        decoder: Predicts a code; without one, slots are matched to the texts.
        num_slots: Slots of a prefix without a decoder.
        guard: Whether a code is no more personal than helps: see `guarded_code`.

    Returns:
        A prefix or code, and the share of what is personal that the guard left.
    """
    if decoder is None:
        return prefix_from_texts(frozen, texts, num_slots), 1.0
    if guard:
        return guarded_code(frozen, decoder, texts)
    return predict_code(decoder, texts), 1.0


def guarded_code(
    frozen: FrozenModel, decoder: PrefixDecoder, texts: Sequence[str]
) -> tuple[UserCode, float]:
    """The code predicted from texts, shrunk towards the mean code as far as held-out loss says.

    The texts are divided in two; the code of each half is tried on the other half at several
    shares of its distance from the mean code, and the share of the lowest loss is taken.

    Args:
        frozen: The model.
        decoder: A stored decoder.
        texts: At least one that is not empty; a single one leaves nothing to try on.

    Returns:
        The code, and the share: 1 as predicted, 0 the mean code.

    Raises:
        MissingDependencyError: If sentence-transformers is not installed.
    """
    whole = predict_code(decoder, texts)
    copies: dict[str, list[str]] = {}
    for text in texts:
        copies.setdefault(normalized(text), []).append(text)
    groups = list(copies.values())  # no half has a text of the other one
    halves = [text for own in groups[::2] for text in own], [t for own in groups[1::2] for t in own]
    if not halves[1]:
        return whole, 1.0
    totals = dict.fromkeys(SHARES, 0.0)
    with torch.no_grad():
        for own, others in (halves, halves[::-1]):
            code = predict_code(decoder, own)
            for share in SHARES:
                raise_if_stopped()
                prefix = decoder.decode(_at_share(decoder, code, share))
                losses = losses_of_texts(frozen, others, prefix.to(dtype=frozen.dtype))
                totals[share] += sum(loss for loss, _ in losses)
    share = min(totals, key=lambda share: totals[share])
    return _at_share(decoder, whole, share), share


def _at_share(decoder: PrefixDecoder, code: UserCode, share: float) -> UserCode:
    mean = decoder.mean_code.values
    return UserCode(code.decoder_hash, mean + share * (code.values.to(mean) - mean))
