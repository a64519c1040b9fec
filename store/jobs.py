"""Jobs: training that a server accepted, and workers do.

A queue, which every worker sees, has the ids of jobs, their tenants' names and the model that they
are for. What a job is about (the user, their texts) is in a row of the tenant's own, encrypted as
everything else, and removed when it is done or when the user is forgotten.
"""

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal

from sqlalchemy import case, delete, func, select, update
from sqlalchemy.orm import Session, aliased

from controlprefix.errors import OverloadedError, UnknownNameError
from controlprefix.store import user_texts
from controlprefix.store.database import Database
from controlprefix.store.encryption import TenantCipher
from controlprefix.store.records import user_name
from controlprefix.store.tables import JobRow, QueueRow

JobKind = Literal["train_user", "learn_feedback"]
JobStatus = Literal["queued", "running", "succeeded", "failed", "cancelled"]

MAX_ATTEMPTS: Final = 3
_LEASE = timedelta(seconds=60)  # after which a silent worker's job is another's
_RETRY_PAUSE = timedelta(seconds=10)  # doubled with each attempt
_MAX_WAITING = 1000  # of a tenant
_MAX_FINISHED = 1000  # of a tenant, that are kept to be looked up


@dataclass(frozen=True, slots=True)
class Job:
    """A job of a tenant.

    Attributes:
        id: Its id.
        kind: What is done.
        user: Whose prefix it makes.
        status: `queued`, `running`, or how it ended.
        created_at, started_at, finished_at: When that was; None if it was not yet.
        num_attempts: How often a worker has begun it.
        num_steps: Training steps of the latest attempt.
        version: The version that it made.
        error: Why it failed.
    """

    id: str
    kind: JobKind
    user: str
    status: JobStatus
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    num_attempts: int
    num_steps: int
    version: int | None
    error: str

    @property
    def is_finished(self) -> bool:
        """Whether nothing will change any more."""
        return self.status in ("succeeded", "failed", "cancelled")


@dataclass(frozen=True, slots=True)
class Claim:
    """A job that a worker has taken.

    Attributes:
        tenant, job_id: Whose job it is, and its id.
        num_attempts: Which attempt this is, from 1.
    """

    tenant: str
    job_id: str
    num_attempts: int


class JobMethods:
    """The methods of `PrefixStore` for jobs."""

    _database: Database
    _cipher: TenantCipher
    tenant: str

    def add_job(
        self,
        kind: JobKind,
        user: str,
        options: Mapping[str, Any],
        fingerprint: str,
        texts: Sequence[str] = (),
    ) -> Job:
        """Queue a job for a worker with the model of this fingerprint.

        Args:
            kind: What to do.
            user: Whose prefix to make.
            options: What it needs, as JSON can hold it.
            fingerprint: Fingerprint of the model.
            texts: Texts of the user to keep in the store, in the same transaction.

        Raises:
            UnknownNameError: If the user's name is not valid.
            OverloadedError: If the tenant has too many jobs that wait.
        """
        user = user_name(user)
        job_id = uuid.uuid4().hex
        content = json.dumps(dict(options)).encode()

        def add(session: Session, tenant: int) -> Job:
            waiting = select(func.count()).where(JobRow.tenant_id == tenant)
            num_waiting = session.scalar(waiting.where(JobRow.finished_at.is_(None))) or 0
            if num_waiting >= _MAX_WAITING:
                raise OverloadedError(f"{num_waiting} jobs of this tenant wait; try again later")
            payload, key_id = self._cipher.encrypt(content, _identity(job_id))
            now = _now(session)
            row = JobRow(
                id=job_id, tenant_id=tenant, kind=kind, user_name=user, status="queued",
                created_at=now, num_attempts=0, num_steps=0, payload=payload, key_id=key_id,
                error="",
            )  # fmt: skip
            session.add(row)
            session.add(
                QueueRow(
                    id=job_id, tenant_name=self.tenant, fingerprint=fingerprint,
                    created_at=now, due_at=now, num_attempts=0,
                )
            )  # fmt: skip
            if texts:
                user_texts.add(session, tenant, self._cipher, user, texts)
            session.flush()
            _trim(session, tenant)
            return _job(row)

        return self._database.run(add, write=True)

    def job(self, job_id: str) -> Job:
        """A job of the tenant.

        Raises:
            UnknownNameError: If there is none with that id.
        """

        def read(session: Session, tenant: int) -> Job:
            return _job(_required_row(session, tenant, job_id))

        return self._database.run(read)

    def jobs(self, *, user: str | None = None, limit: int = 100) -> list[Job]:
        """The tenant's jobs, the newest first.

        Args:
            user: Those of one user alone.
            limit: How many at most.
        """

        def read(session: Session, tenant: int) -> list[Job]:
            query = select(JobRow).where(JobRow.tenant_id == tenant)
            if user is not None:
                query = query.where(JobRow.user_name == user_name(user))
            query = query.order_by(JobRow.created_at.desc(), JobRow.id).limit(limit)
            return [_job(row) for row in session.scalars(query)]

        return self._database.run(read)

    def cancel_job(self, job_id: str) -> Job:
        """Cancel a job; one that runs ends after its current step. A finished one stays as it is.

        Raises:
            UnknownNameError: If there is none with that id.
        """

        def cancel(session: Session, tenant: int) -> Job:
            row = _required_row(session, tenant, job_id)
            if row.finished_at is None:
                _finish(session, row, "cancelled")
            return _job(row)

        return self._database.run(cancel, write=True)

    # --- for workers -------------------------------------------------------------------------

    def num_jobs_of_other_models(self, fingerprint: str) -> int:
        """How many jobs of all tenants wait for a worker with another model."""

        def count(session: Session, _: int) -> int:
            others = select(func.count()).where(QueueRow.fingerprint != fingerprint)
            return session.scalar(others) or 0

        return self._database.run(count)

    def num_queued_jobs(self, fingerprint: str) -> int:
        """How many jobs of all tenants, for a model, are waiting or running."""

        def count(session: Session, _: int) -> int:
            own = select(func.count()).where(QueueRow.fingerprint == fingerprint)
            return session.scalar(own) or 0

        return self._database.run(count)

    def claim_job(self, fingerprint: str, *, served: Sequence[str] = ()) -> Claim | None:
        """Take a job of any tenant that is due, of the tenant with the fewest that run; or None.

        It must be renewed with `renew_job`, or another worker takes it after a minute.

        Args:
            fingerprint: Fingerprint of the model.
            served: Tenants whose jobs this worker did, the last one last: others come first.
        """
        turns = {tenant: turn for turn, tenant in enumerate(served)}

        def is_due(session: Session, _: int) -> bool:
            query = select(QueueRow.id).where(QueueRow.fingerprint == fingerprint)
            due = query.where(QueueRow.due_at <= _now(session)).limit(1)
            return session.scalar(due) is not None

        def claim(session: Session, _: int) -> Claim | None:
            own, other, now = QueueRow, aliased(QueueRow), _now(session)
            own_turn = [case(turns, value=own.tenant_name, else_=-1)] if turns else []
            num_running = (
                select(func.count())
                .where(other.tenant_name == own.tenant_name, other.is_running.is_(True))
                .where(other.due_at > now)
                .scalar_subquery()
            )
            query = (
                select(own)
                .where(own.fingerprint == fingerprint, own.due_at <= now)
                .order_by(num_running, *own_turn, own.created_at)
                .limit(1)
                .with_for_update(skip_locked=True)
            )
            row = session.scalar(query)
            if row is None:
                return None
            row.num_attempts += 1
            row.due_at, row.is_running = now + _LEASE, True
            return Claim(row.tenant_name, row.id, row.num_attempts)

        if not self._database.run(is_due):  # most often there is nothing to do
            return None
        return self._database.run(claim, write=True)

    def start_job(self, claim: Claim) -> tuple[Job, dict[str, Any]] | None:
        """A claimed job and its options, marked as running; None if it should not be done.

        Raises:
            StoreKeyError: If its options cannot be decrypted.
        """

        def start(session: Session, tenant: int) -> tuple[Job, dict[str, Any]] | None:
            row = _row(session, tenant, claim.job_id)
            if row is None or row.finished_at is not None:  # forgotten, or cancelled
                session.execute(delete(QueueRow).where(QueueRow.id == claim.job_id))
                return None
            if claim.num_attempts > MAX_ATTEMPTS:
                _finish(session, row, "failed", error=f"its worker stopped {MAX_ATTEMPTS} times")
                return None
            content = self._cipher.decrypt(row.payload or b"", row.key_id, _identity(row.id))
            row.status, row.started_at, row.num_steps = "running", _now(session), 0
            row.num_attempts = claim.num_attempts
            return _job(row), json.loads(content)

        return self._database.run(start, write=True)

    def renew_job(self, claim: Claim, num_steps: int) -> bool:
        """Keep a claimed job; returns False if it was cancelled, forgotten or taken by another."""

        def renew(session: Session, tenant: int) -> bool:
            row = _row(session, tenant, claim.job_id)
            queued = session.get(QueueRow, claim.job_id)
            if row is None or row.finished_at is not None or queued is None:
                return False
            if queued.num_attempts != claim.num_attempts:
                return False
            row.num_steps, queued.due_at = num_steps, _now(session) + _LEASE
            return True

        return self._database.run(renew, write=True)

    def finish_job(
        self,
        claim: Claim,
        *,
        num_steps: int = 0,
        version: int | None = None,
        error: str = "",
        again: bool = False,
    ) -> bool:
        """Record how a claimed job ended, and remove its options.

        Args:
            claim: The job.
            num_steps: Training steps that were done.
            version: The version that it made.
            error: Why it failed.
            again: It may succeed at another time: queue it again, unless it had its attempts.

        Returns:
            Whether the job still exists; not if its user was forgotten meanwhile.
        """

        def finish(session: Session, tenant: int) -> bool:
            row = _row(session, tenant, claim.job_id)
            if row is None:
                session.execute(delete(QueueRow).where(QueueRow.id == claim.job_id))
                return False
            if row.finished_at is not None:  # cancelled while it was stored, or done by another
                row.version = row.version if version is None else version
                return True
            queued = session.get(QueueRow, claim.job_id)
            if queued is not None and queued.num_attempts != claim.num_attempts:
                return True  # another worker has it, since this one was silent for too long
            row.num_steps = num_steps
            if error and again and claim.num_attempts < MAX_ATTEMPTS:
                pause = _RETRY_PAUSE * 2 ** (claim.num_attempts - 1)
                changes = {"due_at": _now(session) + pause, "is_running": False}
                session.execute(update(QueueRow).where(QueueRow.id == claim.job_id).values(changes))
                row.status, row.error = "queued", error
                return True
            _finish(session, row, "failed" if error else "succeeded", version=version, error=error)
            return True

        return self._database.run(finish, write=True)

    def release_job(self, claim: Claim) -> None:
        """Give a claimed job back, as a worker does that is asked to end; it counts no attempt."""

        def release(session: Session, tenant: int) -> None:
            row, queued = _row(session, tenant, claim.job_id), session.get(QueueRow, claim.job_id)
            if row is None or queued is None or queued.num_attempts != claim.num_attempts:
                return
            row.status = "queued"
            queued.due_at, queued.is_running = _now(session), False
            queued.num_attempts = row.num_attempts = claim.num_attempts - 1

        self._database.run(release, write=True)


def forget(session: Session, tenant: int, user: str) -> bool:
    """Remove all jobs of a user; returns whether there were any."""
    query = select(JobRow.id).where(JobRow.tenant_id == tenant, JobRow.user_name == user)
    ids = list(session.scalars(query))
    _remove(session, ids)
    return bool(ids)


def rotate(session: Session, tenant: int, cipher: TenantCipher) -> None:
    """Encrypt the options of all jobs that are not encrypted with the current key."""
    is_outdated = JobRow.key_id.is_distinct_from(cipher.current_key_id)
    query = select(JobRow).where(JobRow.tenant_id == tenant, JobRow.payload.is_not(None))
    for row in session.scalars(query.where(is_outdated).with_for_update()):
        plain = cipher.decrypt(row.payload or b"", row.key_id, _identity(row.id))
        row.payload, row.key_id = cipher.encrypt(plain, _identity(row.id))


def _finish(
    session: Session,
    row: JobRow,
    status: JobStatus,
    *,
    version: int | None = None,
    error: str = "",
) -> None:
    row.status, row.finished_at = status, _now(session)
    row.version, row.error = version, error
    row.payload = row.key_id = None
    session.execute(delete(QueueRow).where(QueueRow.id == row.id))


def _trim(session: Session, tenant: int) -> None:
    """Remove the oldest finished jobs."""
    is_finished = JobRow.finished_at.is_not(None)
    query = select(JobRow.id).where(JobRow.tenant_id == tenant, is_finished)
    newest_first = query.order_by(JobRow.finished_at.desc())
    _remove(session, list(session.scalars(newest_first.offset(_MAX_FINISHED))))


def _remove(session: Session, ids: Sequence[str]) -> None:
    for table in (JobRow, QueueRow):
        session.execute(delete(table).where(table.id.in_(ids)))


def _row(session: Session, tenant: int, job_id: str) -> JobRow | None:
    if not job_id.isprintable():  # PostgreSQL takes no NUL
        return None
    query = select(JobRow).where(JobRow.tenant_id == tenant, JobRow.id == job_id)
    return session.scalar(query.with_for_update())


def _required_row(session: Session, tenant: int, job_id: str) -> JobRow:
    row = _row(session, tenant, job_id)
    if row is None:
        raise UnknownNameError(f"there is no job {job_id[:64]!r}; it may have been removed since")
    return row


def _job(row: JobRow) -> Job:
    return Job(
        id=row.id,
        kind=row.kind,  # type: ignore[arg-type]
        user=row.user_name,
        status=row.status,  # type: ignore[arg-type]
        created_at=row.created_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
        num_attempts=row.num_attempts,
        num_steps=row.num_steps,
        version=row.version,
        error=row.error,
    )


def _identity(job_id: str) -> str:
    return f"job {job_id}"


def _now(session: Session) -> datetime:
    """The database's time: clocks of workers on several machines differ."""
    if session.get_bind().dialect.name == "postgresql":
        now: datetime = session.scalars(select(func.clock_timestamp())).one()
        return now
    return datetime.now(UTC)  # SQLite is on this machine
