"""The cache that grows in place, compared with transformers' own."""

import inspect
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from controlprefix.model.cache_rows import CacheRow, arrange_rows, overwrite_row
from controlprefix.model.kv_cache import (
    _MIN_SPARE_TOKENS,
    behind_slots,
    cache_argument,
    growing_cache,
    new_cache,
)
from controlprefix.model.steering import Steering
from controlprefix.prefixes import Part

import models
from helpers import inputs, random_prefix, tokens
from models import build

_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("update"), st.integers(1, _MIN_SPARE_TOKENS + 3)),
        st.tuples(st.just("crop"), st.integers(1, 3)),
        st.tuples(st.just("reorder"), st.permutations(range(2))),
        st.tuples(st.just("repeat"), st.just(2)),
        st.tuples(st.just("select"), st.just(0)),
    ),
    max_size=8,
)


@pytest.mark.slow
@given(steps=_STEPS, num_slots=st.sampled_from([0, 5]))
@settings(max_examples=60, deadline=None)
def test_it_holds_the_same_as_a_dynamic_cache(steps: list[tuple[str, Any]], num_slots: int) -> None:
    model = build("llama")
    caches: list[Any] = [growing_cache(model, 3, num_slots), DynamicCache(config=model.config)]
    rows, length = 2, 0
    generator = torch.Generator().manual_seed(0)
    for name, argument in [("update", 3), *steps, ("update", 1), ("update", 1)]:
        if name == "update":
            new = torch.randn(2, rows, 2, argument, 8, generator=generator, device="cpu")
            length += argument
            (keys, values), (expected_keys, expected_values) = (
                cache.update(new[0], new[1], 0) for cache in caches
            )
            assert torch.equal(keys, expected_keys)
            assert torch.equal(values, expected_values)
            continue
        for cache in caches:
            if name == "crop" and length > argument:
                cache.crop(-argument)
            elif name == "reorder" and rows == 2:
                cache.reorder_cache(torch.tensor(argument))
            elif name == "repeat":
                cache.batch_repeat_interleave(argument)
            elif name == "select":
                cache.batch_select_indices(torch.tensor([argument]))
        length -= argument if name == "crop" and length > argument else 0
        rows = {"repeat": rows * 2, "select": 1}.get(name, rows)
    assert caches[0].get_seq_length() == length


def test_tokens_are_written_in_place_while_there_is_room() -> None:
    model = build("llama")
    cache: Any = growing_cache(model, 3)
    cache.update(torch.ones(1, 2, 3, 8), torch.ones(1, 2, 3, 8), 0)
    before = cache.layers[0].keys.data_ptr()
    for _ in range(_MIN_SPARE_TOKENS):
        cache.update(torch.ones(1, 2, 1, 8), torch.ones(1, 2, 1, 8), 0)
    assert cache.layers[0].keys.data_ptr() == before


def test_encoder_decoders_and_small_batches_keep_the_cache_of_transformers() -> None:
    assert growing_cache(build("t5"), 8) is None
    small = growing_cache(build("llama"), 2)
    assert (small is None) == (models.DEVICE == "cpu")


def test_the_cache_has_the_name_that_the_model_takes() -> None:
    model = build("llama")
    assert cache_argument(model) in inspect.signature(type(model).forward).parameters

    class Renamed(type(model)):  # type: ignore[misc]
        def forward(self, input_ids: Any, cache: Any = None) -> Any:
            raise NotImplementedError

    assert cache_argument(Renamed(model.config)) == "cache"


def test_sliding_layers_stay_as_they_are() -> None:
    model = build("gemma3")
    cache = growing_cache(model, 3)
    assert cache is not None
    kinds = [type(layer) for layer in cache.layers]
    expected = [type(layer) for layer in DynamicCache(config=model.config).layers]
    assert [a is b for a, b in zip(kinds, expected, strict=True)] == [True, False, True]


def _rows_of(a: Part, b: Part, c: Part) -> list[list[list[Part]]]:
    return [[[a], [a, b], [c]], [[a, b], [a], [a, Part(c.prefix, 2.5)]], [[], [], []]]


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3", "gpt2"])
@pytest.mark.parametrize("room", [0, 3, 8, 20])
def test_slots_in_the_cache_change_nothing(name: str, room: int) -> None:
    """Other slots from step to step, more or fewer than there is room for, and none."""
    model = build(name)
    steering = Steering.for_model(model)
    a, b, c = (Part(random_prefix(model, n, seed=n)) for n in (3, 5, 8))
    batches = [steering.assemble(rows) for rows in _rows_of(a, b, c)]
    logits = []
    for cache in (new_cache(model, room), DynamicCache(config=model.config)):
        batch = inputs(model, [tokens(5), tokens(3), tokens(4)])
        results = []
        for step in range(8):
            with torch.no_grad(), steering.attached(batches[step // 2 % 3]):
                output = model(**batch, past_key_values=cache)
            results.append(output.logits[:, -1])
            mask = batch["attention_mask"]
            ids = torch.arange(3)[:, None] + 10 + step
            batch = {
                "input_ids": ids,
                "attention_mask": torch.cat([mask, torch.ones_like(ids)], 1),
                "position_ids": mask.sum(1, keepdim=True),
            }
        logits.append(torch.stack(results))
    assert torch.allclose(logits[0], logits[1], atol=1e-5)


def test_slots_are_written_once_and_only_where_there_is_room_for_them() -> None:
    cache: Any = new_cache(build("llama"), 4)
    keys, _ = cache.update(torch.ones(2, 2, 3, 8), torch.ones(2, 2, 3, 8), 0)
    slots, owner = torch.full((2, 2, 4, 8), 7.0), object()
    with torch.no_grad():
        joined = behind_slots(keys, [slots], owner, 0)
        assert joined is not None
        assert torch.equal(joined, torch.cat([slots, keys], 2))
        assert joined.untyped_storage().data_ptr() == keys.untyped_storage().data_ptr()
        other = slots + 1
        again = ((owner, 0, slots), (owner, 1, other), (object(), 1, other))
        for changed, layer, written in again:
            joined = behind_slots(keys, [other], changed, layer)
            assert joined is not None
            assert torch.equal(joined[:, :, :4], written)
        assert behind_slots(keys, [slots, slots], owner, 0) is None
        assert behind_slots(keys[:, :, 1:], [slots], owner, 0) is None
        foreign = torch.ones(2, 2, 9, 8)
        assert behind_slots(foreign[:, :, 4:], [slots], owner, 0) is None
        assert bool((foreign == 1).all())
    assert behind_slots(keys, [slots], owner, 0) is None  # gradients may be needed


def test_rows_keep_their_tokens_when_they_move() -> None:
    model = build("llama")
    caches: list[Any] = []
    for num_rows, length in ((2, 6), (3, 9)):
        cache: Any = new_cache(model, 2)
        for layer in range(model.config.num_hidden_layers):
            cache.update(*torch.randn(2, num_rows, 2, length, 8), layer)
        caches.append(cache)
    rows = [CacheRow(caches[1], 2, 4), CacheRow(caches[0], 0, 6), CacheRow(caches[1], 0, 2)]
    expected = [
        caches[i].layers[1].keys[row.row, :, -row.num_tokens :].clone()
        for i, row in zip((1, 0, 1), rows, strict=True)
    ]
    arrange_rows(caches[1], rows, 6, model.device, num_slots=5)
    keys = caches[1].layers[1].keys
    assert keys.shape[2] == 6
    for i, row in enumerate(rows):
        assert torch.equal(keys[i, :, -row.num_tokens :], expected[i])
    keys[1] = torch.nan  # what a failed request left
    overwrite_row(caches[1], 1, CacheRow(caches[0], 1, 3))
    assert torch.equal(keys[1, :, -3:], caches[0].layers[1].keys[1, :, -3:])
    assert not keys[1].isnan().any()
