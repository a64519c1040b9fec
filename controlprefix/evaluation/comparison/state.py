"""The results of a comparison so far, in a file if there is a folder."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from controlprefix._io import atomic_path
from controlprefix.errors import StoreError
from controlprefix.reports import provenance


class ComparisonState:
    """The results so far, in a file if there is a folder."""

    def __init__(self, path: Path | None, options: dict[str, Any]) -> None:
        self.path = path
        self.results: dict[str, Any] = {"options": options, "methods": {}}
        if path is not None and path.is_file():
            try:
                saved = json.loads(path.read_text(encoding="utf-8"))
                earlier = {key: saved["options"].get(key) for key in options}
                saved["methods"].items()
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise StoreError(f"cannot read the comparison {path}: {error}") from error
            different = [key for key in options if earlier[key] != options[key]]
            if different:
                raise StoreError(
                    f"{path} holds a comparison with another {', '.join(different)}; give another "
                    "folder"
                )
            self.results = saved
        self.results["about"] = provenance(["peft"])

    def method(self, name: str) -> dict[str, Any]:
        """The results of a method."""
        result: dict[str, Any] = self.results["methods"].setdefault(name, {})
        return result

    def of(self, names: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
        """The results of some methods and seeds: the file may have more."""
        methods = {name: dict(self.method(name)) for name in names}
        chosen = {str(seed) for seed in seeds}
        for result in methods.values():
            if len(runs := result.get("runs", {})) > 1:  # else of a method without seeds
                result["runs"] = {seed: runs[seed] for seed in runs if seed in chosen}
        return {**self.results, "methods": methods}

    def save(self) -> None:
        """Write the file."""
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(self.path) as temporary:
                temporary.write_text(json.dumps(self.results, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise StoreError(f"cannot write the comparison to {self.path}: {error}") from error
