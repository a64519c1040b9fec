"""Best-of-n: the generated texts that a reward prefers, as examples to train on."""

import math
from collections.abc import Mapping
from itertools import pairwise

from controlprefix.data import Rows, as_requests
from controlprefix.engine import ControlPrefix
from controlprefix.errors import RequestError
from controlprefix.evaluation.metrics import words_of
from controlprefix.evaluation.rewards import requested_labels
from controlprefix.example import Example
from controlprefix.training import Reward
from controlprefix.training.policy import rewards_of

_SHARED_FIELDS = (
    "prompt", "messages", "prompt_ids", "images", "raw", "chat_template_kwargs", "task", "user",
    "source_language", "target_language", "continue_final_message",
)  # fmt: skip


def best_texts(
    cp: ControlPrefix,
    requests: Rows,
    reward: Reward,
    *,
    num_samples: int = 16,
    keep: int = 4,
    diversity: float = 0.0,
    batch_size: int = 32,
    seed: int = 0,
) -> list[Example]:
    """Sample texts for requests, and keep those of each request with the highest reward.

    The examples name what the requests name, at strength 1 and attended side by side, whatever
    strengths and mixing the requests have. So prefixes that are trained on them (`cp.train` with
    `init="stored"`) learn to do in one row what the requests do in several.

    Args:
        cp: With the prefixes that the requests name.
        requests: Such as one per combination of labels, with `mixing="logits"`, in any form (see
            `controlprefix.data.as_requests`). Those that are greedy are sampled at temperature 1.
        reward: Scores texts, higher is better.
        num_samples: Texts per request.
        keep: How many of them to keep, at most.
        diversity: Weight of the share of a text's pairs of neighbouring words that no text kept
            before has, in units of the reward; texts are then kept one by one (maximal marginal
            relevance). 0 keeps those with the highest reward, which often begin alike.
        batch_size: Requests of a batch.
        seed: Seed of the samples.

    Returns:
        The best texts of each request that are neither empty nor the same, in the order in which
        they were kept: without `diversity`, the best one first. Those that were cut at
        `max_new_tokens` teach no end.

    Raises:
        RequestError: If `keep` is below 1, or above `num_samples`, or `diversity` below 0.
        UnknownNameError: If a request names something that is not stored.

    Reference:
        Rejection sampling before fine-tuning, as in RAFT: Dong et al., 2023,
        https://arxiv.org/abs/2304.06767. Carbonell & Goldstein, "The use of MMR, diversity-based
        reranking", 1998, https://doi.org/10.1145/290941.291025.
    """
    if not 1 <= keep <= num_samples:
        raise RequestError(f"keep is {keep}; it must be between 1 and {num_samples}, the samples")
    if not 0 <= diversity < math.inf:
        raise RequestError(f"diversity is {diversity}; it must be a number from 0")
    requests = cp.with_default_labels(as_requests(requests))
    rows = []
    for i, request in enumerate(requests):
        request.require_sampling(i + 1)
        changes = {} if request.do_sample else {"temperature": 1.0}
        rows += [
            request.model_copy(update={**changes, "seed": seed + i * num_samples + k})
            for k in range(num_samples)
        ]
    completions = cp.generate(rows, batch_size=batch_size)
    texts = [completion.text.strip() for completion in completions]
    rewards = rewards_of(reward, rows, texts)
    examples, kept_pairs = [], set[tuple[str, str]]()
    for i, request in enumerate(requests):
        own = slice(i * num_samples, (i + 1) * num_samples)
        pairs = zip(texts[own], completions[own], strict=True)
        whole = {text for text, completion in pairs if completion.finish_reason == "stop"}
        by_text = dict(zip(texts[own], rewards[own], strict=True))
        by_text.pop("", None)
        fields = {name: getattr(request, name) for name in _SHARED_FIELDS}
        named = {name: value for name, value in fields.items() if name in request.model_fields_set}
        labels = dict(requested_labels(request))
        examples += [
            Example(**named, attributes=labels, completion=text, is_whole=text in whole)
            for text in _select(by_text, keep, diversity, kept_pairs)
        ]
    return examples


def _select(
    rewards: Mapping[str, float], keep: int, diversity: float, kept_pairs: set[tuple[str, str]]
) -> list[str]:
    """Choose texts one by one, by reward and by what they add to `kept_pairs`, which grows."""
    left = {text: _word_pairs(text) for text in rewards}

    def value(text: str) -> float:
        new = len(left[text] - kept_pairs) / max(1, len(left[text]))
        return rewards[text] + diversity * new

    selected: list[str] = []
    while left and len(selected) < keep:
        best = max(left, key=value)
        selected.append(best)
        kept_pairs |= left.pop(best)
    return selected


def _word_pairs(text: str) -> set[tuple[str, str]]:
    """The pairs of neighbouring words, with the beginning as a word: texts may begin alike."""
    return set(pairwise(["", *words_of(text)]))
