"""Control and user prefixes on one frozen language model, put together per request."""

from typing import TYPE_CHECKING

from controlprefix._lazy import lazy_exports
from controlprefix._version import __version__
from controlprefix.errors import (
    AttributeSpaceError,
    ContextLengthError,
    ControlPrefixError,
    EngineError,
    ForgottenError,
    GeometryMismatchError,
    MissingDependencyError,
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
    "EngineError",
    "Example",
    "ForgottenError",
    "Geometry",
    "GeometryMismatchError",
    "Message",
    "MissingDependencyError",
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
    "UnknownNameError",
    "UnsupportedModelError",
    "VersionConflictError",
    "__version__",
    "assemble",
]

__getattr__ = lazy_exports(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted(__all__)
