"""lm-evaluation-harness, steered: its numbers are those of `score` and `generate`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from controlprefix import ControlPrefix, Example, Prefix, RequestError, UnknownNameError
from controlprefix.interop.lm_eval import ControlPrefixLM

from helpers import Instance, engine

CONTEXTS = ["The sky is", "Two and two are", "A long context about nothing in particular, so"]
CONTINUATIONS = [" blue", " four, they say", " it goes"]


@pytest.fixture
def cp() -> ControlPrefix:
    cp = engine()
    for kind, name, seed in (("task", "t", 1), ("user", "ana", 2), ("attribute", "tone=warm", 3)):
        prefix = Prefix.random(cp.geometry, num_slots=3, seed=seed, scale=1.0)
        cp.put(kind, name, prefix)  # type: ignore[arg-type]
    return cp


def test_names_that_look_like_numbers_are_names(cp: ControlPrefix) -> None:
    cp.put("user", "42", cp.get("user", "ana"))
    number: Any = 42  # as the harness reads it
    steered = ControlPrefixLM(cp, user=number).loglikelihood(pairs())
    assert steered == ControlPrefixLM(cp, user="ana").loglikelihood(pairs())


def scores(cp: ControlPrefix, **fields: Any) -> list[float]:
    examples = [
        Example(prompt=context, completion=text, raw=True, **fields)
        for context, text in zip(CONTEXTS, CONTINUATIONS, strict=True)
    ]
    return [score.log_likelihood for score in cp.score(examples)]


def pairs(task: str = "") -> list[Instance]:
    return [Instance(c, t, task_name=task) for c, t in zip(CONTEXTS, CONTINUATIONS, strict=True)]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_log_likelihoods_are_those_of_score(cp: ControlPrefix, batch_size: int) -> None:
    lm = ControlPrefixLM(
        cp, task="t", user="ana", attributes="tone:warm", strengths="tone:0.5",
        batch_size=batch_size,
    )  # fmt: skip
    values = [value for value, _ in lm.loglikelihood(pairs(), disable_tqdm=True)]
    expected = scores(
        cp, task="t", user="ana", attributes={"tone": "warm"}, strengths={"tone": 0.5}
    )
    assert values == pytest.approx(expected, abs=1e-3)
    assert values != pytest.approx(scores(cp), abs=0.1)


def test_each_task_of_the_harness_has_its_own_steering(cp: ControlPrefix, tmp_path: Path) -> None:
    path = tmp_path / "steering.json"
    path.write_text(json.dumps({"one": {"user": "ana"}, "two": {"attributes": {"tone": "warm"}}}))
    lm = ControlPrefixLM(cp, task="t", steering=str(path))
    mixed = [instance for name in ("one", "two", "three") for instance in pairs(name)]
    order = [4, 0, 8, 1, 5, 2, 6, 3, 7]
    results = lm.loglikelihood([mixed[i] for i in order], disable_tqdm=True)
    values = dict(zip(order, (value for value, _ in results), strict=True))
    expected = [
        *scores(cp, user="ana"), *scores(cp, attributes={"tone": "warm"}), *scores(cp, task="t"),
    ]  # fmt: skip
    assert [values[i] for i in range(9)] == pytest.approx(expected, abs=1e-3)


def test_whole_texts_and_generations_are_steered(cp: ControlPrefix) -> None:
    lm = ControlPrefixLM(cp, user="ana")
    texts = ["A text on its own.", "Another one"]
    rolling = lm.loglikelihood_rolling([Instance(text) for text in texts], disable_tqdm=True)
    expected = [
        score.log_likelihood
        for score in cp.score(
            [Example(prompt="", raw=True, completion=text, user="ana") for text in texts]
        )
    ]
    assert rolling == pytest.approx(expected, abs=1e-3)
    how = {"until": [], "max_gen_toks": 8, "do_sample": False}
    generated = lm.generate_until([Instance(c, dict(how)) for c in CONTEXTS], disable_tqdm=True)
    expected_texts = [cp.generate(c, raw=True, user="ana", max_new_tokens=8).text for c in CONTEXTS]
    assert generated == expected_texts


def test_mistakes_are_told_before_anything_is_evaluated(cp: ControlPrefix) -> None:
    with pytest.raises(UnknownNameError, match="no user 'bo'"):
        ControlPrefixLM(cp, user="bo")
    with pytest.raises(RequestError, match="not of the form"):
        ControlPrefixLM(cp, attributes="tone=warm")
    with pytest.raises(RequestError, match="strength"):
        ControlPrefixLM(cp, attributes="tone:warm", strengths="tone:-1")
    with pytest.raises(RequestError, match="needs the prompts"):
        ControlPrefixLM(cp, steering={"hellaswag": {"user": "ana", "when": "relevant"}})
    with pytest.raises(RequestError, match="cannot read the steering"):
        ControlPrefixLM(cp, steering="missing.json")


@pytest.mark.slow
def test_the_harnesss_own_command_line_runs(model_folder: Path, tmp_path: Path) -> None:
    rows = [{"question": c, "choices": [" blue", " four"], "label": 0} for c in CONTEXTS]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "colours",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "question",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "colours.yaml").write_text(yaml.safe_dump(task))
    cp = ControlPrefix.from_pretrained(str(model_folder), store=str(tmp_path / "p.db"))
    cp.put("user", "ana", Prefix.random(cp.geometry, num_slots=3))
    arguments = f"model={model_folder},store={tmp_path / 'p.db'},user=ana"
    result = subprocess.run(
        [
            sys.executable, "-m", "controlprefix.interop.lm_eval", "run", "--model",
            "controlprefix", "--model_args", arguments, "--tasks", "colours", "--include_path",
            str(tmp_path), "--batch_size", "2",
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HOME": str(tmp_path / "hf")},
        check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    assert "colours" in result.stdout
    assert "acc" in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attribute": "formality:formal"}, "no option 'attribute'.*'attributes'"),
        ({"pretrained": "gpt2"}, "give the model as model="),
        ({"strengths": "task:abc"}, "the strength of 'task' is 'abc'"),
        ({"steering": {"a": {"prompt": "x"}}}, "leave prompt out"),
    ],
)
def test_options_that_would_have_no_effect_are_refused(
    cp: ControlPrefix, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        ControlPrefixLM(cp, **options)


def test_steering_of_tasks_that_no_request_is_of_is_named(
    cp: ControlPrefix, caplog: pytest.LogCaptureFixture
) -> None:
    lm = ControlPrefixLM(cp, steering={"mmlu": {"user": "ana"}})
    lm.loglikelihood(pairs("mmlu_anatomy"), disable_tqdm=True)
    assert "the steering is for the tasks mmlu, and these requests are of mmlu_anatomy" in (
        caplog.text
    )
