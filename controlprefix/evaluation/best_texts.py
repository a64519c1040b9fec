"""Best-of-n: the generated texts that a reward prefers, as examples to train on."""

from collections.abc import Sequence

from controlprefix.engine import ControlPrefix
from controlprefix.errors import RequestError
from controlprefix.evaluation.rewards import requested_labels
from controlprefix.example import Example
from controlprefix.request import Request
from controlprefix.training import Reward
from controlprefix.training.policy import rewards_of

_SHARED_FIELDS = (
    "prompt", "messages", "prompt_ids", "images", "raw", "chat_template_kwargs", "task", "user",
    "source_language", "target_language", "continue_final_message",
)  # fmt: skip


def best_texts(
    cp: ControlPrefix,
    requests: Sequence[Request],
    reward: Reward,
    *,
    num_samples: int = 16,
    keep: int = 4,
    batch_size: int = 32,
    seed: int = 0,
) -> list[Example]:
    """Sample texts for requests, and keep those of each request with the highest reward.

    The examples name what the requests name, at strength 1 and attended side by side, whatever
    strengths and mixing the requests have. So prefixes that are trained on them (`cp.train` with
    `init="stored"`) learn to do in one row what the requests do in several.

    Args:
        cp: With the prefixes that the requests name.
        requests: Such as one per combination of labels, with `mixing="logits"`. Those that are
            greedy are sampled at temperature 1.
        reward: Scores texts, higher is better.
        num_samples: Texts per request.
        keep: How many of them to keep, at most.
        batch_size: Rows of a batch.
        seed: Seed of the samples.

    Returns:
        The best texts of each request that are neither empty nor the same, the best one first.

    Raises:
        RequestError: If `keep` is below 1, or above `num_samples`.
        UnknownNameError: If a request names something that is not stored.

    Reference:
        Rejection sampling before fine-tuning, as in RAFT: Dong et al., 2023,
        https://arxiv.org/abs/2304.06767.
    """
    if not 1 <= keep <= num_samples:
        raise RequestError(f"keep is {keep}; it must be between 1 and {num_samples}, the samples")
    rows = []
    for i, request in enumerate(requests):
        changes = {} if request.samples else {"temperature": 1.0}
        rows += [
            request.model_copy(update={**changes, "seed": seed + i * num_samples + k})
            for k in range(num_samples)
        ]
    texts = [completion.text.strip() for completion in cp.generate(rows, batch_size=batch_size)]
    rewards = rewards_of(reward, rows, texts)
    examples = []
    for i, request in enumerate(requests):
        own = range(i * num_samples, (i + 1) * num_samples)
        best = sorted(own, key=lambda k: rewards[k], reverse=True)
        different = [text for text in dict.fromkeys(texts[k] for k in best) if text]
        fields = {name: getattr(request, name) for name in _SHARED_FIELDS}
        named = {name: value for name, value in fields.items() if name in request.model_fields_set}
        labels = dict(requested_labels(request))
        examples += [
            Example(**named, attributes=labels, completion=text) for text in different[:keep]
        ]
    return examples
