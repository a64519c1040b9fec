"""Training a decoder of user codes, with the codes of many users, and the code predictor."""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from controlprefix.errors import TrainingDataError
from controlprefix.model import FrozenModel, prefix_from_tokens
from controlprefix.prefixes import PrefixDecoder, PrefixKey
from controlprefix.training.control import RunControl
from controlprefix.training.initialization import typical_scale
from controlprefix.training.loop import train
from controlprefix.training.report import TrainingReport
from controlprefix.training.settings import TrainingSettings
from controlprefix.users.text_features import TextFeatures
from controlprefix.users.user_codes import TrainableCodes, fit_code_predictor
from controlprefix.users.user_training import (
    UserRow,
    split_user_rows,
    trained_texts,
    user_rows,
)
from controlprefix.users.user_vectors import VectorFeatures

CODE_LEARNING_RATE = 5e-2  # code values are about as large as those of an embedding: 1
_CODE_DROPOUT = 0.1
_MAX_FEATURE_TEXTS = 64  # per user
_NUM_INITIAL_TEXTS = 4  # texts whose tokens all users' slots start from


@dataclass(frozen=True, slots=True)
class DecoderReport:
    """The result of training a decoder.

    Attributes:
        training: Report of the one run that trained the decoder and all codes.
        num_users: Users that it was trained on.
        r2: Cross-validated R² of user codes predicted from text features; 0: features predict
            nothing, and enrolled users get the mean code.
        version: Version in the store.
    """

    training: TrainingReport
    num_users: int
    r2: float
    version: int = 0


def train_decoder(
    frozen: FrozenModel,
    users: Mapping[str, Sequence[str]],
    settings: TrainingSettings,
    *,
    num_slots: int,
    width: int,
    features: TextFeatures | VectorFeatures,
    control: RunControl,
) -> tuple[PrefixDecoder, dict[str, Tensor], DecoderReport]:
    """Train a decoder on the texts of many users, together with their codes.

    Args:
        frozen: The model.
        users: At least two, with their texts.
        settings: Hyperparameters.
        num_slots: Slots of a prefix.
        width: Values of a code per slot.
        features: What codes are predicted from.
        control: Run folder, progress, tracker and callbacks.

    Returns:
        The decoder in the form it is stored in, the values of the users' codes, the report.

    Raises:
        TrainingDataError: If there are fewer than two users with texts.
    """
    rows: list[UserRow] = []
    texts: dict[str, list[str]] = {}
    for user, user_texts in users.items():
        texts[user], own_rows = user_rows(frozen, user, user_texts, settings.seed)
        rows += own_rows
    if len(texts) < 2:
        raise TrainingDataError(f"a decoder is trained on many users; {len(texts)} are given")
    training, held_out = split_user_rows(rows, settings)
    rng = random.Random(settings.seed)
    own_training, own_held_out = _by_user(training), _by_user(held_out)
    first_texts = [
        text
        for user, own in own_training.items()
        for text in trained_texts(frozen, own, own_held_out.get(user, ()))[:_NUM_INITIAL_TEXTS]
    ]
    initial_texts = rng.sample(first_texts, min(_NUM_INITIAL_TEXTS, len(first_texts)))
    ids = frozen.request_tokenizer.text_ids("\n".join(initial_texts))
    feature_rows = features.of_users(
        {user: own[:_MAX_FEATURE_TEXTS] for user, own in texts.items()}
    )
    decoder = PrefixDecoder(
        prefix_from_tokens(frozen, ids, num_slots=num_slots),
        typical_scale(frozen, ids),
        width=width,
        hidden_size=settings.hidden_size,
        num_features=next(iter(feature_rows.values())).shape[1],
        feature_set=features.name,
        seed=settings.seed,
    )
    keys = {user: PrefixKey("user", user) for user in texts}
    codes = TrainableCodes(
        decoder,
        {key: torch.zeros(num_slots, width) for key in keys.values()},
        unit=CODE_LEARNING_RATE / settings.peak_learning_rate,
        train_decoder=True,
        dropout=_CODE_DROPOUT,
    )
    run = train(
        frozen,
        [row.row for row in training],
        codes,
        settings=settings,
        held_out=[row.row for row in held_out],
        control=control,
    )
    values = {user: codes.code_values(key) for user, key in keys.items()}
    decoder = decoder.cpu()
    r2 = fit_code_predictor(
        decoder.predictor,
        list(values.values()),
        [feature_rows[user] for user in values],
        seed=settings.seed,
    )
    return decoder.rounded(), values, DecoderReport(run.report(), len(values), r2)


def _by_user(rows: Iterable[UserRow]) -> dict[str, list[UserRow]]:
    users: dict[str, list[UserRow]] = {}
    for row in rows:
        users.setdefault(row.source[0], []).append(row)
    return users
