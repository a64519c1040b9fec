"""Users on a Ray cluster: each is stored once, also where an actor is killed."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from controlprefix import ControlPrefix, EngineError, RequestError, TrainingDataError
from controlprefix.cli import app
from controlprefix.interop.ray_users import RayCluster

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow

TEXTS = {f"u{i}": [f"the sea is wide {i}", f"we sail {i} times", "hello"] for i in range(6)}
OPTIONS: dict[str, Any] = {"steps": 3, "num_slots": 2, "progress": False}


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    try:
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    except Exception as error:  # such as no shared memory
        pytest.skip(f"no Ray cluster starts on this machine: {error}")
    yield
    ray.shutdown()


def processes() -> list[int]:
    """Ids of the processes of actors."""
    ids = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if b"ray::_Actor" in (path / "cmdline").read_bytes():
                ids.append(int(path.name))
        except OSError:
            continue
    return ids


def test_users_are_those_of_one_process(model_folder: Path, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/cluster.db"
    texts = iter([*TEXTS.items(), ("bad", [" "])])  # consumed one by one
    cluster = RayCluster(model=model_folder, store=url, num_actors=2)
    report = cluster.train_users(texts, concurrent_users=2, **OPTIONS)
    assert report.users.keys() == TEXTS.keys()
    assert report.failed.keys() == {"bad"}
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
                for process in processes():
                    os.kill(process, signal.SIGKILL)
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


def test_mistakes_are_clear_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("controlprefix.interop.ray_users._MAX_ATTEMPTS", 1)  # each takes a while
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
