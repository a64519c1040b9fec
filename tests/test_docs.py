"""The README and the examples do what they say."""

import importlib
import importlib.util
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import jupytext
import pytest

from controlprefix import ControlPrefix, UnknownNameError, embeddings
from controlprefix.data import as_examples

from helpers import Letters
from image_models import image_model
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
    quickstart_names: dict[str, Any] = {"__name__": "quickstart"}
    exec(compile(quickstart, "README.md", "exec"), quickstart_names)
    printed = capsys.readouterr().out
    (shown_text,) = re.findall(r"It prints:\n\n```text\n(.*?)```", README, re.DOTALL)
    # Words of a model differ between machines; what the library says does not.
    for line in shown_text.splitlines():
        label = line.split("->")[0].rstrip()
        assert label in printed
    ((command, message),) = re.findall(r"```text\n>>> (.*)\n(.*)\n```", README)
    with pytest.raises(UnknownNameError) as error:
        eval(command, {"cp": quickstart_names["cp"]})
    assert message == f"UnknownNameError: {error.value}"


EXAMPLES = (
    "any_transformers_call",
    "captions",
    "quickstart",
    "simplification",
    "summaries",
    "tables",
    "users",
    "varieties",
)


def test_every_example_is_run() -> None:
    names = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert names == {*EXAMPLES, "clients"}  # which needs a server


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    model, tokenizer = build("llama"), byte_tokenizer()
    tokenizer.padding_side = "left"
    processor = None
    if name == "captions":
        model, tokenizer, processor = image_model("llava")
    with_two_lengths = ControlPrefix.from_pretrained(
        model, tokenizer=tokenizer, processor=processor, store="sqlite://"
    )
    options = {} if name == "any_transformers_call" else {"steps": 1}
    example.main(with_two_lengths, **options)
    assert capsys.readouterr().out.strip()


def test_every_extra_is_named() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].keys() - {"bench", "dev", "docs"}
    for page in (README, (ROOT / "docs" / "getting-started.md").read_text()):
        assert [extra for extra in sorted(extras) if f"`{extra}`" not in page] == []


def test_every_target_is_in_the_readme() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert len(targets) > 5
    for target in set(targets) - {"clean"}:
        assert f"make {target}" in README


GUIDES = (
    "getting-started",
    "guides/data",
    "guides/train",
    "guides/tasks",
    "guides/own-loop",
    "guides/users",
    "guides/strengths",
    "guides/store",
    "guides/share",
    "guides/evaluate",
)
WITH_A_SERVER = {"guides/serve"}  # its code needs a running server


def _python_blocks(page: Path) -> list[str]:
    """The code of a page, as in the notebook that `make docs` makes of it."""
    cells = jupytext.read(page).cells
    return [cell.source + "\n" for cell in cells if cell.cell_type == "code"]


def test_every_page_with_code_is_executed() -> None:
    docs = ROOT / "docs"
    pages = {str(p.relative_to(docs).with_suffix("")) for p in docs.rglob("*.md")}
    assert {name for name in pages if _python_blocks(docs / f"{name}.md")} == {
        *GUIDES,
        *WITH_A_SERVER,
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", GUIDES)
def test_the_code_of_a_guide_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tiny(model: str, **options: Any) -> ControlPrefix:
        assert model == "smollm2"
        return from_pretrained(build("llama"), tokenizer=byte_tokenizer(chat=True), **options)

    from_pretrained = ControlPrefix.from_pretrained
    monkeypatch.setattr(ControlPrefix, "from_pretrained", tiny)
    monkeypatch.setattr(embeddings, "load_embedder", lambda embedder: Letters())
    monkeypatch.chdir(tmp_path)
    code = "\n".join(_python_blocks(ROOT / "docs" / f"{name}.md"))
    exec(compile(code, name, "exec"), {"__name__": name})


def test_links_in_the_documents_lead_to_files() -> None:
    roots = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
    for page in [*roots, *(ROOT / "docs").rglob("*.md")]:
        links = re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", page.read_text())
        for target, anchor in links:
            is_generated = target.endswith("reference/cli.md")  # by `make docs`
            if target.startswith("http") or is_generated:
                continue
            path = page.parent / target if target else page
            assert path.exists(), (page.name, target)
            if anchor and path.suffix == ".md":
                assert anchor in _anchors(path), (page.name, target, anchor)


def _anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", heading.lower()) for heading in headings)
    return {re.sub(r"\s", "-", heading.strip()) for heading in plain}


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


def test_tables_are_those_of_the_result_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Running `benchmarks/tables.py` again changes nothing."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    tables = importlib.import_module("tables")
    folder = ROOT / "docs" / "results"
    files = tables.read_results(folder)
    for name, page in tables.PAGES.items():
        assert (folder / f"{name}.md").read_text() == page(files) + "\n", name
    for document, names in tables.DOCUMENTS.items():
        text = (ROOT / document).read_text()
        for name in names:
            table = tables.TABLES[name](files)
            assert table.count("\n") > 4
            assert f"<!-- {name} -->\n\n{table}\n\n<!-- /{name} -->" in text, name


@pytest.mark.parametrize(
    "name",
    [
        "attributes",
        "attributes-cuda",
        "attributes-aspects",
        "authors",
        "num_slots",
        "privacy",
        "privacy-matched",
        "strengths",
        "unseen_labels",
    ],
)
def test_pages_are_those_of_the_result_files(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script = importlib.import_module(name.partition("-")[0])
    path = ROOT / "docs" / "results" / f"{name.replace('_', '-')}.json"
    page = script.page(json.loads(path.read_text()))
    assert path.with_suffix(".md").read_text() == page.rstrip("\n") + "\n"


def test_comparisons_are_those_of_the_result_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script = importlib.import_module("comparison")
    paths = sorted((ROOT / "docs" / "results").glob("comparison-*.json"))
    assert len(paths) >= 4
    for path in paths:
        page = script.page(json.loads(path.read_text()))
        assert path.with_suffix(".md").read_text() == page.rstrip("\n") + "\n"


def test_results_say_when_and_how_they_were_measured() -> None:
    for path in (ROOT / "docs" / "results").glob("*.json"):
        if path.stem != "demo":
            assert {"command", "commit", "date", "machine"} < json.loads(path.read_text()).keys()


def test_the_demo_data_is_whole() -> None:
    data = ROOT / "controlprefix" / "cli" / "demo_data"
    files = {path.name: as_examples(path) for path in data.glob("*.jsonl")}
    messages, users = files["messages.train.jsonl"], files["users.train.jsonl"]
    assert sum(map(len, files.values())) >= 240
    assert {e.user for e in users} == {"ana", "bo", "cleo"}
    tones = {e.attributes["tone"] for e in messages}
    assert len(tones) == 3
    assert {e.attributes["formality"] for e in messages} == {"formal", "informal"}
    prompts = [{e.prompt for e in rows} for rows in files.values()]
    assert sum(map(len, prompts)) == len(set().union(*prompts))  # held-out prompts are held out
