"""Learning a decoder: many users' codes, what makes slots of them, and a guess from texts."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from controlprefix.errors import TrainingDataError
from controlprefix.model.text_prefix import prefix_from_tokens
from controlprefix.model.tokenization import RequestEncoder
from controlprefix.prefixes.user_code import PrefixDecoder
from controlprefix.store import PrefixKey
from controlprefix.training.initialization import typical_scale
from controlprefix.training.loop import train
from controlprefix.training.objectives import TrainingRow
from controlprefix.training.run import TrainingReport
from controlprefix.training.settings import TrainingSettings
from controlprefix.users.multi_user import rows_of
from controlprefix.users.text_features import TextFeatures
from controlprefix.users.user_codes import LearnedCodes, fit_generator

CODE_RATE = 5e-2  # of codes, whose numbers are about as large as an embedding's: 1
_DROPOUT = 0.1
_MOST_FEATURES = 64  # texts of a user that are embedded


@dataclass(frozen=True, slots=True)
class DecoderReport:
    """What happened.

    Attributes:
        training: Of the decoder and all codes.
        num_users: That it was learned from.
        told: Share of the variance of left-out users' codes that their texts' features tell;
            0: nothing, and whoever is enrolled gets what all have in common.
        version: In the store.
    """

    training: TrainingReport
    num_users: int
    told: float
    version: int = 0


def learn_decoder(
    model: PreTrainedModel,
    encoder: RequestEncoder,
    users: Mapping[str, Sequence[str]],
    settings: TrainingSettings,
    *,
    num_slots: int,
    width: int,
    features: TextFeatures,
    folder: Path | None,
    resume: bool,
    progress: bool,
) -> tuple[PrefixDecoder, dict[str, torch.Tensor], DecoderReport]:
    """Learn a decoder from the texts of many users, and their codes with it.

    Args:
        model: Frozen.
        encoder: Of that model.
        users: At least two, with their texts.
        settings: Of the run.
        num_slots: Of a prefix.
        width: Of a slot's code.
        features: Of texts, for the guess.
        folder, resume, progress: As in `controlprefix.training.loop.train`.

    Returns:
        The decoder as it is to be published, the codes, and the report.

    Raises:
        TrainingDataError: If there are fewer than two users with texts.
    """
    rows: list[TrainingRow] = []
    written: dict[str, list[str]] = {}
    for user, texts in users.items():
        written[user], mine = rows_of(encoder, user, texts, settings.seed)
        rows += mine
    if len(written) < 2:
        raise TrainingDataError(f"a decoder is learned from many users; {len(written)} are given")
    draw = random.Random(settings.seed)
    some = [text for mine in written.values() for text in mine[:4]]
    texts = draw.sample(some, min(4, len(some)))
    ids = encoder.text_ids("\n".join(texts))
    start = prefix_from_tokens(model, ids, num_slots=num_slots)
    scale = typical_scale(model, ids)
    embedded = {user: features.of(texts[:_MOST_FEATURES]) for user, texts in written.items()}
    decoder = PrefixDecoder(
        start,
        scale,
        width=width,
        hidden=settings.width,
        features=next(iter(embedded.values())).shape[1],
        embedder=features.name,
        seed=settings.seed,
    )
    keys = {user: PrefixKey("user", user) for user in written}
    slots = LearnedCodes(
        decoder,
        {key: torch.zeros(num_slots, width) for key in keys.values()},
        unit=CODE_RATE / settings.rate,
        learn_decoder=True,
        dropout=_DROPOUT,
    )
    run = train(
        model,
        rows,
        slots,
        pad_id=encoder.pad_id,
        settings=settings,
        progress=progress,
        folder=folder,
        resume=resume,
    )
    run.end()
    codes = {user: slots.code(key).cpu() for user, key in keys.items()}
    decoder = decoder.cpu()
    told = fit_generator(
        decoder, list(codes.values()), [embedded[user] for user in codes], seed=settings.seed
    )
    return decoder.frozen(), codes, DecoderReport(run.report(), len(codes), told)
