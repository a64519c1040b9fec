"""Reinforcement learning: prefixes learn from rewards of the texts that they produce."""

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from statistics import fmean
from typing import Any, Protocol

import torch
from torch import Tensor

from controlprefix.completion import PartUsed
from controlprefix.errors import TrainingDataError
from controlprefix.inference.resolved_request import ResolvedPart, ResolvedRequest
from controlprefix.inference.static_generation import batches_of, generate_tokens
from controlprefix.inference.stopping import completion_from_tokens, first_stop
from controlprefix.model import FrozenModel
from controlprefix.model.images import followed_by
from controlprefix.model.log_probs import chunked_losses, kl_divergences, target_logits
from controlprefix.model.neutral_generation import neutral_config
from controlprefix.prefixes import Part, Prefix, PrefixKey
from controlprefix.processes import in_main_process
from controlprefix.request import Request
from controlprefix.training.objectives import (
    ContrastPair,
    Gather,
    Objective,
    Rollout,
    TrainingRow,
)
from controlprefix.training.parameterization import TrainablePrefixes
from controlprefix.training.settings import PolicySettings

_MAX_ROWS_PER_BATCH = 64  # samples that are generated at a time
# As in Prefix-RFT: the longest part of a demonstration, and its share of tokens with a gradient.
MAX_DEMONSTRATED = 0.95
UNCERTAIN_SHARE = 0.2


class Reward(Protocol):
    """Scores texts; see `controlprefix.evaluation.rewards` for ready ones."""

    def __call__(self, requests: Sequence[Request], texts: Sequence[str]) -> Sequence[float]:
        """A number per text, higher is better.

        Args:
            requests: What each text was generated for.
            texts: Generated texts, without the end token.
        """


class PolicyObjective(Objective):
    """Policy gradient with leave-one-out advantages, beside the likelihood of demonstrations.

    For each request of a step, completions are sampled under the prefixes as they are. The
    loss of a completion with advantage A, its reward minus the mean reward of the request's
    other samples, is -A times its log-likelihood, plus `kl` times the divergence of the
    next-token distributions from the reference, both summed over its tokens.

    With `demonstrated`, one sample of some groups starts with the first part of a demonstration,
    which becomes shorter in the course of the run; of that part only the tokens that the model
    is least certain of have a gradient.

    Args:
        frozen: The model.
        settings: Hyperparameters.
        reward: Scores sampled texts.
        initial: The prefixes at the run's start.
        demonstrations: Rows with targets; each step takes as many as it has requests.

    Raises:
        TrainingDataError: While training, if the reward is no finite number per text.

    Reference:
        Ahmadian et al., "Back to Basics: Revisiting REINFORCE Style Optimization", 2024,
        https://arxiv.org/abs/2402.14740, with the divergence as a loss, over the vocabulary;
        Huang et al., "Blending Supervised and Reinforcement Fine-Tuning with Prefix Sampling",
        2025, https://arxiv.org/abs/2507.01679, for demonstrated parts.
    """

    def __init__(
        self,
        frozen: FrozenModel,
        settings: PolicySettings,
        reward: Reward,
        initial: Mapping[PrefixKey, Prefix],
        demonstrations: Sequence[TrainingRow] = (),
    ) -> None:
        super().__init__(frozen)
        self._settings = settings
        self._reward = reward
        self._initial = initial
        self._demonstrations = demonstrations
        self._metrics: dict[str, float] = {}
        self._divergences: list[float] = []

    def other_keys(self) -> set[PrefixKey]:
        """Those of the demonstrations, if they are learned from."""
        if not (self._settings.demonstration_weight or self._settings.demonstrated):
            return set()
        return {key for row in self._demonstrations for key, strength in row.learned if strength}

    def identity(self) -> Any:
        """The settings and the demonstrations."""
        rows = [
            (row.prompt_identity, list(row.targets), [(tuple(k), s) for k, s in row.learned])
            for row in self._demonstrations
        ]
        return {**asdict(self._settings), "demonstrations": rows}

    def take_metrics(self, gather: Gather = list) -> dict[str, float]:
        """Reward, divergence, length and diversity of the last step's samples."""
        metrics, divergences = dict(self._metrics), gather(self._divergences)
        if metrics and divergences:
            metrics["kl"] = fmean(divergences)
        self._metrics, self._divergences = {}, []
        return metrics

    def expand(
        self,
        pairs: Sequence[ContrastPair],
        prefixes: TrainablePrefixes,
        seed: int,
        fraction_done: float = 0.0,
    ) -> list[ContrastPair]:
        """Sampled completions of each request, and demonstrations."""
        rng = random.Random(seed)
        count = self._settings.num_samples
        requests = [pair.row for pair in pairs]
        expected = self._settings.demonstrated * len(requests)
        num_demonstrated = int(expected + rng.random()) if expected else 0
        if num_demonstrated and self._demonstrations:
            requests[:num_demonstrated] = rng.choices(self._demonstrations, k=num_demonstrated)
        rows = [row for row in requests for _ in range(count)]
        demonstrated_ids: list[Sequence[int]] = [()] * len(rows)
        for row, at in zip(requests, range(0, len(rows), count), strict=True):
            if row.targets:
                shortest = MAX_DEMONSTRATED * (1 + math.cos(math.pi * fraction_done)) / 2
                length = int(rng.uniform(shortest, MAX_DEMONSTRATED) * len(row.targets))
                demonstrated_ids[at] = row.targets[:length]
        keys = {key for row in rows for key, _ in row.learned}
        with torch.no_grad():
            values = prefixes.prefixes(keys)

        def sample() -> tuple[list[tuple[Sequence[int], str]], list[float], Any]:
            completions = self._sample(rows, demonstrated_ids, values, rng)
            requested = [row.request for row in rows if row.request is not None]
            rewards = rewards_of(self._reward, requested, [text for _, text in completions])
            return completions, rewards, rng.getstate()

        # Others might sample and score differently, and each trains on its share of the rows.
        completions, rewards, state = in_main_process(sample)
        rng.setstate(state)
        novelty = distinct_shares([tokens for tokens, _ in completions])
        totals = [
            reward + self._settings.diversity * share
            for reward, share in zip(rewards, novelty, strict=True)
        ]
        lengths = [len(tokens) for tokens, _ in completions]
        self._metrics = {
            "reward": fmean(rewards),
            "diversity": fmean(novelty),
            "length": fmean(lengths),
        }
        expanded = []
        for at in range(0, len(rows), count):
            group = totals[at : at + count]
            for i, total in enumerate(group):
                advantage = total - (sum(group) - total) / (count - 1)
                row = rows[at + i]._replace(
                    targets=completions[at + i][0],
                    rollout=Rollout(advantage, len(demonstrated_ids[at + i])),
                )
                expanded.append(ContrastPair(row))
        if self._demonstrations and self._settings.demonstration_weight:
            num_demonstrations = min(len(pairs), len(self._demonstrations))
            expanded += map(
                ContrastPair, rng.sample(list(self._demonstrations), num_demonstrations)
            )
        return expanded

    def __call__(self, pairs: Sequence[ContrastPair]) -> Tensor:
        """The loss of each sampled completion and of each demonstration, `(num_pairs,)`."""
        rows = [pair.row for pair in pairs]
        targets = [row.targets for row in rows]
        logits, target_ids, _ = target_logits(self._frozen, [row.prompt for row in rows], targets)
        log_probs = -chunked_losses(logits, target_ids)
        divergences = torch.zeros_like(log_probs)
        rollouts = torch.tensor(
            [row.rollout is not None for row in rows for _ in row.targets], device=logits.device
        )
        sampled = rollouts & torch.tensor(
            [
                i >= (row.rollout.num_demonstrated if row.rollout else 0)
                for row in rows
                for i in range(len(row.targets))
            ],
            device=logits.device,
        )
        if self._settings.kl and sampled.any():
            reference = self._reference_logits([row for row in rows if row.rollout])
            divergences = divergences.masked_scatter(
                sampled, kl_divergences(reference[sampled[rollouts]], logits[sampled])
            )
            self._divergences += divergences[sampled].detach().tolist()
        lengths = [len(target) for target in targets]
        losses = []
        for row, own, own_divergences, own_logits in zip(
            rows,
            log_probs.split(lengths),
            divergences.split(lengths),
            logits.detach().split(lengths),
            strict=True,
        ):
            if row.rollout is None:
                losses.append(-self._settings.demonstration_weight * own.sum())
                continue
            if row.rollout.num_demonstrated:
                own = own * _uncertain(own_logits, row.rollout.num_demonstrated)
            loss = -row.rollout.advantage * own.sum() + self._settings.kl * own_divergences.sum()
            losses.append(loss / self._settings.num_samples)
        return torch.stack(losses)

    def _sample(
        self,
        rows: Sequence[TrainingRow],
        demonstrated_ids: Sequence[Sequence[int]],
        prefixes: Mapping[PrefixKey, Prefix],
        rng: random.Random,
    ) -> list[tuple[Sequence[int], str]]:
        """A completion of each row's request: its token ids with the end token, and its text.

        Args:
            rows: With requests.
            demonstrated_ids: Token ids that each completion starts with.
            prefixes: The trained prefixes as they are.
            rng: Gives seeds.
        """
        resolved = []
        for row, begun in zip(rows, demonstrated_ids, strict=True):
            assert row.request is not None
            request = row.request.model_copy(
                update={
                    # What is learned from is the model's own distribution.
                    "temperature": 1.0, "top_k": None, "top_p": None, "min_p": None,
                    "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
                    "logit_bias": {}, "json_schema": None,
                    "seed": rng.randrange(1 << 62),
                    "max_new_tokens": max(1, row.request.max_new_tokens - len(begun)),
                }
            )  # fmt: skip
            used = PartUsed(kind="task", name="", version=0, strength=1.0)
            resolved.append(
                ResolvedRequest(
                    request, tuple(ResolvedPart(used, part) for part in row.parts(prefixes))
                )
            )
        tokenizer = self._frozen.request_tokenizer
        completions: dict[int, tuple[Sequence[int], str]] = {}
        requests = [request.request for request in resolved]
        row_prompts = [row.prompt for row in rows]
        for batch in batches_of(self._frozen, requests, row_prompts, _MAX_ROWS_PER_BATCH):
            prompts = [followed_by(row_prompts[i], demonstrated_ids[i]) for i in batch]
            own = [resolved[i] for i in batch]
            longest = max(request.request.max_new_tokens for request in own)
            config = neutral_config(self._frozen, max_new_tokens=longest)
            results = generate_tokens(self._frozen, own, prompts, config=config)
            for i, prompt, new in zip(batch, prompts, results, strict=True):
                if new is None:
                    raise TrainingDataError(
                        "the model's logits became NaN while sampling; nothing was stored; lower "
                        "learning_rate"
                    )
                completion = completion_from_tokens(
                    tokenizer, resolved[i].request, prompt, list(new)
                )
                own_new = new[: completion.num_tokens]
                stop = resolved[i].request.stop
                # The end token is learned as well where it was sampled: what is behind a stop text
                # or a row's limit is padding.
                ended = (
                    completion.finish_reason == "stop"
                    and first_stop(tokenizer.decode(own_new), stop) is None
                )
                tokens = new[: completion.num_tokens + ended] or new[:1]
                text = completion.text
                if demonstrated_ids[i]:
                    text = tokenizer.decode([*demonstrated_ids[i], *own_new])
                    text = text[: first_stop(text, stop)]
                completions[i] = (*demonstrated_ids[i], *tokens), text
        return [completions[i] for i in range(len(rows))]

    def _reference_logits(self, rows: Sequence[TrainingRow]) -> Tensor:
        parts: list[Sequence[Part]] = [row.frozen_parts for row in rows]
        if self._settings.reference == "start":
            parts = [row.parts(self._initial) for row in rows]
        with torch.no_grad(), self._frozen.attached(self._frozen.assemble(parts)):
            logits, *_ = target_logits(
                self._frozen, [row.prompt for row in rows], [row.targets for row in rows]
            )
        return logits


def _uncertain(logits: Tensor, num_demonstrated: int) -> Tensor:
    """1 per token, but 0 for the demonstrated ones that the model is more certain of.

    Args:
        logits: At the tokens of one completion, `(num_tokens, vocab_size)`.
        num_demonstrated: How many of them, from the first, were demonstrated.
    """
    log_probs = logits[:num_demonstrated].float().log_softmax(1)
    entropies = -(log_probs.exp() * log_probs).sum(1)
    count = math.ceil(UNCERTAIN_SHARE * num_demonstrated)
    weights = torch.ones(len(logits), device=logits.device)
    weights[:num_demonstrated] = 0
    weights[entropies.topk(count).indices] = 1
    return weights


def distinct_shares(samples: Sequence[Sequence[int]]) -> list[float]:
    """Per sample, the share of its bigrams that no other sample has; 1 if it has none.

    Example:
        >>> distinct_shares([[1, 2, 3], [1, 2, 4]])
        [0.5, 0.5]
    """
    bigrams = [set(pairwise(tokens)) for tokens in samples]
    counts = Counter(bigram for own in bigrams for bigram in own)
    return [
        sum(counts[bigram] == 1 for bigram in own) / len(own) if own else 1.0 for own in bigrams
    ]


def rewards_of(reward: Reward, requests: Sequence[Request], texts: Sequence[str]) -> list[float]:
    """A reward's number for each text.

    Raises:
        TrainingDataError: If it gives anything but a finite number for each.
    """
    values = reward(requests, texts)
    try:
        rewards = [float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise TrainingDataError(
            f"the reward gave {str(values)[:80]!r}; give a list with a number for each text"
        ) from error
    if len(rewards) != len(texts):
        raise TrainingDataError(
            f"the reward gave {len(rewards)} numbers for {len(texts)} texts; give one each"
        )
    for text, value in zip(texts, rewards, strict=True):
        if not math.isfinite(value):
            raise TrainingDataError(f"the reward of {text[:80]!r} is {value}; give a number")
    return rewards
