"""The schema: made whole, brought up to date from every earlier revision, never misread."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from typer.testing import CliRunner

from controlprefix import Geometry, Prefix, StoreError
from controlprefix.cli import app
from controlprefix.prefixes import content_hash
from controlprefix.store import NewVersion, PrefixKey, PrefixStore, revisions
from controlprefix.store.tables import Base

from helpers import payload_of

GEOMETRY = Geometry.uniform(num_layers=2, num_kv_heads=2, head_dim=4, fingerprint="f" * 64)
ANA = PrefixKey("user", "ana")


def at_revision(url: str, revision: str) -> None:
    """A database as that revision's library left it, with two versions of a user in it."""
    prefix = Prefix.random(GEOMETRY, num_slots=3, seed=1).to_bytes()
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        revisions.upgrade(connection, "0001")
        connection.execute(sa.text(f"DROP TABLE {revisions.REVISION_TABLE}"))  # not yet in 0001
        values: dict[str, Any] = {"tenant": "mine", "fingerprint": "f" * 64, "hash": "x"}
        connection.execute(
            sa.text(
                "INSERT INTO prefixes (id, tenant, kind, name, fingerprint, model_name,"
                " current_version, newest_version)"
                " VALUES (7, :tenant, 'user', 'ana', :fingerprint, 'm', 1, 2)"
            ),
            values,
        )
        for version in (1, 2):
            connection.execute(
                sa.text(
                    "INSERT INTO prefix_versions (prefix_id, version, payload, content_hash,"
                    " size_bytes, num_slots, dtype, created_at, details) VALUES (7, :version,"
                    " :payload, :hash, :size, 3, 'float32', :at, :details)"
                ).bindparams(sa.bindparam("at", type_=sa.DateTime(timezone=True))),
                {
                    "version": version,
                    "payload": prefix,
                    "hash": content_hash(prefix),
                    "size": len(prefix),
                    "at": datetime(2026, 1, 2, tzinfo=UTC),
                    "details": json.dumps({"seed": version}),
                },
            )
        if revision != "0001":
            revisions.upgrade(connection, revision)
    engine.dispose()


@pytest.mark.slow
@pytest.mark.parametrize("revision", revisions.REVISIONS[:-1])
def test_a_store_of_an_earlier_revision_is_upgraded_on_request(url: str, revision: str) -> None:
    at_revision(url, revision)
    with pytest.raises(StoreError, match=f"has schema {revision}; .* run: controlprefix store up"):
        PrefixStore(url)
    outcome = CliRunner().invoke(app, ["store", "upgrade", "--store", url])
    assert outcome.exit_code == 0, outcome.output
    assert f"from schema {revision} to {revisions.HEAD}" in outcome.output
    with PrefixStore(url, tenant="mine") as store:
        result = store.for_model("f" * 64).get(ANA)
        assert result.version == 1
        expected = Prefix.random(GEOMETRY, num_slots=3, seed=1)
        assert payload_of(result) == expected.to_bytes()
        assert [v.details["seed"] for v in store.for_model("f" * 64).versions(ANA)] == [1, 2]
        assert store.put([NewVersion(ANA, expected)]) == [3]
        assert store.put([NewVersion(PrefixKey("user", "bo"), expected)]) == [1]
    with PrefixStore(url, tenant="theirs") as store:
        assert store.prefixes() == []
    again = CliRunner().invoke(app, ["store", "upgrade", "--store", url])
    assert f"at schema {revisions.HEAD} already" in again.output


def test_upgraded_tables_are_those_of_a_new_store(url: str) -> None:
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        revisions.upgrade(connection)
    with engine.connect() as connection:
        context = MigrationContext.configure(
            connection,
            opts={
                "compare_type": True,
                "include_name": lambda name, kind, _: name != revisions.REVISION_TABLE,
            },
        )
        assert compare_metadata(context, Base.metadata) == []
        if engine.dialect.name == "postgresql":
            policies = "SELECT tablename, qual, with_check FROM pg_policies ORDER BY tablename"
            upgraded = list(connection.execute(sa.text(policies)))
    with engine.begin() as connection:
        Base.metadata.drop_all(connection)
        connection.execute(sa.text(f"DROP TABLE {revisions.REVISION_TABLE}"))
    PrefixStore(url).close()
    if engine.dialect.name == "postgresql":
        with engine.connect() as connection:
            assert list(connection.execute(sa.text(policies))) == upgraded
        tables = Base.metadata.tables.keys() - {"controlprefix_queue"}  # which all workers see
        assert {row.tablename for row in upgraded} == tables
    engine.dispose()


def test_a_failing_upgrade_changes_nothing(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    at_revision(url, "0001")
    engine = sa.create_engine(url)
    with engine.begin() as connection:  # what the upgrade needs to be absent
        connection.execute(sa.text("CREATE TABLE controlprefix_audit (x INTEGER)"))
    tables = set(sa.inspect(engine).get_table_names())
    engine.dispose()
    outcome = CliRunner().invoke(app, ["store", "upgrade", "--store", url])
    assert isinstance(outcome.exception, StoreError)
    assert "nothing was changed" in str(outcome.exception)
    assert set(sa.inspect(engine).get_table_names()) == tables
    engine.dispose()


def test_a_later_schema_is_refused(url: str) -> None:
    PrefixStore(url).close()
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.execute(sa.text(f"UPDATE {revisions.REVISION_TABLE} SET version_num = '9999'"))
    engine.dispose()
    with pytest.raises(StoreError, match="has schema 9999; this version reads up to .* so upgrade"):
        PrefixStore(url)


def test_every_revision_file_is_listed() -> None:
    folder = Path(revisions.__file__).parent / "migrations" / "versions"
    assert tuple(sorted(p.name[1:5] for p in folder.glob("r*.py"))) == revisions.REVISIONS
