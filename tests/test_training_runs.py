"""Runs that are killed, shared, traced, cut short or distilled."""

import html
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from controlprefix import (
    AttributeSpace,
    ContextLengthError,
    ControlPrefix,
    Prefix,
    StoreError,
    TrainingDataError,
    UnknownNameError,
)
from controlprefix.reports import provenance
from controlprefix.store import PrefixStore
from controlprefix.training import ParameterizationName
from controlprefix.training.run import TrainingRun

from helpers import QUICK, engine, greetings
from models import build, byte_tokenizer

PARAMETERIZATIONS: tuple[ParameterizationName, ...] = get_args(ParameterizationName)


@pytest.mark.slow
@pytest.mark.parametrize("name", PARAMETERIZATIONS)
def test_every_parameterization_learns(name: str) -> None:
    cp = engine()
    rate = 0.2 if name == "direct" else 0.02
    settings = {**QUICK, "steps": 40, "learning_rate": rate, "parameterization": name}
    report = cp.train(greetings(), **settings)
    assert report.best_loss < report.validation[0][1] - 0.4
    assert cp.get("task", "greet").num_slots == 4
    assert cp.versions("task", "greet")[-1].details["training"]["parameterization"] == name


@pytest.mark.slow
def test_a_step_in_pieces_is_the_same_step() -> None:
    reports, prefixes = [], []
    for micro_batch in (None, 1, 3):
        cp = engine()
        reports.append(cp.train(greetings(), micro_batch_size=micro_batch, **QUICK))
        prefixes.append(cp.get("task", "greet").slots["decoder"])
    for report, slots in zip(reports[1:], prefixes[1:], strict=True):
        assert report.losses == pytest.approx(reports[0].losses, abs=1e-4)
        assert torch.allclose(slots, prefixes[0], atol=1e-3)


COMMON = """
import json, os, signal, sys
sys.path.insert(0, {tests!r})
os.environ["HF_HUB_OFFLINE"] = "1"
import torch
torch.set_num_threads(1)
from controlprefix import TrainingDataError, embeddings
from helpers import QUICK, Letters, engine, greetings
"""


def python(script: str, **environment: str) -> subprocess.Popen[str]:
    body = COMMON.format(tests=str(Path(__file__).parent)) + textwrap.dedent(script)
    return subprocess.Popen(
        [sys.executable, "-c", body],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["direct", "shared"])
def test_a_run_killed_in_the_middle_goes_on_as_if_nothing_had_happened(
    name: str, tmp_path: Path
) -> None:
    """kill −9 in the middle of a step; the same losses, the same prefixes, in another process."""
    settings = {
        **QUICK,
        "parameterization": name,
        "slot_dropout": 0.3,
        "contrast": 0.3,
        "save_steps": 3,
    }
    whole = engine()
    expected = whole.train(greetings(), **settings)
    killed = python(
        f"""
        cp = engine()
        passes = 0
        def count(*_):
            global passes
            passes += torch.is_grad_enabled()
            if passes == 8:
                os.kill(os.getpid(), signal.SIGKILL)
        cp.model.register_forward_hook(count)
        cp.train(greetings(), folder={str(tmp_path)!r}, **{settings!r})
        """
    )
    assert killed.wait(120) == -signal.SIGKILL
    again = engine()
    report = again.train(greetings(), folder=tmp_path, resume=True, **settings)
    assert report.losses == expected.losses
    assert report.validation == expected.validation
    assert (report.best_step, report.num_tokens) == (expected.best_step, expected.num_tokens)
    for kind, name_ in (("task", "greet"), ("attribute", "formality=formal")):
        assert again.get(kind, name_).to_bytes() == whole.get(kind, name_).to_bytes()  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_finished_run_can_go_on_longer(tmp_path: Path) -> None:
    cp = engine()
    settings = {**QUICK, "parameterization": "mlp"}
    first = cp.train(greetings(), folder=tmp_path, **settings)
    longer = {**QUICK, "steps": 20, "parameterization": "mlp"}
    report = cp.train(greetings(), folder=tmp_path, resume=True, **longer)
    assert report.losses[:12] == first.losses
    assert len(report.losses) == 20


@pytest.mark.slow
@pytest.mark.parametrize("validation", [0, 0.25])
def test_a_run_that_is_to_end_sooner_keeps_what_it_has_learned(
    validation: float, tmp_path: Path
) -> None:
    cp = engine()
    settings = {**QUICK, "validation": validation, "num_evaluations": 1, "save_steps": 1}
    whole = cp.train(greetings(), folder=tmp_path, **settings)
    for steps in (12, 7):  # the state is at step 12
        report = cp.train(greetings(), folder=tmp_path, resume=True, **{**settings, "steps": steps})
        assert (len(report.losses), report.best_step) == (12, 12)
        assert report.validation == whole.validation
    assert len(cp.versions("task", "greet")) == 1  # it was stored already

    save = TrainingRun.save

    def killed(self: TrainingRun, folder: Path) -> None:
        save(self, folder)
        if self.progress.step == 3:  # without a validation pass since step 0
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingRun, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            cp.train(greetings(), folder=tmp_path / "cut", **settings)
    ended = cp.train(greetings(), folder=tmp_path / "cut", resume=True, **{**settings, "steps": 2})
    assert ended.losses == whole.losses[:3]
    assert ended.best_step == 3
    assert [step for step, _ in ended.validation] == ([0, 3] if validation else [])


@pytest.mark.slow
def test_what_cannot_be_done_is_refused_not_left_out(caplog: pytest.LogCaptureFixture) -> None:
    cp = engine()
    with pytest.raises(TrainingDataError, match="resume continues from a checkpoint"):
        cp.train(greetings(), resume=True, **QUICK)
    with pytest.raises(TrainingDataError, match="resume continues from a checkpoint"):
        cp.train_users({"ana": ["hey"]}, resume=True, progress=False)
    with pytest.raises(TrainingDataError, match="patience needs held-out examples"):
        cp.train(greetings(), patience=2, validation=0, **QUICK)
    cp.train(greetings(), **QUICK)
    for change, message in (
        ({"mixing": "logits"}, "mixing='logits'"),
        ({"calibrated": True}, "calibrated=True"),
        ({"unseen": "text"}, "unseen='text'"),
        ({"strengths": {"formality": -1.0}}, "a strength below 0"),
    ):
        rows = greetings()
        rows[2] = rows[2].model_copy(update=change)
        with pytest.raises(TrainingDataError, match=f"row 3 has {message}"):
            cp.train(rows, **QUICK)
        with pytest.raises(TrainingDataError, match=f"row 3 has {message}"):
            cp.shorten("task", "greet", rows)


def test_the_teacher_of_a_distilled_prefix_has_no_default_labels() -> None:
    space = AttributeSpace.parse("attributes: {tone: {labels: [warm, cool], default: warm}}")
    cp = ControlPrefix.from_pretrained(
        build("llama"), tokenizer=byte_tokenizer(), store="sqlite://", attributes=space
    )
    options = {**QUICK, "steps": 1, "learning_rate": 1e-9, "max_new_tokens": 4}
    target: dict[str, Any] = {"attribute": "tone", "label": "warm", "prompts": ["a", "b", "c", "d"]}
    first = cp.distill("Be warm.", **target, **options)  # the default itself, not there yet
    cp.put("attribute", "tone=warm", Prefix.random(cp.geometry, num_slots=4, scale=3.0, seed=1))
    assert cp.distill("Be warm.", **target, **options).losses == first.losses


@pytest.mark.slow
def test_another_run_or_a_damaged_state_is_refused(tmp_path: Path) -> None:
    cp = engine()
    cp.train(greetings(), folder=tmp_path, **QUICK)
    for examples, changes, message in (
        (greetings(), {"seed": 2}, "seed was 1, is 2"),
        (greetings(), {"learning_rate": 0.3}, "learning_rate was 0.1, is 0.3"),
        (greetings(7), {}, "other examples, or other prefixes that are attached"),
    ):
        with pytest.raises(TrainingDataError, match=f"holds another run .*{message}"):
            cp.train(examples, folder=tmp_path, resume=True, **{**QUICK, **changes})
    state = tmp_path / "checkpoint.safetensors"
    whole = state.read_bytes()
    for damaged in (whole[:-100], whole[:-8] + bytes([whole[-8] ^ 1]) + whole[-7:], b"x" * 20):
        state.write_bytes(damaged)
        with pytest.raises(StoreError, match="cannot be read: .*; remove it to start from step 0"):
            cp.train(greetings(), folder=tmp_path, resume=True, **QUICK)
    assert len(cp.versions("task", "greet")) == 1
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="cannot create the run's folder"):
        cp.train(greetings(), folder=tmp_path / "file" / "below", **QUICK)


def preferences() -> list[dict[str, Any]]:
    """Preferences of one completion over another, of labels that are not stored."""
    return [
        {
            "prompt": f"Say {i}",
            "attributes": {"tone": "warm"},
            "chosen": f"dear {i}",
            "rejected": "no" * (1 + i % 3),
        }
        for i in range(6)
    ]


@pytest.fixture
def port() -> str:
    import socket

    with socket.socket() as result:
        result.bind(("127.0.0.1", 0))
        number = result.getsockname()[1]
    return str(number)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["direct", "shared"])
def test_two_processes_learn_the_same_as_one(name: str, port: str, tmp_path: Path) -> None:
    """Also where one has no row left in a step, and a label stands in the other's rows only."""
    settings = {**QUICK, "batch_size": 3, "parameterization": name, "slot_dropout": 0.2}
    alone = engine()
    expected = alone.train(greetings(), **settings)
    preferred: dict[str, Any] = {**settings, "slot_dropout": 0.0, "steps": 3, "validation": 0}
    expected_metrics: list[dict[str, float]] = []
    alone.train_preferences(
        preferences(),
        on_step=lambda step: expected_metrics.append(dict(step.metrics)),
        learn="attributes",
        **preferred,
    )
    script = f"""
        from test_training_runs import preferences
        cp = engine(store="sqlite:///{tmp_path}/prefixes.db")
        report = cp.train(greetings(), **{settings!r})
        embeddings.load_embedder = lambda embedder: Letters()
        texts = {{f"u{{i}}": [f"text {{i}}", "more"] for i in range(3)}}
        decoder = cp.learn_decoder(texts, num_slots=2, width=4, steps=2, progress=False)
        try:
            cp.train_users(texts)
        except TrainingDataError as error:
            assert "each process would train all users" in str(error)
        else:
            raise AssertionError
        metrics = []
        cp.train_preferences(
            preferences(),
            on_step=lambda step: metrics.append(dict(step.metrics)),
            learn="attributes",
            **{preferred!r},
        )
        saved = [dict(report.saved), decoder.version, metrics]
        print(json.dumps([report.losses, report.validation, *saved]))
        """
    pair = [
        python(
            script,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
            ACCELERATE_USE_CPU="true",
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=240) for process in pair]
    result = []
    for process, (printed, errors) in zip(pair, outputs, strict=True):
        assert process.returncode == 0, errors
        result.append(json.loads(printed.splitlines()[-1]))
    assert result[0] == result[1]
    losses, validation, saved, decoder_version, metrics = result[0]
    assert losses == pytest.approx(expected.losses, abs=1e-4)
    assert [loss for _, loss in validation] == pytest.approx(
        [loss for _, loss in expected.validation], abs=1e-4
    )
    assert saved == expected.saved  # stored once
    assert decoder_version == 1
    assert expected_metrics
    for own, its in zip(metrics, expected_metrics, strict=True):  # of all rows, in each process
        assert own == pytest.approx(its, abs=2e-3)
    together = (
        engine(store=f"sqlite:///{tmp_path}/prefixes.db").get("task", "greet").slots["decoder"]
    )
    assert torch.allclose(together, alone.get("task", "greet").slots["decoder"], atol=1e-2)


@pytest.mark.slow
def test_the_command_shares_a_run_between_processes(port: str, tmp_path: Path) -> None:
    """As torchrun starts them, without a word on the device."""
    build("llama").save_pretrained(tmp_path / "m")
    byte_tokenizer(chat=True).save_pretrained(tmp_path / "m")
    rows = [row.model_dump(exclude_unset=True) for row in greetings()]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    command = [sys.executable, "-m", "controlprefix.cli", "train", "rows.jsonl", "--model", "m"]
    command += ["--store", "p.db", "--num-slots", "2", "--steps", "2", "--validation", "0"]
    own = {k: v for k, v in os.environ.items() if k != "ACCELERATE_USE_CPU"}
    own |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    pair = [
        subprocess.Popen(
            command,
            cwd=tmp_path,
            env={**own, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=240) for process in pair]
    for process, (_, errors) in zip(pair, outputs, strict=True):
        assert process.returncode == 0, errors
    assert outputs[0][0].count("stored task 'greet' version 1") == 1
    assert outputs[1][0] == ""
    with PrefixStore(tmp_path / "p.db") as store:
        assert {info.current.version for info in store.prefixes()} == {1}
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["rows"]


class _Noted(GeneralTracker):  # type: ignore[misc]  # accelerate is untyped
    name = "noted"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.values: list[tuple[int | None, dict[str, float]]] = []

    @property
    def tracker(self) -> None:
        return None

    def store_init_configuration(self, values: dict[str, Any]) -> None: ...

    def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
        self.values.append((step, values))


@pytest.mark.slow
def test_a_precision_and_a_tracker_of_the_callers_own() -> None:
    tracker = _Noted()
    from accelerate.state import AcceleratorState

    exact = engine().train(greetings(), **QUICK)
    AcceleratorState._reset_state()  # accelerate keeps one precision a process
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", log_with=tracker)
    accelerator.init_trackers("test")
    try:
        report = engine().train(greetings(), accelerator=accelerator, **QUICK)
    finally:
        AcceleratorState._reset_state()
    assert [step for step, _ in tracker.values] == list(range(1, 13))
    assert [values["loss"] for _, values in tracker.values] == list(report.losses)
    assert report.losses == pytest.approx(exact.losses, abs=0.1)
    assert report.losses != exact.losses


@pytest.mark.slow
def test_trackers_that_the_caller_did_not_start_are_started_in_each_run() -> None:
    finished: list[int] = []

    class Ending(_Noted):
        def finish(self) -> None:
            finished.append(len(self.values))

    tracker = Ending()
    accelerator = Accelerator(cpu=True, log_with=tracker)
    for i in (1, 2):
        engine().train(greetings(), accelerator=accelerator, **QUICK)
        assert finished == [12, 24][:i]
    accelerator.init_trackers("test")
    engine().train(greetings(), accelerator=accelerator, **QUICK)
    assert len(finished) == 2  # the caller ends it


@pytest.mark.slow
def test_learning_curves_are_written_as_numbers_and_as_a_picture(tmp_path: Path) -> None:
    report = engine().train(greetings(), folder=tmp_path, **QUICK)
    output = json.loads((tmp_path / "report.json").read_text())
    assert output["losses"] == list(report.losses)
    assert [tuple(item) for item in output["validation"]] == list(report.validation)
    pytest.importorskip("matplotlib")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    pytest.importorskip("jinja2")
    page = (tmp_path / "report.html").read_text()
    for words in ("held out, at the start", "Settings", "learning_rate", "How it was made"):
        assert words in page, words
    for name, version in report.saved.items():
        assert f"{name} version {version}" in html.unescape(page)


def test_a_command_line_is_shown_without_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--store", "postgresql://app:pass-word@db/x", "a b"]
    for program, expected in (
        ("/usr/bin/controlprefix", "controlprefix --store postgresql://app:***@db/x 'a b'"),
        ("examples/users.py", "python users.py --store postgresql://app:***@db/x 'a b'"),
        ("-c", ""),
    ):
        monkeypatch.setattr("sys.argv", [program, *arguments])
        assert provenance()["command"] == expected


def test_prompts_that_do_not_fit_behind_an_instruction_are_skipped_before_the_teacher_writes() -> (
    None
):
    cp = engine("gpt2")
    context = cp.frozen_model.request_tokenizer.context_length
    assert context is not None
    options = {**QUICK, "steps": 1, "max_new_tokens": 4, "num_slots": 2}
    prompts = ["a", "b" * context, "c"]
    with pytest.raises(ContextLengthError, match="prompt 2 .* or give too_long='skip'"):
        cp.distill("Be warm.", prompts, task="t", **options)
    report = cp.distill("Be warm.", prompts, task="t", too_long="skip", **options)
    assert (report.num_examples + report.num_held_out, report.num_skipped) == (2, 1)
    with pytest.raises(TrainingDataError, match="too_long='cut' cannot be combined"):
        cp.distill("Be warm.", prompts, task="t", too_long="cut", **options)


def test_a_distilled_label_is_one_of_the_attribute_space() -> None:
    space = AttributeSpace.parse("attributes: {tone: {labels: [warm, cool], num_slots: 3}}")
    cp = ControlPrefix.from_pretrained(
        build("llama"), tokenizer=byte_tokenizer(), store="sqlite://", attributes=space
    )
    options = {**QUICK, "steps": 1, "max_new_tokens": 4, "attribute": "tone"}
    with pytest.raises(UnknownNameError, match="wram"):
        cp.distill("Be warm.", ["a", "b"], label="wram", **options)
    cp.distill("Be warm.", ["a", "b"], label="warm", **options)
    assert cp.get("attribute", "tone=warm").num_slots == 3
