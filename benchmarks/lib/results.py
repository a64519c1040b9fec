"""Result files: figures with the command, commit, date and machine they were measured with."""

import argparse
import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from lib.interleaved import Comparison

if TYPE_CHECKING:
    from controlprefix.model import FrozenModel

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "docs" / "results"

Page = Callable[[dict[str, Any]], str]  # renders results as Markdown


def arguments(
    description: str | None, *, rounds: int | None = None, resumable: bool = False
) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark of that form has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds, help="rounds that count")
    if resumable:
        parser.add_argument("--fresh", action="store_true", help="repeat all measurements")
    return parser


class ResultFile:
    """A JSON file of results that is saved after each measurement, so that a run can resume.

    Args:
        name: Name of the file, without the suffix.
        options: The parsed `arguments(resumable=True)`.
        settings: Options that the figures depend on. A file that was measured with others, or
            with another model, is refused.
        model: The model that is measured.
        page: Renders the results as Markdown, into a file beside it.
    """

    def __init__(
        self,
        name: str,
        options: argparse.Namespace,
        *,
        settings: Sequence[str],
        model: "FrozenModel",
        page: Page,
    ) -> None:
        self.path: Path = options.results / f"{name}.json"
        self.page = page
        self.results: dict[str, Any] = {
            "options": {name: getattr(options, name) for name in settings},
            "model": describe(model),
        }
        if self.path.exists() and not options.fresh:
            saved = json.loads(self.path.read_text())
            for key, value in self.results.items():
                if saved[key] != value:
                    raise SystemExit(
                        f"{self.path} was measured with {saved[key]}, this run has {value}; give "
                        "--fresh to replace it"
                    )
            self.results = saved

    def get(self, *names: str) -> Any:
        """The results under nested names, or None."""
        value: Any = self.results
        for name in names:
            value = value.get(name) if isinstance(value, dict) else None
        return value

    def set(self, *names: str, value: Any) -> None:
        """Set the results under nested names, and save."""
        level = self.results
        for name in names[:-1]:
            level = level.setdefault(name, {})
        level[names[-1]] = value
        self.results = {**provenance(), **without_provenance(self.results)}
        _write(self.path, self.results, self.page)


def save(folder: Path, name: str, results: Mapping[str, object], page: Page | None = None) -> Path:
    """Write results to `<folder>/<name>.json` and its page beside it, and return its path."""
    path = folder / f"{name}.json"
    _write(path, {**provenance(), **results}, page)
    return path


def save_comparisons(
    folder: Path,
    name: str,
    comparisons: Sequence[Comparison],
    *,
    reference: str,
    model: "FrozenModel | None" = None,
    notes: Sequence[str] = (),
) -> Path:
    """Print comparisons with the reference as a table, and save them with notes."""
    table = Table("case", "contender", "measure", f"against {reference}", "value")
    for row in comparisons:
        table.add_row(row.case, row.contender, row.measure, str(row), f"{row.value:.4g}")
    Console(width=140).print(table)
    for note in notes:
        Console().print(note)
    results = {
        "model": describe(model) if model else None,
        "reference": reference,
        "notes": list(notes),
        "comparisons": [asdict(row) for row in comparisons],
    }
    return save(folder, name, results)


def describe(model: "FrozenModel") -> str:
    """Size and dtype of a model, such as `135 M parameters in bfloat16`."""
    num_parameters = sum(p.numel() for p in model.model.parameters())
    dtype = str(model.dtype).removeprefix("torch.")
    return f"{num_parameters / 1e6:,.0f} M parameters in {dtype}"


def provenance() -> dict[str, Any]:
    """The command, the commit, the date and the machine of this process."""
    script = Path(sys.argv[0]).resolve()
    command = shlex.join(["python", f"{script.parent.name}/{script.name}", *sys.argv[1:]])
    return {
        "command": command.replace(str(Path.home()), "~"),
        "commit": _commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {
            "processor": _processor(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def without_provenance(results: Mapping[str, Any]) -> dict[str, Any]:
    """The figures alone."""
    names = ("command", "commit", "date", "machine")
    return {name: value for name, value in results.items() if name not in names}


def _write(path: Path, results: Mapping[str, Any], page: Page | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n")
    if page is not None:
        path.with_suffix(".md").write_text(page(json.loads(path.read_text())).rstrip("\n") + "\n")


def _commit() -> str | None:
    """The commit of the checkout; `+` after it marks changes that are not committed."""

    def git(*command: str) -> str:
        done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip()

    commit = git("rev-parse", "--short", "HEAD")
    changes = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs/results")
    return f"{commit}{'+' if changes else ''}" or None


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
