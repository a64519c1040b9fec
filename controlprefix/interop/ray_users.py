"""Many users on a Ray cluster: actors that each hold one frozen model.

The nodes need this package and the model; the store must be one that all of them reach, such as
PostgreSQL.
"""

import contextlib
import itertools
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Unpack

from controlprefix._io import requires_extra
from controlprefix.attributes import AttributeSpace
from controlprefix.data import Columns, Rows, read_users
from controlprefix.errors import ControlPrefixError, EngineError, TrainingDataError
from controlprefix.evaluation.harness import describe_rows
from controlprefix.evaluation.users import (
    IMPERSONAL_PROMPTS,
    MIN_GROUP_SIZE,
    checked_groups,
    rows_by_user,
    summarize,
)
from controlprefix.evaluation.users_report import UsersEvaluation
from controlprefix.interop.ray_run import (
    Chunk,
    Method,
    Report,
    Run,
    UserActor,
    UserResultsReport,
)
from controlprefix.prefixes import PrefixKey
from controlprefix.store import EncryptionKeys
from controlprefix.store.connections import is_in_memory
from controlprefix.store.urls import full_url, sqlite_path
from controlprefix.training import RunControl, TrainingOptions, TrainingSettings
from controlprefix.users import EnrolmentReport, UsersReport
from controlprefix.users.enrolment import EnrolmentOptions, duplicate_user_message


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
        TrainingDataError: If `num_actors` is below 1, or the store is in memory.
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
        url = full_url(store)
        if is_in_memory(url):
            raise TrainingDataError("each actor would have a database of its own; give a file")
        path = sqlite_path(url)  # actors have other current folders
        opened = {
            "store": store if path is None else str(path.absolute()),
            "tenant": tenant,
            "encryption_keys": encryption_keys,
            "attributes": attributes,
        }
        self._arguments = (os.fspath(model), opened, dict(loading or {}))

    def train_users(
        self,
        texts: Any,
        *,
        num_slots: int | None = None,
        decoder: str | None = None,
        as_codes: bool | None = None,
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
            "options": fields,
            "num_slots": num_slots,
            "decoder": decoder,
            "as_codes": as_codes,
            "concurrent_users": concurrent_users,
        }
        report = UsersReport()
        chunks = _chunks(_users(texts, report.failed), concurrent_users)
        return self._run("train_users", report, chunks, settings, control.progress)

    def enroll_users(
        self,
        texts: Any,
        *,
        decoder: str | None = None,
        refine: bool = False,
        num_slots: int | None = None,
        keep_texts: bool = False,
        keep_profile: bool = False,
        guard: bool = False,
        chunk_size: int = 64,
        progress: bool = True,
    ) -> EnrolmentReport:
        """Enroll each user: `ControlPrefix.enroll_users` by many actors.

        Args:
            texts: As in `train_users`.
            decoder, refine, num_slots, keep_texts, keep_profile, guard: As in
                `ControlPrefix.enroll`.
            chunk_size: Users that an actor is given at a time.
            progress: Show a bar.

        Returns:
            The version of each user; why others failed; in `skipped`, users whose actor died
            after storing them.

        Raises:
            RequestError: If options do not go together.
            EngineError: If the actors cannot start, or die again and again.
        """
        options = EnrolmentOptions(
            decoder=decoder,
            refine=refine,
            num_slots=num_slots,
            keep_texts=keep_texts,
            keep_profile=keep_profile,
            guard=guard,
        )
        report = EnrolmentReport()
        chunks = _chunks(_users(texts, report.failed), chunk_size)
        return self._run("enroll_users", report, chunks, asdict(options), progress)

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
        report = self._run("evaluate_users", UserResultsReport(), chunks, options, progress)
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
        chunks: Iterator[Chunk],
        options: dict[str, Any],
        progress: bool,
    ) -> Report:
        ray, started = self._ray, time.monotonic()
        if not ray.is_initialized():
            ray.init(address=self._address, log_to_driver=False)
        threads = str(max(1, int(self._resources["num_cpus"])))
        environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        remote = ray.remote(**self._resources, runtime_env={"env_vars": environment})(UserActor)

        def start() -> Any:
            return remote.remote(*self._arguments)

        run = Run(ray, start, chunks, report, method, options)
        skipped = run.until_done(self._num_actors, progress)
        seconds = time.monotonic() - started
        return replace(report, skipped=tuple(skipped), seconds=seconds)


def _users(texts: Any, failed: dict[str, str]) -> Iterator[tuple[str, list[str] | str | None]]:
    """Users and their texts; rows of a Ray Dataset are grouped by user first.

    Args:
        texts: As in `RayCluster.train_users`.
        failed: Gets users that come twice; their first texts are used.

    Raises:
        TrainingDataError: If the rows cannot be read.
    """
    if hasattr(texts, "iter_rows") and hasattr(texts, "materialize"):
        texts = list(texts.iter_rows())
    users = read_users(texts)
    earlier: set[PrefixKey] = set()
    for user, own in users.items() if isinstance(users, Mapping) else users:
        with contextlib.suppress(ControlPrefixError):  # invalid names: reported where they are used
            key = PrefixKey("user", user)
            if key in earlier:
                failed[user] = duplicate_user_message(user)
                continue
            earlier.add(key)
        # One text and none are told apart where they are used; others may be read only once.
        yield user, own if own is None or isinstance(own, str) else list(own)


def _chunks(users: Iterable[tuple[str, Any]], size: int) -> Iterator[Chunk]:
    """Users in groups of a size.

    Raises:
        TrainingDataError: If the size is below 1.
    """
    if size < 1:
        raise TrainingDataError(f"{size} users at a time; it must be 1 or more")
    iterator = iter(users)
    while chunk := list(itertools.islice(iterator, size)):
        yield Chunk(chunk)
