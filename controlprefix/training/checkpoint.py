"""The state of a run in a folder, so that a killed one can go on as if nothing had happened."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from controlprefix.errors import StoreError, TrainingDataError
from controlprefix.training.objectives import TrainingRow
from controlprefix.training.parameterization import LearnedSlots
from controlprefix.training.settings import TrainingSettings

FILE = "state.safetensors"
# A run may go on with other values of these.
_MAY_CHANGE = {"epochs", "steps", "micro_batch", "patience", "gradient_checkpointing", "save_every"}


@dataclass(slots=True)
class Progress:
    """How far a run is, beside its tensors.

    Attributes:
        step: Steps done.
        losses: Of each step, nats a target token.
        validation: `(step, loss on held-out rows)`.
        best_step: Whose prefixes are the best so far.
        num_rows, num_tokens: Seen, repeats counted.
        seconds: In all, over all the times it was begun.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    best_step: int = 0
    num_rows: int = 0
    num_tokens: int = 0
    seconds: float = 0.0


def save(
    folder: Path,
    identity: Mapping[str, Any],
    progress: Progress,
    slots: nn.Module,
    optimizer: torch.optim.Optimizer,
    best: Mapping[str, Tensor],
) -> None:
    """Write a run's state; the file is replaced whole or not at all.

    Raises:
        StoreError: If it cannot be written.
    """
    tensors = {f"slots.{name}": value for name, value in slots.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors.update({f"optimizer.{index}.{name}": value for name, value in state.items()})
    tensors.update({f"best.{name}": value for name, value in best.items()})
    about = {"identity": identity, "progress": asdict(progress)}
    written = folder / f"{FILE}.{os.getpid()}"
    try:
        save_file(
            {name: value.detach().cpu().contiguous() for name, value in tensors.items()},
            written,
            metadata={"controlprefix": json.dumps(about)},
        )
        with written.open("rb+") as file:
            os.fsync(file.fileno())
        written.replace(folder / FILE)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            written.unlink()
        raise StoreError(f"cannot write the run's state to {folder}: {error}") from error


def require_folder(folder: Path | None, resume: bool) -> None:
    """Make a run's folder, before there is anything to lose.

    Raises:
        TrainingDataError: If there is to be something to go on from, and no folder of it.
        StoreError: If it cannot be made.
    """
    if folder is None:
        if resume:
            raise TrainingDataError("resume goes on from the state in a folder; give the folder")
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"cannot make the run's folder {folder}: {error}") from error


def load(
    folder: Path,
    identity: Mapping[str, Any],
    slots: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> tuple[Progress, dict[str, Tensor]] | None:
    """Take up what `save` wrote; None where nothing is written yet.

    Raises:
        StoreError: If it cannot be read.
        TrainingDataError: If it is of another run.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["controlprefix"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        _require_same(folder, about["identity"], identity)
        progress = Progress(**about["progress"])
        progress.validation = [(step, loss) for step, loss in progress.validation]
        slots.load_state_dict(_under("slots.", tensors))
        state = optimizer.state_dict()
        state["state"] = {}
        for name, value in _under("optimizer.", tensors).items():
            index, _, what = name.partition(".")
            state["state"].setdefault(int(index), {})[what] = value
        optimizer.load_state_dict(state)
        best = _under("best.", tensors)
        if {n: t.shape for n, t in best.items()} != {
            n: t.shape for n, t in slots.state_dict().items()
        }:
            raise ValueError("the best step's parameters are not those of the run")
    except TrainingDataError:
        raise
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise StoreError(
            f"the state in {path} cannot be read: {error}; remove it to begin anew"
        ) from error
    return progress, best


def identity_of(
    settings: TrainingSettings, rows: Iterable[TrainingRow], slots: LearnedSlots
) -> dict[str, Any]:
    """What must be the same for a run to go on: settings, rows, and where it started."""
    sha = hashlib.sha256()
    for row in rows:
        parts = [(part.prefix.digest, part.strength) for part in row.frozen]
        about = (list(row.prompt), list(row.targets), parts, list(row.learned), row.teacher)
        sha.update(repr(about).encode())
    sha.update(slots.start_digest().encode())
    chosen = {k: v for k, v in settings.as_dict().items() if k not in _MAY_CHANGE}
    return {"settings": chosen, "data": sha.hexdigest()}


def in_one_line(identity: Mapping[str, Any]) -> str:
    """The same, short."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _require_same(folder: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    differing = [
        f"{name} was {saved['settings'].get(name)!r}, is {value!r}"
        for name, value in wanted["settings"].items()
        if saved["settings"].get(name) != value
    ]
    if saved["data"] != wanted["data"]:
        differing.append("other examples, starts or stored prefixes")
    if differing:
        raise TrainingDataError(
            f"{folder} holds another run ({'; '.join(differing)}); give another folder, or the "
            "same settings and examples"
        )


def _under(start: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}
