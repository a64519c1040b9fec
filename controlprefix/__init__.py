"""Control and user prefixes on one frozen language model, put together per request."""

from typing import TYPE_CHECKING

from controlprefix._lazy import lazy_exports
from controlprefix._version import __version__
from controlprefix.errors import (
    AttributeSpaceError,
    ContextLengthError,
    ControlPrefixError,
    DamagedRowError,
    EngineError,
    ForgottenError,
    GeometryMismatchError,
    InvalidNameError,
    MissingDependencyError,
    ModelOutputError,
    OverloadedError,
    PrefixFormatError,
    RequestError,
    StoreError,
    StoreKeyError,
    TrainingDataError,
    TrainingInterrupted,
    UnknownNameError,
    UnsupportedModelError,
    VersionConflictError,
)

if TYPE_CHECKING:
    from controlprefix.attributes import AttributeSpace
    from controlprefix.completion import Completion, Score
    from controlprefix.engine import ControlPrefix
    from controlprefix.example import Example, Preference
    from controlprefix.message import Message
    from controlprefix.prefixes import Geometry, Part, Prefix, PrefixBatch, assemble
    from controlprefix.request import Request


_HOMES = {
    "AttributeSpace": "attributes",
    "Completion": "completion",
    "ControlPrefix": "engine",
    "Example": "example",
    "Geometry": "prefixes",
    "Message": "message",
    "Part": "prefixes",
    "Preference": "example",
    "Prefix": "prefixes",
    "PrefixBatch": "prefixes",
    "Request": "request",
    "Score": "completion",
    "assemble": "prefixes",
}

__all__ = [
    "AttributeSpace",
    "AttributeSpaceError",
    "Completion",
    "ContextLengthError",
    "ControlPrefix",
    "ControlPrefixError",
    "DamagedRowError",
    "EngineError",
    "Example",
    "ForgottenError",
    "Geometry",
    "GeometryMismatchError",
    "InvalidNameError",
    "Message",
    "MissingDependencyError",
    "ModelOutputError",
    "OverloadedError",
    "Part",
    "Preference",
    "Prefix",
    "PrefixBatch",
    "PrefixFormatError",
    "Request",
    "RequestError",
    "Score",
    "StoreError",
    "StoreKeyError",
    "TrainingDataError",
    "TrainingInterrupted",
    "UnknownNameError",
    "UnsupportedModelError",
    "VersionConflictError",
    "__version__",
    "assemble",
]

__getattr__ = lazy_exports(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted(__all__)
