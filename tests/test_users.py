"""Training many users in one run: each as they would be alone, none affected by another."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy
import pandas
import pytest
import torch

from controlprefix import (
    ControlPrefix,
    Example,
    RequestError,
    StoreError,
    TrainingDataError,
    UnknownNameError,
)
from controlprefix.cancellation import stoppable
from controlprefix.errors import StoreKeyError, TrainingInterrupted
from controlprefix.training.objectives import Objective, TrainingRow
from controlprefix.users import user_training

from models import build, byte_tokenizer

QUICK: dict[str, Any] = {
    "steps": 10,
    "num_slots": 4,
    "learning_rate": 0.2,
    "progress": False,
    "seed": 1,
    "validation": 0.2,
}
TEXTS = {
    "ana": [f"hello there {i}" for i in range(10)],
    "bo": [f"AHOY {i * 7} AHOY AHOY" for i in range(7)],
    "cy": ["one text only, of some length"],
    "di": [f"di {'x' * i}" for i in range(20)],
}


def engine(name: str = "llama", store: str = "sqlite://") -> ControlPrefix:
    return ControlPrefix.from_pretrained(build(name), tokenizer=byte_tokenizer(), store=store)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "bart"])
@pytest.mark.parametrize("settings", [{}, {"parameterization": "mlp", "slot_dropout": 0.3}])
def test_users_together_learn_what_each_learns_alone(name: str, settings: dict[str, Any]) -> None:
    rate = 0.02 if settings else 0.2
    settings = {**QUICK, **settings, "learning_rate": rate, "hidden_size": 8}
    crowd = engine(name)
    together = crowd.train_users(TEXTS, concurrent_users=3, **settings)
    assert together.failed == {}
    for user, texts in TEXTS.items():
        lone = engine(name)
        alone = lone.train_users({user: texts}, **settings).users[user]
        own_store = together.users[user]
        assert own_store.saved == alone.saved == {f"user {user!r}": 1}
        assert own_store.losses == pytest.approx(alone.losses, abs=1e-4)
        assert own_store.best_step == alone.best_step
        assert [item for _, item in own_store.validation] == pytest.approx(
            [item for _, item in alone.validation], abs=1e-4
        )
        for site, slots in crowd.get("user", user).slots.items():
            assert torch.allclose(slots, lone.get("user", user).slots[site], atol=2e-3)


@pytest.mark.slow
def test_each_user_learns_their_own_texts() -> None:
    cp = engine()
    cp.train_users(TEXTS, **{**QUICK, "steps": 40, "validation": 0})
    text = Example(prompt="", raw=True, completion="hello there 3")
    likely = {
        user: cp.score([text.model_copy(update={"user": user})])[0].log_likelihood for user in TEXTS
    }
    assert likely["ana"] > max(likely[user] for user in ("bo", "di")) + 5


@pytest.mark.slow
def test_untrainable_users_are_reported_and_affect_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bad: dict[str, Any] = {
        "empty": [],
        "blank": ["  ", "\n"],
        "number": [3],
        "broken": ["half \ud83d"],
        "bad\nname": ["text"],
        "nan": ["makes the loss no number"],
    }
    original = Objective._sums

    def poisoned(self: Objective, rows: Sequence[TrainingRow]) -> torch.Tensor:
        words = byte_tokenizer()("makes")["input_ids"]
        poison = torch.tensor([list(row.targets[: len(words)]) == words for row in rows])
        return original(self, rows) + torch.where(poison, math.nan, 0.0)

    monkeypatch.setattr(Objective, "_sums", poisoned)
    cp, alone = engine(), engine()
    mixed = {}
    for (name, texts), (user, good) in zip(bad.items(), [*TEXTS.items()] * 2, strict=False):
        mixed.update({name: texts, user: good})
    report = cp.train_users(mixed, concurrent_users=4, **QUICK)
    expected = alone.train_users(TEXTS, concurrent_users=4, **QUICK)
    assert set(report.failed) == set(bad)
    assert report.failed["empty"].startswith("there is no text of user 'empty'; give")
    assert "the loss is nan at step" in report.failed["nan"]
    assert "must be a str, got int" in report.failed["number"]
    assert "printable characters" in report.failed["bad\nname"]
    assert set(report.users) == set(TEXTS)
    for user, own_store in report.users.items():
        assert own_store.losses == pytest.approx(expected.users[user].losses, abs=1e-4)
    assert sorted(cp.names("user")) == sorted(TEXTS)


@pytest.mark.slow
def test_a_user_with_a_million_texts_is_trained_on_a_sample() -> None:
    cp = engine()
    texts = {"much": ["line"] * 1_000_000, "long": ["word " * 100_000], "ana": TEXTS["ana"]}
    report = cp.train_users(texts, **{**QUICK, "steps": 2})
    assert set(report.users) == set(texts)
    assert report.users["long"].num_tokens < 10_000


@pytest.mark.slow
def test_memory_depends_on_the_number_of_concurrent_users() -> None:
    """Users are consumed as there is room, and stored as they are finished."""
    cp = engine()
    consumed: list[int] = []
    most = 0

    def users() -> Iterator[tuple[str, list[str]]]:
        nonlocal most
        for i in range(12):
            consumed.append(i)
            most = max(most, len(consumed) - len(cp.names("user")))
            yield f"user{i}", [f"text {i} of this user"] * (1 + i % 3)

    report = cp.train_users(users(), concurrent_users=3, **{**QUICK, "steps": 3, "validation": 0})
    assert len(report.users) == len(cp.names("user")) == 12
    assert most <= 4


@pytest.mark.slow
def test_an_interrupted_run_resumes_with_the_users_who_are_left(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/prefixes.db"
    cp = engine(store=url)

    def interrupted() -> Iterator[tuple[str, list[str]]]:
        for user, texts in TEXTS.items():
            if user == "di":
                raise KeyboardInterrupt
            yield user, texts

    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        cp.train_users(interrupted(), concurrent_users=1, folder=folder, **QUICK)
    assert sorted(cp.names("user")) == ["ana", "bo", "cy"]
    with (folder / "finished.jsonl").open("a") as file:
        file.write('{"user": "cut sh')
    again = engine(store=url)
    changed = {**TEXTS, "bo": [*TEXTS["bo"], "AND MORE"]}
    report = again.train_users(changed, folder=folder, resume=True, **QUICK)
    assert sorted(report.skipped) == ["ana", "cy"]
    assert set(report.users) == {"bo", "di"}
    assert [v.version for v in again.versions("user", "bo")] == [1, 2]


@pytest.mark.slow
def test_early_stopping_is_per_user() -> None:
    settings = {**QUICK, "steps": 60, "num_evaluations": 30, "learning_rate": 500.0, "patience": 1}
    report = engine().train_users(TEXTS, concurrent_users=4, **settings)
    lengths = {user: len(item.losses) for user, item in report.users.items()}
    assert min(lengths["ana"], lengths["bo"], lengths["di"]) < 60
    assert lengths["cy"] == 60  # one text: nothing to hold out
    for user in ("ana", "bo", "di"):
        looks = [loss for _, loss in report.users[user].validation]
        assert report.users[user].best_loss == min(looks)


def test_invalid_settings_and_read_only_stores_are_refused_before_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cp = engine()
    with pytest.raises(TrainingDataError, match="concurrent_users is 0"):
        cp.train_users(TEXTS, concurrent_users=0, **QUICK)
    with pytest.raises(TrainingDataError, match="unknown field 'lr'"):
        cp.train_users(TEXTS, lr=1)  # type: ignore[call-arg]

    def refuse(*_: object) -> None:
        raise StoreError("read only")

    monkeypatch.setattr(cp.store, "require_writable", refuse)
    with pytest.raises(StoreError, match="read only"):
        cp.train_users(TEXTS, **QUICK)


def test_options_without_effect_are_refused() -> None:
    cp = engine()
    for name, value in (("contrast", 0.3), ("gradient_checkpointing", True), ("save_steps", 5)):
        options: dict[str, Any] = {name: value}
        with pytest.raises(TrainingDataError, match=f"{name} has no effect when training users"):
            cp.train_users({"ana": ["hello"]}, **options)
    with pytest.raises(TrainingDataError, match="slot_dropout has no effect .* a decoder"):
        cp.learn_decoder({"ana": ["hello"], "bo": ["ho"]}, slot_dropout=0.1)


@pytest.mark.slow
def test_a_user_who_comes_twice_is_trained_once_at_a_time() -> None:
    """Else the second run would attend to the first one's slots."""
    pairs = [("ana", ["first of ana"] * 2), ("ana", ["second, entirely"] * 2), ("bo", ["ho"] * 2)]
    cp, alone = engine(), engine()
    report = cp.train_users(pairs, concurrent_users=3, **QUICK)
    assert list(report.failed) == ["ana"]
    assert "give all texts of a user together" in report.failed["ana"]
    alone.train_users(pairs[:1], **QUICK)
    assert torch.allclose(
        cp.get("user", "ana").slots["decoder"],
        alone.get("user", "ana").slots["decoder"],
        atol=2e-3,
    )
    later = cp.train_users(pairs[1:2], **QUICK)
    assert later.users["ana"].saved == {"user 'ana'": 2}


def test_accents_typed_in_two_ways_are_one_user() -> None:
    composed, other = "jos\u00e9", "jose\u0301"
    rows = [{"user": user, "text": f"text {user}"} for user in (composed, other)]
    cp = engine()
    report = cp.train_users(rows, **{**QUICK, "validation": 0})
    assert list(report.users) == [composed]
    assert len(cp.versions("user", composed)) == 1
    with pytest.raises(TrainingDataError, match="comes twice"):
        cp.train_users({composed: ["a"], other: ["b"]}, **QUICK)
    assert cp.enroll(composed, [{"user": other, "text": "hello"}]) == 2


def test_one_text_of_a_user_is_a_text_and_nothing_else_ends_the_run() -> None:
    cp = engine()
    users: dict[str, Any] = {"ana": "hello there", "bo": None, "cy": 3}
    report = cp.enroll_users(users, num_slots=2, progress=False)
    assert set(report.users) == {"ana"}
    assert cp.versions("user", "ana")[-1].details["enrolled"]["texts"] == 1
    assert "must be a list, got int" in report.failed["cy"]
    trained = cp.train_users(users, **QUICK)
    assert set(trained.failed) == {"bo", "cy"}


@pytest.mark.slow
def test_users_finished_in_another_store_are_trained_in_this_one(tmp_path: Path) -> None:
    options: dict[str, Any] = {"folder": tmp_path / "run", **QUICK}
    texts = {"ana": TEXTS["ana"]}
    engine(store=f"sqlite:///{tmp_path}/a.db").train_users(texts, **options)
    other = engine(store=f"sqlite:///{tmp_path}/b.db")
    assert other.train_users(texts, resume=True, **options).skipped == ()
    assert other.train_users(texts, resume=True, **options).skipped == ("ana",)
    other.forget_user("ana")
    again = other.train_users(texts, resume=True, **options)
    assert (again.skipped, again.users["ana"].saved) == ((), {"user 'ana'": 1})


@pytest.mark.slow
def test_many_users_are_enrolled_as_each_alone() -> None:
    texts = {f"u{i}": [f"a text {i}", "another"] for i in range(3)}
    cp, alone = engine(), engine()
    pairs = iter([*texts.items(), ("empty", [" "]), ("no\nname", ["a text"]), ("u0", ["more"])])
    report = cp.enroll_users(pairs, num_slots=3, keep_texts=True, progress=False)
    assert report.users == {"u0": 1, "u1": 1, "u2": 1}
    assert report.failed.keys() == {"empty", "no\nname", "u0"}
    assert "comes twice" in report.failed["u0"]
    assert "no text" in report.failed["empty"]
    for user, own in texts.items():
        alone.enroll(user, own, num_slots=3)
        assert cp.get("user", user, version=1).digest == alone.get("user", user).digest
    assert cp.names("user") == sorted(texts)
    with pytest.raises(UnknownNameError, match="no decoder 'people'"):
        cp.enroll_users(texts, decoder="people")


@pytest.mark.slow
def test_the_models_weights_stay_as_they_are_whatever_is_made_of_users() -> None:
    cp = engine()
    before = {name: value.clone() for name, value in cp.model.state_dict().items()}
    cp.train_users({"ana": ["one text", "two"], "bo": ["three"]}, concurrent_users=2, **QUICK)
    cp.enroll("cy", ["four texts", "five"])
    cp.put("task", "t", cp.prefix_from_text("a task of some length"))
    rows = [Example(prompt="a", completion="b", task="t")]
    cp.shorten("task", "t", rows)
    after = cp.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert not any(p.requires_grad or p.grad is not None for p in cp.model.parameters())


def test_a_longer_run_trains_users_again(tmp_path: Path) -> None:
    cp, texts = engine(), {"ana": ["the sea is wide", "we sail"]}
    options: dict[str, Any] = {"folder": tmp_path, "resume": True, "num_slots": 2}
    for steps, skipped in ((1, ()), (1, ("ana",)), (3, ())):
        report = cp.train_users(texts, steps=steps, progress=False, **options)
        assert report.skipped == skipped
    assert len(report.users["ana"].losses) == 3


@pytest.mark.parametrize("num_slots", [0, 10_000])
def test_a_wrong_number_of_slots_is_refused(num_slots: int) -> None:
    cp, texts = engine("gpt2"), {"ana": ["the sea is wide"], "bo": ["we sail"]}
    for call in (cp.train_users, cp.learn_decoder):
        with pytest.raises(TrainingDataError, match=f"num_slots is {num_slots}; it must be"):
            call(texts, num_slots=num_slots, steps=1, progress=False)
    with pytest.raises(TrainingDataError, match="width is 0"):
        cp.learn_decoder(texts, width=0, steps=1, progress=False)


def test_texts_beyond_the_context_need_no_more_passes_than_slots_allow() -> None:
    cp = engine("gpt2")
    context = cp.frozen_model.request_tokenizer.context_length
    assert context is not None
    texts = ["a" * (context - 8), "b" * (context - 8)]
    cp.enroll("ana", texts, num_slots=4 * context)
    assert cp.get("user", "ana").num_slots == sum(map(len, texts)) + 2  # and what is between them


def test_ctrl_c_ends_a_run_of_users_who_train_for_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        user_training, "delayed_interrupt", lambda: contextlib.nullcontext(lambda: True)
    )
    cp = engine()
    with pytest.raises(TrainingInterrupted, match="1 of 3 users are stored"):
        cp.train_users(
            {name: ["a text"] for name in ("ana", "bo", "cy")},
            steps=1,
            num_slots=2,
            concurrent_users=1,
            progress=False,
        )
    assert cp.names("user") == ["ana"]


def test_nothing_is_stored_after_an_enrolment_was_stopped() -> None:
    cp = engine()
    with stoppable(lambda: True), pytest.raises(TrainingInterrupted):
        cp.enroll("ana", ["a text"])
    assert not cp.exists("user", "ana")


def test_slots_are_for_enrolments_without_a_decoder() -> None:
    with pytest.raises(RequestError, match="num_slots is for a prefix without a decoder"):
        engine().enroll("ana", ["a text"], decoder="users", num_slots=4)


@pytest.mark.slow
def test_a_version_of_another_kind_is_no_finished_user(tmp_path: Path) -> None:
    cp = engine()
    texts = {"ana": ["hello there", "hello you", "hello all"]}
    options: dict[str, Any] = {"steps": 2, "progress": False, "folder": tmp_path}
    assert set(cp.train_users(texts, **options).users) == {"ana"}
    assert cp.train_users(texts, resume=True, **options).skipped == ("ana",)
    cp.forget_user("ana")
    cp.enroll("ana", texts["ana"])  # version 1 again
    assert set(cp.train_users(texts, resume=True, **options).users) == {"ana"}
    cp.rollback("user", "ana", to=1)
    assert cp.train_users(texts, resume=True, **options).skipped == ("ana",)


@pytest.mark.slow
def test_texts_that_are_kept_are_read_when_it_is_the_users_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cp = engine()
    for user in ("ana", "bo", "cy"):
        cp.enroll(user, [f"hello {user}", "again"], keep_texts=True)
    read, texts_of = [], cp.store.user_texts

    def user_texts(user: str) -> Any:
        read.append(user)
        if user == "bo":
            raise StoreKeyError("the key of bo is gone")
        return texts_of(user)

    monkeypatch.setattr(cp.store, "user_texts", user_texts)
    report = cp.train_users(None, steps=1, concurrent_users=1, progress=False)
    assert (set(report.users), set(report.failed)) == ({"ana", "cy"}, {"bo"})
    assert read == ["ana", "bo", "cy"]


def test_texts_may_be_an_array() -> None:
    cp = engine()
    texts = {"ana": numpy.array(["hello", "there"]), "bo": pandas.Series(["hi", "you"])}
    report = cp.train_users(texts, steps=1, progress=False)
    assert set(report.users) == {"ana", "bo"}
