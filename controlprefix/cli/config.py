"""The configuration file: defaults of options, for every command.

`controlprefix.toml` in the current folder, or else `config.toml` in the user's folder of
configuration. Its entries have the names of the options: `model`, `store`, `tenant`, `device`,
`dtype`, `encryption_keys`, `attributes`.
"""

import os
import tomllib
from pathlib import Path

import platformdirs

from controlprefix.errors import RequestError, known_names

NAMES = ("model", "store", "tenant", "device", "dtype", "encryption_keys", "attributes")


def apply_config() -> None:
    """Set the environment variables of options that the configuration file has a value for.

    A variable that is set already stays, and an option on the command line comes before both.

    Raises:
        RequestError: If the file cannot be read, or has an unknown entry.
    """
    user_file = Path(platformdirs.user_config_dir("controlprefix")) / "config.toml"
    path = next((p for p in (Path("controlprefix.toml"), user_file) if p.is_file()), None)
    if path is None:
        return
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(f"cannot read the configuration {path}: {error}") from error
    for name, value in entries.items():
        if name not in NAMES:
            raise RequestError(
                f"{path} has an unknown entry {name!r}; it can have: {known_names(name, NAMES)}"
            )
        if not isinstance(value, str):
            raise RequestError(f"{path}: {name} must be a text in quotes, got {value!r}")
        os.environ.setdefault(f"CONTROLPREFIX_{name.upper()}", value)
