"""Use with faults: nothing acknowledged is lost, nothing forgotten is left.

Two servers, a worker and PostgreSQL as processes of their own. Clients of two tenants ask, enrol,
queue training, keep feedback, forget, hang up and send nonsense, while the database restarts or
refuses writes, and the worker and one of the servers are killed or told to stop. The other server
runs throughout, which shows what its memory and open files do. A tiny model does: what is tested
does not depend on its size.
"""

import contextlib
import hashlib
import itertools
import json
import random
import re
import secrets
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from controlprefix import ControlPrefix, Prefix, Request
from controlprefix.store import PrefixStore

from lib.models import add_model_options, folder_of, load_from
from lib.results import arguments, describe, save
from lib.servers import Process, free_port
from lib.stores import control_postgresql, postgresql
from lib.tables import header, line

TENANTS = ("a", "b")
FAULTS = ("database restarts", "worker is killed", "database refuses writes")
RARE_FAULTS = ("server is killed", "server is told to stop")
REFUSING_S = 3.0
MAX_JOBS = 900  # that are looked at in the end: a store keeps a tenant's last thousand
EXPECTED = {200, 201, 202, 400, 401, 404, 409, 413, 422, 429, 503}
NONSENSE = (b"{", b"[]", b'{"model": 7}', b"\xff" * 100, b"[" * 5000, b'{"model": "m"}')


def secret_of(user: str) -> str:
    """A word in the texts of a user, which is not in the name: the audit log keeps names."""
    return hashlib.sha256(user.encode()).hexdigest()[:16]


@dataclass
class Ledger:
    """What one tenant's clients were told.

    Attributes:
        stored, forgotten: Users whose enrolment, or whose removal after it, was acknowledged.
        jobs: Ids of accepted jobs.
        feedback: Acknowledged feedback per user.
        statuses: How often each status was answered; 0 where the connection broke.
        wrong: Answers that differ from what the library alone generates.
    """

    stored: set[str] = field(default_factory=set)
    forgotten: set[str] = field(default_factory=set)
    jobs: list[str] = field(default_factory=list)
    feedback: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Client:
    """One client of a tenant: sends requests to either server, and notes what was answered."""

    def __init__(
        self, urls: Sequence[str], tenant: str, key: str, texts: Mapping[str, str], ledger: Ledger
    ) -> None:
        self.urls, self.tenant, self.texts, self.ledger = urls, tenant, texts, ledger
        self.http = httpx.Client(headers={"Authorization": f"Bearer {key}"}, timeout=60)
        self.rng = random.Random(secrets.randbits(64))

    def send(self, method: str, path: str, **options: Any) -> httpx.Response | None:
        """The answer; None if the connection broke."""
        try:
            answer = self.http.request(method, self.rng.choice(self.urls) + path, **options)
        except httpx.HTTPError:
            self.note(0)
            return None
        self.note(answer.status_code)
        return answer

    def note(self, status: int) -> None:
        with self.ledger.lock:
            self.ledger.statuses[status] += 1

    def ask(self) -> None:
        user = self.rng.choice([*self.texts])
        body = {"model": "m", "prompt": "soak", "max_tokens": 8, "temperature": 0, "user": user}
        answer = self.send("POST", "/v1/completions", json=body)
        if answer is not None and answer.status_code == 200:
            text = answer.json()["choices"][0]["text"]
            if text != self.texts[user]:
                with self.ledger.lock:
                    self.ledger.wrong.append(f"{self.tenant}/{user}: {text!r}")

    def hang_up(self) -> None:
        body = {"model": "m", "prompt": "soak", "max_tokens": 200, "stream": True}
        url = f"{self.rng.choice(self.urls)}/v1/completions"
        with contextlib.suppress(httpx.HTTPError):
            with self.http.stream("POST", url, json=body) as answer:
                next(answer.iter_raw(), b"")
        time.sleep(0.2)

    def send_nonsense(self) -> None:
        self.send("POST", "/v1/completions", content=self.rng.choice(NONSENSE))
        time.sleep(0.1)

    def enrol(self) -> None:
        """Enrol a user; every other one is forgotten again."""
        user = f"user {secrets.token_hex(6)}"
        body = {"texts": [f"a sentence with {secret_of(user)}"], "keep_texts": True}
        answer = self.send("PUT", f"/v1/users/{user}", json=body)
        if answer is None or answer.status_code != 200:
            return
        if self.rng.random() < 0.5:
            with self.ledger.lock:
                self.ledger.stored.add(user)
        else:
            answer = self.send("DELETE", f"/v1/users/{user}")
            if answer is not None and answer.status_code == 200:
                with self.ledger.lock:
                    self.ledger.forgotten.add(user)
        time.sleep(0.1)

    def train(self) -> None:
        user = f"trained {self.rng.randrange(20)}"
        body = {"texts": ["the sea is wide", "we sail"], "train": {"steps": 2, "num_slots": 2}}
        answer = self.send("PUT", f"/v1/users/{user}", json=body)
        if answer is not None and answer.status_code == 202:
            with self.ledger.lock:
                self.ledger.jobs.append(answer.json()["id"])
        time.sleep(1.0)

    def give_feedback(self) -> None:
        user = f"judge {self.rng.randrange(10)}"
        body = {"user": user, "prompt": "x", "draft": secrets.token_hex(4), "final": "better"}
        answer = self.send("POST", "/v1/feedback", json=body)
        if answer is not None and answer.status_code == 201:
            with self.ledger.lock:
                self.ledger.feedback[user] += 1
        time.sleep(0.3)

    def work(self) -> Sequence[Callable[[], None]]:
        """What clients do, one thread each."""
        return (
            self.ask,
            self.ask,
            self.hang_up,
            self.send_nonsense,
            self.enrol,
            self.train,
            self.give_feedback,
        )


@contextlib.contextmanager
def running(clients: Sequence[Client]) -> Iterator[None]:
    """While inside, clients work."""
    stop = threading.Event()
    failures: list[BaseException] = []

    def repeat(work: Callable[[], None]) -> None:
        try:
            while not stop.is_set():
                work()
        except BaseException as error:
            failures.append(error)

    threads = [
        threading.Thread(target=repeat, args=(work,))
        for client in clients
        for work in client.work()
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]


def resources(process: Process) -> dict[str, float]:
    """Memory in MiB and open files of a running process."""
    assert process.running is not None
    folder = Path(f"/proc/{process.running.pid}")
    lines = (folder / "status").read_text().splitlines()
    (resident,) = (line.split()[1] for line in lines if line.startswith("VmRSS"))
    return {"MiB": int(resident) / 1024, "files": len(list((folder / "fd").iterdir()))}


def cause(fault: str, database: Any, server: Process, worker: Process) -> float:
    """Let a fault happen and end; returns the seconds that a server took to stop."""
    if fault == "database restarts":
        control_postgresql(database, "restart")
    elif fault == "database refuses writes":
        for value in ("on", "off"):
            database.psql(f"ALTER SYSTEM SET default_transaction_read_only = {value}")
            database.psql("SELECT pg_reload_conf()")
            time.sleep(REFUSING_S)
    elif fault == "worker is killed":
        worker.kill()
        worker.start()
    elif fault == "server is killed":
        server.kill()
        server.start()
    else:
        seconds = server.stop()
        server.start()
        return seconds
    return 0.0


def checked(ledger: Ledger, cp: ControlPrefix, deadline: float) -> dict[str, Any]:
    """What a tenant's store has, compared with what its clients were told."""
    newest = ledger.jobs[-MAX_JOBS:]
    while time.monotonic() < deadline:
        jobs = [cp.store.job(job) for job in newest]
        if all(job.is_finished for job in jobs):
            break
        time.sleep(1.0)
    users = set(cp.names("user"))
    fewer = [user for user, n in ledger.feedback.items() if len(cp.store.feedback(user)) < n]
    lost = sorted(ledger.stored - users) + fewer
    for user in sorted(ledger.stored & users):
        cp.get("user", user)  # damaged ones are errors
    return {
        "statuses": {str(status): n for status, n in sorted(ledger.statuses.items())},
        "unexpected statuses": sorted(ledger.statuses.keys() - EXPECTED - {0}),
        "wrong texts": ledger.wrong[:10],
        "enrolled": len(ledger.stored),
        "forgotten": len(ledger.forgotten),
        "feedback": ledger.feedback.total(),
        "lost": lost,
        "back again": sorted(ledger.forgotten & users),
        "jobs": dict(Counter(job.status for job in jobs)),
        "jobs not finished": [job.id for job in jobs if not job.is_finished],
        "failed jobs": sorted({job.error for job in jobs if job.status == "failed"}),
    }


def found_in_files(folder: Path, users: set[str]) -> list[str]:
    """Users whose texts any file of a database holds."""
    by_secret = {secret_of(user).encode(): user for user in users}
    length = len(secret_of(""))
    users_in_files: set[str] = set()
    for path in folder.rglob("*"):
        if path.is_file():
            for run in re.findall(rb"[0-9a-f]{%d,}" % length, path.read_bytes()):
                parts = {run[i : i + length] for i in range(len(run) - length + 1)}
                users_in_files |= {by_secret[part] for part in parts & by_secret.keys()}
    return sorted(users_in_files)


def page(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    tenants, samples = results["tenants"], results["memory and files"]
    titles = ("tenant", "answers", "broken connections", "unavailable (503)", "wrong texts",
              "enrolled", "forgotten", "feedback", "jobs", "lost", "back again")  # fmt: skip
    rows = [
        line(
            name,
            f"{sum(t['statuses'].values()):,}",
            f"{t['statuses'].get('0', 0):,}",
            f"{t['statuses'].get('503', 0):,}",
            str(len(t["wrong texts"])),
            f"{t['enrolled']:,}",
            f"{t['forgotten']:,}",
            f"{t['feedback']:,}",
            f"{sum(t['jobs'].values()):,}",
            str(len(t["lost"])),
            str(len(t["back again"])),
        )
        for name, t in tenants.items()
    ]
    faults = ", ".join(f"{fault} ({n} times)" for fault, n in results["faults"].items())
    growth = [
        line(f"{sample['seconds'] / 60:.0f}", f"{sample['MiB']:.0f}", f"{sample['files']:.0f}")
        for sample in samples
    ]
    stop = max(results["seconds to stop"], default=0.0)
    return "\n\n".join(
        [
            "# Use with faults",
            f"{results['model']}; {results['seconds'] / 60:.0f} minutes, two servers, a worker and "
            f"PostgreSQL. Written by `{results['command']}` at commit {results['commit']}, "
            f"{results['date']}.",
            f"Faults: {faults}. A server that was told to stop ended within {stop:.1f} s.",
            "\n".join([header(*titles), *rows]),
            "Texts are compared with what the library alone generates; *lost* is what was "
            "acknowledged and is not in the store, *back again* what was forgotten and is. After "
            f"`store purge` texts of {len(results['found in files'])} forgotten users were found "
            "in the database's files.",
            "Memory and open files of the server that ran throughout:",
            "\n".join([header("minute", "MiB", "open files"), *growth]),
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    add_model_options(parser)
    parser.set_defaults(model="tiny")
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--fault-seconds", type=float, default=20, help="between faults")
    options = parser.parse_args(argv)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = folder_of(options, folder / "m")
        url, database = stack.enter_context(postgresql(folder / "data"))
        database.psql("GRANT pg_checkpoint TO app")
        tenants: dict[str, ControlPrefix] = {}
        keys: dict[str, str] = {}
        texts: dict[str, dict[str, str]] = {}
        for i, tenant in enumerate(TENANTS):
            cp = ControlPrefix(load_from(options), PrefixStore(url, tenant=tenant))
            keys[tenant] = cp.store.create_api_key("web")
            for j, user in enumerate(("ana", "bo")):
                slots = Prefix.random(cp.geometry, num_slots=3, scale=2.0, seed=2 * i + j)
                cp.put("user", user, slots)
            requests = [
                Request(prompt="soak", raw=True, max_new_tokens=8, user=user)
                for user in ("ana", "bo")
            ]
            texts[tenant] = {
                str(request.user): completion.text
                for request, completion in zip(requests, cp.generate(requests), strict=True)
            }
            tenants[tenant] = cp
        command = [sys.executable, "-m", "controlprefix.cli"]
        shared = ["--model", model, "--store", url]
        worker = Process([*command, "worker", *shared], folder / "worker.log")
        servers, urls = [], []
        for i in range(2):
            port = free_port()
            urls.append(f"http://127.0.0.1:{port}")
            own = ["--port", str(port), "--no-jobs", "--no-request-log", "--served-model-name", "m"]
            log = folder / f"server{i}.log"
            servers.append(Process([*command, "serve", *shared, *own], log, f"{urls[i]}/ready"))
        for process in (*servers, worker):
            stack.callback(process.stop)
            process.start()
        ledgers = {tenant: Ledger() for tenant in TENANTS}
        clients = [Client(urls, t, keys[t], texts[t], ledgers[t]) for t in TENANTS]
        order = itertools.cycle([*FAULTS * 3, RARE_FAULTS[0], *FAULTS * 3, RARE_FAULTS[1]])
        faults: Counter[str] = Counter()
        seconds_to_stop: list[float] = []
        samples: list[dict[str, float]] = []
        start = time.monotonic()
        with running(clients):
            while (passed := time.monotonic() - start) < options.seconds:
                if not samples or passed - samples[-1]["seconds"] >= options.seconds / 12:
                    samples.append({"seconds": passed, **resources(servers[0])})
                    print(json.dumps(samples[-1]), flush=True)
                fault = next(order)
                seconds = cause(fault, database, servers[1], worker)
                seconds_to_stop += [seconds] if seconds else []
                faults[fault] += 1
                time.sleep(min(options.fault_seconds, options.seconds / 8))
        samples.append({"seconds": time.monotonic() - start, **resources(servers[0])})
        deadline = time.monotonic() + 600
        results = {tenant: checked(ledgers[tenant], cp, deadline) for tenant, cp in tenants.items()}
        for process in (*servers, worker):
            process.stop()
        for cp in tenants.values():
            cp.store.purge()
            cp.store.close()
        database.psql("CHECKPOINT")
        forgotten = set().union(*(ledger.forgotten for ledger in ledgers.values()))
        about = {"model": describe(load_from(options)), "seconds": options.seconds}
        save(
            options.results,
            "soak",
            {
                **about,
                "faults": dict(faults),
                "seconds to stop": seconds_to_stop,
                "tenants": results,
                "found in files": found_in_files(folder / "data" / "base", forgotten),
                "memory and files": samples,
            },
            page,
        )
        bad = ("unexpected statuses", "wrong texts", "lost", "back again", "jobs not finished")
        if any(result[name] for result in results.values() for name in bad):
            raise SystemExit(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
