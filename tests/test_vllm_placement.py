"""What vLLM is given: keys at other positions, and placeholders that say all of a prefix."""

import base64
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache, PreTrainedModel

from controlprefix import (
    Geometry,
    OverloadedError,
    Part,
    Prefix,
    RequestError,
    StoreError,
    StoreKeyError,
    UnsupportedModelError,
    assemble,
)
from controlprefix.completion import PartUsed
from controlprefix.inference.resolved_request import ResolvedPart, ResolvedRequest
from controlprefix.model import FrozenModel
from controlprefix.model.condensed_text import prefix_from_text
from controlprefix.model.log_probs import kl_divergences
from controlprefix.model.mass_in_keys import MassInKeys
from controlprefix.model.rope import Rope
from controlprefix.model.steering import Steering
from controlprefix.prefixes.schedule import Schedule
from controlprefix.request import Request
from controlprefix.vllm.placement import MAX_SLOTS, Placement, place
from controlprefix.vllm.prefix_folder import PrefixFolder, file_name

from helpers import frozen
from models import ENCODER_DECODER, PARTICULAR, ROTARY, build

GEOMETRY = Geometry.uniform(num_layers=1, num_kv_heads=1, head_dim=2)


def resolved(
    parts: list[tuple[str, Prefix, float]],
    *,
    tenant: str = "a",
    schedule: Schedule = (),
    in_logit_space: bool = False,
) -> ResolvedRequest[Request]:
    resolved_parts = tuple(
        ResolvedPart(
            PartUsed(
                kind=kind, name="ana" if kind == "user" else str(i), version=1, strength=strength
            ),
            Part(prefix, 1.0 if in_logit_space else strength, schedule),
            in_logit_space,
        )
        for i, (kind, prefix, strength) in enumerate(parts)
    )
    return ResolvedRequest(Request(prompt="-"), resolved_parts, tenant)


def placed(parts: list[tuple[str, Prefix, float]], **more: object) -> Placement:
    tenant = str(more.pop("tenant", "a"))
    settings = {"vocab_size": 50_000, "block_size": 16, **more}
    return place(resolved(parts, tenant=tenant), "model", **settings)  # type: ignore[arg-type]


def slots(count: int, seed: int = 0) -> Prefix:
    return Prefix.random(GEOMETRY, num_slots=count, seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ROTARY, "gemma2", "gpt_oss", "ministral3"])
def test_a_moved_prefix_in_the_cache_says_what_slots_say(name: str) -> None:
    model = build(name, attention="eager")
    steering = Steering.for_model(model)
    geometry = steering.geometry
    few = 2  # with the text, within the windows of these small models
    prefix = Prefix.random(geometry, num_slots=few, scale=1.0, seed=1)
    text = torch.tensor([[7, 8, 9]])
    with torch.no_grad(), steering.attached(assemble([[Part(prefix)]], geometry)):
        expected = model(input_ids=text).logits
    moved = Rope.of(frozen(model)).shifted(prefix, few)
    layers = [moved.layer("decoder", i) for i in range(len(geometry.decoder))]
    cache = DynamicCache(
        ddp_cache_data=[(keys[None], values[None]) for keys, values in layers], config=model.config
    )
    with torch.no_grad():
        result = model(
            input_ids=text, past_key_values=cache, position_ids=torch.tensor([[2, 3, 4]])
        ).logits
    torch.testing.assert_close(result, expected, atol=2e-4, rtol=1e-3)


@pytest.fixture
def llama() -> FrozenModel:
    return frozen("llama")


def test_moving_there_and_back_changes_nothing_and_far_changes_much(llama: FrozenModel) -> None:
    rope = Rope.of(llama)
    prefix = Prefix.random(llama.geometry, num_slots=3, seed=0)
    moved = rope.shifted(prefix, 40)
    assert not torch.allclose(moved.slots["decoder"], prefix.slots["decoder"], atol=1e-3)
    back = rope.shifted(moved, -40)
    torch.testing.assert_close(back.slots["decoder"], prefix.slots["decoder"], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("gpt2", "not rotary"),
        ("opt", "not rotary"),
        ("deepseek_v32", "MLA"),
        ("gemma4", "share keys"),
        *((name, "encoder") for name in ENCODER_DECODER),
    ],
)
def test_what_vllm_cannot_serve_is_refused_by_name(name: str, why: str) -> None:
    assert name in {*PARTICULAR, "gpt2", "opt", *ENCODER_DECODER}
    with pytest.raises(UnsupportedModelError, match=why):
        Rope.of(frozen(name))


def test_positions_that_also_matter_elsewhere_are_noticed(
    llama: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A rotary model whose logits know where a token stands, as ALiBi or learned positions would.
    forward = type(llama.model).forward

    def placed(self, *args, position_ids=None, **kwargs):  # type: ignore[no-untyped-def]
        result = forward(self, *args, position_ids=position_ids, **kwargs)
        if position_ids is not None:
            result.logits = result.logits + position_ids[..., None]
        return result

    monkeypatch.setattr(type(llama.model), "forward", placed)
    with pytest.raises(UnsupportedModelError, match="all positions shift together"):
        Rope.of(llama)


def test_a_strength_of_three_is_each_slot_three_times(llama: FrozenModel) -> None:
    prefix = Prefix.random(llama.geometry, num_slots=3, scale=1.0, seed=2)
    placement = place(resolved([("user", prefix, 3.0)]), "model", vocab_size=300)
    together = Prefix(
        llama.geometry, {"decoder": torch.cat([p.slots["decoder"] for p, _ in placement.prefixes])}
    )
    text = torch.tensor([[7, 8, 9]])
    logits = []
    for parts in ([Part(prefix, 3.0)], [Part(together)]):
        with torch.no_grad(), llama.attached(llama.assemble([parts])):
            logits.append(llama.model(input_ids=text).logits)
    torch.testing.assert_close(*logits)
    assert placement.num_slots == len(placement.placeholder_ids) == 9


@pytest.mark.parametrize(
    ("strength", "times", "mass"),
    [(0.5, 1, 0.5), (1.25, 2, 0.625), (2.00001, 2, 1.0), (0.0001, 0, 0.0), (3.2, 4, 0.8)],
)
def test_strengths_between_whole_numbers_are_masses_of_keys(
    strength: float, times: int, mass: float
) -> None:
    prefix = slots(4)
    placement = placed([("user", prefix, strength)])
    assert placement.prefixes == ((prefix, mass),) * times
    assert placement.num_slots == 4 * times
    whole = placed([("user", prefix, float(times))])
    assert (placement.file_name == whole.file_name) == (mass in (0.0, 1.0))


def divergences(
    model: FrozenModel, prefix: Prefix, strength: float, texts: torch.Tensor
) -> tuple[float, float]:
    """Mean KL divergence (nats) from the strength, of the placed slots and of strength 1."""
    placement = place(resolved([("user", prefix, strength)]), "model", vocab_size=300)
    masses = MassInKeys(model)
    pieces = [p if m == 1 else masses.scaled(p, m) for p, m in placement.prefixes]
    rows = torch.cat([piece.slots["decoder"] for piece in pieces])
    logits = []
    placed_slots = Prefix(prefix.geometry, {"decoder": rows})
    for part in (Part(prefix, strength), Part(placed_slots), Part(prefix)):
        with torch.no_grad(), model.attached(model.assemble([[part]] * len(texts))):
            logits.append(model.model(input_ids=texts).logits.flatten(0, 1))
    exact = logits[0]
    approximate, unchanged = logits[1:]
    return (
        float(kl_divergences(approximate, exact).mean()),
        float(kl_divergences(unchanged, exact).mean()),
    )


@pytest.mark.slow
@pytest.mark.parametrize("strength", [0.1, 0.3, 0.75, 1.5, 2.5])
def test_a_fractional_strength_on_a_real_model(smollm2: PreTrainedModel, strength: float) -> None:
    model = FrozenModel.from_pretrained(smollm2)
    prefix = prefix_from_text(model, "The following is a very polite and formal letter.")
    ids = model.tokenizer("Dear Sir, I am writing to you about the car that I bought from you.")
    texts = torch.tensor([ids["input_ids"]])
    approximate, unchanged = divergences(model, prefix, strength, texts)
    assert approximate < 0.02
    assert approximate < 0.15 * unchanged


@pytest.mark.slow
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_keys_that_cannot_hold_a_strength_are_refused(num_kv_heads: int) -> None:
    model = frozen(
        build("llama", num_key_value_heads=num_kv_heads)
    )  # random queries agree on nothing
    prefix = Prefix.random(model.geometry, num_slots=4, scale=1.0, seed=2)
    placement = place(resolved([("user", prefix, 0.5)]), "model", vocab_size=300)
    with pytest.raises(RequestError, match="whole numbers as strengths of this prefix"):
        placement.slots(Rope.of(model), MassInKeys(model))


def test_schedules_guidance_and_too_many_slots_are_refused() -> None:
    with pytest.raises(RequestError, match="schedules"):
        place(
            resolved([("user", slots(4), 1.0)], schedule=((0, 1.0), (4, 0.0))),
            "model",
            vocab_size=300,
        )
    away = resolved([("attribute", slots(4), -1.0)], in_logit_space=True)
    with pytest.raises(RequestError, match="below 0"):
        place(away, "model", vocab_size=300)
    with pytest.raises(RequestError, match="slots"):
        placed([("user", slots(4), float(MAX_SLOTS))])


def test_the_order_in_which_parts_are_named_does_not_matter() -> None:
    item, other = ("attribute", slots(4, 1), 1.0), ("user", slots(4, 2), 1.0)
    assert placed([item, other]).file_name == placed([other, item]).file_name


def test_what_is_absent_takes_no_place() -> None:
    assert placed([("user", slots(4), 0.0)]).num_slots == 0
    assert placed([]).placeholder_ids == ()


def blocks_of(placement: Placement, text: list[int], size: int) -> list[tuple[object, ...]]:
    """The rule of vLLM: a full block is known by its tokens, all before it, and the salt."""
    tokens = [*placement.placeholder_ids, *text]
    return [(placement.salt, *tokens[:end]) for end in range(size, len(tokens) + 1, size)]


def content_of(placement: Placement, text: list[int], size: int) -> list[tuple[object, ...]]:
    """What really stands in each full block, and all before it: slots as they are turned."""
    rows = [
        (placement.num_slots, *row.tolist())
        for piece, mass in placement.prefixes
        for row in torch.cat(
            [piece.slots["decoder"], torch.full((len(piece.slots["decoder"]), 1), mass)], 1
        )
    ]
    whole = [*rows, *((tuple(rows), token) for token in text)]
    return [tuple(whole[:end]) for end in range(size, len(whole) + 1, size)]


KINDS = st.sampled_from(["task", "attribute", "user"])
PARTS = st.lists(
    st.tuples(KINDS, st.integers(1, 40), st.integers(0, 3), st.integers(1, 2)), max_size=4
)


@pytest.mark.slow
@given(
    one=PARTS,
    other=PARTS,
    size=st.sampled_from([4, 16, 32]),
    vocab=st.sampled_from([300, 50_000]),
    tenants=st.sampled_from([("a", "a"), ("a", "b")]),
)
def test_vllm_shares_no_block_between_requests_with_other_slots(
    one: list[tuple[str, int, int, int]],
    other: list[tuple[str, int, int, int]],
    size: int,
    vocab: int,
    tenants: tuple[str, str],
) -> None:
    result = [
        placed(
            [(kind, slots(count, seed), float(strength)) for kind, count, seed, strength in parts],
            vocab_size=vocab,
            block_size=size,
            tenant=tenant,
        )
        for parts, tenant in zip((one, other), tenants, strict=True)
    ]
    text = [9] * 70
    names = [blocks_of(placement, text, size) for placement in result]
    contents = [content_of(placement, text, size) for placement in result]
    for i, (name, content) in enumerate(zip(names[0], contents[0], strict=True)):
        if i < len(names[1]) and name == names[1][i]:
            assert content == contents[1][i]
            assert tenants[0] == tenants[1]


def test_users_of_one_task_share_its_blocks_and_no_more() -> None:
    task = ("task", slots(40, 1), 1.0)
    ana, bo = (placed([task, ("user", slots(16, seed), 1.0)]) for seed in (2, 3))
    shared = [x == y for x, y in zip(blocks_of(ana, [], 16), blocks_of(bo, [], 16), strict=True)]
    assert shared == [True, True, False]
    longer = placed([task, ("user", slots(17, 2), 1.0)])
    assert longer.salt != ana.salt  # its keys are turned further
    assert placed([task], tenant="b").salt != placed([task], tenant="a").salt


def test_digests_that_do_not_fit_a_block_are_not_relied_on() -> None:
    assert 4 * math.log2(50_000) < 128
    task = ("task", slots(16, 1), 1.0)
    ana, bo = (placed([task, ("user", slots(4, seed), 1.0)]) for seed in (2, 3))
    assert ana.salt != bo.salt


def test_a_folder_keeps_files_whole_and_drops_what_is_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[int] = []

    def keep(i: int, **more: bool) -> None:
        folder.write(names[i], lambda: built.append(i) or slots(4, i), **more)  # type: ignore[func-returns-value]

    size = len(slots(4).to_bytes())
    folder = PrefixFolder(tmp_path / "new", max_bytes=3 * size + 1)
    names = [f"{i:064x}" for i in range(5)]
    keep(0)
    keep(0)
    assert built == [0]
    torch.testing.assert_close(folder.read(names[0]).slots["decoder"], slots(4).slots["decoder"])
    folder.file(names[0]).write_bytes(b"")
    with pytest.raises(StoreError, match="cannot be read"):
        folder.read(names[0])
    keep(0, overwrite=True)
    assert folder.read(names[0]).num_slots == 4
    keep(1)
    keep(2)
    with pytest.raises(OverloadedError, match="in use"):  # all three are
        keep(3)
    monkeypatch.setattr("controlprefix.vllm.prefix_folder._IN_USE_S", -1.0)
    keep(4)
    assert not folder.file(names[0]).exists()
    assert sum(item.stat().st_size for item in (tmp_path / "new").iterdir()) <= 3 * size
    monkeypatch.setattr("controlprefix.vllm.prefix_folder._MAX_AGE_S", -1.0)
    monkeypatch.setattr("controlprefix.vllm.prefix_folder._SWEEP_INTERVAL_S", -1.0)
    others = [tmp_path / "new" / "lost+found", tmp_path / "new" / "notes.txt"]
    others[0].mkdir()
    others[1].write_text("not ours")
    keep(0)
    assert {*(tmp_path / "new").iterdir()} == {folder.file(names[0]), *others}
    folder.remove_expired()  # as a server does now and then, though nothing is written
    assert {*(tmp_path / "new").iterdir()} == {*others}


def test_an_encrypted_folder_is_read_with_its_key_alone(tmp_path: Path) -> None:
    keys = {name: tmp_path / name for name in ("key", "other")}
    for i, path in enumerate(keys.values()):
        path.write_text(base64.b64encode(bytes([i]) * 32).decode() + "\n")
    folder = PrefixFolder(tmp_path / "new", key_file=keys["key"])
    name, twin = "0" * 64, "1" * 64
    folder.write(name, lambda: slots(4))
    assert b"geometry" in slots(4).to_bytes()
    assert b"geometry" not in folder.file(name).read_bytes()
    torch.testing.assert_close(folder.read(name).slots["decoder"], slots(4).slots["decoder"])
    with pytest.raises(StoreError, match="cannot be decrypted"):
        PrefixFolder(tmp_path / "new", key_file=keys["other"]).read(name)
    with pytest.raises(StoreError, match="cannot be read"):
        PrefixFolder(tmp_path / "new").read(name)
    folder.file(twin).write_bytes(folder.file(name).read_bytes())  # moved to another name
    with pytest.raises(StoreError, match="cannot be decrypted"):
        folder.read(twin)
    for text in ("no base64!", base64.b64encode(bytes(31)).decode()):
        keys["other"].write_text(text)
        with pytest.raises(StoreKeyError, match="16, 24 or 32 bytes"):
            PrefixFolder(tmp_path / "new", key_file=keys["other"])
    with pytest.raises(StoreKeyError, match="cannot read the key"):
        PrefixFolder(tmp_path / "new", key_file=tmp_path / "missing")


def test_files_say_which_user_of_which_tenant_they_are_of(tmp_path: Path) -> None:
    folder = PrefixFolder(tmp_path)
    prefix = slots(4)
    user = placed([("user", prefix, 1.0)], tenant="a")
    names = [
        user.file_name,
        placed([("user", prefix, 1.0)], tenant="b").file_name,
        placed([("task", prefix, 1.0)]).file_name,
        placed([("user", prefix, 0.0), ("task", prefix, 1.0)]).file_name,
        file_name(user.file_name.rpartition("-")[2], "a", "bo"),
    ]
    assert len(set(names)) == 4  # a user at strength 0 is absent
    assert len({name.rpartition("-")[2] for name in names}) == 2
    for name in names:
        folder.write(name, lambda: prefix)
    folder.forget("a", "ana")
    assert [folder.file(name).exists() for name in names] == [False, True, True, True, True]
    folder.forget("a", "never")


def test_a_folder_that_cannot_be_written_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = PrefixFolder(tmp_path)

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StoreError, match="No space left"):
        folder.write("0" * 64, lambda: slots(4))
    assert list(tmp_path.iterdir()) == []
