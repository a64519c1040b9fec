"""Gradients of attention over slots."""

import pytest
import torch
from torch import Tensor

from controlprefix import Part, Prefix, assemble
from controlprefix.model import attention as attention_module
from controlprefix.model import prefill_kernel
from controlprefix.model.steering import Steering
from controlprefix.training.loop import _switch

from helpers import inputs, random_prefix, tokens
from models import ALL, build


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_every_slot_and_no_weight(name: str, checkpointing: bool) -> None:
    """PEFT's prefixes lose half of an encoder-decoder's slots, and all with checkpointing."""
    model = build(name)
    steering = Steering.for_model(model)
    slots = {site: rows.requires_grad_() for site, rows in random_prefix(model, 4).slots.items()}
    if checkpointing:
        model.train()
        for module in model.modules():
            for key, value in list(vars(module).items()):
                if "drop" in key and isinstance(value, float):
                    setattr(module, key, 0.0)
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        _switch(model, "enable")({"use_reentrant": False})
    parts = [[Part(Prefix(steering.geometry, slots))], []]
    rows = [tokens(6), tokens(4)]
    # On a GPU, checkpoints are computed again in a thread of autograd's.
    with steering.attached(assemble(parts, steering.geometry), everywhere=True):
        model(**inputs(model, rows), use_cache=False).logits.square().sum().backward()
    for site, rows_ in slots.items():
        assert rows_.grad is not None
        sizes = steering.geometry.split_sizes(site)
        for piece in rows_.grad.split(sizes, dim=1):  # each layer's keys, each layer's values
            assert (piece.abs().amax(dim=1) > 0).all()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "bart", "t5"])
def test_a_slot_gradient_is_that_of_finite_differences(name: str) -> None:
    model = build(name, dtype=torch.float64)
    steering = Steering.for_model(model)
    start = random_prefix(model, 2).to(dtype=torch.float64)
    site = steering.geometry.sites[-1]
    batch = inputs(model, [tokens(5)])

    def loss(rows: Tensor) -> Tensor:
        item = Prefix(steering.geometry, {**start.slots, site: rows})
        with steering.attached(assemble([[Part(item, 0.7)]], steering.geometry)):
            return model(**batch, use_cache=False).logits.log_softmax(-1)[..., 7].sum()

    rows = start.slots[site].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(rows), rows)
    generator = torch.Generator(rows.device).manual_seed(3)
    direction = torch.randn(rows.shape, dtype=rows.dtype, generator=generator)
    step = 1e-3  # some norms compute in float32 whatever the model's dtype
    with torch.no_grad():
        numeric = (loss(rows + step * direction) - loss(rows - step * direction)) / (2 * step)
    assert torch.isclose((gradient * direction).sum(), numeric, rtol=5e-3)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "bart"])
@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_long_prompts_in_chunks_give_the_same_outputs_and_gradients(
    name: str, strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(name)
    steering = Steering.for_model(model)
    prefix = random_prefix(model, 4)
    slots = {site: rows.clone().requires_grad_() for site, rows in prefix.slots.items()}
    parts = [[Part(Prefix(prefix.geometry, slots), strength), Part(random_prefix(model, 2))], []]
    for rows in ([tokens(9), tokens(9)], [tokens(9), tokens(5)], [tokens(9)]):
        batch = inputs(model, rows)
        if len(rows) == 1 or rows[1].shape[1] == 9:
            del batch["attention_mask"]  # the mask is left to the attention function
        values = []
        for chunk in (1 << 30, 4):
            monkeypatch.setattr(attention_module, "PREFILL_CHUNK", chunk)
            monkeypatch.setattr(prefill_kernel, "PREFILL_CHUNK", chunk)
            with steering.attached(steering.assemble(parts[: len(rows)])):
                logits = model(**batch, use_cache=False).logits
            shortest = min(row.shape[1] for row in rows)
            logits = logits if name == "bart" else logits[:, -shortest:]
            gradients = torch.autograd.grad(logits.square().sum(), list(slots.values()))
            values.append([logits, *gradients])
        for whole, chunked in zip(*values, strict=True):
            assert torch.allclose(whole, chunked, rtol=1e-3, atol=1e-4)
