"""Jobs: done once, whatever happens to workers, and gone with their user."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from controlprefix import ControlPrefix, StoreError, embeddings
from controlprefix.errors import OverloadedError, UnknownNameError
from controlprefix.jobs import JobWorker
from controlprefix.prefixes import PrefixKey
from controlprefix.store import PrefixStore, jobs
from controlprefix.training.loop import TrainingLoop
from controlprefix.users import user_training

from helpers import Keys, Letters, frozen, raw
from models import build, byte_tokenizer

TEXTS = ["the sea is wide", "the sea is deep", "we sail today"]
OPTIONS: dict[str, Any] = {"texts": TEXTS, "steps": 3, "num_slots": 2}
FROZEN = frozen(build("llama"), byte_tokenizer())
F = FROZEN.fingerprint


@pytest.fixture
def store(url: str) -> Iterator[PrefixStore]:
    with PrefixStore(url, tenant="mine") as opened:
        yield opened


class Clock:
    """The time that jobs see."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ahead = timedelta()
        monkeypatch.setattr(jobs, "_now", lambda _: datetime.now(UTC) + self.ahead)

    def advance(self, seconds: float) -> None:
        self.ahead += timedelta(seconds=seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def work(store: PrefixStore) -> int:
    return JobWorker(FROZEN, store).run(until_empty=True)


def test_a_job_trains_a_user_and_forgets_the_texts(store: PrefixStore) -> None:
    job = store.add_job("train_user", "ana", OPTIONS, F)
    assert job.status == "queued"
    assert store.jobs() == [job]
    assert work(store.for_tenant("theirs")) == 1  # a worker does the jobs of all tenants
    done = store.job(job.id)
    assert (done.status, done.version, done.num_steps, done.error) == ("succeeded", 1, 3, "")
    assert done.created_at <= (done.started_at or done.created_at)
    assert ControlPrefix(FROZEN, store).names("user") == ["ana"]
    assert work(store) == 0
    with pytest.raises(UnknownNameError):  # tenants do not see each other's
        store.for_tenant("theirs").job(job.id)
    assert store.for_tenant("theirs").jobs() == []


def test_texts_of_jobs_are_removed_however_they_end(url: str) -> None:
    with PrefixStore(url, tenant="mine") as store:
        done = store.add_job("train_user", "ana", OPTIONS, F)
        failed = store.add_job("train_user", "bo", {**OPTIONS, "texts": [" "]}, F)
        cancelled = store.add_job("train_user", "cy", OPTIONS, F)
        store.cancel_job(cancelled.id)
        work(store)
        ends = [store.job(job.id).status for job in (done, failed, cancelled)]
        assert ends == ["succeeded", "failed", "cancelled"]
    rows = raw(url, "SELECT payload, key_id FROM controlprefix_jobs", "mine")
    assert [tuple(row) for row in rows] == [(None, None)] * 3


def test_the_version_is_that_of_training_at_once(store: PrefixStore) -> None:
    store.add_job("train_user", "ana", OPTIONS, F)
    work(store)
    cp, alone = ControlPrefix(FROZEN, store), ControlPrefix(FROZEN, PrefixStore("sqlite://"))
    alone.train_users({"ana": TEXTS}, steps=3, num_slots=2, progress=False)
    assert cp.get("user", "ana").digest == alone.get("user", "ana").digest


def test_a_job_learns_from_feedback(store: PrefixStore) -> None:
    cp = ControlPrefix(FROZEN, store)
    job = store.add_job("learn_feedback", "ana", {"steps": 2}, F)
    work(store)
    assert store.job(job.id).status == "failed"
    assert "no feedback" in store.job(job.id).error
    rows = [
        {"user": "ana", "prompt": f"Greet {name}.", "chosen": f"hi {name}", "rejected": "Sir!"}
        for name in ("Sam", "Eva", "Tom", "Max")
    ]
    cp.keep_feedback(rows)
    job = store.add_job("learn_feedback", "ana", {"steps": 2, "num_slots": 2}, F)
    work(store)
    assert (store.job(job.id).status, store.job(job.id).version) == ("succeeded", 1)


def test_bad_texts_fail_at_once(store: PrefixStore) -> None:
    job = store.add_job("train_user", "ana", {"texts": [" "]}, F)
    assert work(store) == 1
    assert store.job(job.id).status == "failed"
    assert "no text" in store.job(job.id).error
    assert store.jobs(user="bo") == []


def test_a_failure_of_the_store_tells_clients_no_paths(
    store: PrefixStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise StoreError("the disk of /srv/prefixes is full")

    monkeypatch.setattr(user_training, "_publish", fail)
    job = store.add_job("train_user", "ana", OPTIONS, F)
    for _ in range(3):
        work(store)
        clock.advance(10_000)
    assert store.job(job.id).status == "failed"
    assert "/srv" not in store.job(job.id).error


def test_tenants_take_turns(store: PrefixStore) -> None:
    many = [store.add_job("train_user", f"u{i}", OPTIONS, F).id for i in range(3)]
    single = store.for_tenant("theirs").add_job("train_user", "x", OPTIONS, F).id
    claims = [store.claim_job(F) for _ in range(4)]
    order = [claim.job_id for claim in claims if claim is not None]
    assert order == [many[0], single, *many[1:]]
    assert store.claim_job(F) is None
    assert store.claim_job("another model") is None


def test_what_a_killed_worker_had_is_taken_again(store: PrefixStore, clock: Clock) -> None:
    job = store.add_job("train_user", "ana", OPTIONS, F)
    claim = store.claim_job(F)
    assert claim is not None
    assert store.start_job(claim) is not None
    assert store.claim_job(F) is None
    clock.advance(50)
    assert store.renew_job(claim, 1)
    clock.advance(50)
    assert store.claim_job(F) is None  # it was renewed
    clock.advance(20)
    other = store.claim_job(F)
    assert other is not None
    assert other.num_attempts == 2
    assert not store.renew_job(claim, 2)  # the first one, which was only slow, stops
    assert store.finish_job(claim, error="too late")  # nor does it end what the other does
    store.release_job(claim)
    assert not store.job(job.id).is_finished
    assert store.claim_job(F) is None
    for _ in range(2):
        clock.advance(61)
        other = store.claim_job(F)
        assert other is not None
        started = store.start_job(other)
        assert (started is None) == (other.num_attempts > jobs.MAX_ATTEMPTS)
    assert store.job(job.id).status == "failed"
    assert "3 times" in store.job(job.id).error
    clock.advance(61)
    assert store.claim_job(F) is None


def test_a_worker_with_a_wrong_clock_takes_no_job_from_another(
    store: PrefixStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not store.url.startswith("postgresql"):
        pytest.skip("SQLite and its workers are on one machine")
    store.add_job("train_user", "ana", OPTIONS, F)
    claim = store.claim_job(F)
    assert claim is not None

    class Ahead(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Ahead":
            return super().now(tz) + timedelta(hours=1)

    monkeypatch.setattr(jobs, "datetime", Ahead)
    assert store.claim_job(F) is None
    assert store.renew_job(claim, 1)
    monkeypatch.undo()
    assert store.claim_job(F) is None  # nor did the renewal keep it for an hour
    assert store.finish_job(claim, version=1)


def test_a_store_that_was_away_is_tried_again(
    store: PrefixStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = store.add_job("train_user", "ana", OPTIONS, F)
    original = user_training._publish
    failures = iter([StoreError("it restarts")])

    def publish(*arguments: Any) -> Any:
        for error in failures:
            raise error
        return original(*arguments)

    monkeypatch.setattr(user_training, "_publish", publish)
    claim = store.claim_job(F)
    assert claim is not None
    worker = JobWorker(FROZEN, store)
    worker._do(claim)
    assert store.job(job.id).status == "queued"
    assert store.job(job.id).error == "the store could not be used; see the worker's log"
    assert store.claim_job(F) is None
    monkeypatch.setattr(worker._wake, "wait", lambda _: clock.advance(11))
    assert worker.run(until_empty=True) == 1  # it waits for what is to be tried again
    assert (store.job(job.id).status, store.job(job.id).version) == ("succeeded", 1)


class Slow:
    """Lets a test act while a worker is in the middle of its first step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()
        self.num_steps = 0
        original = TrainingLoop.step

        def step(*arguments: Any) -> Any:
            self.num_steps += 1
            self.reached.set()
            assert self.go_on.wait(30)
            return original(*arguments)

        monkeypatch.setattr(TrainingLoop, "step", step)
        monkeypatch.setattr("controlprefix.jobs.worker._RENEW_S", 0.05)

    def during(self, store: PrefixStore, act: Any) -> JobWorker:
        """A worker that does all jobs; it must come to an end by itself."""
        worker = JobWorker(FROZEN, store)
        thread = threading.Thread(target=worker.run, kwargs={"until_empty": True})
        thread.start()
        assert self.reached.wait(30)
        act(worker)
        time.sleep(0.5)  # the claim is renewed meanwhile
        self.go_on.set()
        thread.join(60)
        assert not thread.is_alive()
        return worker


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 1000])
def test_a_cancelled_job_ends_after_its_step(
    store: PrefixStore, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """Also after the last one."""
    job = store.add_job("train_user", "ana", {**OPTIONS, "steps": steps}, F)
    slow = Slow(monkeypatch)
    worker = slow.during(store, lambda worker: store.cancel_job(job.id))
    assert not worker._closing.is_set()
    assert slow.num_steps < 10
    assert store.job(job.id).status == "cancelled"
    assert ControlPrefix(FROZEN, store).names("user") == []
    waiting = store.add_job("train_user", "bo", OPTIONS, F)
    assert store.cancel_job(waiting.id).status == "cancelled"
    assert work(store) == 0
    assert store.cancel_job(job.id) == store.job(job.id)  # a finished one stays as it is


@pytest.mark.slow
@pytest.mark.parametrize("is_noticed", [True, False])
def test_a_user_who_is_forgotten_meanwhile_does_not_come_back(
    store: PrefixStore, monkeypatch: pytest.MonkeyPatch, is_noticed: bool
) -> None:
    """Noticed while it trains, or where the version would be stored."""
    job = store.add_job("train_user", "ana", {**OPTIONS, "steps": 1000 if is_noticed else 2}, F)
    slow = Slow(monkeypatch)
    if not is_noticed:
        monkeypatch.setattr("controlprefix.jobs.worker._RENEW_S", 3600)
    worker = slow.during(store, lambda worker: store.forget(PrefixKey("user", "ana")))
    assert not worker._closing.is_set()
    assert slow.num_steps < 10
    assert store.jobs() == []
    assert ControlPrefix(FROZEN, store).names("user") == []
    with pytest.raises(UnknownNameError):
        store.job(job.id)
    assert store.claim_job(F) is None


@pytest.mark.slow
def test_a_worker_that_is_stopped_gives_its_job_back(
    store: PrefixStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = store.add_job("train_user", "ana", OPTIONS, F)
    Slow(monkeypatch).during(store, lambda worker: worker.ask_to_stop())
    assert (store.job(job.id).status, store.job(job.id).num_attempts) == ("queued", 0)
    assert work(store) == 1
    assert store.job(job.id).version == 1


@pytest.mark.slow
def test_many_workers_do_each_job_once(url: str) -> None:
    with PrefixStore(url, tenant="mine") as store:
        ids = [store.add_job("train_user", f"u{i}", OPTIONS, F).id for i in range(12)]
        stores = [PrefixStore(url, tenant="mine") for _ in range(4)]
        threads = [threading.Thread(target=work, args=(own,)) for own in stores]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {store.job(i).status for i in ids} == {"succeeded"}
        assert {store.job(i).num_attempts for i in ids} == {1}
        assert {store.job(i).version for i in ids} == {1}
        for own in stores:
            own.close()


def test_tenants_take_turns_with_one_worker(url: str) -> None:
    with PrefixStore(url, tenant="a") as store:
        other = store.for_tenant("b")
        ids = [store.add_job("train_user", f"u{i}", OPTIONS, F).id for i in range(4)]
        late = [other.add_job("train_user", f"u{i}", OPTIONS, F).id for i in range(2)]
        served: list[str] = []
        order = []
        while (claim := store.claim_job(F, served=served)) is not None:
            served = [tenant for tenant in served if tenant != claim.tenant] + [claim.tenant]
            own = store.for_tenant(claim.tenant)
            assert own.start_job(claim) is not None
            assert own.finish_job(claim, version=1)
            order.append(claim.job_id)
        assert order == [ids[0], late[0], ids[1], late[1], *ids[2:]]


def test_accents_of_a_name_have_one_form(store: PrefixStore) -> None:
    composed, decomposed = "zo\u00e9", "zoe\u0301"
    store.add_job("train_user", decomposed, OPTIONS, F)
    store.keep_texts(decomposed, ["a text"])
    store.keep_feedback(decomposed, ["{}"])
    assert [job.user for job in store.jobs(user=composed)] == [composed]
    assert store.user_texts(composed) == store.user_texts(decomposed) == ["a text"]
    assert store.users_with_feedback() == [composed]
    store.forget(PrefixKey("user", composed))
    assert (store.user_texts(decomposed), store.feedback(decomposed), store.jobs()) == ([], [], [])


@pytest.mark.slow
def test_a_worker_killed_in_the_middle_loses_nothing(
    url: str, model_folder: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    with PrefixStore(url) as store:
        cp = ControlPrefix.from_pretrained(model_folder, store=url)
        fingerprint = cp.frozen_model.fingerprint
        options = {**OPTIONS, "steps": 2000}
        job = store.add_job("train_user", "ana", options, fingerprint)
        command = [
            sys.executable, "-m", "controlprefix.cli", "worker", "--model", str(model_folder),
            "--store", url, "--device", "cpu",
        ]  # fmt: skip
        killed = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 120
        while store.job(job.id).status != "running":
            assert killed.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert store.job(job.id).status == "running"
        assert cp.names("user") == []
        clock.advance(61)
        train = ControlPrefix.train_users
        monkeypatch.setattr(  # 2,000 steps would take long
            ControlPrefix,
            "train_users",
            lambda self, texts, **options: train(self, texts, **{**options, "steps": 2}),
        )
        assert JobWorker(cp.frozen_model, store).run(until_empty=True) == 1
        done = store.job(job.id)
        assert (done.status, done.version, done.num_attempts) == ("succeeded", 1, 2)
        cp.store.close()


def test_options_are_encrypted_and_rotated(url: str, tmp_path: Path) -> None:
    keys = Keys(tmp_path / "keys.json")
    keys.use("k1")
    with PrefixStore(url, tenant="mine", encryption_keys=keys) as store:
        job = store.add_job("train_user", "ana", OPTIONS, F)
        keys.use("k2")
        store.rotate_keys()
        del keys.keys["k1"]
        keys.use("k2")
        claim = store.claim_job(F)
        assert claim is not None
        started = store.start_job(claim)
        assert started is not None
        assert started[1] == OPTIONS
        assert store.job(job.id).status == "running"


def test_too_many_jobs_are_refused(store: PrefixStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_MAX_WAITING", 2)
    monkeypatch.setattr(jobs, "_MAX_FINISHED", 1)
    first = store.add_job("train_user", "a", OPTIONS, F)
    store.add_job("train_user", "b", OPTIONS, F)
    with pytest.raises(OverloadedError, match="2 jobs"):
        store.add_job("train_user", "c", OPTIONS, F)
    with pytest.raises(UnknownNameError):
        store.add_job("train_user", "", OPTIONS, F)
    work(store)
    store.add_job("train_user", "c", OPTIONS, F)
    assert len(store.jobs()) == 2  # one is finished, one waits
    assert first.id not in {job.id for job in store.jobs()}


def test_a_job_whose_worker_died_does_not_count_as_running(
    store: PrefixStore, clock: Clock
) -> None:
    job = store.add_job("train_user", "ana", OPTIONS, F)
    assert store.claim_job(F) is not None
    clock.advance(61)
    store.for_tenant("theirs").add_job("train_user", "bo", OPTIONS, F)
    claim = store.claim_job(F)
    assert claim is not None
    assert claim.job_id == job.id  # the older of two, neither of whose tenants has one running


def test_an_error_of_another_kind_ends_no_worker(
    store: PrefixStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = store.add_job("train_user", "ana", OPTIONS, F)
    failures = [OSError("the key service is away"), RuntimeError("broken")]
    start = PrefixStore.start_job

    def fails_first(self: PrefixStore, claim: Any) -> Any:
        if failures:
            raise failures.pop()
        return start(self, claim)

    monkeypatch.setattr(PrefixStore, "start_job", fails_first)
    for _ in range(3):
        work(store)
        clock.advance(60)
    assert store.job(job.id).status == "succeeded"


def test_a_worker_that_was_silent_for_too_long_changes_nothing(
    store: PrefixStore, clock: Clock
) -> None:
    job = store.add_job("train_user", "ana", OPTIONS, F)
    silent = store.claim_job(F)
    assert silent is not None
    clock.advance(100)
    assert work(store) == 1
    done = store.job(job.id)
    assert (done.status, done.version) == ("succeeded", 1)
    assert store.finish_job(silent, error="the model went away")
    assert store.job(job.id) == done


def test_one_piece_of_long_feedback_does_not_stop_learning(store: PrefixStore) -> None:
    cp = ControlPrefix(FROZEN, store)
    row = {"user": "ana", "prompt": "Greet.", "chosen": "Hello!", "rejected": "Hm."}
    cp.keep_feedback([row, {**row, "prompt": "long " * 1000}, {**row, "prompt": "Part."}])
    job = store.add_job("learn_feedback", "ana", {"steps": 1, "num_slots": 2}, F)
    assert work(store) == 1
    assert (store.job(job.id).status, store.job(job.id).error) == ("succeeded", "")


def test_steps_are_those_of_training_alone(
    store: PrefixStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embeddings, "load_embedder", lambda embedder: Letters())
    cp = ControlPrefix(FROZEN, store)
    users = {f"u{i}": [f"text {i} of mine"] * 2 for i in range(3)}
    cp.learn_decoder(users, num_slots=2, width=4, steps=1, progress=False)
    options = {name: value for name, value in OPTIONS.items() if name != "num_slots"}
    job = store.add_job("train_user", "ana", {**options, "decoder": "users"}, F)
    assert work(store) == 1
    assert (store.job(job.id).num_steps, store.job(job.id).error) == (3, "")
