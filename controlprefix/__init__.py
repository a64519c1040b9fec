"""Control and user prefixes on one frozen language model, put together per request."""

import importlib
from typing import TYPE_CHECKING

from controlprefix.errors import (
    AttributeSpaceError,
    ContextLengthError,
    ControlPrefixError,
    EngineError,
    GeometryMismatchError,
    OverloadedError,
    PrefixFormatError,
    RequestError,
    StoreError,
    StoreKeyError,
    TrainingDataError,
    UnknownNameError,
    UnsupportedModelError,
    VersionConflictError,
)

if TYPE_CHECKING:
    from controlprefix.attributes import AttributeSpace
    from controlprefix.engine import ControlPrefix
    from controlprefix.prefixes.assembly import Part, PrefixBatch, assemble
    from controlprefix.prefixes.geometry import Geometry
    from controlprefix.prefixes.prefix import Prefix
    from controlprefix.request import Completion, Example, Message, Request, Score

__version__ = "0.1.0"

# Loaded on first use, so that importing this package does not import torch.
_HOMES = {
    "AttributeSpace": "attributes",
    "Completion": "request",
    "ControlPrefix": "engine",
    "Example": "request",
    "Geometry": "prefixes.geometry",
    "Message": "request",
    "Part": "prefixes.assembly",
    "Prefix": "prefixes.prefix",
    "PrefixBatch": "prefixes.assembly",
    "Request": "request",
    "Score": "request",
    "assemble": "prefixes.assembly",
}

__all__ = [
    "AttributeSpace",
    "AttributeSpaceError",
    "Completion",
    "ContextLengthError",
    "ControlPrefix",
    "ControlPrefixError",
    "EngineError",
    "Example",
    "Geometry",
    "GeometryMismatchError",
    "Message",
    "OverloadedError",
    "Part",
    "Prefix",
    "PrefixBatch",
    "PrefixFormatError",
    "Request",
    "RequestError",
    "Score",
    "StoreError",
    "StoreKeyError",
    "TrainingDataError",
    "UnknownNameError",
    "UnsupportedModelError",
    "VersionConflictError",
    "assemble",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'controlprefix' has no attribute {name!r}")
    return getattr(importlib.import_module(f"controlprefix.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
