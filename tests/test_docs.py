"""The README and the examples do what they say."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from controlprefix import ControlPrefix
from controlprefix.interop import read_examples

from helpers import commands
from models import build, byte_tokenizer

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.slow
def test_readme_quickstart_runs_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (quickstart,) = re.findall(r"```python\n(# quickstart.*?)```", README, re.DOTALL)
    assert sum(bool(line.strip()) for line in quickstart.splitlines()) <= 23
    exec(compile(quickstart, "README.md", "exec"), {"__name__": "quickstart"})
    printed = capsys.readouterr().out
    (shown_text,) = re.findall(r"It prints:\n\n```text\n(.*?)```", README, re.DOTALL)
    # Words of a model differ between machines; what the library says does not.
    for line in shown_text.splitlines():
        label = line.split("->")[0].rstrip()
        assert label in printed


@pytest.mark.parametrize("name", ["quickstart", "users", "any_transformers_call"])
def test_examples_run(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    model, tokenizer = build("llama"), byte_tokenizer()
    tokenizer.padding_side = "left"
    with_two_lengths = ControlPrefix.from_pretrained(model, tokenizer=tokenizer, store="sqlite://")
    options = {} if name == "any_transformers_call" else {"steps": 1}
    example.main(with_two_lengths, **options)
    assert capsys.readouterr().out.strip()


def test_every_target_is_in_the_readme() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert len(targets) > 5
    for target in set(targets) - {"clean"}:
        assert f"make {target}" in README


def test_the_page_of_the_command_line_lists_every_command_and_no_other() -> None:
    page = (ROOT / "docs" / "guides" / "command-line.md").read_text()
    listed = set(re.findall(r"^\| `controlprefix ([a-z -]+)`", page, re.MULTILINE))
    assert listed == {" ".join(path) for path in commands()}


def test_links_in_the_documents_lead_to_files() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), (page.name, target)


def test_figures_in_the_readme_are_those_of_the_recorded_demo() -> None:
    record = json.loads((ROOT / "docs" / "results" / "demo.json").read_text())
    rows = dict(re.findall(r"^\| (\w+) \| (.+?) \|$", README, re.MULTILINE))
    compared = 0
    for group in record["nats_per_token"].values():
        for name, figures in group.items():
            shown_text = [float(cell) for cell in rows[name].split(" | ")]
            assert shown_text == [round(value, 2) for value in figures.values()], name
            compared += 1
    assert compared == 5


def test_the_speed_rows_in_the_readme_are_those_of_the_results() -> None:
    measured = (ROOT / "docs" / "results" / "speed.md").read_text().splitlines()
    (table,) = re.findall(r"\| what \| against \| ratio.*\n\| ---.*\n((?:\|.*\n)+)", README)
    assert len(table.splitlines()) == 5
    assert set(table.splitlines()) <= set(measured)


@pytest.mark.parametrize("name", ["speed", "serving"])
def test_tables_on_the_results_page_are_those_of_the_results(name: str) -> None:
    rows = _table(name)
    assert len(rows) > 4
    assert "\n".join(rows) in (ROOT / "docs" / "results" / f"{name}.md").read_text()


@pytest.mark.parametrize(
    ("name", "file", "columns"),
    [
        ("learned", "training", {0: ("formality", "nats"), 4: ("e2e", "nats")}),
        ("control", "control", {0: ("aspects", "control"), 2: ("styles", "control")}),
    ],
)
def test_short_tables_hold_the_cells_of_the_whole_ones(
    name: str, file: str, columns: dict[int, tuple[str, str]]
) -> None:
    rows = [line.strip("| ").split(" | ") for line in _table(name)[2:]]
    whole = (ROOT / "docs" / "results" / f"{file}.md").read_text()
    for column, (section, measure) in columns.items():
        expected = _column(whole, section, measure)
        shown_text = {way: cells[column] for way, *cells in rows if column < len(cells)}
        shared = {way: cell for way, cell in shown_text.items() if cell.strip() and way in expected}
        assert len(shared) > 8
        assert shared == {way: expected[way] for way in shared}


def _table(name: str) -> list[str]:
    """The lines of a marked table on the results page."""
    page = (ROOT / "docs" / "results.md").read_text()
    (table,) = re.findall(f"<!-- {name} -->(.*)<!-- /{name} -->", page, re.DOTALL)
    return [line for line in table.splitlines() if line.startswith("|")]


def _column(page: str, section: str, measure: str) -> dict[str, str]:
    """Way → mean, in the first table of a section."""
    (text,) = re.findall(rf"^## {section}\b.*?$(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE)
    (first, *_) = re.findall(r"((?:^\|.*\n)+)", text, re.MULTILINE)
    header, _, *lines = [line.strip("| \n").split(" | ") for line in first.splitlines()]
    place = header.index(measure)
    return {line[0]: line[place].split(" ± ")[0] for line in lines if place < len(line)}


def test_the_demo_data_is_whole() -> None:
    data = ROOT / "controlprefix" / "cli" / "demo_data"
    files = {path.name: read_examples(path) for path in data.glob("*.jsonl")}
    messages, users = files["messages.train.jsonl"], files["users.train.jsonl"]
    assert sum(map(len, files.values())) >= 240
    assert {e.user for e in users} == {"ana", "bo", "cleo"}
    tones = {e.attributes["tone"] for e in messages}
    assert len(tones) == 3
    assert {e.attributes["formality"] for e in messages} == {"formal", "informal"}
    prompts = [{e.prompt for e in rows} for rows in files.values()]
    assert sum(map(len, prompts)) == len(set().union(*prompts))  # held-out prompts are held out
