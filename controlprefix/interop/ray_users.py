"""Training many users on a Ray cluster: actors that each hold one frozen model.

The nodes need this package and the model; the store must be one that all of them reach, such as
PostgreSQL.
"""

import itertools
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Unpack

from controlprefix._io import progress_bar, requires_extra
from controlprefix.data import read_users
from controlprefix.engine import ControlPrefix
from controlprefix.errors import EngineError, TrainingDataError, UnknownNameError
from controlprefix.store import EncryptionKeys
from controlprefix.training import RunControl, TrainingOptions, TrainingSettings
from controlprefix.users import UsersReport

_MAX_ATTEMPTS = 3

Users = list[tuple[str, list[str]]]


@dataclass
class _Chunk:
    """Users that one actor trains together.

    Attributes:
        users: Their texts.
        versions: Their current versions before, 0 for none.
        num_attempts: How often it was given to an actor.
    """

    users: Users
    versions: dict[str, int] = field(default_factory=dict)
    num_attempts: int = 0


class _Trainer:
    """An actor: one model, and the store. Its methods run in another process."""

    def __init__(self, model: str, store: dict[str, Any], loading: dict[str, Any]) -> None:
        self._cp = ControlPrefix.from_pretrained(model, **store, **loading)

    def versions(self, users: Sequence[str]) -> dict[str, int]:
        """The current version of each user; 0 if there is none."""
        return {user: self._version(user) for user in users}

    def train(
        self, users: Users, versions: Mapping[str, int], options: dict[str, Any]
    ) -> tuple[UsersReport, list[str]]:
        """Train users, except those that an actor stored before it died; returns their names."""
        stored = [user for user, _ in users if self._version(user) != versions[user]]
        texts = [(user, own) for user, own in users if user not in stored]
        report = self._cp.train_users(texts, progress=False, **options)
        return report, stored

    def _version(self, user: str) -> int:
        try:
            versions = self._cp.versions("user", user)
        except UnknownNameError:
            return 0
        return next(info.version for info in versions if info.current)


def train_users(
    texts: Any,
    *,
    model: str | os.PathLike[str] = "smollm2",
    store: str,
    tenant: str = "default",
    encryption_keys: EncryptionKeys | None = None,
    address: str | None = None,
    num_actors: int = 2,
    cpus_per_actor: float = 1,
    gpus_per_actor: float = 0,
    concurrent_users: int = 16,
    num_slots: int = 16,
    decoder: str | None = None,
    as_codes: bool = True,
    loading: Mapping[str, Any] | None = None,
    **options: Unpack[TrainingOptions],
) -> UsersReport:
    """Train a prefix for each user on a Ray cluster: `ControlPrefix.train_users` by many actors.

    Users are drawn from `texts` as actors are free, so there may be millions. Each is stored as
    soon as it is finished. What an actor had when it was killed is done by another, without the
    users that it had stored.

    Args:
        texts: As in `ControlPrefix.train_users`, or a Ray Dataset of rows with a user and a text;
            pairs of a user and texts are consumed one by one.
        model: Name or folder that every node can load.
        store: SQLAlchemy URL that every node reaches.
        tenant, encryption_keys: As in `ControlPrefix.from_pretrained`.
        address: Address of the cluster, such as `auto` or `ray://host:10001`; left out, the one
            that is connected, or a cluster of this machine.
        num_actors: Processes, each with a model.
        cpus_per_actor, gpus_per_actor: What each gets; CPUs are its threads.
        concurrent_users: Users that an actor trains at a time.
        num_slots, decoder, as_codes: As in `ControlPrefix.train_users`.
        loading: Options of `controlprefix.model.loading.load`, such as `{"device": "cuda"}`.
        **options: Fields of `TrainingSettings`, for each user, and `progress`.

    Returns:
        A report per user; why others failed; in `skipped`, users whose actor died after storing
        them.

    Raises:
        TrainingDataError: If an option is invalid.
        EngineError: If the actors cannot start, or die again and again.
        MissingDependencyError: If ray is not installed.
    """
    with requires_extra("ray", "a Ray cluster"):
        import ray
    if num_actors < 1 or concurrent_users < 1:
        raise TrainingDataError("num_actors and concurrent_users must be 1 or more")
    control, fields = RunControl.split_off(options)
    if control != RunControl(progress=control.progress):
        raise TrainingDataError(
            "a run on a cluster has no folder, tracker or callbacks; what is "
            "finished is in the store"
        )
    TrainingSettings.from_options(fields)  # a mistake is told before models are loaded
    if not ray.is_initialized():
        ray.init(address=address, log_to_driver=False)
    settings = {
        **fields,
        "num_slots": num_slots,
        "decoder": decoder,
        "as_codes": as_codes,
        "concurrent_users": concurrent_users,
    }
    threads = str(max(1, int(cpus_per_actor)))
    remote = ray.remote(
        num_cpus=cpus_per_actor,
        num_gpus=gpus_per_actor,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}},
    )(_Trainer)
    opened = {"store": store, "tenant": tenant, "encryption_keys": encryption_keys}

    def start() -> Any:
        return remote.remote(os.fspath(model), opened, dict(loading or {}))

    started = time.monotonic()
    chunks = _chunks(texts, concurrent_users)
    first = list(itertools.islice(chunks, num_actors))
    run = _Run(ray, start, itertools.chain(first, chunks), settings)
    return run.until_done(max(1, len(first)), started, control.progress)


class _Run:
    """One run: the actors, what each does, and the report."""

    def __init__(
        self, ray: Any, start: Any, chunks: Iterator[_Chunk], options: dict[str, Any]
    ) -> None:
        self._ray, self._start, self._options = ray, start, options
        self._chunks = chunks
        self._again: deque[_Chunk] = deque()
        self._doing: dict[Any, tuple[Any, _Chunk]] = {}  # by reference: the actor and its chunk
        self._report = UsersReport()
        self._skipped: list[str] = []
        self._num_dead = 0

    def until_done(self, num_actors: int, started: float, progress: bool) -> UsersReport:
        """Train all users."""
        actors = [self._start() for _ in range(num_actors)]
        with progress_bar("users", None, visible=progress) as update:
            for actor in actors:
                self._give(actor)
            while self._doing:
                (reference,), _ = self._ray.wait(list(self._doing), num_returns=1)
                actor, chunk = self._doing.pop(reference)
                try:
                    report, stored = self._ray.get(reference)
                except self._ray.exceptions.RayActorError as error:
                    actor = self._replaced(chunk, error)
                else:
                    self._report.users.update(report.users)
                    self._report.failed.update(report.failed)
                    self._skipped += [*report.skipped, *stored]
                self._give(actor)
                note = f"{len(self._report.failed)} failed" if self._report.failed else ""
                update(len(self._report.users) + len(self._report.failed), note)
        return UsersReport(
            self._report.users,
            self._report.failed,
            tuple(self._skipped),
            time.monotonic() - started,
        )

    def _give(self, actor: Any) -> None:
        """Give an actor its next users; without any it ends."""
        chunk = self._again.popleft() if self._again else next(self._chunks, None)
        if chunk is None:
            self._ray.kill(actor)
            return
        try:
            if not chunk.num_attempts:
                names = [user for user, _ in chunk.users]
                chunk.versions = self._ray.get(actor.versions.remote(names))
        except self._ray.exceptions.RayActorError as error:
            self._give(self._replaced(chunk, error))
            return
        chunk.num_attempts += 1
        reference = actor.train.remote(chunk.users, chunk.versions, self._options)
        self._doing[reference] = (actor, chunk)

    def _replaced(self, chunk: _Chunk, error: Exception) -> Any:
        """A new actor in place of one that died with some users.

        Raises:
            EngineError: If none could begin, as where the model cannot be loaded.
        """
        self._num_dead += 1
        began = bool(chunk.num_attempts or self._report.users or self._report.failed)
        if not began and self._num_dead >= _MAX_ATTEMPTS:
            reason = str(error).strip().splitlines()[-1]
            raise EngineError(f"the actors cannot start: {reason}") from error
        if chunk.num_attempts >= _MAX_ATTEMPTS:
            reason = f"{_MAX_ATTEMPTS} actors died while they trained this user or one beside it"
            self._report.failed.update((user, reason) for user, _ in chunk.users)
        else:
            self._again.append(chunk)
        return self._start()


def _chunks(texts: Any, size: int) -> Iterator[_Chunk]:
    """Users by so many; rows of a Ray Dataset are grouped by user first."""
    if hasattr(texts, "iter_rows") and hasattr(texts, "materialize"):
        texts = list(texts.iter_rows())
    users = read_users(texts)
    pairs: Iterable[tuple[str, Sequence[str]]] = (
        users.items() if isinstance(users, Mapping) else users
    )
    iterator = iter(pairs)
    while chunk := [(user, list(own)) for user, own in itertools.islice(iterator, size)]:
        yield _Chunk(chunk)
