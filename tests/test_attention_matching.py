"""Few matched slots do in attention what many slots did, and stand for all of a text."""

from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from controlprefix import Geometry, Prefix
from controlprefix.model import FrozenModel, condensed_text
from controlprefix.model.attention_matching import matched, nonnegative_least_squares
from controlprefix.model.condensed_text import prefix_from_pieces
from controlprefix.model.slot_attention import (
    LayerAttention,
    QueryText,
    SlotAttention,
    most_attended,
    observe,
)

from helpers import engine, frozen

KINDS = ["llama", "gemma3", "gpt2", "t5"]


def query_texts(seed: int, count: int = 6) -> list[QueryText]:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 200, (count, 24), generator=draw).tolist()
    return [QueryText(row[:4], row[4:]) for row in ids]


def output_error(
    whole: Prefix, short: Prefix, attention: SlotAttention, short_attention: SlotAttention
) -> float:
    """How far the shorter prefix is from the whole one in what attention gets, relative to it."""
    error = size = 0.0
    for site, layers in attention.items():
        for i, (layer, own) in enumerate(zip(layers, short_attention[site], strict=True)):
            output = layer.weights.double() @ whole.layer(site, i)[1].double()
            short_output = own.weights.double() @ short.layer(site, i)[1].double()
            error += float((output - short_output).square().sum())
            size += float(output.square().sum())
    return error / size


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_matching_beats_selection_on_texts_it_did_not_get(name: str) -> None:
    model = frozen(name)
    whole = Prefix.random(model.geometry, num_slots=48, scale=1.0, seed=1)
    attention, held_out = (observe(model, whole, query_texts(seed)) for seed in (1, 2))
    errors = []
    for short in (matched(whole, attention, 8), most_attended(whole, attention, 8)):
        assert short.num_slots == 8
        assert short.dtype == whole.dtype
        own = observe(model, short, query_texts(2))
        errors.append(output_error(whole, short, held_out, own))
    assert errors[0] < 0.7 * errors[1]


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_prefix_with_room_is_returned_as_it_is(name: str) -> None:
    model = frozen(name)
    whole = Prefix.random(model.geometry, num_slots=6, scale=1.0, seed=1)
    assert matched(whole, observe(model, whole, query_texts(1, 2)), 6) is whole


def test_equal_slots_become_one_without_loss() -> None:
    """Where queries have a direction in common, as in real models, a key can hold any mass."""
    draw = torch.Generator().manual_seed(0)
    geometry = Geometry.uniform(num_layers=1, num_kv_heads=1, head_dim=8)
    single = Prefix.random(geometry, num_slots=1, seed=1)
    whole = Prefix(geometry, {"decoder": single.slots["decoder"].repeat(8, 1)})
    queries = torch.randn(1, 200, 8, generator=draw, dtype=torch.float64)
    queries[..., 0] = 1.0

    def attention(prefix: Prefix) -> SlotAttention:
        """Softmax with one token, whose logit is 0."""
        keys = prefix.layer("decoder", 0)[0].double()
        logits = torch.cat([queries @ keys.transpose(1, 2), torch.zeros(1, 200, 1)], dim=2)
        return {"decoder": [LayerAttention(queries, logits.softmax(dim=2)[..., :-1])]}

    short = matched(whole, attention(whole), 1)
    assert output_error(whole, single, attention(whole), attention(single)) > 0.1
    assert output_error(whole, short, attention(whole), attention(short)) < 1e-3


def test_hidden_slots_get_no_attention() -> None:
    model = frozen("llama")
    whole = Prefix.random(model.geometry, num_slots=6, scale=1.0, seed=1)
    (query_text,) = query_texts(1, 1)
    hidden = observe(model, whole, [query_text._replace(hidden=range(2, 5))])
    rest = Prefix(model.geometry, {"decoder": whole.slots["decoder"][[0, 1, 5]]})
    alone = observe(model, rest, [query_text])
    for layer, expected in zip(hidden["decoder"], alone["decoder"], strict=True):
        assert torch.equal(layer.weights[..., [0, 1, 5]], expected.weights)
        assert not layer.weights[..., 2:5].any()
        assert torch.equal(layer.queries, expected.queries)
    few = observe(model, whole, [query_text], max_queries=5)["decoder"][0]
    assert few.weights.shape[1] == 5 * 4 // few.weights.shape[0]


@pytest.mark.parametrize("name", ["llama", "gemma3"])  # with a scaling of its own
def test_logits_of_queries_are_products(name: str) -> None:
    """The recorded queries and the keys give the recorded weights."""
    model = frozen(name)
    whole = Prefix.random(model.geometry, num_slots=6, scale=1.0, seed=1)
    for i, layer in enumerate(observe(model, whole, query_texts(1))["decoder"]):
        keys = whole.layer("decoder", i)[0].double()
        ratios = layer.weights / (layer.queries @ keys.transpose(1, 2)).exp()
        assert torch.allclose(ratios, ratios[..., :1].expand_as(ratios), rtol=1e-4)


@pytest.mark.slow
@given(seed=st.integers(0, 10_000), slots=st.integers(1, 12), queries=st.integers(1, 40))
@settings(max_examples=30)
def test_nonnegative_least_squares_agrees_with_scipy(seed: int, slots: int, queries: int) -> None:
    from scipy.optimize import nnls

    draw = numpy.random.default_rng(seed)
    inputs = draw.random((queries, slots)) ** 3
    targets = draw.random(queries)
    own = nonnegative_least_squares(torch.tensor(inputs)[None], torch.tensor(targets)[None])[0]
    assert own.min() >= 0
    best = nnls(inputs, targets)[1]
    error = numpy.linalg.norm(inputs @ own.numpy() - targets)
    assert error <= best + 0.02 * numpy.linalg.norm(targets)


def distance(left: Prefix, right: Prefix) -> float:
    return max(float((left.slots[s] - right.slots[s]).abs().max()) for s in left.slots)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_every_text_counts(name: str) -> None:
    model: FrozenModel = frozen(name)
    draw = torch.Generator().manual_seed(0)
    pieces = [torch.randint(5, 200, (20,), generator=draw).tolist() for _ in range(6)]
    prefix = prefix_from_pieces(model, pieces, 8)
    assert prefix.num_slots == 8
    assert distance(prefix, prefix_from_pieces(model, pieces, 8)) == 0
    for i in range(len(pieces)):
        changed = [piece[::-1] if i == j else piece for j, piece in enumerate(pieces)]
        assert distance(prefix, prefix_from_pieces(model, changed, 8)) > 1e-4
    exact = prefix_from_pieces(model, pieces[:2], 40)
    assert exact.num_slots == 40


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_texts_longer_than_the_context_are_read_in_several_passes(name: str) -> None:
    changes: Any = {"n_positions" if name == "gpt2" else "max_position_embeddings": 64}
    cp = engine(name, **changes)
    context = cp.frozen_model.request_tokenizer.context_length
    assert context == 64
    text = " ".join(f"word {i}" for i in range(60))
    assert cp.frozen_model.request_tokenizer.text_ids(text)[64:]
    prefix = cp.prefix_from_text(text, max_slots=8)
    assert prefix.num_slots == 8
    assert not prefix.is_exact
    other = cp.prefix_from_text(f"{text[:-2]}xy", max_slots=8)
    assert distance(prefix, other) > 1e-5


@pytest.mark.slow
def test_enrolment_reads_all_texts() -> None:
    cp = engine()
    texts = [f"I like number {i} best of all." for i in range(12)]
    stored = []
    for count in (3, 6, 12):
        cp.enroll("ana", texts[:count], num_slots=16)
        stored.append(cp.get("user", "ana"))
    assert all(prefix.num_slots == 16 for prefix in stored)
    assert distance(stored[0], stored[1]) > 1e-4
    assert distance(stored[1], stored[2]) > 1e-4


def test_the_memory_of_long_texts_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    observed: list[int] = []

    def noting(frozen: Any, prefix: Prefix, *arguments: Any, **options: Any) -> SlotAttention:
        observed.append(prefix.num_slots)
        return observe(frozen, prefix, *arguments, **options)

    monkeypatch.setattr(condensed_text, "observe", noting)
    monkeypatch.setattr(condensed_text, "_MAX_PASS_TOKENS", 32)
    for num_slots in (8, 20):
        observed.clear()
        prefix = engine().prefix_from_text("all of it counts, " * 40, max_slots=num_slots)
        assert prefix.num_slots == num_slots
        assert max(observed) <= max(32, 2 * num_slots)
