"""Requests for running batches, and an engine with prefixes for them."""

import random
from typing import Any

from controlprefix import ControlPrefix, Prefix, Request

from models import build, byte_tokenizer

CHANGES: dict[str, dict[str, Any]] = {
    "gpt_oss": {"attention": "eager"},  # it has no other
    # With few heads many tokens are as relevant as others, and padding decides which are read.
    "deepseek_v32": {"index_n_heads": 32, "index_head_dim": 64},
}


def engine(name: str = "llama") -> ControlPrefix:
    model = build(name, **CHANGES.get(name, {}))
    cp = ControlPrefix.from_pretrained(model, tokenizer=byte_tokenizer(), store="sqlite://")
    for seed, (kind, part) in enumerate((("task", "note"), ("user", "ana"), ("user", "bo"))):
        prefix = Prefix.random(cp.geometry, num_slots=2 + seed, scale=2.0, seed=seed)
        cp.put(kind, part, prefix)  # type: ignore[arg-type]
    return cp


def requests(count: int, seed: int = 0) -> list[Request]:
    """Requests with a random mix of parts, strengths, schedules and sampling settings."""
    draw = random.Random(seed)
    result = []
    for i in range(count):
        fields: dict[str, Any] = {
            "prompt": "x" * draw.randrange(1, 60),
            "raw": True,
            "max_new_tokens": draw.randrange(1, 30),
            "task": draw.choice([None, "note"]),
            "user": draw.choice([None, "ana", "bo"]),
        }
        fields["strengths"] = {
            part: draw.choice([0.3, 1.0, 2.0, -0.5]) for part in ("task", "user") if fields[part]
        }
        if draw.random() < 0.5:
            fields |= {"temperature": 0.8, "top_p": 0.9, "seed": i}
        if draw.random() < 0.3:
            fields["repetition_penalty"] = 1.3
        if draw.random() < 0.3:
            fields["stop"] = ["a", "xx"]
        if fields["user"] and min(fields["strengths"].values()) > 0 and draw.random() < 0.5:
            fields["schedules"] = {"user": [(0, 1.0), (6, 0.0)]}
        result.append(Request(**fields))
    return result
