"""Lazy package exports, so that importing a package does not import torch."""

import importlib
from collections.abc import Callable, Mapping


def lazy_exports(package: str, homes: Mapping[str, str]) -> Callable[[str], object]:
    """A module-level `__getattr__` that imports names on first use.

    Args:
        package: Name of the package.
        homes: Per exported name, the module below the package that defines it.
    """

    def __getattr__(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{homes[name]}"), name)

    return __getattr__
