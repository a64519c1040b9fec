"""Guarded enrolment, and audits of what prefixes reveal."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from learned_decoder import (
    QUIET,
    copied,
    engine,
    learned_store,
    stored_decoder,
    stored_user,
    written_by,
)

from controlprefix import (
    ControlPrefix,
    Example,
    RequestError,
    TrainingDataError,
    embeddings,
)
from controlprefix.prefixes.user_code import PrefixDecoder, UserCode
from controlprefix.store import NewVersion, PrefixKey
from controlprefix.users import guard, user_auditor
from controlprefix.users.enrolment import predict_code
from controlprefix.users.text_losses import losses_of_texts

from helpers import Letters


@pytest.fixture(autouse=True)
def letters_for_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "load_embedder", lambda embedder: Letters())


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> str:
    return learned_store(tmp_path_factory.mktemp("learned"))


@pytest.fixture
def cp(learned: str) -> Iterator[ControlPrefix]:
    yield from copied(learned)


def test_a_guarded_code_is_no_more_personal_than_helps(
    cp: ControlPrefix, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = stored_decoder(cp)

    def distance(user: str) -> float:
        code = stored_user(cp, user)
        assert isinstance(code, UserCode)
        return float((code.values - decoder.mean_code.values).norm())

    texts = written_by("AHOY!", 8)
    cp.enroll("plain", texts, decoder="users")
    cp.enroll("same", texts, decoder="users", guard=True)
    share = cp.versions("user", "same")[-1].details["enrolled"]["share"]
    assert share > 0
    assert distance("same") == pytest.approx(share * distance("plain"), rel=0.02)

    # A code that was predicted in the wrong direction is of no use on the other texts.
    def wrong(decoder: PrefixDecoder, texts: list[str]) -> UserCode:
        code = predict_code(decoder, texts)
        mean = decoder.mean_code.values
        return UserCode(code.decoder_hash, mean - 4 * (code.values - mean))

    with monkeypatch.context() as patch:
        patch.setattr(guard, "predict_code", wrong)
        cp.enroll("wrong", texts, decoder="users", guard=True)
    assert cp.versions("user", "wrong")[-1].details["enrolled"]["share"] == 0
    assert distance("wrong") == pytest.approx(0, abs=0.01)
    cp.enroll("one", texts[:1], decoder="users", guard=True)  # nothing to try it on
    assert cp.versions("user", "one")[-1].details["enrolled"]["share"] == 1
    with pytest.raises(RequestError, match="guard requires decoder"):
        cp.enroll("slots", texts, guard=True)
    with pytest.raises(RequestError, match="guard requires decoder"):
        cp.enroll("one", texts, decoder="users", guard=True, add=True)


@pytest.mark.slow
def test_the_privacy_audit_finds_memorized_texts_only(monkeypatch: pytest.MonkeyPatch) -> None:
    cp = engine()
    texts = ["Zebras quarrel with my vexed uncle 42 times a week"]
    held_out = ["some other words, entirely", "nothing of the kind was said 9"]
    cp.train_users({"ana": texts}, steps=200, num_slots=16, learning_rate=0.3, **QUIET)
    report = cp.audit_user("ana", texts, held_out, num_canaries=1)
    assert report.membership_auc > 0.9
    assert report.extraction_rate
    assert report.extraction_rate_without == 0
    assert report.exposure_bits is not None
    assert report.exposure_bits > 5
    versions = cp.versions("user", "ana")
    assert [version.version for version in versions] == [
        1
    ]  # what was trained with canaries is not stored

    cp.enroll("cy", texts)  # fewer tokens than slots: a copy of them
    assert cp.version_info("user", "cy").details["enrolled"]["num_slots"] == 64
    slot_counts: list[int] = []

    def noting(*arguments: Any, **options: Any) -> Any:
        slot_counts.append(options["num_slots"])
        return guard.enrolled_value(*arguments, **options)

    monkeypatch.setattr(user_auditor, "enrolled_value", noting)
    cp.audit_user("cy", texts, held_out, num_canaries=1)
    assert set(slot_counts) == {64}  # as many as the texts with planted ones may take
    cp.enroll("bo", ["unrelated"], num_slots=2)
    quiet = cp.audit_user("bo", texts, held_out, num_canaries=4)
    assert quiet.extraction_rate == 0
    assert quiet.exposure_bits is not None
    assert quiet.exposure_bits < 5
    with pytest.raises(TrainingDataError, match="held-out texts of the same author|no text"):
        cp.audit_user("ana", texts, [])
    cp.put("user", "cy", cp.prefix_from_text("hello"))
    with pytest.raises(TrainingDataError, match="was not made by train_users or enroll"):
        cp.audit_user("cy", texts, held_out, num_canaries=1)
    assert 0 <= cp.audit_user("cy", texts, held_out).membership_auc <= 1
    rows = [Example(prompt="", raw=True, completion=text, user="di") for text in texts]
    cp.trainable(rows, learn="user", num_slots=2, init="random").publish()
    with pytest.raises(TrainingDataError, match="was not made by train_users or enroll"):
        cp.audit_user("di", texts, held_out, num_canaries=1)


def test_a_guard_tries_each_half_on_the_other(
    cp: ControlPrefix, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored_decoder(cp)
    tried: list[list[str]] = []

    def losses(frozen: Any, texts: list[str], prefix: Any) -> Any:
        tried.append(texts)
        return losses_of_texts(frozen, texts, prefix)

    monkeypatch.setattr(guard, "losses_of_texts", losses)
    texts = [f"AHOY {i}" for i in range(4)]
    cp.enroll("ana", texts, decoder="users", guard=True)
    assert tried == [texts[1::2]] * len(guard.SHARES) + [texts[::2]] * len(guard.SHARES)


def test_no_half_of_a_guard_has_a_text_of_the_other(
    cp: ControlPrefix, monkeypatch: pytest.MonkeyPatch
) -> None:
    halves: list[tuple[set[str], set[str]]] = []
    own: list[str] = []

    def predicting(decoder: Any, texts: Any) -> Any:
        own[:] = texts
        return predict_code(decoder, texts)

    def scoring(frozen: Any, texts: Any, prefix: Any) -> Any:
        halves.append((set(own), set(texts)))
        return losses_of_texts(frozen, texts, prefix)

    monkeypatch.setattr(guard, "predict_code", predicting)
    monkeypatch.setattr(guard, "losses_of_texts", scoring)
    decoder = stored_decoder(cp)
    texts = ["Hi there", "hi  there", "Bye", "Bye"]
    guard.guarded_code(cp.frozen_model, decoder, texts)
    assert halves
    assert all(not ({t[:2].lower() for t in a} & {t[:2].lower() for t in b}) for a, b in halves)
    assert guard.guarded_code(cp.frozen_model, decoder, ["Hi", "hi"])[1] == 1.0


def test_an_audit_makes_a_code_again_with_its_own_decoder(
    cp: ControlPrefix, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = stored_decoder(cp)
    texts = [f"AHOY {i} AHOY" for i in range(4)]
    cp.enroll("ana", texts, decoder="users")
    changed = PrefixDecoder.from_bytes(first.to_bytes("float32"))
    with torch.no_grad():
        changed.mean_code.values.add_(0.1)
    assert changed.content_hash != first.content_hash
    cp.store.put([NewVersion(PrefixKey("decoder", "users"), changed)])
    used: list[str] = []

    def noting(frozen: Any, texts: Any, decoder: Any, **options: Any) -> Any:
        used.append(decoder.content_hash)
        return guard.enrolled_value(frozen, texts, decoder, **options)

    monkeypatch.setattr(user_auditor, "enrolled_value", noting)
    cp.audit_user("ana", texts, ["Bye", "So long"], num_canaries=1)
    assert used == [first.content_hash]
    cp.rollback("decoder", "users", to=1)
