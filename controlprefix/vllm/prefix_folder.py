"""PrefixFolder: a folder of assembled prefixes, written by the server and read by vLLM."""

import contextlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from controlprefix._io import atomic_path
from controlprefix.errors import OverloadedError, PrefixFormatError, StoreError
from controlprefix.prefixes import Prefix

_IN_USE_S = 600.0  # how long a request may wait for its turn
_MAX_AGE_S = 3600.0  # after the last use, so that forgotten users disappear here too
_SWEEP_INTERVAL_S = 60.0
_TARGET_FRACTION = 0.9  # of the limit, to which a sweep evicts
_FILE_MODE = 0o640  # workers may run as another user of the same group


class PrefixFolder:
    """Files named by the digest of their content. Files unused for an hour are removed.

    Args:
        path: Created if it does not exist.
        max_bytes: Limit of all files together. Beyond it, the least recently used are evicted,
            except those used in the last ten minutes; if these alone are too many, further
            ones are refused.

    Raises:
        StoreError: If it cannot be created.
    """

    def __init__(self, path: str | Path, *, max_bytes: int = 10 << 30) -> None:
        self._path = Path(path)
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._size_bytes = 0
        self._last_sweep = 0.0
        try:
            self._path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"cannot use the folder {self._path}: {error}") from error

    def file(self, digest: str) -> Path:
        """The path of a prefix's file, whether it exists or not."""
        return self._path / f"{digest}.safetensors"

    def read(self, digest: str) -> Prefix:
        """Read a prefix, and verify its content hash.

        Raises:
            StoreError: If it does not exist, or is damaged.
        """
        try:
            return Prefix.from_bytes(self.file(digest).read_bytes(), name=digest)
        except (OSError, PrefixFormatError) as error:
            raise StoreError(f"prefix {digest} cannot be read: {error}") from error

    def write(
        self, digest: str, make_prefix: Callable[[], Prefix], *, overwrite: bool = False
    ) -> None:
        """Write a prefix unless it exists, and refresh its mtime so that it is not evicted.

        Args:
            digest: Names the file.
            make_prefix: Makes the prefix; called only if the file must be written.
            overwrite: Write it also if it exists, since it may be damaged.

        Raises:
            OverloadedError: If there is no room beside the files in use.
            StoreError: If it cannot be written.
        """
        path = self.file(digest)
        try:
            if not overwrite:
                with contextlib.suppress(FileNotFoundError):
                    os.utime(path)
                    return
            data = make_prefix().to_bytes()
            self._make_room(len(data))
            with atomic_path(path) as unfinished:
                unfinished.write_bytes(data)
                unfinished.chmod(_FILE_MODE)
        except OSError as error:
            if isinstance(error, StoreError):
                raise
            raise StoreError(f"cannot write {path}: {error}") from error

    def _make_room(self, num_bytes: int) -> None:
        """Remove old files, and evict what does not fit."""
        with self._lock:
            now = time.time()
            fits = self._size_bytes + num_bytes <= self._max_bytes
            # A clock that was set back does not put the next sweep off.
            if fits and 0 <= now - self._last_sweep < _SWEEP_INTERVAL_S:
                self._size_bytes += num_bytes
                return
            self._last_sweep = now
            files = []
            for path in self._path.iterdir():
                with contextlib.suppress(FileNotFoundError):  # another server may sweep too
                    stat = path.stat()
                    files.append((stat.st_mtime, stat.st_size, path))
            self._size_bytes = sum(size for _, size, _ in files)
            for used_at, size, path in sorted(files):
                too_full = self._size_bytes + num_bytes > _TARGET_FRACTION * self._max_bytes
                is_of_future = used_at > now + _MAX_AGE_S
                if (
                    is_of_future
                    or used_at < now - _MAX_AGE_S
                    or (too_full and used_at < now - _IN_USE_S)
                ):
                    path.unlink(missing_ok=True)
                    self._size_bytes -= size
            if self._size_bytes + num_bytes > self._max_bytes:
                raise OverloadedError(
                    f"the prefixes in use take {self._size_bytes:,} of {self._max_bytes:,} bytes "
                    "of their folder; try again later"
                )
            self._size_bytes += num_bytes
