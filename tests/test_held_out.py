"""Held-out rows share no prompt and no user with rows that are trained on."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlprefix import Example, Message, TrainingDataError
from controlprefix.prefixes import PrefixKey
from controlprefix.training.held_out import (
    prompt_identity,
    split,
    split_examples,
    warn_of_shared_prompts,
)
from controlprefix.training.settings import TrainingSettings
from controlprefix.users import initialization, user_trainer
from controlprefix.users.user_training import split_user_rows, trained_texts, user_rows

from helpers import QUICK, engine, greetings

ROWS = st.lists(
    st.tuples(st.integers(0, 30), st.integers(0, 8), st.sampled_from("abc")),
    min_size=1,
    max_size=80,
)


def rows_of(triples: Sequence[tuple[int, int, str]]) -> list[Example]:
    return [
        Example(prompt=f"Prompt {p}", user=f"u{u}", completion=f"{i}", attributes={"tone": label})
        for i, (p, u, label) in enumerate(triples)
    ]


@pytest.mark.slow
@given(ROWS, st.sampled_from([0.0, 0.05, 0.1, 0.3]), st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_no_prompt_is_on_both_sides_and_no_label_loses_its_last_row(
    triples: list[tuple[int, int, str]], fraction: float, seed: int
) -> None:
    rows = rows_of(triples)
    learned = [[PrefixKey.for_label("tone", label)] for _, _, label in triples]
    training, held_out = split([[prompt_identity(row)] for row in rows], fraction, seed, learned)
    assert sorted([*training, *held_out]) == list(range(len(rows)))
    prompts = [{rows[i].prompt for i in ids} for ids in (training, held_out)]
    assert not prompts[0] & prompts[1]
    assert {learned[i][0] for i in training} == {keys[0] for keys in learned}
    if not fraction:
        assert not held_out
    assert len(held_out) <= max(round(fraction * len(rows)), 0.3 * len(rows))
    again = split([[prompt_identity(row)] for row in rows], fraction, seed, learned)
    assert again == (training, held_out)


@given(ROWS, st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_rows_that_are_linked_through_others_stay_together(
    triples: list[tuple[int, int, str]], seed: int
) -> None:
    links = [[("prompt", p), ("user", u)] for p, u, _ in triples]
    training, held_out = split(links, 0.2, seed)
    sides = [{link for i in ids for link in links[i]} for ids in (training, held_out)]
    assert not sides[0] & sides[1]


def test_references_of_one_prompt_are_held_out_together() -> None:
    """Like E2E: each prompt has several rows, in any spelling of its spaces and capitals."""
    rows = [
        Example(prompt=f"name[{i}]" if j else f" NAME[{i}] ", task="e2e", completion=f"{i} {j}")
        for i in range(20)
        for j in range(4)
    ]
    learned = [[PrefixKey("task", "e2e")]] * len(rows)
    training, held_out = split_examples(rows, learned, 0.1, 0)
    assert len(held_out) == 8
    assert not {i // 4 for i in training} & {i // 4 for i in held_out}


def test_users_are_held_out_whole_unless_they_are_what_is_trained() -> None:
    rows = [
        Example(prompt=f"{user} {i}", user=f"u{user}", task="t", completion=f"{user} {i}")
        for user in range(10)
        for i in range(5)
    ]
    by_task = [[PrefixKey("task", "t")]] * len(rows)
    training, held_out = split_examples(rows, by_task, 0.1, 0)
    assert len(held_out) == 5
    assert len({rows[i].user for i in held_out}) == 1
    assert not {rows[i].user for i in training} & {rows[i].user for i in held_out}
    by_user = [[PrefixKey("user", row.user or "")] for row in rows]
    training, held_out = split_examples(rows, by_user, 0.1, 0)
    assert len(held_out) == 5
    assert {rows[i].user for i in training} == {row.user for row in rows}


def test_one_prompt_for_all_rows_is_said_and_rows_are_held_out_by_their_text(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows = [Example(prompt="Write.", task="t", completion=f"text {i // 2}") for i in range(40)]
    learned = [[PrefixKey("task", "t")]] * len(rows)
    with caplog.at_level(logging.WARNING):
        training, held_out = split_examples(rows, learned, 0.1, 0)
    assert "too few prompts" in caplog.text
    assert len(held_out) == 4
    assert not {i // 2 for i in training} & {i // 2 for i in held_out}


def test_texts_without_a_prompt_are_held_out_without_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows = [Example(prompt="", raw=True, task="t", completion=f"text {i}") for i in range(20)]
    with caplog.at_level(logging.WARNING):
        _, held_out = split_examples(rows, [[PrefixKey("task", "t")]] * 20, 0.1, 0)
    assert len(held_out) == 2
    assert not caplog.text


def test_a_runs_validation_prompts_are_not_trained_on() -> None:
    cp = engine()
    report = cp.train(greetings(), **{**QUICK, "steps": 1, "validation": 0.25})
    assert (report.num_examples, report.num_held_out) == (12, 4)


@pytest.mark.slow
def test_rows_of_ones_own_choose_the_best_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cp = engine()
    dev = [
        {"prompt": f"Meet {i}", "task": "greet", "attributes": {"formality": "formal"},
         "completion": "Good day."}
        for i in range(3)
    ]  # fmt: skip
    report = cp.train(greetings(), **{**QUICK, "validation": dev})
    assert (report.num_examples, report.num_held_out) == (16, 3)
    assert report.validation[0][0] == 0
    path = tmp_path / "dev.csv"
    path.write_text("prompt,task,completion\nMeet 1,greet,Good day.\n")
    from_file = cp.train(greetings(), **{**QUICK, "validation": path})
    assert from_file.num_held_out == 1
    with caplog.at_level(logging.WARNING):
        cp.train(greetings(), **{**QUICK, "validation": greetings(1)})
    assert "2 of 2 held-out rows have a prompt" in caplog.text
    other = [{"prompt": "Meet", "task": "other", "completion": "x"}]
    with pytest.raises(TrainingDataError, match="held-out rows name no prefix that is trained"):
        cp.train(greetings(), **{**QUICK, "validation": other})


def test_labels_without_a_step_are_named_and_not_stored() -> None:
    cp = engine()
    rows = [
        Example(prompt=f"Say {i}", attributes={"topic": f"t{i}"}, completion=f"words {i}")
        for i in range(8)
    ]
    settings = {**QUICK, "steps": 1, "batch_size": 2, "validation": 0}
    report = cp.train(rows, **settings)
    assert len(report.saved) == 2
    assert len(report.untrained) == 6
    assert {f"attribute {name!r}" for name in cp.names("attribute")} == set(report.saved)
    assert not set(report.saved) & set(report.untrained)


def test_parts_of_one_text_are_on_one_side() -> None:
    """A user's long text is cut into rows, which must not be split between both sides."""
    cp = engine()
    texts = [letter * 600 for letter in "abcdefghij"]
    report = cp.train_users({"ana": texts}, **{**QUICK, "steps": 1, "validation": 0.1})
    ana = report.users["ana"]
    assert ana.num_held_out == 3  # 600 letters are three rows
    assert ana.num_examples == 27


def test_what_reads_the_same_is_on_one_side() -> None:
    """Accents composed or not, ids, and texts that are another row's completion."""
    composed, decomposed = "caf\u00e9 {}", "cafe\u0301 {}"
    forms = {
        "prompts": lambda i, form: Example(prompt=form.format(i), completion=f"{form} {i}"),
        "users": lambda i, form: Example(
            prompt=f"{form} {i}", completion=f"x{i}{form}", user=form.format(i)
        ),
        "ids": lambda i, form: Example(prompt_ids=(1, i), completion=f"{form} {i}"),
        "texts": lambda i, form: (
            Example(prompt="", raw=True, completion=f"text {i}")
            if form == composed
            else Example(prompt=f"Write {i}", completion=f"Text  {i}")
        ),
    }
    for name, make in forms.items():
        rows = [make(i, form) for i in range(20) for form in (composed, decomposed)]
        training, held_out = split_examples(rows, [[]] * len(rows), 0.2, 0)
        assert held_out, name
        assert not {i // 2 for i in training} & {i // 2 for i in held_out}, name


def test_a_prompt_is_the_same_as_one_message() -> None:
    as_text = Example(prompt="Greet  Sam", completion="x")
    as_message = Example(messages=[{"role": "user", "content": "greet Sam"}], completion="y")
    assert prompt_identity(as_text) == prompt_identity(as_message)


def test_images_are_part_of_a_prompt_and_link_rows() -> None:
    images = [b"one", b"two", b"three", b"four"]
    rows = [
        Example(prompt=question, images=(image,), completion=f"answer {i}", task="t")
        for i, (image, question) in enumerate(
            (image, question) for image in images for question in ("What is it?", "Which colour?")
        )
    ]
    assert len({prompt_identity(row) for row in rows}) == 8
    message = Message(role="user", content="What is it?", images=(b"one",))
    same = Example(messages=(message,), completion="x", task="t")
    assert prompt_identity(same) == prompt_identity(rows[0])
    # Each question links all rows but its own image's; by text alone they can be held out.
    apart = [row.model_copy(update={"prompt": f"{row.prompt} {i}"}) for i, row in enumerate(rows)]
    chosen = split_examples(apart, [()] * len(apart), 0.25, seed=0)
    held_out = {apart[i].images for i in chosen.held_out}
    assert held_out
    assert not held_out & {apart[i].images for i in chosen.training}


def test_a_text_without_a_prompt_that_is_trained_on_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows = [Example(prompt="", completion=f"Text {i}", task="t", raw=True) for i in range(3)]
    with caplog.at_level(logging.WARNING, logger="controlprefix"):
        warn_of_shared_prompts(rows[:2], rows)
    assert "2 of 2 held-out rows have a prompt, or a text without one" in caplog.text
    caplog.clear()
    warn_of_shared_prompts(rows[:1], rows[1:])
    assert not caplog.text


def test_a_text_of_several_users_is_held_out_for_all() -> None:
    cp = engine()
    texts = [f"A text that many wrote, number {i}" for i in range(8)]
    rows = [row for user in ("ana", "bo") for row in user_rows(cp.frozen_model, user, texts, 0)[1]]
    settings = TrainingSettings(validation=0.25)
    training, held_out = split_user_rows(rows, settings)
    assert held_out
    assert not {row.row.targets for row in held_out} & {row.row.targets for row in training}


def test_users_start_from_texts_that_are_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[list[str]] = []

    def recorded(*arguments: Any, **options: Any) -> Any:
        initialize = initialization.initializer(*arguments, **options)

        def start(key: PrefixKey, texts: list[str]) -> Any:
            starts.append(texts)
            return initialize(key, texts)

        return start

    monkeypatch.setattr(user_trainer, "initializer", recorded)
    cp = engine()
    texts = [f"A text of ana's, number {i}" for i in range(10)]
    options: dict[str, Any] = {"validation": 0.3, "steps": 1, "num_slots": 2, "progress": False}
    cp.train_users({"ana": texts, "bo": ["one long text, in parts " * 60]}, **options)
    rows = user_rows(cp.frozen_model, "ana", texts, 0)[1]
    training, held_out = split_user_rows(rows, TrainingSettings(validation=0.3))
    assert len(held_out) == 3
    assert sorted(starts[0]) == sorted(row.text for row in training)
    rows = user_rows(cp.frozen_model, "bo", ["one long text, in parts " * 60], 0)[1]
    training, held_out = split_user_rows(rows, TrainingSettings(validation=0.3))
    assert held_out
    decode = cp.frozen_model.request_tokenizer.decode
    assert trained_texts(cp.frozen_model, training, held_out) == starts[1]
    assert starts[1] == [decode(row.row.targets) for row in training]
