"""Commands: run folders, configuration files, resuming, and mistakes that need no model."""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import run
from typer.testing import CliRunner

from controlprefix import ControlPrefix, Request
from controlprefix.cli import app
from controlprefix.cli.config import apply_config
from controlprefix.cli.groups import ModelArguments
from controlprefix.cli.reinforce import parse_rewards
from controlprefix.cli.runs import RunArguments
from controlprefix.errors import ControlPrefixError, RequestError
from controlprefix.store import PrefixStore


@pytest.mark.slow
def test_distill_sweep_shorten_and_resume(model_folder: Path, tmp_path: Path) -> None:
    data, prompts = tmp_path / "data.jsonl", tmp_path / "prompts.txt"
    rows = [{"prompt": f"Hi {i}", "completion": "Good day to you."} for i in range(8)]
    data.write_text("\n".join(json.dumps(row) for row in rows))
    prompts.write_text("\n".join(f"Hi {i}" for i in range(8)))
    model = ("--model", str(model_folder))
    common = (
        "--task",
        "note",
        "--learn",
        "task",
        "--steps",
        "30",
        "--learning-rate",
        "0.02",
        *model,
    )

    swept = run(
        tmp_path, "sweep", str(data), "--num-slots", "1,2", *common, "--folder", str(tmp_path)
    )
    assert "fewest slots within 0.01 of the lowest:" in swept
    assert json.loads((tmp_path / "sweep.json").read_text())["points"][1]["num_slots"] == 2
    assert run(tmp_path, "prefixes", "list").startswith("nothing is stored yet in ")

    again = ("--folder", str(tmp_path / "run"), "--resume")
    train = ("train", str(data), "--num-slots", "4", *common, *again)
    first, second = run(tmp_path, *train), run(tmp_path, *train)
    assert "stored task 'note' version 1" in first
    assert "stored task 'note' version 1" in second  # it was finished
    assert first.split("best loss")[1] == second.split("best loss")[1]
    assert (tmp_path / "run" / "report.json").exists()

    with data.open("w") as file:
        for row in rows:
            print(json.dumps({**row, "task": "note"}), file=file)
    shorter = run(tmp_path, "shorten", "task", "note", str(data), "--keep", "0.5", *model)
    assert "stored task 'note' version 2:" in shorter

    text = ("distill", "Be brief.", str(prompts), "-a", "tone=brief", "--steps", "2", *model)
    assert "stored attribute 'tone=brief' version 1" in run(tmp_path, *text)
    for invalid, message in (
        (
            ("train", str(data), "--parameterization", "dirct", *model),
            "'dirct' is not one of 'direct'",
        ),
        (("train", str(data), "--tracker", "nosuch", *model), "tracker 'nosuch'"),
        (("sweep", str(data), "--num-slots", "a", *model), "--num-slots"),
        (("sweep", str(data), "--num-slots", "nan", *model), "whole numbers from 1"),
        (("sweep", str(data), "--num-slots", "2.5", *model), "whole numbers from 1"),
        (("distill", "Be brief.", str(prompts), *model), "name one to learn"),
    ):
        with pytest.raises(ControlPrefixError, match=message):
            run(tmp_path, *invalid)


@pytest.mark.slow
def test_mistakes_are_told_before_a_model_is_loaded(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "x", "completion": "y", "task": "t"}\n')
    model = ("--model", str(tmp_path / "no such model"))
    for arguments, message in (
        (("train", str(rows), "--steps", "0"), "steps is 0"),
        (("train", str(rows), "--validation", "1.5"), "needs a fraction"),
        (("train", str(rows), "--validation", "dev.jsonl"), "neither a fraction nor a file"),
        (("train", str(rows), "--text", "body"), "no column 'body'"),
        (("train", str(rows), "--too-long", "shrink"), "'shrink' is not one of"),
        (("train", str(rows), "--learn", "user"), "no example has one"),
        (("train", str(rows), "--learn", "tsk"), "cannot learn 'tsk'"),
        (("train", str(rows), "--num-slots", "0"), "greater than or equal to 1"),
        (("distill", "Be brief.", str(rows)), "name one to learn"),
        (("prefixes", "import", "no folder"), "does not exist"),
        (("generate", "Hi", "--strength", "user"), "not of the form name=value"),
        (("generate", "Hi", "--strength", "tone=2"), "it can name: task, user"),
    ):
        with pytest.raises(ControlPrefixError, match=message):
            run(tmp_path, *arguments, *model)
    with pytest.raises(ControlPrefixError, match="there is no folder"):
        run(tmp_path, "train", str(rows), *model)
    with pytest.raises(ControlPrefixError, match="attributes init no.yaml"):
        run(tmp_path, "attributes", "show", "no.yaml")


@pytest.mark.slow
def test_runs_have_folders_of_their_own(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps({"prompt": f"Say {i}", "completion": "la", "task": "t"}) for i in range(8)]
    (tmp_path / "songs.jsonl").write_text("\n".join(rows))
    train = (
        "train",
        "songs.jsonl",
        "--model",
        str(model_folder),
        "--steps",
        "2",
        "--num-slots",
        "2",
    )
    with pytest.raises(ControlPrefixError, match="there is no run of this command and songs.jsonl"):
        run(tmp_path, *train, "--resume")
    run(tmp_path, *train)
    run(tmp_path, *train)
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"songs", "songs-2"}
    versions = run(tmp_path, "prefixes", "show", "task", "t")
    run(tmp_path, *train, "--resume")
    assert run(tmp_path, "prefixes", "show", "task", "t") == versions
    assert (tmp_path / "runs" / "songs-2" / "report.json").exists()


def test_a_configuration_file_has_the_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("STORE", "TENANT"):
        monkeypatch.setenv(f"CONTROLPREFIX_{name}", "")
        monkeypatch.delenv(f"CONTROLPREFIX_{name}")
    config = tmp_path / "controlprefix.toml"
    config.write_text('tenant = "acme"\nstore = "shop.db"\n')
    apply_config()
    result = CliRunner().invoke(app, ["store", "stats"])
    assert "there is no store shop.db" in str(result.exception)
    assert not (tmp_path / "shop.db").exists()
    PrefixStore(f"sqlite:///{tmp_path}/shop.db").close()
    result = CliRunner().invoke(app, ["store", "stats"])
    assert f"store {tmp_path}/shop.db, tenant 'acme'" in result.output
    monkeypatch.setenv("CONTROLPREFIX_TENANT", "other")
    apply_config()
    assert "tenant 'other'" in CliRunner().invoke(app, ["store", "stats"]).output
    for content, message in (("tenat = 'x'", "did you mean 'tenant'"), ("tenant = 3", "in quotes")):
        config.write_text(content)
        with pytest.raises(ControlPrefixError, match=message):
            apply_config()


def folder_of_run(data: str, command: str = "train", *, resume: bool = False) -> str:
    with RunArguments(resume=resume).recorded(command, Path(data)) as options:
        (options["folder"] / "checkpoint.safetensors").touch()
        name: str = options["folder"].name
        return name


def test_resume_continues_the_latest_run_of_the_command_and_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with RunArguments().recorded("train", Path("rows.jsonl")) as options:
        assert options["folder"].is_dir()
    assert not (tmp_path / "runs/rows").exists()  # nothing was saved
    assert folder_of_run("rows.jsonl", "train") == "rows"
    assert folder_of_run("rows.jsonl", "users train") == "rows-2"
    assert folder_of_run("other/rows.csv", "train") == "rows-3"
    assert folder_of_run("rows.jsonl", resume=True) == "rows"
    assert folder_of_run("rows.jsonl", "users train", resume=True) == "rows-2"
    assert folder_of_run("other/rows.csv", resume=True) == "rows-3"
    with (
        contextlib.suppress(ControlPrefixError),
        RunArguments(folder=Path("runs/rows")).recorded("train", Path("songs.jsonl")),
    ):
        raise ControlPrefixError("refused: another run is there")
    assert folder_of_run("rows.jsonl", resume=True) == "rows"
    Path("runs/mine").mkdir()
    with RunArguments(folder=Path("runs/mine")).recorded("train", Path("songs.jsonl")):
        pass
    assert list(Path("runs/mine").iterdir()) == []
    with pytest.raises(RequestError, match=r"and songs.jsonl in .* There are: .*users train rows"):
        folder_of_run("songs.jsonl", resume=True)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta2"])
def test_a_device_that_is_none_is_told_before_anything_is_loaded(device: str) -> None:
    with pytest.raises(ControlPrefixError, match=f"device is '{device}'"):
        ControlPrefix.from_pretrained("no-such-model", device=device, store="sqlite://")


@pytest.mark.slow
def test_an_option_that_is_left_out_is_shorter_where_there_is_less_room(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = "x" * 200  # of the model's 256 positions
    model = ("--model", str(model_folder), "--raw")
    requests: list[Request] = []
    stream = ControlPrefix.stream

    def noting(self: ControlPrefix, request: Request) -> Any:
        requests.append(request)
        return stream(self, request)

    monkeypatch.setattr(ControlPrefix, "stream", noting)
    run(tmp_path, "generate", prompt, *model)
    assert "max_new_tokens" not in requests[0].model_fields_set
    with pytest.raises(RequestError, match="200"):
        run(tmp_path, "generate", prompt, "--max-new-tokens", "128", *model)


@pytest.mark.slow
def test_options_of_an_experiment_and_the_command_line_are_joined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.csv").write_text("question,answer\na,b\n")
    (tmp_path / "e.toml").write_text(
        'rows = "rows.csv"\nmodel = "theirs"\ndtype = "float16"\nrevision = "v2"\n'
        'columns = { prompt = "question", completion = "answer" }\n'
    )
    loaded: list[tuple[Any, ...]] = []

    def load(self: ModelArguments, **_: Any) -> None:
        loaded.append((self.model, self.dtype, self.revision))
        raise RequestError("loaded")

    monkeypatch.setattr(ModelArguments, "load", load)
    arguments = ("compare", "--experiment", str(tmp_path / "e.toml"), "--task", "qa")
    for own, expected in (
        ((), ("theirs", "float16", "v2")),
        (("--model", "smollm2"), ("smollm2", "float16", "v2")),
        (("--dtype", "auto"), ("theirs", "auto", "v2")),
    ):
        with pytest.raises(RequestError, match="loaded"):  # so its rows could be read
            run(tmp_path, *arguments, *own)
        assert loaded.pop() == expected
    (tmp_path / "e.toml").write_text('rows = "rows.csv"\ndevice = 0\n')
    with pytest.raises(RequestError, match="device of the experiment is 0; it must be a text"):
        run(tmp_path, *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("serve --vllm-model a", "--vllm-model has no effect with --engine transformers"),
        (
            "serve --engine vllm --vllm-prefixes . --max-sequences-per-tenant 1",
            "--max-sequences-per-tenant has no effect with --engine vllm",
        ),
        (
            "serve --tenant acme --tokens-per-minute 60",
            "--tokens-per-minute has no effect with --tenant",
        ),
        ("prefixes import . --kind task --name a --labels a=b", "--labels"),
        ("prefixes import . --kind task --name a --peft-task 1", "--peft-task"),
    ],
)
def test_options_without_effect_are_refused(tmp_path: Path, arguments: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        run(tmp_path, *arguments.split())


def test_a_reward_is_a_function_of_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_reward.py").write_text(
        "def score(requests, texts):\n    return [1.0] * len(texts)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [entry for entry in sys.path if entry])
    assert parse_rewards(["python=my_reward:score"])([], ["a"]) == [1.0]
