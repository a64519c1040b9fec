"""Every benchmark runs for one round on a tiny model and writes its results."""

import argparse
import gzip
import importlib
import json
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from controlprefix import embeddings

from helpers import Histogram

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
WORDS = {"a": ["kindly", "regards", "sincerely"], "b": ["lol", "hey", "gonna"]}
LABELS = {
    "formality_pavlick": {"formality": ("formal", "informal")},
    "formality_squinky": {"formality": ("formal", "informal")},
    "sentiment_yelp": {"sentiment": ("negative", "positive")},
    "politeness_stanford": {"politeness": ("impolite", "polite")},
    "aspects_sentiment_topic_toxicity": {
        "sentiment": ("negative", "positive"),
        "topic": ("business", "sports"),
        "toxicity": ("nontoxic", "toxic"),
    },
}
# Script -> its arguments; DATA stands for the folder of `data`.
RUNS = {
    "decoding": "--rows 1 2 --num-slots 2 --tokens 2 --rounds 1",
    "peers": "--users 2 --prompt-users 2 --texts 30 --tokens 2 --rounds 1",
    "gpu": "--device cpu --models tiny --large tiny --rows 1 2 --num-slots 2 --tokens 2 --rounds 1 "
    "--pytest=--co",
    "training_speed": "--examples 4 --batch-size 2 --num-slots 2 --rounds 1",
    "sampling": "--rows 2 --tokens 3 --rounds 1",
    "assembly": "--rows 2 --num-slots 2 --rounds 1",
    "loading": "--rounds 1",
    "long_prompts": "--tokens 300 --rounds 1",
    "compatibility": "--families llama mamba bart",
    "storage_dtypes": "--steps 8",
    "store": "--small 40 --large 40 --times 2",
    "users_at_scale": "--users 40 400 --times 3",
    "tenants": "--seconds 0.5 --rest 0 --prompt-words 200",
    "ray_users": "--users 2 --texts 2 --steps 1 --rounds 1",
    "capacity": "--users 3 --seconds 1 --concurrency 2 --new-tokens 2 --shares 1",
    "soak": "--seconds 8 --fault-seconds 1",
    "num_slots": "DATA --num-slots 2 3 --steps 6 --rows 8 --learning-rate 0.001",
    "comparison": "DATA --methods plain controlprefix --steps 1 --rates 1 --rows 4 --new-tokens 2 "
    "--num-slots 2 --training-rows 32",
    "gallery": "DATA --steps 1 --num-slots 2 --training-rows 16 --rows 2 --new-tokens 2",
    "relevance": "DATA --prompts 16",
    "attributes": "DATA --studies styles --steps 6 --reward-steps 1 --num-slots 2 --texts 2 "
    "--pool 2 --keep 1 --self-steps 1 "
    "--new-tokens 2",
    "strengths": "DATA --steps 6 --user-steps 1 --num-slots 2 --texts 24 --curve-texts 4 "
    "--new-tokens 2",
    "unseen_labels": "DATA --topics business --steps 3 --rows 4 --distill-steps 1 --num-slots 2 "
    "--texts 2 --new-tokens 2",
    "nested": "DATA --steps 2 --num-slots 2 4 --rows 3 --num-experts 2",
    "guard": "DATA --users 4 --posts 2 --epochs 1 --rows 2 --authors 2 --count 2",
    "digits": "--reader-steps 1 --steps 2 --num-slots 2 --images 2",
    "simplification": "DATA --steps 2 --num-slots 2 --rows 4 --new-tokens 8",
    "summaries": "DATA --steps 2 --num-slots 2 --rows 2 --new-tokens 4",
    "varieties": "DATA --steps 2 --num-slots 2 --rows 2 --texts 2 --new-tokens 2",
    "preferences": "DATA --counts 2 --held-out 2 --num-slots 2 --steps 1",
    "matching": "DATA --posts 2 --rows 2 --authors 2 --num-slots 2",
    "migration": "DATA --users 8 --posts 2 --epochs 1 --rows 2 --authors 2 --steps 1",
    "authors": "DATA --users 4 --posts 2 --epochs 1 --rows 2 --authors 2 --texts 2 --counts 2",
    "user_and_task": "DATA --users 4 --measured 3 --steps 1 --epochs 1 --num-slots 2 "
    "--new-tokens 4",
    "user_training_speed": "DATA --users 4 --posts 2 --epochs 1 --rows 2 --authors 2 --texts 2 "
    "--rounds 1",
    "privacy": "DATA --users 4 --posts 2 --epochs 1 --rows 2 --authors 2 --texts 4 "
    "--num-canaries 1 --ways enrolled 'matched, 64 slots' preferences",
}
WITHOUT_MODEL = (
    "compatibility",
    "gpu",
    "loading",
    "relevance",
    "store",
    "users_at_scale",
)  # these have no `--model`
SKIPPED = {
    "demo": "tested in test_cli.py, with a tiny model in the place of SmolLM2",
    "adapters_batch_split": "needs an environment with an older transformers",
    "repeat": "tested below",
    "serving": "tested with real servers, below",
    "tables": "tested in test_docs.py",
    "vllm_strengths": "tested in test_vllm.py, with a vLLM server",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like that of the public data sets, with a few invented rows per file."""
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(0)

    def write(name: str, split: str, rows: list[dict[str, object]]) -> None:
        with gzip.open(folder / f"{name}.{split}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    def text(label: int, count: int = 5) -> str:
        return " ".join(rng.choices(list(WORDS.values())[label], k=count))

    for split, size in (("train", 64), ("dev", 16), ("test", 8)):
        for name, attributes in LABELS.items():
            rows: list[dict[str, object]] = [
                {"text": text(i % 2), "attrs": {attribute: labels[i % 2]}}
                for attribute, labels in attributes.items()
                for i in range(size)
            ]
            write(name, split, rows)
        simpler: list[dict[str, object]] = [
            {"source": text(0, 12), "asset_refs": [text(1, 2 + (i + j) % 10) for j in range(4)]}
            for i in range(size)
        ]
        write("simplification_asset", split, simpler)
        papers: list[dict[str, object]] = [
            {"source": f"{i} {text(0, 12)}", "targets": [text(0, 3 + i % 5)]} for i in range(size)
        ]
        sentences: list[dict[str, object]] = [
            {"variety": name, "text": text(i % 2), "english": text(0) if i % 2 else None}
            for name in ("naija", "welsh", "gaelic")
            for i in range(size)
        ]
        write("varieties", split, sentences)
        plays: list[dict[str, object]] = [
            {"modern": text(0), "original": text(1)} for _ in range(size)
        ]
        write("style_shakespeare", split, plays)
        write("summarization_scitldr", split, papers)
        write("email_aeslc", split, [{"body": text(0)}])
        facts: list[dict[str, object]] = [
            {"mr": f"name[{i}]", "refs": [text(0), text(1)]} for i in range(size)
        ]
        write("e2e", split, facts)
        triples: list[dict[str, object]] = [
            {
                "triples": [[f"x_{i}", "is", "y"]],
                "refs": [text(i % 2)],
                "category": "ABCD"[i % (4 if split == "test" else 2)],
                "seen_category": split != "test" or i % 4 < 2,
                "size": 1,
            }
            for i in range(size)
        ]
        write("webnlg", split, triples)
        posts: list[dict[str, object]] = [
            {"author": f"author{a}", "text": text(a % 2, 12)}
            for a in range(14)
            for _ in range(24 if split == "train" else 4)
        ]
        write("authors_blogs", split, posts)
        tweets: list[dict[str, object]] = [
            {
                "author": f"{split}{a}",
                "profile": [text(a % 2) for _ in range(12)],
                "tasks": [{"input": text(0), "output": text(a % 2)}],
            }
            for a in range(4)
        ]
        write("authors_tweets", split, tweets)
    return folder


def test_every_benchmark_is_tested() -> None:
    scripts = {path.stem for path in BENCHMARKS.glob("*.py")}
    assert scripts == RUNS.keys() | SKIPPED.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_benchmark_runs_for_one_round(
    name: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(embeddings, "load_embedder", lambda embedder: Histogram())
    monkeypatch.chdir(tmp_path)
    arguments = shlex.split(RUNS[name].replace("DATA", str(data)))
    if name not in WITHOUT_MODEL:
        arguments += ["--model", "tiny"]
    results = tmp_path / "results"
    importlib.import_module(name).main([*arguments, "--results", str(results)])
    files = list(results.glob("*.json"))
    assert files
    for file in files:
        recorded = json.loads(file.read_text())
        assert {"command", "commit", "date", "machine"} < recorded.keys()
    if page := next(results.glob("*.md"), None):
        assert page.read_text().startswith("# ")
        assert not re.search(r"\bnan\b", page.read_text())


@pytest.mark.slow
def test_the_benchmark_of_servers_runs_for_one_round(tmp_path: Path) -> None:
    arguments = ("--users", "3", "--seconds", "1", "--rounds", "1", "--concurrency", "2")
    command = [sys.executable, str(BENCHMARKS / "serving.py"), *arguments, "--new-tokens", "2"]
    subprocess.run([*command, "--results", str(tmp_path)], check=True, capture_output=True)
    recorded = json.loads((tmp_path / "serving-transformers.json").read_text())
    assert all(figures["failed"] == 0 for figures in recorded["contenders"].values())
    assert len(recorded["contenders"]) == 3


def test_recorded_results_are_repeated_by_the_commands_in_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    repeat = importlib.import_module("repeat")
    run = "python benchmarks/relevance.py ../shared/data --prompts 16 --results old"
    commands = {"a": run, "b": run, "c": "python benchmarks/gone.py", "d": None, "gpu": run}
    for name, command in commands.items():
        machine = {"gpu": "H200" if name == "gpu" else None}
        recorded = {"command": command, "machine": machine}
        (tmp_path / f"{name}.json").write_text(json.dumps(recorded))
    calls = []

    def record(command: list[str]) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        return subprocess.CompletedProcess(command, returncode=1)

    monkeypatch.setattr(subprocess, "run", record)
    folders = ["--recorded", str(tmp_path), "--results", str(tmp_path / "new")]
    with pytest.raises(SystemExit, match="these failed: a"):
        repeat.main([str(tmp_path), *folders])
    script = str(BENCHMARKS / "relevance.py")
    options = [str(tmp_path), "--prompts", "16", "--results", str(tmp_path / "new")]
    assert calls == [[sys.executable, script, *options]]
    printed = capsys.readouterr().out
    assert printed.count("its command is not of this checkout") == 2
    assert "gpu: measured on a GPU" in printed
    with pytest.raises(SystemExit):
        repeat.main([str(tmp_path), *folders, "--names", "e"])
    assert "no result e; there are: a, b, c, d, gpu" in capsys.readouterr().err


def test_results_of_another_model_or_other_settings_are_not_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    results = importlib.import_module("lib.results")

    def opened(model: str, steps: int, *, fresh: bool = False) -> Any:
        options = argparse.Namespace(results=tmp_path, steps=steps, fresh=fresh)
        monkeypatch.setattr(results, "describe", lambda _: model)
        return results.ResultFile(
            "x", options, settings=("steps",), model=None, page=lambda _: "# x"
        )

    opened("float32", 3).set("a", "b", value=1)
    assert opened("float32", 3).get("a", "b") == 1
    with pytest.raises(SystemExit, match="measured with float32, this run has bfloat16"):
        opened("bfloat16", 3)
    with pytest.raises(SystemExit, match="'steps': 3.*'steps': 4.*give --fresh"):
        opened("float32", 4)
    assert opened("bfloat16", 4, fresh=True).get("a", "b") is None
