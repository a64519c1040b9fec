"""Hearing from PostgreSQL that somebody changed the store, so that reading need not ask."""

import threading
import time
from collections.abc import Hashable
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

CHANNEL = "controlprefix_changes"
_HEARTBEAT_S = 0.5
SILENCE_S = 2.0  # how long a change may go unheard when a connection breaks without a word


class Listener:
    """Counts the changes that any process makes, in a thread with a connection of its own."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._num_changes = 0
        self._heard_at = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="controlprefix-listen", daemon=True)
        self._thread.start()

    def token(self) -> Hashable | None:
        """Equal only while no change was heard of; None while the connection is not alive."""
        alive = time.monotonic() - self._heard_at < SILENCE_S
        return self._num_changes if alive else None

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._listen()
            except (SQLAlchemyError, OSError, self._engine.dialect.loaded_dbapi.Error):
                self._heard_at = 0.0  # reading asks again, until there is a connection
                self._stop.wait(_HEARTBEAT_S)

    def _listen(self) -> None:
        pooled: Any = self._engine.raw_connection()
        connection = pooled.driver_connection
        pooled.detach()
        try:
            connection.autocommit = True
            connection.execute(f"LISTEN {CHANNEL}")
            self._num_changes += 1  # whatever was said before is not known
            while not self._stop.is_set():
                asked_at = time.monotonic()
                connection.execute("SELECT 1")
                self._heard_at = asked_at
                for _ in connection.notifies(timeout=_HEARTBEAT_S, stop_after=1):
                    self._num_changes += 1
        finally:
            pooled.close()
