"""What a user's prefix gives away of the texts it was learned from."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from controlprefix.errors import TrainingDataError
from controlprefix.model.steering import Steering
from controlprefix.model.tokenization import RequestEncoder
from controlprefix.prefixes.assembly import Part
from controlprefix.prefixes.prefix import Prefix
from controlprefix.training.objectives import Objective, Pair, TrainingRow
from controlprefix.training.run import in_batches

_AT_A_TIME = 16
_ROW_TOKENS = 256
_GIVEN, _CONTINUED = 8, 16  # tokens of a text that are shown, and that must then come by themselves
_DIGITS = 6
_ALTERNATIVES = 255


@dataclass(frozen=True, slots=True)
class LeakReport:
    """What a prefix gives away.

    Attributes:
        num_texts, num_held_out: That it was learned from, and of the same author beside.
        gain: Nats a token that the prefix takes off the held-out texts: what it is good for.
        membership: Chance that of a text it was learned from and a held-out one, the first
            is told by its likelihood under the prefix, over that without; 0.5 tells nothing
            (the area under the curve of Yeom et al., 2018, with a reference model).
        extracted: Share of the texts of which 16 tokens come word for word, greedily,
            after the first 8; `extracted_without`: the same without the prefix.
        exposure: Bits that a secret number, planted once among the texts, is told by: of
            `most_exposure`; 1 is what chance gives (Carlini et al., 2019, "The Secret Sharer",
            by rank among alternatives). None where nothing was planted.
    """

    num_texts: int
    num_held_out: int
    gain: float
    membership: float
    extracted: float
    extracted_without: float
    exposure: float | None = None
    most_exposure: float = math.log2(_ALTERNATIVES + 1)


class Auditor:
    """Asks one frozen model about texts.

    Args:
        model: Frozen.
        encoder: Of that model.
    """

    def __init__(self, model: PreTrainedModel, encoder: RequestEncoder) -> None:
        self._model = model
        self._encoder = encoder
        self._steering = Steering.of(model)
        self._objective = Objective(model, pad_id=encoder.pad_id)

    def report(
        self,
        prefix: Prefix,
        texts: Sequence[str],
        held_out: Sequence[str],
        *,
        canaries: int,
        learn: Callable[[list[str]], Prefix],
        seed: int,
    ) -> LeakReport:
        """Audit a prefix.

        Args:
            prefix: Learned from `texts`.
            texts: At least one.
            held_out: Others of the same author, at least one.
            canaries: How many secret numbers to plant.
            learn: Makes a prefix of texts as this one was made.
            seed: Of those numbers.

        Raises:
            TrainingDataError: If there are no texts.
        """
        if not texts or not held_out:
            raise TrainingDataError(
                "an audit needs the texts that the prefix was learned from and held-out texts of "
                "the same author"
            )
        without, own = self.nats(held_out, None), self.nats(held_out, prefix)
        both = zip(self.nats(texts, None), self.nats(texts, prefix), strict=True)
        taken_off = [before - after for before, after in both]
        elsewhere = [before - after for before, after in zip(without, own, strict=True)]
        wins = [
            float(mine > other) + 0.5 * float(mine == other)
            for mine in taken_off
            for other in elsewhere
        ]
        return LeakReport(
            num_texts=len(texts),
            num_held_out=len(held_out),
            gain=sum(elsewhere) / len(elsewhere),
            membership=sum(wins) / len(wins),
            extracted=self.extracted(texts, prefix),
            extracted_without=self.extracted(texts, None),
            exposure=self._exposure(texts, canaries, learn, seed) if canaries else None,
        )

    def nats(self, texts: Sequence[str], prefix: Prefix | None) -> list[float]:
        """A token of each text, as far as a row goes."""
        encoded = [next(self._encoder.pieces(text, _ROW_TOKENS))[0] for text in texts]
        parts = () if prefix is None else (Part(prefix),)
        rows = [TrainingRow(one.prompt, one.completion, parts, ()) for one in encoded]
        found: dict[int, float] = {}
        for some in in_batches(rows, _AT_A_TIME):
            pairs = [Pair(row) for row in some]
            batch = self._objective.assembled(pairs, {})
            with torch.no_grad(), self._steering.attached(batch):
                nats = self._objective(pairs).tolist()
            found.update({id(row): n / len(row.targets) for row, n in zip(some, nats, strict=True)})
        return [found[id(row)] for row in rows]

    def extracted(self, texts: Sequence[str], prefix: Prefix | None) -> float:
        """Share of the texts, long enough, whose continuation comes word for word."""
        long = [
            one.prompt + one.completion[: _GIVEN + _CONTINUED]
            for one, _ in (next(self._encoder.pieces(text, _ROW_TOKENS)) for text in texts)
            if len(one.completion) >= _GIVEN + _CONTINUED
        ]
        if not long or self._encoder.is_encoder_decoder:
            return 0.0
        hits = 0
        for at in range(0, len(long), _AT_A_TIME):
            some = torch.tensor(long[at : at + _AT_A_TIME], device=self._model.device)
            shown = some[:, : some.shape[1] - _CONTINUED]
            parts = [[] if prefix is None else [Part(prefix)] for _ in some]
            batch = self._steering.assemble(parts)
            with torch.no_grad(), self._steering.attached(batch):
                written = self._model.generate(  # type: ignore[operator]
                    input_ids=shown,
                    attention_mask=torch.ones_like(shown),
                    max_new_tokens=_CONTINUED,
                    min_new_tokens=_CONTINUED,
                    do_sample=False,
                    pad_token_id=self._encoder.pad_id,
                )
            hits += int((written == some).all(dim=1).sum())
        return hits / len(long)

    def _exposure(
        self,
        texts: Sequence[str],
        canaries: int,
        learn: Callable[[list[str]], Prefix],
        seed: int,
    ) -> float:
        draw = random.Random(seed)
        secrets = [_canary(draw) for _ in range(canaries)]
        planted = draw.sample([*texts, *secrets], len(texts) + len(secrets))
        prefix = learn(planted)
        bits = []
        for secret in secrets:
            asked = [secret, *(_canary(draw) for _ in range(_ALTERNATIVES))]
            nats = self.nats(asked, prefix)
            likelier = sum(one < nats[0] for one in nats[1:])
            bits.append(math.log2(len(asked)) - math.log2(1 + likelier))
        return sum(bits) / len(bits)


def _canary(draw: random.Random) -> str:
    digits = " ".join(str(draw.randrange(10)) for _ in range(_DIGITS))
    return f"The number that I must not tell is {digits}."
