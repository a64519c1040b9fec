"""A run over many users by Ray actors: who does what, and what follows when one dies."""

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeVar

import tenacity

from controlprefix._io import progress_bar
from controlprefix.engine import ControlPrefix
from controlprefix.errors import (
    ControlPrefixError,
    EngineError,
    StoreError,
    UnknownNameError,
    short_reason,
)
from controlprefix.evaluation.harness import about_prefixes
from controlprefix.evaluation.users import (
    PlainAnswers,
    plain_answers,
    results_of_users,
)
from controlprefix.evaluation.users_report import UserResult
from controlprefix.training import RunControl
from controlprefix.users import EnrolmentReport, UsersReport
from controlprefix.users.enrolment import EnrolmentOptions, enroll_each

_MAX_ATTEMPTS = 3
_STORE_PAUSE_S = 5.0  # beside the seconds for which each call waits

Method = Literal["train_users", "enroll_users", "evaluate_users"]
Users = list[tuple[str, Any]]


@dataclass
class UserResultsReport:
    """Results of users, in the form of the other reports, and what each chunk was made with."""

    users: dict[str, UserResult] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    seconds: float = 0.0
    about: list[dict[str, Any]] = field(default_factory=list)


Report = TypeVar("Report", UsersReport, EnrolmentReport, UserResultsReport)


@dataclass
class Chunk:
    """Users that one actor is given together.

    Attributes:
        users: Their texts, or their rows.
        versions: Their current versions before, 0 for none.
        num_attempts: How often it was given to an actor.
        reason: Why the last attempt failed.
    """

    users: Users
    versions: dict[str, int] = field(default_factory=dict)
    num_attempts: int = 0
    reason: str = ""


class UserActor:
    """One model, and the store. Its methods run in another process."""

    def __init__(self, model: str, store: dict[str, Any], loading: dict[str, Any]) -> None:
        self._cp = ControlPrefix.from_pretrained(model, **store, **loading)
        self._answers: PlainAnswers | None = None  # the same for all users of a run

    def versions(self, users: Sequence[str]) -> dict[str, int]:
        """The current version of each user; 0 if there is none."""
        return {user: self._version(user) for user in users}

    def last_removal_number(self) -> int:
        """Number of the store's last removal."""
        return self._cp.store.last_removal_number()

    def work(
        self,
        method: Method,
        users: Users,
        versions: Mapping[str, int],
        removal_number: int,
        options: dict[str, Any],
    ) -> tuple[UsersReport | EnrolmentReport | UserResultsReport, list[str]]:
        """Do users, except those that an actor stored before it died; names these.

        Args:
            method: What to do.
            users: Their texts, or their rows.
            versions: Their versions before the first attempt.
            removal_number: The store's last removal before any texts were read; users who were
                forgotten since are not stored.
            options: Arguments of the method.
        """
        if method == "evaluate_users":  # which stores nothing
            if self._answers is None:
                self._answers = plain_answers(self._cp, **options)
            results = results_of_users(self._cp, dict(users), self._answers)
            about = about_prefixes(self._cp, [row for _, own in users for row in own.rows])
            return UserResultsReport(results, about=[about]), []
        stored = [user for user, _ in users if self._version(user) != versions[user]]
        texts = [(user, own) for user, own in users if user not in stored]
        trainer = self._cp._user_trainer
        if method == "train_users":
            control = RunControl(progress=False)
            report = trainer.train_users(
                texts, control=control, removal_number=removal_number, **options
            )
            return report, stored
        if options["decoder"] is not None:
            self._cp.version_info("decoder", options["decoder"])  # fail before any user is read
        enroll = partial(
            trainer.enroll, options=EnrolmentOptions(**options), removal_number=removal_number
        )
        return enroll_each(texts, enroll, progress=False), stored

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
        report: UsersReport | EnrolmentReport | UserResultsReport,
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
        self._removal_number = 0

    def until_done(self, num_actors: int, progress: bool) -> list[str]:
        """Do all users; returns those that were skipped. No actor is left behind.

        Args:
            num_actors: Actors at most.
            progress: Show a bar.

        Raises:
            EngineError: If the actors cannot start.
            StoreError: If the store does not work.
        """
        try:
            return self._until_done(num_actors, progress)
        finally:
            for actor in self._actors:
                self._ray.kill(actor)

    def _until_done(self, num_actors: int, progress: bool) -> list[str]:
        actors = [self._first_actor()]  # before users are read, which may take long
        first = list(itertools.islice(self._chunks, num_actors))
        self._chunks = itertools.chain(first, self._chunks)
        actors += [self._new_actor() for _ in first[1:]]
        with progress_bar("users", None, visible=progress) as update:
            for actor in actors:
                self._give(actor)
            while self._doing:
                (reference,), _ = self._ray.wait(list(self._doing), num_returns=1)
                actor, chunk = self._doing.pop(reference)
                try:
                    report, stored = self._result(reference)
                except (self._ray.exceptions.RayActorError, self._ray.exceptions.OutOfMemoryError):
                    reason = "actors died while they did this user or one beside it"
                    self._put_back(chunk, f"{_MAX_ATTEMPTS} {reason}")
                    actor = self._new_actor()
                except StoreError as error:  # such as a database that is away for long
                    self._put_back_later(chunk, error)
                except self._ray.exceptions.RayTaskError as error:  # such as of a full GPU
                    self._put_back(chunk, short_reason(error))
                else:
                    self._has_results = True
                    self._report.users.update(report.users)
                    self._report.failed.update(report.failed)
                    self._skipped += [*report.skipped, *stored]
                    if isinstance(report, UserResultsReport):
                        self._report.about += report.about
                self._give(actor)
                note = f"{len(self._report.failed)} failed" if self._report.failed else ""
                update(len(self._report.users) + len(self._report.failed), note)
        return self._skipped

    def _give(self, actor: Any) -> None:
        """Give an actor its next users; without any it ends.

        Raises:
            EngineError: If actors die before they begin, as where the model cannot be loaded.
        """
        while (chunk := self._next_chunk()) is not None:
            try:
                if not chunk.num_attempts:
                    chunk.versions = self._versions(actor, chunk)
                elif chunk.num_attempts >= _MAX_ATTEMPTS:
                    self._give_up(actor, chunk)
                    continue
            except self._ray.exceptions.RayActorError as error:
                self._num_dead += 1
                if self._num_dead >= _MAX_ATTEMPTS:
                    raise _cannot_start(error) from error
                self._again.appendleft(chunk)
                actor = self._new_actor()
                continue
            chunk.num_attempts += 1
            reference = actor.work.remote(
                self._method, chunk.users, chunk.versions, self._removal_number, self._options
            )
            self._doing[reference] = (actor, chunk)
            return
        self._ray.kill(actor)

    def _next_chunk(self) -> Chunk | None:
        return self._again.popleft() if self._again else next(self._chunks, None)

    def _give_up(self, actor: Any, chunk: Chunk) -> None:
        """Report users that were tried often enough as failed, without those that are stored."""
        now = self._versions(actor, chunk)
        for user, _ in chunk.users:
            if now.get(user) != chunk.versions.get(user):
                self._skipped.append(user)
            else:
                self._report.failed[user] = chunk.reason

    def _first_actor(self) -> Any:
        """An actor that has started, and told the number of the store's last removal.

        Raises:
            EngineError: If none could begin.
        """
        for attempt in range(1, _MAX_ATTEMPTS + 1):
            actor = self._new_actor()
            try:
                self._removal_number = self._ask(actor.last_removal_number.remote)
                break
            except self._ray.exceptions.RayActorError as error:
                if attempt == _MAX_ATTEMPTS:
                    raise _cannot_start(error) from error
        return actor

    def _versions(self, actor: Any, chunk: Chunk) -> dict[str, int]:
        """The current versions of a chunk's users, if the run stores any; also shows a start."""
        is_stored = self._method != "evaluate_users"
        names = [user for user, _ in chunk.users] if is_stored else []
        versions: dict[str, int] = self._ask(partial(actor.versions.remote, names))
        self._num_dead = 0  # this actor has started
        return versions

    def _ask(self, call: Callable[[], Any]) -> Any:
        """What an actor answers from the store; one that is away is waited for."""
        retry = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(_MAX_ATTEMPTS),
            wait=tenacity.wait_fixed(_STORE_PAUSE_S),
            retry=tenacity.retry_if_exception_type(StoreError),
            reraise=True,
        )
        return retry(lambda: self._result(call()))

    def _result(self, reference: Any) -> Any:
        """What an actor returns, or its own error in place of ray's, whose text is a traceback."""
        try:
            return self._ray.get(reference)
        except ControlPrefixError as error:
            raise getattr(error, "cause", error) from None

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
        """Do users again later, or report them then if they were tried often enough."""
        chunk.reason = reason
        self._again.append(chunk)

    def _new_actor(self) -> Any:
        self._actors.append(self._start())
        return self._actors[-1]


def _cannot_start(error: Exception) -> EngineError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return EngineError(f"the actors cannot start: {lines[-1]}")
