"""Decoders that are trained with vectors of users in place of features of their texts."""

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from controlprefix import ControlPrefix, Example, RequestError, TrainingDataError
from controlprefix.users.user_vectors import VectorFeatures

from helpers import engine

STYLES = {"hello": (1.0, 0.0, 3.0), "AHOY!": (-1.0, 0.5, 3.0)}
USERS = {f"{style}{i}": [f"{style} {style}"] * 3 for style in STYLES for i in range(6)}
VECTORS = {
    user: [value + 0.05 * i for value in STYLES[user[:5]]] for i, user in enumerate(sorted(USERS))
}
OPTIONS: dict[str, Any] = {
    "num_slots": 4, "width": 8, "steps": 40, "batch_size": 12, "learning_rate": 0.05,
    "validation": 0, "progress": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def cp() -> ControlPrefix:
    built = engine()
    report = built.learn_decoder(USERS, vectors=VECTORS, **OPTIONS)
    assert report.num_users == 12
    assert report.r2 > 0.2
    return built


def nats(cp: ControlPrefix, text: str, user: str) -> float:
    (score,) = cp.score([Example(prompt="", raw=True, completion=text, user=user)])
    return -score.log_likelihood / score.num_tokens


@pytest.mark.slow
def test_a_user_is_enrolled_from_a_vector_without_texts(cp: ControlPrefix) -> None:
    vectors = {"hello": numpy.array(STYLES["hello"]), "AHOY!": torch.tensor(STYLES["AHOY!"])}
    for user, vector in vectors.items():
        assert cp.enroll(user, vector=vector, decoder="users") == 1  # type: ignore[arg-type]
        assert cp.version_info("user", user).details["enrolled"]["vector"] == 3
    for own, other in (("hello", "AHOY!"), ("AHOY!", "hello")):
        assert nats(cp, f"{own} {own}", own) < nats(cp, f"{own} {own}", other) - 0.1


@pytest.mark.slow
def test_training_starts_from_what_all_have_in_common(cp: ControlPrefix) -> None:
    report = cp.train_users({"cy": ["hello", "hello hello"]}, decoder="users", steps=1)
    assert not report.failed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vector": [1.0, 2.0]}, "has 2 values; decoder 'users' was trained with vectors of 3"),
        ({"vector": [1.0, float("nan"), 0.0]}, "finite numbers"),
        ({"vector": [1.0, 2.0, 3.0], "texts": ["a"]}, "takes the place of texts"),
        ({"vector": [1.0, 2.0, 3.0], "keep_profile": True}, "takes the place of texts"),
        ({"vector": [1.0, 2.0, 3.0], "decoder": None}, "takes the place of texts"),
        ({"texts": ["a text"]}, "trained with vectors of users"),
        ({}, "nothing to enroll from"),
        ({"vector": "abc"}, "vector is 'abc'; enroll takes a list of numbers"),
    ],
)
def test_mistakes_are_told(cp: ControlPrefix, options: dict[str, Any], message: str) -> None:
    with pytest.raises((RequestError, TrainingDataError), match=message):
        cp.enroll("di", **{"decoder": "users", **options})
    assert not cp.exists("user", "di")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"AHOY!0": None}, "the vector of user 'AHOY!0' must be a list of finite numbers"),
        ({"AHOY!0": [1.0, 2.0]}, "different sizes"),
        ({"AHOY!0": [[1.0], [2.0]]}, "must be a list"),
    ],
)
def test_vectors_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    built = engine()
    with pytest.raises(TrainingDataError, match=message):
        built.learn_decoder(USERS, vectors={**VECTORS, **change}, **OPTIONS)
    incomplete = {user: vector for user, vector in VECTORS.items() if user != "hello3"}
    with pytest.raises(TrainingDataError, match="no vector for hello3; give one per user"):
        built.learn_decoder(USERS, vectors=incomplete, **OPTIONS)
    assert not built.exists("decoder", "users")


@pytest.mark.slow
def test_names_may_be_typed_in_two_ways_and_other_vectors_are_another_decoder(
    tmp_path: Path,
) -> None:
    built = engine()
    names = ("Jose\u0301", "ana")
    users = {name: ["hello hello"] * 3 for name in names}
    vectors = {"Jos\u00e9": [1.0], "ana": [2.0]}
    options = {**OPTIONS, "steps": 2, "folder": tmp_path}
    assert built.learn_decoder(users, vectors=vectors, **options).version == 1
    assert built.learn_decoder(users, vectors=vectors, resume=True, **options).version == 1
    others = {"Jos\u00e9": [5.0], "ana": [9.0]}
    assert built.learn_decoder(users, vectors=others, resume=True, **options).version == 2
    built.enroll("cy", vector=[1.5], decoder="users")
    with pytest.raises(RequestError, match="was enrolled from a vector"):
        built.audit_user("cy", ["a text"], ["another"], num_canaries=1)


def test_users_may_be_numbers() -> None:
    features = VectorFeatures({1: [1.0, 2.0], 2.0: [3.0, 4.0]})  # type: ignore[dict-item]
    assert features.of_users(["1", "2"])["2"].tolist() == [[3.0, 4.0]]
