"""Training user codes with a frozen or trained decoder, and predicting codes from texts."""

import random
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from controlprefix._io import requires_extra
from controlprefix.prefixes import Prefix, PrefixDecoder, PrefixKey, UserCode
from controlprefix.prefixes.user_code import CodePredictor
from controlprefix.training.parameterization import TrainablePrefixes

_MIN_USERS = 10  # for predicting anything but the mean code
_NUM_FOLDS = 5
_PSEUDO_COUNTS = (1.0, 4.0, 16.0)
_RIDGE_PENALTIES = (1e1, 1e2, 1e3, 1e4)
_VIEW_SIZES = (1, 4, 16)  # numbers of texts in the samples of a user's texts


class TrainableCodes(TrainablePrefixes):
    """Prefixes of users as trainable codes of a decoder, which may be trained too.

    Args:
        decoder: Turns codes into slots.
        initial: Values of the codes to start from, `(num_slots, width)` each.
        unit: Scale of the change of a code, for the learning rate.
        train_decoder: Train the decoder too.
        dropout: Probability that a user's code is left out of a step, so that a decoder also
            learns what all users have in common.
    """

    def __init__(
        self,
        decoder: PrefixDecoder,
        initial: Mapping[PrefixKey, Tensor],
        *,
        unit: float = 1.0,
        train_decoder: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.keys = tuple(initial)
        self._unit, self._dropout = unit, dropout
        self._initial = {key: values.detach().float() for key, values in initial.items()}
        self._index = {key: i for i, key in enumerate(initial)}
        self.changes = nn.ParameterList(torch.zeros_like(v) for v in self._initial.values())
        self.trained_decoder = decoder if train_decoder else None
        # In a tuple, so that a frozen decoder is not registered as a trainable module.
        self._decoder = (decoder,)

    def prefixes(
        self, keys: Collection[PrefixKey], seed: int | None = None
    ) -> dict[PrefixKey, Prefix]:
        """Decode some of the codes; with a seed, some are dropped if that is set."""
        (decoder,) = self._decoder
        return {
            key: Prefix(decoder.geometry, decoder.slots(self._values(key, seed)))
            for key in self.keys
            if key in keys
        }

    def stored_values(self) -> dict[PrefixKey, Prefix | UserCode]:
        """The codes, as they are stored."""
        (decoder,) = self._decoder
        return {
            key: UserCode(decoder.content_hash, self._values(key, None).detach().clone())
            for key in self.keys
        }

    def initial_digest(self) -> str:
        """A hash of the decoder and the initial codes."""
        (decoder,) = self._decoder
        values = [(str(key), value.tolist()) for key, value in self._initial.items()]
        return f"{decoder.content_hash} {values}"

    def to_device(self, device: torch.device) -> "TrainableCodes":
        """Move parameters, initial codes and the decoder."""
        self._initial = {key: values.to(device) for key, values in self._initial.items()}
        for decoder in self._decoder:
            decoder.to(device)
        return self.to(device)

    def code_values(self, key: PrefixKey) -> Tensor:
        """The current values of a code, `(num_slots, width)`, on the CPU."""
        return self._values(key, None).detach().cpu().clone()

    def _values(self, key: PrefixKey, seed: int | None) -> Tensor:
        change = self.changes[self._index[key]]
        if seed is not None and self._dropout:
            rng = random.Random(f"{seed}:{key.kind}:{key.name}")
            if rng.random() < self._dropout:
                change = torch.zeros_like(change)
        return self._initial[key] + self._unit * change


def fit_code_predictor(
    predictor: CodePredictor, codes: Sequence[Tensor], features: Sequence[Tensor], *, seed: int
) -> float:
    """Fit a predictor of codes from text features by ridge regression.

    The shrinkage and the ridge penalty are chosen by cross-validation over users. If features
    predict nothing, the prediction is the mean code.

    Args:
        predictor: Fitted in place.
        codes: Codes of users, `(num_slots, width)` each.
        features: Features of each user's texts, `(num_texts, num_features)`.
        seed: Seed of the samples of each user's texts.

    Returns:
        r2: cross-validated R² of user codes predicted from text features, 0 at least.
    """
    with requires_extra("embeddings", "a user-code decoder"):
        from sklearn.linear_model import Ridge
        from sklearn.model_selection import GroupKFold

    targets = torch.stack([code.flatten() for code in codes]).double().numpy()
    all_features = torch.cat(list(features))
    predictor.feature_mean.copy_(all_features.mean(0))
    predictor.feature_std.copy_(all_features.std(0) + 1e-3)
    predictor.weights.zero_()
    predictor.mean_code.copy_(torch.from_numpy(targets.mean(0)))
    if len(codes) < _MIN_USERS:
        return 0.0

    def fit(rows: object, row_targets: object, penalty: float) -> Tensor:
        model = Ridge(alpha=penalty, fit_intercept=False).fit(rows, row_targets)
        return torch.from_numpy(model.coef_.T)

    best_r2, best_pseudo_count, best_penalty = 0.0, 0.0, 0.0
    for pseudo_count in _PSEUDO_COUNTS:
        rows, owners = _views(predictor, features, pseudo_count, seed)
        folds = list(GroupKFold(_NUM_FOLDS).split(rows, groups=owners))
        for penalty in _RIDGE_PENALTIES:
            error, variance = 0.0, 0.0
            for inside, outside in folds:
                mean = targets[sorted(set(owners[inside].tolist()))].mean(0)
                weights = fit(rows[inside], targets[owners[inside]] - mean, penalty)
                residuals = targets[owners[outside]] - mean
                error += float(((residuals - rows[outside].numpy() @ weights.numpy()) ** 2).sum())
                variance += float((residuals**2).sum())
            r2 = 1 - error / variance if variance else 0.0
            best_r2, best_pseudo_count, best_penalty = max(
                (best_r2, best_pseudo_count, best_penalty), (r2, pseudo_count, penalty)
            )
    if best_r2 > 0:
        rows, owners = _views(predictor, features, best_pseudo_count, seed)
        residuals = targets[owners] - targets.mean(0)
        predictor.weights.copy_(fit(rows, residuals, best_penalty))
        predictor.pseudo_count.fill_(best_pseudo_count)
    return best_r2


def _views(
    predictor: CodePredictor, features: Sequence[Tensor], pseudo_count: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Each user as seen by some of their texts: shrunk features, and the user's index."""
    rng = random.Random(seed)
    predictor.pseudo_count.fill_(pseudo_count)
    rows, owners = [], []
    for owner, texts in enumerate(features):
        for size in _VIEW_SIZES:
            indices = rng.sample(range(len(texts)), min(size, len(texts)))
            rows.append(predictor.shrunk_features(texts[indices]).double())
            owners.append(owner)
    return torch.stack(rows), torch.tensor(owners)
