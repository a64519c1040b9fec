"""Prefix: an immutable value, and damaged bytes are refused."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from controlprefix import Geometry, GeometryMismatchError, Prefix, PrefixFormatError, StoreError
from controlprefix.prefixes.geometry import LayerShape

from helpers import coded, decoder

SMALL = Geometry.uniform(num_layers=2, num_kv_heads=2, head_dim=4, fingerprint="f" * 64)
UNEVEN = Geometry(
    decoder=(LayerShape(2, 4, 4), LayerShape(1, 8, 6)),
    encoder=(LayerShape(3, 2, 2),),
    cross=(LayerShape(2, 4, 4), LayerShape(2, 4, 4)),
    fingerprint="e" * 64,
)


def same(a: Prefix, b: Prefix) -> bool:
    return a.geometry == b.geometry and all(torch.equal(a.slots[s], b.slots[s]) for s in a.slots)


@given(
    geometry=st.sampled_from([SMALL, UNEVEN]),
    num_slots=st.integers(0, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 1000),
)
def test_bytes_round_trip(
    geometry: Geometry, num_slots: int, dtype: torch.dtype, seed: int
) -> None:
    prefix = Prefix.random(geometry, num_slots=num_slots, seed=seed).to(dtype=dtype)
    data = prefix.to_bytes()
    read = Prefix.from_bytes(data)
    assert same(prefix, read)
    assert read.dtype == dtype
    assert read.to_bytes() == data


def test_layers_come_back_as_they_were_given() -> None:
    torch.manual_seed(0)
    layers = {
        site: [
            (torch.randn(s.num_kv_heads, 5, s.key_dim), torch.randn(s.num_kv_heads, 5, s.value_dim))
            for s in UNEVEN.layers(site)
        ]
        for site in UNEVEN.sites
    }
    prefix = Prefix.from_layers(UNEVEN, **layers)
    assert prefix.num_slots == 5
    for site, pairs in layers.items():
        for i, (keys, values) in enumerate(pairs):
            read_keys, read_values = prefix.layer(site, i)
            assert torch.equal(read_keys, keys)
            assert torch.equal(read_values, values)


def test_a_saved_file_is_loaded_and_a_missing_one_named(tmp_path: Path) -> None:
    prefix = Prefix.random(UNEVEN, num_slots=3, seed=1)
    prefix.save(tmp_path / "p.safetensors")
    assert same(Prefix.load(tmp_path / "p.safetensors"), prefix)
    assert [path.name for path in tmp_path.iterdir()] == ["p.safetensors"]
    with pytest.raises(StoreError, match="cannot read the prefix file '.*q.safetensors'"):
        Prefix.load(tmp_path / "q.safetensors")
    with pytest.raises(StoreError, match="cannot write the prefix file"):
        prefix.save(tmp_path / "none" / "p.safetensors")
    (tmp_path / "p.safetensors").write_bytes(b"x")
    with pytest.raises(PrefixFormatError, match="the file '.*p.safetensors'"):
        Prefix.load(tmp_path / "p.safetensors")


def test_a_site_left_out_has_no_slots() -> None:
    keys = [(torch.zeros(s.num_kv_heads, 3, s.key_dim),) for s in UNEVEN.decoder]
    values = [(torch.zeros(s.num_kv_heads, 3, s.value_dim),) for s in UNEVEN.decoder]
    prefix = Prefix.from_layers(UNEVEN, decoder=[k + v for k, v in zip(keys, values, strict=True)])
    assert {site: len(rows) for site, rows in prefix.slots.items()} == {
        "decoder": 3,
        "encoder": 0,
        "cross": 0,
    }
    assert same(Prefix.from_bytes(prefix.to_bytes()), prefix)


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=200)
def test_any_damaged_byte_is_detected(data: st.DataObject) -> None:
    """Either refused, or (a byte that means nothing, such as a space) read as the same prefix."""
    prefix = Prefix.random(SMALL, num_slots=2, seed=1)
    damaged = bytearray(prefix.to_bytes())
    at = data.draw(st.integers(0, len(damaged) - 1))
    damaged[at] ^= data.draw(st.integers(1, 255))
    try:
        read = Prefix.from_bytes(bytes(damaged))
    except PrefixFormatError:
        return
    assert same(read, prefix)


def test_any_truncation_is_refused() -> None:
    whole = Prefix.random(SMALL, num_slots=2, seed=1).to_bytes()
    for length in range(len(whole)):
        with pytest.raises(PrefixFormatError):
            Prefix.from_bytes(whole[:length])


@given(st.binary(max_size=400))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(PrefixFormatError):
        Prefix.from_bytes(data)


def test_a_header_that_claims_terabytes_is_refused_before_anything_is_allocated() -> None:
    whole = Prefix.random(SMALL, num_slots=2, seed=1).to_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    header["decoder"]["shape"] = [1 << 40, 32]
    header["decoder"]["data_offsets"] = [0, 1 << 47]
    hostile = json.dumps(header).encode()
    with pytest.raises(PrefixFormatError):
        Prefix.from_bytes(len(hostile).to_bytes(8, "little") + hostile + whole[8 + length :])
    with pytest.raises(PrefixFormatError):
        Prefix.from_bytes((1 << 62).to_bytes(8, "little") + whole[8:])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinite_slots_are_refused(bad: float) -> None:
    prefix = Prefix.random(SMALL, num_slots=3, seed=1)
    prefix.slots["decoder"][1, 5] = bad
    with pytest.raises(PrefixFormatError, match="NaN or infinite values in 1 of its 3"):
        prefix.to_bytes()
    with pytest.raises(PrefixFormatError, match="NaN or infinite"):
        Prefix.from_layers(SMALL, decoder=[prefix.layer("decoder", i) for i in range(2)])


def test_a_safetensors_file_that_is_no_prefix_is_refused() -> None:
    with pytest.raises(PrefixFormatError, match="not a prefix written by controlprefix"):
        Prefix.from_bytes(save({"weight": torch.zeros(2)}))


def test_a_later_format_says_to_upgrade() -> None:
    header = {"format": 2, "geometry": SMALL.to_dict(), "sha256": ""}
    data = save({"decoder": torch.zeros(1, 32)}, metadata={"controlprefix": json.dumps(header)})
    with pytest.raises(PrefixFormatError, match="format 2; this version reads up to 1, so"):
        Prefix.from_bytes(data)


def test_wrong_shapes_are_refused_by_name() -> None:
    layers = [(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4))] * 2
    with pytest.raises(GeometryMismatchError, match="has 1 decoder layers but model"):
        Prefix.from_layers(SMALL, decoder=layers[:1])
    with pytest.raises(GeometryMismatchError, match="values of decoder layer 1 have shape"):
        Prefix.from_layers(SMALL, decoder=[layers[0], (torch.zeros(2, 3, 4), torch.zeros(2, 4, 4))])
    with pytest.raises(GeometryMismatchError, match="site 'cross'"):
        Prefix(SMALL, {"cross": torch.zeros(1, 32)})


def test_another_geometry_is_refused_with_both_values() -> None:
    other = Geometry.uniform(num_layers=2, num_kv_heads=8, head_dim=4, fingerprint="f" * 64)
    with pytest.raises(GeometryMismatchError, match="8 kv heads .* has 2 kv heads"):
        SMALL.require(other, "prefix")
    longer = Geometry.uniform(num_layers=3, num_kv_heads=2, head_dim=4, fingerprint="f" * 64)
    with pytest.raises(GeometryMismatchError, match="3 decoder layers but model 'model' has 2"):
        SMALL.require(longer, "prefix")
    weights = Geometry.uniform(num_layers=2, num_kv_heads=2, head_dim=4, fingerprint="0" * 64)
    with pytest.raises(GeometryMismatchError, match="made for the weights '000000000000'"):
        SMALL.require(weights, "prefix")


def test_a_prefix_does_not_change_with_the_tensors_it_was_made_from() -> None:
    keys = torch.ones(2, 3, 4)
    prefix = Prefix.from_layers(SMALL, decoder=[(keys, keys)] * 2)
    keys.zero_()
    assert prefix.layer("decoder", 0)[0].eq(1).all()
    with pytest.raises(TypeError):
        prefix.slots["decoder"] = keys  # type: ignore[index]


@given(seed=st.integers(0, 1000), scale=st.sampled_from([1e-6, 1.0, 300.0]))
@settings(max_examples=30, deadline=None)
def test_int8_is_within_half_a_step_of_each_heads_largest_number(seed: int, scale: float) -> None:
    layers = (LayerShape(2, 4, 6), LayerShape(1, 8, 8))
    geometry = Geometry(decoder=layers, fingerprint="f" * 64, model_name="m")
    prefix = Prefix.random(geometry, num_slots=5, scale=scale, seed=seed)
    again = Prefix.from_bytes(prefix.to_bytes("int8"))
    assert (again.dtype, again.geometry) == (torch.float32, geometry)
    for i in range(2):
        for was, now in zip(prefix.layer("decoder", i), again.layer("decoder", i), strict=True):
            step = was.abs().amax(dim=2, keepdim=True) / 127
            # The scale is rounded to bfloat16, by less than 2**-8 of it.
            assert ((was - now).abs() <= step * (0.5 + 127 * 2**-8) + 1e-30).all()
            assert ((was - now).abs().mean(dim=2) <= step[..., 0] * 0.6).all()


def test_int8_halves_the_bytes_and_keeps_zero_and_dtype() -> None:
    geometry = Geometry.uniform(num_layers=8, num_kv_heads=4, head_dim=64)
    prefix = Prefix.random(geometry, num_slots=32, seed=0).to(dtype=torch.bfloat16)
    prefix.slots["decoder"][3] = 0
    again = Prefix.from_bytes(prefix.to_bytes("int8"))
    assert again.dtype == torch.bfloat16
    assert not again.slots["decoder"][3].any()
    assert len(prefix.to_bytes("int8")) < 0.53 * len(prefix.to_bytes())
    exact = Prefix.random(geometry, num_slots=2, seed=0).to(dtype=torch.float64)
    assert Prefix.from_bytes(exact.to_bytes("int8")).dtype == torch.float32
    for value in (prefix, coded(decoder())):
        with pytest.raises(PrefixFormatError, match="dtype is 'fp16'; it must be one of: float32"):
            value.to_bytes("fp16")  # type: ignore[arg-type]
    halved = Prefix.from_bytes(prefix.to(dtype=torch.float32).to_bytes("float16"))
    assert halved.dtype == torch.float16


def test_values_too_large_for_the_storage_dtype_are_refused() -> None:
    prefix = Prefix.random(Geometry.uniform(num_layers=1, num_kv_heads=1, head_dim=4), num_slots=1)
    prefix.slots["decoder"][0, 0] = 1e6
    with pytest.raises(PrefixFormatError, match="infinite values .* as torch.float16"):
        prefix.to_bytes("float16")
