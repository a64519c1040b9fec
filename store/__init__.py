"""Where prefixes are kept: versions in SQL tables, tenants, encryption, API keys."""

from controlprefix.prefixes import Kind, PrefixKey
from controlprefix.store.api_keys import ApiKeyInfo, tenant_of
from controlprefix.store.cache import CachedPrefix, PrefixCache
from controlprefix.store.encryption import EncryptionKeys, JsonEncryptionKeys
from controlprefix.store.jobs import Claim, Job, JobKind, JobStatus
from controlprefix.store.model_store import ModelStore
from controlprefix.store.profiles import SimilarUser
from controlprefix.store.records import (
    AuditEntry,
    NewVersion,
    PrefixInfo,
    Profile,
    StoredVersion,
    StoreStats,
    VersionInfo,
    VersionRef,
)
from controlprefix.store.schema_upgrade import upgrade
from controlprefix.store.single_flight import SingleFlight
from controlprefix.store.store import PrefixStore

__all__ = [
    "ApiKeyInfo",
    "AuditEntry",
    "CachedPrefix",
    "Claim",
    "EncryptionKeys",
    "Job",
    "JobKind",
    "JobStatus",
    "JsonEncryptionKeys",
    "Kind",
    "ModelStore",
    "NewVersion",
    "PrefixCache",
    "PrefixInfo",
    "PrefixKey",
    "PrefixStore",
    "Profile",
    "SimilarUser",
    "SingleFlight",
    "StoreStats",
    "StoredVersion",
    "VersionInfo",
    "VersionRef",
    "tenant_of",
    "upgrade",
]
