"""Prefixes kept in memory, and one question to the database for all who ask at once."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from controlprefix.prefixes.prefix import Prefix
from controlprefix.store.records import PrefixKey


class PrefixCache:
    """Prefixes by name and content, as many as fit; the least recently used go first.

    Args:
        max_bytes: Of all prefixes together.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._size_bytes = 0
        self._prefixes: OrderedDict[tuple[PrefixKey, str], Prefix] = OrderedDict()
        self._contents: dict[PrefixKey, set[str]] = {}
        self._lock = threading.Lock()

    @property
    def size_bytes(self) -> int:
        """Of what is kept now."""
        return self._size_bytes

    def held(self, keys: Iterable[PrefixKey]) -> dict[str, Prefix]:
        """What is kept for any of the keys, by content hash."""
        with self._lock:
            found = {}
            for key in keys:
                for content in self._contents.get(key, ()):
                    self._prefixes.move_to_end((key, content))
                    found[content] = self._prefixes[key, content]
            return found

    def put(self, key: PrefixKey, content_hash: str, prefix: Prefix) -> None:
        """Keep a prefix, and none of other content for its name."""
        with self._lock:
            for content in self._contents.get(key, set()) - {content_hash}:
                self._drop(key, content)
            if (key, content_hash) in self._prefixes:
                return
            self._prefixes[key, content_hash] = prefix
            self._contents.setdefault(key, set()).add(content_hash)
            self._size_bytes += prefix.size_bytes
            while self._size_bytes > self._max_bytes:
                self._drop(*next(iter(self._prefixes)))

    def forget(self, key: PrefixKey) -> None:
        """Drop all that is kept for a name."""
        with self._lock:
            for content in list(self._contents.get(key, ())):
                self._drop(key, content)

    def _drop(self, key: PrefixKey, content: str) -> None:
        self._size_bytes -= self._prefixes.pop((key, content)).size_bytes
        self._contents[key].discard(content)
        if not self._contents[key]:
            del self._contents[key]


Answer = TypeVar("Answer")


@dataclass
class _Question(Generic[Answer]):
    keys: set[PrefixKey] = field(default_factory=set)
    answer: Mapping[PrefixKey, Answer] | None = None
    failed: bool = False


class Together(Generic[Answer]):
    """Lets threads that ask while a question is under way share the next one.

    A question is never joined once it has begun: its answer may be older than the wish.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._under_way = False
        self._next: _Question[Answer] = _Question()

    def ask(
        self,
        keys: Collection[PrefixKey],
        question: Callable[[Collection[PrefixKey]], Mapping[PrefixKey, Answer]],
    ) -> Mapping[PrefixKey, Answer]:
        """The answers for some keys; `question` is called by one of the threads for all."""
        with self._changed:
            mine = self._next
            mine.keys |= set(keys)
            self._changed.wait_for(lambda: mine.answer is not None or mine.failed or self._free)
            if mine.answer is None and not mine.failed:
                self._under_way, self._next = True, _Question()
                leads = True
            else:
                leads = False
        if leads:
            try:
                mine.answer = question(mine.keys)
            except BaseException:
                mine.failed = True
                if mine.keys == set(keys):
                    raise
            finally:
                with self._changed:
                    self._under_way = False
                    self._changed.notify_all()
        if mine.failed:  # maybe for another's name: each learns about its own
            return question(keys)
        assert mine.answer is not None
        return {key: mine.answer[key] for key in keys if key in mine.answer}

    @property
    def _free(self) -> bool:
        return not self._under_way
