"""Decoupled prefixes: a softmax of their own, its output added, compared with it written out."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load, save
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from controlprefix import (
    Example,
    Part,
    Prefix,
    PrefixFormatError,
    Request,
    RequestError,
    TrainingDataError,
    UnsupportedModelError,
    assemble,
)
from controlprefix.model.steering import Steering
from controlprefix.training.initialization import as_decoupled
from controlprefix.vllm.placement import place

from helpers import QUICK, engine, greetings, inputs, nats_per_token, random_prefix, run, tokens
from models import ALL, build

LENGTHS = (9, 5, 7, 2)


def decoupled(model: PreTrainedModel, num_slots: int, seed: int = 1) -> Prefix:
    return dataclasses.replace(random_prefix(model, num_slots, seed), form="decoupled")


def mixed_parts(model: PreTrainedModel) -> list[list[Part]]:
    task, warm, brief, user = (decoupled(model, n, seed=n) for n in (4, 3, 6, 11))
    joint = random_prefix(model, 5, seed=9)
    return [
        [Part(task), Part(warm, 0.6), Part(brief, -0.4)],
        [Part(joint), Part(task), Part(user, 1.5)],
        [],
        [Part(joint, 2.0)],
    ]


def own_tokens(model: PreTrainedModel, logits: Tensor, row: int, length: int) -> Tensor:
    return logits[row] if model.config.is_encoder_decoder else logits[row, -length:]


def written_out(model: PreTrainedModel, ids: Tensor, parts: Sequence[Part]) -> Tensor:
    """Logits of a model whose attention function, in float64, does nothing else."""

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        heads = query.shape[1] // key.shape[1]
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        query = query.double()
        output = torch.zeros(*query.shape[:3], value.shape[-1], dtype=torch.float64)
        for head in range(query.shape[1]):
            for at in range(query.shape[2]):
                own = query[0, head, at] * scale
                own_keys = key[0, head // heads, : at + 1].double()
                own_values = value[0, head // heads, : at + 1].double()
                output[0, head, at] = (own_keys @ own).softmax(0) @ own_values
                for part in parts:
                    keys, values = part.prefix.layer("decoder", module.layer_idx)
                    weights = (keys[head // heads].double() @ own).softmax(0)
                    added = weights @ values[head // heads].double()
                    output[0, head, at] += part.strength * added
        return output.transpose(1, 2).float(), None

    AttentionInterface.register("written_out", attend)
    AttentionMaskInterface.register("written_out", sdpa_mask)
    earlier = model.config._attn_implementation
    model.config._attn_implementation = "written_out"
    try:
        with torch.no_grad():
            logits: Tensor = model(ids).logits
    finally:
        model.config._attn_implementation = earlier
    return logits


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gpt_neox", "gemma3", "opt"])
def test_the_output_is_that_of_attention_written_out(name: str, attention: str) -> None:
    model = build(name, attention=attention)
    parts = [Part(decoupled(model, 5)), Part(decoupled(model, 3, seed=2), -0.7)]
    expected = written_out(model, tokens(6), parts)
    assert torch.allclose(run(model, [tokens(6)], [parts]), expected, atol=1e-5)
    assert not torch.allclose(run(model, [tokens(6)], [[]]), expected, atol=1e-2)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_mixed_batch_matches_each_row_alone(name: str, attention: str) -> None:
    model = build(name, attention=attention)
    rows = [tokens(n, seed=n) for n in LENGTHS]
    parts = mixed_parts(model)
    together = run(model, rows, parts)
    for i, (row, its_parts) in enumerate(zip(rows, parts, strict=True)):
        alone, length = run(model, [row], [its_parts]), row.shape[1]
        own = own_tokens(model, together, i, length)
        assert torch.allclose(own, own_tokens(model, alone, 0, length), atol=2e-5)


@pytest.mark.parametrize("name", ALL)
def test_values_of_zero_and_strength_zero_leave_logits_bit_identical(name: str) -> None:
    model = build(name)
    rows = [tokens(n, seed=n) for n in LENGTHS]
    with torch.no_grad():
        plain = model(**inputs(model, rows)).logits
    silent = as_decoupled(random_prefix(model, 5))
    assert torch.equal(run(model, rows, [[Part(silent, 3.0)]] * 4), plain)
    assert torch.equal(run(model, rows, [[Part(decoupled(model, 5), 0.0)]] * 4), plain)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "t5", "bart"])
def test_decoding_step_by_step_equals_one_pass(name: str) -> None:
    model: Any = build(name)
    rows = [tokens(n, seed=n) for n in LENGTHS]
    parts = mixed_parts(model)
    steering = Steering.for_model(model)
    with torch.no_grad(), steering.attached(assemble(parts, steering.geometry)):
        batch = {
            k: v for k, v in inputs(model, rows).items() if k in ("input_ids", "attention_mask")
        }
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
        generated = model.generate(**batch, **options)
        beams = model.generate(**batch, **options, num_beams=2)
    for i, (row, its_parts) in enumerate(zip(rows, parts, strict=True)):
        is_encoder_decoder = model.config.is_encoder_decoder
        expected = row
        if is_encoder_decoder:
            expected = torch.tensor([[model.config.decoder_start_token_id]])
        with torch.no_grad(), steering.attached(assemble([its_parts], steering.geometry)):
            for _ in range(6):
                if is_encoder_decoder:
                    logits = model(input_ids=row, decoder_input_ids=expected).logits
                else:
                    logits = model(expected).logits
                expected = torch.cat([expected, logits[:, -1:].argmax(-1)], dim=1)
            alone = model.generate(row, **options, num_beams=2)
        assert generated[i, -6:].tolist() == expected[0, -6:].tolist()
        assert beams[i, -6:].tolist() == alone[0, -6:].tolist()


def test_gradients_reach_every_slot() -> None:
    model = build("llama")
    prefix = decoupled(model, 3)
    slots = prefix.slots["decoder"].clone().requires_grad_()
    part = Part(dataclasses.replace(prefix, slots={"decoder": slots}))
    steering = Steering.for_model(model)
    with steering.attached(assemble([[part]], steering.geometry)):
        model(tokens(6)).logits.square().sum().backward()
    assert slots.grad is not None
    assert bool((slots.grad.abs().sum(dim=1) > 0).all())


@pytest.mark.slow
@given(st.lists(st.sampled_from([-1.5, -0.5, 0.0, 0.3, 1.0, 2.0]), min_size=2, max_size=4))
@settings(max_examples=20, deadline=None)
def test_parts_add_up(strengths: list[float]) -> None:
    """In a single layer, what several parts do is the sum of what each does, times its strength."""
    model = build("llama", num_hidden_layers=1)
    changes: list[Tensor] = []
    Steering.for_model(model)  # whose probing is no change
    model.model.layers[0].self_attn.register_forward_hook(
        lambda _, inputs, output: changes.append(output[0])
    )
    prefixes = [decoupled(model, i + 2, seed=i) for i in range(len(strengths))]
    parts = [Part(p, w) for p, w in zip(prefixes, strengths, strict=True)]
    for row in ([], *([Part(prefix)] for prefix in prefixes), parts):
        run(model, [tokens(5)], [row])
    plain, *alone, together = changes
    pairs = zip(alone, strengths, strict=True)
    expected = plain + sum((weight * (change - plain) for change, weight in pairs), torch.zeros(1))
    assert torch.allclose(together, expected, atol=1e-5)


def test_files_keep_the_form(tmp_path: Path) -> None:
    model = build("llama")
    joint, alone = random_prefix(model, 4), decoupled(model, 4)
    assert torch.equal(joint.slots["decoder"], alone.slots["decoder"])
    assert joint.digest != alone.digest
    for dtype in (None, "int8"):
        alone.save(tmp_path / "p.safetensors", dtype)
        read = Prefix.load(tmp_path / "p.safetensors")
        assert (read.form, read.first(2).form, read.to(dtype=torch.bfloat16).form) == (
            "decoupled",
        ) * 3
    assert "decoupled" in repr(read)
    data = (tmp_path / "p.safetensors").read_bytes()
    with safe_open(tmp_path / "p.safetensors", "pt") as file:
        metadata = file.metadata()
    header = json.loads(metadata["controlprefix"])
    assert header["form"] == "decoupled"
    changed = {**metadata, "controlprefix": json.dumps({**header, "form": "sideways"})}
    with pytest.raises(PrefixFormatError):
        Prefix.from_bytes(save(load(data), changed))


@pytest.mark.slow
def test_a_run_starts_at_the_plain_model_and_learns() -> None:
    cp = engine()
    before = nats_per_token(
        cp, [e.model_copy(update={"task": None, "attributes": {}}) for e in greetings()]
    )
    settings = {**QUICK, "steps": 60, "form": "decoupled", "contrast": 0.2}
    report = cp.train(greetings(), **settings)
    assert cp.get("task", "greet").form == "decoupled"
    assert report.settings["form"] == "decoupled"
    after = nats_per_token(cp, greetings())
    assert after < before - 0.5
    cp.train(greetings(), **{**QUICK, "steps": 1, "learning_rate": 1e-9, "init": "stored"})
    assert cp.get("task", "greet").form == "decoupled"  # a stored prefix keeps its form
    assert abs(nats_per_token(cp, greetings()) - after) < 1e-3
    again = {"steps": 1, "batch_size": 16, "learning_rate": 1e-9, "form": "decoupled"}
    cp.train(greetings(), **{**QUICK, **again})
    assert abs(nats_per_token(cp, greetings()) - before) < 1e-3


@pytest.mark.slow
def test_requests_use_any_strength_in_one_row_and_all_engines_agree() -> None:
    cp = engine()
    for i, label in enumerate(("warm", "cold")):
        prefix = dataclasses.replace(
            Prefix.random(cp.geometry, num_slots=4, scale=1.0, seed=i), form="decoupled"
        )
        cp.put("attribute", f"tone={label}", prefix)
    cp.put("task", "note", Prefix.random(cp.geometry, num_slots=3, scale=1.0, seed=7))
    requests = [
        Request(prompt="Dear", task="note", attributes={"tone": {"warm": 1.4, "cold": -0.8}}),
        Request(
            prompt="A longer prompt",
            attributes={"tone": "warm"},
            schedules={"tone": ((0, 2.0), (4, 0.0))},
        ),
        Request(prompt="Hi", attributes={"tone": {"cold": -2.0}}, mixing="logits"),
        Request(prompt="Plain"),
    ]
    requests = [r.model_copy(update={"max_new_tokens": 8}) for r in requests]
    with cp.assembled(requests[0]) as batch:  # which refuses what needs rows of guidance
        assert batch.num_rows == 1
    together = [c.text for c in cp.generate(requests)]
    assert together == [cp.generate(request).text for request in requests]
    assert together == ["".join(cp.stream(request)) for request in requests]
    assert len(set(together)) == 4


def test_users_train_decoupled_prefixes() -> None:
    cp = engine()
    cp.train_users(
        {"ana": ["Hello you.", "Hello them."] * 3}, steps=4, num_slots=3, form="decoupled"
    )
    assert cp.get("user", "ana").form == "decoupled"
    with pytest.raises(TrainingDataError, match="form"):
        cp.learn_decoder({f"u{i}": ["a b c", "d e f"] for i in range(8)}, form="decoupled")


def test_what_cannot_have_them_says_so(tmp_path: Path) -> None:
    cp = engine()
    prefix = dataclasses.replace(Prefix.random(cp.geometry, num_slots=4, seed=1), form="decoupled")
    cp.put("task", "note", prefix)
    with pytest.raises(UnsupportedModelError, match="softmax of its own.*form='joint'"):
        prefix.to_peft(tmp_path / "peft", cp.geometry)
    with pytest.raises(UnsupportedModelError, match="shortening"):
        cp.shorten("task", "note", [Example(prompt="a", completion="b", task="note")])
    resolved = cp.resolve(Request(prompt="a", task="note"))
    with pytest.raises(RequestError, match="task 'note'.*vLLM"):
        place(resolved, "model", vocab_size=300)
    with pytest.raises(RequestError, match="-1"):
        Part(Prefix.random(cp.geometry, num_slots=1), -1.0)
