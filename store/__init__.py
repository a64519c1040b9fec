"""Where prefixes are kept: SQLAlchemy tables, versions, tenants."""

from controlprefix.store.prefix_store import (
    Kind,
    NewVersion,
    PrefixInfo,
    PrefixKey,
    PrefixStore,
    StoredPrefix,
    VersionInfo,
    VersionRef,
)

__all__ = [
    "Kind",
    "NewVersion",
    "PrefixInfo",
    "PrefixKey",
    "PrefixStore",
    "StoredPrefix",
    "VersionInfo",
    "VersionRef",
]
