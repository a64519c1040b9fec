"""Loading: options of the model, and mistakes in them."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from controlprefix import (
    ControlPrefix,
    ControlPrefixError,
    GeometryMismatchError,
    MissingDependencyError,
    Prefix,
)

from helpers import QUICK, engine, greetings
from models import build, byte_tokenizer


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with layers that are wide enough to be quantized."""
    folder = tmp_path_factory.mktemp("models") / "wide"
    model = build(
        "llama",
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["int8", "bnb8", "bnb4"])
def test_quantized_models_are_steered_and_trained(wide_model: Path, quantization: str) -> None:
    # Not among the packages for development: torchao writes to the output of every command.
    pytest.importorskip("torchao" if quantization == "int8" else "bitsandbytes")
    cp = ControlPrefix.from_pretrained(
        wide_model,
        store="sqlite://",
        quantization=quantization,  # type: ignore[arg-type]
    )
    whole = ControlPrefix.from_pretrained(wide_model, store="sqlite://")
    assert cp.geometry.fingerprint != whole.geometry.fingerprint
    with pytest.raises(GeometryMismatchError):
        cp.put("task", "t", Prefix.random(whole.geometry, num_slots=2))
    report = cp.train(greetings(), **{**QUICK, "steps": 3})
    assert all(loss == loss for loss in report.losses)
    rows = [cp.generate("Greet 1", task="greet", max_new_tokens=6).text]
    rows.append(cp.generate("Greet 1", max_new_tokens=6).text)
    assert [c.text for c in cp.generate(["Greet 1"], task="greet", max_new_tokens=6)] == rows[:1]
    assert cp.score(steered := [greetings(1)[0]]) != cp.score(
        [example.model_copy(update={"task": None, "attributes": {}}) for example in steered]
    )
    unchanged = ControlPrefix.from_pretrained(cp.model, tokenizer=cp.tokenizer, store="sqlite://")
    assert unchanged.geometry.fingerprint == cp.geometry.fingerprint
    again = ControlPrefix.from_pretrained(
        wide_model,
        store="sqlite://",
        quantization=quantization,  # type: ignore[arg-type]
    )
    assert again.geometry.fingerprint == cp.geometry.fingerprint


def test_mistakes_in_loading_options_are_told(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for options, message in (
        ({"dtype": "int7"}, "dtype is 'int7'; it must be one of: auto, float32"),
        ({"quantization": "int3"}, "quantization is 'int3'; it must be one of: int8"),
    ):
        with pytest.raises(ControlPrefixError, match=message):
            ControlPrefix.from_pretrained(model_folder, store="sqlite://", **options)  # type: ignore[arg-type]
    with pytest.raises(ControlPrefixError, match="for a model to be loaded"):
        ControlPrefix.from_pretrained(engine().model, revision="main")
    with pytest.raises(ControlPrefixError, match="dtype, revision and quantization are for"):
        ControlPrefix.from_pretrained(engine().model, dtype="float32")
    with pytest.raises(ControlPrefixError, match="there is no folder"):
        ControlPrefix.from_pretrained("/no/such/folder", store="sqlite://")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"controlprefix\[quantization\]"):
        ControlPrefix.from_pretrained(model_folder, store="sqlite://", quantization="bnb4")


def test_a_dtype_and_a_device_are_those_that_were_asked_for(model_folder: Path) -> None:
    cp = ControlPrefix.from_pretrained(
        model_folder, store="sqlite://", dtype="bfloat16", device="cpu"
    )
    assert cp.model.dtype == torch.bfloat16
    assert ControlPrefix.from_pretrained(model_folder, store="sqlite://").model.dtype == (
        torch.float32
    )


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_model_is_one_clear_error(model_folder: Path, tmp_path: Path, file: str) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "model")
    if file == "config.json":
        config = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**config, "num_hidden_layers": "many"}))
    else:
        (folder / file).write_bytes((folder / file).read_bytes()[:100])
    with pytest.raises(ControlPrefixError, match="cannot load a model from"):
        ControlPrefix.from_pretrained(folder, store="sqlite://")
