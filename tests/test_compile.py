"""Compiled models: graphs hold no slots, and attaching others does not compile again."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import CompileConfig

from controlprefix import ControlPrefix, Request

from helpers import engine, random_prefix

NUM_USERS = 12


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def users() -> ControlPrefix:
    """A tiny model with users whose prefixes have the same and different lengths."""
    cp = engine()
    for i in range(NUM_USERS):
        cp.put("user", f"u{i}", random_prefix(cp.model, 4 + i % 3, seed=i))
    return cp


def request(user: str | None) -> Request:
    return Request(prompt="hello", raw=True, user=user, max_new_tokens=5)


@pytest.mark.parametrize("first", ["plain", "steered"])
def test_a_compiled_model_gives_each_request_its_own_prefix(
    users: ControlPrefix, first: str
) -> None:
    requests = [request(f"u{i}") for i in range(NUM_USERS)]
    requests.insert(0 if first == "plain" else 3, request(None))
    expected = [users.generate(r).text for r in requests]
    pair = [result.text for result in users.generate(requests[:2])]
    assert len(set(expected)) > 3

    counter = CompileCounter()
    users.model.compile(backend=counter)
    assert [users.generate(r).text for r in requests] == expected
    after_the_first_pass = counter.frame_count
    assert after_the_first_pass > 0
    assert [users.generate(r).text for r in reversed(requests)] == expected[::-1]
    assert counter.frame_count == after_the_first_pass  # other prefixes, no other graphs
    assert [result.text for result in users.generate(requests[:2])] == pair


@pytest.mark.parametrize("rows", [1, 2])
def test_a_compiled_static_cache_gives_the_same_tokens(users: ControlPrefix, rows: int) -> None:
    """What transformers does by itself on a GPU; here it is told to on any device."""
    ids = torch.arange(5, 11, device=users.model.device).expand(rows, -1)
    config: Any = CompileConfig(backend="eager")
    config.mode, config._compile_all_devices = None, True
    options: dict[str, Any] = {
        "max_new_tokens": 5,
        "do_sample": False,
        "attention_mask": torch.ones_like(ids),
    }
    generate: Any = users.model.generate
    for user in ("u0", None, "u1"):
        with users.assembled([request(user)] * rows):
            expected = generate(ids, **options)
            compiled = generate(
                ids, cache_implementation="static", compile_config=config, **options
            )
        assert torch.equal(expected, compiled)
