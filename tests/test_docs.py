"""The README and the examples do what they say."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
from test_cli import COMMANDS

from controlprefix import ControlPrefix
from controlprefix.interop import read_examples

from models import build, byte_tokenizer

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_readme_quickstart_runs_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (quickstart,) = re.findall(r"```python\n(# quickstart.*?)```", README, re.DOTALL)
    assert sum(bool(line.strip()) for line in quickstart.splitlines()) <= 23
    exec(compile(quickstart, "README.md", "exec"), {"__name__": "quickstart"})
    printed = capsys.readouterr().out
    (shown,) = re.findall(r"It prints:\n\n```text\n(.*?)```", README, re.DOTALL)
    # Words of a model differ between machines; what the library says does not.
    for line in shown.splitlines():
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


def test_every_command_and_target_is_in_the_readme() -> None:
    for command in COMMANDS:
        assert f"controlprefix {command}" in README, command
    for target in ("demo", "test", "check", "bench", "test-vllm", "bench-vllm"):
        assert f"make {target}" in README


def test_links_of_the_documents_lead_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), (page.name, target)


def test_figures_of_the_readme_are_those_of_the_recorded_run() -> None:
    record = json.loads((ROOT / "docs" / "results" / "demo.json").read_text())
    rows = dict(re.findall(r"^\| (\w+) \| (.+?) \|$", README, re.MULTILINE))
    for group in record["nats_a_token"].values():
        for name, figures in group.items():
            shown = [float(cell) for cell in rows[name].split(" | ")]
            assert shown == [round(value, 2) for value in figures.values()], name


def test_the_speed_table_of_the_readme_is_that_of_the_results() -> None:
    (table,) = re.findall(r"<!-- speed -->(.*)<!-- /speed -->", README, re.DOTALL)
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len(rows) > 10
    assert "\n".join(rows) in (ROOT / "docs" / "results" / "speed.md").read_text()


@pytest.mark.parametrize("name", ["learned", "personal", "control"])
def test_the_short_tables_of_the_readme_are_of_the_results(name: str) -> None:
    (table,) = re.findall(f"<!-- {name} -->(.*)<!-- /{name} -->", README, re.DOTALL)
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) > 8
    file = {"learned": "training"}.get(name, name)
    whole = (ROOT / "docs" / "results" / f"{file}.md").read_text()
    for way, *cells in rows:
        (line, *_) = [one for one in whole.splitlines()[::-1] if one.startswith(f"{way} |")]
        if name == "personal":  # the last table of the page is that of 16 texts
            assert cells[0] in line, way
        first = next(one for one in whole.splitlines() if one.startswith(f"{way} |"))
        assert cells[0] in line or cells[0] in first, way


def test_the_table_of_servers_is_that_of_the_results() -> None:
    (table,) = re.findall("<!-- serving -->(.*)<!-- /serving -->", README, re.DOTALL)
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len(rows) > 4
    assert "\n".join(rows) in (ROOT / "docs" / "results" / "serving.md").read_text()


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
