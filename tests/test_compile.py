"""Compiled models: graphs hold no slots, and attaching others does not compile again."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import CompileConfig

from controlprefix import ControlPrefix, Part, Prefix, Request
from controlprefix.model.steering import Steering
from controlprefix.prefixes import Form

from helpers import engine, inputs, random_prefix, tokens
from models import build

NUM_USERS = 12
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def users() -> ControlPrefix:
    """A tiny model with users whose prefixes differ in length and form."""
    cp = engine()
    for i in range(NUM_USERS):
        form: Form = "decoupled" if i % 4 == 1 else "joint"
        prefix = replace(random_prefix(cp.model, 4 + i % 3, seed=i), form=form)
        cp.put("user", f"u{i}", prefix)
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


@pytest.mark.parametrize("name", ["llama", "gemma3", "bart", "t5"])
def test_a_steered_pass_is_one_graph(name: str) -> None:
    model = build(name)
    steering = Steering.for_model(model)
    batches = [steering.assemble([[Part(random_prefix(model, n))], []]) for n in (3, 5)]
    alone = replace(random_prefix(model, 4), form="decoupled")
    batches.append(steering.assemble([[Part(alone), Part(random_prefix(model, 2))], []]))
    batch = inputs(model, [tokens(6), tokens(4)])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for prefixes in (*batches, batches[0]):
        with torch.no_grad(), steering.attached(prefixes):
            expected = model(**batch, use_cache=False).logits
            assert torch.allclose(compiled(**batch, use_cache=False).logits, expected, atol=1e-5)


def test_gradients_of_slots_pass_through_a_compiled_model() -> None:
    model = build("llama")
    steering = Steering.for_model(model)
    slots = random_prefix(model, 3).slots["decoder"].requires_grad_()
    compiled = torch.compile(model, backend="eager")
    gradients = []
    for forward in (model, compiled):
        prefix = Prefix(steering.geometry, {"decoder": slots})
        with steering.attached(steering.assemble([[Part(prefix)]])):
            loss = forward(tokens(5), use_cache=False).logits.square().sum()
        gradients.append(torch.autograd.grad(loss, slots)[0])
    assert gradients[0].abs().sum() > 0
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-4)
