"""Checkpoints: a run's state in a folder, from which a killed run continues bit-identically."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from controlprefix._io import atomic_path
from controlprefix.errors import StoreError, TrainingDataError
from controlprefix.prefixes.file_format import digest
from controlprefix.training.objectives import TrainingRow
from controlprefix.training.parameterization import TrainablePrefixes
from controlprefix.training.report import CHECKPOINT_FILE
from controlprefix.training.settings import TrainingSettings

# A run may be resumed with other values of these.
_MAY_CHANGE = {
    "epochs",
    "steps",
    "micro_batch_size",
    "patience",
    "gradient_checkpointing",
    "save_steps",
}


@dataclass(slots=True)
class Progress:
    """Progress of a run.

    Attributes:
        step: Steps done.
        losses: Loss of each step, nats per target token.
        grad_norms: Norm of each step's gradients before clipping.
        metrics: Further figures of each step, by name.
        validation: `(step, validation loss)`.
        best_step: The step with the lowest validation loss.
        num_rows, num_tokens: Trained on so far, repeats counted.
        seconds: Wall-clock time, over all sessions of the run.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    best_step: int = 0
    num_rows: int = 0
    num_tokens: int = 0
    seconds: float = 0.0


def save(
    folder: Path,
    identity: Mapping[str, Any],
    progress: Progress,
    prefixes: nn.Module,
    optimizer: torch.optim.Optimizer,
    best: Mapping[str, Tensor],
) -> None:
    """Write a checkpoint; the file is replaced whole or not at all.

    Args:
        folder: The run's folder.
        identity: From `run_identity`.
        progress: How far the run is.
        prefixes: What is trained.
        optimizer: Its optimizer.
        best: Parameters of the best step.

    Raises:
        StoreError: If it cannot be written.
    """
    tensors = {f"prefixes.{name}": value for name, value in prefixes.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors.update({f"optimizer.{index}.{name}": value for name, value in state.items()})
    tensors.update({f"best.{name}": value for name, value in best.items()})
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    metadata: dict[str, Any] = {"identity": identity, "progress": asdict(progress)}
    metadata["sha256"] = digest(json.loads(json.dumps(metadata)), tensors)
    try:
        with atomic_path(folder / CHECKPOINT_FILE) as unfinished:
            unfinished.touch(mode=0o600)
            save_file(
                tensors,
                unfinished,
                metadata={"controlprefix": json.dumps(metadata)},
            )
    except (OSError, SafetensorError) as error:
        raise StoreError(f"cannot write a checkpoint to {folder}: {error}") from error


def load(
    folder: Path,
    identity: Mapping[str, Any],
    prefixes: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> tuple[Progress, dict[str, Tensor]] | None:
    """Load a checkpoint into what is trained and its optimizer.

    Args:
        folder, identity, prefixes, optimizer: See `save`.

    Returns:
        The progress and the parameters of the best step; None if there is no checkpoint.

    Raises:
        StoreError: If it cannot be read.
        TrainingDataError: If it belongs to another run.
    """
    path = folder / CHECKPOINT_FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {})["controlprefix"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata.pop("sha256", None) != digest(metadata, tensors):
            raise ValueError("its content does not match its own hash")
        _require_same_run(folder, metadata["identity"], identity)
        progress = Progress(**metadata["progress"])
        progress.validation = [(step, loss) for step, loss in progress.validation]
        prefixes.load_state_dict(_with_prefix("prefixes.", tensors))
        state = optimizer.state_dict()
        state["state"] = {}
        for name, value in _with_prefix("optimizer.", tensors).items():
            index, _, field_name = name.partition(".")
            state["state"].setdefault(int(index), {})[field_name] = value
        optimizer.load_state_dict(state)
        best = _with_prefix("best.", tensors)
        if {n: t.shape for n, t in best.items()} != {
            n: t.shape for n, t in prefixes.state_dict().items()
        }:
            raise ValueError("the best step's parameters are not those of the run")
    except TrainingDataError:
        raise
    except Exception as error:  # whatever damaged bytes can do
        raise StoreError(
            f"the checkpoint {path} cannot be read: {error}; remove it to start from step 0"
        ) from error
    return progress, best


def run_identity(
    settings: TrainingSettings,
    rows: Iterable[TrainingRow],
    held_out: Iterable[TrainingRow],
    prefixes: TrainablePrefixes,
    objective_identity: Any = None,
) -> dict[str, Any]:
    """What must be equal for a run to be resumed: settings, rows, and the initialization.

    `rows` excludes the initialization: after a run has stored its result, `init="stored"` would
    start from that result.
    """
    sha = hashlib.sha256()
    for part_of_data in (rows, held_out):
        for row in part_of_data:
            parts = [(part.prefix.digest, part.strength) for part in row.frozen_parts]
            learned = [(tuple(key), strength) for key, strength in row.learned]
            request = None if row.request is None else row.request.model_dump_json()
            content: list[Any] = [*row.prompt_identity, list(row.targets), parts, learned]
            content += [row.teacher, request, row.rejected and list(row.rejected.targets)]
            sha.update(repr(content).encode())
        sha.update(b"held out")
    sha.update(json.dumps(objective_identity).encode())
    rows_hash = sha.hexdigest()
    sha.update(prefixes.initial_digest().encode())
    fixed = {name: v for name, v in settings.to_dict().items() if name not in _MAY_CHANGE}
    return {"settings": fixed, "rows": rows_hash, "data": sha.hexdigest()}


def _require_same_run(folder: Path, saved: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    differences = [
        f"{name} was {saved['settings'].get(name)!r}, is {value!r}"
        for name, value in expected["settings"].items()
        if saved["settings"].get(name) != value
    ]
    if saved["rows"] != expected["rows"]:
        differences.append("other examples, or other prefixes that are attached and not trained")
    elif saved["data"] != expected["data"]:
        differences.append(
            "another num_slots or init, other stored prefixes, or another machine, number of "
            "threads or torch, whose initialization differs in rounding"
        )
    if differences:
        raise TrainingDataError(
            f"{folder} holds another run ({'; '.join(differences)}); give another folder, or the "
            "same settings and examples"
        )


def _with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
