"""The cache that grows in place, compared with transformers' own."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from controlprefix.model.kv_cache import _MIN_SPARE_TOKENS, growing_cache

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
@given(steps=_STEPS)
@settings(max_examples=60, deadline=None)
def test_it_holds_the_same_as_a_dynamic_cache(steps: list[tuple[str, Any]]) -> None:
    model = build("llama")
    caches: list[Any] = [growing_cache(model, 3), DynamicCache(config=model.config)]
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
    assert growing_cache(build("llama"), 2) is None


def test_sliding_layers_stay_as_they_are() -> None:
    model = build("gemma3")
    cache = growing_cache(model, 3)
    assert cache is not None
    kinds = [type(layer) for layer in cache.layers]
    expected = [type(layer) for layer in DynamicCache(config=model.config).layers]
    assert [a is b for a, b in zip(kinds, expected, strict=True)] == [True, False, True]
