"""URLs of databases: what users write, and what may be shown of them."""

import re
from pathlib import Path
from urllib.parse import unquote

from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from controlprefix.errors import StoreError
from controlprefix.store.connections import is_in_memory

_SCHEMES = ("postgres", "postgresql", "sqlite")


def without_password(url: str) -> str:
    """A URL that may be shown."""
    try:
        # A query may contain passwords too.
        parsed = make_url(url).set(query={})
    except (ArgumentError, ValueError):
        return url.rpartition("@")[2].partition("?")[0]
    if parsed.host is not None and "@" in parsed.host:  # of a password that is not quoted
        parsed = parsed.set(host=parsed.host.rpartition("@")[2])
    return parsed.render_as_string(hide_password=True)


def redacted(text: str, url: str) -> str:
    """A message without what may be passwords of a URL."""
    address, _, query = url.partition("://")[2].partition("?")
    user_info = address.rpartition("@")[0].partition(":")[2]
    secrets = {user_info, *re.split("[@:]", user_info), unquote(user_info)}
    secrets |= {pair.partition("=")[2] for pair in query.split("&")}
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) > 2:
            text = text.replace(secret, "***")
    return text


def full_url(url: str) -> str:
    """The SQLAlchemy URL of a path, and of a URL in the short form that hosts give out.

    Raises:
        StoreError: If a scheme has no `://`.
    """
    scheme = url.partition(":")[0]
    if "://" not in url and ":" in url and scheme.partition("+")[0] in _SCHEMES:
        raise StoreError(
            f"the store's URL begins with {scheme}: but not with {scheme}://; write it as "
            "postgresql://user:password@host/name"
        )
    if "://" not in url:
        return f"sqlite:///{url}"
    scheme, rest = url.split("://", 1)
    return f"postgresql+psycopg://{rest}" if scheme in {"postgres", "postgresql"} else url


def sqlite_path(url: str) -> Path | None:
    """The file of an SQLite database; None for any other."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        return None
    if parsed.get_backend_name() != "sqlite" or is_in_memory(url):
        return None
    database = str(parsed.database)
    return None if database.startswith("file:") else Path(database)


def label_of(url: str) -> str:
    path = sqlite_path(url)
    return without_password(url) if path is None else str(path.absolute())
