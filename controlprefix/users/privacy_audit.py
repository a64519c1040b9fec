"""Privacy audit: what a user's prefix reveals of the texts it was trained on."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from controlprefix.errors import TrainingDataError
from controlprefix.model import FrozenModel
from controlprefix.model.neutral_generation import neutral_config
from controlprefix.prefixes import Part, Prefix
from controlprefix.users.text_losses import first_tokens, losses_of_texts

_BATCH_SIZE = 16
_CONTEXT_TOKENS, _EXTRACTED_TOKENS = 8, 16  # given, and then generated word for word
_CANARY_DIGITS = 6
_NUM_ALTERNATIVES = 255


@dataclass(frozen=True, slots=True)
class PrivacyReport:
    """What a prefix reveals.

    Attributes:
        num_texts, num_held_out: Texts that it was trained on, and others of the same author.
        gain: Nats per token by which the prefix improves held-out texts: its use.
        membership_auc: Area under the ROC curve of membership inference by likelihood, with
            the model without the prefix as reference; 0.5 reveals nothing (Yeom et al.,
            "Privacy Risk in Machine Learning", 2018, https://arxiv.org/abs/1709.01604).
        num_long_texts: Texts of 24 tokens or more, that extraction is tried with.
        extraction_rate: Share of these of which 16 tokens are generated word for word, greedily,
            after the first 8; None if there is none, or the model is an encoder-decoder.
        extraction_rate_without: The same without the prefix.
        exposure_bits: Mean exposure of secret numbers, each planted once among the texts, by
            rank among alternatives; chance gives about 1.4 (Carlini et al., "The Secret
            Sharer", 2019, https://arxiv.org/abs/1802.08232). None if none were planted.
        max_exposure_bits: The largest possible exposure.
    """

    num_texts: int
    num_held_out: int
    gain: float
    membership_auc: float
    num_long_texts: int
    extraction_rate: float | None
    extraction_rate_without: float | None
    exposure_bits: float | None = None
    max_exposure_bits: float = math.log2(_NUM_ALTERNATIVES + 1)


class PrivacyAuditor:
    """Audits prefixes of one frozen model.

    Args:
        frozen: The model.
    """

    def __init__(self, frozen: FrozenModel) -> None:
        self._frozen = frozen

    def audit(
        self,
        prefix: Prefix,
        texts: Sequence[str],
        held_out: Sequence[str],
        *,
        num_canaries: int,
        retrain: Callable[[list[str]], Prefix],
        seed: int,
    ) -> PrivacyReport:
        """Audit a prefix.

        Args:
            prefix: Trained on `texts`.
            texts: At least one.
            held_out: Others of the same author, at least one.
            num_canaries: Secret numbers to plant.
            retrain: Makes a prefix of texts in the same way as this one was made.
            seed: Seed of the secret numbers.

        Raises:
            TrainingDataError: If texts or held-out texts are missing or overlap, or `num_canaries`
                is below 0.
        """
        if not texts or not held_out:
            raise TrainingDataError(
                "an audit needs the texts that the prefix was trained on and held-out texts of "
                "the same author"
            )
        if num_canaries < 0:
            raise TrainingDataError(f"num_canaries is {num_canaries}; it must be 0 or more")
        if shared := set(texts) & set(held_out):
            raise TrainingDataError(
                f"{len(shared)} held-out texts are among those that the prefix was trained on; "
                "give other texts of the author"
            )
        member_gains = self._gains(texts, prefix)
        other_gains = self._gains(held_out, prefix)
        wins = [
            float(member > other) + 0.5 * float(member == other)
            for member in member_gains
            for other in other_gains
        ]
        exposure = None
        if num_canaries:
            exposure = self._exposure(texts, num_canaries, retrain, seed)
        return PrivacyReport(
            num_texts=len(texts),
            num_held_out=len(held_out),
            gain=sum(other_gains) / len(other_gains),
            membership_auc=sum(wins) / len(wins),
            num_long_texts=len(self._long_texts(texts)),
            extraction_rate=self.extraction_rate(texts, prefix),
            extraction_rate_without=self.extraction_rate(texts, None),
            exposure_bits=exposure,
        )

    def losses(self, texts: Sequence[str], prefix: Prefix | None) -> list[float]:
        """Nats per token of the first 256 tokens of each text."""
        return [loss / count for loss, count in losses_of_texts(self._frozen, texts, prefix)]

    def _long_texts(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """The first tokens of the texts that are long enough, with what is read before them."""
        if self._frozen.is_encoder_decoder:
            return []
        num_tokens = _CONTEXT_TOKENS + _EXTRACTED_TOKENS
        examples = [first_tokens(self._frozen, text) for text in texts]
        return [(*prompt, *ids[:num_tokens]) for prompt, ids in examples if len(ids) >= num_tokens]

    def extraction_rate(self, texts: Sequence[str], prefix: Prefix | None) -> float | None:
        """Share of the long texts whose continuation is generated exactly; None without any."""
        rows = self._long_texts(texts)
        if not rows:
            return None
        num_extracted = 0
        for at in range(0, len(rows), _BATCH_SIZE):
            ids = torch.tensor(rows[at : at + _BATCH_SIZE], device=self._frozen.device)
            context = ids[:, :-_EXTRACTED_TOKENS]
            parts = [[] if prefix is None else [Part(prefix)] for _ in ids]
            batch = self._frozen.assemble(parts)
            with torch.no_grad(), self._frozen.exclusive(), self._frozen.attached(batch):
                generated = self._frozen.model.generate(  # type: ignore[operator]
                    input_ids=context,
                    attention_mask=torch.ones_like(context),
                    generation_config=neutral_config(
                        self._frozen,
                        max_new_tokens=_EXTRACTED_TOKENS,
                        min_new_tokens=_EXTRACTED_TOKENS,
                    ),
                )
            num_extracted += int((generated == ids).all(dim=1).sum())
        return num_extracted / len(rows)

    def _gains(self, texts: Sequence[str], prefix: Prefix) -> list[float]:
        """Nats per token by which the prefix improves each text."""
        both = zip(self.losses(texts, None), self.losses(texts, prefix), strict=True)
        return [without - with_prefix for without, with_prefix in both]

    def _exposure(
        self,
        texts: Sequence[str],
        num_canaries: int,
        retrain: Callable[[list[str]], Prefix],
        seed: int,
    ) -> float:
        rng = random.Random(seed)
        secrets = [_canary(rng) for _ in range(num_canaries)]
        planted = rng.sample([*texts, *secrets], len(texts) + len(secrets))
        prefix = retrain(planted)
        bits = []
        for secret in secrets:
            candidates = [secret, *(_canary(rng) for _ in range(_NUM_ALTERNATIVES))]
            losses = self.losses(candidates, prefix)
            below = sum(loss < losses[0] for loss in losses[1:])
            rank = 1 + below + sum(loss == losses[0] for loss in losses[1:]) / 2
            bits.append(math.log2(len(candidates)) - math.log2(rank))
        return sum(bits) / len(bits)


def _canary(rng: random.Random) -> str:
    digits = " ".join(str(rng.randrange(10)) for _ in range(_CANARY_DIGITS))
    return f"The number that I must not tell is {digits}."
