"""JobWorker: takes jobs from a store, and does them with one frozen model."""

import contextlib
import logging
import threading
import time
from typing import Any

import torch

from controlprefix.attributes import AttributeSpace
from controlprefix.cancellation import stoppable
from controlprefix.engine import ControlPrefix
from controlprefix.errors import (
    ControlPrefixError,
    OverloadedError,
    StoreError,
    TrainingDataError,
    TrainingInterrupted,
)
from controlprefix.model import FrozenModel
from controlprefix.prefixes import PrefixKey
from controlprefix.store import Claim, Job, PrefixStore
from controlprefix.training import TrainingReport

_log = logging.getLogger(__name__)

_MAY_SUCCEED_LATER = (StoreError, OverloadedError, OSError, MemoryError, torch.OutOfMemoryError)
_MAX_SERVED = 100
_POLL_S = 2.0
_RENEW_S = 1.0  # also how late a cancellation may be noticed


class JobWorker:
    """Does the jobs of all tenants that are for one model, one after another.

    A job is taken for a minute at a time: one of a worker that is killed is taken by another, from
    its start, up to three times. So a version may be stored twice, but never half.

    Args:
        frozen: The model.
        store: A store of any tenant.
        attributes: Attribute space of all tenants.
    """

    def __init__(
        self, frozen: FrozenModel, store: PrefixStore, attributes: AttributeSpace | None = None
    ) -> None:
        self._frozen, self._store, self._attributes = frozen, store, attributes
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._served: dict[str, None] = {}  # tenants, in the order of their last jobs

    def start(self) -> None:
        """Work in a thread until `close`."""
        self._thread = threading.Thread(target=self.run, name="controlprefix-jobs", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Look for jobs now: one was added."""
        self._wake.set()

    def ask_to_stop(self) -> None:
        """End `run` after the current training step, and give the current job back."""
        self._closing.set()
        self._wake.set()

    def close(self) -> None:
        """Stop the thread: see `ask_to_stop`."""
        self.ask_to_stop()
        if self._thread is not None:
            self._thread.join()

    def run(self, *, until_empty: bool = False) -> int:
        """Do jobs until `close`.

        Args:
            until_empty: Return when none is left, also none that is to be tried again.

        Returns:
            How many were done, failed ones included.
        """
        num_done = 0
        while not self._closing.is_set():
            claim, is_empty = None, False
            try:
                claim = self._store.claim_job(self._frozen.fingerprint, served=tuple(self._served))
                if claim is not None:
                    self._served.pop(claim.tenant, None)
                    self._served[claim.tenant] = None  # now the last one
                    while len(self._served) > _MAX_SERVED:
                        del self._served[next(iter(self._served))]
                    num_done += self._do(claim)
                elif until_empty:
                    is_empty = not self._store.num_queued_jobs(self._frozen.fingerprint)
            except StoreError as error:  # such as a database that restarts
                _log.warning("jobs: %s", error)
            except Exception:  # other jobs go on
                _log.exception("jobs: looking for a job, or ending one, failed")
            if claim is None:
                if is_empty:
                    break
                self._wake.wait(_POLL_S)
                self._wake.clear()
        return num_done

    def _do(self, claim: Claim) -> bool:
        """Do a claimed job; returns whether it came to an end."""
        store = self._store.for_tenant(claim.tenant)
        try:
            started = store.start_job(claim)
        except Exception as error:  # its options cannot be decrypted
            _log.warning("job %s: %s", claim.job_id, error)
            reason = "its options cannot be read; see the worker's log"
            store.finish_job(claim, error=reason, again=True)
            return True
        if started is None:
            return False
        job, options = started
        key = PrefixKey("user", job.user)
        renewal = _Renewal(store, claim, self._closing)
        try:
            with stoppable(renewal.must_stop, renewal.after_step), renewal.in_background():
                version = _train(ControlPrefix(self._frozen, store, self._attributes), job, options)
                forgotten = store.last_removal_number(forgotten=job.user)
        except TrainingInterrupted:
            if self._closing.is_set():
                store.release_job(claim)
                return False
            return True  # it was cancelled, or its user was forgotten
        except Exception as error:
            reason = str(error)
            if isinstance(error, StoreError):  # its message may contain paths, which clients read
                _log.warning("job %s: %s", claim.job_id, error)
                reason = "the store could not be used; see the worker's log"
            elif not isinstance(error, ControlPrefixError):
                _log.exception("job %s failed", claim.job_id)
                reason = f"{type(error).__name__} while training; see the worker's log"
            renewal.finish(error=reason, again=isinstance(error, _MAY_SUCCEED_LATER))
            return True
        if not renewal.finish(version=version):  # the user was forgotten in the last moment
            with contextlib.suppress(ControlPrefixError):
                # Before this version was stored, or else it went with the others. What was
                # stored since stays.
                if store.last_removal_number(forgotten=job.user) == forgotten:
                    store.remove_version(key, self._frozen.fingerprint, version)
        return True


def _train(cp: ControlPrefix, job: Job, options: dict[str, Any]) -> int:
    """Do a job; returns the version that it made.

    Raises:
        TrainingDataError: If the options, texts or feedback cannot be trained on.
    """
    if job.kind == "train_user":
        texts = {job.user: options.pop("texts")}
        report = cp.train_users(texts, progress=False, **options)
        if reason := report.failed.get(job.user):
            raise TrainingDataError(reason)
        return _only_version(report.users[job.user])
    rows = cp.feedback(job.user)
    if not rows:
        raise TrainingDataError(f"no feedback of user {job.user!r} is kept")
    return _only_version(
        cp.train_preferences(rows, learn="user", too_long="skip", progress=False, **options)
    )


def _only_version(report: TrainingReport) -> int:
    (version,) = report.saved.values()
    return version


class _Renewal:
    """Keeps a claimed job from other workers, and tells whether it is still to be done."""

    def __init__(self, store: PrefixStore, claim: Claim, closing: threading.Event) -> None:
        self._store, self._claim, self._closing = store, claim, closing
        self._num_steps = 0
        self._is_ours = True
        self._done = threading.Event()

    def finish(self, *, version: int | None = None, error: str = "", again: bool = False) -> bool:
        """Record how the job ended: see `PrefixStore.finish_job`."""
        return self._store.finish_job(
            self._claim,
            num_steps=self._num_steps,
            version=version,
            error=error,
            again=again,
        )

    def after_step(self) -> bool:
        """Count a training step; whether to stop."""
        self._num_steps += 1
        return self.must_stop()

    def must_stop(self) -> bool:
        """Whether the worker ends, or the job is no longer to be done."""
        return self._closing.is_set() or not self._is_ours

    @contextlib.contextmanager
    def in_background(self) -> Any:
        """Renew the claim in a thread: a step, or loading an embedder, may take long."""
        thread = threading.Thread(target=self._run, name="controlprefix-renew", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._done.set()
            thread.join()

    def _run(self) -> None:
        last = time.monotonic()
        while not self._done.wait(max(0.0, last + _RENEW_S - time.monotonic())):
            last = time.monotonic()
            try:
                self._is_ours = self._store.renew_job(self._claim, self._num_steps)
            except Exception as error:  # tried again; others take the job after a minute
                _log.warning("job %s: %s", self._claim.job_id, error)
            if not self._is_ours:
                return
