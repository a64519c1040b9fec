"""Where prefixes are kept: SQLAlchemy tables, versions, tenants."""

from controlprefix.store.api_keys import ApiKeyInfo, tenant_of
from controlprefix.store.cache import PrefixCache, Together
from controlprefix.store.database import upgrade
from controlprefix.store.encryption import JsonKeys, KeyProvider
from controlprefix.store.profiles import Similar
from controlprefix.store.records import (
    AuditEntry,
    Fetched,
    Kind,
    NewVersion,
    PrefixInfo,
    PrefixKey,
    StoredPrefix,
    StoreStats,
    VersionInfo,
    VersionRef,
)
from controlprefix.store.store import PrefixStore

__all__ = [
    "ApiKeyInfo",
    "AuditEntry",
    "Fetched",
    "JsonKeys",
    "KeyProvider",
    "Kind",
    "NewVersion",
    "PrefixCache",
    "PrefixInfo",
    "PrefixKey",
    "PrefixStore",
    "Similar",
    "StoreStats",
    "StoredPrefix",
    "Together",
    "VersionInfo",
    "VersionRef",
    "tenant_of",
    "upgrade",
]
