"""PrefixFolder: a folder of assembled prefixes, written by the server and read by vLLM."""

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from controlprefix._io import atomic_path
from controlprefix.errors import OverloadedError, PrefixFormatError, StoreError, StoreKeyError
from controlprefix.prefixes import Prefix
from controlprefix.store.encryption import KeyFile, TenantCipher

_IN_USE_S = 600.0  # how long a request may wait for its turn
_MAX_AGE_S = 3600.0  # after the last use, so that forgotten users disappear here too
_SWEEP_INTERVAL_S = 60.0
_TARGET_FRACTION = 0.9  # of the limit, to which a sweep evicts
_SUFFIXES = {".safetensors", ".encrypted", ".part"}
_FILE_MODE = 0o640  # workers may run as another user of the same group


def file_name(digest: str, tenant: str, user: str | None) -> str:
    """Name of a file of slots: the content digest, after a hash of the owner for a user's slots.

    Example:
        >>> file_name("0123", "default", None)
        '0123'
        >>> file_name("0123", "default", "ana")
        'bc6333b9f17552409528e6948b1eb99e-0123'
    """
    return digest if user is None else f"{_owner(tenant, user)}-{digest}"


@contextlib.contextmanager
def _writing(failure: str) -> Iterator[None]:
    """Raise errors of the file system inside as a `StoreError` that begins with `failure`."""
    try:
        yield
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{failure}: {error}") from error


def _owner(tenant: str, user: str) -> str:
    return hashlib.sha256(json.dumps([tenant, user]).encode()).hexdigest()[:32]


class PrefixFolder:
    """Files named by `file_name`. Files unused for an hour are removed.

    Args:
        path: Created if it does not exist.
        max_bytes: Limit of all files together. Beyond it, the least recently used are evicted,
            except those used in the last ten minutes; if these alone are too many, further
            ones are refused.
        key_file: File with the key that they are encrypted with, in base64; server and workers
            have the same. Left out, they are not encrypted.

    Raises:
        StoreError: If it cannot be created.
        StoreKeyError: If the key cannot be read.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        max_bytes: int = 10 << 30,
        key_file: str | Path | None = None,
    ) -> None:
        self._path = Path(path)
        self._suffix = "safetensors" if key_file is None else "encrypted"
        keys = None if key_file is None else KeyFile(key_file)
        self._cipher = TenantCipher("the folder of prefixes", keys)
        self._cipher.encrypt(b"", "")  # a key of another size is refused here
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._size_bytes = 0
        self._last_sweep = 0.0
        with _writing(f"cannot use the folder {self._path}"):
            self._path.mkdir(parents=True, exist_ok=True)

    def file(self, name: str) -> Path:
        """The path of a prefix's file, whether it exists or not."""
        return self._path / f"{name}.{self._suffix}"

    def read(self, name: str) -> Prefix:
        """Read a prefix, and verify its content hash.

        Raises:
            StoreError: If it does not exist, or is damaged.
        """
        try:
            data = self.file(name).read_bytes()
            if self._cipher.current_key_id is not None:
                data = self._cipher.decrypt(data, self._cipher.current_key_id, name)
            return Prefix.from_bytes(data, name=name)
        except (OSError, PrefixFormatError, StoreKeyError) as error:
            raise StoreError(f"prefix {name} cannot be read: {error}") from error

    def forget(self, tenant: str, user: str) -> None:
        """Remove the files of a user.

        Raises:
            StoreError: If one cannot be removed.
        """
        with _writing("cannot remove files of a forgotten user"):
            for path in self._path.glob(f"{_owner(tenant, user)}-*"):
                path.unlink(missing_ok=True)

    def remove_expired(self) -> None:
        """Remove files that were not used for an hour.

        Raises:
            StoreError: If one cannot be removed.
        """
        with (
            _writing("cannot remove old files of prefixes"),
            contextlib.suppress(OverloadedError),  # what is in use may fill the folder
        ):
            self._make_room(0)

    def write(
        self, name: str, make_prefix: Callable[[], Prefix], *, overwrite: bool = False
    ) -> None:
        """Write a prefix unless it exists, and refresh its mtime so that it is not evicted.

        Args:
            name: The file's, from `file_name`.
            make_prefix: Makes the prefix; called only if the file must be written.
            overwrite: Write it also if it exists, since it may be damaged.

        Raises:
            OverloadedError: If there is no room beside the files in use.
            StoreError: If it cannot be written.
        """
        path = self.file(name)
        with _writing(f"cannot write {path}"):
            if not overwrite:
                with contextlib.suppress(FileNotFoundError):
                    os.utime(path)
                    return
            data, _ = self._cipher.encrypt(make_prefix().to_bytes(), name)
            self._make_room(len(data))
            with atomic_path(path) as unfinished:
                unfinished.write_bytes(data)
                unfinished.chmod(_FILE_MODE)

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
                if path.suffix not in _SUFFIXES:  # not written here
                    continue
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
