"""Simplification: SARI, grade levels and control ratios, against published and computed values."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from controlprefix import Example, TrainingDataError
from controlprefix.cli import app
from controlprefix.data import control_ratios, with_ratios
from controlprefix.evaluation import grade_level, sari

WORDS = st.lists(st.sampled_from("abcdef"), min_size=1, max_size=6, unique=True).map(" ".join)


def test_sari_is_that_of_the_published_example() -> None:
    """The value in the documentation of Hugging Face's `sari`, computed by the authors' code."""
    references = [
        "About 95 species are currently known.",
        "About 95 species are now accepted.",
        "95 species are now accepted.",
    ]
    source = "About 95 species are currently accepted."
    assert sari([source], ["About 95 you now get in."], [references]) == pytest.approx(26.9536016)


@pytest.mark.slow
@given(source=WORDS, text=WORDS, references=st.lists(WORDS, min_size=1, max_size=3))
def test_sari_is_a_mean_that_does_not_reward_a_copy(
    source: str, text: str, references: list[str]
) -> None:
    score = sari([source], [text], [references])
    assert -1e-9 <= score <= 100 + 1e-9
    assert sari([source], [text], [references * 2]) == pytest.approx(score)
    assert sari([source], [source], [references]) <= 100 / 3 + 1e-9
    assert sari([source] * 2, [text] * 2, [references] * 2) == pytest.approx(score)


def test_grade_levels() -> None:
    whole, cut = "He left. She stayed.", "He left. She stayed"
    assert grade_level([whole]) == grade_level([cut]) == grade_level(["He left", "She stayed... "])
    # 6 words of 6 syllables in 1 sentence; 2 sentences of 2 words with 14 syllables.
    assert grade_level(["The cat sat on the mat."]) == pytest.approx(0.39 * 6 + 11.8 - 15.59)
    both = grade_level(["Simplification mattered.", "Examination mattered."])
    assert both == pytest.approx(0.39 * 2 + 11.8 * 14 / 4 - 15.59)
    quoted = grade_level(['"Simplification mattered." (Examination mattered.)'])
    assert quoted == pytest.approx(both)
    with pytest.raises(ValueError, match="no words"):
        grade_level(["..."])


@pytest.mark.slow
def test_ratios_move_with_what_they_name() -> None:
    source = "The physician administered the medication to the patient."
    same = control_ratios(source, source)
    assert same == {"length": 1.0, "similarity": 1.0, "word_rank": 1.0}
    shorter = control_ratios(source, "The physician administered the medication.")
    assert (shorter["length"], shorter["similarity"]) == (0.74, 1.0)  # cut, but not rewritten
    common = control_ratios(source, "The doctor gave the drug to the person who was ill.")
    assert common["word_rank"] < 0.9
    assert common["similarity"] < 0.7
    german = control_ratios("Der Arzt kam.", "Der Mediziner kam.", language="de")
    assert german["word_rank"] > 1
    with pytest.raises(TrainingDataError, match="no word list for 'xx'"):
        control_ratios(source, source, language="xx")
    with pytest.raises(TrainingDataError, match="empty"):
        control_ratios(source, " ")


def test_trees_are_compared_where_there_is_a_parser() -> None:
    def parse(text: str) -> Any:
        """A chain of words: as deep as it is long."""
        token: Any = None
        for _ in text.split():
            token = SimpleNamespace(children=[] if token is None else [token])
        return SimpleNamespace(sents=[SimpleNamespace(root=token)])

    assert control_ratios("a b c d", "a b", parse=parse)["tree_depth"] == 0.5
    row = Example(prompt="a b c d", completion="a b")
    assert with_ratios([row], names=["tree_depth"], parse=parse)[0].attributes == {
        "tree_depth": "0.5"
    }
    with pytest.raises(TrainingDataError, match="needs a parser"):
        with_ratios([row], names=["tree_depth"])
    with pytest.raises(TrainingDataError, match="no ratio is called 'depth'"):
        with_ratios([row], names=["depth"])
    chat = Example(messages=[{"role": "user", "content": "a big house"}], completion="a house")
    alone = Example(prompt="a big house", completion="a house")
    assert with_ratios([chat])[0].attributes == with_ratios([alone])[0].attributes
    with pytest.raises(TrainingDataError, match="2 sources for 1 examples"):
        with_ratios([row], ["a", "b"])


@pytest.mark.slow
def test_the_command_adds_ratios_to_rows(tmp_path: Path) -> None:
    rows: Sequence[dict[str, Any]] = [
        {"prompt": "Cut: a big house", "source": "a big house", "completion": ["a house", "a"]},
        {"prompt": "Cut: it is so", "source": "it is so", "completion": "yes", "task": "s"},
    ]
    data, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    arguments = ["data", "ratios", str(data), str(out), "--ratio", "length", "--task", "simplify"]
    result = CliRunner().invoke(app, [*arguments, "--source", "source"])
    assert "3 rows written" in result.output
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["attributes"]["length"] for row in written] == ["0.64", "0.09", "0.38"]
    assert [row["task"] for row in written] == ["simplify", "simplify", "s"]
    plain = tmp_path / "plain.jsonl"
    plain.write_text(json.dumps({"prompt": "a big house", "completion": "a house"}))
    result = CliRunner().invoke(
        app, ["data", "ratios", str(plain), str(out), "--source", "prompt", "--yes"]
    )
    assert "1 rows written" in result.output
    broken = tmp_path / "broken.jsonl"
    broken.write_text(data.read_text() + "\nno JSON\n{")
    arguments[2] = str(broken)
    result = CliRunner().invoke(app, [*arguments, "--source", "source", "--yes"])
    assert "line 3" in str(result.exception)
    assert "line 4" in str(result.exception)
    arguments[2] = str(data)
    result = CliRunner().invoke(app, [*arguments, "--source", "original"])
    assert "original" in str(result.exception)
    named = tmp_path / "rows.csv"
    named.write_text("prompt,completion,style\na big house,a house,formal\nit is so,yes,\n")
    options = [str(out), "--ratio", "length", "--attribute", "formality=style"]
    result = CliRunner().invoke(app, ["data", "ratios", str(named), *options])
    assert "out.jsonl exists; overwrite it?" in str(result.exception)
    onto_itself = ["data", "ratios", str(named), str(named), "--yes", *options[1:]]
    assert "is the file that is read" in str(CliRunner().invoke(app, onto_itself).exception)
    assert named.read_text().startswith("prompt,")
    from_input = CliRunner().invoke(
        app, ["data", "ratios", "-", str(out), "--yes", *options[1:]], input=named.read_text()
    )
    assert "2 rows written" in from_input.output
    result = CliRunner().invoke(app, ["data", "ratios", str(named), *options, "--yes"])
    assert "2 rows written" in result.output
    written = [json.loads(line)["attributes"] for line in out.read_text().splitlines()]
    assert [row.get("formality") for row in written] == ["formal", None]
    data.write_text(json.dumps(rows[0]) + "\n\n" + json.dumps({"prompt": 3, "source": "x"}))
    result = CliRunner().invoke(app, [*arguments, "--source", "source"])
    assert "rows.jsonl line 3: " in str(result.exception)


def test_only_the_ratios_that_are_named_are_computed() -> None:
    row = Example(prompt="One two three.", completion="One two.")
    (labelled,) = with_ratios([row], names=["length"], language="no such language")
    assert labelled.attributes == {"length": "0.57"}
