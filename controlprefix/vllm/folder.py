"""A folder of assembled prefixes, which the gateway writes and vLLM's workers read."""

import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from controlprefix.errors import StoreError
from controlprefix.prefix import Prefix

_IN_USE_S = 600.0  # a request may wait so long for its turn


class PrefixFolder:
    """Files by the digest of what they hold. The least recently used go first.

    Args:
        path: It is made if it is not there.
        most_bytes: Of all files; those that were asked for in the last ten minutes stay anyway.

    Raises:
        StoreError: If it cannot be written.
    """

    def __init__(self, path: str | Path, *, most_bytes: int = 10 << 30) -> None:
        self._path = Path(path)
        self._most_bytes = most_bytes
        self._lock = threading.Lock()
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            self._num_bytes = sum(one.stat().st_size for one in self._files())
        except OSError as error:
            raise StoreError(f"cannot use the folder {self._path}: {error}") from error

    def file(self, digest: str) -> Path:
        """Where a prefix stands, or would."""
        return self._path / f"{digest}.safetensors"

    def keep(self, digest: str, make: Callable[[], Prefix]) -> None:
        """See to it that a prefix is there, and stays for now.

        Raises:
            StoreError: If it cannot be written.
        """
        path = self.file(digest)
        try:
            with contextlib.suppress(FileNotFoundError):
                os.utime(path)
                return
            data = make().to_bytes()
            # Whole or not at all: workers may look for it at any time.
            handle, name = tempfile.mkstemp(dir=self._path, prefix=".", suffix=".part")
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.chmod(name, 0o644)  # workers may be another user
            os.replace(name, path)
            with self._lock:
                self._num_bytes += len(data)
                if self._num_bytes > self._most_bytes:
                    self._shrink()
        except OSError as error:
            raise StoreError(f"cannot write {path}: {error}") from error

    def _files(self) -> list[Path]:
        return list(self._path.glob("*.safetensors"))

    def _shrink(self) -> None:
        found = []
        for path in self._files():
            with contextlib.suppress(FileNotFoundError):  # another gateway may shrink it too
                found.append((path.stat().st_mtime, path.stat().st_size, path))
        found.sort()
        self._num_bytes = sum(size for _, size, _ in found)
        for used, size, path in found:
            if self._num_bytes <= 0.9 * self._most_bytes or used > time.time() - _IN_USE_S:
                break
            path.unlink(missing_ok=True)
            self._num_bytes -= size
