"""Checkpoints of the original code of Prefix-Tuning and Control Prefixes: GPT-2, BART and T5.

Their networks are run once, and their keys and values become slots. In BART and T5 that code
gives slots no position, as here, so the conversion is exact. In GPT-2 it moves the text behind
the slots, whose positions are learned: there a checkpoint is a start for training.

Reference:
    https://github.com/XiangLi1999/PrefixTuning (`seq2seq/prefixTuning.py`, `gpt2/`) and
    https://github.com/jordiclive/ControlPrefixes (`src/datatotext/controlprefixes.py`).
"""

import argparse
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from controlprefix.errors import GeometryMismatchError, PrefixFormatError
from controlprefix.prefixes.file_format import reading
from controlprefix.prefixes.geometry import Geometry, Site
from controlprefix.prefixes.key import PrefixKey, composed
from controlprefix.prefixes.prefix import Prefix
from controlprefix.prefixes.torch_files import load_torch_file

# Per site, the embedding and the network of the task's prefix, and the labels' embeddings.
_NAMES: dict[Site, tuple[str, str, str]] = {
    "decoder": ("wte", "control_trans", "wte"),
    "cross": ("wte2", "control_trans2", "wte_2"),
    "encoder": ("wte_enc", "control_trans_enc", "wte_enc"),
}
_ANCHOR = "control_trans.0.weight"


def read_original(
    path: str | Path,
    geometry: Geometry,
    *,
    task: str,
    labels: Mapping[str, Sequence[str]] | None = None,
) -> dict[PrefixKey, Prefix]:
    """Read the task prefix and all attribute prefixes of a checkpoint.

    Args:
        path: A Lightning checkpoint (`.ckpt`) or a `pytorch_model.bin`.
        geometry: Geometry of the frozen model that they were trained for.
        task: Name for the task prefix.
        labels: Per attribute of the checkpoint (such as `cats`), the names of its labels in order;
            left out, they are numbered from 0, if a Lightning checkpoint says how many they are.

    Returns:
        Prefixes by key; their `is_exact` says whether the model gives the original's logits.

    Raises:
        PrefixFormatError: If it is no such checkpoint, or `labels` do not fit it.
        GeometryMismatchError: If it was made for a model with other shapes.
    """
    with reading(str(path)):
        return _prefixes_of(Path(path), geometry, task, labels or {})


def _prefixes_of(
    path: Path, geometry: Geometry, task: str, labels: Mapping[str, Sequence[str]]
) -> dict[PrefixKey, Prefix]:
    tensors, num_slots = _read(path)
    embeddings: dict[PrefixKey, dict[Site, Tensor]] = {
        PrefixKey("task", task): {
            site: tensors[f"{embedding}.weight"]
            for site, (embedding, network, _) in _NAMES.items()
            if f"{network}.0.weight" in tensors
        }
    }
    for attribute, names in _labels(tensors, labels, num_slots).items():
        if len({composed(name) for name in names}) < len(names):
            raise PrefixFormatError(f"labels of {attribute!r} name one twice: {', '.join(names)}")
        for index, label in enumerate(names):
            embeddings[PrefixKey.for_label(attribute, label)] = {
                site: tensors[f"M_Prefixes.{prefix}_{attribute}.weight"].chunk(len(names))[index]
                for site, (_, network, prefix) in _NAMES.items()
                if f"{network}.0.weight" in tensors
            }
    sites = {site for site, (_, network, _) in _NAMES.items() if f"{network}.0.weight" in tensors}
    if sites != set(geometry.sites):
        raise GeometryMismatchError(
            f"{path} has prefixes for: {', '.join(sorted(sites))}; model {geometry.model_name!r} "
            f"has: {', '.join(geometry.sites)}"
        )
    return {
        key: Prefix(
            geometry,
            {
                site: _slots(_run_network(tensors, _NAMES[site][1], inputs), geometry, site, path)
                for site, inputs in by_site.items()
            },
            is_exact="encoder" in sites,
        )
        for key, by_site in embeddings.items()
    }


def _read(path: Path) -> tuple[dict[str, Tensor], int | None]:
    """The prefix model's tensors, by their names in it, and the number of slots of a label."""
    content = load_torch_file(path)
    state: Any = content.get("state_dict", content) if isinstance(content, dict) else {}
    anchor = next((name for name in state if str(name).endswith(_ANCHOR)), None)
    if anchor is None:
        raise PrefixFormatError(
            f"{path} has no tensor {_ANCHOR}: it is no checkpoint of Prefix-Tuning or Control "
            "Prefixes with the network of their code"
        )
    before = anchor.removesuffix(_ANCHOR)
    tensors = {
        name.removeprefix(before): tensor.float()
        for name, tensor in state.items()
        if name.startswith(before) and isinstance(tensor, Tensor)
    }
    options = content.get("hyper_parameters", {})
    options = vars(options) if isinstance(options, argparse.Namespace) else options
    num_slots = options.get("m_prefix_len")
    return tensors, num_slots if isinstance(num_slots, int) and num_slots > 0 else None


def _labels(
    tensors: Mapping[str, Tensor], names: Mapping[str, Sequence[str]], num_slots: int | None
) -> dict[str, Sequence[str]]:
    """The names of the labels of each attribute in a checkpoint."""
    prefix = "M_Prefixes.wte_"
    attributes = [
        name.removeprefix(prefix).removesuffix(".weight")
        for name in tensors
        if name.startswith(prefix)
        and not name.startswith(("M_Prefixes.wte_enc_", "M_Prefixes.wte_2_"))
    ]
    if unknown := set(names) - set(attributes):
        raise PrefixFormatError(
            f"labels names {', '.join(sorted(unknown))}; the checkpoint has: "
            f"{', '.join(attributes) or 'no attributes'}"
        )
    result: dict[str, Sequence[str]] = {}
    for attribute in attributes:
        num_rows = len(tensors[f"{prefix}{attribute}.weight"])
        if attribute not in names and num_slots is not None:
            result[attribute] = [str(i) for i in range(num_rows // num_slots)]
            continue
        if attribute not in names:
            raise PrefixFormatError(
                f"the checkpoint has {num_rows} embeddings for the labels of {attribute!r}, and "
                "does not say how many labels they are; name the labels in order"
            )
        if not names[attribute] or num_rows % len(names[attribute]):
            raise PrefixFormatError(
                f"{len(names[attribute])} labels of {attribute!r} do not divide its {num_rows} "
                "embeddings"
            )
        result[attribute] = list(names[attribute])
    return result


def _run_network(tensors: Mapping[str, Tensor], name: str, inputs: Tensor) -> Tensor:
    """Linear layers with tanh between them: `(num_slots, num_layers * 2 * hidden_size)`."""
    values = inputs
    for index in itertools.count(0, 2):
        weight = tensors.get(f"{name}.{index}.weight")
        if weight is None:
            return values
        if index:
            values = values.tanh()
        values = torch.nn.functional.linear(values, weight, tensors[f"{name}.{index}.bias"])
    raise AssertionError("unreachable")


def _slots(values: Tensor, geometry: Geometry, site: Site, path: str | Path) -> Tensor:
    """Values per slot, which that code has in the order of ours: layer 0's keys, its values, …"""
    size = geometry.slot_size(site)
    if values.shape[1] != size:
        raise GeometryMismatchError(
            f"{path} has {values.shape[1]} values per {site} slot, but model "
            f"{geometry.model_name!r} has {size}; load the model that it was trained for"
        )
    return values
