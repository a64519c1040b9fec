"""Whether rows of one batch influence each other's logits."""

import contextlib
import hashlib
import importlib.util
import inspect
import json
from dataclasses import dataclass
from pathlib import Path

import platformdirs
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from controlprefix._io import atomic_path
from controlprefix.errors import UnsupportedModelError
from controlprefix.model.padding import pad_rows
from controlprefix.model.steering import Steering
from controlprefix.prefixes import Part, Prefix

_PROMPT, _NEIGHBOUR = (7, 11, 5, 9), (3, 8, 6, 4, 10, 5, 7, 12, 9, 6, 11)  # any token ids
_TOLERANCE = {torch.float32: 0.02, torch.float64: 0.02}  # of the largest logit; else for half
_TOLERANCE_IN_HALF = 0.1
_NUM_SLOTS = 4
_CHECK_VERSION = 1  # to be raised when the check changes, so that earlier results do not count
# With these, some models of transformers take other paths.
_KERNELS = ("causal_conv1d", "fla", "flash_attn", "kernels", "mamba_ssm")
# Kinds of rotary scaling that depend on the longest row of a batch.
_SCALING_BY_LENGTH = ("dynamic", "longrope")


@dataclass(frozen=True, slots=True)
class RowIndependence:
    """Which rows of a model can share a batch without changing each other.

    Attributes:
        padding_counts: A padded row has other logits than the row alone.
        max_shared_tokens: Rows with more tokens than this change their neighbours; None if none
            do.
        keeps_state: The model's modules change during a pass, so passes of several threads
            would mix.
    """

    padding_counts: bool = False
    max_shared_tokens: int | None = None
    keeps_state: bool = False

    def must_be_alone(self, num_tokens: int) -> bool:
        """Whether a row of `num_tokens` needs a batch of its own."""
        limit = self.max_shared_tokens
        return self.padding_counts or (limit is not None and num_tokens > limit)


def check_rows(model: PreTrainedModel, *, use_cache: bool = False) -> RowIndependence:
    """Run a few short rows through a model and compare, and read what its config says.

    They attend to slots: where a row's positions depend on padding, tokens do not notice that all
    of them move together, but their distance to the slots changes.

    Args:
        model: The model.
        use_cache: Keep in the user's cache what the rows show, under the fingerprint of the
            weights, which are hashed each time, and what else decides what is computed: class,
            dtype, device, attention, versions and kernels. For classes of transformers alone.

    Raises:
        UnsupportedModelError: If a decoder-only model attends to tokens that follow.
    """
    text = model.config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    by_layer_type = [value for value in rope.values() if isinstance(value, dict)]
    scalings = [r for r in (by_layer_type or [rope]) if r.get("rope_type") in _SCALING_BY_LENGTH]
    lengths = [
        r.get("original_max_position_embeddings")
        or getattr(text, "original_max_position_embeddings", None)
        or text.max_position_embeddings
        for r in scalings
    ]
    if getattr(text, "attn_temperature_tuning", False):
        lengths.append(text.floor_scale - 1)  # Llama 4 scales queries by columns from there on
    use_cache = use_cache and type(model).__module__.startswith("transformers.")
    return RowIndependence(
        padding_counts=_padding_counts_once(model) if use_cache else _padding_counts(model),
        max_shared_tokens=min(lengths, default=None),
        keeps_state=bool(scalings) or any(hasattr(m, "rope_deltas") for m in model.modules()),
    )


def _padding_counts_once(model: PreTrainedModel) -> bool:
    """`_padding_counts`, with its result kept in the user's cache."""
    key = (
        _CHECK_VERSION,
        Steering.for_model(model).geometry.fingerprint,
        f"{type(model).__module__}.{type(model).__qualname__}",
        str(model.dtype),
        model.device.type,
        model.config._attn_implementation,
        transformers.__version__,
        torch.__version__,
        [importlib.util.find_spec(package) is not None for package in _KERNELS],
    )
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    file = _cache_folder() / f"{name}.json"
    with contextlib.suppress(OSError, ValueError):  # none yet, or damaged
        if isinstance(result := json.loads(file.read_text()), bool):
            return result
    result = _padding_counts(model)
    with contextlib.suppress(OSError):  # a cache that cannot be written is none
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(file) as unfinished:
            unfinished.write_text(json.dumps(result))
    return result


def _cache_folder() -> Path:
    return Path(platformdirs.user_cache_dir("controlprefix")) / "row-checks"


def _padding_counts(model: PreTrainedModel) -> bool:
    """Whether a padded row has other logits than the row alone."""
    vocab_size = model.config.get_text_config().vocab_size
    prompt, neighbour = ([i % vocab_size for i in ids] for ids in (_PROMPT, _NEIGHBOUR))
    steering = Steering.for_model(model)
    prefix = Prefix.random(steering.geometry, num_slots=_NUM_SLOTS, scale=1.0, seed=0)
    with steering.attached(steering.assemble([[Part(prefix)]])):  # for all rows
        alone, padded = _logits(model, [prompt])[0], _logits(model, [prompt, neighbour])[0]
    neighbour_alone = _logits(model, [neighbour])[0]
    if not model.config.is_encoder_decoder:
        padded = padded[-len(prompt) :]
        changed = _logits(model, [[*neighbour[:-1], prompt[0]]])[0]
        if _differ(neighbour_alone[:-1], changed[:-1], model.dtype):
            raise UnsupportedModelError(
                f"{type(model).__name__} reads the tokens behind each position too, so it cannot "
                "continue a text; load it as a decoder (config.is_decoder = True), or load a "
                "causal language model"
            )
    return _differ(alone, padded, model.dtype)


def _logits(model: PreTrainedModel, rows: list[list[int]]) -> Tensor:
    """`(num_rows, longest, vocab_size)`; decoders are padded on the left."""
    left = not model.config.is_encoder_decoder
    ids, mask = pad_rows(rows, 0, left=left)
    device = next(model.parameters()).device
    inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    if not left:
        inputs["decoder_input_ids"] = ids[:, :2].to(device)
    elif "position_ids" in inspect.signature(model.forward).parameters:  # as `generate` does
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0).to(device)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        logits: Tensor = model(**inputs, use_cache=False).logits.float()
    return logits


def _differ(first: Tensor, second: Tensor, dtype: torch.dtype) -> bool:
    numbers = first.isfinite() & second.isfinite()  # others are an error of the request later
    first, second = first[numbers], second[numbers]
    if not len(first):
        return False
    difference = (first - second).abs().max() / first.abs().max().clamp(min=1e-6)
    return bool(difference > _TOLERANCE.get(dtype, _TOLERANCE_IN_HALF))
