"""Vectors that users have elsewhere, such as those of a recommender, in place of text features."""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from controlprefix.errors import RequestError, TrainingDataError, shortened
from controlprefix.labels import label_text
from controlprefix.prefixes import PrefixDecoder, UserCode
from controlprefix.prefixes.key import composed

_FEATURE_SET = "vectors"


class VectorFeatures:
    """Vectors of users as the features from which codes are predicted, as `TextFeatures`.

    Args:
        vectors: A vector per user, all of one size; numbers name users too, and
            accents of names may be typed in either way.

    Attributes:
        name: Says that codes are predicted from vectors.

    Raises:
        TrainingDataError: If one is not of numbers.
    """

    name = _FEATURE_SET

    def __init__(self, vectors: Mapping[str, Sequence[float]]) -> None:
        self._rows = {
            composed(label_text(user)): _row(user, vector) for user, vector in vectors.items()
        }

    def of_users(self, users: Collection[str]) -> dict[str, Tensor]:
        """The vectors of some users, `(1, vector_size)` each, float32.

        Raises:
            TrainingDataError: If a user has none, or one of another size.
        """
        if missing := [user for user in users if composed(user) not in self._rows]:
            raise TrainingDataError(
                f"there is no vector for {shortened(missing)}; give one per user"
            )
        rows = {user: self._rows[composed(user)] for user in users}
        sizes = {row.shape[1]: user for user, row in rows.items()}
        if len(sizes) > 1:
            examples = ", ".join(f"{size} values for {user!r}" for size, user in sizes.items())
            raise TrainingDataError(f"vectors have different sizes: {examples}; give all the same")
        return rows


def has_vectors(decoder: PrefixDecoder) -> bool:
    """Whether a decoder predicts codes from vectors, not from texts."""
    return decoder.feature_set == _FEATURE_SET


def code_of_vector(
    decoder: PrefixDecoder, name: str, user: str, vector: Sequence[float]
) -> UserCode:
    """The code that a decoder predicts for a user from their vector.

    Args:
        decoder: A decoder that was trained with vectors.
        name: Its name, for errors.
        user: Name of the user.
        vector: The user's vector.

    Raises:
        RequestError: If the decoder was trained with text features, or with other sizes.
        TrainingDataError: If the vector is not one of numbers.
    """
    if not has_vectors(decoder):
        raise RequestError(
            f"decoder {name!r} was trained with features of texts; give texts, or a decoder that "
            "was trained with vectors"
        )
    row = _row(user, vector)
    if row.shape[1] != decoder.predictor.num_features:
        raise RequestError(
            f"the vector of user {user!r} has {row.shape[1]} values; decoder {name!r} was trained "
            f"with vectors of {decoder.predictor.num_features}"
        )
    return decoder.predict_code(row)


def _row(user: str, vector: Sequence[float]) -> Tensor:
    try:
        row = torch.as_tensor(vector, dtype=torch.float32).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        row = torch.empty(0)
    if row.ndim != 1 or not len(row) or not row.isfinite().all():
        raise TrainingDataError(
            f"the vector of user {user!r} must be a list of finite numbers, with one at least"
        )
    return row[None]
