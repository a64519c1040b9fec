"""Arguments of the wrong type or size are errors of this library that say what is taken."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from controlprefix import (
    ControlPrefix,
    ControlPrefixError,
    Prefix,
    Request,
    RequestError,
    UnknownNameError,
)
from controlprefix.engine.arguments import checks_arguments
from controlprefix.evaluation import evaluate_users
from controlprefix.store import PrefixStore

from models import build, byte_tokenizer


@pytest.fixture(scope="module")
def cp() -> ControlPrefix:
    result = ControlPrefix.from_pretrained(
        build("llama"), tokenizer=byte_tokenizer(), store="sqlite://"
    )
    result.put("user", "ana", Prefix.random(result.geometry, num_slots=2, seed=0))
    return result


WRONG: dict[str, tuple[Callable[[Any], object], str]] = {
    "batch size, text": (lambda cp: cp.generate(["a"], batch_size="x"), "batch_size is 'x'"),
    "batch size, none": (lambda cp: cp.score([], batch_size=None), "score takes an int"),
    "slots, fraction": (lambda cp: cp.prefix_from_text("a", max_slots=2.5), "an int or None"),
    "half a surrogate": (lambda cp: cp.prefix_from_text("a\ud800"), "half a surrogate pair"),
    "dtype": (lambda cp: cp.put("user", "b", cp.get("user", "ana"), dtype="int3"), "'int8'"),
    "version, bool": (lambda cp: cp.get("user", "ana", version=True), "version is True"),
    "rollback to nothing": (lambda cp: cp.rollback("user", "ana", to=None), "to is None"),
    "limit, text": (lambda cp: cp.names("task", limit="a"), "limit is 'a'"),
    "limit, negative": (lambda cp: cp.names("task", limit=-1), "0 or more"),
    "after": (lambda cp: cp.names("task", after=5), r"after is 5; names takes a text \(str\)"),
    "sequences, text": (lambda cp: cp.batcher(max_sequences="a"), "batcher takes an int"),
    "sequences, 0": (lambda cp: cp.batcher(max_sequences=0), "max_sequences is 0"),
    "waiting": (lambda cp: cp.batcher(max_waiting=-1), "max_waiting -1"),
    "prefill": (lambda cp: cp.batcher(max_prefill_tokens=0), "max_prefill_tokens is 0"),
    "peft, text": (lambda cp: cp.save_peft("x", "folder"), "expected a Request, got str"),
    "peft, folder": (lambda cp: cp.prefix_from_peft(None), "folder is None"),
    "prompts, numbers": (lambda cp: cp.learn_relevance("user", "ana", [1, 2]), "list of texts"),
    "prompts, a text": (lambda cp: cp.learn_relevance("user", "ana", "Write"), "list of texts"),
    "texts, a text": (lambda cp: cp.audit_user("ana", "a b", ["c"]), "list of texts"),
    "samples": (lambda cp: evaluate_users(cp, [], min_group_size="8"), "takes an int"),  # type: ignore[arg-type]
    "top": (lambda cp: cp.prompt_log_probs([Request(prompt="ab")], top=-1), "top is -1"),
    "schema": (lambda cp: cp.generate("a", json_schema={"a": object()}), "cannot be written as"),
    "bytes": (lambda cp: Prefix.from_bytes("abc"), "must be bytes, got str"),  # type: ignore[arg-type]
    "store": (lambda cp: PrefixStore(5), "the store is 5"),  # type: ignore[arg-type]
    "sizes": (lambda cp: cp.generate(["a"], batch_size=torch.tensor([2, 3])), "takes an int"),
    "url": (lambda cp: cp.vllm_runner(5, "folder"), "url is 5"),
    "tokenizer": (
        lambda cp: ControlPrefix.from_pretrained(cp.model, tokenizer=5, store="sqlite://"),  # type: ignore[arg-type]
        "tokenizer is 5",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_clear_errors(name: str, cp: ControlPrefix) -> None:
    call, message = WRONG[name]
    with pytest.raises(ControlPrefixError, match=message):
        call(cp)


def test_a_label_that_is_a_huge_number_is_unknown(cp: ControlPrefix) -> None:
    for number in (10**400, 10**5000):  # the second is too long to print
        with pytest.raises(ControlPrefixError):
            cp.generate("a", attributes={"tone": number})


def test_numbers_of_numpy_and_paths_are_taken(cp: ControlPrefix, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"max_new_tokens": 2, "raw": True}
    sizes: list[Any] = [numpy.int64(1), torch.tensor(1)]
    for size in sizes:
        assert cp.generate(["a"], batch_size=size, **fields) == [cp.generate("a", **fields)]
        assert cp.get("user", "ana", version=size).digest == cp.get("user", "ana").digest
    no: Any = numpy.bool_(False)
    assert cp.enroll("bo", ["a text"], keep_texts=no)
    cp.distill(
        "Be 4.", ["a", "b", "c", "d"], attribute="age", label=4, steps=1, num_slots=2,
        max_new_tokens=2, progress=False,
    )  # fmt: skip
    assert cp.exists("attribute", "age=4")
    with PrefixStore(tmp_path / "prefixes.db"):
        assert (tmp_path / "prefixes.db").exists()


def test_a_kind_that_is_none_is_an_unknown_name(cp: ControlPrefix) -> None:
    with pytest.raises(UnknownNameError):
        cp.get("tone", "warm")  # type: ignore[arg-type]


def test_calls_that_do_not_fit_are_those_of_python(cp: ControlPrefix) -> None:
    with pytest.raises(TypeError, match="missing 1 required"):
        cp.names()  # type: ignore[call-arg]


@pytest.mark.parametrize("num_slots", [-1, -5])
def test_slots_are_none_or_more(cp: ControlPrefix, num_slots: int) -> None:
    with pytest.raises(ValueError, match="0 or more"):
        Prefix.random(cp.geometry, num_slots=num_slots)


def test_the_name_of_a_file_is_no_text_of_a_user(cp: ControlPrefix, tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("what ana wrote")
    with pytest.raises(ControlPrefixError, match=r"is a file: give its Path"):
        cp.enroll("ana", str(file))
    assert cp.enroll("ana", file)
    assert cp.enroll("ana", [str(file)])
    for prompts in (str(file), file):
        with pytest.raises(ControlPrefixError, match="distill takes a list of texts"):
            cp.distill("Be kind.", prompts, task="t")  # type: ignore[arg-type]


def test_arrays_and_sets_are_lists(cp: ControlPrefix, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Any] = []

    @checks_arguments
    def checked(prompts: Sequence[str], weights: Sequence[float] = ()) -> None:
        taken.append((prompts, weights))

    method: Any = checked

    method(numpy.array(["b", "a"]), weights=torch.tensor([1.5]))
    method({"b", "a"})
    method(numpy.array(["a"]))  # of one item
    assert taken == [(["b", "a"], [1.5]), (["a", "b"], ()), (["a"], ())]
    with pytest.raises(RequestError, match="list of texts"):
        method(numpy.array([1]))
