"""PEFT checkpoints of prefix tuning: reading and writing the files, without the package peft.

PEFT keeps keys and values as attention uses them, with the virtual tokens at the positions
before the text: see `controlprefix.model.rope` for what that means on a model.

Reference:
    https://github.com/huggingface/peft, version 0.21: `PeftModel.get_prompt` and
    `PrefixTuningConfig`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from controlprefix._io import atomic_path
from controlprefix.errors import GeometryMismatchError, PrefixFormatError, StoreError
from controlprefix.prefixes.file_format import reading
from controlprefix.prefixes.geometry import Geometry
from controlprefix.prefixes.torch_files import load_torch_file

CONFIG_FILE, TENSORS_FILE, OLD_TENSORS_FILE = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
_KEYS_AND_VALUES = ("PREFIX_TUNING", "CARTRIDGE")
_EMBEDDINGS = ("PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING")


class PeftCheckpoint(NamedTuple):
    """A checkpoint of virtual tokens.

    Attributes:
        config: Its configuration.
        values: Keys and values, `(num_virtual_tokens, num_layers * 2 * num_kv_heads * head_dim)`,
            or embeddings, `(num_virtual_tokens, hidden_size)`; float32.
    """

    config: Mapping[str, Any]
    values: Tensor

    @property
    def has_embeddings(self) -> bool:
        """Whether the values are embeddings, rather than keys and values."""
        return self.config["peft_type"] in _EMBEDDINGS

    def slots(self, geometry: Geometry) -> Tensor:
        """Its keys and values as slots, at the positions that PEFT has them.

        PEFT has a token's values in the order of ours: layer 0's keys, its values, and so on.

        Returns:
            `(num_virtual_tokens, slot_size)`.

        Raises:
            GeometryMismatchError: If their number is not that of the model.
        """
        size = geometry.slot_size("decoder")
        if self.values.shape[1] != size or geometry.encoder or geometry.cross:
            raise GeometryMismatchError(
                f"the checkpoint has {self.values.shape[1]} values per virtual token, made for "
                f"{self.config.get('base_model_name_or_path')!r}, but a slot of model "
                f"{geometry.model_name!r} has {size} in its decoder; load the model that it "
                "was made for"
            )
        return self.values


def read_checkpoint(folder: str | Path, *, task: int | None = None) -> PeftCheckpoint:
    """Read a PEFT checkpoint of prefix tuning, a cartridge, prompt tuning or P-tuning.

    Args:
        folder: With `adapter_config.json` and `adapter_model.safetensors` (or `.bin`).
        task: Index of the task, from 0, in a multitask prompt tuning checkpoint.

    Raises:
        PrefixFormatError: If it is none of those, or damaged.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        if (folder / TENSORS_FILE).exists():
            tensors = load_file(folder / TENSORS_FILE)
        else:
            tensors = load_torch_file(folder / OLD_TENSORS_FILE)
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:
        raise PrefixFormatError(f"{folder} is no PEFT checkpoint: {error}") from error
    with reading(str(folder)):
        return _checkpoint(folder, config, tensors, task)


def _checkpoint(folder: Path, config: Any, tensors: Any, task: int | None) -> PeftCheckpoint:
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind not in (*_KEYS_AND_VALUES, *_EMBEDDINGS):
        raise PrefixFormatError(
            f"{folder} holds {kind!r}; only virtual tokens can become a prefix: "
            f"{', '.join((*_KEYS_AND_VALUES, *_EMBEDDINGS))}"
        )
    values = tensors.get("prompt_embeddings")
    count = config.get("num_virtual_tokens")
    if values is None or values.dim() != 2 or len(values) != count:
        raise PrefixFormatError(
            f"{folder} has no tensor 'prompt_embeddings' with {count} virtual tokens"
        )
    values = values.float()
    if task is not None and kind != "MULTITASK_PROMPT_TUNING":
        raise PrefixFormatError(f"{folder} holds {kind}, which has no tasks; leave task out")
    if kind == "MULTITASK_PROMPT_TUNING":
        values = values * _task_factors(folder, tensors, task)
    if not bool(values.isfinite().all()):
        raise PrefixFormatError(f"{folder} holds NaN or infinite values")
    return PeftCheckpoint(config, values)


def write_checkpoint(geometry: Geometry, slots: Tensor, folder: str | Path) -> None:
    """Write slots, at the positions that PEFT has them, as a checkpoint of prefix tuning.

    Args:
        geometry: Geometry of a decoder with equal layers.
        slots: `(num_slots, slot_size)`.
        folder: Created if it does not exist.

    Raises:
        GeometryMismatchError: If PEFT has no form for the layers.
        StoreError: If the folder cannot be written.
    """
    layers = geometry.decoder
    shape = layers[0]
    if any(layer != shape for layer in layers) or shape.key_dim != shape.value_dim:
        raise GeometryMismatchError(
            f"PEFT needs layers of equal shapes; those of {geometry.model_name!r} differ"
        )
    config = {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": geometry.model_name,
        "inference_mode": True,
        "num_virtual_tokens": len(slots),
        "token_dim": shape.num_kv_heads * shape.key_dim,
        "num_transformer_submodules": 1,
        "num_attention_heads": shape.num_kv_heads,
        "num_layers": len(layers),
        "encoder_hidden_size": shape.num_kv_heads * shape.key_dim,
        "prefix_projection": False,
        "revision": None,
    }
    values = slots.float().cpu().contiguous()
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder / TENSORS_FILE) as unfinished:
            save_file({"prompt_embeddings": values}, unfinished, metadata={"format": "pt"})
        with atomic_path(folder / CONFIG_FILE) as unfinished:
            unfinished.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise StoreError(f"cannot write a PEFT checkpoint to {folder}: {error}") from error


def _task_factors(folder: Path, tensors: Mapping[str, Tensor], task: int | None) -> Tensor:
    """What a multitask checkpoint's embeddings are multiplied by for one task."""
    columns, rows = tensors.get("prefix_task_cols"), tensors.get("prefix_task_rows")
    if columns is None or rows is None:
        raise PrefixFormatError(f"{folder} has no tensors of its tasks")
    if task is None and len(columns) == 1:
        task = 0
    if task is None or not 0 <= task < len(columns):
        raise PrefixFormatError(
            f"{folder} has tasks 0 to {len(columns) - 1}; give one of these as task, got {task}"
        )
    return columns[task].float() @ rows[task].float()
