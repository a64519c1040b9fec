"""Attaching prefixes to a model: nothing stays behind, threads are apart, models are probed."""

import asyncio
import contextlib
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    AttentionInterface,
    PreTrainedModel,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from controlprefix import Part, PrefixBatch, RequestError, UnsupportedModelError, assemble
from controlprefix.model import attention as attention_module
from controlprefix.model import steering as steering_module
from controlprefix.model.attention import LAYER_ATTRIBUTE
from controlprefix.model.steering import Steering

from helpers import random_prefix, tokens
from models import DECODER_ONLY, build


def leave_with_an_error(model: PreTrainedModel) -> None:
    assert any(LAYER_ATTRIBUTE in vars(m) for m in model.modules())
    raise ZeroDivisionError


def test_nothing_is_left_on_the_model() -> None:
    model = build("bart")
    steering = Steering.for_model(model)
    before = [(m, dict(vars(m))) for m in model.modules()]
    registered = dict(AttentionInterface._global_mapping)
    with (
        pytest.raises(ZeroDivisionError),
        steering.attached(assemble([[Part(random_prefix(model, 2))]], steering.geometry)),
    ):
        leave_with_an_error(model)
    for module, attributes in before:
        assert vars(module).keys() == attributes.keys()
    assert dict(AttentionInterface._global_mapping) == registered


def test_other_models_are_left_alone_while_one_is_steered() -> None:
    for attention in ("sdpa", "eager"):
        model, other = build("llama", attention=attention), build("opt", attention=attention)
        steering = Steering.for_model(model)
        with torch.no_grad():
            plain = other(tokens(6)).logits
            with steering.attached(assemble([[Part(random_prefix(model, 3))]], steering.geometry)):
                assert torch.equal(other(tokens(6)).logits, plain)


def test_a_call_under_way_when_the_last_block_closes_still_finds_its_function() -> None:
    """Another thread's plain call may have looked our function up just before."""
    model = build("llama")
    steering = Steering.for_model(model)
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with steering.attached(assemble([[Part(random_prefix(model, 3))]], steering.geometry)):
        ours = ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert ours is not original
    query, key = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    module = model.model.layers[0].self_attn
    expected = original(module, query, key, key, mask)[0]
    assert torch.equal(ours(module, query, key, key, mask)[0], expected)


def test_an_implementation_changed_later_is_followed_or_refused() -> None:
    model = build("llama")
    steering = Steering.for_model(model)
    batch = assemble([[Part(random_prefix(model, 4))]], steering.geometry)
    with torch.no_grad(), steering.attached(batch):
        steered = model(tokens(6)).logits
        model.set_attn_implementation("eager")
        assert torch.allclose(model(tokens(6)).logits, steered, atol=1e-5)
    assert model.config._attn_implementation == "eager"
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(UnsupportedModelError, match="flex_attention"), steering.attached(batch):
        pass


def test_threads_and_nested_blocks_see_their_own_prefixes() -> None:
    model = build("llama")
    steering = Steering.for_model(model)
    ids = tokens(6)
    item, two = (
        assemble([[Part(random_prefix(model, 4, seed=s))]], steering.geometry) for s in (1, 2)
    )

    def logits() -> Tensor:
        with torch.no_grad():
            result: Tensor = model(ids).logits
        return result

    plain = logits()
    with steering.attached(item):
        first = logits()
    with steering.attached(two):
        second = logits()
        with steering.attached(item):
            assert torch.equal(logits(), first)
        assert torch.equal(logits(), second)
    calls: dict[str, object] = {}

    def elsewhere(name: str) -> None:
        def work() -> None:
            try:
                calls[name] = logits()
            except RequestError as error:
                calls[name] = error

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    with steering.attached(item):
        elsewhere("private")
    with steering.attached(two, everywhere=True):
        elsewhere("everywhere")
    assert torch.equal(calls["private"], plain)  # type: ignore[arg-type]
    assert torch.equal(calls["everywhere"], second)  # type: ignore[arg-type]

    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with steering.attached(item, everywhere=True):
            entered.set()
            leave.wait(10)

    holder = threading.Thread(target=hold)
    holder.start()
    entered.wait(10)
    with steering.attached(two, everywhere=True):
        assert torch.equal(logits(), second)
        elsewhere("ambiguous")
    leave.set()
    holder.join()
    assert isinstance(calls["ambiguous"], RequestError)


def test_a_call_with_the_wrong_number_of_rows_is_refused() -> None:
    model = build("llama")
    steering = Steering.for_model(model)
    parts = [[Part(random_prefix(model, 2, seed=s))] for s in (1, 2)]
    with steering.attached(assemble(parts, steering.geometry)):
        with pytest.raises(RequestError, match="3 rows inside a block assembled for 2 requests"):
            model(torch.cat([tokens(4)] * 3))


def test_geometry_is_read_off_the_model() -> None:
    qwen, bart = (
        Steering.for_model(build("qwen3")).geometry,
        Steering.for_model(build("bart")).geometry,
    )
    assert [(s.num_kv_heads, s.key_dim, s.value_dim) for s in qwen.decoder] == [(2, 16, 16)] * 3
    assert qwen.sites == ("decoder",)
    assert [len(bart.encoder), len(bart.decoder), len(bart.cross)] == [2, 4, 4]
    assert [bart.encoder[0].num_kv_heads, bart.decoder[0].num_kv_heads] == [4, 2]


def test_fingerprint_tells_weights_apart_but_not_precisions() -> None:
    fingerprint = Steering.for_model(build("llama")).geometry.fingerprint
    assert Steering.for_model(build("llama")).geometry.fingerprint == fingerprint
    assert Steering.for_model(build("llama", seed=1)).geometry.fingerprint != fingerprint
    half = build("llama", dtype=torch.bfloat16)
    again = Steering.for_model(half.float()).geometry.fingerprint
    assert Steering.for_model(build("llama", dtype=torch.bfloat16)).geometry.fingerprint == again
    assert again == fingerprint


@pytest.mark.parametrize("name", DECODER_ONLY)
def test_attention_weights_keep_the_shape_a_caller_expects(name: str) -> None:
    model = build(name, attention="eager")
    steering = Steering.for_model(model)
    with (
        torch.no_grad(),
        steering.attached(assemble([[Part(random_prefix(model, 4))]], steering.geometry)),
    ):
        attentions = model(tokens(5), output_attentions=True).attentions
    assert {tuple(a.shape) for a in attentions} == {(1, 4, 5, 5)}
    assert all((a.sum(-1) < 1).all() for a in attentions)  # the rest of the mass is on slots


def test_unsupported_models_are_refused_with_a_reason() -> None:
    from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM

    mamba = MambaForCausalLM(
        MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, state_size=4)
    )
    bloom = BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=16, n_layer=2, n_head=2))
    for model in (mamba, bloom):
        with pytest.raises(UnsupportedModelError, match=type(model).__name__):
            Steering.for_model(model)
    for bad in (_whisper(), _long_t5()):
        with pytest.raises(UnsupportedModelError, match=type(bad).__name__):
            Steering.for_model(bad)
    flex = build("llama")
    flex.config._attn_implementation = "flex_attention"
    with pytest.raises(UnsupportedModelError, match="attn_implementation='sdpa'"):
        Steering.for_model(flex)


def _whisper() -> PreTrainedModel:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    sizes: dict[str, Any] = {
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "vocab_size": 50,
    }
    heads: dict[str, Any] = {
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "pad_token_id": 0,
    }
    return WhisperForConditionalGeneration(
        WhisperConfig(**sizes, **heads, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3)
    )


def _long_t5() -> PreTrainedModel:
    """Its encoder has an attention of its own."""
    from transformers import LongT5Config, LongT5ForConditionalGeneration

    return LongT5ForConditionalGeneration(
        LongT5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(tokens(6)).logits
    return result


@pytest.fixture(scope="module")
def two_voices() -> tuple[Any, Steering, list[PrefixBatch], list[Tensor]]:
    """A model, two prefix batches, and the logits without and under each of them."""
    model = build("llama")
    steering = Steering.for_model(model)
    batches = [
        assemble([[Part(random_prefix(model, 4, seed=seed))]], steering.geometry) for seed in (1, 2)
    ]
    logits = [_logits(model)]
    for batch in batches:
        with steering.attached(batch):
            logits.append(_logits(model))
    return model, steering, batches, logits


Voices = tuple[Any, Steering, list[PrefixBatch], list[Tensor]]


@pytest.mark.slow
@given(order=st.permutations([0, 1, 0, 1, 2, 2, 0, 1]))
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_asyncio_tasks_never_see_anothers_prefix(two_voices: Voices, order: list[int]) -> None:
    model, steering, batches, expected = two_voices

    async def voice(i: int, turns: asyncio.Queue[int]) -> None:
        with contextlib.ExitStack() as stack:
            if i < 2:
                stack.enter_context(steering.attached(batches[i], everywhere=True))
            for _ in range(order.count(i)):
                await turns.get()
                assert torch.equal(_logits(model), expected[(i + 1) % 3])

    async def main() -> None:
        turns = [asyncio.Queue[int]() for _ in range(3)]
        tasks = [asyncio.create_task(voice(i, turns[i])) for i in range(3)]
        for i in order:
            turns[i].put_nowait(0)
            await asyncio.sleep(0)
        await asyncio.gather(*tasks)

    asyncio.run(main())
    assert torch.equal(_logits(model), expected[0])


def test_tasks_and_threads_that_a_block_starts_see_it(two_voices: Voices) -> None:
    model, steering, batches, expected = two_voices

    async def call() -> Tensor:
        await asyncio.sleep(0)
        return _logits(model)

    async def main() -> None:
        with steering.attached(batches[0], everywhere=True):
            inside = [asyncio.create_task(call()), asyncio.create_task(call())]
            in_thread = asyncio.to_thread(_logits, model)
            for result in await asyncio.gather(*inside, in_thread):
                assert torch.equal(result, expected[1])

    asyncio.run(main())
    with steering.attached(batches[1]):
        assert torch.equal(asyncio.run(call()), expected[2])


def test_a_thread_of_another_task_gets_an_error_not_a_prefix(two_voices: Voices) -> None:
    model, steering, batches, expected = two_voices

    async def holds(entered: asyncio.Event, leave: asyncio.Event) -> None:
        with steering.attached(batches[0], everywhere=True):
            entered.set()
            await leave.wait()

    async def main() -> None:
        entered, leave = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(holds(entered, leave))
        await entered.wait()
        assert torch.equal(_logits(model), expected[0])
        with pytest.raises(RequestError, match="another thread or asyncio task"):
            await asyncio.to_thread(_logits, model)
        leave.set()
        await task

    asyncio.run(main())


@pytest.mark.slow
@given(order=st.permutations([0, 1, 0, 1, 0, 1]))
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_generators_in_one_thread_stay_apart(two_voices: Voices, order: list[int]) -> None:
    model, steering, batches, expected = two_voices

    @contextlib.contextmanager
    def wrapped(batch: PrefixBatch) -> Iterator[None]:
        with steering.attached(batch):
            yield

    def voice(i: int) -> Iterator[Tensor]:
        with wrapped(batches[i]):
            while True:
                yield _logits(model)

    voices = [voice(0), voice(1)]
    for i in order:
        assert torch.equal(next(voices[i]), expected[i + 1])
    with pytest.raises(RequestError, match="generator that is suspended"):
        model(tokens(6))
    with steering.attached(batches[0]):
        assert torch.equal(_logits(model), expected[1])
    for generator in voices:  # not the last that was opened first
        generator.close()  # type: ignore[attr-defined]
    assert torch.equal(_logits(model), expected[0])


def test_blocks_of_an_exit_stack_reach_the_functions_that_follow(two_voices: Voices) -> None:
    model, steering, batches, expected = two_voices
    stack = contextlib.ExitStack()

    def opens() -> None:
        stack.enter_context(steering.attached(batches[0]))

    opens()
    assert torch.equal(_logits(model), expected[1])
    stack.close()
    assert torch.equal(_logits(model), expected[0])


class _Interruption:
    """Raises KeyboardInterrupt at the n-th line that runs in the attaching code."""

    def __init__(self, at: int) -> None:
        self.left, self.happened = at, False

    def __enter__(self) -> None:
        sys.settrace(self._trace)

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code.co_filename not in (steering_module.__file__, attention_module.__file__):
            return None
        if event == "line" and not self.happened:
            self.left -= 1
            if self.left < 0:
                self.happened = True
                raise KeyboardInterrupt
        return self._trace


@pytest.mark.slow
def test_an_interrupt_at_any_line_leaves_nothing_attached(two_voices: Voices) -> None:
    model, steering, batches, expected = two_voices
    registered = dict(AttentionInterface._global_mapping)
    line, happened = 0, True
    while happened:
        interruption = _Interruption(line)
        with contextlib.suppress(KeyboardInterrupt):
            with interruption, steering.attached(batches[0]):
                _logits(model)
        happened = interruption.happened
        assert torch.equal(_logits(model), expected[0]), f"line {line}"
        with steering.attached(batches[1]):
            assert torch.equal(_logits(model), expected[2]), f"line {line}"
        assert dict(AttentionInterface._global_mapping) == registered, f"line {line}"
        for lock in (steering._lock, attention_module._lock):
            assert lock.acquire(timeout=1), f"line {line}"
            lock.release()
        line += 1
    assert line > 60
