"""Decoders of user codes, enrolment and the privacy audit."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from learned_decoder import (
    LEARN,
    QUIET,
    USERS,
    as_learned,
    copied,
    engine,
    learned_store,
    stored_decoder,
    stored_user,
    written_by,
)

from controlprefix import (
    ControlPrefix,
    ControlPrefixError,
    Example,
    RequestError,
    TrainingDataError,
    UnknownNameError,
    embeddings,
)
from controlprefix.prefixes.user_code import PrefixDecoder, UserCode
from controlprefix.store import NewVersion, PrefixKey
from controlprefix.training import run
from controlprefix.users.text_features import TextFeatures, character_features, style_features
from controlprefix.users.user_codes import TrainableCodes, fit_code_predictor

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


def nats(cp: ControlPrefix, text: str, user: str) -> float:
    (score,) = cp.score([Example(prompt="", raw=True, completion=text, user=user)])
    return -score.log_likelihood / score.num_tokens


@pytest.mark.slow
def test_an_enrolled_user_gets_the_style_of_similar_users(cp: ControlPrefix) -> None:
    for style in ("hello", "AHOY!"):
        assert cp.enroll(style, written_by(style, 3), decoder="users") == 1
        assert isinstance(stored_user(cp, style), UserCode)
        assert cp.versions("user", style)[0].size_bytes < 1000
    assert nats(cp, "hello hello", "hello") < nats(cp, "hello hello", "AHOY!") - 0.2
    assert nats(cp, "AHOY! AHOY!", "AHOY!") < nats(cp, "AHOY! AHOY!", "hello") - 0.2
    with pytest.raises(RequestError, match="trained with features of texts"):
        cp.enroll("cy", vector=[1.0], decoder="users")


@pytest.mark.slow
def test_more_texts_move_the_predicted_code_further(cp: ControlPrefix) -> None:
    decoder = stored_decoder(cp)
    text = written_by("AHOY!", 1)
    far = [
        (
            decoder.predict_code(TextFeatures().compute(text * count)).values
            - decoder.mean_code.values
        ).norm()
        for count in (1, 4, 64)
    ]
    assert far[0] < far[1] < far[2]


@pytest.mark.slow
def test_texts_are_added_to_a_code_without_the_earlier_ones(cp: ControlPrefix) -> None:
    texts = written_by("AHOY!", 6)
    cp.enroll("whole", texts, decoder="users")
    cp.enroll("bit", texts[:2], decoder="users")
    for more in (texts[2:3], texts[3:]):
        cp.enroll("bit", more, decoder="users", add=True)
    whole, parts = stored_user(cp, "whole"), stored_user(cp, "bit")
    assert isinstance(whole, UserCode)
    assert isinstance(parts, UserCode)
    assert torch.allclose(whole.values, parts.values, atol=0.02)  # codes are rounded when stored
    assert cp.versions("user", "bit")[-1].details["enrolled"]["texts"] == 6
    assert cp.versions("user", "bit")[-1].storage_dtype == "float32"  # it moves by little
    cp.train_users({"trained": texts}, decoder="users", steps=2, **QUIET)
    cp.enroll("slots", texts)
    for user in ("trained", "slots"):
        with pytest.raises(RequestError, match="the same decoder predicted"):
            cp.enroll(user, texts, decoder="users", add=True)
    other = PrefixDecoder.from_bytes(stored_decoder(cp).to_bytes("float32"))
    cp.store.put([NewVersion(PrefixKey("decoder", "others"), other)])
    with pytest.raises(RequestError, match="the same decoder predicted"):
        cp.enroll("bit", texts, decoder="others", add=True)
    with pytest.raises(UnknownNameError):
        cp.enroll("nobody", texts, decoder="users", add=True)
    with pytest.raises(RequestError, match="add requires decoder"):
        cp.enroll("bit", texts, add=True)
    with pytest.raises(RequestError, match="add requires decoder"):
        cp.enroll("bit", texts, decoder="users", refine=True, add=True)


@pytest.mark.slow
def test_codes_trained_together_equal_codes_trained_alone(cp: ControlPrefix) -> None:
    users = {"ana": written_by("hello", 9), "bo": written_by("Yes, no", 5), "cy": ["just one"]}
    report = cp.train_users(users, decoder="users", concurrent_users=2, epochs=3, **QUIET)
    assert report.failed == {}
    together = {user: stored_user(cp, user) for user in users}
    for user, texts in users.items():
        alone = cp.train_users({user: texts}, decoder="users", epochs=3, **QUIET)
        assert alone.users[user].losses == pytest.approx(report.users[user].losses, abs=1e-4)
        code, names = stored_user(cp, user), together[user]
        assert isinstance(code, UserCode)
        assert isinstance(names, UserCode)
        assert torch.allclose(code.values, names.values, atol=0.02)


@pytest.mark.slow
def test_training_a_code_or_all_slots_improves_on_the_predicted_code(
    cp: ControlPrefix,
) -> None:
    texts = written_by("Oh hello", 8)
    cp.enroll("ana", texts, decoder="users")
    result = [nats(cp, texts[0], "ana")]
    for as_codes in (True, False):
        options = {
            "decoder": "users",
            "as_codes": as_codes,
            "learning_rate": 0.1,
            **QUIET,
        }
        report = cp.train_users({"ana": texts}, steps=20, **options)
        assert report.users["ana"].losses[0] == pytest.approx(result[0], abs=0.3)
        assert isinstance(stored_user(cp, "ana"), UserCode) is as_codes
        result.append(nats(cp, texts[0], "ana"))
    assert result[1] < result[0] - 0.1
    assert result[2] < result[1]
    assert cp.enroll("ana", texts, decoder="users", refine=True) == 4


def test_a_decoder_that_uses_no_features_needs_no_embeddings(
    cp: ControlPrefix, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = stored_decoder(cp)
    decoder.predictor.weights.zero_()
    cp.store.put([as_learned(PrefixDecoder.from_bytes(decoder.to_bytes()))])
    monkeypatch.setattr(embeddings, "load_embedder", lambda embedder: pytest.fail("loaded"))
    cp.enroll("ana", ["some text"], decoder="users")
    cp.enroll("bo", ["other"], decoder="users")
    ana, bo = cp.get("user", "ana"), cp.get("user", "bo")
    assert torch.equal(ana.slots["decoder"], bo.slots["decoder"])


@pytest.mark.slow
def test_interrupted_decoder_training_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = {**LEARN, "steps": 12, "save_steps": 5}
    whole = engine().learn_decoder(USERS, **short)
    cp = engine()
    begin, calls = run.TrainingRun.begin_step, []

    def broken(self: Any) -> Any:
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return begin(self)

    monkeypatch.setattr(run.TrainingRun, "begin_step", broken)
    with pytest.raises(KeyboardInterrupt):
        cp.learn_decoder(USERS, folder=tmp_path, **short)
    assert cp.names("decoder") == []
    resumed = cp.learn_decoder(USERS, folder=tmp_path, resume=True, **short)
    assert resumed.training.losses == pytest.approx(whole.training.losses, abs=1e-6)


def test_gradients_of_codes_and_decoder_match_finite_differences() -> None:
    cp = engine()
    start = cp.prefix_from_text("abcd").to(dtype=torch.float64)
    scale = {"decoder": torch.ones(start.slots["decoder"].shape[1], dtype=torch.float64)}
    decoder = PrefixDecoder(start, scale, width=3, hidden_size=5).double()  # type: ignore[arg-type]
    keys = [PrefixKey("user", "a"), PrefixKey("user", "b")]
    slots = TrainableCodes(
        decoder, {key: torch.zeros(4, 3) for key in keys}, unit=2.0, train_decoder=True
    ).double()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in slots.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=draw, device="cpu", dtype=torch.float64))
    weights = torch.randn(
        start.slots["decoder"].shape, generator=draw, device="cpu", dtype=torch.float64
    )

    def value() -> torch.Tensor:
        result = slots.prefixes(keys)
        a, b = (result[key].slots["decoder"] for key in keys)
        return (a * weights).sum() + (b * b * weights).sum()

    value().backward()
    for parameter in slots.parameters():
        if parameter.grad is None:
            continue
        way = torch.randn(parameter.shape, generator=draw, device="cpu", dtype=torch.float64)
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * 1e-6 * way)
                sides.append(float(value()))
                parameter.sub_(sign * 1e-6 * way)
        assert (sides[0] - sides[1]) / 2e-6 == pytest.approx(
            float((parameter.grad * way).sum()), rel=1e-4, abs=1e-6
        )
    assert all(change.grad is not None and change.grad.any() for change in slots.changes)


def test_the_predictor_is_fitted_only_if_features_predict_codes() -> None:
    draw = torch.Generator().manual_seed(0)
    start = engine().prefix_from_text("abcd")
    scale = {"decoder": torch.ones(start.slots["decoder"].shape[1])}
    users = [torch.randn(1, 6, generator=draw, device="cpu").expand(20, 6) for _ in range(40)]
    calls = [user + 0.3 * torch.randn(user.shape, generator=draw, device="cpu") for user in users]
    weights = torch.randn(6, 12, generator=draw, device="cpu")
    codes = [(user[0] @ weights).view(4, 3) for user in users]
    for expected, least, most in (
        (codes, 0.6, 1.0),
        ([torch.randn(4, 3, generator=draw, device="cpu") for _ in users], 0.0, 0.05),
    ):
        decoder = PrefixDecoder(start, scale, width=3, num_features=6)  # type: ignore[arg-type]
        r2 = fit_code_predictor(decoder.predictor, expected, calls, seed=0)
        assert least <= r2 <= most
        errors = torch.stack(
            [
                decoder.predict_code(user).values - code
                for user, code in zip(calls, expected, strict=True)
            ]
        )
        spread = torch.stack(expected) - torch.stack(expected).mean(0)
        assert errors.square().sum() <= (1 - 0.9 * r2) * spread.square().sum() + 1e-3


def test_two_users_with_one_text_each_are_enough_for_a_decoder() -> None:
    report = engine().learn_decoder({"ana": ["one"], "bo": ["two"]}, **{**LEARN, "steps": 2})
    assert (report.num_users, report.r2) == (2, 0.0)


def test_errors_of_decoder_training_and_enrolment_say_why(cp: ControlPrefix) -> None:
    for users, match in (
        ({"ana": ["one"]}, "many users; 1 are given"),
        ({"ana": ["one"], "bo": [" "]}, "no text of user 'bo'"),
    ):
        with pytest.raises(TrainingDataError, match=match):
            cp.learn_decoder(users, progress=False)
    with pytest.raises(ControlPrefixError, match="no decoder 'user' in the store; known: users"):
        cp.enroll("ana", ["x"], decoder="user")
    with pytest.raises(TrainingDataError, match="there is no text"):
        cp.enroll("ana", [], decoder="users")
    with pytest.raises(ControlPrefixError, match="which this version does not compute"):
        TextFeatures.by_name("all-MiniLM-L6-v2+style-0")


def test_forgetting_a_user_removes_their_data_and_marks_the_decoder(cp: ControlPrefix) -> None:
    user = next(iter(USERS))
    cp.enroll(user, USERS[user], decoder="users", keep_profile=True, keep_texts=True)
    assert [similar_user.user for similar_user in cp.similar_users(USERS[user])] == [user]
    cp.forget_user(user)
    assert cp.similar_users(USERS[user]) == []
    assert cp.store.user_texts(user) == []
    assert cp.versions("decoder", "users")[0].num_forgotten == 1


def test_style_features_have_one_length_for_any_text() -> None:
    lengths = {
        (len(style_features(text)), len(character_features(text)))
        for text in ("", "\0", "Ok... i said NO!!!\n", "日本語。" * 300)
    }
    assert len(lengths) == 1


def test_character_features_tell_writers_of_any_alphabet_apart() -> None:
    texts = ("добрый день, коллеги.", "добрый вечер, коллеги.", "ПРИВЕТ!!! как оно")
    first, similar, other = (torch.tensor(character_features(text)) for text in texts)
    assert first @ first == pytest.approx(1.0)  # roots of shares
    assert first @ similar > 0.2 + first @ other
    assert character_features("a  b\n") == character_features("a b")


@pytest.mark.slow
def test_a_finished_decoder_is_stored_once_and_under_each_name(tmp_path: Path) -> None:
    short = {**LEARN, "steps": 2, "save_steps": 1}
    cp = engine(store=f"sqlite:///{tmp_path}/p.db")
    folder = tmp_path / "run"
    first = cp.learn_decoder(USERS, name="a", folder=folder, **short)
    again = cp.learn_decoder(USERS, name="a", folder=folder, resume=True, **short)
    assert (first.version, again.version, len(cp.versions("decoder", "a"))) == (1, 1, 1)
    other = cp.learn_decoder(USERS, name="b", folder=folder, resume=True, **short)
    assert (other.version, len(cp.versions("decoder", "b"))) == (1, 1)
