"""Strengths folded into keys, for engines whose attention takes no bias per slot.

Strength `w` adds `log w` to the attention logits of a prefix's slots. Adding a vector to a key adds
its dot product with each query to that query's logit. So per layer and kv head one vector is fitted
by least squares, whose dot products with the queries of query texts are 1; adding `log w` times
that vector to the keys is nearly strength `w`.
"""

import math
import threading
from collections.abc import Sequence
from functools import cached_property

import torch
from cachetools import LRUCache
from torch import Tensor

from controlprefix.data.general import general_prompts
from controlprefix.errors import RequestError
from controlprefix.model.attention_matching import key_shift
from controlprefix.model.frozen import FrozenModel
from controlprefix.model.log_probs import kl_divergences, target_logits
from controlprefix.model.neutral_generation import neutral_config
from controlprefix.model.padding import pad_rows
from controlprefix.model.slot_attention import QueryText, observe
from controlprefix.prefixes import Part, Prefix
from controlprefix.request import Request

_NUM_QUERY_TEXTS, _NUM_HELD_OUT = 12, 4
_ANSWER_TOKENS = 24
_CHECKED_MASS = 0.25
_MAX_SHARE = 0.2  # accepted divergence, relative to that of leaving the strength at 1
_ROUNDING = 1e-4  # nats
_MAX_PREFIXES = 256


class MassInKeys:
    """Prefixes whose keys hold a strength, for one model.

    The first use lets the model answer some general prompts; each prefix then costs some short
    passes, once.

    Args:
        frozen: A decoder-only model.
    """

    def __init__(self, frozen: FrozenModel) -> None:
        self._frozen = frozen
        self._lock = threading.Lock()
        self._shifts: LRUCache[str, list[Tensor]] = LRUCache(_MAX_PREFIXES)

    def scaled(self, prefix: Prefix, mass: float) -> Prefix:
        """A prefix that at strength 1 receives about as much attention as at another strength.

        Args:
            prefix: A prefix of the model.
            mass: The strength, above 0.

        Raises:
            RequestError: If the keys of this prefix cannot hold a strength well enough.
        """
        with self._lock:
            shifts = self._shifts.get(prefix.digest)
            if shifts is None:
                shifts = self._fitted(prefix)
                self._shifts[prefix.digest] = shifts
        return _shifted(prefix, shifts, math.log(mass))

    @cached_property
    def _query_texts(self) -> Sequence[QueryText]:
        """General prompts with the model's own answers."""
        tokenizer, model = self._frozen.request_tokenizer, self._frozen.model
        texts = general_prompts(measuring=False)[: _NUM_QUERY_TEXTS + _NUM_HELD_OUT]
        prompts = [tokenizer.prompt_ids(Request(prompt=text)) for text in texts]
        ids, mask = pad_rows(prompts, tokenizer.pad_id, left=True)
        with (
            torch.no_grad(),
            self._frozen.exclusive(),
            self._frozen.attached(self._frozen.assemble([[]] * len(prompts))),
        ):
            output = model.generate(  # type: ignore[operator]
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=neutral_config(
                    self._frozen, max_new_tokens=_ANSWER_TOKENS, min_new_tokens=_ANSWER_TOKENS
                ),
            )
        answers = output[:, ids.shape[1] :].tolist()
        return [QueryText(p, tuple(answer)) for p, answer in zip(prompts, answers, strict=True)]

    def _fitted(self, prefix: Prefix) -> list[Tensor]:
        """Per layer the changes of keys for a log-mass of 1, `(num_kv_heads, 1, key_dim)`."""
        placed = prefix.to(device=self._frozen.device, dtype=self._frozen.dtype)
        observed = observe(self._frozen, placed, self._query_texts[:_NUM_QUERY_TEXTS])
        shifts = []
        for layer in observed["decoder"]:
            num_heads, num_queries, _ = layer.queries.shape
            weights = layer.queries.new_ones(num_heads, num_queries, 1)
            shifts.append(key_shift(layer.queries, weights, weights.new_ones(num_heads, 1)))
        divergence, unchanged = self._divergences(placed, shifts)
        if not divergence <= _MAX_SHARE * unchanged + _ROUNDING:  # also if it is no number
            raise RequestError(
                "this engine supports only whole numbers as strengths of this prefix; give 0, 1 or "
                "2, or serve it without vLLM (with the strength in its keys, "
                f"{_CHECKED_MASS} would be {divergence:.3f} nats per token from exact, where "
                f"strength 1 is {unchanged:.3f})"
            )
        return shifts

    @torch.no_grad()
    def _divergences(self, prefix: Prefix, shifts: Sequence[Tensor]) -> tuple[float, float]:
        """Mean KL divergences (nats) from the exact strength, on texts that were not fitted.

        Returns:
            That of keys that hold the strength, and that of strength 1.
        """
        rows = self._query_texts[_NUM_QUERY_TEXTS:]
        logits = []
        parts = (
            Part(prefix, _CHECKED_MASS),
            Part(_shifted(prefix, shifts, math.log(_CHECKED_MASS))),
            Part(prefix),
        )
        for part in parts:
            with self._frozen.attached(self._frozen.assemble([[part]] * len(rows))):
                prompts, targets = [row.prompt for row in rows], [row.targets for row in rows]
                logits.append(target_logits(self._frozen, prompts, targets)[0])
        exact, approximate, unchanged = logits
        return (
            float(kl_divergences(approximate, exact).mean()),
            float(kl_divergences(unchanged, exact).mean()),
        )


def _shifted(prefix: Prefix, shifts: Sequence[Tensor], log_mass: float) -> Prefix:
    layers = []
    for i, shift in enumerate(shifts):
        keys, values = prefix.layer("decoder", i)
        changed = keys.cpu().double() + log_mass * shift
        layers.append((changed.to(keys), values))
    return Prefix.from_layers(prefix.geometry, decoder=layers)
