"""Forgetting names and pruning old versions, with an audit log."""

import logging
from datetime import UTC, datetime

from sqlalchemy import and_, delete, func, select
from sqlalchemy.orm import Session

from controlprefix.errors import RequestError
from controlprefix.prefixes import PrefixKey
from controlprefix.store import jobs, profiles, user_texts, version_links
from controlprefix.store.database import Database
from controlprefix.store.records import AuditEntry, check_key, user_name
from controlprefix.store.tables import AliasRow, AuditRow, PayloadRow, PrefixRow, VersionRow
from controlprefix.store.versions import key_of, select_prefixes, unknown_name, version_numbers

_log = logging.getLogger(__name__)


def forget(session: Session, tenant: int, key: PrefixKey) -> int | None:
    """Remove a name for all models, and all else of a user; returns the versions removed.

    None if there is nothing of that name. For a user, that too is recorded: what is being
    learned from their texts at this moment is then not stored.

    Raises:
        StoreError: If it is a decoder that stored codes need.
    """
    rows = list(session.scalars(select_prefixes(tenant, None, [key]).with_for_update()))
    exists = bool(rows)
    if key.kind == "user":
        had_profile = profiles.forget(session, tenant, key.name)
        had_texts = user_texts.forget(session, tenant, key.name)
        had_jobs = jobs.forget(session, tenant, key.name)
        num_marked = version_links.mark_forgotten(session, tenant, key.name)
        exists = exists or had_profile or had_texts or had_jobs or num_marked > 0
    if not exists:
        if key.kind == "user":
            _add_to_audit_log(session, tenant, "forget", key, 0)
        return None
    num_removed = sum(len(version_numbers(session, row)) for row in rows)
    ids = [row.id for row in rows]
    version_links.require_unused(session, ids, str(key))
    for table in (*version_links.LINK_TABLES, AliasRow, PayloadRow, VersionRow):
        session.execute(delete(table).where(table.prefix_id.in_(ids)))
    session.execute(delete(PrefixRow).where(PrefixRow.id.in_(ids)))
    _add_to_audit_log(session, tenant, "forget", key, num_removed)
    return num_removed


def remove_version(
    session: Session, tenant: int, key: PrefixKey, fingerprint: str, version: int
) -> None:
    """Remove one version: see `PrefixStore.remove_version`."""
    query = select_prefixes(tenant, fingerprint, [key]).with_for_update()
    row = session.scalars(query).one_or_none()
    numbers = [] if row is None else version_numbers(session, row)
    if row is None or version not in numbers:
        return
    others = [number for number in numbers if number != version]
    for table in (*version_links.LINK_TABLES, AliasRow, PayloadRow, VersionRow):
        is_own = and_(table.prefix_id == row.id, table.version == version)
        session.execute(delete(table).where(is_own))
    if not others:
        session.execute(delete(PrefixRow).where(PrefixRow.id == row.id))
    elif row.current_version == version:
        row.current_version = max(others)
    _add_to_audit_log(session, tenant, "remove", key, 1)


def prune(session: Session, tenant: int, keep: int) -> int:
    """Remove old versions of every name except those in use; returns how many."""
    num_removed = 0
    many = select(VersionRow.prefix_id).where(VersionRow.tenant_id == tenant)
    many = many.group_by(VersionRow.prefix_id).having(func.count() > keep)
    query = (
        select_prefixes(tenant, None)
        .where(PrefixRow.id.in_(many))
        .order_by(PrefixRow.kind, PrefixRow.name)
    )  # as `put` locks them
    for row in session.scalars(query.with_for_update()):
        numbers = version_numbers(session, row)
        aliased = select(AliasRow.version).where(AliasRow.prefix_id == row.id)
        versions_to_keep = {*numbers[-keep:], row.current_version, *session.scalars(aliased)}
        if row.kind == "decoder":
            versions_to_keep |= version_links.versions_in_use(session, row.id)
        old = [number for number in numbers if number not in versions_to_keep]
        if not old:
            continue
        for table in (*version_links.LINK_TABLES, PayloadRow, VersionRow):
            is_old = and_(table.prefix_id == row.id, table.version.in_(old))
            session.execute(delete(table).where(is_old))
        _add_to_audit_log(session, tenant, "prune", key_of(row), len(old))
        num_removed += len(old)
    return num_removed


def _add_to_audit_log(
    session: Session, tenant: int, action: str, key: PrefixKey, num_versions: int
) -> None:
    entry = {"kind": key.kind, "name": key.name, "action": action, "num_versions": num_versions}
    session.add(AuditRow(tenant_id=tenant, at=datetime.now(UTC), **entry))


class RemovalMethods:
    """The methods of `PrefixStore` that remove, and that tell what was removed."""

    _database: Database
    tenant: str

    def forget(self, key: PrefixKey) -> int:
        """Remove all of a name, for all models: versions, aliases, a user's texts and profile.

        The removal is recorded in the audit log, for a user also if nothing is stored: a run
        under way that reads their texts does not store them. Versions trained on the user are
        marked.

        Returns:
            How many versions were removed.

        Raises:
            UnknownNameError: If there is no such name.
            StoreError: If it is a decoder that stored codes need.
        """
        check_key(key)

        def work(session: Session, tenant: int) -> int | None:
            self._database.lock_users(session, tenant, shared=False)
            return forget(session, tenant, key)

        num_removed = self._database.run(work, write=True)
        if num_removed is None:
            raise self._database.run(
                lambda session, tenant: unknown_name(session, tenant, key, None)
            )
        _log.info("tenant %s: forgot %s, %d versions", self.tenant, key, num_removed)
        return num_removed

    def remove_version(self, key: PrefixKey, fingerprint: str, version: int) -> None:
        """Remove one version of a name; the newest other one becomes current.

        Where there is no other version, the name is removed; where there is no such version,
        nothing is.
        """
        self._database.run(
            lambda session, tenant: remove_version(session, tenant, key, fingerprint, version),
            write=True,
        )

    def prune(self, *, keep: int) -> int:
        """Remove old versions of every name, except the newest `keep` and those in use.

        In use are the current version, those with an alias, and decoders of stored codes.

        Returns:
            How many versions were removed.

        Raises:
            RequestError: If `keep` is below 1.
        """
        if keep < 1:
            raise RequestError(f"keep is {keep}; it must be 1 or more")
        return self._database.run(lambda session, tenant: prune(session, tenant, keep), write=True)

    def audit_log(self, *, after: int = 0, action: str | None = None) -> list[AuditEntry]:
        """What was removed on request, oldest first.

        Args:
            after: Only entries with a larger number.
            action: Only entries of this action, such as `forget`.
        """

        def read(session: Session, tenant: int) -> list[AuditEntry]:
            number = min(max(0, after), (1 << 63) - 1)
            query = select(AuditRow).where(AuditRow.tenant_id == tenant, AuditRow.id > number)
            if action is not None:
                query = query.where(AuditRow.action == action)
            query = query.order_by(AuditRow.id)
            return [
                AuditEntry(row.id, row.at, row.action, key_of(row), row.num_versions)
                for row in session.scalars(query)
            ]

        return self._database.run(read)

    def last_removal_number(self, *, forgotten: str | None = None) -> int:
        """Number of the last entry in the audit log; 0 if there is none.

        Args:
            forgotten: A user: the entry that tells when they were last forgotten.
        """

        def read(session: Session, tenant: int) -> int:
            # Numbers are given before they are committed: none may be on its way.
            self._database.lock_users(session, tenant, shared=True)
            query = select(func.max(AuditRow.id)).where(AuditRow.tenant_id == tenant)
            if forgotten is not None:
                query = query.where(
                    AuditRow.action == "forget",
                    AuditRow.kind == "user",
                    AuditRow.name == user_name(forgotten),
                )
            return session.scalar(query) or 0

        return self._database.run(read)
