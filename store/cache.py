"""PrefixCache: prefixes in memory, bounded by bytes, least recently used first out."""

import threading
from collections.abc import Hashable, Iterable
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from cachetools import LRUCache

if TYPE_CHECKING:
    from controlprefix.prefixes import Prefix


Key = TypeVar("Key", bound=Hashable)


class CachedPrefix(NamedTuple):
    """A prefix and the hash of the stored bytes that it was read from."""

    content_hash: str
    prefix: "Prefix"


class PrefixCache(Generic[Key]):
    """The most recently used prefixes, one per key.

    Args:
        max_bytes: Limit of all prefixes together.
    """

    def __init__(self, max_bytes: int) -> None:
        self._entries: LRUCache[Key, CachedPrefix] = LRUCache(
            max_bytes, getsizeof=lambda entry: entry.prefix.size_bytes
        )
        self._lock = threading.Lock()

    @property
    def size_bytes(self) -> int:
        """Bytes of the cached prefixes."""
        return int(self._entries.currsize)

    def get(self, keys: Iterable[Key]) -> dict[Key, CachedPrefix]:
        """The cached prefixes of those keys that have one."""
        with self._lock:
            return {key: self._entries[key] for key in keys if key in self._entries}

    def put(self, key: Key, content_hash: str, prefix: "Prefix") -> None:
        """Cache a prefix in place of the key's earlier one; one that is too large is not kept."""
        with self._lock:
            self._entries.pop(key, None)
            if prefix.size_bytes <= self._entries.maxsize:
                self._entries[key] = CachedPrefix(content_hash, prefix)

    def cached_keys(self) -> list[Key]:
        """What is cached."""
        with self._lock:
            return list(self._entries)

    def forget(self, key: Key) -> None:
        """Drop the prefix of a key."""
        with self._lock:
            self._entries.pop(key, None)
