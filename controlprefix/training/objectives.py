"""What training makes small: nats of each row, summed over its target tokens."""

import random
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus
from transformers import PreTrainedModel

from controlprefix.model.log_probs import divergences, target_logits, token_log_probs
from controlprefix.model.steering import Steering
from controlprefix.model.tokenization import EncodedExample
from controlprefix.prefixes.assembly import Part, PrefixBatch
from controlprefix.prefixes.prefix import Prefix
from controlprefix.store import PrefixKey


class TrainingRow(NamedTuple):
    """One training row.

    Attributes:
        prompt: Token ids that are read.
        targets: Those to be written, the end included.
        frozen: Parts that stay as they are.
        learned: Keys of those that are learned, with their strengths.
        teacher: What the same model reads in place of the prompt and the learned parts,
            where they are to be distilled from that.
    """

    prompt: Sequence[int]
    targets: Sequence[int]
    frozen: Sequence[Part]
    learned: Sequence[tuple[PrefixKey, float]]
    teacher: Sequence[int] | None = None

    @classmethod
    def of(
        cls,
        encoded: EncodedExample,
        end_id: int | None,
        frozen: Sequence[Part],
        learned: Sequence[tuple[PrefixKey, float]],
    ) -> "TrainingRow":
        """Of an example, whose end is learned too."""
        end = () if end_id is None else (end_id,)
        return cls(encoded.prompt, (*encoded.completion, *end), frozen, learned)

    @property
    def num_tokens(self) -> int:
        """Read and written."""
        return len(self.prompt) + len(self.targets)


class Pair(NamedTuple):
    """A row, and the same row under another label of one of its attributes, to contrast with."""

    row: TrainingRow
    other: TrainingRow | None = None


class Objective:
    """Computes the nats of rows, that gradients may flow through.

    Args:
        model: Frozen.
        pad_id: Any token id.
        contrast: See `TrainingSettings`.
    """

    def __init__(self, model: PreTrainedModel, *, pad_id: int, contrast: float = 0.0) -> None:
        self._model = model
        self._steering = Steering.of(model)
        self._pad_id = pad_id
        self._contrast = contrast

    def assembled(self, pairs: Sequence[Pair], prefixes: Mapping[PrefixKey, Prefix]) -> PrefixBatch:
        """What the rows attend to: first each pair's row, then the others there are."""
        rows = [*(pair.row for pair in pairs), *(pair.other for pair in pairs if pair.other)]
        parts = [
            [*row.frozen, *(Part(prefixes[key], strength) for key, strength in row.learned)]
            for row in rows
        ]
        return self._steering.assemble(parts)

    def __call__(self, pairs: Sequence[Pair]) -> Tensor:
        """Nats of each pair, `(pairs,)`, summed over its targets.

        What `assembled` gives for them must be attached to the model.

        The next token's surprise; or the divergence from what the teacher expects there;
        or with `contrast` c: (1 − c) of the surprise, c of softplus(m_other − m_own) a
        token, where m is the mean log-probability of a row's tokens under a label.

        Reference:
            Qian et al., "Controllable Natural Language Generation with Contrastive
            Prefixes", 2022, https://arxiv.org/abs/2202.13257, with one other label a row.
        """
        rows = [pair.row for pair in pairs]
        if rows[0].teacher is not None:
            return self._from_teacher(rows)
        others = [pair.other for pair in pairs if pair.other]
        log_probs, _ = token_log_probs(
            self._model,
            [row.prompt for row in (*rows, *others)],
            [row.targets for row in (*rows, *others)],
            pad_id=self._pad_id,
        )
        sums = log_probs.sum(1)
        own, under_other = sums[: len(rows)], iter(sums[len(rows) :])
        nats = []
        for pair, found in zip(pairs, own, strict=True):
            if pair.other is None:
                nats.append(-found)
                continue
            count = len(pair.row.targets)
            likelier = count * softplus((next(under_other) - found) / count)
            nats.append((1 - self._contrast) * -found + self._contrast * likelier)
        return torch.stack(nats)

    def _from_teacher(self, rows: Sequence[TrainingRow]) -> Tensor:
        targets = [row.targets for row in rows]
        frozen = self._steering.assemble([row.frozen for row in rows])
        with torch.no_grad(), self._steering.attached(frozen):
            wanted, *_ = target_logits(
                self._model, [row.teacher or () for row in rows], targets, pad_id=self._pad_id
            )
        found, *_ = target_logits(
            self._model, [row.prompt for row in rows], targets, pad_id=self._pad_id
        )
        each = divergences(found, wanted).split([len(one) for one in targets])
        return torch.stack([one.sum() for one in each])


def pair_up(
    rows: Sequence[TrainingRow], known: Collection[PrefixKey], draw: random.Random
) -> list[Pair]:
    """Beside each row, where an attribute has other labels among `known`, one of those drawn."""
    pairs = []
    for row in rows:
        swaps = [
            (i, other)
            for i, (key, _) in enumerate(row.learned)
            for other in known
            if key.kind == "attribute" and _is_other_label(key, other)
        ]
        if not swaps:
            pairs.append(Pair(row))
            continue
        i, other = draw.choice(swaps)
        learned = list(row.learned)
        learned[i] = (other, learned[i][1])
        pairs.append(Pair(row, row._replace(learned=learned)))
    return pairs


def _is_other_label(key: PrefixKey, other: PrefixKey) -> bool:
    same = other.kind == key.kind and other.name.partition("=")[0] == key.name.partition("=")[0]
    return same and other != key
