"""An engine that was trained, requests for it, and a reward of their texts."""

from collections.abc import Sequence
from typing import Any

from controlprefix import ControlPrefix, Request

from helpers import QUICK, engine, greetings

OPTIONS: dict[str, Any] = {"steps": 3, "batch_size": 2, "num_samples": 2, "progress": False}


def requests(num: int = 4, max_new_tokens: int = 6) -> list[Request]:
    labels = ("formal", "informal")
    return [
        Request(
            prompt=f"Greet {i}",
            task="greet",
            attributes={"formality": labels[i % 2]},
            max_new_tokens=max_new_tokens,
        )
        for i in range(num)
    ]


def trained(store: str = "sqlite://") -> ControlPrefix:
    cp = engine(store=store)
    cp.train(greetings(), **QUICK)
    return cp


def share_of_vowels(requests: Sequence[Request], texts: Sequence[str]) -> list[float]:
    return [sum(c in "aeiou" for c in text) / max(1, len(text)) for text in texts]
