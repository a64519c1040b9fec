"""For whom user prefixes work: gains over others, who is harmed, groups, and impersonal prompts."""

import json
import math
import random
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run as command
from typer.testing import CliRunner

from controlprefix import (
    ControlPrefix,
    Example,
    Part,
    Prefix,
    Request,
    RequestError,
    TrainingDataError,
)
from controlprefix.cli.evaluate import _groups_of_column
from controlprefix.data.files import Record
from controlprefix.evaluation import evaluate_users
from controlprefix.evaluation import revealed_groups as revealed_groups_module
from controlprefix.evaluation.metrics import bootstrap_mean
from controlprefix.evaluation.revealed_groups import revealed_groups
from controlprefix.evaluation.users import checked_groups, summarize
from controlprefix.evaluation.users_report import UserResult, harmed_text

from helpers import engine, run

STYLES = {"ana": "so good!! xo", "bo": "Fair wind. Bo out.", "cleo": "One must suppose."}


def rows(users: list[str], count: int = 4) -> list[Example]:
    return [
        Example(prompt=f"Say {i}", completion=f"{STYLES[user]} {i}", user=user)
        for user in users
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def cp() -> ControlPrefix:
    """Three users who are trained on what they write, but cleo on what bo writes."""
    built = engine()
    texts = {user: [f"{STYLES[user]} {i}" for i in range(6)] for user in STYLES}
    built.train_users(
        {**texts, "cleo": texts["bo"]},
        num_slots=4,
        steps=40,
        learning_rate=0.2,
        validation=0,
        progress=False,
    )
    return built


def nats(cp: ControlPrefix, row: Example, user: str | None) -> float:
    (score,) = cp.score([row.model_copy(update={"user": user})])
    return -score.log_likelihood / score.num_tokens


@pytest.mark.slow
def test_gains_are_over_other_users_and_over_none(cp: ControlPrefix) -> None:
    examples = rows(["ana", "bo", "cleo"])
    result = evaluate_users(cp, examples)
    assert set(result.users) == {"ana", "bo", "cleo"}
    for user, own in result.users.items():
        others = [name for name in STYLES if name != user]
        own_rows = [row for row in examples if row.user == user]
        gains = [
            sum(nats(cp, row, other) for other in others) / 2 - nats(cp, row, user)
            for row in own_rows
        ]
        assert own.gain.mean == pytest.approx(sum(gains) / len(gains), abs=1e-4)
        over_none = [nats(cp, row, None) - nats(cp, row, user) for row in own_rows]
        assert own.gain_over_none.mean == pytest.approx(sum(over_none) / len(gains), abs=1e-4)
        assert own.num_rows == 4
    means = [own.gain.mean for own in result.users.values()]
    assert result.gain.mean == pytest.approx(sum(means) / 3, abs=1e-6)
    assert result.worst_decile == pytest.approx(min(means))


@pytest.mark.slow
def test_users_who_do_not_fit_together_are_scored_in_turn(
    cp: ControlPrefix, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = rows(["ana", "bo", "cleo"])
    together = evaluate_users(cp, examples)
    monkeypatch.setattr("controlprefix.evaluation.users._USERS_AT_ONCE", 2)
    in_turn = evaluate_users(cp, examples)
    for user, own in together.users.items():
        assert in_turn.users[user].gain.mean == pytest.approx(own.gain.mean, abs=1e-5)
    for name in ("prefixes", "data"):
        assert in_turn.about[name] == together.about[name]


def test_who_is_harmed_is_named_by_the_interval(cp: ControlPrefix) -> None:
    result = evaluate_users(cp, rows(["ana", "bo", "cleo"]))
    assert not result.users["ana"].is_harmed
    assert not result.users["bo"].is_harmed
    # Cleo's prefix is bo's: her rows are as likely with his, and less likely than with no prefix.
    assert result.users["cleo"].gain.mean < result.users["ana"].gain.mean
    assert result.harmed.mean == sum(u.is_harmed for u in result.users.values()) / 3


def test_users_with_a_row_are_not_called_unharmed() -> None:
    def user(*gains: float) -> UserResult:
        return UserResult(len(gains), bootstrap_mean(gains), bootstrap_mean(gains), 0.0)

    one_row = summarize({f"u{i}": user(-1.0) for i in range(20)}, {}, 8, {})
    assert math.isnan(one_row.harmed.mean)
    assert one_row.num_too_few == 20
    assert harmed_text(one_row) == "cannot tell"
    both = summarize({"a": user(-1.0), "b": user(-1.0, -1.1, -0.9), "c": user(1.0, 1.1)}, {}, 8, {})
    assert (both.harmed.mean, both.num_too_few) == (0.5, 1)


def test_a_name_typed_in_two_ways_is_one_user(cp: ControlPrefix) -> None:
    cp.put("user", "é", cp.get("user", "ana"))
    try:
        examples = [row.model_copy(update={"user": "e\u0301"}) for row in rows(["ana"])]
        own = [row.model_copy(update={"user": "é"}) for row in rows(["ana"])]
        groups: Any = {"g": {"e\u0301": "f", "bo": math.nan}}
        result = evaluate_users(cp, examples + own + rows(["bo"]), groups=groups, min_group_size=1)
        assert set(result.users) == {"é", "bo"}
        assert set(result.groups["g"]) == {"f"}
    finally:
        cp.forget_user("é")


def test_divergence_on_impersonal_prompts_is_zero_without_effect(cp: ControlPrefix) -> None:
    silent = Prefix(cp.geometry, {"decoder": torch.zeros(1, cp.geometry.slot_size("decoder"))})
    # Keys that no query likes: all attention stays on the tokens.
    cp.put("user", "silent", silent)
    cp.put("user", "loud", Prefix.random(cp.geometry, num_slots=4, scale=2.0, seed=1))
    try:
        examples = [
            Example(prompt="Say", completion="Well well", user=user) for user in ("silent", "loud")
        ]
        result = evaluate_users(cp, examples)
        assert 0 <= result.users["silent"].off_context < result.users["loud"].off_context
        assert evaluate_users(cp, examples, prompts=()).users["loud"].off_context == 0
    finally:
        cp.forget_user("silent")
        cp.forget_user("loud")


def test_small_groups_are_only_named(cp: ControlPrefix) -> None:
    groups = {"sea": {"ana": "no", "bo": "yes", "cleo": "no"}}
    result = evaluate_users(cp, rows(list(STYLES)), groups=groups, min_group_size=2)
    assert set(result.groups["sea"]) == {"no"}
    assert result.too_small == ("sea=yes",)
    gains = [result.users[user].gain.mean for user in ("ana", "cleo")]
    assert result.groups["sea"]["no"].mean == pytest.approx(sum(gains) / 2)
    with pytest.raises(TrainingDataError, match="rows of 1 users"):
        evaluate_users(cp, rows(["ana"]))


@pytest.mark.slow
def test_the_command_reports_and_writes(
    cp: ControlPrefix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from controlprefix.cli import app
    from controlprefix.cli.groups import EngineArguments

    monkeypatch.setattr(EngineArguments, "open", lambda self, **_: cp)
    data, groups = tmp_path / "rows.jsonl", tmp_path / "groups.json"
    data.write_text(
        "\n".join(row.model_dump_json(exclude_unset=True) for row in rows(list(STYLES)))
    )
    groups.write_text('{"sea": {"ana": "no", "bo": "yes"}}')
    folder = tmp_path / "report"
    arguments = ["eval-users", str(data), "--groups", str(groups), "--folder", str(folder)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "3 users, 0 with too few rows to tell; harmed" in result.output
    assert "sea=yes" in result.output
    assert set(json.loads((folder / "users.json").read_text())["users"]) == set(STYLES)
    assert (folder / "users.png").stat().st_size > 1000
    page = (folder / "users.html").read_text()
    assert "For whom user prefixes work" in page
    assert all(f"<td>{user}</td>" in page for user in STYLES)
    groups.write_text('["ana"]')
    assert CliRunner().invoke(app, arguments).exit_code != 0


@pytest.mark.slow
def test_groups_are_columns_of_the_rows(
    cp: ControlPrefix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from controlprefix.cli.groups import EngineArguments

    monkeypatch.setattr(EngineArguments, "open", lambda self, **_: cp)
    fields = [row.model_dump(mode="json", exclude_unset=True) for row in rows(list(STYLES))]
    with_ages = [{**row, "age": 20 if row["user"] == "bo" else 30} for row in fields]
    data = tmp_path / "ages.jsonl"
    data.write_text("\n".join(map(json.dumps, with_ages)))
    options = ["--group-columns", "age", "--min-group-size", "1", "--folder", str(tmp_path / "x")]
    output = command(tmp_path, "eval-users", str(data), *options)
    assert "age=20" in output
    assert "age=30" in output
    data.write_text("\n".join(map(json.dumps, [*with_ages, {**with_ages[0], "age": 50}])))
    with pytest.raises(RequestError, match="'50' in the column 'age'"):
        command(tmp_path, "eval-users", str(data), *options)
    with pytest.raises(RequestError, match="a group in the column 'sex'"):
        command(tmp_path, "eval-users", str(data), "--group-columns", "sex")


def test_wrong_groups_are_told_before_anything_is_scored(
    cp: ControlPrefix, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = rows(["ana", "bo"])
    groups: Any = {"age": {"ana": 30, "bo": None}}
    result = evaluate_users(cp, examples, groups=groups, min_group_size=1)
    assert list(result.groups["age"]) == ["30"]
    monkeypatch.setattr(ControlPrefix, "score", None)
    wrong: list[dict[str, Any]] = [{"groups": {"ana": "a"}}, {"groups": ["a"]}]
    for options in (*wrong, {"min_group_size": 0}):
        with pytest.raises(
            TrainingDataError, match="groups maps each grouping|min_group_size is 0"
        ):
            evaluate_users(cp, examples, **options)


def test_divergence_is_that_of_the_plain_model_from_the_steered_one(cp: ControlPrefix) -> None:
    request = Request(prompt="Say", raw=True, max_new_tokens=24)
    reader = cp.frozen_model.request_tokenizer
    prompt, answer = reader.prompt_ids(request), reader.inner_ids(cp.generate(request).text)
    plain, steered = (
        run(cp.model, [torch.tensor([[*prompt, *answer]])], [parts])[0, len(prompt) - 1 : -1]
        .double()
        .log_softmax(1)
        for parts in ([], [Part(cp.get("user", "ana"))])
    )
    expected = float((plain.exp() * (plain - steered)).sum(1).mean())
    result = evaluate_users(cp, rows(["ana", "bo"]), prompts=["Say"])
    assert result.users["ana"].off_context == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_groups_that_prefixes_reveal_are_told_and_others_are_not(cp: ControlPrefix) -> None:
    ana, bo = cp.get("user", "ana"), cp.get("user", "bo")
    names = [f"user{i}" for i in range(10)]
    groups = {
        "club": {name: "xy"[i % 2] for i, name in enumerate(names)},
        "alone": {names[0]: "z", names[1]: "w"},
    }
    own = [
        Example(prompt=f"Say {i}", completion=f"{STYLES['ana' if i % 2 else 'bo']} {k}", user=name)
        for i, name in enumerate(names)
        for k in range(2)
    ]

    def revealed(prefixes: list[Prefix]) -> Any:
        for name, prefix in zip(names, prefixes, strict=True):
            cp.put("user", name, prefix)
        options: dict[str, Any] = {"groups": groups, "min_group_size": 4, "num_texts": 3}
        result = evaluate_users(cp, own, **options)
        assert set(result.revealed) == {"club"}  # the others are too few
        assert result.revealed == evaluate_users(cp, own, **options).revealed
        return result

    apart = revealed([ana if i % 2 else bo for i in range(10)])
    club = apart.revealed["club"]
    assert (club.chance, club.num_users) == (0.5, 10)
    assert club.own.mean == 1
    assert club.written.mean >= 0.9
    assert club.without.low <= 0.5  # the prompts tell nothing
    alike = revealed([ana] * 10).revealed["club"]
    assert alike.own.mean == 1
    assert alike.written.low <= 0.5
    assert alike.written.mean <= 0.8
    with pytest.raises(TrainingDataError, match="num_texts is -1"):
        evaluate_users(cp, own, num_texts=-1)
    with pytest.raises(TrainingDataError, match="give groups"):
        evaluate_users(cp, own, num_texts=1)
    for name in names:
        cp.forget_user(name)


@pytest.mark.slow
def test_the_page_says_what_texts_reveal(cp: ControlPrefix, tmp_path: Path) -> None:
    examples = rows(["ana", "bo"])
    groups = {"club": {"ana": "x", "bo": "y"}}
    result = evaluate_users(cp, examples, groups=groups, min_group_size=1, num_texts=1)
    assert not result.revealed  # nobody is left to learn from
    four = revealed_groups(
        cp,
        {f"u{i}": [row.model_copy(update={"user": "ana"}) for row in examples] for i in range(4)},
        {"club": {f"u{i}": "xy"[i % 2] for i in range(4)}},
        num_texts=1,
        min_group_size=1,
        seed=0,
    )
    page = replace(result, revealed=four).save(tmp_path).read_text()
    assert "club, told from texts written with users' prefixes (chance 50%)" in unescape(page)
    saved = json.loads((tmp_path / "users.json").read_text())
    assert saved["revealed"]["club"]["chance"] == 0.5


def test_groups_of_any_size_have_intervals_within_0_and_1() -> None:
    labels = ["x"] * 4 + ["y"] * 40
    estimate = revealed_groups_module._balanced_accuracy(["aaa"] * 4 + ["zzz"] * 40, labels, 0)
    assert list(estimate) == [1, 1, 1]
    alike = revealed_groups_module._balanced_accuracy(["aaa"] * 44, labels, 0)
    assert alike.mean == pytest.approx(0.5)  # one label for all
    rng = random.Random(0)
    texts = ["".join(rng.choices("abcdefgh", k=30)) for _ in labels]
    noise = revealed_groups_module._balanced_accuracy(texts, labels, 0)
    assert 0 <= noise.low <= noise.mean <= noise.high <= 1
    assert noise.low <= 0.5


def test_users_whose_names_are_numbers_have_groups() -> None:
    """As a column of numbers with gaps is read from Parquet."""
    assert checked_groups({"age": {1.0: 20, 2: 30}}, 1) == {"age": {"1": "20", "2": "30"}}  # type: ignore[dict-item]
    records = [Record("row", {"user": user, "age": 20.0}) for user in (1.0, 2, "3")]
    assert _groups_of_column(records, "age", "user") == {"1": "20", "2": "20", "3": "20"}
