"""Every error this library raises on purpose.

    ControlPrefixError
    ├── RequestError              a request that cannot be carried out as written
    │   └── ContextLengthError    prompt and completion do not fit the model's context
    ├── UnknownNameError          no such task, attribute, label, user or version
    ├── PrefixFormatError         bytes or tensors that are not a sound prefix
    ├── GeometryMismatchError     a prefix made for another model or other weights
    ├── UnsupportedModelError     a model whose attention cannot take slots
    ├── TrainingDataError         examples that cannot be learned from
    ├── AttributeSpaceError       a file of attributes that does not make sense
    ├── OverloadedError           more requests than can be taken now
    ├── EngineError               the engine behind a server failed, or is not as it should be
    └── StoreError                the store cannot be opened, read or written

Each is also the built-in error it resembles, so `except ValueError` works too.
"""

import difflib
from collections.abc import Iterable


class ControlPrefixError(Exception):
    """Base of every error raised by controlprefix."""


class RequestError(ControlPrefixError, ValueError):
    """A request that cannot be carried out as written."""


class ContextLengthError(RequestError):
    """Prompt and completion do not fit the context of the model."""


class UnknownNameError(ControlPrefixError, LookupError):
    """A task, attribute, label, user or version that does not exist."""


class PrefixFormatError(ControlPrefixError, ValueError):
    """Bytes or tensors that are not a sound prefix."""


class GeometryMismatchError(ControlPrefixError, ValueError):
    """A prefix made for another model, or for other weights of this model."""


class UnsupportedModelError(ControlPrefixError, TypeError):
    """A model whose attention cannot take slots."""


class TrainingDataError(ControlPrefixError, ValueError):
    """Examples that cannot be learned from."""


class AttributeSpaceError(ControlPrefixError, ValueError):
    """A file of attributes that does not make sense."""


class OverloadedError(ControlPrefixError, RuntimeError):
    """More requests than can be taken now."""


class EngineError(ControlPrefixError, RuntimeError):
    """The engine behind a server failed, or is not as it should be."""


class StoreError(ControlPrefixError, OSError):
    """The store cannot be opened, read or written."""


class StoreKeyError(StoreError):
    """Stored bytes are encrypted, and their key is missing or another."""


class VersionConflictError(StoreError):
    """Someone else published first."""


def known_names(name: str, known: Iterable[str], *, more: bool = False) -> str:
    """The end of a message about an unknown name: what exists, and the nearest of it.

    Args:
        name: What was asked for.
        known: What exists.
        more: There is more of it than is known here.

    Example:
        >>> known_names("formel", ["informal", "formal"])
        "formal, informal; did you mean 'formal'?"
        >>> known_names("x", [])
        'none'
    """
    names = sorted(known)
    number = f"more than {len(names)}" if more else f"{len(names)} in all"
    listed = ", ".join(names[:20]) + (f", … ({number})" if len(names) > 20 else "")
    nearest = difflib.get_close_matches(name, names, n=1)
    return (listed or "none") + (f"; did you mean {nearest[0]!r}?" if nearest else "")
