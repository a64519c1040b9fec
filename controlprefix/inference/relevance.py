"""Prefixes that apply only to the prompts they are meant for."""

import logging
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from controlprefix.data.general import general_prompts
from controlprefix.embeddings import DEFAULT_EMBEDDER, embed, require_trusted
from controlprefix.errors import RequestError, TrainingDataError
from controlprefix.prefixes import Prefix, PrefixKey, Relevance
from controlprefix.request import Request
from controlprefix.store import StoredVersion

MAX_FALSE_ACCEPTANCE = 0.05  # of prompts that are not meant
_MAX_FALSE_REJECTION = 0.02  # of the prefix's own prompts, for being too far from all of them
_MAX_PROMPTS = 128
_MAX_OTHERS = 64
_MIN_PROMPTS = 8
_HELD_OUT = 0.2
_log = logging.getLogger("controlprefix")


class LearnedRelevance(NamedTuple):
    """What was learned about the prompts that a prefix is meant for.

    Attributes:
        accepted: Share of held-out own prompts that are accepted.
        version: The version of the prefix that has it.
    """

    accepted: float
    version: int


def learn_relevance(
    prompts: Sequence[str], others: Sequence[str] = (), *, seed: int = 0
) -> tuple[Relevance, float]:
    """Choose prompts to compare with, and how near to them a prompt must be.

    A prompt is accepted if (1) its similarity to the prefix's own prompts is at least the 2 %
    quantile of their leave-one-out similarities, and (2) its lead over other prompts exceeds a
    threshold that accepts 5 % of held-out other prompts (split conformal prediction). The bound
    holds for prompts like these only: see docs/results/relevance.md.

    Args:
        prompts: Prompts that the prefix is meant for.
        others: Prompts that it is not meant for, beside general ones.
        seed: Seed of the choice.

    Returns:
        The relevance, and the share of held-out prompts that it accepts.

    Raises:
        TrainingDataError: If there are fewer than 8 different prompts, or one is no text.

    Reference:
        Vovk, Gammerman & Shafer, "Algorithmic Learning in a Random World", 2005.
    """
    for text in (*prompts, *others):
        if not isinstance(text, str):
            raise TrainingDataError(f"a prompt must be a text (str), got {type(text).__name__}")
    own = sorted({text.strip() for text in prompts} - {""})
    if len(own) < _MIN_PROMPTS:
        raise TrainingDataError(
            f"{len(own)} different prompts are too few to tell which ones are meant; give at "
            f"least {_MIN_PROMPTS}"
        )
    rng = random.Random(seed)
    rng.shuffle(own)
    num_held_out = max(1, min(_MAX_PROMPTS, round(_HELD_OUT * len(own))))
    held_out, compared = embed(own[:num_held_out]), embed(own[num_held_out:][:_MAX_PROMPTS])
    neutral = [*general_prompts(measuring=False), *others]
    rng.shuffle(neutral)
    half = min(_MAX_OTHERS, len(neutral) // 2)
    reference, calibration = embed(neutral[:half]), embed(neutral[half:])
    relevance = Relevance(compared, reference, -math.inf, -math.inf, DEFAULT_EMBEDDER)
    leads = sorted(map(relevance.lead, calibration))
    rank = min(len(leads), math.ceil((1 - MAX_FALSE_ACCEPTANCE) * (len(leads) + 1)))
    among_own = sorted(
        replace(relevance, own=torch.cat([compared[:i], compared[i + 1 :]])).similarity(row)
        for i, row in enumerate(compared)
    )
    relevance = replace(
        relevance,
        min_similarity=among_own[int(_MAX_FALSE_REJECTION * len(among_own))],
        min_lead=math.nextafter(leads[rank - 1], math.inf),
    )
    accepted = list(map(relevance.includes, held_out))
    if not any(accepted):
        _log.warning(
            "none of %d held-out prompts would be accepted: the prompts are too unlike each other, "
            "or too like the others",
            len(accepted),
        )
    return relevance, sum(accepted) / len(accepted)


def relevance_of(
    requests: Sequence[Request],
    prefixes: Sequence[Mapping[PrefixKey, StoredVersion]],
    decode: Callable[[Sequence[int]], str],
) -> list[dict[PrefixKey, tuple[float, bool]]]:
    """How similar each request's prompt is to those that its prefixes are meant for.

    Args:
        requests: Requests; those whose `when` is not `relevant` get no similarity.
        prefixes: What each of them names.
        decode: Token ids -> text.

    Returns:
        Per request and prefix, the similarity, and whether the prefix is meant for the prompt.

    Raises:
        RequestError: If no prefix of a request has learned its relevance.
        ControlPrefixError: If a prefix names an embedding model that is not trusted here.
    """
    results: list[dict[PrefixKey, tuple[float, bool]]] = [{} for _ in requests]
    gated: dict[int, dict[PrefixKey, Relevance]] = {}
    for i, request in enumerate(requests):
        if request.when != "relevant":
            continue
        for part in request.named_parts:
            value = prefixes[i][part.key].value
            if isinstance(value, Prefix) and value.relevance is not None:
                gated.setdefault(i, {})[part.key] = value.relevance
        if i not in gated:
            names = ", ".join(str(part.key) for part in request.named_parts) or "no prefix"
            raise RequestError(
                f"when='relevant', but no prefix of the request ({names}) has learned which "
                "prompts it is for; see cp.learn_relevance, or leave when out"
            )
    texts = {i: last_user_text(requests[i], decode) for i in gated}
    for embedder in {r.embedder for own in gated.values() for r in own.values()}:
        require_trusted(embedder, "a prefix")
        ids = [i for i, own in gated.items() if any(r.embedder == embedder for r in own.values())]
        embeddings = embed([texts[i] or " " for i in ids], embedder)
        for i, embedding in zip(ids, embeddings, strict=True):
            for key, relevance in gated[i].items():
                if relevance.embedder == embedder:
                    if relevance.own.shape[1] != len(embedding):
                        raise RequestError(
                            f"{key} has embeddings of {relevance.own.shape[1]} values, {embedder} "
                            f"makes some of {len(embedding)}; learn its relevance again"
                        )
                    is_meant = relevance.includes(embedding)
                    results[i][key] = relevance.similarity(embedding), is_meant
    return results


def last_user_text(request: Request, decode: Callable[[Sequence[int]], str]) -> str:
    """The prompt, or the last message of the user."""
    if request.prompt_ids is not None:
        return decode(request.prompt_ids)
    if request.messages is None:
        return request.prompt or ""
    texts = [m.content for m in request.messages if m.role == "user"]
    return texts[-1] if texts else request.messages[-1].content
