"""Who reaches a store, and how: URLs, passwords, tenants, roles."""

from datetime import timedelta
from pathlib import Path

import pytest
import sqlalchemy
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ProgrammingError

from controlprefix import (
    StoreError,
    UnknownNameError,
)
from controlprefix.store import (
    NewVersion,
    PrefixKey,
    PrefixStore,
    Profile,
    StoreStats,
    upgrade,
)
from controlprefix.store.revisions import HEAD, REVISION_TABLE
from controlprefix.store.tables import Base
from controlprefix.store.urls import full_url, redacted

from databases import own_server
from helpers import coded, decoder, raw
from stores import ANA, BO, F, new


def test_a_tenant_cannot_name_see_or_remove_anothers_rows(url: str) -> None:
    own_store, other = PrefixStore(url, tenant="mine"), PrefixStore(url, tenant="theirs")
    own_store.put([new(seed=1)])
    assert other.for_model(F).names("user") == []
    assert other.prefixes() == []
    assert other.for_model(F).fetch([ANA]) == {}
    assert other.stats() == StoreStats({}, 0, 0)
    assert other.prune(keep=1) == 0
    assert list(other.verify()) == []
    for attempt in (
        lambda: other.for_model(F).get(ANA),
        lambda: other.for_model(F).versions(ANA),
        lambda: other.for_model(F).rollback(ANA, to=1),
        lambda: other.for_model(F).alias(ANA, "canary", to=1),
        lambda: other.forget(ANA),
    ):
        with pytest.raises(UnknownNameError, match="no user 'ana' in the store; enroll"):
            attempt()
    assert other.put([new(seed=2)]) == [1]
    other.forget(ANA)
    assert own_store.for_model(F).get(ANA).version == 1
    assert own_store.audit_log() == []
    own_store.close()
    other.close()


def test_postgresql_itself_shows_a_session_no_other_tenants_rows(url: str) -> None:
    """Even SQL that forgets to say whose rows it wants."""
    if url.startswith("sqlite"):
        pytest.skip("SQLite has no row security")
    with PrefixStore(url, tenant="mine") as own_store, PrefixStore(url, tenant="theirs") as other:
        for store in (own_store, other):
            store.put([new(seed=1)])
            store.for_model(F).alias(ANA, "canary", to=1)
            store.put([new(PrefixKey("user", "bo"))])
            store.forget(PrefixKey("user", "bo"))
            store.keep_texts("ana", ["a text"])
            store.keep_profile("ana", Profile("e", [1.0], num_texts=1))
            store.create_api_key("main")
            store.add_job("train_user", "ana", {"texts": ["a text"]}, F)
            by = decoder()
            store.put([NewVersion(PrefixKey("decoder", "users"), by, sources=["ana"])])
            store.put([NewVersion(PrefixKey("user", "cy"), coded(by))])
    several = {"prefixes": 3, "versions": 3, "payloads": 3}
    # The queue has no more than ids, tenants' names and fingerprints: all workers see it.
    queue = raw(url, "SELECT * FROM controlprefix_queue", "nobody")
    assert len(queue) == 2
    assert "ana" not in str(queue)
    for table in Base.metadata.tables.keys() - {"controlprefix_queue"}:
        for tenant, rows in (("mine", 1), ("theirs", 1), ("nobody", 0), ("", 0)):
            (result,) = raw(url, f"SELECT count(*) FROM {table}", tenant)
            rows *= several.get(table.removeprefix("controlprefix_"), 1)
            assert result[0] == rows, (table, tenant)
    assert raw(url, "UPDATE controlprefix_versions SET size_bytes = 0 RETURNING 1", "nobody") == []
    with pytest.raises(sqlalchemy.exc.ProgrammingError, match="row-level security"):
        raw(
            url,
            "INSERT INTO controlprefix_audit (tenant_id, at, action, kind, name, num_versions)"
            " VALUES (1, now(), 'x', 'user', 'x', 0), (2, now(), 'x', 'user', 'x', 0)",
            "mine",
        )
    # A row with its own tenant, but for a prefix that belongs to the other one.
    query = "SELECT prefix_id, tenant_id FROM controlprefix_aliases"
    ((their_prefix, _),) = raw(url, query, "theirs")
    ((_, own_tenant),) = raw(url, query, "mine")
    statement = "INSERT INTO controlprefix_aliases (prefix_id, alias, version, tenant_id)"
    with pytest.raises(sqlalchemy.exc.ProgrammingError, match="row-level security"):
        raw(url, f"{statement} VALUES ({their_prefix}, 'x', 1, {own_tenant})", "mine")


def test_stores_that_cannot_be_opened_say_why(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="unable to open database file"):
        PrefixStore(f"sqlite:///{tmp_path}/missing/prefixes.db")
    (tmp_path / "text.db").write_text("this is no database, " * 100)
    with pytest.raises(StoreError, match="file is not a database"):
        PrefixStore(f"sqlite:///{tmp_path}/text.db")
    with pytest.raises(StoreError, match="give a path, or an SQLAlchemy URL"):
        PrefixStore("nosuch://x")


@pytest.mark.slow
def test_a_store_is_a_path_or_a_url_in_any_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with PrefixStore(f"{tmp_path}/prefixes.db") as store:
        store.put([new(seed=1)])
        assert store.display_name == f"{tmp_path}/prefixes.db"
    with PrefixStore(f"sqlite:///{tmp_path}/prefixes.db") as same:
        assert same.for_model(F).get(ANA).version == 1
    monkeypatch.chdir(tmp_path)
    with PrefixStore("prefixes.db") as relative:
        assert relative.display_name == f"{tmp_path}/prefixes.db"
        assert relative.for_model(F).get(ANA).version == 1
    for url in ("postgres://me:secret@host:1/db", "postgresql://me:secret@host:1/db"):
        assert full_url(url) == "postgresql+psycopg://me:secret@host:1/db"
    with pytest.raises(StoreError, match="check that the server runs") as caught:
        PrefixStore("postgres://me:secret@127.0.0.1:1/db")
    assert "secret" not in str(caught.value)


def test_reading_creates_nothing(tmp_path: Path) -> None:
    path = tmp_path / "prefixes.db"
    with PrefixStore(str(path), create=False) as store:
        assert store.prefixes() == []
        assert store.display_name == f"{path} (no such file)"
        with pytest.raises(UnknownNameError) as caught:
            store.for_model(F).get(ANA)
    assert f"the store is {path} (no such file)" in caught.value.__notes__
    assert str(path) not in str(caught.value)  # which a server sends to its clients
    with PrefixStore(str(path), create=False) as store:
        with pytest.raises(StoreError, match="no store to write to"):
            store.put([new(ANA)])
    assert not path.exists()
    PrefixStore(str(path)).close()
    with PrefixStore(str(path), create=False) as store:
        assert store.display_name == str(path)


@pytest.mark.slow
def test_a_service_role_reads_and_writes_rows_and_nothing_else(tmp_path: Path) -> None:
    with own_server(tmp_path / "data") as (server, owner):
        role = 'Service "1"'  # any name that PostgreSQL takes
        quoted = role.replace('"', '""')
        server.psql(f"CREATE ROLE \"{quoted}\" LOGIN PASSWORD 'x' NOSUPERUSER NOBYPASSRLS")
        service = make_url(owner).set(username=role, password="x")
        service_url = service.render_as_string(hide_password=False)
        with pytest.raises(StoreError, match="permission denied"), PrefixStore(service_url):
            pass
        assert upgrade(owner, service_role=role) == (None, HEAD)
        assert upgrade(owner, service_role=role) == (HEAD, HEAD)
        with PrefixStore(owner, tenant="a") as first:
            first.put([new(seed=7)])
        with PrefixStore(service_url, tenant="b") as store:
            assert not store.ignores_row_security
            assert store.put([new(), new(BO)]) == [1, 1]
            assert store.put([new(seed=2)]) == [2]
            store.for_model(F).rollback(ANA, to=1)
            assert store.name_of_api_key(store.create_api_key("web")) == "web"
            store.keep_texts("ana", ["a text"])
            assert store.forget(ANA) == 2
            assert store.prune(keep=1) == 0
            assert [entry.key for entry in store.audit_log()] == [ANA]
        engine = sqlalchemy.create_engine(service)
        tables = [table.name for table in Base.metadata.sorted_tables]
        attempts = [
            *(f"ALTER TABLE {table} DISABLE ROW LEVEL SECURITY" for table in tables),
            *(f"ALTER TABLE {table} NO FORCE ROW LEVEL SECURITY" for table in tables),
            *(f"DROP TABLE {table}" for table in tables),
            *(f"TRUNCATE {table} CASCADE" for table in tables),
            "DROP POLICY controlprefix_prefixes_own ON controlprefix_prefixes",
            "ALTER POLICY controlprefix_prefixes_own ON controlprefix_prefixes USING (true)",
            "CREATE POLICY mine ON controlprefix_prefixes USING (true)",
            "SET ROLE app",
            f'ALTER ROLE "{quoted}" BYPASSRLS',
            f"UPDATE {REVISION_TABLE} SET version_num = '0001'",
            "CREATE TABLE mine (id int)",
        ]
        for statement in attempts:
            with engine.connect() as connection, pytest.raises(ProgrammingError) as error:
                connection.exec_driver_sql(statement)
            assert "permission denied" in str(error.value) or "must be owner" in str(error.value), (
                statement
            )
        with engine.connect() as connection:
            assert connection.exec_driver_sql("SELECT * FROM controlprefix_versions").all() == []
        engine.dispose()
    with pytest.raises(StoreError, match="not on PostgreSQL"):
        upgrade(f"sqlite:///{tmp_path}/x.db", service_role="x")


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:p@ssW0rd@localhost:1/db",
        "postgresql://u:p@ss:W0rd@localhost:1/db",
        "postgresql://localhost:abc/db?password=W0rd",
        "postgresql://u:a%40W0rd@localhost:1/db",
        "postgresql:/u:W0rd@localhost/db",
    ],
)
def test_no_part_of_a_password_is_shown(
    url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("controlprefix.store.database._MAX_ATTEMPTS", 2)
    with pytest.raises(StoreError) as error:
        PrefixStore(url).stats()
    assert "W0rd" not in str(error.value)
    assert "W0rd" not in caplog.text


def test_times_are_utc_wherever_the_server_is(url: str) -> None:
    zone = {"options": "-c timezone=Asia/Tokyo"} if "postgresql" in url else {}
    there = make_url(url).update_query_dict(zone).render_as_string(hide_password=False)
    with PrefixStore(there) as store:
        store.put([new(ANA, seed=1)])
        (info,) = store.prefixes()
        store.forget(ANA)
        (entry,) = store.audit_log()
        assert entry.at.utcoffset() == info.current.created_at.utcoffset() == timedelta(0)


def test_a_quoted_password_is_shown_in_neither_form() -> None:
    url = "postgresql://me:s%40crets@host/name"
    assert redacted("no s%40crets, no s@crets for me", url) == "no ***, no *** for me"


def test_a_nul_is_in_no_name(url: str) -> None:
    with PrefixStore(url) as store:
        store.put([new()])
        models = store.for_model(F)
        with pytest.raises(UnknownNameError):
            models.exists(PrefixKey("user", "a\0"))
        assert models.names("user", after="a\0") == ["ana"]
        for look in (store.job, store.cancel_job):
            with pytest.raises(UnknownNameError):
                look("a\0")
