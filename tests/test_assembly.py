"""assemble: union, padding, log strengths, and shared parts kept once."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from controlprefix import Geometry, GeometryMismatchError, Part, Prefix, RequestError, assemble

GEOMETRY = Geometry.uniform(num_layers=2, num_kv_heads=2, head_dim=4)


def prefix(num_slots: int, seed: int = 0) -> Prefix:
    return Prefix.random(GEOMETRY, num_slots=num_slots, seed=seed)


def test_parts_of_all_rows_are_kept_once() -> None:
    task, ana, bo = prefix(4), prefix(3, 1), prefix(5, 2)
    batch = assemble([[Part(task), Part(ana)], [Part(bo), Part(task)], [Part(task)]], GEOMETRY)
    shared, custom = batch.blocks["decoder"]
    assert shared.keys[0].shape == (1, 2, 4, 4)
    assert custom.keys[0].shape == (3, 2, 5, 4)
    assert custom.log_strengths.tolist() == [
        [0, 0, 0, -math.inf, -math.inf],
        [0] * 5,
        [-math.inf] * 5,
    ]
    assert batch.num_slots == 9
    assert torch.equal(shared.keys[1][0], task.layer("decoder", 1)[0])
    assert torch.equal(custom.values[0][1], bo.layer("decoder", 0)[1])


def test_the_same_prefix_at_two_strengths_is_not_shared() -> None:
    task = prefix(4)
    (custom,) = assemble([[Part(task)], [Part(task, 0.5)]], GEOMETRY).blocks["decoder"]
    assert custom.log_strengths.tolist() == [[0.0] * 4, pytest.approx([math.log(0.5)] * 4)]


def test_no_slots_give_no_blocks() -> None:
    assert assemble([[], [Part(prefix(3), 0.0)]], GEOMETRY).blocks == {}
    assert assemble([[Part(prefix(0))]], GEOMETRY).blocks == {}
    assert assemble([], GEOMETRY).num_rows == 0


@pytest.mark.slow
@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 5), st.sampled_from([0.0, 0.25, 1.0, 3.0])), max_size=4),
        min_size=1,
        max_size=5,
    )
)
def test_every_row_holds_exactly_its_parts(chosen: list[list[tuple[int, float]]]) -> None:
    """Whatever is shared or padded: the mass of each slot, summed over the blocks, is the row's."""
    prefixes = [prefix(n, seed=n) for n in range(6)]
    batch = assemble([[Part(prefixes[i], w) for i, w in row] for row in chosen], GEOMETRY)
    for r, row in enumerate(chosen):
        expected: dict[float, float] = {}
        for i, strength in row:
            for key in prefixes[i].layer("decoder", 0)[0][0, :, 0].tolist():
                if strength:
                    expected[key] = expected.get(key, 0.0) + strength
        result: dict[float, float] = {}
        for block in batch.blocks.get("decoder", ()):
            at = r if len(block.log_strengths) > 1 else 0
            pairs = zip(block.keys[0][at, 0, :, 0], block.log_strengths[at].exp(), strict=True)
            for key, mass in pairs:
                if mass > 0:
                    result[float(key)] = result.get(float(key), 0.0) + float(mass)
        assert result == pytest.approx(expected)


@pytest.mark.parametrize("strength", [math.nan, math.inf, -math.inf, -0.1])
def test_negative_and_infinite_strengths_are_refused(strength: float) -> None:
    with pytest.raises(RequestError, match="is not a finite number >= 0"):
        Part(prefix(1), strength)


def test_a_part_made_for_another_model_is_refused() -> None:
    other = Geometry.uniform(num_layers=2, num_kv_heads=2, head_dim=4, fingerprint="x")
    with pytest.raises(GeometryMismatchError):
        assemble([[Part(prefix(2))], [Part(Prefix.random(other, num_slots=2), 0.0)]], GEOMETRY)


def test_a_joined_prefix_is_the_union_of_its_parts() -> None:
    parts = [prefix(4), prefix(1, 1), prefix(2, 2)]
    (union,) = assemble([list(map(Part, parts))], GEOMETRY).blocks["decoder"]
    (joined,) = assemble([[Part(Prefix.joined(parts))]], GEOMETRY).blocks["decoder"]
    for layer in range(len(GEOMETRY.decoder)):
        for own, its in ((joined.keys, union.keys), (joined.values, union.values)):
            assert own[layer].shape == (1, 2, 7, 4)
            assert torch.equal(own[layer].sort(dim=2).values, its[layer].sort(dim=2).values)
