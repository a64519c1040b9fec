"""Runs: reports, histories, callbacks, trackers, and what Ctrl-C leaves behind."""

import csv
import json
import os
import signal
from pathlib import Path

import pytest

from controlprefix import (
    ControlPrefix,
    ControlPrefixError,
    Example,
    MissingDependencyError,
    TrainingDataError,
    __version__,
)
from controlprefix.errors import TrainingInterrupted
from controlprefix.training import Callback, StepInfo, TrainingReport

from helpers import QUICK, engine, greetings, letters_reward, says, stocked


def press_ctrl_c_at(step: int) -> Callback:
    def on_step(info: StepInfo) -> None:
        if info.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    return on_step


@pytest.mark.slow
def test_a_report_ties_a_run_to_what_it_made(tmp_path: Path) -> None:
    cp = engine()
    report = cp.train(greetings(), folder=tmp_path, **{**QUICK, "steps": 4})
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["saved"] == report.saved == dict.fromkeys(report.saved, 1)
    assert set(report.saved) == {
        "task 'greet'", "attribute 'formality=formal'", "attribute 'formality=informal'",
    }  # fmt: skip
    assert written["settings"]["seed"] == QUICK["seed"]
    assert written["settings"]["steps"] == 4
    assert len(written["data_hash"]) == 64
    assert written["library_version"] == __version__
    assert (written["tenant"], written["model"]) == ("default", cp.geometry.model_name)
    assert written["best_loss"] == report.best_loss
    assert (written["num_examples"], written["num_held_out"]) == (14, 2)
    assert TrainingReport.load(tmp_path) == report


@pytest.mark.slow
def test_a_history_has_a_row_per_step(tmp_path: Path) -> None:
    report = engine().train(greetings(), folder=tmp_path, **{**QUICK, "steps": 4})
    rows = list(csv.DictReader((tmp_path / "history.csv").open()))
    assert [int(row["step"]) for row in rows] == [0, 1, 2, 3, 4]
    assert tuple(float(row["loss"]) for row in rows[1:]) == report.losses
    assert all(float(row["learning_rate"]) > 0 for row in rows[1:])
    assert all(float(row["grad_norm"]) > 0 for row in rows[1:])
    assert float(rows[-1]["validation_loss"]) == report.validation[-1][1]


@pytest.mark.slow
def test_callbacks_see_every_step_and_every_validation_pass() -> None:
    steps: list[StepInfo] = []
    validations: list[StepInfo] = []
    report = engine().train(
        greetings(),
        on_step=steps.append,
        on_validation=validations.append,
        **{**QUICK, "steps": 6, "num_evaluations": 2},
    )
    assert [info.step for info in steps] == [1, 2, 3, 4, 5, 6]
    assert [info.loss for info in steps] == list(report.losses)
    assert [info.learning_rate for info in steps] == list(report.learning_rates)
    assert [(info.step, info.validation_loss) for info in validations] == list(
        report.validation[1:]
    )


@pytest.mark.slow
def test_ctrl_c_leaves_a_checkpoint_from_which_the_run_is_the_same(tmp_path: Path) -> None:
    settings = {**QUICK, "steps": 8}
    whole = engine().train(greetings(), **settings)
    cp = engine()
    earlier = signal.getsignal(signal.SIGINT)
    with pytest.raises(TrainingInterrupted, match="stopped at step 4 of 8; nothing was stored"):
        cp.train(greetings(), folder=tmp_path, on_step=press_ctrl_c_at(3), **settings)
    assert signal.getsignal(signal.SIGINT) is earlier
    assert cp.store.prefixes() == []
    resumed = cp.train(greetings(), folder=tmp_path, resume=True, **settings)
    assert resumed.losses == whole.losses
    assert resumed.grad_norms == whole.grad_norms
    assert resumed.validation == whole.validation
    with pytest.raises(TrainingInterrupted, match="since the run has no folder"):
        cp.train(greetings(), on_step=press_ctrl_c_at(1), **settings)


@pytest.mark.slow
def test_a_finished_run_that_is_resumed_stores_nothing(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/prefixes.db"
    cp = engine(store=url)
    settings = {**QUICK, "steps": 3}
    first = cp.train(greetings(), folder=tmp_path, **settings)
    again = cp.train(greetings(), folder=tmp_path, resume=True, **settings)
    assert again == first
    assert len(cp.versions("task", "greet")) == 1
    longer = cp.train(greetings(), folder=tmp_path, resume=True, **{**settings, "steps": 5})
    assert len(longer.losses) == 5
    assert len(cp.versions("task", "greet")) == 2
    elsewhere = engine()  # its store does not have them
    elsewhere.train(greetings(), folder=tmp_path, resume=True, **{**settings, "steps": 5})
    assert len(elsewhere.versions("task", "greet")) == 1


@pytest.mark.slow
def test_ctrl_c_while_users_are_trained_keeps_those_who_are_finished(tmp_path: Path) -> None:
    cp = engine(store=f"sqlite:///{tmp_path}/prefixes.db")
    texts = {f"u{i}": [f"text of {i}"] * 4 for i in range(6)}
    options = {**QUICK, "steps": 2, "validation": 0, "concurrent_users": 1}

    def pairs() -> object:
        for number, item in enumerate(texts.items()):
            if number == 3:
                os.kill(os.getpid(), signal.SIGINT)
            yield item

    with pytest.raises(TrainingInterrupted, match=r"stopped: 3 users are stored"):
        cp.train_users(pairs(), folder=tmp_path / "run", **options)  # type: ignore[arg-type]
    stored = cp.names("user")
    assert len(stored) == 3
    report = cp.train_users(texts, folder=tmp_path / "run", resume=True, **options)
    assert set(report.skipped) == set(stored)
    assert set(report.users) == set(texts) - set(stored)
    assert all(len(cp.versions("user", name)) == 1 for name in texts)


@pytest.mark.slow
def test_a_tracker_that_is_not_installed_is_an_error_at_once() -> None:
    cp = engine()
    steps: list[StepInfo] = []
    for tracker, error in (("comet_ml", MissingDependencyError), ("no-such", TrainingDataError)):
        with pytest.raises(error, match=tracker):
            cp.train(greetings(), tracker=tracker, on_step=steps.append, **QUICK)
    assert not steps
    assert cp.store.prefixes() == []


@pytest.mark.slow
def test_progress_is_written_to_logs_too(capfd: pytest.CaptureFixture[str]) -> None:
    engine().train(greetings(), **{**QUICK, "steps": 2, "progress": True})
    lines = capfd.readouterr().err.splitlines()
    assert any(line.startswith("training 2/2 loss ") for line in lines)


def test_options_that_have_no_effect_on_users_are_refused(tmp_path: Path) -> None:
    cp: ControlPrefix = engine()
    with pytest.raises(ControlPrefixError, match="tracker has no effect when training users"):
        cp.train_users({"ana": ["x"]}, tracker="tensorboard", progress=False)


def test_a_wrong_folder_or_callback_is_told() -> None:
    cp = engine()
    for options, message in (({"folder": 5}, "give a path"), ({"on_step": 5}, "give a function")):
        with pytest.raises(TrainingDataError, match=message):
            cp.train(greetings(), **{**QUICK, **options})


@pytest.mark.slow
def test_a_run_that_is_not_finished_is_not_written_over(tmp_path: Path) -> None:
    options = {**QUICK, "steps": 4, "save_steps": 1}
    stopped = press_ctrl_c_at(2)
    cp = engine()
    with pytest.raises(TrainingInterrupted):
        cp.train(greetings(), folder=tmp_path, on_step=stopped, **options)
    with pytest.raises(TrainingDataError, match="unfinished run; continue it with resume=True"):
        cp.train(greetings()[:4], folder=tmp_path, **options)
    os.utime(tmp_path / "checkpoint.safetensors", (0, 0))  # as a copy may have it
    report = cp.train(greetings(), folder=tmp_path, resume=True, **options)
    os.utime(tmp_path / "report.json", (0, 0))
    assert report.losses == engine().train(greetings(), **options).losses
    cp.train(greetings(), folder=tmp_path, **options)  # another run, after one that is finished


@pytest.mark.slow
def test_a_finished_run_that_was_continued_and_stopped_is_not_finished(tmp_path: Path) -> None:
    options = {**QUICK, "steps": 4, "save_steps": 1}
    cp = engine()
    cp.train(greetings(), folder=tmp_path, **options)
    more = {**options, "steps": 8}
    with pytest.raises(TrainingInterrupted):
        cp.train(greetings(), folder=tmp_path, resume=True, on_step=press_ctrl_c_at(6), **more)
    with pytest.raises(TrainingDataError, match="unfinished run; continue it with resume=True"):
        cp.train(greetings(), folder=tmp_path, **options)


@pytest.mark.slow
def test_another_number_of_slots_is_not_called_other_examples(tmp_path: Path) -> None:
    cp = engine()
    cp.train(greetings(), folder=tmp_path, **QUICK)
    more = {**QUICK, "num_slots": 5}
    with pytest.raises(TrainingDataError, match=r"holds another run \(another num_slots or init"):
        cp.train(greetings(), folder=tmp_path, resume=True, **more)
    with pytest.raises(
        TrainingDataError, match="other examples, or other prefixes that are attached"
    ):
        cp.train(greetings()[2:], folder=tmp_path, resume=True, **QUICK)


@pytest.mark.slow
def test_a_resumed_run_whose_versions_are_gone_stores_them_again(tmp_path: Path) -> None:
    cp = engine(store=f"sqlite:///{tmp_path}/prefixes.db")
    settings = {**QUICK, "steps": 2}
    first = cp.train(greetings(), folder=tmp_path / "run", **settings)
    cp.remove("task", "greet")
    again = cp.train(greetings(), folder=tmp_path / "run", resume=True, **settings)
    assert again.losses == first.losses
    assert again.saved["task 'greet'"] == 1
    assert cp.exists("task", "greet")


def test_options_that_have_no_effect_are_refused(tmp_path: Path) -> None:
    cp = engine()
    rows = greetings()
    with pytest.raises(ControlPrefixError, match="give a sweep parameterizations"):
        cp.sweep(rows, parameterization="direct", progress=False)
    texts = {"ana": ["a text"], "bo": ["another"]}
    with pytest.raises(ControlPrefixError, match="too_long has no effect when training users"):
        cp.train_users(texts, too_long="skip", progress=False)
    with pytest.raises(ControlPrefixError, match="form has no effect .* that start from codes"):
        cp.train_users(texts, decoder="any", as_codes=False, form="decoupled", progress=False)
    with pytest.raises(ControlPrefixError, match="parameterization has no effect .* a decoder"):
        cp.learn_decoder(texts, name="d", parameterization="mlp", progress=False)
    stocked(cp)
    with pytest.raises(ControlPrefixError, match="contrast applies to train"):
        cp.reinforce([says("a")], reward=letters_reward, contrast=0.5, progress=False)


def test_an_init_that_is_a_stored_prefix_keeps_its_sources() -> None:
    cp = engine()
    rows = [
        Example(prompt=f"Write {i}", completion=f"Text {i}", task="email", user="ana")
        for i in range(4)
    ]
    settings = {**QUICK, "steps": 1, "learn": "task", "validation": 0.0}
    cp.train(rows, **settings)
    others = [row.model_copy(update={"user": "bo"}) for row in rows]
    cp.train(others, init={("task", "email"): cp.get("task", "email")}, **settings)
    cp.forget_user("ana")
    assert [info.num_forgotten for info in cp.versions("task", "email")] == [1, 1]
