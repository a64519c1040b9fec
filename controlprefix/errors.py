"""Every error that this library raises on purpose.

::

    ControlPrefixError
    ├── RequestError              a request that cannot be carried out as written
    │   ├── ContextLengthError    prompt and completion do not fit the model's context
    │   ├── ModelNotFoundError    a server was asked for a model that it does not serve
    │   └── ModelOutputError      no token can be chosen
    ├── UnknownNameError          no such task, attribute, label, user, version or key
    │   └── InvalidNameError      a name that nothing in a store can have
    ├── PrefixFormatError         bytes or tensors that are not a valid prefix
    ├── GeometryMismatchError     a prefix made for another model or other weights
    ├── UnsupportedModelError     a model whose attention cannot take slots
    ├── TrainingDataError         examples or settings that cannot be trained with
    ├── AttributeSpaceError       an attribute file that is not valid
    ├── MissingDependencyError    an optional package that is not installed
    ├── OverloadedError           more requests than can be accepted now
    ├── EngineError               the engine behind a server failed or is misconfigured
    ├── StoreError                the store cannot be opened, read or written
    │   ├── DamagedRowError       a row that this library does not write
    │   ├── ForgottenError        a user was forgotten while their prefix was made
    │   ├── StoreKeyError         an encryption key is missing or wrong
    │   └── VersionConflictError  another version was published first
    └── ServerError               raised by the HTTP server only
        ├── UnauthorizedError     no API key, or an unknown one
        ├── RateLimitError        a rate limit was reached
        ├── RequestTimeoutError   a request took longer than the server allows
        ├── ClientDisconnectedError
        └── InternalServerError

Each is also the built-in error it resembles, so `except ValueError` works too.
`TrainingInterrupted`, after Ctrl-C, is a `KeyboardInterrupt` and not among them.
"""

import difflib
import reprlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError

_MAX_LISTED = 20


class ControlPrefixError(Exception):
    """Base of every error raised by controlprefix."""


class RequestError(ControlPrefixError, ValueError):
    """A request that cannot be carried out as written."""


class ContextLengthError(RequestError):
    """Prompt and completion do not fit the context of the model."""


class ModelNotFoundError(RequestError):
    """A server was asked for a model that it does not serve."""


class ModelOutputError(RequestError):
    """A request for which no token can be chosen."""

    def __init__(self) -> None:
        super().__init__(
            "no token can be chosen for this request: the logits of the model are no numbers (NaN: "
            "values overflowed, or weights are damaged; load it with dtype=torch.bfloat16 or "
            "torch.float32, or lower the strengths), or the model's generation config, logit_bias "
            "and json_schema together rule out every token"
        )


class UnknownNameError(ControlPrefixError, LookupError):
    """A task, attribute, label, user, version or key that does not exist."""


class InvalidNameError(UnknownNameError):
    """A name that nothing in a store can have, such as one with a line break."""


class PrefixFormatError(ControlPrefixError, ValueError):
    """Bytes or tensors that are not a valid prefix."""


class GeometryMismatchError(ControlPrefixError, ValueError):
    """A prefix made for another model, or for other weights of this model."""


class UnsupportedModelError(ControlPrefixError, TypeError):
    """A model whose attention cannot take slots."""


class TrainingDataError(ControlPrefixError, ValueError):
    """Examples or settings that cannot be trained with."""


class AttributeSpaceError(ControlPrefixError, ValueError):
    """An attribute file that is not valid."""


class MissingDependencyError(ControlPrefixError, ImportError):
    """An optional package that is not installed."""


class OverloadedError(ControlPrefixError, RuntimeError):
    """More requests than can be accepted now."""


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C during training; the message says what stands, and how to continue."""


class EngineError(ControlPrefixError, RuntimeError):
    """vLLM behind a server, or the actors of a Ray cluster, failed or are misconfigured."""


class StoreError(ControlPrefixError, OSError):
    """The store cannot be opened, read or written."""


class DamagedRowError(StoreError):
    """A row of the store holds what this library does not write."""


class StoreKeyError(StoreError):
    """Stored bytes are encrypted, and their key is missing or wrong."""


class VersionConflictError(StoreError):
    """Another version was published first."""


class ForgottenError(StoreError):
    """A user was forgotten while a prefix was made of their texts; nothing was stored.

    Attributes:
        user: The name.
    """

    def __init__(self, user: str) -> None:
        super().__init__(f"user {user!r} was forgotten meanwhile; nothing was stored")
        self.user = user

    def __reduce__(self) -> tuple[type["ForgottenError"], tuple[str]]:
        return type(self), (self.user,)


class ServerError(ControlPrefixError, RuntimeError):
    """Base of the errors that only the HTTP server raises."""


class UnauthorizedError(ServerError):
    """No API key, or an unknown one."""


class RateLimitError(ServerError):
    """A rate limit was reached: requests or tokens of a key, wrong keys, or large bodies.

    Attributes:
        wait_s: Seconds until the next request is accepted.
    """

    def __init__(self, message: str, wait_s: float) -> None:
        super().__init__(message)
        self.wait_s = wait_s


class RequestTimeoutError(ServerError):
    """A request took longer than the server allows."""


class ClientDisconnectedError(ServerError):
    """The client closed the connection before the response was complete."""


class InternalServerError(ServerError):
    """A failure whose details go to the server's log only."""


def short_reason(error: Exception) -> str:
    """Message of a third-party exception, in one line of up to 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def shortened(items: Sequence[str], separator: str = ", ", limit: int = 10) -> str:
    """The first items, and how many more there are.

    Example:
        >>> shortened(["row 1", "row 2", "row 7"], limit=2)
        'row 1, row 2, and 1 more'
    """
    more = [f"and {len(items) - limit} more"] if len(items) > limit else []
    return separator.join([*items[:limit], *more])


def known_names(name: str, existing: Iterable[str], *, truncated: bool = False) -> str:
    """List the names that exist and the nearest match, for a message about an unknown name.

    Args:
        name: The name that was asked for.
        existing: The names that exist.
        truncated: Whether `existing` is only some of them.

    Example:
        >>> known_names("formel", ["informal", "formal"])
        "formal, informal; did you mean 'formal'?"
        >>> known_names("x", [])
        'none'
    """
    names = sorted(existing)
    count = f"more than {len(names)}" if truncated else f"{len(names)} in all"
    listed = ", ".join(names[:_MAX_LISTED])
    if len(names) > _MAX_LISTED:
        listed += f", … ({count})"
    nearest = difflib.get_close_matches(name, names, n=1)
    return (listed or "none") + (f"; did you mean {nearest[0]!r}?" if nearest else "")


def validation_message(
    error: "ValidationError", fields: Iterable[str], owner: str, *, show_values: bool = False
) -> str:
    """pydantic's findings in one line.

    Args:
        error: From a model or dataclass of ours.
        fields: Names of its fields.
        owner: What has those fields, such as `a request`.
        show_values: Show the refused values; not where they may be private, as prompts are.
    """
    lines = []
    for finding in error.errors(include_url=False):
        path = ".".join(str(step) for step in finding["loc"])
        if finding["type"] in {"extra_forbidden", "unexpected_keyword_argument"}:
            lines.append(f"unknown field {path!r}; {owner} has: {known_names(path, fields)}")
        else:
            message = finding["msg"].removeprefix("Value error, ")
            value = f" is {reprlib.repr(finding['input'])}" if show_values else ""
            lines.append(f"{path}{value}: {message}" if path else message)
    return "; ".join(lines)
