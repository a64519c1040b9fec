"""Rows on which the model should stay as it is without the prefixes that are trained."""

import random
from collections.abc import Sequence

import torch
from accelerate.utils import broadcast_object_list

from controlprefix.data.general import general_prompts
from controlprefix.errors import TrainingDataError
from controlprefix.model import FrozenModel
from controlprefix.model.neutral_generation import neutral_config
from controlprefix.model.padding import pad_rows
from controlprefix.request import Request
from controlprefix.training.objectives import TrainingRow

_MAX_TOKENS = 32
_NUM_FREE_TEXTS = 16
_BATCH_SIZE = 16


def off_context_rows(
    frozen: FrozenModel, rows: Sequence[TrainingRow], share: float, seed: int
) -> list[TrainingRow]:
    """Rows of general prompts, with the model's own answers, under the prefixes of other rows.

    The teacher of each is the same model without the prefixes that are trained.

    Args:
        frozen: The model.
        rows: The training rows.
        share: The new rows' share of all target tokens.
        seed: Seed of the sampling and of which prefixes they get.

    Raises:
        TrainingDataError: If the model is an encoder-decoder.
    """
    if frozen.is_encoder_decoder:
        raise TrainingDataError("off_context needs a decoder-only model; leave it out")
    budget = share / (1 - share) * sum(len(row.targets) for row in rows)
    tokenizer = frozen.request_tokenizer
    texts = [*general_prompts(measuring=False), *[""] * _NUM_FREE_TEXTS]
    rng = random.Random(seed)
    rng.shuffle(texts)
    prompts = [tokenizer.prompt_ids(Request(prompt=text, raw=not text)) for text in texts]
    result: list[TrainingRow] = []
    for first in range(0, len(prompts), _BATCH_SIZE):
        batch = prompts[first : first + _BATCH_SIZE]
        for prompt, answer in zip(batch, _answers(frozen, batch, seed + first), strict=True):
            if budget <= 0:
                return result
            if answer:
                like = rng.choice(rows)
                result.append(like._replace(prompt=prompt, targets=answer, teacher=prompt))
                budget -= len(answer)
    # More than all answers together: the same answers under other prefixes.
    answered = list(result)
    while budget > 0 and answered:
        row, like = rng.choice(answered), rng.choice(rows)
        result.append(row._replace(frozen_parts=like.frozen_parts, learned=like.learned))
        budget -= len(row.targets)
    return result


@torch.no_grad()
def _answers(
    frozen: FrozenModel, prompts: Sequence[Sequence[int]], seed: int
) -> list[tuple[int, ...]]:
    """What the plain model samples after prompts, with the end token."""
    ids, mask = pad_rows(prompts, frozen.pad_id, left=True)
    with torch.random.fork_rng(devices=[frozen.device] if frozen.device.type == "cuda" else []):
        torch.manual_seed(seed)
        with frozen.exclusive():
            output = frozen.model.generate(  # type: ignore[operator]
                input_ids=ids.to(frozen.device),
                attention_mask=mask.to(frozen.device),
                generation_config=neutral_config(
                    frozen, max_new_tokens=_MAX_TOKENS, do_sample=True, temperature=1.0, top_k=0
                ),
            )
    ends = set(frozen.request_tokenizer.end_ids)
    answers = []
    for new in output[:, ids.shape[1] :].tolist():
        length = next((i + 1 for i, token in enumerate(new) if token in ends), len(new))
        answers.append(tuple(new[:length]))
    return list(broadcast_object_list([answers])[0])  # processes must have the same rows
