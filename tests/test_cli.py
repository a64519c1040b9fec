"""The command line: what it prints, and that a mistake is one line and no traceback."""

import base64
import contextlib
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from controlprefix import ControlPrefix, Prefix, __version__, embeddings
from controlprefix.cli import app
from controlprefix.cli.config import apply_config
from controlprefix.cli.runs import RunArguments
from controlprefix.errors import ControlPrefixError, RequestError
from controlprefix.store import PrefixStore

from helpers import Histogram, Letters, commands
from models import build, byte_tokenizer


def run(folder: Path, *arguments: str) -> str:
    """Run a command in this process, with the store in `folder`; its errors are raised."""
    result = CliRunner(env={"CONTROLPREFIX_STORE": f"sqlite:///{folder}/prefixes.db"}).invoke(
        app, arguments
    )
    if isinstance(result.exception, ControlPrefixError):
        raise result.exception
    if result.exit_code == 2:  # the command line itself refused the arguments
        raise ControlPrefixError(" ".join(result.output.replace("│", " ").split()))
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command_and_every_option_is_explained(command: tuple[str, ...]) -> None:
    current: Any = get_command(app)
    for name in command:
        current = current.commands[name]
    assert (current.help or "").strip().splitlines()[0].endswith(".")
    for parameter in current.params:
        if parameter.param_type_name == "option":
            assert parameter.help, parameter.name


def test_the_version_is_printed(tmp_path: Path) -> None:
    assert run(tmp_path, "--version").strip().endswith(__version__)


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
        (("distill", "Be brief.", str(prompts), *model), "name one to learn"),
    ):
        with pytest.raises(ControlPrefixError, match=message):
            run(tmp_path, *invalid)


@pytest.mark.slow
def test_train_enroll_generate_show_and_forget(model_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    rows = [
        {"prompt": "Hi", "attributes": {"tone": t}, "completion": f"{t} words"}
        for t in ("warm", "brief")
    ]
    data.write_text("\n".join(json.dumps(row) for row in rows * 4))
    (tmp_path / "ana.txt").write_text("I write like this.\n\nAnd like that.\n")
    model = ("--model", str(model_folder))

    trained = run(tmp_path, "train", str(data), "--task", "note", "--steps", "2", *model)
    assert "stored task 'note' version 1" in trained
    assert "stored attribute 'tone=warm' version 1" in trained
    assert "2 steps" in trained
    for slots, version in (("3", "1"), ("4", "2")):
        enrolled = run(
            tmp_path, "enroll", "ana", str(tmp_path / "ana.txt"), "--num-slots", slots, *model
        )
        assert f"stored user 'ana' version {version}, from 2 texts" in enrolled
        assert f"in {slots} slots" in enrolled
    generated = run(
        tmp_path,
        *("generate", "Hello", "--task", "note", "--user", "ana", "--strength", "user=0.5"),
        *("-a", "tone=warm:0.6", "-a", "tone=brief:0.4", "--max-new-tokens", "5", *model),
    )
    assert generated.strip()
    request = ("generate", "Hello", "-a", "tone=odd", "--max-new-tokens", "5", *model)
    text = run(tmp_path, *request, "--unseen", "text", "--schedule", "tone=0:1,4:0")
    assert "for tone=odd, text: The tone is odd. (1.00)" in text
    for invalid, message in (
        (request, "no label 'odd'"),
        ((*request[:2], "-a", "tone=warm", "--calibrated", *model), "has no dial; calibrate it"),
        ((*request, "--schedule", "tone=0.5:1"), "needs the number of a token, got '0.5'"),
        ((*request, "--schedule", "tone=0"), "needs a number, got ''"),
    ):
        with pytest.raises(ControlPrefixError, match=message):
            run(tmp_path, *invalid)
    assert "nats per token" in run(tmp_path, "score", str(data), *model)
    listed = run(tmp_path, "prefixes", "list")
    assert all(name in listed for name in ("note", "tone=brief", "ana"))
    assert "tone=warm" not in run(tmp_path, "prefixes", "list", "--kind", "user")
    assert "tiny-llama" in run(tmp_path, "prefixes", "show", "user", "ana")
    rollback = ("prefixes", "rollback", "user", "ana", "--to", "1")
    assert "is at version 1" in run(tmp_path, *rollback)
    assert "yes" in run(tmp_path, "prefixes", "show", "user", "ana")
    assert "2 versions removed" in run(tmp_path, "users", "forget", "ana", "--yes")
    assert "nothing is stored yet" in run(tmp_path, "prefixes", "list", "--kind", "user")
    assert "ana" in run(tmp_path, "store", "audit")
    assert "1 versions" in run(tmp_path, "prefixes", "remove", "attribute", "tone=warm", "--yes")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "Hi", "--user", "ana"), "no user 'ana' in the store; enroll or train"),
        (("generate", " "), "the prompt is empty"),
        (("generate", "Hi", "--strength", "user=nan"), "strength of 'user' is nan"),
        (("generate", "Hi", "-a", "formal"), "--attribute 'formal' is not of the form name=value"),
        (("generate", "Hi", "-w", "user=lots"), "needs a number, got 'lots'"),
        (("generate", "Hi", "--model", "no/model"), "cannot load a model from 'no/model'"),
        (("train", "missing.jsonl"), "cannot read missing.jsonl"),
        (("prefixes", "show", "user", "ana"), "no user 'ana' in the store"),
        (("users", "forget", "ana", "--yes"), "no user 'ana' in the store"),
        (("prefixes", "show", "tone", "warm"), "'tone' is not one of 'task'"),
        (
            ("api-keys", "create", "a", "--tenant", "b", "--store", "/no/such/folder/p.db"),
            "unable to open database",
        ),
    ],
)
def test_mistakes_are_typed_errors(
    arguments: tuple[str, ...], message: str, model_folder: Path, tmp_path: Path
) -> None:
    needs_model = arguments[0] == "generate" and "--model" not in arguments
    with pytest.raises(ControlPrefixError) as caught:
        run(tmp_path, *arguments, *(("--model", str(model_folder)) if needs_model else ()))
    assert message in str(caught.value)


@pytest.mark.slow
def test_a_mistake_prints_one_line_and_no_traceback(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "controlprefix.cli", "prefixes", "show", "user", "ana"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "40"},
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr == (
        "error: no user 'ana' in the store; enroll or train the user, or check the store "
        f"and the tenant; the store is {tmp_path}/prefixes.db (no such file)\n"
    )


def test_names_are_printed_as_they_are(model_folder: Path, tmp_path: Path) -> None:
    """Square brackets are markup to the table's printer, and must not be."""
    (tmp_path / "texts.txt").write_text("one text\n")
    model = ("--model", str(model_folder))
    for name in ("[/]", "[red]x"):
        enrolled = run(tmp_path, "enroll", name, str(tmp_path / "texts.txt"), *model)
        assert f"stored user {name!r} version 1" in enrolled
    assert "[red]x" in run(tmp_path, "prefixes", "list", "--kind", "user")
    assert "'[red]x'" in run(tmp_path, "users", "forget", "[red]x", "--yes")


@pytest.mark.slow
def test_users_are_learned_enrolled_and_audited(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embeddings, "load_embedder", lambda embedder: Letters())
    model = ("--model", str(model_folder))
    lines = [{"user": f"u{i}", "text": f"hello {i} {j}"} for i in range(12) for j in range(2)]
    data = tmp_path / "users.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "texts.txt").write_text("hello you\nhello me\n")
    (tmp_path / "others.txt").write_text("hello them\n")
    texts = str(tmp_path / "texts.txt")
    output = run(
        tmp_path, "users", "decoder", str(data), "--num-slots", "2", "--width", "4", *model
    )
    assert "stored decoder 'users' version 1, from 12 users" in output
    trained = run(tmp_path, "users", "train", str(data), "--decoder", "users", *model)
    assert "stored 12 of 12 users" in trained
    assert "version 1" in run(tmp_path, "enroll", "ana", texts, "--decoder", "users", *model)
    guarded = run(tmp_path, "enroll", "cy", texts, "--decoder", "users", "--guard", *model)
    assert "of what is personal helps on texts left out" in guarded
    refined = run(tmp_path, "enroll", "ana", texts, "--decoder", "users", "--refine", *model)
    assert "stored user 'ana' version 2, from 2 texts" in refined
    held_out = ("--held-out", str(tmp_path / "others.txt"), "--num-canaries", "1")
    audit = run(tmp_path, "audit", "user", "ana", "--texts", texts, *held_out, *model)
    assert "membership inference, AUC" in audit
    assert "exposure of planted numbers, bits" in audit
    data.write_text('{"user": "ana"}')
    with pytest.raises(ControlPrefixError, match="users.jsonl line 1: completion: Field required"):
        run(tmp_path, "users", "train", str(data), *model)


@pytest.mark.slow
def test_prefixes_are_evaluated_and_calibrated(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embeddings, "load_embedder", lambda embedder: Histogram())
    model = ("--model", str(model_folder))
    cp = ControlPrefix.from_pretrained(str(model_folder), store=f"sqlite:///{tmp_path}/prefixes.db")
    for seed, label in enumerate(("low", "high")):
        prefix = Prefix.random(cp.geometry, num_slots=8, scale=2.0, seed=seed)
        cp.put("attribute", f"pitch={label}", prefix)
    with (
        (tmp_path / "classifier.jsonl").open("w") as classifier,
        (tmp_path / "rows.jsonl").open("w") as rows,
    ):
        for i in range(80):
            label = ("low", "high")[i % 2]
            text = cp.generate(
                "<s>", raw=True, attributes={"pitch": label}, temperature=0.5, seed=i,
                max_new_tokens=24,
            ).text  # fmt: skip
            attributes = {"pitch": label}
            classifier.write(json.dumps({"text": text, "attributes": attributes}) + "\n")
            if i < 8:
                row = {"prompt": "<s>", "raw": True, "completion": "x", "attributes": attributes}
                rows.write(json.dumps({**row, "completion": f"x{i}"}) + "\n")
    texts = ("--labelled-texts", str(tmp_path / "classifier.jsonl"), "--max-new-tokens", "24")
    how = ("--folder", str(tmp_path / "report"), "--strengths", "0,1", "--curve-rows", "4")
    result = run(tmp_path, "eval", str(tmp_path / "rows.jsonl"), *texts, *how, *model)
    assert "classifier of pitch: accuracy" in result
    assert "pitch=high" in result
    assert (tmp_path / "report" / "report.html").stat().st_size > 10_000
    monkeypatch.setattr("controlprefix.evaluation.calibration._MIN_EFFECT", -1.0)  # small effect
    dial = run(tmp_path, "calibrate", "pitch=high", "--num-samples", "24", *texts, *model)
    assert "dial of pitch=high (version 2): 0 → 0" in dial
    with pytest.raises(ControlPrefixError, match="no texts labelled with 'tone'; it has: pitch"):
        run(tmp_path, "calibrate", "tone=warm", *texts, *model)
    (tmp_path / "classifier.jsonl").write_text('{"text": "x"}')
    with pytest.raises(ControlPrefixError, match="no row has a label of an attribute"):
        run(tmp_path, "eval", str(tmp_path / "rows.jsonl"), *texts, *model)


def test_api_keys_are_made_listed_and_revoked(tmp_path: Path) -> None:
    key = run(tmp_path, "api-keys", "create", "web", "--tenant", "acme").strip()
    assert key.startswith("cp.")
    assert "web" in run(tmp_path, "api-keys", "list", "--tenant", "acme")
    assert "no API keys yet" in run(tmp_path, "api-keys", "list", "--tenant", "other")
    assert "revoked" in run(tmp_path, "api-keys", "revoke", "web", "--tenant", "acme", "--yes")
    with pytest.raises(ControlPrefixError, match="no API key 'web'"):
        run(tmp_path, "api-keys", "revoke", "web", "--tenant", "acme", "--yes")


def test_a_label_may_hold_a_colon() -> None:
    from controlprefix.cli.options import parse_attributes

    assert parse_attributes(["a=x:y", "a=x:y:0.5", "b=z:2", "c=w"]) == {
        "a": {"x:y": 0.5},
        "b": {"z": 2.0},
        "c": {"w": 1.0},
    }


def test_a_store_is_encrypted_and_its_keys_rotated(model_folder: Path, tmp_path: Path) -> None:
    model = ("--model", str(model_folder))
    (tmp_path / "texts.txt").write_text("one text\n")
    keys = {name: base64.b64encode(bytes([i]) * 32).decode() for i, name in enumerate(("k1", "k2"))}
    key_file = tmp_path / "keys.json"
    encrypted = ("--encryption-keys", str(key_file))
    enroll = ("enroll", "ana", str(tmp_path / "texts.txt"), *model)
    key_file.write_text(json.dumps({"default": {"current": "k1", "keys": keys}}))
    run(tmp_path, *enroll, *encrypted)
    request = ("generate", "Hi", "--user", "ana", "--max-new-tokens", "3", *model)
    with pytest.raises(ControlPrefixError, match="encryption"):
        run(tmp_path, *request)
    key_file.write_text(json.dumps({"default": {"current": "k2", "keys": keys}}))
    assert "1 versions re-encrypted" in run(tmp_path, "store", "rotate-keys", *encrypted)
    only = {"default": {"current": "k2", "keys": {"k2": keys["k2"]}}}
    key_file.write_text(json.dumps(only))
    assert run(tmp_path, *request, *encrypted).strip()


def test_kept_texts_are_printed_and_trained_on(model_folder: Path, tmp_path: Path) -> None:
    model = ("--model", str(model_folder))
    (tmp_path / "texts.txt").write_text("one text\n\nanother text\n")
    run(tmp_path, "enroll", "ana", str(tmp_path / "texts.txt"), "--keep-texts", *model)
    assert run(tmp_path, "users", "texts", "ana").split("\n")[0] == "one text"
    trained = run(tmp_path, "users", "train", "--steps", "1", *model)
    assert "stored 1 of 1 users" in trained


@pytest.mark.slow
def test_the_demo_writes_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it, on a tiny model with room for its prompts."""

    def tiny(model: Any, **options: Any) -> ControlPrefix:
        options["tokenizer"] = byte_tokenizer(chat=True)
        return from_pretrained(build("llama", max_position_embeddings=4096), **options)

    from_pretrained = ControlPrefix.from_pretrained
    monkeypatch.setattr(ControlPrefix, "from_pretrained", tiny)
    output = run(tmp_path, "demo", "--json", str(tmp_path / "demo.json"))
    assert "reopen the store" in output
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    importlib.import_module("demo").main(["--results", str(tmp_path / "results")])
    recorded = json.loads((tmp_path / "results" / "demo.json").read_text())
    assert {"command", "commit", "date", "machine"} < recorded.keys()
    figures = json.loads((tmp_path / "demo.json").read_text())["nats_per_token"]
    assert recorded["nats_per_token"].keys() == figures.keys()
    assert figures["labels"].keys() == {"formality", "tone"}
    assert figures["users"].keys() == {"ana", "bo", "cleo"}


def test_someones_table_is_shown_and_trained_on(model_folder: Path, tmp_path: Path) -> None:
    table = tmp_path / "export.csv"
    rows = [f"{i};ana;mail number {i};{'formal' if i % 2 else 'casual'}" for i in range(12)]
    table.write_text("\n".join(["id;agent;body;style", *rows, *rows[:1]]) + "\n")
    columns = ("--text", "body", "--user", "agent", "-a", "formality=style", "--task", "mail")
    summary = run(tmp_path, "data", "show", str(table), *columns, "--no-tokens")
    assert "13 rows: 0 different prompts, 13 texts without a prompt, 1 duplicates" in summary
    for line in (("formality", "casual", "7"), ("user", "ana", "13"), ("task", "mail", "13")):
        assert any(all(cell in text for cell in line) for text in summary.splitlines()), line
    model = ("--model", str(model_folder))
    in_tokens = run(tmp_path, "data", "show", str(table), *columns, *model)
    assert "tokens" in in_tokens
    quick = ("--steps", "2", "--num-slots", "2", "--folder", str(tmp_path / "run"))
    trained = run(tmp_path, "train", str(table), *columns, *model, *quick)
    assert "stored attribute 'formality=casual' version 1" in trained
    enrolled = run(
        tmp_path, "enroll", "ana", str(table), "--text", "body", "--user", "agent", *model
    )
    assert "version 1, from 13 texts" in enrolled
    sizes = ("--num-slots", "1", "--steps", "1", "--validation", "0.3")
    assert "fewest slots" in run(tmp_path, "sweep", str(table), *columns, *model, *sizes)
    scored = run(tmp_path, "score", str(table), *columns, *model)
    assert scored.startswith("13 examples")


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


def test_one_prefix_is_exported_imported_named_and_removed(
    model_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "texts.txt").write_text("one text\nanother text\n")
    model = ("--model", str(model_folder))
    run(tmp_path, "enroll", "ana", str(tmp_path / "texts.txt"), *model)
    folder, file, peft = (str(tmp_path / name) for name in ("ana", "ana.safetensors", "peft"))
    export = ("prefixes", "export", "user")
    for path, options in ((folder, ()), (file, ()), (peft, ("--format", "peft"))):
        assert "written" in run(
            tmp_path, "prefixes", "export", "user", "ana", path, *options, *model
        )
    with pytest.raises(ControlPrefixError, match="exists; overwrite it"):
        run(tmp_path, "prefixes", "export", "user", "ana", file, *model)
    assert "stored user 'ana' version 2" in run(tmp_path, "prefixes", "import", folder, *model)
    named = ("--kind", "user", "--name", "bo")
    assert "stored user 'bo' version 1" in run(tmp_path, "prefixes", "import", file, *named, *model)
    assert "stored user 'bo' version 2" in run(tmp_path, "prefixes", "import", peft, *named, *model)
    with pytest.raises(ControlPrefixError, match="give --kind and --name"):
        run(tmp_path, "prefixes", "import", file, *model)
    run(tmp_path, "prefixes", "alias", "user", "bo", "canary", "--to", "1")
    run(
        tmp_path,
        "prefixes",
        "export",
        "user",
        "bo",
        str(tmp_path / "old"),
        "--version",
        "canary",
        *model,
    )
    run(tmp_path, "prefixes", "alias", "user", "bo", "canary")
    with pytest.raises(ControlPrefixError, match="has no version canary"):
        run(tmp_path, *export, "bo", file, "--version", "canary", "-y", *model)
    with pytest.raises(ControlPrefixError, match="for good"):
        run(tmp_path, "prefixes", "remove", "user", "bo")
    assert "2 versions" in run(tmp_path, "prefixes", "remove", "user", "bo", "--yes")
    assert "bo" not in run(tmp_path, "prefixes", "list", "--kind", "user")


@pytest.mark.slow
def test_ways_to_adapt_a_model_are_compared(model_folder: Path, tmp_path: Path) -> None:
    lines = ["question,answer,style"]
    lines += [f"Greet {i},{'hey you' if i % 2 else 'Good day'},{'ab'[i % 2]}" for i in range(24)]
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    experiment = tmp_path / "experiment.toml"
    experiment.write_text(
        f'model = "{model_folder}"\nrows = "rows.csv"\nsteps = 1\nbatch_size = 2\nnum_slots = 2\n'
        'num_rates = 1\nmax_new_tokens = 2\nmethods = ["plain", "controlprefix", "PEFT LoRA r8"]\n'
        'columns = { prompt = "question", completion = "answer", attributes = { style = "style" } }'
    )
    folder = tmp_path / "report"
    command = ("compare", "--experiment", str(experiment), "--folder", str(folder))
    text = run(tmp_path, *command)
    assert all(name in text for name in ("plain", "controlprefix", "PEFT LoRA r8", "tokens/s"))
    files = {"report.html", "report.json", "report.md", "report.tex", "report.png"}
    assert files < {path.name for path in folder.iterdir()}
    report = json.loads((folder / "report.json").read_text())
    assert report["options"]["rows"]["test"] > 1
    assert run(tmp_path, *command).count("plain") == text.count("plain")  # nothing is repeated
    with pytest.raises(ControlPrefixError, match="another steps"):
        run(tmp_path, *command, "--steps", "2")


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
