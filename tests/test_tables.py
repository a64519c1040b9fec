"""Tables and facts as prompts, and the values that texts leave out or invent."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlprefix import TrainingDataError
from controlprefix.data import Columns, as_examples, linearize, parse_table
from controlprefix.data.tables import TableStyle
from controlprefix.evaluation import slot_errors

# From the E2E test set and WebNLG 2017.
E2E = "name[Blue Spice], eatType[coffee shop], area[city centre], priceRange[£20-25]"
TRIPLES = [
    ["Aarhus_Airport", "cityServed", "Aarhus,_Denmark"],
    ["Aarhus_Airport", "runwayLength", "2776.0"],
]
plain = st.text(st.characters(codec="ascii", categories=("L", "N")), min_size=1)


def test_e2es_own_line_is_the_line_of_its_values() -> None:
    values = parse_table(E2E)
    assert values["priceRange"] == "£20-25"
    assert linearize(values) == linearize(list(values.items())) == E2E


@pytest.mark.slow
@given(
    st.dictionaries(plain, st.one_of(plain, st.lists(plain, min_size=2, max_size=3)), min_size=1)
)
def test_a_line_is_read_back(values: dict[str, str | list[str]]) -> None:
    assert parse_table(linearize(values)) == values


def test_triples_in_the_forms_of_the_papers() -> None:
    first, second = "Aarhus Airport : cityServed : Aarhus, Denmark", "runwayLength : 2776.0"
    assert linearize(TRIPLES) == f"| {first} | Aarhus Airport : {second}"
    assert linearize(TRIPLES[1:], "tags") == "<H> Aarhus Airport <R> runwayLength <T> 2776.0"
    assert linearize(TRIPLES[1:], "brackets") == "runwayLength[2776.0]"


@pytest.mark.parametrize(
    ("table", "line"),
    [
        ([{"a": 1, "b": "x\ny"}, {"a": 2, "b": "z"}], "a[1], b[x y], a[2], b[z]"),
        ({"a": ["x", "y"]}, "a[x], a[y]"),
        ({"a": "x", "b": None, "c": float("nan")}, "a[x]"),  # as Arrow and pandas have gaps
        ({"rate": 0.5, "on": True}, "rate[0.5], on[True]"),
        ([["a", "x"], ["b", np.float32("nan")], ["c", np.int64(3)]], "a[x], c[3]"),
        ([["s", "r", math.nan], ["s", "q", "x"]], "| s : q : x"),
        ({"name, of": "x], b[y"}, "name; of[x), b(y]"),
    ],
)
def test_other_shapes_of_tables(table: Any, line: str) -> None:
    assert linearize(table) == line


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "is empty"),
        ([], "is empty"),
        ([["a", "b", "c", "d"]], "has \\['a'"),
        ({"a": {"b": 1}}, "cells are texts"),
        ({"a": None}, "is empty"),
        ([["a", None]], "is empty"),
        ([[None, "a"]], "the cell None"),
        ("name[x]", "a dict or a list, not str"),
    ],
)
def test_what_is_no_table_is_a_clear_error(table: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linearize(table)


def test_facts_are_read_back_from_their_line() -> None:
    triples = [
        ["Aarhus", "leader", "Jacob_B"],
        ["Aarhus", "leader", "Eva"],
        ["Eva", "born", "1970"],
    ]
    facts = {"subject": ["Aarhus", "Eva"], "leader": ["Jacob B", "Eva"], "born": "1970"}
    forms: tuple[TableStyle, ...] = ("bars", "tags")
    for form in forms:
        assert parse_table(linearize(triples, form)) == facts
        assert parse_table(linearize({"name": "Loch", "food": ["Thai", "French"]}, form)) == {
            "name": "Loch",
            "food": ["Thai", "French"],
        }
    for other in ("| not a fact", "| a : b : c : d", "x <R> a <T> b", "| a"):
        with pytest.raises(ValueError, match="another style"):
            parse_table(other)
    right = "Jacob B and Eva lead Aarhus; Eva was born in 1970."
    assert slot_errors([right, "Loch"], [facts, {"subject": "Loch"}]) == (0.0, 0.0, 6)
    assert slot_errors(["Eva leads Aarhus.", "Loch"], [facts, {"subject": "Loch"}]).missing == 2 / 6


@pytest.mark.parametrize("text", ["", "name", "name[x], and more", "name[x"])
def test_a_line_in_another_style_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="another style"):
        parse_table(text)


def test_rows_hold_tables_in_place_of_prompts() -> None:
    rows = [
        {"table": {"name": "Vaults"}, "completion": ["The Vaults.", "Vaults!"]},
        {"triples": TRIPLES[1:], "completion": "Its runway is 2776 metres long."},
        {"prompt": TRIPLES[1:], "completion": "Its runway is 2776 metres long."},
    ]
    prompts = [example.prompt for example in as_examples(rows)]
    expected = "| Aarhus Airport : runwayLength : 2776.0"
    assert prompts == ["name[Vaults]", "name[Vaults]", expected, expected]
    named = as_examples(
        [{"facts": {"name": "Vaults"}, "said": "Vaults."}],
        columns=Columns(prompt="facts", completion="said"),
    )
    assert named[0].prompt == "name[Vaults]"


def test_a_bad_table_is_told_with_its_row() -> None:
    rows = [{"table": {"a": "b"}, "completion": "x"}, {"table": {}, "completion": "x"}]
    with pytest.raises(TrainingDataError, match="row 2: a table is empty"):
        as_examples(rows)
    with pytest.raises(TrainingDataError, match="a prompt and table"):
        as_examples([{"table": {"a": "b"}, "prompt": "x", "completion": "x"}])


@pytest.mark.parametrize(
    ("facts", "read"),
    [
        ({"time": "10 : 30"}, {"time": "10: 30"}),
        ([["Aarhus", "leader", ""]], {"subject": "Aarhus", "leader": ""}),
        (
            [["Terminator 2 : Judgment Day", "year", "1991 | 1992"]],
            {"subject": "Terminator 2: Judgment Day", "year": "1991 / 1992"},
        ),
        ([[": x", "a :", "| b"]], {"subject": "x", "a:": "/ b"}),
    ],
)
def test_what_separates_facts_is_no_part_of_them(facts: Any, read: dict[str, str]) -> None:
    assert parse_table(linearize(facts, "bars")) == read


def test_slot_errors_are_missing_and_invented_values() -> None:
    within = [{"country": "Romania", "seats": 25}, {"country": "Oman", "seats": 5, "b": None}]
    assert slot_errors(["Romania, 25: not Oman, 5.", "Oman: 5."], within) == (0.0, 0.5, 4)
    tables = [
        {"name": "The Vaults", "food": "French", "kids": "yes"},
        {"name": "Loch Fyne", "food": "Thai"},
    ]
    right = ["the vaults is French", "Loch Fyne: Thai!"]
    assert slot_errors(right, tables) == (0.0, 0.0, 4)
    assert slot_errors(["The Vaults", "Loch Fyne serves Thai."], tables).missing == 0.25
    invented = slot_errors(["The Vaults is French and Thai", right[1]], tables)
    assert (invented.missing, invented.invented) == (0.0, 0.25)
    assert slot_errors(right[::-1], tables).rate == 2.0
    twice = [{"name": "Loch"}, {"name": "Vaults", "near": "Vaults"}]
    assert slot_errors(["Loch Vaults", "x Vaults"], twice).invented == pytest.approx(1 / 3)
    several: list[Any] = [{"food": ["French", "Thai"]}, {"food": "French"}]
    assert slot_errors(["French and Thai", "French"], several) == (0.0, 0.0, 3)
    assert slot_errors(["French", "French"], several).missing == pytest.approx(1 / 3)
    foods: list[Any] = [{"food": food} for food in ("Thai", "French", "Chinese food", "food")]
    texts = ["Thai, French and Chinese food", "French", "Chinese food", "food"]
    # Two in the first text: "food" is within "Chinese food".
    assert slot_errors(texts, foods) == (0.0, 2 / 4, 4)
    chinese = [{"名": "水上餐厅", "菜": "中国菜"}]
    assert slot_errors(["水上餐厅提供中国菜"], chinese).rate == 0
    assert slot_errors(["水上餐厅提供菜"], chinese).missing == 0.5
    with pytest.raises(ValueError, match="1 texts for 2 tables"):
        slot_errors(right[:1], tables)
    with pytest.raises(ValueError, match="no values"):
        slot_errors(["x"], [{"kids": "yes"}])


def test_triples_that_are_none_are_refused() -> None:
    for wrong in ([["a", "b"]], [["a", "b", "c", "d"]], [["a", "b", "c"], "x"], 5):
        with pytest.raises(TrainingDataError, match="subject, relation and object"):
            as_examples([{"triples": wrong, "completion": "b"}])
