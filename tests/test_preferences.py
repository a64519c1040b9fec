"""Preferences: the loss is DPO's, users learn their own, and mistakes are told."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import logsigmoid

from controlprefix import (
    AttributeSpace,
    ContextLengthError,
    ControlPrefix,
    ControlPrefixError,
    Example,
    Part,
    Preference,
    Prefix,
    Request,
    TrainingDataError,
)
from controlprefix.data import as_preferences
from controlprefix.errors import InvalidNameError
from controlprefix.prefixes import PrefixKey
from controlprefix.training.objectives import ContrastPair, Objective, Rejected, TrainingRow
from controlprefix.training.preferences import with_margins

from helpers import engine
from models import build, byte_tokenizer

OPTIONS: dict[str, Any] = {
    "steps": 30,
    "batch_size": 8,
    "learning_rate": 0.2,
    "num_slots": 4,
    "progress": False,
}
TEXTS = ("Good day.", "hey you")


def preferences(num_each: int = 8) -> list[Preference]:
    """Ana prefers the one text, Bo the other."""
    rows = []
    for i in range(num_each):
        for user, (chosen, rejected) in {"ana": TEXTS, "bo": TEXTS[::-1]}.items():
            rows.append(
                Preference(prompt=f"Greet {i}", user=user, chosen=chosen, rejected=rejected)
            )
    return rows


def margin(cp: ControlPrefix, prompt: str, **steering: Any) -> float:
    """By how much the first text is likelier than the other one, in nats."""
    scores = cp.score([Example(prompt=prompt, completion=text, **steering) for text in TEXTS])
    return scores[0].log_likelihood - scores[1].log_likelihood


@pytest.mark.slow
def test_each_user_learns_their_own_preference() -> None:
    cp = engine()
    before = {n: p.clone() for n, p in cp.model.state_dict().items()}
    plain = margin(cp, "Greet 99")
    report = cp.train_preferences(preferences(), reference="plain", **OPTIONS)
    assert report.saved == {"user 'ana'": 1, "user 'bo'": 1}
    assert margin(cp, "Greet 99", user="ana") > plain + 1
    assert margin(cp, "Greet 99", user="bo") < plain - 1
    assert all(torch.equal(p, before[n]) for n, p in cp.model.state_dict().items())
    last = report.metrics[-1]
    assert last["accuracy"] == 1.0
    assert last["margin"] > report.metrics[0]["margin"]


@pytest.mark.slow
def test_a_stored_prefix_is_trained_further_and_others_are_not_touched() -> None:
    cp = engine()
    cp.put("user", "ana", Prefix.random(cp.geometry, num_slots=3, scale=0.5, seed=1))
    cp.put("task", "greet", Prefix.random(cp.geometry, num_slots=2, scale=0.5, seed=2))
    rows = [row.model_copy(update={"task": "greet"}) for row in preferences() if row.user == "ana"]
    before = margin(cp, "Greet 99", user="ana", task="greet")
    report = cp.train_preferences(rows, **OPTIONS)
    assert report.saved == {"user 'ana'": 2}
    assert report.metrics[0]["margin"] == pytest.approx(0.0, abs=1e-4)  # the start is the reference
    assert cp.get("user", "ana").num_slots == 3
    assert margin(cp, "Greet 99", user="ana", task="greet") > before + 1


@pytest.mark.parametrize("has_prefix", [True, False])
def test_the_loss_is_that_of_the_formula(has_prefix: bool) -> None:
    """Against the definition, computed with transformers' own forward pass per row."""
    cp = engine()
    frozen, key = cp.frozen_model, PrefixKey("user", "ana")
    now, start = (
        {key: Prefix.random(cp.geometry, num_slots=4, scale=0.5, seed=seed)} for seed in (3, 4)
    )
    reference = start if has_prefix else {}
    task = Part(Prefix.random(cp.geometry, num_slots=2, scale=0.5, seed=5))
    rows = [
        TrainingRow([5, 6], [8, 9], [task], [(key, 1.0)], rejected=Rejected([7, 7, 7], 0.0)),
        TrainingRow([5], [10, 11, 12], (), [(key, 0.5)], rejected=Rejected([13], 0.0)),
    ]
    objective = Objective(frozen, beta=0.7, likelihood_weight=0.2)
    pairs = [ContrastPair(row) for row in with_margins(frozen, rows, reference)]
    with torch.no_grad(), frozen.attached(objective.assemble(pairs, now)):
        losses = objective(pairs).tolist()

    def likelihood(row: TrainingRow, targets: Any, prefixes: dict[PrefixKey, Prefix]) -> Any:
        learned = [Part(prefixes[k], w) for k, w in row.learned if k in prefixes]
        parts = [*row.frozen_parts, *learned]
        ids = torch.tensor([[*row.prompt, *targets]])
        with torch.no_grad(), frozen.attached(frozen.assemble([parts])):
            logits = cp.model(input_ids=ids).logits[0]
        log_probs = logits[len(row.prompt) - 1 : -1].log_softmax(1)
        return log_probs[range(len(targets)), list(targets)].sum()

    for row, loss in zip(rows, losses, strict=True):
        assert row.rejected is not None
        chosen, rejected = row.targets, row.rejected.targets
        own = likelihood(row, chosen, now) - likelihood(row, rejected, now)
        base = likelihood(row, chosen, reference) - likelihood(row, rejected, reference)
        expected = -len(chosen) * logsigmoid(0.7 * (own - base)) - 0.2 * likelihood(
            row, chosen, now
        )
        assert loss == pytest.approx(float(expected), rel=1e-4)


def test_rows_of_trl_and_of_files_are_read(tmp_path: Path) -> None:
    assistant = [{"role": "assistant", "content": text} for text in TEXTS]
    question = {"role": "user", "content": "Greet me"}
    path = tmp_path / "feedback.jsonl"
    rows: list[dict[str, Any]] = [
        {"prompt": "Greet me", "chosen": TEXTS[0], "rejected": TEXTS[1], "user": "ana"},
        {"prompt": [question], "chosen": [assistant[0]], "rejected": [assistant[1]]},
        {"chosen": [question, assistant[0]], "rejected": [question, assistant[1]]},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    read = as_preferences(path)
    assert [(row.chosen, row.rejected) for row in read] == [TEXTS] * 3
    assert read[0].prompt == "Greet me"
    assert all(row.messages and row.messages[-1].content == "Greet me" for row in read[1:])
    # As ultrafeedback has it: the user's message and the whole conversation once more.
    repeated = {**rows[2], "prompt": "Greet me", "messages": rows[2]["chosen"]}
    (read_again,) = as_preferences([repeated])
    assert read_again.model_dump() == read[2].model_dump()
    with pytest.raises(TrainingDataError, match="give one of prompt, messages"):
        as_preferences([{**rows[2], "prompt": "Say something else"}])
    path.write_text(json.dumps({**rows[2], "rejected": [assistant[0], assistant[1]]}))
    with pytest.raises(TrainingDataError, match="differ before"):
        as_preferences(path)
    with pytest.raises(TrainingDataError, match="expected a Preference or a dict, got Request"):
        as_preferences([Request(prompt="x")])
    with pytest.raises(TrainingDataError, match=r"completion"):
        as_preferences([{"prompt": "x", "completion": "y"}])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"beta": 0.0}, "beta"),
        ({"likelihood_weight": -1.0}, "likelihood_weight"),
        ({"reference": "other"}, "reference"),
        ({"contrast": 0.5}, "contrast"),
        ({"learn": "task"}, "no example has one"),
        ({"betta": 1}, "betta"),
    ],
)
def test_mistakes_are_told_and_store_nothing(change: dict[str, Any], match: str) -> None:
    cp = engine()
    with pytest.raises(TrainingDataError, match=match):
        cp.train_preferences(preferences(2), **{**OPTIONS, "steps": 1, **change})
    assert not list(cp.store.for_model(cp.geometry.fingerprint).names("user"))


@pytest.mark.parametrize(
    "fields",
    [
        {"chosen": "a", "rejected": "a"},
        {"chosen": "a", "rejected": " "},
        {"chosen": "a"},
        {"chosen": "a", "rejected": "b", "schedules": {"user": [(0, 1)]}},
    ],
)
def test_a_preference_needs_two_different_texts(fields: dict[str, Any]) -> None:
    with pytest.raises(TrainingDataError):
        Preference(prompt="x", **fields)


@pytest.mark.slow
def test_a_resumed_run_is_bit_identical(tmp_path: Path) -> None:
    def run(steps: int, **options: Any) -> torch.Tensor:
        cp = engine()
        cp.train_preferences(preferences(2), save_steps=1, **{**OPTIONS, "steps": steps, **options})
        return cp.get("user", "ana").slots["decoder"]

    class Stop(Exception):
        pass

    def stop(info: Any) -> None:
        if info.step == 2:
            raise Stop

    with pytest.raises(Stop):
        run(4, folder=tmp_path, on_step=stop)
    assert torch.equal(run(4, folder=tmp_path, resume=True), run(4))
    with pytest.raises(TrainingDataError, match="another run"):
        run(4, folder=tmp_path, resume=True, beta=0.9)


@pytest.mark.slow
def test_a_finished_run_that_is_resumed_does_nothing(tmp_path: Path) -> None:
    """Though the prefix that it would start from is now its own result."""
    cp, options = engine(store=f"sqlite:///{tmp_path}/p.db"), {**OPTIONS, "steps": 2}
    folder = tmp_path / "run"
    report = cp.train_preferences(preferences(2), folder=folder, **options)
    again = cp.train_preferences(preferences(2), folder=folder, resume=True, **options)
    assert again.losses == report.losses
    assert [v.version for v in cp.versions("user", "ana")] == [1]
    cp.put("user", "ana", Prefix.random(cp.geometry, num_slots=4, seed=1))
    with pytest.raises(TrainingDataError, match="another run"):  # it would start elsewhere
        cp.train_preferences(preferences(2), folder=folder, resume=True, **options)


@pytest.mark.slow
def test_long_rejected_texts_are_refused_cut_or_skipped() -> None:
    rows = preferences(3)
    rows[1] = rows[1].model_copy(update={"rejected": "n" * 500})
    options = {**OPTIONS, "steps": 1, "validation": 0}
    cp = engine()
    with pytest.raises(ContextLengthError, match="(?s)row 2: .*to cut or skip such rows"):
        cp.train_preferences(rows, **options)
    skipped = cp.train_preferences(rows, too_long="skip", **options)
    assert (skipped.num_examples, skipped.num_skipped) == (5, 1)
    assert cp.train_preferences(rows, too_long="cut", **options).num_examples == 6


def test_held_out_preferences_of_ones_own() -> None:
    cp = engine()
    report = cp.train_preferences(
        preferences(3), validation=preferences(2)[:2], **{**OPTIONS, "steps": 2}
    )
    assert (report.num_examples, report.num_held_out) == (6, 2)
    assert report.validation


@pytest.mark.slow
def test_the_command_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from controlprefix.cli import app
    from controlprefix.cli.groups import EngineArguments

    monkeypatch.setattr(EngineArguments, "open", lambda self, **_: engine())
    path = tmp_path / "feedback.jsonl"
    path.write_text("\n".join(row.model_dump_json(exclude_unset=True) for row in preferences(4)))
    arguments = ["--steps", "2", "--num-slots", "2", "--folder", str(tmp_path / "run")]
    result = CliRunner().invoke(app, ["train-preferences", str(path), *arguments])
    assert result.exit_code == 0, result.output
    assert "stored user 'ana' version 1" in result.output
    assert "right" in result.output


def test_feedback_is_kept_learned_from_and_forgotten() -> None:
    cp = engine()
    rows = [
        {"user": user, "prompt": f"Greet {i}.", "chosen": "hey!!", "rejected": "Good day."}
        for user, count in (("ana", 3), ("bo", 2))
        for i in range(count)
    ]
    assert cp.keep_feedback(rows) == {"ana": 3, "bo": 2}
    assert cp.keep_feedback(rows[:1]) == {"ana": 4}
    assert [row.prompt for row in cp.feedback("ana")] == [
        "Greet 0.", "Greet 1.", "Greet 2.", "Greet 0."
    ]  # fmt: skip
    assert all(isinstance(row, Preference) for row in cp.feedback("ana"))
    assert cp.store.users_with_feedback() == ["ana", "bo"]
    assert cp.store.user_texts("ana") == []  # it is no text to learn from as such
    assert cp.store.users_with_texts() == []
    report = cp.train_preferences(steps=2, batch_size=2, num_slots=2, validation=0, progress=False)
    assert report.num_examples == 6
    assert cp.names("user") == ["ana", "bo"]
    cp.forget_user("ana")
    assert cp.feedback("ana") == []
    assert cp.store.users_with_feedback() == ["bo"]


def test_feedback_that_cannot_be_kept_is_a_clear_error() -> None:
    cp = engine()
    row = {"prompt": "Greet.", "chosen": "hey", "rejected": "Good day."}
    with pytest.raises(TrainingDataError, match="row 2 names no user"):
        cp.keep_feedback([{**row, "user": "ana"}, row])
    assert cp.feedback("ana") == []  # all or nothing
    with pytest.raises(InvalidNameError):
        cp.keep_feedback([{**row, "user": "ana"}, {**row, "user": "b/o\n"}])
    assert cp.feedback("ana") == []
    with pytest.raises(TrainingDataError, match="no feedback is kept"):
        cp.train_preferences()


@pytest.mark.slow
def test_a_users_newest_thousand_preferences_stay() -> None:
    cp = engine()
    rows = [
        {"user": "ana", "prompt": f"{i}", "chosen": "hey", "rejected": "hi"} for i in range(1005)
    ]
    assert cp.keep_feedback(rows) == {"ana": 1000}
    assert [row.prompt for row in cp.feedback("ana")][::999] == ["5", "1004"]
    cp.keep_feedback([{**rows[0], "user": "bo"}])
    assert len(cp.feedback("ana")) == 1000


@pytest.mark.slow
def test_another_reference_is_another_run(tmp_path: Path) -> None:
    cp, options = engine(), {**OPTIONS, "steps": 2}
    cp.put("user", "ana", Prefix.random(cp.geometry, num_slots=4, seed=1))
    cp.train_preferences(preferences(2), folder=tmp_path, reference="start", **options)
    with pytest.raises(TrainingDataError, match="is finished, and training starts"):
        cp.train_preferences(
            preferences(2), folder=tmp_path, reference="plain", resume=True, **options
        )


@pytest.mark.parametrize(
    "wrong",
    [
        {"task": ""},
        {"attributes": {"tone": "loud"}},
        {"attributes": {"pitch": "high"}},
        {"attributes": {"tone": {"warm": -0.5}}},
        {"prompt": None, "messages": [{"role": "user", "content": "Hi"}]},  # without a template
    ],
)
def test_feedback_that_could_not_be_learned_is_refused(wrong: dict[str, Any]) -> None:
    space = AttributeSpace.parse("attributes: {tone: {labels: [warm, cool]}}")
    cp = ControlPrefix.from_pretrained(
        build("llama"), tokenizer=byte_tokenizer(), store="sqlite://", attributes=space
    )
    good = {"user": "ana", "prompt": "Greet.", "chosen": "Hello!", "rejected": "Hm."}
    with pytest.raises(ControlPrefixError):
        cp.keep_feedback([good, {**good, **wrong}])
    assert cp.feedback("ana") == []  # all or none
