"""Many users on a Ray cluster: actors that each hold one frozen model.

The nodes need this package and the model; the store must be one that all of them reach, such as
PostgreSQL.
"""

import itertools
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar, Unpack

import tenacity

from controlprefix._io import progress_bar, requires_extra
from controlprefix.attributes import AttributeSpace
from controlprefix.data import Columns, Rows, read_users
from controlprefix.engine import ControlPrefix
from controlprefix.errors import EngineError, StoreError, TrainingDataError, UnknownNameError
from controlprefix.evaluation.harness import about_prefixes, describe_rows
from controlprefix.evaluation.users import (
    IMPERSONAL_PROMPTS,
    MIN_GROUP_SIZE,
    PlainAnswers,
    checked_groups,
    plain_answers,
    results_of_users,
    rows_by_user,
    summarize,
)
from controlprefix.evaluation.users_report import UserResult, UsersEvaluation
from controlprefix.store import EncryptionKeys
from controlprefix.training import RunControl, TrainingOptions, TrainingSettings
from controlprefix.users import EnrolmentReport, UsersReport

_MAX_ATTEMPTS = 3
_STORE_PAUSE_S = 5.0  # beside the seconds for which each call waits

Method = Literal["train_users", "enroll_users", "evaluate_users"]
Users = list[tuple[str, Any]]


@dataclass
class _EvaluationReport:
    """Results of users, in the form of the other reports, and what each chunk was made with."""

    users: dict[str, UserResult] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    seconds: float = 0.0
    about: list[dict[str, Any]] = field(default_factory=list)


Report = TypeVar("Report", UsersReport, EnrolmentReport, _EvaluationReport)


@dataclass
class _Chunk:
    """Users that one actor is given together.

    Attributes:
        users: Their texts, or their rows.
        versions: Their current versions before, 0 for none.
        num_attempts: How often it was given to an actor.
    """

    users: Users
    versions: dict[str, int] = field(default_factory=dict)
    num_attempts: int = 0


class _Actor:
    """One model, and the store. Its methods run in another process."""

    def __init__(self, model: str, store: dict[str, Any], loading: dict[str, Any]) -> None:
        self._cp = ControlPrefix.from_pretrained(model, **store, **loading)
        self._answers: PlainAnswers | None = None  # the same for all users of a run

    def versions(self, users: Sequence[str]) -> dict[str, int]:
        """The current version of each user; 0 if there is none."""
        return {user: self._version(user) for user in users}

    def work(
        self, method: Method, users: Users, versions: Mapping[str, int], options: dict[str, Any]
    ) -> tuple[UsersReport | EnrolmentReport | _EvaluationReport, list[str]]:
        """Do users, except those that an actor stored before it died; names these."""
        if method == "evaluate_users":  # which stores nothing
            if self._answers is None:
                self._answers = plain_answers(self._cp, **options)
            results = results_of_users(self._cp, dict(users), self._answers)
            about = about_prefixes(self._cp, [row for _, own in users for row in own.rows])
            return _EvaluationReport(results, about=[about]), []
        stored = [user for user, _ in users if self._version(user) != versions[user]]
        texts = [(user, own) for user, own in users if user not in stored]
        report = getattr(self._cp, method)(texts, progress=False, **options)
        return report, stored

    def _version(self, user: str) -> int:
        try:
            return self._cp.version_info("user", user).version
        except UnknownNameError:
            return 0


class RayCluster:
    """Trains, enrolls or evaluates many users by actors on a Ray cluster.

    Users are drawn from `texts` as actors are free, so there may be millions. Each is stored as
    soon as it is finished. What an actor had when it was killed is done by another, without the
    users that it had stored.

    Args:
        model: Name or folder that every node can load.
        store: SQLAlchemy URL that every node reaches.
        tenant, encryption_keys, attributes: As in `ControlPrefix.from_pretrained`.
        address: Address of the cluster, such as `auto` or `ray://host:10001`; left out, the one
            that is connected, or a cluster of this machine.
        num_actors: Processes, each with a model.
        cpus_per_actor, gpus_per_actor: What each gets; CPUs are its threads.
        loading: Options of `controlprefix.model.loading.load`, such as `{"device": "cuda"}`.

    Raises:
        TrainingDataError: If `num_actors` is below 1.
        MissingDependencyError: If ray is not installed.
    """

    def __init__(
        self,
        *,
        model: str | os.PathLike[str] = "smollm2",
        store: str,
        tenant: str = "default",
        encryption_keys: EncryptionKeys | None = None,
        attributes: AttributeSpace | None = None,
        address: str | None = None,
        num_actors: int = 2,
        cpus_per_actor: float = 1,
        gpus_per_actor: float = 0,
        loading: Mapping[str, Any] | None = None,
    ) -> None:
        with requires_extra("ray", "a Ray cluster"):
            import ray
        if num_actors < 1:
            raise TrainingDataError(f"num_actors is {num_actors}; it must be 1 or more")
        self._ray, self._address, self._num_actors = ray, address, num_actors
        self._resources = {"num_cpus": cpus_per_actor, "num_gpus": gpus_per_actor}
        opened = {
            "store": store,
            "tenant": tenant,
            "encryption_keys": encryption_keys,
            "attributes": attributes,
        }
        self._arguments = (os.fspath(model), opened, dict(loading or {}))

    def train_users(
        self,
        texts: Any,
        *,
        num_slots: int = 16,
        decoder: str | None = None,
        as_codes: bool = True,
        concurrent_users: int = 16,
        **options: Unpack[TrainingOptions],
    ) -> UsersReport:
        """Train a prefix for each user: `ControlPrefix.train_users` by many actors.

        Args:
            texts: As in `ControlPrefix.train_users`, or a Ray Dataset of rows with a user and a
                text; pairs of a user and texts are consumed one by one.
            num_slots, decoder, as_codes: As in `ControlPrefix.train_users`.
            concurrent_users: Users that an actor trains at a time.
            **options: Fields of `TrainingSettings`, for each user, and `progress`.

        Returns:
            A report per user; why others failed; in `skipped`, users whose actor died after
            storing them.

        Raises:
            TrainingDataError: If an option is invalid.
            EngineError: If the actors cannot start, or die again and again.
        """
        control, fields = RunControl.split_off(options)
        if control != RunControl(progress=control.progress):
            raise TrainingDataError(
                "a run on a cluster has no folder, tracker or callbacks; what is "
                "finished is in the store"
            )
        TrainingSettings.from_options(fields)  # fail before models are loaded
        settings = {
            **fields,
            "num_slots": num_slots,
            "decoder": decoder,
            "as_codes": as_codes,
            "concurrent_users": concurrent_users,
        }
        chunks = _chunks(_users(texts), concurrent_users)
        return self._run("train_users", UsersReport(), chunks, settings, control.progress)

    def enroll_users(
        self, texts: Any, *, chunk_size: int = 64, progress: bool = True, **options: Any
    ) -> EnrolmentReport:
        """Enroll each user: `ControlPrefix.enroll_users` by many actors.

        Args:
            texts: As in `train_users`.
            chunk_size: Users that an actor is given at a time.
            progress: Show a bar.
            **options: Options of `ControlPrefix.enroll_users`, such as `decoder`.

        Returns:
            The version of each user; why others failed; in `skipped`, users whose actor died
            after storing them.

        Raises:
            TypeError: If there is no such option.
            EngineError: If the actors cannot start, or die again and again.
        """
        chunks = _chunks(_users(texts), chunk_size)
        return self._run("enroll_users", EnrolmentReport(), chunks, options, progress)

    def evaluate_users(
        self,
        rows: Rows,
        *,
        columns: Columns | None = None,
        groups: Mapping[str, Mapping[str, str]] | None = None,
        min_group_size: int = MIN_GROUP_SIZE,
        prompts: Sequence[str] = IMPERSONAL_PROMPTS,
        seed: int = 0,
        chunk_size: int = 64,
        progress: bool = True,
    ) -> UsersEvaluation:
        """Measure for whom prefixes work: `controlprefix.evaluation.evaluate_users` by many actors.

        Args:
            rows, columns, groups, min_group_size, prompts, seed: As in `evaluate_users`.
            chunk_size: Users that an actor is given at a time.
            progress: Show a bar.

        Raises:
            TrainingDataError: If there are rows of fewer than two users, or `groups` is not
                a mapping of groupings to groups of users.
            UnknownNameError: If a user has no prefix.
            EngineError: If the actors cannot start, or die again and again.
        """
        own_groups = checked_groups(groups or {}, min_group_size)
        users = rows_by_user(rows, columns=columns, seed=seed)
        chunks = _chunks(users.items(), chunk_size)
        options = {"prompts": tuple(prompts)}
        report = self._run("evaluate_users", _EvaluationReport(), chunks, options, progress)
        if report.failed:
            user, reason = next(iter(report.failed.items()))
            raise EngineError(f"{len(report.failed)} users, such as {user!r}: {reason}")
        about = {
            **report.about[0],
            "data": describe_rows([row for own in users.values() for row in own.rows]),
            "prefixes": sorted({name for chunk in report.about for name in chunk["prefixes"]}),
        }
        return summarize(report.users, own_groups, min_group_size, about)

    def _run(
        self,
        method: Method,
        report: Report,
        chunks: Iterator[_Chunk],
        options: dict[str, Any],
        progress: bool,
    ) -> Report:
        ray, started = self._ray, time.monotonic()
        first = list(itertools.islice(chunks, self._num_actors))
        if not ray.is_initialized():
            ray.init(address=self._address, log_to_driver=False)
        threads = str(max(1, int(self._resources["num_cpus"])))
        environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        remote = ray.remote(**self._resources, runtime_env={"env_vars": environment})(_Actor)

        def start() -> Any:
            return remote.remote(*self._arguments)

        run = _Run(ray, start, itertools.chain(first, chunks), report, method, options)
        skipped = run.until_done(max(1, len(first)), progress)
        seconds = time.monotonic() - started
        return replace(report, skipped=tuple(skipped), seconds=seconds)


class _Run:
    """One run: the actors, what each does, and the report."""

    def __init__(
        self,
        ray: Any,
        start: Any,
        chunks: Iterator[_Chunk],
        report: UsersReport | EnrolmentReport | _EvaluationReport,
        method: Method,
        options: dict[str, Any],
    ) -> None:
        self._ray, self._start, self._method, self._options = ray, start, method, options
        self._chunks = chunks
        self._actors: list[Any] = []  # all that were started
        self._again: deque[_Chunk] = deque()
        self._doing: dict[Any, tuple[Any, _Chunk]] = {}  # by reference: the actor and its chunk
        self._report: Any = report
        self._skipped: list[str] = []
        self._num_dead = 0
        self._has_results = False

    def until_done(self, num_actors: int, progress: bool) -> list[str]:
        """Do all users; returns those that were skipped. No actor is left behind."""
        try:
            return self._until_done(num_actors, progress)
        finally:
            for actor in self._actors:
                self._ray.kill(actor)

    def _until_done(self, num_actors: int, progress: bool) -> list[str]:
        actors = [self._new_actor() for _ in range(num_actors)]
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
                except StoreError as error:  # such as a database that is away for long
                    self._put_back_later(chunk, error)
                else:
                    self._has_results = True
                    self._report.users.update(report.users)
                    self._report.failed.update(report.failed)
                    self._skipped += [*report.skipped, *stored]
                    if isinstance(report, _EvaluationReport):
                        self._report.about += report.about
                self._give(actor)
                note = f"{len(self._report.failed)} failed" if self._report.failed else ""
                update(len(self._report.users) + len(self._report.failed), note)
        return self._skipped

    def _give(self, actor: Any) -> None:
        """Give an actor its next users; without any it ends."""
        chunk = self._again.popleft() if self._again else next(self._chunks, None)
        if chunk is None:
            self._ray.kill(actor)
            return
        try:
            if not chunk.num_attempts:
                is_stored = self._method != "evaluate_users"
                names = [user for user, _ in chunk.users] if is_stored else []
                chunk.versions = self._versions(actor, names)
                self._num_dead = 0  # this actor has started
        except self._ray.exceptions.RayActorError as error:
            self._give(self._replaced(chunk, error))
            return
        chunk.num_attempts += 1
        reference = actor.work.remote(self._method, chunk.users, chunk.versions, self._options)
        self._doing[reference] = (actor, chunk)

    def _replaced(self, chunk: _Chunk, error: Exception) -> Any:
        """A new actor in place of one that died with some users.

        Raises:
            EngineError: If none could begin, as where the model cannot be loaded.
        """
        self._num_dead += 1
        if not chunk.num_attempts and self._num_dead >= _MAX_ATTEMPTS:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise EngineError(f"the actors cannot start: {lines[-1]}") from error
        self._put_back(
            chunk, f"{_MAX_ATTEMPTS} actors died while they did this user or one beside it"
        )
        return self._new_actor()

    def _versions(self, actor: Any, names: Sequence[str]) -> Any:
        """The users' current versions; a store that is away is waited for."""
        retry = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(_MAX_ATTEMPTS),
            wait=tenacity.wait_fixed(_STORE_PAUSE_S),
            retry=tenacity.retry_if_exception_type(StoreError),
            reraise=True,
        )
        return retry(lambda: self._ray.get(actor.versions.remote(names)))

    def _put_back_later(self, chunk: _Chunk, error: StoreError) -> None:
        """Do users again after a pause, unless the store never worked.

        Raises:
            StoreError: If no chunk was done before the last attempt.
        """
        if chunk.num_attempts >= _MAX_ATTEMPTS and not self._has_results:
            raise error
        self._put_back(chunk, str(error))
        time.sleep(_STORE_PAUSE_S)

    def _put_back(self, chunk: _Chunk, reason: str) -> None:
        """Do users again later, or report them if they were tried often enough."""
        if chunk.num_attempts >= _MAX_ATTEMPTS:
            self._report.failed.update((user, reason) for user, _ in chunk.users)
        else:
            self._again.append(chunk)

    def _new_actor(self) -> Any:
        self._actors.append(self._start())
        return self._actors[-1]


def _users(texts: Any) -> Iterator[tuple[str, list[str] | str | None]]:
    """Users and their texts; rows of a Ray Dataset are grouped by user first.

    Raises:
        TrainingDataError: If the rows cannot be read.
    """
    if hasattr(texts, "iter_rows") and hasattr(texts, "materialize"):
        texts = list(texts.iter_rows())
    users = read_users(texts)
    for user, own in users.items() if isinstance(users, Mapping) else users:
        # One text and none are told apart where they are used; others may be read only once.
        yield user, own if own is None or isinstance(own, str) else list(own)


def _chunks(users: Iterable[tuple[str, Any]], size: int) -> Iterator[_Chunk]:
    """Users in groups of a size.

    Raises:
        TrainingDataError: If the size is below 1.
    """
    if size < 1:
        raise TrainingDataError(f"{size} users at a time; it must be 1 or more")
    iterator = iter(users)
    while chunk := list(itertools.islice(iterator, size)):
        yield _Chunk(chunk)
