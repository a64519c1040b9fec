"""The report of a comparison, and the command."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from controlprefix import RequestError
from controlprefix.cli import app
from controlprefix.evaluation.comparison import (
    METHODS,
    ComparisonReport,
)


def test_differences_between_methods_are_paired_over_rows() -> None:
    prompts = [i // 2 for i in range(40)]  # two references each
    noise = [(i * 7919 % 13) / 13 for i in range(40)]
    methods = {
        "a": {"runs": {"0": {"nats": 2.0}}, "row nats": {"0": noise}, "row prompts": prompts},
        "b": {
            "runs": {"0": {"nats": 2.1}},
            "row nats": {"0": [value + 0.1 for value in noise], "1": [9.0] * 40},
            "row prompts": prompts,
        },
    }
    report = ComparisonReport.from_dict({"options": {}, "methods": methods})
    ((_, header, rows), *_) = report.tables()
    assert [column.title for column in header[:2]] == ["loss", "behind the best"]
    cells = {name: [text for text, _ in own] for name, own in rows}
    assert cells["a"][1] == ""
    assert cells["b"][1] == "0.100 (0.100 to 0.100)"  # rows differ by more than methods


@pytest.mark.slow
def test_a_report_marks_the_best_and_escapes_texts(tmp_path: Path) -> None:
    def method(nats: float, text: str) -> dict[str, Any]:
        run = {"nats": nats, "divergence, answers": nats / 10, "accuracy, tone": 0.5}
        texts = [{"prompt": "", "labels": {"tone": "a_b"}, "text": text}]
        return {"runs": {"0": run, "1": run}, "texts": texts, "validation": {"0.1": 1.0}}

    options = {
        "model": "X", "dtype": "float32", "steps": 1, "batch_size": 1, "num_slots": 1,
        "data": "1", "fingerprint": "f", "rows": {"training": 1, "validation": 1, "test": 9},
    }  # fmt: skip
    about = {"command": "c", "date": "d", "device": "CPU", "threads": 1, "python": "3"}
    methods = {"plain": method(1.0, "x"), "a": method(2.0, "<b>&"), "b": method(3.0, "y")}
    report = ComparisonReport(options, methods, {**about, "versions": {"torch": "2"}})
    assert "| a | **2.000** |" in report.markdown()  # the plain model takes no part
    assert r"\textbf{2.000}" in report.latex()
    html = report.save(tmp_path).read_text(encoding="utf-8")
    assert "&lt;b&gt;&amp;" in html
    assert "<b>&" not in html
    assert "9 rows are too few" in html
    assert ComparisonReport.from_dict(json.loads((tmp_path / "report.json").read_text())) == report


def test_the_command_reads_an_experiment(tmp_path: Path) -> None:
    listed = CliRunner().invoke(app, ["compare", "--list"])
    assert listed.output.splitlines() == list(METHODS)
    experiment = tmp_path / "experiment.toml"
    experiment.write_text('rows = "rows.jsonl"\nstep = 3\n')
    failed = CliRunner().invoke(app, ["compare", "--experiment", str(experiment)])
    assert "unknown entry 'step'" in str(failed.exception)
    assert "steps" in str(failed.exception)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('validation = ["a"]', "there is no such file"),
        ("methods = 5", "methods are 5"),
        ('[columns]\nattributes = "tone"', "attributes, a table"),
    ],
)
def test_wrong_types_in_an_experiment_are_named(tmp_path: Path, line: str, words: str) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Hi", "completion": "Hello"}\n')
    experiment = tmp_path / "experiment.toml"
    experiment.write_text(f"rows = {json.dumps(str(rows))}\n{line}\n")
    result = CliRunner().invoke(app, ["compare", "--experiment", str(experiment)])
    assert isinstance(result.exception, RequestError)
    assert words in str(result.exception)
