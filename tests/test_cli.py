"""The command line: what it prints, and that a mistake is one line and no traceback."""

import base64
import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import run
from typer.main import get_command
from typer.testing import CliRunner

from controlprefix import (
    ControlPrefix,
    Geometry,
    Prefix,
    TrainingDataError,
    __version__,
    embeddings,
)
from controlprefix.cli import app
from controlprefix.errors import ControlPrefixError
from controlprefix.prefixes import PrefixKey
from controlprefix.store import NewVersion, PrefixStore
from controlprefix.users.enrolment import EnrolmentReport

from helpers import Histogram, Letters, commands
from models import build, byte_tokenizer


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
        ((*request[:2], "-a", "tone=warm:0.5", "--calibrated", *model), "has no dial; calibrate"),
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
    assert "ana" in run(tmp_path, "store", "audit-log")
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
        (("users", "forget", "ana", "--yes"), "there is no store to write to"),
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


@pytest.mark.slow
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
    assert "guard kept 100% of the code's distance from the mean code" in guarded
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


@pytest.mark.slow
def test_api_keys_are_made_listed_and_revoked(tmp_path: Path) -> None:
    key = run(tmp_path, "api-keys", "create", "web", "--tenant", "acme").strip()
    assert key.startswith("cp.")
    assert "web" in run(tmp_path, "api-keys", "list", "--tenant", "acme")
    assert "no API keys yet" in run(tmp_path, "api-keys", "list", "--tenant", "other")
    assert "revoked" in run(tmp_path, "api-keys", "revoke", "web", "--tenant", "acme", "--yes")
    with pytest.raises(ControlPrefixError, match="no API key 'web'"):
        run(tmp_path, "api-keys", "revoke", "web", "--tenant", "acme", "--yes")


def test_the_model_of_a_name_is_chosen_by_its_fingerprint(tmp_path: Path) -> None:
    fingerprints = ("a" * 64, "ab" * 32)
    with PrefixStore(f"sqlite:///{tmp_path}/prefixes.db") as store:
        for fingerprint in (*fingerprints, fingerprints[0]):
            geometry = Geometry.uniform(
                num_layers=1, num_kv_heads=1, head_dim=2, fingerprint=fingerprint
            )
            prefix = Prefix.random(geometry, num_slots=1, seed=0)
            store.put([NewVersion(PrefixKey("user", "ana"), prefix)])
    rollback = ("prefixes", "rollback", "user", "ana", "--to", "1")
    with pytest.raises(ControlPrefixError, match="aaaaaaaaaaaa, .*abababababab.*--fingerprint"):
        run(tmp_path, *rollback)
    with pytest.raises(ControlPrefixError, match="--fingerprint"):
        run(tmp_path, *rollback, "--fingerprint", "a")
    run(tmp_path, *rollback, "--fingerprint", "aa")
    alias = ("prefixes", "alias", "user", "ana", "canary", "--to", "2", "--fingerprint", "aa")
    run(tmp_path, *alias)
    lines = run(tmp_path, "prefixes", "show", "user", "ana").splitlines()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]
    cells = [row[1:5] for row in rows]
    assert cells == [
        ["aaaaaaaaaaaa", "1", "yes", ""],
        ["aaaaaaaaaaaa", "2", "", "canary"],
        ["abababababab", "1", "yes", ""],
    ]


def test_tables_in_a_pipe_are_not_cut(tmp_path: Path) -> None:
    geometry = Geometry.uniform(num_layers=1, num_kv_heads=1, head_dim=2, fingerprint="a" * 64)
    name = "a-user-with-a-long-name" * 5
    with PrefixStore(f"sqlite:///{tmp_path}/prefixes.db") as store:
        prefix = Prefix.random(replace(geometry, model_name="m" * 60), num_slots=1, seed=0)
        store.put([NewVersion(PrefixKey("user", name), prefix)])
    (line,) = [row for row in run(tmp_path, "prefixes", "list").splitlines() if "a-user" in row]
    assert name in line
    assert "m" * 60 in line


@pytest.mark.slow
def test_a_run_in_which_a_user_failed_ends_with_an_error(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = EnrolmentReport(users={"ana": 1}, failed={"bo": "the database is full"})
    monkeypatch.setattr(ControlPrefix, "enroll_users", lambda *_, **__: report)
    (tmp_path / "rows.jsonl").write_text('{"user": "ana", "text": "one text"}\n')
    command = ["users", "enroll", str(tmp_path / "rows.jsonl"), "--model", str(model_folder)]
    environment = {"CONTROLPREFIX_STORE": f"sqlite:///{tmp_path}/prefixes.db"}
    result = CliRunner(env=environment).invoke(app, command)
    assert result.exit_code == 1
    assert "not stored: user 'bo': the database is full" in result.output
    assert "stored 1 of 2 users" in result.output


def test_options_that_have_no_effect_are_refused_for_users(cp: ControlPrefix) -> None:
    with pytest.raises(TrainingDataError, match="as_codes is for a decoder"):
        cp.train_users({"ana": ["a text"]}, as_codes=False, progress=False)
    with pytest.raises(TrainingDataError, match="num_slots is for users without a decoder"):
        cp.train_users({"ana": ["a text"]}, decoder="users", num_slots=2, progress=False)


def test_options_of_a_cluster_need_one(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"user": "ana", "text": "one text"}\n')
    for option in (("--actors", "3"), ("--gpus-per-actor", "0.5")):
        with pytest.raises(ControlPrefixError, match="are for --ray; leave them out"):
            run(tmp_path, "users", "enroll", str(rows), *option)


def test_a_label_may_hold_a_colon() -> None:
    from controlprefix.cli.options import parse_attributes

    assert parse_attributes(["a=x:y", "a=x:y:0.5", "b=z:2", "c=w"]) == {
        "a": {"x:y": 0.5},
        "b": {"z": 2.0},
        "c": "w",
    }
    assert parse_attributes(["a=x", "a=y", "b=-0.5"]) == {"a": {"x": 1.0, "y": 1.0}, "b": "-0.5"}


@pytest.mark.slow
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


@pytest.mark.slow
def test_kept_texts_are_printed_and_trained_on(model_folder: Path, tmp_path: Path) -> None:
    model = ("--model", str(model_folder))
    # Nothing of it is an emoji, markup or a table; a wide text is one line.
    (tmp_path / "texts.txt").write_text("one text:cat:\tand :warning: [b]\n\nanother text\n")
    run(tmp_path, "enroll", "ana", str(tmp_path / "texts.txt"), "--keep-texts", *model)
    printed = run(tmp_path, "users", "texts", "ana")
    assert printed.startswith("one text:cat:\tand :warning: ")
    run(tmp_path, "enroll", "bo:cat:", str(tmp_path / "texts.txt"), *model)
    assert "bo:cat:" in run(tmp_path, "prefixes", "list")
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
    first = (tmp_path / "demo.json").read_text()
    monkeypatch.setattr("controlprefix.cli.demo.run", lambda _, __, file: file.write_text(first))
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    importlib.import_module("demo").main(["--results", str(tmp_path / "results")])
    recorded = json.loads((tmp_path / "results" / "demo.json").read_text())
    assert {"command", "commit", "date", "machine"} < recorded.keys()
    figures = json.loads((tmp_path / "demo.json").read_text())["nats_per_token"]
    assert recorded["nats_per_token"].keys() == figures.keys()
    assert figures["labels"].keys() == {"formality", "tone"}
    assert figures["users"].keys() == {"ana", "bo", "cleo"}


@pytest.mark.slow
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


@pytest.mark.slow
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
    with pytest.raises(
        ControlPrefixError, match="kept texts, feedback, jobs and profile.*for good"
    ):
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
