"""Learning codes: of new users beside a finished decoder, or of many users with their decoder."""

import random
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from controlprefix.prefixes.prefix import Prefix
from controlprefix.prefixes.user_code import Code, CodedPrefix, PrefixDecoder
from controlprefix.store import PrefixKey
from controlprefix.training.parameterization import LearnedSlots


class LearnedCodes(LearnedSlots):
    """The prefixes of users as codes, which are learned, the decoder too where that is asked for.

    Args:
        decoder: What makes slots of codes.
        start: The codes as they begin, `(num_slots, width)` each.
        unit: Of a code's numbers, for the learning rate.
        learn_decoder: Learn it too.
        dropout: Chance that a user's code is left out of a step, so that a decoder learns
            what all have in common as well.
    """

    def __init__(
        self,
        decoder: PrefixDecoder,
        start: Mapping[PrefixKey, Tensor],
        *,
        unit: float = 1.0,
        learn_decoder: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.keys = tuple(start)
        self._unit, self._dropout = unit, dropout
        self._start = {key: numbers.detach().float() for key, numbers in start.items()}
        self._index = {key: i for i, key in enumerate(start)}
        self.changes = nn.ParameterList(torch.zeros_like(one) for one in self._start.values())
        self.learned_decoder = decoder if learn_decoder else None
        self._decoder = [decoder]  # in a list, a frozen one is no part of what is learned

    def prefixes(
        self, keys: Collection[PrefixKey], seed: int | None = None
    ) -> dict[PrefixKey, Prefix]:
        """Prefixes as they stand; with a seed, some codes are left out where that is set."""
        wanted = [key for key in self.keys if key in keys]
        return {key: self._decoded(self._numbers(key, seed)) for key in wanted}

    def materialized(self) -> dict[PrefixKey, Prefix]:
        """All prefixes as they stand, each with its code."""
        (decoder,) = self._decoder
        return {
            key: decoder.decode(Code(decoder.content_hash, self.code(key))) for key in self.keys
        }

    def code(self, key: PrefixKey) -> Tensor:
        """A user's code as it stands, as a value of its own."""
        return self._numbers(key, None).detach().clone()

    def start_digest(self) -> str:
        """Of the decoder and the starts."""
        (decoder,) = self._decoder
        numbers = [(str(key), one.tolist()) for key, one in self._start.items()]
        return f"{decoder.content_hash} {numbers}"

    def to_device(self, device: torch.device) -> "LearnedCodes":
        """Move everything."""
        self._start = {key: one.to(device) for key, one in self._start.items()}
        for decoder in self._decoder:
            decoder.to(device)
        return self.to(device)

    def _numbers(self, key: PrefixKey, seed: int | None) -> Tensor:
        change = self.changes[self._index[key]]
        if seed is not None and self._dropout:
            draw = random.Random(f"{seed}:{key.kind}:{key.name}")
            if draw.random() < self._dropout:
                change = torch.zeros_like(change)
        return self._start[key] + self._unit * change

    def _decoded(self, numbers: Tensor) -> Prefix:
        (decoder,) = self._decoder
        return CodedPrefix(
            decoder.geometry, decoder.slots(numbers), code=Code(decoder.content_hash, numbers)
        )


def fit_generator(
    decoder: PrefixDecoder,
    codes: Sequence[Tensor],
    features: Sequence[Tensor],
    *,
    seed: int,
) -> float:
    """Set the decoder's generator: from what texts are like to a code, by ridge regression.

    How much to believe the features, and how many texts make a sure user, are chosen by
    how well codes of users left out are told; where nothing is told, codes come out as the
    mean of all.

    Args:
        decoder: Its generator is set.
        codes: Of users, `(num_slots, width)` each, at least ten for anything but the mean.
        features: Of each one's texts, `(texts, features)`.
        seed: Of the users left out.

    Returns:
        The share of the variance of left-out users' codes that is told; 0 for none.
    """
    generator = decoder.generator
    wanted = torch.stack([code.flatten() for code in codes]).double()
    every = torch.cat(list(features))
    generator.mean.copy_(every.mean(0))
    generator.spread.copy_(every.std(0) + 1e-3)
    generator.weights.zero_()
    generator.common.copy_(wanted.mean(0))
    if len(codes) < _FEWEST:
        return 0.0
    draw = random.Random(seed)
    groups = [draw.randrange(_GROUPS) for _ in codes]
    best = (0.0, 0.0, 0.0)  # told, doubt, trust
    for doubt in _DOUBTS:
        rows, owners = _views(generator, features, doubt, seed)
        for trust in _TRUSTS:
            left, total = 0.0, 0.0
            for group in range(_GROUPS):
                inside = [groups[owner] != group for owner in owners]
                users = [i for i, one in enumerate(groups) if one != group]
                if len(users) in (0, len(groups)):
                    continue
                common = wanted[users].mean(0)
                known = torch.tensor(inside)
                mine = torch.tensor(owners)
                weights = _ridge(rows[known], wanted[mine[known]] - common, trust)
                others = ~known
                error = wanted[mine[others]] - common - rows[others] @ weights
                left += float(error.square().sum())
                total += float((wanted[mine[others]] - common).square().sum())
            told = 1 - left / total if total else 0.0
            best = max(best, (told, doubt, trust))
    told, doubt, trust = best
    if told > 0:
        rows, owners = _views(generator, features, doubt, seed)
        weights = _ridge(rows, wanted[torch.tensor(owners)] - wanted.mean(0), trust)
        generator.weights.copy_(weights)
        generator.doubt.fill_(doubt)
    return told


_FEWEST = 10
_GROUPS = 5
_DOUBTS = (1.0, 4.0, 16.0)
_TRUSTS = (1e1, 1e2, 1e3, 1e4)
_VIEWS = (1, 4, 16)  # of how many texts a user is seen


def _views(
    generator: nn.Module, features: Sequence[Tensor], doubt: float, seed: int
) -> tuple[Tensor, list[int]]:
    """Each user as some of their texts show them: what a code depends on, and whose it is."""
    draw = random.Random(seed)
    generator.doubt.fill_(doubt)  # type: ignore[operator]
    rows, owners = [], []
    for owner, texts in enumerate(features):
        for count in _VIEWS:
            chosen = draw.sample(range(len(texts)), min(count, len(texts)))
            rows.append(generator.shrunk(texts[chosen]).double())  # type: ignore[operator]
            owners.append(owner)
    return torch.stack(rows), owners


def _ridge(rows: Tensor, wanted: Tensor, trust: float) -> Tensor:
    square = rows.T @ rows + trust * torch.eye(rows.shape[1], dtype=rows.dtype)
    return torch.linalg.solve(square, rows.T @ wanted)
