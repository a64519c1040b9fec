"""Attention over slots, compared with independent reference implementations."""

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    AttentionInterface,
    DynamicCache,
    PretrainedConfig,
    PreTrainedModel,
    StaticCache,
)

from controlprefix import Part, Prefix, Request, assemble
from controlprefix.model import attention as attention_module
from controlprefix.model import prefill_kernel
from controlprefix.model.decode_kernel import _MIN_SEGMENTED_ELEMENTS
from controlprefix.model.steering import Steering

import models
from helpers import engine, inputs, random_prefix, run, tokens
from models import ALL, ENCODER_DECODER, PARTICULAR, ROTARY, build

LENGTHS = (9, 5, 7, 2)  # tokens of the rows of a mixed batch


@pytest.fixture(params=["joined", "apart"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of decoding, whatever the size at which one takes over from the other."""
    monkeypatch.setitem(
        _MIN_SEGMENTED_ELEMENTS, models.DEVICE, {"joined": 1 << 62, "apart": 0}[request.param]
    )
    return request.param


def prompt_inputs(model: PreTrainedModel, rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """What `generate` takes."""
    batch = inputs(model, rows)
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def last(model: PreTrainedModel, logits: Tensor, row: int, length: int) -> Tensor:
    """The logits of one row's own tokens."""
    return logits[row] if model.config.is_encoder_decoder else logits[row, -length:]


def mixed_parts(model: PreTrainedModel) -> list[list[Part]]:
    task, warm, brief, user = (random_prefix(model, n, seed=n) for n in (4, 3, 6, 11))
    return [
        [Part(task), Part(warm, 0.6), Part(brief, 0.4)],
        [Part(task), Part(user)],
        [],
        [Part(task, 2.0)],
    ]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ROTARY)
def test_slots_equal_the_same_keys_and_values_in_a_cache(name: str, attention: str) -> None:
    """The reference: K/V put into transformers' own cache, the text at positions from 0."""
    model = build(name, attention=attention)
    # Shorter than the sliding windows: a cache's entries leave them, slots do not.
    ids, ours = tokens(3), random_prefix(model, 3)
    steps = []
    for slots in (ours, None):
        cache = DynamicCache()
        if slots is not None:
            for i in range(len(slots.geometry.decoder)):
                keys, values = slots.layer("decoder", i)
                cache.update(keys[None], values[None], i)
        steps.append(cache)
    with torch.no_grad():
        expected = model(
            ids,
            past_key_values=steps[0],
            position_ids=torch.arange(3)[None],
            attention_mask=torch.ones(1, 6, dtype=torch.long),
        ).logits
    assert torch.allclose(run(model, [ids], [[Part(ours)]])[0], expected[0], atol=1e-5)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_no_parts_and_strength_zero_leave_logits_bit_identical(name: str, attention: str) -> None:
    model = build(name, attention=attention)
    rows = [tokens(n, seed=n) for n in LENGTHS]
    with torch.no_grad():
        plain = model(**inputs(model, rows)).logits
    assert torch.equal(run(model, rows, [[]] * 4), plain)
    absent = [[Part(random_prefix(model, 5), 0.0)]] * 4
    assert torch.equal(run(model, rows, absent), plain)
    with torch.no_grad():
        assert torch.equal(model(**inputs(model, rows)).logits, plain)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_mixed_batch_matches_each_row_alone(name: str, attention: str) -> None:
    model = build(name, attention=attention)
    rows = [tokens(n, seed=n) for n in LENGTHS]
    parts = mixed_parts(model)
    together = run(model, rows, parts)
    with torch.no_grad():
        plain = model(**inputs(model, rows)).logits
    for i, (row, its_parts) in enumerate(zip(rows, parts, strict=True)):
        alone = run(model, [row], [its_parts])
        length = row.shape[1]
        assert torch.allclose(
            last(model, together, i, length), last(model, alone, 0, length), atol=2e-5
        )
        steered = last(model, together, i, length) - last(model, plain, i, length)
        assert (steered.abs().max() > 1e-2) == bool(its_parts)


PARTICULAR_CASES = [
    (name, attention)
    for name in PARTICULAR
    for attention in ("sdpa", "eager")
    if (name, attention) not in {("gemma2", "sdpa"), ("gpt_oss", "sdpa")}  # they have no sdpa
]


@pytest.mark.parametrize(("name", "attention"), PARTICULAR_CASES)
def test_models_with_unusual_attention_stay_exact(name: str, attention: str) -> None:
    """Shared and sparse attention chosen by the implementation's name, soft caps, sinks."""
    model = build(name, attention=attention)
    # Without padding: ties in a sparse model's choice of keys are broken by where they stand.
    rows = [tokens(9, seed=n) for n in LENGTHS]
    with torch.no_grad():
        plain = model(**inputs(model, rows)).logits
    assert torch.equal(run(model, rows, [[]] * 4), plain)
    parts = mixed_parts(model)
    together = run(model, rows, parts)
    for row, its_parts, logits in zip(rows, parts, together, strict=True):
        assert torch.allclose(logits, run(model, [row], [its_parts])[0], atol=1e-4)
    steering = Steering.for_model(model)
    with torch.no_grad(), steering.attached(assemble(parts[:1], steering.geometry)):
        whole = model(rows[0]).logits[:, -4:]
        saved = model(rows[0], logits_to_keep=4).logits
    assert torch.allclose(saved, whole, atol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_every_site_and_layer_is_attended_to(name: str) -> None:
    """Changing the values of one layer's slots changes the logits, for each layer of each site."""
    model = build(name)
    rows = [tokens(6)]
    base = random_prefix(model, 3)
    for site in base.geometry.sites:
        sizes = base.geometry.split_sizes(site)
        for layer in range(len(sizes) // 2):
            changed = base.slots[site].clone()
            at = sum(sizes[: 2 * layer + 1])
            changed[:, at : at + sizes[2 * layer + 1]] += 1.0
            other = Prefix(base.geometry, {**base.slots, site: changed})
            difference = run(model, rows, [[Part(base)]]) - run(model, rows, [[Part(other)]])
            assert difference.abs().max() > 1e-4, (site, layer)


@pytest.mark.parametrize("name", ENCODER_DECODER)
def test_encoder_decoder_matches_attention_written_out(name: str) -> None:
    """The reference: softmax over slots and tokens, written out, in place of the model's own."""
    model = build(name, attention="eager")
    ours = random_prefix(model, 5)
    order: list[tuple[str, int]] = []
    for site in ours.geometry.sites:
        order += [(site, i) for i in range(len(ours.geometry.layers(site)))]
    encoder = set(model.get_encoder().modules())
    counts = {"encoder": 0, "decoder": 0, "cross": 0}
    where: dict[torch.nn.Module, tuple[str, int]] = {}

    def attend(module, query, key, value, mask, scaling=None, position_bias=None, **_):  # type: ignore[no-untyped-def]
        if module not in where:
            crossing = module not in encoder and key.shape[2] == 7
            site = "encoder" if module in encoder else "cross" if crossing else "decoder"
            where[module] = (site, counts[site])
            counts[site] += 1
        keys, values = ours.layer(*where[module])  # type: ignore[arg-type]
        scores = query @ key.transpose(2, 3) * scaling
        if position_bias is not None:
            scores = scores + position_bias
        if mask is not None:
            scores = scores + mask
        slots = query @ keys[None].transpose(2, 3) * scaling
        weights = torch.cat([scores, slots], -1).softmax(-1)
        output = weights[..., : key.shape[2]] @ value + weights[..., key.shape[2] :] @ values[None]
        return output.transpose(1, 2), None

    from transformers import AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register("written_out", attend)
    AttentionMaskInterface.register("written_out", eager_mask)
    reference = build(name, attention="eager")
    reference.set_attn_implementation("written_out")
    for module in reference.modules():
        if isinstance(config := getattr(module, "config", None), PretrainedConfig):
            config._attn_implementation_internal = "written_out"
    encoder = set(reference.get_encoder().modules())
    rows = [tokens(7)]
    with torch.no_grad():
        expected = reference(**inputs(reference, rows)).logits
    assert torch.allclose(run(model, rows, [[Part(ours)]]), expected, atol=1e-5)
    assert len(where) == len(order)


@pytest.mark.slow
@given(
    strengths=st.lists(
        st.floats(min_value=0, max_value=8, allow_subnormal=False), min_size=3, max_size=3
    ),
    order=st.permutations(range(3)),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
)
@settings(max_examples=25, deadline=None)
def test_part_order_does_not_change_logits(
    strengths: list[float], order: list[int], lengths: list[int]
) -> None:
    model = build("llama")
    parts = [
        Part(random_prefix(model, n, seed=n), w) for n, w in zip((2, 5, 3), strengths, strict=True)
    ]
    rows = [tokens(n, seed=n) for n in lengths]
    straight = run(model, rows, [parts] * len(rows))
    shuffled = run(model, rows, [[parts[i] for i in order]] * len(rows))
    assert torch.allclose(straight, shuffled, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_whole_number_strength_equals_writing_each_slot_that_often(name: str) -> None:
    model = build(name)
    item = random_prefix(model, 4)
    thrice = Prefix(item.geometry, {site: rows.repeat(3, 1) for site, rows in item.slots.items()})
    rows = [tokens(6)]
    assert torch.allclose(
        run(model, rows, [[Part(item, 3.0)]]), run(model, rows, [[Part(thrice)]]), atol=1e-5
    )
    assert torch.allclose(
        run(model, rows, [[Part(item), Part(item, 2.0)]]),
        run(model, rows, [[Part(thrice)]]),
        atol=1e-5,
    )


@pytest.mark.parametrize("name", ROTARY)
def test_slots_do_not_move_positions_or_fill_the_cache(name: str) -> None:
    model = build(name)
    steering = Steering.for_model(model)
    with (
        torch.no_grad(),
        steering.attached(assemble([[Part(random_prefix(model, 7))]], steering.geometry)),
    ):
        cache = model(tokens(5), use_cache=True).past_key_values
    assert cache.get_seq_length() == 5


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_slots_stay_visible_past_a_sliding_window(name: str) -> None:
    """Every layer's slots still move the last of 40 tokens, with a window of 6."""
    changes: dict[str, Any] = {"layer_types": ["sliding_attention"] * 3} if name == "gemma3" else {}
    model = build(name, **changes)
    ours, rows = random_prefix(model, 3), [tokens(40)]
    with torch.no_grad():
        plain = model(**inputs(model, rows)).logits[0, -1]
    last_layer = ours.slots["decoder"].clone()
    last_layer[:, : -2 * ours.geometry.split_sizes("decoder")[-1]] = 0
    steered = run(model, rows, [[Part(Prefix(ours.geometry, {"decoder": last_layer}))]])[0, -1]
    assert (steered - plain).abs().max() > 1e-2


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_decoding_step_by_step_equals_one_pass(name: str, attention: str) -> None:
    """Greedy tokens with a cache, from a mixed batch, against full passes without one."""
    model: Any = build(name, attention=attention)
    rows = [tokens(n, seed=n) for n in LENGTHS]
    parts = mixed_parts(model)
    steering = Steering.for_model(model)
    with torch.no_grad(), steering.attached(assemble(parts, steering.geometry)):
        batch = {
            k: v for k, v in inputs(model, rows).items() if k in ("input_ids", "attention_mask")
        }
        generated = model.generate(**batch, max_new_tokens=8, do_sample=False, eos_token_id=None)
    for i, (row, its_parts) in enumerate(zip(rows, parts, strict=True)):
        if model.config.is_encoder_decoder:
            expected = torch.tensor([[model.config.decoder_start_token_id]])
        else:
            expected = row
        for _ in range(8):
            with torch.no_grad(), steering.attached(assemble([its_parts], steering.geometry)):
                if model.config.is_encoder_decoder:
                    logits = model(input_ids=row, decoder_input_ids=expected).logits
                else:
                    logits = model(expected).logits
            expected = torch.cat([expected, logits[:, -1:].argmax(-1)], dim=1)
        assert generated[i, -8:].tolist() == expected[0, -8:].tolist()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", ALL)
def test_beams_and_returned_sequences_match_each_row_alone(name: str) -> None:
    model: Any = build(name)
    rows = [tokens(n, seed=n) for n in LENGTHS[:3]]
    parts = mixed_parts(model)[:3]
    steering = Steering.for_model(model)
    expected = {"max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}

    def search(which: Sequence[int]) -> Tensor:
        batch = prompt_inputs(model, [rows[i] for i in which])
        selected = assemble([parts[i] for i in which], steering.geometry)
        with torch.no_grad(), steering.attached(selected):
            result: Tensor = model.generate(**batch, **expected, eos_token_id=None)
        return result[:, -6:]

    together = search(range(3))
    for i in range(3):
        assert together[2 * i : 2 * i + 2].tolist() == search([i]).tolist()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox"])
def test_static_cache_gives_the_tokens_of_a_dynamic_one(name: str) -> None:
    model: Any = build(name)
    rows = [tokens(n, seed=n) for n in LENGTHS]
    steering = Steering.for_model(model)
    batch = prompt_inputs(model, rows)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    with torch.no_grad(), steering.attached(assemble(mixed_parts(model), steering.geometry)):
        dynamic = model.generate(**batch, **options)
        static = model.generate(**batch, **options, cache_implementation="static")
        alone = inputs(model, rows[:1])["input_ids"]
    assert dynamic.tolist() == static.tolist()
    with torch.no_grad(), steering.attached(assemble(mixed_parts(model)[:1], steering.geometry)):
        cache = StaticCache(config=model.config, max_cache_len=32)
        unpadded = model(alone, past_key_values=cache).logits
        expected = model(alone).logits
    assert torch.allclose(unpadded, expected, atol=1e-5)


@pytest.mark.usefixtures("way")
def test_one_token_after_a_cache_equals_one_pass_to_rounding() -> None:
    """Logits, where greedy tokens could hide an error; strengths, shared slots, gaps, beams."""
    model = build("qwen3")
    steering = Steering.for_model(model)
    rows = [tokens(n, seed=n) for n in LENGTHS]
    batch = inputs(model, rows)
    for copies in (1, 3):
        batch = {name: value.repeat_interleave(copies, 0) for name, value in batch.items()}
        with torch.no_grad(), steering.attached(assemble(mixed_parts(model), steering.geometry)):
            expected = model(**batch).logits[:, -1]
            cache = DynamicCache()
            model(**{k: v[:, :-1] for k, v in batch.items()}, past_key_values=cache)
            item = {**batch, **{k: batch[k][:, -1:] for k in ("input_ids", "position_ids")}}
            result = model(**item, past_key_values=cache).logits[:, -1]
        assert torch.allclose(result, expected, atol=1e-5)


def test_a_mask_written_to_between_passes_is_read_again() -> None:
    """What is remembered with a mask must not outlive its content, its slots or its shape."""
    model = build("llama")
    steering = Steering.for_model(model)
    ids = tokens(4)
    mask = torch.zeros(1, 1, 4, 4).masked_fill(torch.ones(4, 4).triu(1).bool(), -torch.inf)

    def logits(parts: list[Part]) -> Tensor:
        with torch.no_grad(), steering.attached(assemble([parts], steering.geometry)):
            result: Tensor = model(ids, attention_mask=mask).logits
        return result

    calls = [
        logits([Part(random_prefix(model, 3))]),
        logits([Part(random_prefix(model, 3, seed=2), 0.5)]),
    ]
    mask[..., 0] = -torch.inf
    calls.append(logits([Part(random_prefix(model, 3, seed=2), 0.5)]))
    mask = mask.clone()
    assert torch.equal(calls[-1], logits([Part(random_prefix(model, 3, seed=2), 0.5)]))
    assert not torch.allclose(calls[0], calls[1])
    assert not torch.allclose(calls[1], calls[2])


def test_bfloat16_stays_near_float32() -> None:
    """Within the rounding of the plain model in bfloat16 itself, twice over."""
    exact, rounded = build("llama"), build("llama", dtype=torch.bfloat16)
    rows = [tokens(n, seed=n) for n in LENGTHS]
    plain_error = (run(exact, rows, [[]] * 4) - run(rounded, rows, [[]] * 4).float()).abs().max()
    parts = [[Part(random_prefix(exact, 6), 0.7)]] * 4
    rounded_parts = [[Part(random_prefix(rounded, 6), 0.7)]] * 4
    error = (run(exact, rows, parts) - run(rounded, rows, rounded_parts).float()).abs().max()
    assert error < 2 * plain_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_slots_and_tokens_of_long_prompts_apart_give_the_same_outputs(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(name).type(dtype)
    rows = [tokens(9, seed=i) for i in range(4)]
    batch = {"input_ids": inputs(model, rows)["input_ids"]}  # without a mask
    merged, num_calls = prefill_kernel._merged, 0

    def counted(*tensors: Any) -> Tensor:
        nonlocal num_calls
        num_calls += 1
        return merged(*tensors)

    monkeypatch.setattr(prefill_kernel, "_merged", counted)
    monkeypatch.setattr(attention_module, "PREFILL_CHUNK", 4)
    steering = Steering.for_model(model)
    task = random_prefix(model, 3)
    outputs = []
    for minimum in (1 << 30, 4):
        monkeypatch.setattr(prefill_kernel, "MIN_MERGED_QUERIES", minimum)
        for parts in (mixed_parts(model), [[Part(task)]] * 4, [[], [], [], [Part(task, 0.3)]]):
            with torch.no_grad(), steering.attached(steering.assemble(parts)):
                outputs.append(model(**batch, use_cache=False).logits)
    assert bool(num_calls) == (models.DEVICE == "cpu")
    tolerance = {torch.float64: 1e-5, torch.float32: 1e-5}.get(dtype, 5e-2)
    for chunked, apart in zip(outputs[:3], outputs[3:], strict=True):
        torch.testing.assert_close(apart, chunked, atol=tolerance, rtol=tolerance)
    with torch.no_grad():
        plain = model(**batch, use_cache=False).logits
    if models.DEVICE == "cpu":  # rows without slots are those of the plain model
        assert torch.equal(outputs[3][2], plain[2])
        assert torch.equal(outputs[5][:3], plain[:3])


def test_slots_of_a_finished_pass_need_no_garbage_collection() -> None:
    cp = engine()
    cp.put("user", "ana", random_prefix(cp.model, num_slots=3))
    request = Request(prompt="abc", user="ana", max_new_tokens=2, strengths={"user": 0.5})
    gc.disable()
    try:
        for rows in ([request], [request] * 2):
            parts = [[part.part for part in cp.resolve(row).parts] for row in rows]
            batch = cp.frozen_model.assemble(parts)
            ids = torch.tensor([cp.frozen_model.request_tokenizer.prompt_ids(request)] * len(rows))
            with torch.no_grad(), cp.frozen_model.attached(batch):
                cp.model(input_ids=ids)
                cp.model(input_ids=ids[:, :1])
            strengths = weakref.ref(batch.blocks["decoder"][0].log_strengths)
            del batch
            assert strengths() is None
    finally:
        gc.enable()
