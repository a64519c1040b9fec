"""Training objectives: next token, contrast between labels, and distillation."""

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.functional import softplus

from controlprefix.model import FrozenModel
from controlprefix.model.images import ImagePrompt
from controlprefix.model.languages import TargetedPrompt
from controlprefix.model.log_probs import chunked_losses, kl_divergences, target_logits
from controlprefix.model.tokenization import TokenizedExample
from controlprefix.prefixes import Part, Prefix, PrefixBatch, PrefixKey
from controlprefix.request import Request

if TYPE_CHECKING:
    from controlprefix.training.parameterization import TrainablePrefixes


Gather = Callable[[Sequence[float]], list[float]]


class Rejected(NamedTuple):
    """The other completion of a preference.

    Attributes:
        targets: Token ids of the rejected completion, with the end token.
        reference_margin: By how much the reference finds the chosen completion more likely, in
            nats.
    """

    targets: Sequence[int]
    reference_margin: float


class Rollout(NamedTuple):
    """What is known of a sampled completion.

    Attributes:
        advantage: Its reward minus the mean reward of the other samples of its request.
        num_demonstrated: Tokens at its start that were not sampled but demonstrated.
    """

    advantage: float
    num_demonstrated: int = 0


class TrainingRow(NamedTuple):
    """One training row.

    Attributes:
        prompt: Token ids of the prompt.
        targets: Token ids to learn, with the end token.
        frozen_parts: Parts that are not trained.
        learned: Keys of the prefixes that are trained, with their strengths.
        teacher: For distillation and `off_context`: what the same model reads instead of the
            prompt and the trained parts.
        rejected: For preferences: the completion that the targets are preferred to.
        request: For reinforcement learning: what to sample targets for.
        rollout: For reinforcement learning: that the targets were sampled.
    """

    prompt: Sequence[int]
    targets: Sequence[int]
    frozen_parts: Sequence[Part]
    learned: Sequence[tuple[PrefixKey, float]]
    teacher: Sequence[int] | None = None
    rejected: Rejected | None = None
    request: Request | None = None
    rollout: Rollout | None = None

    @property
    def prompt_identity(self) -> list[Any]:
        """The prompt as JSON: its ids, a hash of its images, and what its decoder starts from."""
        identity: list[Any] = [list(self.prompt)]
        if isinstance(self.prompt, ImagePrompt):
            identity.append(self.prompt.digest)
        if isinstance(self.prompt, TargetedPrompt):
            identity.append(list(self.prompt.start_ids))
        return identity

    @classmethod
    def from_example(
        cls,
        example: TokenizedExample,
        end_id: int | None,
        frozen_parts: Sequence[Part],
        learned: Sequence[tuple[PrefixKey, float]],
    ) -> Self:
        """The row of an example, which teaches the end of a whole completion too."""
        end = (end_id,) if end_id is not None and example.is_whole else ()
        return cls(example.prompt, (*example.completion, *end), frozen_parts, learned)

    def parts(self, prefixes: Mapping[PrefixKey, Prefix]) -> list[Part]:
        """The frozen parts and the trained ones, with the slots that these have at present."""
        return [
            *self.frozen_parts,
            *(Part(prefixes[key], strength) for key, strength in self.learned),
        ]

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt and of the longest completion."""
        rejected = self.rejected.targets if self.rejected else ()
        return len(self.prompt) + max(len(self.targets), len(rejected))


class ContrastPair(NamedTuple):
    """A row, and the same row under another label of one of its attributes, if any."""

    row: TrainingRow
    other: TrainingRow | None = None


class Objective:
    """Computes the loss of rows, with gradients.

    Args:
        frozen: The model.
        contrast: See `TrainingSettings`.
        beta, likelihood_weight, reference: See `PreferenceSettings`; they apply to rows with a
            rejected completion, which have the reference's margins.
    """

    def __init__(
        self,
        frozen: FrozenModel,
        *,
        contrast: float = 0.0,
        beta: float = 0.1,
        likelihood_weight: float = 0.0,
        reference: str = "",
    ) -> None:
        self._frozen = frozen
        self._contrast = contrast
        self._beta = beta
        self._likelihood_weight = likelihood_weight
        self._reference = reference
        self._margins: list[float] = []

    def expand(
        self,
        pairs: Sequence[ContrastPair],
        prefixes: "TrainablePrefixes",
        seed: int,
        fraction_done: float = 0.0,
    ) -> list[ContrastPair]:
        """What a step computes losses of, from the pairs that the run has drawn for it.

        Args:
            pairs: One per row of the step.
            prefixes: What is trained, at its current step.
            seed: Seed of the step.
            fraction_done: Share of the run's steps that are done, 0 to 1.
        """
        return list(pairs)

    def take_metrics(self, gather: Gather = list) -> dict[str, float]:
        """Figures of the losses since the last call, by name.

        Args:
            gather: From what this process has to what all have.
        """
        margins, self._margins = gather(self._margins), []
        if not margins:
            return {}
        return {"accuracy": fmean(m > 0 for m in margins), "margin": fmean(margins)}

    def other_keys(self) -> set[PrefixKey]:
        """Keys of prefixes that rows of the objective's own train, beside those of the run."""
        return set()

    def identity(self) -> Any:
        """What must be equal, beside rows and settings, for a run to be resumed; as JSON."""
        reference = [self._reference] if self._reference else []
        return [self._beta, self._likelihood_weight, *reference]

    def assemble(
        self, pairs: Sequence[ContrastPair], prefixes: Mapping[PrefixKey, Prefix]
    ) -> PrefixBatch:
        """The prefix batch of pairs: first each pair's row, then the contrasted rows."""
        rows = [*(pair.row for pair in pairs), *_others(pairs)]
        return self._frozen.assemble([row.parts(prefixes) for row in rows])

    def __call__(self, pairs: Sequence[ContrastPair]) -> Tensor:
        """The loss of each pair in nats, summed over its targets, `(num_pairs,)`.

        The prefix batch of `assemble` must be attached to the model.

        The loss is the negative log-likelihood of the targets; for distillation, the KL
        divergence from the teacher's predictions; with contrast c, (1 - c) of the negative
        log-likelihood plus c of softplus(m_other - m_own) per token, where m is the mean
        log-probability of the targets under a label. With a rejected completion it is
        softplus(-beta (margin - reference margin)) per token, where a margin is the
        log-likelihood of the chosen completion minus that of the rejected one, plus the
        weighted negative log-likelihood of the chosen one.

        Reference:
            Qian et al., "Controllable Natural Language Generation with Contrastive
            Prefixes", 2022, https://arxiv.org/abs/2202.13257, with one other label per row;
            Rafailov et al., "Direct Preference Optimization", 2023,
            https://arxiv.org/abs/2305.18290.
        """
        rows = [pair.row for pair in pairs]
        others = _others(pairs)
        sums = self._sums([*rows, *others])
        own_sums, other_sums = sums[: len(rows)], iter(sums[len(rows) :])
        losses = []
        for pair, own in zip(pairs, own_sums, strict=True):
            num_targets = len(pair.row.targets)
            if pair.row.rejected is not None:
                margin = own - next(other_sums) - pair.row.rejected.reference_margin
                self._margins.append(float(margin.detach()))
                likelihood = self._likelihood_weight * -own
                losses.append(num_targets * softplus(-self._beta * margin) + likelihood)
                continue
            if pair.other is None:
                losses.append(-own)
                continue
            contrast = num_targets * softplus((next(other_sums) - own) / num_targets)
            losses.append((1 - self._contrast) * -own + self._contrast * contrast)
        return torch.stack(losses)

    def _sums(self, rows: Sequence[TrainingRow]) -> Tensor:
        """Per row, the log-likelihood of its targets, or minus the divergence of its teacher."""
        logits, target_ids, _ = target_logits(
            self._frozen, [row.prompt for row in rows], [row.targets for row in rows]
        )
        lengths = [len(row.targets) for row in rows]
        taught = [row for row in rows if row.teacher is not None]
        if not taught:
            losses = chunked_losses(logits, target_ids)
        else:
            is_taught = torch.tensor([row.teacher is not None for row in rows])
            at = is_taught.repeat_interleave(torch.tensor(lengths)).to(logits.device)
            losses = logits.new_zeros(len(logits), dtype=torch.float32)
            losses = losses.masked_scatter(at, kl_divergences(logits[at], self._taught(taught)))
            if len(taught) < len(rows):
                losses = losses.masked_scatter(~at, chunked_losses(logits[~at], target_ids[~at]))
        return -torch.stack([part.sum() for part in losses.split(lengths)])

    @torch.no_grad()
    def _taught(self, rows: Sequence[TrainingRow]) -> Tensor:
        """The logits of rows' teachers at their targets."""
        with self._frozen.attached(self._frozen.assemble([row.frozen_parts for row in rows])):
            logits, *_ = target_logits(
                self._frozen, [row.teacher or () for row in rows], [row.targets for row in rows]
            )
        return logits


def _others(pairs: Sequence[ContrastPair]) -> list[TrainingRow]:
    """The rejected or contrasted row of each pair that has one, in order."""
    others = []
    for pair in pairs:
        if pair.row.rejected is not None:
            others.append(pair.row._replace(targets=pair.row.rejected.targets))
        elif pair.other is not None:
            others.append(pair.other)
    return others


def add_contrast(
    rows: Sequence[TrainingRow], keys: Collection[PrefixKey], rng: random.Random
) -> list[ContrastPair]:
    """Pair each row with one under another label, drawn from `keys`, where there is one."""
    pairs = []
    for row in rows:
        swaps = [
            (i, other)
            for i, (key, _) in enumerate(row.learned)
            for other in keys
            if key.attribute and key.attribute == other.attribute and key != other
            if row.teacher is None
        ]
        if not swaps:
            pairs.append(ContrastPair(row))
            continue
        i, other = rng.choice(swaps)
        learned = list(row.learned)
        learned[i] = (other, learned[i][1])
        pairs.append(ContrastPair(row, row._replace(learned=learned)))
    return pairs
