"""Prefixes that know which prompts they are for."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import controlprefix.engine.prefixes as prefixes_module
from controlprefix import (
    ControlPrefix,
    ControlPrefixError,
    Example,
    ForgottenError,
    Prefix,
    PrefixFormatError,
    Request,
    RequestError,
    TrainingDataError,
)
from controlprefix.cli import app
from controlprefix.cli.groups import EngineArguments
from controlprefix.data.general import general_prompts
from controlprefix.evaluation import evaluate_users
from controlprefix.evaluation.revealed_groups import revealed_groups
from controlprefix.evaluation.text_cache import TextCache
from controlprefix.inference import relevance as relevance_module
from controlprefix.prefixes import PrefixDecoder, PrefixKey, Relevance
from controlprefix.store import NewVersion, PrefixStore
from controlprefix.training.initialization import scale_of

from helpers import coded, engine, frozen
from models import build
from servers import MODEL, TOKENIZER, Served

NAMES = ("Ada", "Bo", "Cy", "Dee", "Eli", "Fay", "Gus", "Hal", "Ida", "Jo")
BOATS = [f"Write about the boat {name}." for name in NAMES]


def axis(text: str) -> int:
    """A direction per subject: texts about boats are alike, all others are not."""
    return 0 if "boat" in text else 1 + sum(map(ord, text)) % 40


def embed_subjects(texts: Sequence[str], embedder: str = "") -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor([axis(t) for t in texts]), 64).float()


@pytest.fixture(autouse=True)
def subjects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relevance_module, "embed", embed_subjects)


@pytest.fixture
def cp() -> ControlPrefix:
    cp = engine()
    for number, name in enumerate(("boats", "other")):
        cp.put("task", name, Prefix.random(cp.geometry, num_slots=3, scale=2.0, seed=number))
    learned = cp.learn_relevance("task", "boats", BOATS)
    assert learned.version == 2
    assert learned.accepted == 1.0
    return cp


def test_a_prefix_is_absent_from_prompts_it_is_not_for(cp: ControlPrefix) -> None:
    boat, moon = "Tell me of your boat.", "Tell me of the moon."
    texts = cp.generate(
        [
            Request(prompt=prompt, task="boats", when=when, max_new_tokens=12)
            for prompt in (boat, moon)
            for when in ("relevant", "always")
        ]
    )
    plain = cp.generate(Request(prompt=moon, max_new_tokens=12))
    assert texts[0].text == texts[1].text
    assert texts[2].text == plain.text != texts[3].text
    assert [c.parts[0].strength for c in texts] == [1.0, 1.0, 0.0, 1.0]
    assert texts[0].parts[0].relevance == 1.0
    assert texts[1].parts[0].relevance is None


def test_the_last_message_and_token_ids_are_prompts_too(cp: ControlPrefix) -> None:
    ids = tuple(cp.tokenizer("a boat", add_special_tokens=False)["input_ids"])
    (by_ids,) = cp.resolve(Request(prompt_ids=ids, task="boats", when="relevant")).parts
    assert by_ids.used.strength == 1.0


def test_a_request_needs_a_prefix_that_has_learned_it(cp: ControlPrefix) -> None:
    with pytest.raises(RequestError, match=r"no prefix of the request \(task 'other'\)"):
        cp.generate(Request(prompt="boat", task="other", when="relevant"))
    cp.put("user", "ana", Prefix.random(cp.geometry, num_slots=2, scale=2.0, seed=5))
    parts = cp.resolve(Request(prompt="moon", task="boats", user="ana", when="relevant")).parts
    strengths = {part.used.kind: part.used.strength for part in parts}
    assert strengths == {"task": 0.0, "user": 1.0}  # hers has learned nothing


def test_a_user_code_has_no_room_for_it(cp: ControlPrefix) -> None:
    start = Prefix.random(cp.geometry, num_slots=3, seed=7)
    decoder = PrefixDecoder(start, scale_of(start), width=8, hidden_size=16).rounded()
    cp.store.put([NewVersion(PrefixKey("decoder", "users"), decoder)])
    cp.store.put([NewVersion(PrefixKey("user", "bo"), coded(decoder))])
    with pytest.raises(RequestError, match="user 'bo' is a code"):
        cp.learn_relevance("user", "bo", BOATS)


def test_a_user_who_is_forgotten_meanwhile_does_not_come_back(
    cp: ControlPrefix, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = Prefix.random(cp.geometry, num_slots=2, seed=5)
    cp.put("user", "ana", prefix)
    learn = relevance_module.learn_relevance

    def forget_and_learn(*arguments: Any) -> Any:
        cp.forget_user("ana")
        cp.put("user", "ana", Prefix.random(cp.geometry, num_slots=2, seed=6))
        return learn(*arguments)

    monkeypatch.setattr(prefixes_module, "learn_relevance", forget_and_learn)
    with pytest.raises(ForgottenError, match="'ana' was forgotten"):
        cp.learn_relevance("user", "ana", BOATS)
    assert cp.version_info("user", "ana").version == 1
    assert cp.get("user", "ana").digest != prefix.digest


def test_training_refuses_it(cp: ControlPrefix) -> None:
    row = {"prompt": "boat", "completion": "x", "task": "boats", "when": "relevant"}
    with pytest.raises(TrainingDataError, match="when='relevant'"):
        cp.train([row])


def test_few_prompts_are_refused_and_nothing_is_stored(cp: ControlPrefix) -> None:
    with pytest.raises(TrainingDataError, match="7 different prompts are too few"):
        cp.learn_relevance("task", "other", [*BOATS[:7], *BOATS[:7]])
    assert len(cp.versions("task", "other")) == 1


def test_it_is_stored_with_the_prefix_and_changes_no_slot(
    cp: ControlPrefix, tmp_path: Path
) -> None:
    first, second = (cp.get("task", "boats", version=v) for v in (1, 2))
    assert first.digest == second.digest
    assert first.relevance is None
    assert second.relevance is not None
    second.save(tmp_path / "boats.safetensors")
    loaded = Prefix.load(tmp_path / "boats.safetensors").relevance
    assert loaded is not None
    assert loaded.min_lead == second.relevance.min_lead
    assert loaded.min_similarity == second.relevance.min_similarity
    assert torch.equal(loaded.own, second.relevance.own)
    assert torch.equal(loaded.others, second.relevance.others)


def test_a_damaged_relevance_is_a_typed_error(cp: ControlPrefix) -> None:
    prefix = cp.get("task", "boats")
    assert prefix.relevance is not None
    fields = prefix.relevance.to_dict()
    for changes in (
        {"own": "!"},
        {"own": ""},
        {"others": None},
        {"embedding_size": 7},
        {"embedding_size": 10**9},
        {"min_lead": "nan"},
        {"min_similarity": None},
    ):
        with pytest.raises(PrefixFormatError, match="cannot be read|are impossible"):
            Relevance.from_dict({**fields, **changes}, "it")
    broken = replace(prefix.relevance, own=torch.full((2, 4), float("inf")))
    with pytest.raises(PrefixFormatError):
        Relevance.from_dict(broken.to_dict(), "it")


def test_at_most_a_twentieth_of_the_neutral_prompts_is_accepted() -> None:
    generator = torch.Generator().manual_seed(0)
    directions: dict[str, Tensor] = {}

    def embed_at_random(texts: Sequence[str], embedder: str = "") -> Tensor:
        for text in texts:
            row = torch.randn(8, generator=generator)
            directions.setdefault(text, row / row.norm())
        return torch.stack([directions[text] for text in texts])

    patched = pytest.MonkeyPatch()
    patched.setattr(relevance_module, "embed", embed_at_random)
    others = [f"neutral {i}" for i in range(500)]
    relevance, _ = relevance_module.learn_relevance([f"own {i}" for i in range(60)], others)
    neutral = [*general_prompts(measuring=False), *others]
    patched.undo()
    leads = [relevance.lead(directions[text]) >= relevance.min_lead for text in neutral]
    assert 0 < sum(leads) / len(leads) < 0.1


def test_general_prompts_differ_between_training_and_measuring() -> None:
    training, measuring = (general_prompts(measuring=m) for m in (False, True))
    assert len(set(training) | set(measuring)) == len(training) + len(measuring) == 64


@pytest.mark.slow
def test_each_prompt_of_one_call_to_a_server_decides_for_itself(served: Served) -> None:
    with PrefixStore(served.url, tenant="mine") as store:
        cp = ControlPrefix(frozen(MODEL, TOKENIZER), store)
        cp.learn_relevance("task", "email", BOATS)
        prompts = ["a boat", "the moon", "a boat"]
        body: dict[str, Any] = {
            "model": "tiny/email",
            "prompt": prompts,
            "when": "relevant",
            "max_tokens": 8,
        }
        answer = httpx.post(f"{served.base}/v1/completions", json=body, timeout=60).json()
        texts = [choice["text"] for choice in answer["choices"]]
        for text, prompt, task in zip(texts, prompts, ("email", None, "email"), strict=True):
            request = Request(prompt=prompt, raw=True, task=task, max_new_tokens=8)
            assert text == cp.generate(request).text
    assert texts[0] == texts[2] != texts[1]
    strengths = [[part["strength"] for part in choice["parts"]] for choice in answer["choices"]]
    assert strengths == [[1.0], [0.0], [1.0]]
    assert [part["strength"] for part in answer["parts"]] == [1.0, 0.0]
    same = httpx.post(
        f"{served.base}/v1/completions", json={**body, "prompt": ["a boat"] * 2}, timeout=60
    ).json()
    assert [part["strength"] for part in same["parts"]] == [1.0]
    assert not any("parts" in choice for choice in same["choices"])


@pytest.mark.slow
def test_texts_of_an_evaluation_are_those_of_the_gate_as_it_is(
    cp: ControlPrefix, tmp_path: Path
) -> None:
    def text_of(prompt: str) -> str:
        row = Example(prompt=prompt, raw=True, completion="x", task="boats", when="relevant")
        cache = TextCache(cp, tmp_path, max_new_tokens=6, temperature=None, seed=0)
        cache.generate([row], progress=False)
        return cache.texts([row])[0]

    text_of("the moon")  # is kept
    attached = text_of("the boat")
    moons = [f"Write about the moon {name}." for name in NAMES]
    cp.put("task", "boats", replace(cp.get("task", "boats"), relevance=None))
    relevance = cp.get("task", "boats", version=2).relevance
    assert relevance is not None
    swapped = replace(relevance, own=embed_subjects(moons))
    cp.put("task", "boats", replace(cp.get("task", "boats"), relevance=swapped))
    assert text_of("the boat") != attached  # it is left out now
    row = Example(prompt="the moon", raw=True, completion="x", task="boats", when="relevant")
    fresh = TextCache(cp, None, max_new_tokens=6, temperature=None, seed=0)
    fresh.generate([row], progress=False)
    assert text_of("the moon") == fresh.texts([row])[0]


def test_a_gate_that_accepts_nothing_is_told_and_strangers_are_refused(
    cp: ControlPrefix, caplog: pytest.LogCaptureFixture
) -> None:
    assert cp.learn_relevance("task", "other", BOATS, others=BOATS * 20).accepted == 0
    assert "none of 2 held-out prompts would be accepted" in caplog.text
    relevance = cp.get("task", "boats").relevance
    assert relevance is not None
    for change, match in (
        ({"embedder": "stranger/model"}, "if you trust it, set CONTROLPREFIX_EMBEDDERS"),
        ({"own": torch.eye(12), "others": torch.eye(12)}, "learn its relevance again"),
    ):
        changed = replace(relevance, **change)
        cp.put("task", "other", replace(cp.get("task", "boats"), relevance=changed))
        with pytest.raises(ControlPrefixError, match=match):
            cp.generate(Request(prompt="a boat", task="other", when="relevant"))


def test_users_with_a_gate_of_their_own_can_be_evaluated(cp: ControlPrefix) -> None:
    relevance = cp.get("task", "boats").relevance
    for seed, user in enumerate(("ana", "bo")):
        own = Prefix.random(cp.geometry, num_slots=2, seed=seed)
        cp.put("user", user, replace(own, relevance=relevance) if user == "ana" else own)
    rows = [
        Example(prompt="a boat", completion=f"text {i}", user=user, when=when)
        for i in range(2)
        for user, when in (("ana", "relevant"), ("bo", "always"))
    ]
    assert evaluate_users(cp, rows).users.keys() == {"ana", "bo"}


def test_the_command_learns_from_conversations_too(
    cp: ControlPrefix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned: list[Sequence[str]] = []

    def record(self: Any, kind: str, name: str, prompts: Sequence[str], **_: Any) -> Any:
        learned.append(prompts)
        return SimpleNamespace(version=2, accepted=1.0)

    monkeypatch.setattr(ControlPrefix, "learn_relevance", record)
    monkeypatch.setattr(EngineArguments, "open", lambda self, **_: cp)
    rows = [{"messages": [{"role": "user", "content": boat}]} for boat in BOATS]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in [*rows, {"prompt": "Hi"}]))
    result = CliRunner().invoke(app, ["prefixes", "relevance", "task", "boats", str(file)])
    assert result.exit_code == 0, result.output
    assert learned == [[*BOATS, "Hi"]]


def test_models_in_float64_learn_it_too() -> None:
    cp = ControlPrefix.from_pretrained(
        build("llama").double(), tokenizer=TOKENIZER, store="sqlite://"
    )
    cp.put("task", "boats", cp.prefix_from_text("boats"))
    assert cp.version_info("task", "boats").dtype == "float64"
    assert cp.version_info("task", "boats").storage_dtype is None
    learned = cp.learn_relevance("task", "boats", BOATS)
    assert cp.version_info("task", "boats", version=learned.version).dtype == "float64"


def test_what_no_file_can_hold_is_refused_before_it_is_written(cp: ControlPrefix) -> None:
    prefix = cp.get("task", "boats")
    assert prefix.relevance is not None
    many = prefix.relevance.own[:1].repeat(4000, 400 // prefix.relevance.own.shape[1] + 1)
    others = prefix.relevance.others[:1].repeat(1, 400 // prefix.relevance.own.shape[1] + 1)
    long = replace(prefix, relevance=replace(prefix.relevance, own=many, others=others))
    with pytest.raises(PrefixFormatError, match="more beside its tensors"):
        long.to_bytes()


@pytest.mark.slow
def test_texts_without_users_are_written_where_only_their_prefixes_are_gated(
    cp: ControlPrefix,
) -> None:
    names = [f"u{i}" for i in range(4)]
    for name in names:
        cp.put("user", name, Prefix.random(cp.geometry, num_slots=2, scale=2.0, seed=5))
        cp.learn_relevance("user", name, BOATS)
    rows = {
        name: [Example(prompt="a boat", completion=f"x {name}", user=name, when="relevant")]
        for name in names
    }
    groups = {"club": {name: "xy"[i % 2] for i, name in enumerate(names)}}
    revealed = revealed_groups(cp, rows, groups, num_texts=1, min_group_size=1, seed=0)
    assert revealed["club"].num_users == 4


def test_a_checkpoint_has_no_gate(cp: ControlPrefix, tmp_path: Path) -> None:
    request = Request(prompt="-", task="boats", when="relevant")
    with pytest.raises(RequestError, match="which a checkpoint does not see"):
        cp.save_peft(request, tmp_path)
