"""Rows in the forms that people have them: files, frames, chats, references."""

import datetime
import gzip
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlprefix import Example, TrainingDataError
from controlprefix.data import (
    Columns,
    as_examples,
    as_preferences,
    as_texts,
    read_labelled,
    read_texts,
    read_users,
)

from helpers import QUICK, engine

RECORDS = [
    {"prompt": "Hi, you", "completion": 'He said "no";\nthen left', "task": "t", "tone": "warm"},
    {"prompt": "Bye", "completion": "ünïcode 日本\ttab", "task": "t"},
]
COLUMNS = Columns(attributes={"tone": "tone"})


def expected() -> list[tuple[Any, ...]]:
    return [
        ("Hi, you", 'He said "no";\nthen left', "t", {"tone": "warm"}),
        ("Bye", "ünïcode 日本\ttab", "t", {}),
    ]


def fields_of(examples: list[Example]) -> list[tuple[Any, ...]]:
    return [(e.prompt, e.completion, e.task, e.attributes) for e in examples]


def written(path: Path) -> Path:
    """The records as a file of the format that the suffix says."""
    frame = pandas.DataFrame(RECORDS)
    suffix = path.name.removesuffix(".gz").rpartition(".")[2]
    if suffix == "parquet":
        frame.to_parquet(path)
        return path
    text = {
        "csv": lambda: frame.to_csv(index=False),
        "semicolon": lambda: frame.to_csv(index=False, sep=";"),
        "tsv": lambda: frame.to_csv(index=False, sep="\t"),
        "json": lambda: json.dumps(RECORDS),
        "wrapped": lambda: json.dumps({"version": 1, "data": RECORDS}),
        "jsonl": lambda: "\n".join(map(json.dumps, RECORDS)) + "\n\n",
    }[suffix]()
    content = text.encode("utf-8-sig" if suffix == "csv" else "utf-8")
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize(
    "name",
    ["a.csv", "a.tsv", "a.json", "a.jsonl", "a.parquet", "a.csv.gz", "a.jsonl.gz"],
)
def test_every_format_gives_the_same_examples(name: str, tmp_path: Path) -> None:
    assert fields_of(as_examples(written(tmp_path / name), columns=COLUMNS)) == expected()


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.semicolon", "a.tsv", "a.wrapped"])
def test_the_content_tells_the_format_where_the_suffix_does_not(name: str, tmp_path: Path) -> None:
    path = written(tmp_path / name).rename(tmp_path / "data.txt")
    assert fields_of(as_examples(path, columns=COLUMNS)) == expected()


def test_standard_input_is_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    content = written(tmp_path / "a.jsonl").read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert fields_of(as_examples("-", columns=COLUMNS)) == expected()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one\ntwo\n")))
    assert read_texts(["-"]) == ["one", "two"]


def test_frames_and_datasets_are_rows() -> None:
    frame = pandas.DataFrame(RECORDS)
    dataset = datasets.Dataset.from_list(RECORDS)
    for rows in (frame, dataset, dataset.to_list(), iter(RECORDS)):
        assert fields_of(as_examples(rows, columns=COLUMNS)) == expected()
    with pytest.raises(TrainingDataError, match="a mapping of 'train'; give one of its values"):
        as_examples(datasets.DatasetDict({"train": dataset}))


def test_columns_by_any_name() -> None:
    rows = [{"id": 1, "body": "Dear Sam", "who": 7, "style": "formal", "rating": 4.0}]
    columns = Columns(text="body", user="who", attributes={"formality": "style", "stars": "rating"})
    (example,) = as_examples(rows, columns=columns, defaults={"task": "mail"})
    assert (example.prompt, example.raw, example.completion) == ("", True, "Dear Sam")
    assert (example.user, example.task) == ("7", "mail")
    assert example.attributes == {"formality": "formal", "stars": "4"}
    preference = {"prompt": "Hi", "chosen": "hey", "rejected": "Hello.", "author": "ana", "id": 1}
    (read,) = as_preferences([preference], columns=Columns(user="author"))
    assert (read.user, read.chosen, read.rejected) == ("ana", "hey", "Hello.")
    table = {"table": {"name": "Aromi"}, "completion": "Aromi.", "author": "ana", "id": 1}
    (example,) = as_examples([table], columns=Columns(user="author"))
    assert (example.user, example.prompt) == ("ana", "name[Aromi]")
    columns = Columns(prompt="prompt", completion="chosen")
    (chosen,) = as_examples([{**preference, "table": "T1"}], columns=columns)
    assert (chosen.prompt, chosen.completion) == ("Hi", "hey")
    alpaca = {"instruction": "Say hi", "input": "", "output": "Hi.", "text": "Say hi: Hi."}
    columns = Columns(prompt="instruction", completion="output")
    for extra in ({}, {"messages": [{"role": "user", "content": "x"}]}, {"prompt_ids": [1]}):
        (example,) = as_examples([{**alpaca, **extra}], columns=columns)
        assert (example.prompt, example.completion, example.messages) == ("Say hi", "Hi.", None)
    with pytest.raises(TrainingDataError, match="no column 'boddy'; .* did you mean 'body'"):
        as_examples(rows, columns=Columns(text="boddy"))
    with pytest.raises(TrainingDataError, match="row 1: .*unknown field 'id'"):
        as_examples(rows)


def test_a_task_is_a_column_or_a_name() -> None:
    rows = [{"prompt": "x", "completion": "y", "kind": "email"}]
    (by_column,) = as_examples(rows, columns=Columns(task="kind"), defaults={"task": "kind"})
    assert by_column.task == "email"
    (by_name,) = as_examples(
        [{"prompt": "x", "completion": "y"}],
        columns=Columns(task="mail"),
        defaults={"task": "mail"},
    )
    assert by_name.task == "mail"


def test_several_references_are_an_example_each() -> None:
    examples = as_examples([{"prompt": "x", "completion": ["a", "b"], "task": "t"}])
    assert [(e.prompt, e.completion) for e in examples] == [("x", "a"), ("x", "b")]
    with pytest.raises(TrainingDataError, match="completion is an empty list"):
        as_examples([{"prompt": "x", "completion": []}])


def test_all_wrong_rows_are_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [
        '{"prompt": "x", "completion": "y"}',
        "{",
        '{"prompt": "x"}',
        '{"promt": "x", "completion": "y"}',
        '{"text": "x", "completion": "y"}',
        "[1]",
    ]
    path.write_text("\n".join([*lines, *["{"] * 20]))
    with pytest.raises(TrainingDataError) as caught:
        as_examples(path)
    message = str(caught.value)
    assert message.startswith("25 rows cannot be used:")
    for part in (
        "rows.jsonl line 2: not JSON",
        "line 3: completion: Field required",
        "line 4: unknown field 'promt'; .* did you mean 'prompt'",
        "line 5: has a text and a prompt or completion",
        "line 6: not a JSON object",
        "and 15 more",
        "A row is",
    ):
        assert re.search(part, message), part


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"prompt,completion\nx,y,z\n", "line 2: 3 cells, but the header has 2"),
        (b"prompt,prompt\nx,y\n", "two columns are named 'prompt'"),
        (b'prompt,completion\n"x,y\n', "not CSV"),
        (b"prompt;completion\nm\xfcde;x\n", "line 2 is not UTF-8 text"),
        (b"prompt,completion\n", "has no examples"),
    ],
)
def test_broken_tables_say_where(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    with pytest.raises(TrainingDataError, match=message):
        as_examples(path)


def test_a_plain_text_is_no_table(tmp_path: Path) -> None:
    path = tmp_path / "letter"
    path.write_text("Dear Sam\nbye\n")
    with pytest.raises(TrainingDataError, match="cannot tell the format"):
        as_examples(path)
    path.write_bytes(b"\x1f\x8bbroken")
    with pytest.raises(TrainingDataError, match="cannot read"):
        as_examples(path)
    (tmp_path / "x.parquet").write_bytes(b"PAR1 broken")
    with pytest.raises(TrainingDataError, match="cannot read"):
        as_examples(tmp_path / "x.parquet")


@pytest.mark.slow
@given(st.lists(st.text(alphabet='ab,;\t\n" ü', min_size=1).filter(str.strip), min_size=1))
def test_any_text_survives_csv(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    path = tmp_path_factory.mktemp("csv") / "rows.csv"
    pandas.DataFrame({"text": texts, "n": 1}).to_csv(path, index=False, lineterminator="\r\n")
    read = as_examples(path, columns=Columns(text="text"))
    assert [e.completion for e in read] == texts


def test_texts_of_one_user(tmp_path: Path) -> None:
    letter = tmp_path / "letters.txt"
    letter.write_bytes("\ufeffDear Sam,\r\nbye.\r\n\r\nHi!\r\n".encode())
    assert read_texts([letter]) == ["Dear Sam,", "bye.", "Hi!"]
    assert read_texts([letter], split="paragraph") == ["Dear Sam,\nbye.", "Hi!"]
    assert read_texts([letter], split="file") == ["Dear Sam,\nbye.\n\nHi!"]
    table = tmp_path / "mails.csv"
    table.write_text("agent,body\nana,one\nbo,two\nana,three\n")
    columns = Columns(text="body", user="agent")
    assert read_texts([table], columns=columns, user="ana") == ["one", "three"]
    with pytest.raises(TrainingDataError, match="no rows of user 'anna'; .* did you mean 'ana'"):
        read_texts([table], columns=columns, user="anna")
    with pytest.raises(TrainingDataError, match="unknown field 'agent'"):
        read_texts([table])
    assert as_texts(table, columns=columns, user="bo") == ["two"]
    assert as_texts([{"text": "x"}]) == ["x"]
    assert as_texts("one text") == ["one text"]


def test_users_and_labels_come_from_any_rows(tmp_path: Path) -> None:
    frame = pandas.DataFrame({"user": ["a", "b", "a"], "text": ["1", "2", "3"]})
    assert read_users(frame) == {"a": ["1", "3"], "b": ["2"]}
    pairs = [("a", ["1"]), ("b", ["2"])]
    assert list(read_users(iter(pairs))) == pairs
    assert read_users(pairs) == pairs
    assert read_users({"a": ["1"]}) == {"a": ["1"]}
    with pytest.raises(TrainingDataError, match="row 2 names no user"):
        read_users([{"user": "a", "text": "1"}, {"text": "2"}])
    rows = [{"text": "hey", "attributes": {"tone": "warm", "stars": 5}}]
    assert read_labelled(rows) == {"tone": [("hey", "warm")], "stars": [("hey", "5")]}
    with pytest.raises(TrainingDataError, match="no row has a label"):
        read_labelled([{"text": "hey"}])


@pytest.mark.slow
def test_someones_table_is_trained_on_enrolled_and_scored(tmp_path: Path) -> None:
    """From a file to stored prefixes, without another line of code."""
    path = tmp_path / "export.csv"
    rows = [f"{i},ana,mail {i},{'formal' if i % 2 else 'casual'}" for i in range(12)]
    path.write_text("\n".join(["id,agent,body,style", *rows]) + "\n")
    cp = engine()
    columns = Columns(text="body", user="agent", attributes={"formality": "style"})
    report = cp.train(path, columns=columns, task="mail", **QUICK)
    assert sorted(report.saved) == [
        "attribute 'formality=casual'", "attribute 'formality=formal'", "task 'mail'",
    ]  # fmt: skip
    users = cp.train_users(path, columns=columns, **{**QUICK, "steps": 1})
    assert list(users.users) == ["ana"]
    assert cp.enroll("ana", path, columns=columns) == 2
    assert len(cp.score(path, columns=columns)) == 12


def test_classes_of_a_dataset_are_their_names() -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
    )
    rows = {"text": ["a", "b", "c"], "label": [0, 1, -1]}
    dataset = datasets.Dataset.from_dict(rows, features=features)
    columns = Columns(text="text", attributes={"mood": "label"})
    expected_labels = [{"mood": "neg"}, {"mood": "pos"}, {}]
    for source in (dataset, dataset.with_format("pandas")):
        assert [e.attributes for e in as_examples(source, columns=columns)] == expected_labels


def test_values_that_are_missing_are_no_labels(tmp_path: Path) -> None:
    rows = [{"text": "a", "attributes": {"x": "1"}}, {"text": "b", "attributes": {"y": "q"}}]
    expected_labels = [{"x": "1"}, {"y": "q"}]
    dataset = datasets.Dataset.from_list(rows)
    dataset.to_parquet(tmp_path / "rows.parquet")
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "attributes": {"x": "1", "y": NaN}}\n'
                    '{"text": "b", "attributes": {"x": null, "y": "q"}}\n')  # fmt: skip
    for source in (dataset, pandas.DataFrame(rows), tmp_path / "rows.parquet", path):
        assert [example.attributes for example in as_examples(source)] == expected_labels
    for label in (float("inf"), [1], {"a": 1, "b": {}}, datetime.date(2026, 1, 1)):
        with pytest.raises(TrainingDataError, match="attributes"):
            as_examples([{"text": "a", "attributes": {"x": label}}])
    with pytest.raises(TrainingDataError, match="a label of 'x' must be a text or a number, got"):
        as_examples([{"text": "a", "attributes": {"x": float("inf")}}])
    numbers = [{"text": "a", "attributes": {"x": np.int64(2), "y": np.bool_(True)}}]
    assert as_examples(numbers)[0].attributes == {"x": "2", "y": "true"}
    with pytest.raises(TrainingDataError, match="names a label twice"):
        as_examples([{"text": "a", "attributes": {"x": {1: 0.5, "1": 0.5}}}])


def test_mixtures_and_strengths_of_a_dataset_have_no_missing_labels() -> None:
    rows: list[dict[str, Any]] = [
        {
            "text": "a",
            "attributes": {"tone": {"warm": 0.6, "brief": 0.4}},
            "strengths": {"tone": 2},
        },
        {"text": "b", "attributes": {"tone": {"stern": 1.0}}, "strengths": {"user": 0.5}},
        {"text": "c", "attributes": {"style": {"plain": 1.0}}},
    ]
    for source in (rows, datasets.Dataset.from_list(rows)):
        examples = as_examples(source)
        assert [example.attributes for example in examples] == [row["attributes"] for row in rows]
        assert [example.strengths for example in examples] == [{"tone": 2}, {"user": 0.5}, {}]


def test_a_completion_may_be_a_message_as_trl_has_it() -> None:
    question = [{"role": "user", "content": "Hi."}]
    answer = {"role": "assistant", "content": "Hello!"}
    (example,) = as_examples([{"prompt": question, "completion": [answer]}])
    assert example.completion == "Hello!"
    assert [message.content for message in example.messages or ()] == ["Hi."]
    assert as_examples([{"prompt": "Hi.", "completion": [answer]}])[0].completion == "Hello!"
    for completion in ([answer, answer], question):
        with pytest.raises(TrainingDataError, match="must be one message, the assistant's"):
            as_examples([{"prompt": question, "completion": completion}])


def test_damaged_files_are_no_raw_errors(tmp_path: Path) -> None:
    content = bytearray(gzip.compress(b'{"text": "a"}' * 50))
    content[20:30] = b"\xff" * 10
    for name, data in (("a.jsonl.gz", bytes(content)), ("a.json", b"[" + b"9" * 5000 + b"]")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(TrainingDataError):
            as_examples(tmp_path / name)
    frame = pandas.DataFrame([["a", "b"]], columns=["text", "text"])
    with pytest.raises(TrainingDataError, match="two columns are named 'text'"):
        as_examples(frame)
    (tmp_path / "one.txt").write_text("one\n")
    assert read_texts(tmp_path / "one.txt") == ["one"]


def test_parquets_lists_are_read_from_a_frame(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    rows = [
        {
            "messages": [{"role": "user", "content": f"Say {i}"}],
            "completion": [f"one {i}", f"two {i}"],
        }
        for i in range(2)
    ]
    path = tmp_path / "rows.parquet"
    pandas.DataFrame(rows).to_parquet(path)
    frame, file = as_examples(pandas.read_parquet(path)), as_examples(path)
    assert [row.model_dump() for row in frame] == [row.model_dump() for row in file]
    triples = [{"triples": [["A", "is", "b"]], "completion": "A is b."}]
    pandas.DataFrame(triples).to_parquet(path)
    (example,) = as_examples(pandas.read_parquet(path))
    assert example.prompt == "| A : is : b"


def test_blank_lines_before_a_header_do_not_hide_the_delimiter(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b"\r\nprompt;completion\r\nHi, you;Hello\r\n")
    (example,) = as_examples(path)
    assert (example.prompt, example.completion) == ("Hi, you", "Hello")


def test_a_named_text_column_is_the_text(tmp_path: Path) -> None:
    rows = [{"a": "this", "completion": "not this", "prompt": "nor this"}]
    (example,) = as_examples(rows, columns=Columns(text="a"))
    assert (example.prompt, example.completion) == ("", "this")
    assert as_examples([example], columns=Columns(text="a")) == [example]


def test_a_dict_is_no_list_of_texts() -> None:
    for rows in ({"ana": ["a text"]}, {"train": [{"text": "x"}]}):
        with pytest.raises(TrainingDataError):
            as_texts(rows)
    assert as_texts({"text": "a text"}) == ["a text"]


def test_rows_that_are_objects_get_the_default_task_too() -> None:
    rows = [
        Example(prompt="Greet", completion="Hi", attributes={"tone": "warm"}),
        Example(prompt="Greet", completion="Hi", task="mail"),
    ]
    assert [row.task for row in as_examples(rows, defaults={"task": "note"})] == ["note", "mail"]
    assert rows[0].task is None  # the caller's own is not changed
