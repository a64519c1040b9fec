"""A folder of assembled prefixes, which the gateway writes and vLLM's workers read."""

import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from controlprefix.errors import OverloadedError, PrefixFormatError, StoreError
from controlprefix.prefixes.prefix import Prefix

_IN_USE_S = 600.0  # a request may wait so long for its turn
_KEPT_S = 3600.0  # after its last use: a user who is forgotten must be, here too
_SWEPT_EVERY_S = 60.0


class PrefixFolder:
    """Files by the digest of what they hold. What was not asked for within an hour is removed.

    Args:
        path: It is made if it is not there.
        most_bytes: Of all files. Beyond, the least recently used go, but for those that were
            asked for in the last ten minutes; if those alone are too many, others are refused.

    Raises:
        StoreError: If it cannot be written.
    """

    def __init__(self, path: str | Path, *, most_bytes: int = 10 << 30) -> None:
        self._path = Path(path)
        self._most_bytes = most_bytes
        self._lock = threading.Lock()
        self._num_bytes = 0
        self._swept = 0.0
        try:
            self._path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"cannot use the folder {self._path}: {error}") from error

    def file(self, digest: str) -> Path:
        """Where a prefix stands, or would."""
        return self._path / f"{digest}.safetensors"

    def read(self, digest: str) -> Prefix:
        """A prefix, checked against its own hash.

        Raises:
            StoreError: If it is not there, or damaged.
        """
        try:
            return Prefix.from_bytes(self.file(digest).read_bytes(), name=digest)
        except (OSError, PrefixFormatError) as error:
            raise StoreError(f"prefix {digest} cannot be read: {error}") from error

    def keep(self, digest: str, make: Callable[[], Prefix], *, anew: bool = False) -> None:
        """See to it that a prefix is there, and stays for now.

        Args:
            digest, make: Which, and what it is.
            anew: Whatever is there is not to be trusted.

        Raises:
            OverloadedError: If there is no room beside what is in use.
            StoreError: If it cannot be written.
        """
        path = self.file(digest)
        try:
            if not anew:
                with contextlib.suppress(FileNotFoundError):
                    os.utime(path)
                    return
            data = make().to_bytes()
            self._make_room(len(data))
            # Whole or not at all: workers may look for it at any time.
            handle, name = tempfile.mkstemp(dir=self._path, prefix=".", suffix=".part")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.chmod(name, 0o640)  # workers may be another user of the same group
                os.replace(name, path)
            except BaseException:
                os.unlink(name)
                raise
        except OSError as error:
            raise StoreError(f"cannot write {path}: {error}") from error

    def _make_room(self, size: int) -> None:
        """Remove what is old, and what there is no room for."""
        with self._lock:
            now = time.time()
            if now < self._swept + _SWEPT_EVERY_S and self._num_bytes + size <= self._most_bytes:
                self._num_bytes += size
                return
            self._swept = now
            found = []
            for path in self._path.iterdir():
                with contextlib.suppress(FileNotFoundError):  # another gateway may sweep too
                    about = path.stat()
                    found.append((about.st_mtime, about.st_size, path))
            self._num_bytes = sum(one for _, one, _ in found)
            for used, one, path in sorted(found):
                too_many = self._num_bytes + size > 0.9 * self._most_bytes
                if used < now - _KEPT_S or (too_many and used < now - _IN_USE_S):
                    path.unlink(missing_ok=True)
                    self._num_bytes -= one
            if self._num_bytes + size > self._most_bytes:
                raise OverloadedError(
                    f"the prefixes in use take {self._num_bytes:,} of {self._most_bytes:,} bytes "
                    "of their folder; try again later"
                )
            self._num_bytes += size
