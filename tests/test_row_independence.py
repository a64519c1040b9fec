"""Models in which the rows of a batch touch each other: run apart, or refused with the reason."""

import json
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from transformers import PreTrainedModel

from controlprefix import ControlPrefix, Example, Request
from controlprefix.errors import UnsupportedModelError
from controlprefix.inference.static_batching import StaticBatcher
from controlprefix.model import FrozenModel, row_independence
from controlprefix.model.row_independence import RowIndependence, check_rows

from helpers import random_prefix
from models import VOCAB, build, byte_tokenizer

LONGROPE: dict[str, Any] = {
    "max_position_embeddings": 64,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
    },
}
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def engine(model: Any) -> ControlPrefix:
    return ControlPrefix.from_pretrained(model, tokenizer=byte_tokenizer(), store="sqlite://")


def louder(model: Any) -> PreTrainedModel:
    """Larger weights, so that attention matters."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    frozen: PreTrainedModel = model.eval()
    return frozen


def longrope() -> PreTrainedModel:
    return build("llama", **LONGROPE)


class _WithoutPositions(transformers.LlamaForCausalLM):
    """A model whose forward names no position ids, so that `generate` gives it none."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


def test_rows_are_alone_where_padding_moves_them_away_from_their_slots() -> None:
    """Rotations are relative, so that tokens alone do not notice that padding moves all of them."""
    config: Any = build("llama").config
    torch.manual_seed(0)
    cp = engine(louder(_WithoutPositions(config)))
    assert cp.frozen_model.rows.padding_counts
    assert not engine(build("llama")).frozen_model.rows.padding_counts
    cp.put("user", "ana", random_prefix(cp.model, 3))
    rows = [
        Request(prompt=prompt, user="ana", max_new_tokens=6)
        for prompt in ("a long prompt of many letters", "Hi", "who?")
    ]
    alone = [cp.generate(row).text for row in rows]
    assert [completion.text for completion in cp.generate(rows)] == alone
    examples = [Example(prompt=row.prompt, completion="so", user="ana") for row in rows]
    together = cp.score(examples)
    for example, score in zip(examples, together, strict=True):
        (own,) = cp.score([example])
        assert score.log_likelihood == pytest.approx(own.log_likelihood, abs=1e-4)


def recurrent_gemma() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {**SIZES, "num_hidden_layers": 3, "num_key_value_heads": 1, "lru_width": 32}
    config = transformers.RecurrentGemmaConfig(**sizes, attention_window_size=64)
    return transformers.RecurrentGemmaForCausalLM(config).eval()


def whisper_decoder() -> PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        vocab_size=VOCAB,
        d_model=32,
        decoder_layers=2,
        encoder_layers=2,
        decoder_attention_heads=4,
        encoder_attention_heads=4,
        decoder_ffn_dim=48,
        encoder_ffn_dim=48,
        max_target_positions=64,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return louder(transformers.WhisperForCausalLM(config))


def qwen_vl() -> PreTrainedModel:
    torch.manual_seed(0)
    text = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 256}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**text, "rope_parameters": rope},
        vision_config={**vision, "out_hidden_size": 32},
    )
    return louder(transformers.Qwen2_5_VLForConditionalGeneration(config))


def mllama() -> PreTrainedModel:
    """A text model with a layer that attends to images alone."""
    torch.manual_seed(0)
    config = transformers.MllamaTextConfig(
        **{**SIZES, "num_hidden_layers": 4}, num_key_value_heads=2, cross_attention_layers=[1]
    )
    return louder(transformers.MllamaForCausalLM(config))


MODELS = [longrope, recurrent_gemma, whisper_decoder, qwen_vl, mllama]


@pytest.mark.slow
@pytest.mark.parametrize("make", MODELS)
def test_a_row_in_company_is_the_row_alone(make: Any) -> None:
    cp = engine(make())
    cp.put("user", "ana", random_prefix(cp.model, 3))
    requests = [
        Request(prompt="hi", raw=True, max_new_tokens=8, user="ana"),
        Request(prompt="x" * 28, raw=True, max_new_tokens=6),
        Request(prompt="hello", raw=True, max_new_tokens=8),
    ]
    expected = [cp.generate(request).text for request in requests]
    assert [result.text for result in cp.generate(requests)] == expected
    assert ["".join(cp.stream(request)) for request in requests] == expected
    with closing(cp.batcher()) as batcher:
        tickets = [batcher.submit(cp.resolve(request)) for request in requests]
        assert [ticket.result().text for ticket in tickets] == expected
    examples = [Example(prompt=text, raw=True, completion="abc") for text in ("a", "b" * 30, "cde")]
    together = cp.score(examples)
    for example, score in zip(examples, together, strict=True):
        (alone,) = cp.score([example])
        assert score.log_likelihood == pytest.approx(alone.log_likelihood, abs=1e-4)


def test_short_rows_of_a_longrope_model_share_batches() -> None:
    cp = engine(longrope())
    assert list(cp.frozen_model.batches([4, 17, 16, 6, 8], 2)) == [[0], [1], [2, 3], [4]]
    assert isinstance(cp.batcher(), StaticBatcher)


@pytest.mark.slow
@pytest.mark.parametrize("make", [qwen_vl, longrope])
def test_models_that_keep_state_between_passes_do_one_at_a_time(make: Any) -> None:
    cp = engine(make())
    requests = [Request(prompt="a" * (1 + 9 * i), raw=True, max_new_tokens=3) for i in range(3)]
    expected = [cp.generate(request).text for request in requests]
    failures: list[object] = []

    def work(i: int) -> None:
        try:
            for _ in range(8):
                if i == 0:
                    texts = [result.text for result in cp.generate(requests)]
                    matches = texts == expected
                else:
                    matches = cp.generate(requests[i]).text == expected[i]
                if not matches:
                    failures.append(i)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_model_that_reads_what_follows_is_refused() -> None:
    config = transformers.BertConfig(**SIZES, max_position_embeddings=64)
    with pytest.raises(UnsupportedModelError, match="is_decoder = True"):
        engine(louder(transformers.BertLMHeadModel(config)))
    config.is_decoder = True
    engine(louder(transformers.BertLMHeadModel(config)))


# --- wrapped models --------------------------------------------------------------------------


@pytest.mark.parametrize("merged", [False, True])
def test_a_model_with_a_lora_is_a_base_like_any_other(merged: bool) -> None:
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    wrapper: Any = get_peft_model(build("llama"), lora)
    if merged:
        wrapper.merge_adapter()
    cp = engine(wrapper)
    prefix = random_prefix(cp.model, 3)
    cp.put("user", "ana", prefix)
    ids = torch.tensor([cp.tokenizer("hi")["input_ids"]], device=cp.model.device)
    with torch.no_grad():
        plain = wrapper(ids).logits
        assert torch.equal(cp.model(ids).logits, plain)
        with cp.assembled(Request(prompt="hi", raw=True, user="ana")):
            assert not torch.allclose(wrapper(ids).logits, plain)
    assert cp.generate("hi", raw=True, user="ana", max_new_tokens=4).num_tokens


def test_peft_virtual_tokens_are_refused_with_the_way_out() -> None:
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2)
    wrapper = get_peft_model(build("llama"), config)
    with pytest.raises(UnsupportedModelError, match="get_base_model"):
        engine(wrapper)


def test_a_compiled_wrapper_is_the_model_inside() -> None:
    model = build("llama")
    cp = engine(torch.compile(model, backend="eager"))
    assert cp.model is model


def test_a_vision_language_model_loads_by_name(tmp_path: Any) -> None:
    qwen_vl().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    cp = ControlPrefix.from_pretrained(tmp_path, store="sqlite://")
    assert type(cp.model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    cp.put("user", "ana", random_prefix(cp.model, 3))
    assert cp.generate("hi", raw=True, user="ana", max_new_tokens=4).num_tokens


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[type]:
    """The classes of models whose rows were compared."""
    compared: list[type] = []
    compare = row_independence._padding_counts

    def counting(model: PreTrainedModel) -> bool:
        compared.append(type(model))
        return compare(model)

    monkeypatch.setattr(row_independence, "_padding_counts", counting)
    return compared


def loaded(folder: Path, seed: int = 0, **options: Any) -> RowIndependence:
    """What is found of a model that is loaded from a folder."""
    build("llama", seed=seed, **LONGROPE).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return FrozenModel.from_pretrained(folder, **options).rows


@pytest.mark.slow
def test_files_are_checked_once_as_long_as_they_are_the_same(
    tmp_path: Path, passes: list[type]
) -> None:
    first = loaded(tmp_path)
    assert (first.max_shared_tokens, first.keeps_state) == (16, True)
    assert (loaded(tmp_path), len(passes)) == (first, 1)
    loaded(tmp_path, seed=1)  # other weights
    loaded(tmp_path, dtype="bfloat16")
    assert len(passes) == 3
    for _ in range(2):
        assert loaded(tmp_path, trust_remote_code=True) == first
        assert check_rows(build("llama", **LONGROPE)) == first
    assert len(passes) == 7


@pytest.mark.parametrize("damaged", ["", "[]", '{"unknown": 1}', "1", "\0"])
def test_a_damaged_check_is_made_again(damaged: str, passes: list[type]) -> None:
    model = build("llama")
    result = check_rows(model, use_cache=True)
    (file,) = row_independence._cache_folder().iterdir()
    file.write_text(damaged)
    assert check_rows(model, use_cache=True) == result
    assert (json.loads(file.read_text()), len(passes)) == (result.padding_counts, 2)


def test_a_cache_that_cannot_be_written_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: list[type]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(row_independence, "_cache_folder", lambda: tmp_path / "file" / "folder")
    assert loaded(tmp_path / "a") == loaded(tmp_path / "a")
    assert len(passes) == 2


def test_rows_share_a_batch_as_long_as_queries_are_not_scaled_by_columns() -> None:
    model = build("llama")
    model.config.attn_temperature_tuning, model.config.floor_scale = True, 64  # as of Llama 4
    assert check_rows(model, use_cache=False).max_shared_tokens == 63
