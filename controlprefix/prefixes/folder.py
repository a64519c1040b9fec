"""A prefix as a folder that can be shared: its file, what it is for, and a card to read."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from controlprefix._io import atomic_path
from controlprefix._version import __version__
from controlprefix.errors import PrefixFormatError, StoreError
from controlprefix.prefixes.key import PrefixKey
from controlprefix.prefixes.prefix import Prefix

PREFIX_FILE, INFO_FILE, CARD_FILE = "prefix.safetensors", "prefix.json", "README.md"


class SharedPrefix(NamedTuple):
    """A prefix, what it is for, and how it was made."""

    key: PrefixKey
    prefix: Prefix
    details: Mapping[str, Any]


def save_folder(shared: SharedPrefix, folder: str | Path) -> None:
    """Write a folder with a prefix, what it is for, and its card.

    Args:
        shared: The prefix.
        folder: Created if it does not exist.

    Raises:
        StoreError: If it cannot be written.
    """
    folder = Path(folder)
    key, prefix, details = shared
    info = {"kind": key.kind, "name": key.name, "details": details, "library_version": __version__}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        prefix.save(folder / PREFIX_FILE)
        for name, text in (
            (INFO_FILE, json.dumps(info, indent=2, ensure_ascii=False) + "\n"),
            (CARD_FILE, card(shared)),
        ):
            with atomic_path(folder / name) as unfinished:
                unfinished.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StoreError(f"cannot write the prefix to {folder}: {error}") from error


def load_folder(folder: str | Path) -> SharedPrefix:
    """Read what `save_folder` wrote.

    Raises:
        StoreError: If the prefix's file cannot be read.
        PrefixFormatError: If the folder is damaged.
    """
    folder = Path(folder)
    prefix = Prefix.load(folder / PREFIX_FILE)
    try:
        info = json.loads((folder / INFO_FILE).read_text(encoding="utf-8"))
        key = PrefixKey(info["kind"], info["name"])
        details = info["details"]
        if not all(isinstance(text, str) for text in key) or not isinstance(details, dict):
            raise TypeError("kind and name must be texts, details an object")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PrefixFormatError(f"cannot read {folder / INFO_FILE}: {error!r}") from error
    return SharedPrefix(key, prefix, details)


def card(shared: SharedPrefix) -> str:
    """A model card in Markdown: what the prefix is for, its size, how it was made, how to use it.

    Example:
        >>> from controlprefix.prefixes import Geometry
        >>> geometry = Geometry.uniform(num_layers=2, num_kv_heads=1, head_dim=4)
        >>> prefix = Prefix.random(geometry, num_slots=3)
        >>> card(SharedPrefix(PrefixKey("task", "email"), prefix, {})).splitlines()[8]
        "# A prefix for task 'email'"
    """
    key, prefix, details = shared
    geometry = prefix.geometry
    settings = next((value for value in details.values() if isinstance(value, dict)), {})
    rows = {
        "for": str(key),
        "base model": f"{geometry.model_name} (weights {geometry.fingerprint[:12] or 'unknown'})",
        "slots": prefix.num_slots,
        "sites": ", ".join(geometry.sites),
        "dtype": str(prefix.dtype).removeprefix("torch."),
        "dial": "calibrated" if prefix.dial else "none",
        **{name: value for name, value in settings.items() if value is not None},
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    request = {"task": f"task={key.name!r}", "user": f"user={key.name!r}"}.get(
        key.kind, f"attributes={{{key.attribute!r}: {key.label!r}}}" if key.attribute else ""
    )
    return f"""---
library_name: controlprefix
base_model: {json.dumps(geometry.model_name, ensure_ascii=False)}
tags:
- controlprefix
- prefix-tuning
---

# A prefix for {key}

Slots (virtual tokens, as keys and values of every layer) for one frozen model. They fit only the
weights that they were made for.

| | |
| --- | --- |
{table}

```python
from controlprefix import ControlPrefix
from controlprefix.prefixes.folder import load_folder

cp = ControlPrefix.from_pretrained("…")  # the base model
shared = load_folder("…")  # this folder
cp.put(*shared.key, shared.prefix)
cp.generate("…", {request})
```
"""
