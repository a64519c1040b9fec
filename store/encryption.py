"""Encryption at rest, with keys that the caller provides.

AES-GCM through `cryptography`, with a fresh nonce per encryption. The identity of the bytes
(tenant, name, model, version) is authenticated as associated data, so bytes that are moved to
another row do not decrypt. Names, sizes and training details stay readable; so do exports.
"""

import base64
import json
import logging
import os
from pathlib import Path
from typing import Any, Protocol

from controlprefix._io import requires_extra
from controlprefix.errors import StoreKeyError, short_reason

_NONCE_BYTES = 12
_log = logging.getLogger(__name__)


class EncryptionKeys(Protocol):
    """Provides AES keys of 16, 24 or 32 bytes, by tenant and key id."""

    def current_key_id(self, tenant: str) -> str | None:
        """The id of the key to encrypt with; None: the tenant's bytes are not encrypted."""

    def key(self, tenant: str, key_id: str) -> bytes:
        """A key by its id.

        Raises:
            LookupError: If there is none.
        """


class JsonEncryptionKeys:
    """Keys from a file: `{"tenant": {"current": "k2", "keys": {"k1": "<base64>", "k2": …}}}`.

    The file is read at each use, so keys can be added or removed while a store is open.

    Args:
        path: The file.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)

    def current_key_id(self, tenant: str) -> str | None:
        """The tenant's `current` key id, if the tenant is in the file."""
        keys = self._read().get(tenant)
        return str(keys["current"]) if keys else None

    def key(self, tenant: str, key_id: str) -> bytes:
        """One of the tenant's `keys`."""
        return base64.b64decode(self._read()[tenant]["keys"][key_id])

    def _read(self) -> dict[str, Any]:
        try:
            tenants = json.loads(self._path.read_text())
            if not isinstance(tenants, dict):
                raise ValueError("not an object")
            for tenant in tenants.values():
                if tenant["current"] not in tenant["keys"]:
                    raise ValueError("the current key of a tenant is not among its keys")
            return tenants
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise StoreKeyError(
                f"cannot read the encryption keys in {str(self._path)!r}: {short_reason(error)}; "
                'it must be JSON of the form {"tenant": {"current": "k1", "keys": {"k1": '
                '"<base64>"}}}'
            ) from error


class KeyFile:
    """One key for all, from a file with its base64 text.

    Args:
        path: The file.

    Raises:
        StoreKeyError: If it cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            self._key = base64.b64decode(Path(path).read_text().strip(), validate=True)
            if len(self._key) not in (16, 24, 32):
                raise ValueError(f"{len(self._key)} bytes")
        except (OSError, ValueError) as error:
            raise StoreKeyError(
                f"cannot read the key in {str(path)!r}: {type(error).__name__}; it must be 16, 24 "
                "or 32 bytes in base64, such as: openssl rand -base64 32"
            ) from error

    def current_key_id(self, tenant: str) -> str:
        """Its id; there is one key."""
        return "file"

    def key(self, tenant: str, key_id: str) -> bytes:
        """The key."""
        return self._key


class TenantCipher:
    """Encrypts and decrypts one tenant's bytes.

    Args:
        tenant: The tenant.
        keys: Provider of keys; None writes plain bytes and cannot read encrypted ones.
    """

    def __init__(self, tenant: str, keys: EncryptionKeys | None) -> None:
        self._tenant = tenant
        self._keys = keys
        self._has_warned = False

    @property
    def current_key_id(self) -> str | None:
        """The id of the key to encrypt with."""
        return self._keys.current_key_id(self._tenant) if self._keys else None

    def encrypt(self, plain: bytes, identity: str) -> tuple[bytes, str | None]:
        """Encrypt bytes with the current key.

        Args:
            plain: The bytes.
            identity: What they belong to; authenticated with them.

        Returns:
            The bytes to store, and the id of their key (None: not encrypted).

        Raises:
            StoreKeyError: If there is no such key, or it is not valid.
        """
        key_id = self.current_key_id
        if key_id is None:
            if self._keys is not None and not self._has_warned:
                self._has_warned = True
                _log.warning("no encryption key for tenant %r: stored in plain", self._tenant)
            return plain, None
        nonce = os.urandom(_NONCE_BYTES)
        cipher = self._cipher(key_id)
        return nonce + cipher.encrypt(nonce, plain, self._associated_data(identity)), key_id

    def require_current_key(self) -> None:
        """Check that the tenant's current key, if there is one, can be used.

        Raises:
            StoreKeyError: If it cannot.
        """
        if (key_id := self.current_key_id) is not None:
            self._cipher(key_id)

    def decrypt(self, stored: bytes, key_id: str | None, identity: str) -> bytes:
        """Decrypt bytes that were encrypted for an identity.

        Raises:
            StoreKeyError: If the key is missing or wrong, or the bytes were changed.
        """
        if key_id is None:
            return stored
        with requires_extra("encryption", "an encrypted store"):
            from cryptography.exceptions import InvalidTag

        nonce, encrypted = stored[:_NONCE_BYTES], stored[_NONCE_BYTES:]
        try:
            cipher = self._cipher(key_id)
            return bytes(cipher.decrypt(nonce, encrypted, self._associated_data(identity)))
        except (InvalidTag, ValueError) as error:
            raise StoreKeyError(
                f"{identity} cannot be decrypted with the key {key_id!r}: it is not the key it was "
                "encrypted with, or the stored bytes are damaged"
            ) from error

    def _associated_data(self, identity: str) -> bytes:
        return json.dumps([self._tenant, identity]).encode()

    def _cipher(self, key_id: str) -> Any:
        with requires_extra("encryption", "an encrypted store"):
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        if self._keys is None:
            raise StoreKeyError(
                f"the prefixes of tenant {self._tenant!r} are encrypted with the key {key_id!r}; "
                "open the store with encryption_keys (--encryption-keys)"
            )
        try:
            return AESGCM(self._keys.key(self._tenant, key_id))
        except LookupError as error:
            raise StoreKeyError(
                f"there is no key {key_id!r} for tenant {self._tenant!r}; add it again, or forget "
                "what it encrypted"
            ) from error
        except (ValueError, TypeError) as error:
            raise StoreKeyError(
                f"the key {key_id!r} of tenant {self._tenant!r} is not 16, 24 or 32 bytes"
            ) from error
