"""Encryption of stored bytes, with keys that the caller keeps.

AES-GCM through `cryptography`: a fresh nonce each time, and the place of the bytes (tenant,
name, model, version) authenticated with them, so that a row moved elsewhere does not open.
Names, sizes and training summaries stay readable; so do exports.
"""

import base64
import json
import os
from pathlib import Path
from typing import Any, Protocol

from controlprefix.errors import StoreError, StoreKeyError

_NONCE_BYTES = 12


class KeyProvider(Protocol):
    """Where keys come from: 16, 24 or 32 bytes each, by tenant and a name of their own."""

    def current_key(self, tenant: str) -> str | None:
        """The name of the key to write with; None: this tenant's bytes stay plain."""

    def key(self, tenant: str, key_id: str) -> bytes:
        """A key by its name.

        Raises:
            LookupError: If there is none, or no longer.
        """


class JsonKeys:
    """Keys from a file: `{"tenant": {"current": "k2", "keys": {"k1": "<base64>", "k2": …}}}`.

    It is read again at each use, so a key can be added or removed while a store is open.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)

    def current_key(self, tenant: str) -> str | None:
        """The tenant's `current`, if it is there."""
        found = self._read().get(tenant)
        return str(found["current"]) if found else None

    def key(self, tenant: str, key_id: str) -> bytes:
        """One of the tenant's `keys`."""
        return base64.b64decode(self._read()[tenant]["keys"][key_id])

    def _read(self) -> dict[str, Any]:
        try:
            keys = json.loads(self._path.read_text())
            assert isinstance(keys, dict)
            return keys
        except (OSError, ValueError, AssertionError) as error:
            raise StoreError(
                f"cannot read the keys in {str(self._path)!r}: {type(error).__name__}; it must be "
                'JSON of the form {"tenant": {"current": "k1", "keys": {"k1": "<base64>"}}}'
            ) from error


class Sealer:
    """Encrypts and decrypts one tenant's bytes.

    Args:
        tenant: Whose.
        keys: Left out, bytes are written plain, and encrypted ones cannot be read.
    """

    def __init__(self, tenant: str, keys: KeyProvider | None) -> None:
        self._tenant = tenant
        self._keys = keys

    @property
    def key_id(self) -> str | None:
        """The key that is written with now."""
        return self._keys.current_key(self._tenant) if self._keys else None

    def seal(self, payload: bytes, place: str) -> tuple[bytes, str | None]:
        """The bytes to store, and the name of their key.

        Raises:
            StoreKeyError: If there is no such key, or it is none.
        """
        key_id = self.key_id
        if key_id is None:
            return payload, None
        nonce = os.urandom(_NONCE_BYTES)
        return nonce + self._cipher(key_id).encrypt(nonce, payload, self._about(place)), key_id

    def unseal(self, stored: bytes, key_id: str | None, place: str) -> bytes:
        """The bytes that were sealed for this place.

        Raises:
            StoreKeyError: If the key is missing, is another, or the bytes were changed.
        """
        if key_id is None:
            return stored
        from cryptography.exceptions import InvalidTag

        nonce, sealed = stored[:_NONCE_BYTES], stored[_NONCE_BYTES:]
        try:
            return self._cipher(key_id).decrypt(nonce, sealed, self._about(place))
        except (InvalidTag, ValueError) as error:
            raise StoreKeyError(
                f"{place} cannot be decrypted with the key {key_id!r}: it is not the key it was "
                "encrypted with, or the stored bytes are damaged"
            ) from error

    def _about(self, place: str) -> bytes:
        return json.dumps([self._tenant, place]).encode()

    def _cipher(self, key_id: str) -> Any:
        try:
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        except ModuleNotFoundError as error:
            raise StoreKeyError(
                "encryption needs the package cryptography: pip install 'controlprefix[encryption]'"
            ) from error
        if self._keys is None:
            raise StoreKeyError(
                f"the prefixes of tenant {self._tenant!r} are encrypted with the key {key_id!r}; "
                "open the store with keys="
            )
        try:
            return AESGCM(self._keys.key(self._tenant, key_id))
        except LookupError as error:
            raise StoreKeyError(
                f"there is no key {key_id!r} for tenant {self._tenant!r}; give it back, or forget "
                "what it encrypted"
            ) from error
        except (ValueError, TypeError) as error:
            raise StoreKeyError(
                f"the key {key_id!r} of tenant {self._tenant!r} is not 16, 24 or 32 bytes"
            ) from error
