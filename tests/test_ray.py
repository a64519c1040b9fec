"""Users on a Ray cluster: each is stored once, also where an actor is killed."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from controlprefix import (
    AttributeSpace,
    ControlPrefix,
    EngineError,
    Prefix,
    RequestError,
    StoreError,
    TrainingDataError,
    UnknownNameError,
)
from controlprefix.cli import app
from controlprefix.evaluation import UsersEvaluation, evaluate_users
from controlprefix.interop import ray_run
from controlprefix.interop.ray_users import RayCluster
from controlprefix.users import UsersReport

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow

TEXTS = {f"u{i}": [f"the sea is wide {i}", f"we sail {i} times", "hello"] for i in range(6)}
OPTIONS: dict[str, Any] = {"steps": 3, "num_slots": 2, "progress": False}


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    try:
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    except (OSError, TimeoutError) as error:  # such as no shared memory
        pytest.skip(f"no Ray cluster starts on this machine: {error}")
    yield
    ray.shutdown()


def processes() -> list[int]:
    """Ids of the processes of this cluster's actors."""
    ids = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if "ray::UserActor" in " ".join(process.cmdline()):
                ids.append(process.pid)
    return ids


def kill_actors() -> int:
    """Kill all actors; returns how many."""
    num_killed = 0
    for process in processes():
        with suppress(ProcessLookupError):  # a child that was about to become another program
            os.kill(process, signal.SIGKILL)
            num_killed += 1
    return num_killed


def test_users_are_those_of_one_process(model_folder: Path, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/cluster.db"
    texts = iter([*TEXTS.items(), ("bad", [" "]), ("u0", ["more"])])  # consumed one by one
    cluster = RayCluster(model=model_folder, store=url, num_actors=2)
    report = cluster.train_users(texts, concurrent_users=2, **OPTIONS)
    assert report.users.keys() == TEXTS.keys()
    assert report.failed.keys() == {"bad", "u0"}
    assert "comes twice" in report.failed["u0"]
    deadline = time.monotonic() + 30
    while processes():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    cp = ControlPrefix.from_pretrained(model_folder, store=url)
    alone = ControlPrefix.from_pretrained(model_folder, store="sqlite://")
    alone.train_users(TEXTS, **OPTIONS)
    for user in TEXTS:
        assert cp.get("user", user).digest == alone.get("user", user).digest
        assert len(cp.versions("user", user)) == 1
    cp.store.close()


def test_enrolled_users_are_those_of_one_process(model_folder: Path, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/cluster.db"
    rows = tmp_path / "rows.jsonl"
    lines = [{"user": user, "text": text} for user, texts in TEXTS.items() for text in texts]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    alone = ControlPrefix.from_pretrained(model_folder, store="sqlite://")
    alone.enroll_users(rows, num_slots=3, progress=False)
    command = ["users", "enroll", str(rows), "--num-slots", "3", "--store", url]
    command += ["--model", str(model_folder), "--ray", "local", "--actors", "1"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "stored 6 of 6 users" in result.output
    cp = ControlPrefix.from_pretrained(model_folder, store=url)
    for user in TEXTS:
        assert cp.get("user", user).digest == alone.get("user", user).digest
        assert len(cp.versions("user", user)) == 1
    cp.store.close()


# Every row has a default label.
SPACE = AttributeSpace.parse("attributes: {tone: {default: warm, labels: [warm]}}")


def stored_users(model_folder: Path, url: str) -> ControlPrefix:
    cp = ControlPrefix.from_pretrained(model_folder, store=url, attributes=SPACE)
    cp.put("attribute", "tone=warm", Prefix.random(cp.geometry, num_slots=3, scale=0.5, seed=99))
    for i, user in enumerate(TEXTS):
        cp.put("user", user, Prefix.random(cp.geometry, num_slots=3, scale=0.5, seed=i))
    return cp


def held_out() -> list[dict[str, str]]:
    return [
        {"user": user, "text": f"{text} {i}"}
        for user, texts in TEXTS.items()
        for i, text in enumerate(texts)
    ]


def close(results: UsersEvaluation, others: UsersEvaluation) -> bool:
    """Whether all figures are equal but for rounding: rows share other batches."""
    pairs = [(results.users[user], others.users[user]) for user in results.users]
    return list(results.users) == list(others.users) and all(
        own.num_rows == its.num_rows
        and own.off_context == pytest.approx(its.off_context, abs=1e-4)
        and own.gain.mean == pytest.approx(its.gain.mean, abs=1e-4)
        and own.gain.low == pytest.approx(its.gain.low, abs=1e-3)
        for own, its in pairs
    )


def test_results_of_users_are_those_of_one_process(model_folder: Path, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/cluster.db"
    cp = stored_users(model_folder, url)
    groups = {"half": {user: str(i % 2) for i, user in enumerate(TEXTS)}}
    expected = evaluate_users(cp, held_out(), groups=groups, min_group_size=2)
    assert any("tone=warm" in name for name in expected.about["prefixes"])
    cluster = RayCluster(model=model_folder, store=url, attributes=SPACE, num_actors=2)
    result = cluster.evaluate_users(
        held_out(), groups=groups, min_group_size=2, chunk_size=2, progress=False
    )
    assert close(result, expected)
    assert result.groups.keys() == expected.groups.keys()
    for name in ("prefixes", "data", "weights"):
        assert result.about[name] == expected.about[name]
    rows, folder = tmp_path / "rows.jsonl", tmp_path / "report"
    rows.write_text("".join(json.dumps(row) + "\n" for row in held_out()))
    command = ["eval-users", str(rows), "--store", url, "--model", str(model_folder)]
    command += ["--ray", "local", "--actors", "1", "--folder", str(folder)]
    printed = CliRunner().invoke(app, command)
    assert printed.exit_code == 0, printed.output
    assert (folder / "users.html").exists()
    with pytest.raises(UnknownNameError, match="nobody") as raised:
        cluster.evaluate_users([*held_out(), {"user": "nobody", "text": "x"}], progress=False)
    assert "Traceback" not in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1
    with pytest.raises(TrainingDataError, match="two or more"):
        cluster.evaluate_users(held_out()[:1], progress=False)
    cp.store.close()


def test_an_evaluation_survives_killed_actors(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{tmp_path}/cluster.db"
    cp = stored_users(model_folder, url)
    expected = evaluate_users(cp, held_out())
    num_killed: list[int] = []

    @contextmanager
    def killing_bar(*_: object, **__: object) -> Iterator[Callable[[int, str], None]]:
        def update(done: int, note: str) -> None:  # called when a chunk is done
            if not num_killed:
                num_killed.append(kill_actors())

        yield update

    monkeypatch.setattr("controlprefix.interop.ray_run.progress_bar", killing_bar)
    cluster = RayCluster(model=model_folder, store=url, attributes=SPACE, num_actors=2)
    result = cluster.evaluate_users(held_out(), chunk_size=1)
    assert num_killed[0] >= 1
    assert close(result, expected)
    cp.store.close()


def test_what_a_killed_actor_had_is_done_once(model_folder: Path, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/cluster.db"
    cp = ControlPrefix.from_pretrained(model_folder, store=url)
    # Users of one chunk end at different steps, since the first has few texts and patience 1.
    texts = {**TEXTS, "long": ["the sea is wide and deep"] * 3}
    killed = threading.Event()

    def kill() -> None:
        deadline = time.monotonic() + 300  # actors start slowly on a busy machine
        while time.monotonic() < deadline:
            if cp.names("user"):  # the first user is stored
                if kill_actors():
                    killed.set()
                return
            time.sleep(0.01)

    thread = threading.Thread(target=kill)
    thread.start()
    options = {**OPTIONS, "steps": 60}
    cluster = RayCluster(model=model_folder, store=url, num_actors=2)
    report = cluster.train_users(texts, concurrent_users=2, **options)
    thread.join()
    assert killed.is_set()
    assert report.users.keys() | set(report.skipped) == texts.keys()
    assert not report.failed
    for user in texts:
        assert len(cp.versions("user", user)) == 1
    cp.store.close()


class FakeRay:
    """Calls of actors are functions that `get` calls; none of them dies."""

    exceptions = SimpleNamespace(
        RayActorError=ZeroDivisionError, OutOfMemoryError=MemoryError, RayTaskError=KeyError
    )

    def wait(self, references: list[Any], num_returns: int) -> tuple[list[Any], list[Any]]:
        return references[:num_returns], references[num_returns:]

    def get(self, reference: Any) -> Any:
        return reference()

    def kill(self, actor: Any) -> None:
        pass


@pytest.mark.parametrize("num_failures", [2, 3])
def test_a_store_that_is_away_is_waited_for(
    num_failures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_run, "_STORE_PAUSE_S", 0.0)
    failures = [StoreError("the database is away")] * num_failures

    def work(_: str, users: Any, *__: Any) -> Any:
        def result() -> Any:
            if failures:
                raise failures.pop()
            reports: dict[str, Any] = dict.fromkeys(name for name, _ in users)
            return UsersReport(users=reports), []

        return result

    actor = SimpleNamespace(
        last_removal_number=SimpleNamespace(remote=lambda: int),
        versions=SimpleNamespace(remote=lambda names: dict),
        work=SimpleNamespace(remote=work),
    )
    chunks = iter([ray_run.Chunk([("ana", ["a"])]), ray_run.Chunk([("bo", ["b"])])])
    report = UsersReport()
    run = ray_run.Run(FakeRay(), lambda: actor, chunks, report, "train_users", {})
    if num_failures == 3:  # it never worked
        with pytest.raises(StoreError, match="is away"):
            run.until_done(1, progress=False)
        return
    run.until_done(1, progress=False)
    assert set(report.users) == {"ana", "bo"}
    assert not report.failed


def test_users_that_were_stored_before_their_actors_died_have_not_failed() -> None:
    num_asked = 0

    def versions(names: list[str]) -> Any:
        nonlocal num_asked
        num_asked += 1
        return lambda: {"ana": min(num_asked - 1, 1), "bo": 0}

    def work(*_: Any) -> Any:
        return lambda: 1 / 0  # the error of a dead actor

    actor = SimpleNamespace(
        last_removal_number=SimpleNamespace(remote=lambda: int),
        versions=SimpleNamespace(remote=versions),
        work=SimpleNamespace(remote=work),
    )
    chunks = iter([ray_run.Chunk([("ana", ["a"]), ("bo", ["b"])])])
    report = UsersReport()
    run = ray_run.Run(FakeRay(), lambda: actor, chunks, report, "train_users", {})
    assert run.until_done(1, progress=False) == ["ana"]
    assert list(report.failed) == ["bo"]
    assert "actors died" in report.failed["bo"]


@pytest.mark.parametrize("error", [MemoryError("killed"), KeyError("CUDA out of memory")])
def test_a_chunk_that_does_not_fit_loses_no_other(error: Exception) -> None:
    def work(_: str, users: Any, *__: Any) -> Any:
        def result() -> Any:
            names = [name for name, _ in users]
            if "ana" in names:
                raise error
            return UsersReport(users=dict.fromkeys(names)), []  # type: ignore[arg-type]

        return result

    actor = SimpleNamespace(
        last_removal_number=SimpleNamespace(remote=lambda: int),
        versions=SimpleNamespace(remote=lambda names: dict),
        work=SimpleNamespace(remote=work),
    )
    chunks = iter([ray_run.Chunk([("ana", ["a"])]), ray_run.Chunk([("bo", ["b"])])])
    report = UsersReport()
    run = ray_run.Run(FakeRay(), lambda: actor, chunks, report, "train_users", {})
    run.until_done(1, progress=False)
    assert (set(report.users), set(report.failed)) == ({"bo"}, {"ana"})


def test_mistakes_are_clear_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("controlprefix.interop.ray_run._MAX_ATTEMPTS", 1)  # each takes a while
    url = f"sqlite:///{tmp_path}/cluster.db"
    with pytest.raises(EngineError, match="cannot start"):
        RayCluster(model=tmp_path / "none", store=url, num_actors=1).train_users(TEXTS, **OPTIONS)
    with pytest.raises(TrainingDataError, match="num_actors"):
        RayCluster(store=url, num_actors=0)
    with pytest.raises(TrainingDataError, match="no folder"):
        RayCluster(store=url).train_users(TEXTS, folder=tmp_path)
    with pytest.raises(TrainingDataError, match="0 users at a time"):
        RayCluster(store=url).train_users(TEXTS, concurrent_users=0)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"user": "ana", "text": "hello"}')
    result = CliRunner().invoke(
        app, ["users", "train", str(rows), "--ray", "local", "--folder", str(tmp_path)]
    )
    assert isinstance(result.exception, RequestError)
    assert "no run folder" in str(result.exception)
    with pytest.raises(TrainingDataError, match="steps"):
        RayCluster(store=url).train_users(TEXTS, steps=-1)
