"""A run over many users by Ray actors: who does what, and what follows when one dies."""

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import tenacity

from controlprefix._io import progress_bar
from controlprefix.engine import ControlPrefix
from controlprefix.errors import EngineError, StoreError, UnknownNameError
from controlprefix.evaluation.harness import about_prefixes
from controlprefix.evaluation.users import (
    PlainAnswers,
    plain_answers,
    results_of_users,
)
from controlprefix.evaluation.users_report import UserResult
from controlprefix.users import EnrolmentReport, UsersReport

_MAX_ATTEMPTS = 3
_STORE_PAUSE_S = 5.0  # beside the seconds for which each call waits

Method = Literal["train_users", "enroll_users", "evaluate_users"]
Users = list[tuple[str, Any]]


@dataclass
class EvaluationReport:
    """Results of users, in the form of the other reports, and what each chunk was made with."""

    users: dict[str, UserResult] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    seconds: float = 0.0
    about: list[dict[str, Any]] = field(default_factory=list)


Report = TypeVar("Report", UsersReport, EnrolmentReport, EvaluationReport)


@dataclass
class Chunk:
    """Users that one actor is given together.

    Attributes:
        users: Their texts, or their rows.
        versions: Their current versions before, 0 for none.
        num_attempts: How often it was given to an actor.
    """

    users: Users
    versions: dict[str, int] = field(default_factory=dict)
    num_attempts: int = 0


class UserActor:
    """One model, and the store. Its methods run in another process."""

    def __init__(self, model: str, store: dict[str, Any], loading: dict[str, Any]) -> None:
        self._cp = ControlPrefix.from_pretrained(model, **store, **loading)
        self._answers: PlainAnswers | None = None  # the same for all users of a run

    def versions(self, users: Sequence[str]) -> dict[str, int]:
        """The current version of each user; 0 if there is none."""
        return {user: self._version(user) for user in users}

    def work(
        self, method: Method, users: Users, versions: Mapping[str, int], options: dict[str, Any]
    ) -> tuple[UsersReport | EnrolmentReport | EvaluationReport, list[str]]:
        """Do users, except those that an actor stored before it died; names these."""
        if method == "evaluate_users":  # which stores nothing
            if self._answers is None:
                self._answers = plain_answers(self._cp, **options)
            results = results_of_users(self._cp, dict(users), self._answers)
            about = about_prefixes(self._cp, [row for _, own in users for row in own.rows])
            return EvaluationReport(results, about=[about]), []
        stored = [user for user, _ in users if self._version(user) != versions[user]]
        texts = [(user, own) for user, own in users if user not in stored]
        report = getattr(self._cp, method)(texts, progress=False, **options)
        return report, stored

    def _version(self, user: str) -> int:
        try:
            return self._cp.version_info("user", user).version
        except UnknownNameError:
            return 0


class Run:
    """One run: the actors, what each does, and the report."""

    def __init__(
        self,
        ray: Any,
        start: Any,
        chunks: Iterator[Chunk],
        report: UsersReport | EnrolmentReport | EvaluationReport,
        method: Method,
        options: dict[str, Any],
    ) -> None:
        self._ray, self._start, self._method, self._options = ray, start, method, options
        self._chunks = chunks
        self._actors: list[Any] = []  # all that were started
        self._again: deque[Chunk] = deque()
        self._doing: dict[Any, tuple[Any, Chunk]] = {}  # by reference: the actor and its chunk
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
                    if isinstance(report, EvaluationReport):
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

    def _replaced(self, chunk: Chunk, error: Exception) -> Any:
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

    def _put_back_later(self, chunk: Chunk, error: StoreError) -> None:
        """Do users again after a pause, unless the store never worked.

        Raises:
            StoreError: If no chunk was done before the last attempt.
        """
        if chunk.num_attempts >= _MAX_ATTEMPTS and not self._has_results:
            raise error
        self._put_back(chunk, str(error))
        time.sleep(_STORE_PAUSE_S)

    def _put_back(self, chunk: Chunk, reason: str) -> None:
        """Do users again later, or report them if they were tried often enough."""
        if chunk.num_attempts >= _MAX_ATTEMPTS:
            self._report.failed.update((user, reason) for user, _ in chunk.users)
        else:
            self._again.append(chunk)

    def _new_actor(self) -> Any:
        self._actors.append(self._start())
        return self._actors[-1]
