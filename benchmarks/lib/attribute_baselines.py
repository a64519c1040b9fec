"""Ways to request several labels at once that train nothing, and what all methods share."""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache

from controlprefix import Request
from controlprefix.evaluation.comparison.measures import TEMPERATURE

from lib.attribute_studies import IN_WORDS, Combination, Study, attributes_of, parts_of
from lib.datasets import shuffled
from lib.models import engine


class Method:
    """One way to request several labels at once; this one leaves the model as it is.

    Attributes:
        coefficients: Values of a coefficient to choose from, or none.
        nll_limit: A method whose texts its own must not exceed in base-model NLL.
    """

    coefficients: Sequence[float] = ()
    nll_limit: str | None = None

    def __init__(self, study: Study, options: argparse.Namespace) -> None:
        self.study, self.options = study, options
        self.seed: int = getattr(options, "seed", 0)
        self.coefficient = 1.0
        self.cp = engine(study.frozen)

    def train(self) -> None:
        """Train on the study's rows."""

    def write(self, combination: Combination, count: int, seed: int) -> list[str]:
        """Texts with those labels."""
        return self.sample(self.cp.model, count, seed)

    def sample(
        self,
        model: Any,
        count: int,
        seed: int,
        slots: Sequence[tuple[torch.Tensor, torch.Tensor]] = (),
    ) -> list[str]:
        """Texts from an empty prompt by transformers alone, after keys and values in the cache."""
        tokenizer, device = self.cp.tokenizer, self.cp.model.device
        options: dict[str, Any] = {}
        if slots:
            rows = [(k.expand(count, -1, -1, -1), v.expand(count, -1, -1, -1)) for k, v in slots]
            options["past_key_values"] = DynamicCache(
                ddp_cache_data=rows, config=self.cp.model.config
            )
        num_slots = slots[0][0].shape[2] if slots else 0
        torch.manual_seed(seed)
        with torch.no_grad():
            output = model.generate(
                input_ids=torch.full((count, 1), int(tokenizer.bos_token_id), device=device),
                attention_mask=torch.ones(count, num_slots + 1, dtype=torch.long, device=device),
                max_new_tokens=self.options.new_tokens,
                do_sample=True,
                temperature=TEMPERATURE,
                top_k=0,
                pad_token_id=self.study.frozen.pad_id,
                **options,
            )
        texts = tokenizer.batch_decode(output[:, 1:], skip_special_tokens=True)
        return [str(text).split("\n")[0].strip() for text in texts]

    def generate(self, requests: Sequence[dict[str, Any]], seed: int) -> list[str]:
        """Texts of requests, through the library."""
        rows = [
            Request(
                **{"prompt": self.cp.tokenizer.bos_token, "raw": True, **fields},
                max_new_tokens=self.options.new_tokens,
                temperature=TEMPERATURE,
                seed=seed * 10_000 + i,
                stop=["\n"],
            )
            for i, fields in enumerate(requests)
        ]
        return [completion.text.strip() for completion in self.cp.generate(rows, batch_size=128)]


class RealTexts(Method):
    """Rows of the test splits, with one label each, cut to the length of samples."""

    def texts(self, count: int) -> list[tuple[Combination, str]]:
        """Texts and their labels."""
        rows = shuffled(self.study.test_rows, 0)[:count]
        ids = [self.cp.tokenizer.encode(row.completion) for row in rows]
        limit = self.options.new_tokens
        cut = self.cp.tokenizer.batch_decode([own[:limit] for own in ids])
        return [(attributes_of(row), str(text)) for row, text in zip(rows, cut, strict=True)]


def instruction(combination: Combination) -> dict[str, Any]:
    """A request that says the labels in words."""
    labels = ", ".join(IN_WORDS.get(label, label) for label in combination.values())
    return {"prompt": f"Write one sentence that is {labels}. Write nothing else.", "raw": False}


class Instruction(Method):
    """An instruction in the prompt."""

    def write(self, combination: Combination, count: int, seed: int) -> list[str]:
        return self.generate([instruction(combination)] * count, seed)


class FewShot(Method):
    """Two training rows per label in the prompt."""

    def write(self, combination: Combination, count: int, seed: int) -> list[str]:
        requests = []
        for i in range(count):
            shots = [
                row.completion
                for part in parts_of(combination)
                for row in shuffled((r for r in self.study.rows if r.label == part), seed + i)[:2]
            ]
            requests.append({"prompt": "".join(f"{text}\n" for text in shots)})
        return self.generate(requests, seed)
