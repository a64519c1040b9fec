"""The file of attributes: what it says, where it is wrong, and what requests get from it."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from controlprefix import (
    AttributeSpace,
    AttributeSpaceError,
    ControlPrefix,
    Example,
    Prefix,
    Request,
    RequestError,
    UnknownNameError,
)
from controlprefix.attributes.scaffold import scaffold
from controlprefix.cli import app
from controlprefix.prefixes import PrefixKey
from controlprefix.store import NewVersion, PrefixStore

from models import build, byte_tokenizer

FILE = """\
attributes:
  formality:
    description: How formal the wording is.
    exclusive: true
    default: neutral
    num_slots: 5
    labels:
      formal: {description: Courteous., opposite: casual}
      casual: {opposite: formal}
      neutral:
  tone:
    labels: [warm, brief]
"""


def test_a_file_says_attributes_labels_and_what_they_mean() -> None:
    space = AttributeSpace.parse(FILE)
    formality = space.attributes["formality"]
    assert list(formality.labels) == ["formal", "casual", "neutral"]
    assert formality.labels["formal"].opposite == "casual"
    assert (formality.default, formality.exclusive, formality.num_slots) == ("neutral", True, 5)
    assert list(space.attributes["tone"].labels) == ["warm", "brief"]


def test_words_that_older_yaml_takes_for_truth_values_are_labels() -> None:
    space = AttributeSpace.parse("attributes: {answer: {labels: [yes, no, on, off]}}")
    assert list(space.attributes["answer"].labels) == ["yes", "no", "on", "off"]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("default: neutral", "default: netral", "line 5: .*did you mean 'neutral'"),
        ("opposite: casual", "opposite: formal", "line 8: .*the opposite of 'formal'"),
        ("exclusive: true", "exlusive: true", "line 4: .*there is no 'exlusive' here"),
        ("num_slots: 5", "num_slots: none", "line 6: .*valid integer"),
        ("num_slots: 5", "num_slots: 0", "line 6: .*greater than or equal to 1"),
        ("description: Courteous.", "text: x", "line 8: .*there is no 'text' here"),
        ("labels: [warm, brief]", "labels: []", "line 12: .*at least 1 item"),
        ("labels: [warm, brief]", "labels: [warm, brief", "line 1[23]: "),
        ("casual: {", "formal: {", "line 9: found duplicate key .formal."),
        ("[warm, brief]", "[warm, warm]", "line 12: .*'warm' is listed twice"),
        ("[warm, brief]", "[warm, false]", "line 12: .*False is not a text, .*in quotes"),
        ("[warm, brief]", "[warm: {}]", "line 12: .*write labels as `name"),
        ("[warm, brief]", "{1: {}, brief: {}}", "line 12: .*1 is not a text, .*in quotes"),
        ("[warm, brief]", "{' ': {}}", "line 12: .*' ' cannot be the name of a label"),
        ("  tone:", "  2:", "line 11: attributes: a name must be a plain text; put it in quotes"),
        ("  tone:", "  {{x}}:", "line 11: attributes: a name must be a plain text"),
        ("  tone:", "  task:", "line 11: .*'task' cannot be the name of an attribute"),
        ("attributes:", "attribute:", "line 1: attributes: Field required\n.*no 'attribute' here"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(before: str, after: str, message: str) -> None:
    assert FILE.count(before) == 1
    with pytest.raises(AttributeSpaceError, match=f"my.yaml:? ?{message}"):
        AttributeSpace.parse(FILE.replace(before, after), name="my.yaml")


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    for text in ("", "[]", "a: *b", "!!python/object:os.system {}", "x" * 10, "- " * 3000):
        with pytest.raises(AttributeSpaceError):
            AttributeSpace.parse(text)
    with pytest.raises(AttributeSpaceError, match="cannot read"):
        AttributeSpace.read(tmp_path / "missing.yaml")


@pytest.mark.slow
@given(st.sets(st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=1)))
def test_a_scaffold_is_read_back_whatever_the_labels_are_called(labels: set[str]) -> None:
    keys = {PrefixKey.for_label("a", name) for name in labels if name.strip() and "=" not in name}
    space = AttributeSpace.parse(scaffold(keys))
    if keys:
        assert space.keys() == keys
    else:
        assert set(space.attributes) == {"formality", "tone"}


def test_defaults_are_filled_in_and_others_are_refused() -> None:
    space = AttributeSpace.parse(FILE)
    assert space.with_default_labels({}) == {"formality": "neutral"}
    assert space.with_default_labels({"formality": "formal"}) == {"formality": "formal"}
    mixture = {"tone": {"warm": 0.5, "brief": 0.5}}
    assert space.with_default_labels(mixture) == {**mixture, "formality": "neutral"}
    assert space.with_default_labels({"formality": {"formal": 1.0, "casual": 0.0}})
    with pytest.raises(RequestError, match="'formality' is exclusive, and casual, formal were"):
        space.with_default_labels({"formality": {"formal": 0.5, "casual": 0.5}})
    with pytest.raises(UnknownNameError, match="no label 'warmm'.*did you mean 'warm'"):
        space.with_default_labels({"tone": "warmm"})
    with pytest.raises(UnknownNameError, match="unknown attribute 'mood'"):
        space.with_default_labels({"mood": "x"})


@pytest.mark.parametrize(
    ("position", "labels"),
    [
        (1, {"formal": 1.0}),
        (0.25, {"formal": 0.25}),
        (0, {"formal": 0.0}),
        (-0.5, {"casual": 0.5}),
        (-1, {"casual": 1.0}),
    ],
)
def test_a_number_is_a_position_between_opposites(
    position: float, labels: dict[str, float]
) -> None:
    space = AttributeSpace.parse(FILE)
    request = Request(prompt="Hi", attributes={"formality": position})
    assert space.with_default_labels(request.attributes) == {"formality": labels}


def test_a_number_among_numbers_is_one_of_them() -> None:
    space = AttributeSpace.parse("attributes: {rating: {labels: {'1': {opposite: '5'}, '5': {}}}}")
    assert space.with_default_labels({"rating": "3.5"}) == {"rating": "3.5"}


@pytest.mark.parametrize("position", [1.5, -1.01])
def test_a_position_beyond_the_opposites_is_refused(position: float) -> None:
    request = Request(prompt="Hi", attributes={"formality": position})
    with pytest.raises(RequestError, match=r"from -1 \(casual\) to 1 \(formal\)"):
        AttributeSpace.parse(FILE).with_default_labels(request.attributes)
    tone = Request(prompt="Hi", attributes={"tone": 0.5})
    with pytest.raises(UnknownNameError, match="no label '0.5'"):
        AttributeSpace.parse(FILE).with_default_labels(tone.attributes)


def test_a_position_steers_as_its_label_at_that_strength() -> None:
    cp = ControlPrefix.from_pretrained(
        build("llama"),
        tokenizer=byte_tokenizer(),
        store="sqlite://",
        attributes=AttributeSpace.parse(FILE),
    )
    for i, label in enumerate(("formal", "casual", "neutral")):
        prefix = Prefix.random(cp.geometry, num_slots=3, scale=0.5, seed=i)
        cp.put("attribute", f"formality={label}", prefix)
    mixtures: tuple[tuple[float, dict[str, float]], ...] = (
        (0.5, {"formal": 0.5}),
        (-1, {"casual": 1.0}),
        (0, {"neutral": 0.0}),
    )
    for position, mixture in mixtures:
        texts = [
            cp.generate("Hi", attributes={"formality": value}, max_new_tokens=12).text
            for value in (position, mixture)
        ]
        assert texts[0] == texts[1]


def test_requests_and_training_follow_the_space(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(FILE)
    cp = ControlPrefix.from_pretrained(
        build("llama"),
        tokenizer=byte_tokenizer(),
        store="sqlite://",
        attributes=tmp_path / "space.yaml",
    )
    examples = [
        Example(prompt="Hi", attributes={"formality": label, "tone": "warm"}, completion="ok")
        for label in ("formal", "casual", "neutral")
    ]
    cp.train(examples, learn="attributes", num_slots=3, steps=1, validation=0, progress=False)
    slots = {name: cp.get("attribute", name).num_slots for name in cp.names("attribute")}
    assert slots == {
        "formality=casual": 5,
        "formality=formal": 5,
        "formality=neutral": 5,
        "tone=warm": 3,
    }
    completion = cp.generate("Hi", max_new_tokens=1)
    assert [part.name for part in completion.parts] == ["formality=neutral"]
    request = Request(prompt="Hi", attributes={"formality": "formal"}, max_new_tokens=1)
    assert [part.name for part in cp.generate(request).parts] == ["formality=formal"]
    with pytest.raises(UnknownNameError, match="unknown attribute 'mood'"):
        cp.score([Example(prompt="Hi", completion="x", attributes={"mood": "x"})])
    with pytest.raises(UnknownNameError, match="no label 'brif'"):
        cp.train([Example(prompt="Hi", completion="x", attributes={"tone": "brif"})])


@pytest.mark.slow
def test_the_command_line_writes_shows_and_checks(tmp_path: Path) -> None:
    url, file = f"sqlite:///{tmp_path}/prefixes.db", tmp_path / "space.yaml"

    def run(*arguments: str) -> str:
        result = CliRunner(env={"CONTROLPREFIX_STORE": url}).invoke(app, ["attributes", *arguments])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.output

    cp = ControlPrefix.from_pretrained(build("llama"), tokenizer=byte_tokenizer(), store=url)
    with PrefixStore(url) as store:
        prefix = Prefix.random(cp.geometry, num_slots=2, seed=0)
        store.put([NewVersion(PrefixKey("attribute", "mood=glad"), prefix)])
    assert "written" in run("init", str(file))
    assert "1 attributes with 1 labels" in run("check", str(file))
    shown_text = run("show", str(file))
    assert "glad" in shown_text
    assert "none yet" not in shown_text
    with pytest.raises(RequestError, match="exists already"):
        run("init", str(file))
    file.write_text(file.read_text().replace("exclusive", "exklusive"))
    with pytest.raises(AttributeSpaceError, match=r"line \d+: .*there is no 'exklusive'"):
        run("check", str(file))


def test_mistakes_below_a_name_in_another_form_have_their_own_line() -> None:
    text = "attributes:\n  cafe\u0301:\n    labels: [x]\n    exclusive: 7x\n"
    with pytest.raises(AttributeSpaceError, match="line 4: "):
        AttributeSpace.parse(text)


def test_names_in_a_file_are_composed_as_in_requests() -> None:
    space = AttributeSpace.parse("attributes: {t: {labels: [cafe\u0301]}}")
    request = Request(prompt="Hi", attributes={"t": "cafe\u0301"})
    assert space.with_default_labels(request.attributes) == {"t": "caf\u00e9"}


@pytest.mark.parametrize(
    "text",
    [
        "base: &b {exclusive: 7x}\nattributes:\n  tone: {<<: *b, labels: [a, b]}",
        "attributes:\n  a: &b {exclusive: 7x, labels: [x]}\n  tone: {<<: *b}",
    ],
)
def test_mistakes_in_merged_keys_have_a_line(text: str) -> None:
    with pytest.raises(AttributeSpaceError, match=r"line \d+: "):
        AttributeSpace.parse(text)
