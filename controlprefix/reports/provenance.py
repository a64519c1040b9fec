"""What results were made with, so that they can be made again."""

import importlib.metadata
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from controlprefix._version import __version__

_PASSWORD = re.compile(r"(://[^:/@\s]*):[^@\s]+@")


def provenance(packages: Sequence[str] = (), **more: Any) -> dict[str, Any]:
    """Command line, date, device and versions.

    Args:
        packages: Packages that count beside torch and transformers.
        **more: What else was used, by name: `model`, `store`, `tenant`, `data`, `prefixes`, ….
    """
    import torch

    names = ("torch", "transformers", *packages)
    return {
        "command": _command(),
        "date": datetime.now(UTC).date().isoformat(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {
            "controlprefix": __version__,
            **{name: importlib.metadata.version(name) for name in names},
        },
        **more,
    }


def _command() -> str:
    """The command line without passwords; empty in a notebook or an interactive session."""
    program, *arguments = sys.argv or [""]
    name = Path(program).name
    if name == "controlprefix":
        words = [name, *arguments]
    elif name.endswith(".py") and name not in ("__main__.py", "ipykernel_launcher.py"):
        words = ["python", name, *arguments]
    else:
        return ""
    return _PASSWORD.sub(r"\1:***@", shlex.join(words))
