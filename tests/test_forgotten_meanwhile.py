"""Users who are forgotten while something is made of their texts."""

import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from controlprefix import ControlPrefix, Example, ForgottenError, Prefix, UnknownNameError
from controlprefix.engine import rebinding
from controlprefix.interop.ray_run import Method, UserActor
from controlprefix.model.fingerprint import first_fingerprint
from controlprefix.prefixes import PrefixKey
from controlprefix.store import NewVersion, PrefixStore, version_links
from controlprefix.training import StepInfo
from controlprefix.users import user_trainer, user_training

from helpers import Keys, engine

ANA, BO = PrefixKey("user", "ana"), PrefixKey("user", "bo")
OPTIONS: dict[str, Any] = {"steps": 2, "num_slots": 2, "progress": False, "validation": 0.0}


def rows() -> list[Example]:
    return [
        Example(prompt=f"Write {i}", completion=f"Text {i}", task="email", user=user)
        for i in range(4)
        for user in ("ana", "bo")
    ]


def test_only_a_user_who_was_forgotten_since_is_not_stored() -> None:
    cp = engine()
    prefix = cp.prefix_from_text("a text")
    for _ in range(3):
        cp.put("user", "ana", prefix)
    cp.put("user", "bo", prefix)
    removal_number = cp.store.last_removal_number()
    cp.store.prune(keep=1)
    cp.store.forget(BO)
    assert cp.store.last_removal_number(forgotten="bo") > removal_number
    assert cp.store.last_removal_number(forgotten="ana") == 0
    assert cp.store.put([NewVersion(ANA, prefix)], removal_number=removal_number) == [4]
    both = [NewVersion(ANA, prefix), NewVersion(BO, prefix, texts=("mine",))]
    with pytest.raises(ForgottenError, match="'bo' was forgotten") as raised:
        cp.store.put(both, removal_number=removal_number)
    assert raised.value.user == "bo"
    assert cp.version_info("user", "ana").version == 4  # all or none
    assert not cp.exists("user", "bo")
    assert not cp.store.user_texts("bo")
    assert cp.store.put(both, removal_number=cp.store.last_removal_number()) == [5, 1]


def test_a_user_with_nothing_stored_yet_is_not_stored_by_a_run_under_way() -> None:
    cp = engine()
    prefix = cp.prefix_from_text("a text")
    removal_number = cp.store.last_removal_number()
    for key in (ANA, PrefixKey("task", "email")):
        with pytest.raises(UnknownNameError, match=key.name):
            cp.store.forget(key)
    assert [(entry.key, entry.num_versions) for entry in cp.store.audit_log()] == [(ANA, 0)]
    with pytest.raises(ForgottenError, match="'ana' was forgotten"):
        cp.store.put([NewVersion(ANA, prefix)], removal_number=removal_number)
    cp.put("user", "ana", prefix)  # enrolled again later
    assert cp.exists("user", "ana")


def test_what_is_learned_from_a_forgotten_user_is_marked_and_does_not_name_them() -> None:
    cp = engine()
    cp.put("user", "bo", cp.prefix_from_text("a text"))

    def forget(info: StepInfo) -> None:
        if info.step == 1:
            cp.forget_user("bo")

    cp.train(rows(), learn="task", on_step=forget, **OPTIONS)
    assert cp.version_info("task", "email").num_forgotten == 1
    cp.store.forget(ANA)  # who is named as a source
    assert cp.version_info("task", "email").num_forgotten == 2


def test_a_user_whose_name_is_typed_in_another_way_is_forgotten_too() -> None:
    cp = engine()
    composed, decomposed = "Jos\u00e9", "Jose\u0301"
    cp.put("user", composed, cp.prefix_from_text("a text"))
    named = [row.model_copy(update={"user": decomposed}) for row in rows()]
    cp.train(named, learn="task", **OPTIONS)
    cp.forget_user(composed)
    assert cp.version_info("task", "email").num_forgotten == 1


@pytest.mark.parametrize("form", [dict, list])
def test_users_forgotten_before_their_turn_or_while_feedback_is_read_stay_forgotten(
    form: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cp = engine()
    usable = user_training.usable_texts

    def slowly(user: str, texts: list[str]) -> list[str]:
        _forget_once(cp, "bo")
        return usable(user, texts)

    cp.put("user", "bo", cp.prefix_from_text("a text"))
    monkeypatch.setattr(user_trainer, "usable_texts", slowly)
    users = form([("ana", ["a text"]), ("bo", ["a text"])])
    report = cp.enroll_users(users, keep_texts=True)
    assert "forgotten meanwhile" in report.failed["bo"]
    assert not cp.exists("user", "bo")
    assert not cp.store.user_texts("bo")

    row = {"prompt": "Greet.", "chosen": "hey", "rejected": "Good day."}
    cp.keep_feedback([{**row, "user": user} for user in ("ana", "bo") for _ in range(2)])
    feedback = cp.feedback

    def forgetting(user: str) -> Any:
        rows_of_user = feedback(user)
        if user == "bo":
            cp.forget_user("bo")
        return rows_of_user

    monkeypatch.setattr(cp, "feedback", forgetting)
    assert cp.train_preferences(**OPTIONS).saved == {"user 'ana'": 2}
    assert not cp.exists("user", "bo")


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"add": True, "decoder": "users"}, {"refine": True}])
def test_the_error_of_an_enrolment_says_that_the_user_was_forgotten(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cp = engine()
    users = {f"u{i}": [f"text {i}", f"another {i}"] for i in range(4)}
    cp.learn_decoder(users, steps=1, batch_size=2, num_slots=2, progress=False)
    cp.enroll("ana", ["a text"], decoder="users")
    put = cp.store.put

    def late(*arguments: Any, **named: Any) -> Any:
        _forget_once(cp, "ana")
        return put(*arguments, **named)

    monkeypatch.setattr(cp.store, "put", late)
    with pytest.raises(ForgottenError):
        cp.enroll("ana", ["more"], **options)
    assert not cp.exists("user", "ana")


def test_others_are_stored_where_one_is_forgotten_while_all_train() -> None:
    cp = engine()
    cp.put("task", "email", cp.prefix_from_text("a task"))
    cp.put("user", "bo", cp.prefix_from_text("a text"))
    report = cp.train(rows(), learn="user", on_step=lambda info: _forget_once(cp, "bo"), **OPTIONS)
    assert report.saved == {"user 'ana'": 1}
    assert cp.names("user") == ["ana"]


def test_users_forgotten_while_they_train_or_are_enrolled_stay_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cp = engine()
    cp.put("user", "ana", cp.prefix_from_text("a text"))
    usable = user_training.usable_texts

    def slowly(user: str, texts: list[str]) -> list[str]:
        _forget_once(cp, user)
        return usable(user, texts)

    monkeypatch.setattr(user_trainer, "usable_texts", slowly)
    with pytest.raises(ForgottenError):
        cp.enroll("ana", ["a text"], keep_texts=True)
    assert not cp.exists("user", "ana")
    assert not cp.store.user_texts("ana")
    monkeypatch.undo()
    assert cp.enroll("ana", ["a text"]) == 1

    def texts(user: str) -> list[str]:
        if user == "ana":
            _forget_once(cp, "ana")
        return ["one text", "another text"]

    pairs = ((user, texts(user)) for user in ("bo", "ana"))
    users = cp.train_users(pairs, concurrent_users=1, **OPTIONS)
    assert "forgotten meanwhile" in users.failed["ana"]
    assert list(users.users) == ["bo"]


def test_publishing_reads_no_kept_texts_of_others(tmp_path: Path) -> None:
    cp = engine()
    prefix = cp.prefix_from_text("a text")
    url = str(tmp_path / "a.db")
    keys = Keys(tmp_path / "keys.json")
    keys.use("k1")
    with PrefixStore(url, tenant="mine", encryption_keys=keys) as store:
        store.keep_texts("email", ["mine"])
    del keys.keys["k1"]
    keys.use("k2")
    with PrefixStore(url, tenant="mine", encryption_keys=keys) as store:
        for kind in ("task", "user"):
            assert store.put([NewVersion(PrefixKey(kind, "email"), prefix)]) == [1]


def _forget_once(cp: ControlPrefix, user: str) -> None:
    if cp.exists("user", user):
        cp.remove("user", user)


@pytest.mark.slow
def test_a_user_of_two_runs_is_forgotten_once() -> None:
    cp = engine()
    cp.put("user", "bo", cp.prefix_from_text("a text"))
    cp.train(rows(), learn="task", **OPTIONS)

    def forget(info: StepInfo) -> None:
        _forget_once(cp, "bo")

    cp.train(rows(), learn="task", init="stored", on_step=forget, **OPTIONS)
    assert [info.num_forgotten for info in cp.versions("task", "email")] == [1, 1]


def test_the_error_can_be_sent_to_other_processes() -> None:
    error = pickle.loads(pickle.dumps(ForgottenError("bo")))
    assert (error.user, str(error)) == ("bo", str(ForgottenError("bo")))


@pytest.mark.slow
def test_publishing_waits_for_a_removal_that_is_under_way(url: str) -> None:
    """Else both would end, and the user would be named as a source."""
    with PrefixStore(url) as store:
        cp = ControlPrefix(engine().frozen_model, store)
        prefix = cp.prefix_from_text("a text")
        cp.put("user", "bo", prefix)
        removal_number = store.last_removal_number()
        begun, go_on = threading.Event(), threading.Event()
        mark = version_links.mark_forgotten

        def slowly(*arguments: Any) -> int:
            count = mark(*arguments)
            begun.set()
            assert go_on.wait(30)
            return count

        new = NewVersion(PrefixKey("task", "email"), prefix, sources=("bo",))
        with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
            patch.setattr(version_links, "mark_forgotten", slowly)
            forgetting = pool.submit(store.forget, BO)
            assert begun.wait(30)
            publishing = pool.submit(store.put, [new], removal_number=removal_number)
            time.sleep(0.3)
            assert not publishing.done()
            go_on.set()
            forgetting.result()
            publishing.result()
        assert cp.version_info("task", "email").num_forgotten == 1


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (
            "train_users",
            {
                "num_slots": 2,
                "decoder": None,
                "as_codes": None,
                "concurrent_users": 2,
                "options": {"steps": 1},
            },
        ),
        ("enroll_users", {"decoder": None, "num_slots": 2}),
    ],
)
def test_users_forgotten_before_an_actor_gets_them_stay_forgotten(
    method: Method, options: dict[str, Any], model_folder: Path, tmp_path: Path
) -> None:
    actor = UserActor(str(model_folder), {"store": f"sqlite:///{tmp_path}/s.db"}, {})
    removal_number = actor.last_removal_number()
    actor._cp.put("user", "bo", actor._cp.prefix_from_text("a text"))
    actor._cp.forget_user("bo")
    users = [("ana", ["a text", "another"]), ("bo", ["a text", "another"])]
    report, _ = actor.work(method, users, {"ana": 0, "bo": 0}, removal_number, options)
    assert list(report.users) == ["ana"]
    assert "forgotten meanwhile" in report.failed["bo"]
    assert actor._cp.names("user") == ["ana"]
    actor._cp.store.close()


def test_users_forgotten_while_a_store_is_rebound_stay_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cp = engine()
    geometry = replace(cp.geometry, fingerprint=first_fingerprint(cp.model), shift=None)
    older = [
        NewVersion(key, Prefix.random(geometry, num_slots=2, seed=i, scale=1.0), dtype="int8")
        for i, key in enumerate((ANA, BO))
    ]
    cp.store.put(older)
    rebound = rebinding._rebound

    def slowly(*arguments: Any) -> Any:
        if not cp.store.last_removal_number():
            cp.forget_user("bo")
        return rebound(*arguments)

    monkeypatch.setattr(rebinding, "_rebound", slowly)
    assert rebinding.rebind(cp) == [ANA]
    assert cp.names("user") == ["ana"]
    assert cp.version_info("user", "ana").dtype == "int8"  # as it was stored


def test_an_actor_names_a_decoder_that_does_not_exist(model_folder: Path, tmp_path: Path) -> None:
    actor = UserActor(str(model_folder), {"store": f"sqlite:///{tmp_path}/s.db"}, {})
    with pytest.raises(UnknownNameError, match="usrs"):
        actor.work("enroll_users", [("ana", ["x"])], {"ana": 0}, 0, {"decoder": "usrs"})
    actor._cp.store.close()
