"""Learning moves the prefixes it was asked to, makes their text likelier, and nothing else."""

import math
import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from controlprefix import (
    ControlPrefixError,
    Example,
    Prefix,
    StoreError,
    TrainingDataError,
)
from controlprefix.model import prefix_from_tokens
from controlprefix.model.attention import LAYER_ATTRIBUTE
from controlprefix.model.log_probs import token_log_probs
from controlprefix.model.probing import probe
from controlprefix.model.slot_attention import QueryText, most_attended, observe
from controlprefix.prefixes import Kind, PrefixKey
from controlprefix.training import TrainingSettings
from controlprefix.training.held_out import split_examples
from controlprefix.training.loop import TrainingLoop
from controlprefix.training.parameterization import parameterize
from controlprefix.training.preparation import prepare
from controlprefix.training.run import TrainingRun

from helpers import QUICK, engine, nats_per_token
from models import ALL

LABELS = {"formal": "Good day.", "informal": "hey you"}


def greetings(num_each: int = 8) -> list[Example]:
    return [
        Example(
            prompt=f"Greet {i}",
            task="greet",
            attributes={"formality": label},
            user="ana" if i % 2 else "bo",
            completion=text,
        )
        for i in range(num_each)
        for label, text in LABELS.items()
    ]


def relabelled(examples: list[Example]) -> list[Example]:
    other = {"formal": "informal", "informal": "formal"}
    return [
        e.model_copy(update={"attributes": {"formality": other[str(e.attributes["formality"])]}})
        for e in examples
    ]


SETTINGS = {**QUICK, "steps": 40, "batch_size": 8, "learning_rate": 0.2}


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_joint_training_learns_each_label_and_leaves_the_model_alone(name: str) -> None:
    cp = engine(name)
    before = {n: p.clone() for n, p in cp.model.state_dict().items()}
    examples = greetings()
    report = cp.train(examples, learn=("task", "attributes"), **SETTINGS)
    assert all(torch.equal(p, before[n]) for n, p in cp.model.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in cp.model.parameters())
    assert report.saved == {
        "task 'greet'": 1,
        "attribute 'formality=formal'": 1,
        "attribute 'formality=informal'": 1,
    }
    without_user = [e.model_copy(update={"user": None}) for e in examples]
    bare = [e.model_copy(update={"attributes": {}, "task": None}) for e in without_user]
    right, invalid = nats_per_token(cp, without_user), nats_per_token(cp, relabelled(without_user))
    assert right < nats_per_token(cp, bare) - 0.2
    assert right < invalid - 0.2
    for key in report.saved:
        kind, quoted = key.split(" ", 1)
        saved = cp.get(kind, quoted.strip("'"))  # type: ignore[arg-type]
        assert saved.num_slots == 4
        assert {site: len(rows) for site, rows in saved.slots.items()} == dict.fromkeys(
            cp.geometry.sites, 4
        )


@pytest.mark.slow
def test_learning_users_changes_no_other_prefix(tmp_path: Path) -> None:
    cp = engine(store=f"sqlite:///{tmp_path}/prefixes.db")
    examples = greetings()
    cp.train(examples, learn=("task", "attributes"), **SETTINGS)
    kinds: tuple[Kind, ...] = ("task", "attribute")
    saved = {
        (kind, name): cp.get(kind, name).to_bytes() for kind in kinds for name in cp.names(kind)
    }
    voices = {"ana": "hello from ana", "bo": "BO SAYS HI"}
    texts = [
        e.model_copy(update={"completion": voices[str(e.user)], "attributes": {}}) for e in examples
    ]
    report = cp.train(texts, learn=("user",), **SETTINGS)
    assert report.saved == {"user 'bo'": 1, "user 'ana'": 1}
    for (kind, name), data in saved.items():
        assert cp.get(kind, name).to_bytes() == data
        assert len(cp.versions(kind, name)) == 1
    for user, other in (("ana", "bo"), ("bo", "ana")):
        custom = [e for e in texts if e.user == user]
        swapped = [e.model_copy(update={"user": other}) for e in custom]
        nobody = [e.model_copy(update={"user": None}) for e in custom]
        assert (
            nats_per_token(cp, custom)
            < min(nats_per_token(cp, swapped), nats_per_token(cp, nobody)) - 0.2
        )


@pytest.mark.slow
def test_a_users_prefix_moves_only_with_rows_of_that_user() -> None:
    """With one row a step, a step on ana's row must leave bo's slots where they are."""
    cp = engine()
    rows = [Example(prompt="Hi", user=user, completion=f"hello {user}") for user in ("ana", "bo")]
    settings = TrainingSettings.from_options(
        {"batch_size": 1, "steps": 40, "validation": 0, "parameterization": "direct"}
    )
    prepared = prepare(
        rows * 4, cp.frozen_model, cp._resolver, settings, learn="user", num_slots=2, init="text"
    )
    slots = parameterize(settings, prepared.initial, prepared.scale)
    run = TrainingRun(prepared.rows, (), slots, settings, cp.model.device)
    loop = TrainingLoop(cp.frozen_model, settings, Accelerator())
    all_moved = set()
    for _ in range(20):
        before = {key: p.slots["decoder"].clone() for key, p in slots.materialize().items()}
        assert not loop.step([run])
        after = slots.materialize()
        moved = {key for key in before if not torch.equal(before[key], after[key].slots["decoder"])}
        assert len(moved) == 1
        all_moved |= moved
    assert all_moved == {PrefixKey("user", "ana"), PrefixKey("user", "bo")}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "bart", "t5"])
def test_gradient_checkpointing_learns_the_same(name: str) -> None:
    """Also where the model has dropout, which must stay off."""
    dropout: dict[str, Any] = {
        "gpt2": {"resid_pdrop": 0.3},
        "bart": {"dropout": 0.3, "encoder_layerdrop": 0.3},
    }
    reports, prefixes, states = [], [], []
    for checkpointing in (False, True):
        cp = engine(name, **dropout.get(name, {}))
        settings = {**SETTINGS, "steps": 4, "gradient_checkpointing": checkpointing}
        reports.append(cp.train(greetings(), **settings))
        prefixes.append(cp.get("task", "greet").slots)
        modules = list(cp.model.modules())
        states.append(
            [
                {k: v for k, v in vars(m).items() if k == "training" or "drop" in k or k == "p"}
                for m in modules
            ]
        )
        assert not any(getattr(m, "gradient_checkpointing", False) for m in modules)
    assert reports[0].losses == pytest.approx(reports[1].losses, abs=1e-5)
    for site in prefixes[0]:
        assert torch.allclose(prefixes[0][site], prefixes[1][site], atol=1e-3)
    assert states[0] == states[1]


@pytest.mark.slow
def test_the_same_seed_learns_the_same_prefixes() -> None:
    runs = [engine() for _ in range(3)]
    for cp, seed in zip(runs, (1, 1, 2), strict=True):
        cp.train(greetings(), **{**SETTINGS, "steps": 5, "seed": seed})
    first, again, other = (cp.get("task", "greet").to_bytes() for cp in runs)
    assert first == again
    assert first != other


@pytest.mark.slow
def test_the_best_step_is_kept() -> None:
    """Completions without a pattern: learning them by heart helps at first, then ruins others."""
    cp = engine()
    draw = random.Random(0)
    examples = [
        Example(prompt=f"{i}", task="noise", completion="".join(draw.choices("abcdefgh", k=9)))
        for i in range(12)
    ]
    settings = {**SETTINGS, "num_slots": 32, "learning_rate": 10.0, "validation": 0.25}
    settings["num_evaluations"] = 20
    report = cp.train(examples, learn="task", init="random", **settings)
    looks = dict(report.validation)
    assert report.best_loss == min(looks.values()) == looks[report.best_step]
    assert 0 < report.best_step < max(looks) == 40
    # What is stored has the loss of that step, on the rows that were held out.
    learned = [[PrefixKey("task", "noise")]] * 12
    split = split_examples(examples, learned, 0.25, SETTINGS["seed"])
    held_out = [examples[i] for i in split.held_out]
    with torch.no_grad(), cp.assembled(held_out):
        log_probs, live = token_log_probs(
            cp.frozen_model,
            [cp.tokenizer(item.prompt)["input_ids"] for item in held_out],
            [[*cp.tokenizer(item.completion)["input_ids"], 1] for item in held_out],
        )
    assert -float(log_probs.sum() / live.sum()) == pytest.approx(report.best_loss, rel=1e-5)


def test_a_random_start_and_a_stored_start_are_what_they_say() -> None:
    cp = engine()
    cp.train(greetings(), init="random", **{**SETTINGS, "steps": 1, "learning_rate": 1e-9})
    random_start = cp.get("task", "greet")
    expected = Prefix.random(cp.geometry, num_slots=4, seed=1)
    assert torch.allclose(random_start.slots["decoder"], expected.slots["decoder"], atol=1e-6)
    cp.train(greetings(), init="stored", **{**SETTINGS, "steps": 1, "learning_rate": 1e-9})
    again = cp.get("task", "greet")
    assert torch.allclose(again.slots["decoder"], random_start.slots["decoder"], atol=1e-6)
    assert len(cp.versions("task", "greet")) == 2


@pytest.mark.slow
def test_text_starts_hold_the_keys_and_values_of_the_training_text() -> None:
    cp = engine()
    barely = {**SETTINGS, "steps": 1, "learning_rate": 1e-9, "validation": 0}
    for texts in (["hey!"], ["hey, bud"], ["hey, bud", "cu soon"], ["hey, bud, all good?"] * 12):
        rows = [Example(prompt="Hi", user="ana", completion=text) for text in texts]
        report = cp.train(rows, learn=("user",), **barely)
        assert report.best_step == 1
        random.Random(1).shuffle(texts)  # as the seed has it
        looking = texts[-8:] if len(texts) > 1 else []
        expected = cp.prefix_from_text("\n".join(texts))
        if not looking:
            ids = cp.frozen_model.request_tokenizer.text_ids(texts[0])
            expected = prefix_from_tokens(cp.frozen_model, ids, num_slots=4)
        if looking:  # in each head what rows attend to most
            encoded = [
                cp.frozen_model.request_tokenizer.example_ids(Example(prompt="Hi", completion=text))
                for text in looking
            ]
            query_texts = [QueryText(item.prompt, (*item.completion, 1)) for item in encoded]
            expected = most_attended(expected, observe(cp.frozen_model, expected, query_texts), 4)
        stored = cp.get("user", "ana")
        assert stored.num_slots == 4
        assert torch.allclose(stored.slots["decoder"], expected.slots["decoder"], atol=1e-6)


def test_held_out_rows_have_no_part_in_the_start() -> None:
    cp = engine()
    settings = TrainingSettings(validation=0.25, seed=1)
    learned = [[PrefixKey("task", "greet")]] * 16
    _, held_out = split_examples(greetings(), learned, settings.validation, settings.seed)
    assert len(held_out) == 4
    for init in ("text", "tokens"):
        starts = []
        for other in ("Good day.", "completely different"):
            rows = [
                item.model_copy(update={"completion": other}) if i in held_out else item
                for i, item in enumerate(greetings())
            ]
            prepared = prepare(
                rows,
                cp.frozen_model,
                cp._resolver,
                settings,
                learn="task",
                num_slots=4,
                init=init,
            )
            (start,) = prepared.initial.values()
            starts.append((start.digest, prepared.scale["decoder"].tolist()))
        assert starts[0] == starts[1]


@pytest.mark.slow
def test_training_ends_each_completion_with_the_end_token() -> None:
    cp = engine()
    item = Example(prompt="Hi", task="greet", completion="Good day.")
    text = torch.tensor([cp.tokenizer("HiGood day.")["input_ids"]])

    def chance_of_ending() -> float:
        with torch.no_grad():
            return float(cp.model(text).logits[0, -1].softmax(-1)[1])

    before = chance_of_ending()
    cp.train([item] * 8, learn=("task",), **{**SETTINGS, "validation": 0})
    with cp.assembled(item):
        assert chance_of_ending() > 3 * before


def test_what_is_neither_learned_nor_stored_is_left_out_and_said() -> None:
    """So the same examples can teach the task first and the users afterwards."""
    cp = engine()
    first = cp.train(greetings(2), learn=("task",), **{**SETTINGS, "steps": 1})
    assert first.left_out == (
        "attribute 'formality=formal'",
        "attribute 'formality=informal'",
        "user 'ana'",
        "user 'bo'",
    )
    second = cp.train(greetings(2), learn=("attributes", "user"), **{**SETTINGS, "steps": 1})
    assert second.left_out == ()


@pytest.mark.slow
def test_strengths_of_examples_count_as_in_a_request() -> None:
    cp = engine()
    mixed = [
        Example(
            prompt="Hi",
            attributes={"tone": {"warm": 0.7, "brief": 0.3}},
            strengths={"tone": 2.0},
            completion="so warm",
        )
    ] * 8
    report = cp.train(mixed, learn=("attributes",), **{**SETTINGS, "validation": 0})
    assert set(report.saved) == {"attribute 'tone=warm'", "attribute 'tone=brief'"}
    still = {**SETTINGS, "steps": 1, "learning_rate": 1e-12, "validation": 0}
    plain = [example.model_copy(update={"strengths": {}}) for example in mixed]
    losses = []
    for rows in (mixed, plain):
        own = engine().train(rows, learn=("attributes",), init="random", **still)
        losses.append(own.losses[0])
    assert losses[0] != pytest.approx(losses[1], abs=1e-3)
    assert -cp.score(mixed[:1])[0].log_likelihood / 7 < report.losses[0]


def test_examples_that_cannot_be_learned_from_are_refused_and_nothing_is_stored() -> None:
    cp = engine()
    rows = greetings(2)
    no_task = [e.model_copy(update={"task": None}) for e in rows]
    cases: list[tuple[object, dict[str, object], str]] = [
        ([], {}, "has no examples"),
        (rows, {"learn": ("tasks",)}, "cannot learn 'tasks'; learn any of: task, attributes, user"),
        (no_task, {"learn": ("task",)}, "learn names 'task' but no example has one"),
        ([*rows, no_task[0]], {"learn": ("task",)}, "row 5: nothing of what is to be learned"),
        (rows, {"num_slots": 0}, "num_slots is 0"),
        (rows, {"num_slots": {"task": 3}}, "num_slots has no entry for 'attributes'"),
        (rows, {"learning_rate": math.nan}, "learning_rate is nan"),
        (rows, {"lr": 1.0}, "unknown field 'lr'; a training run has: .*learning_rate"),
        (rows, {"validation": 1.0}, "validation is 1.0"),
        (rows, {"init": "words"}, "init is 'words'"),
        ([{"prompt": "x"}], {}, "row 1: completion: Field required"),
        (None, {}, "expected rows, got NoneType"),
        (rows, {"validation": 0.9}, "validation 0.9 of 4 examples leaves none to train on"),
        (rows, {"epochs": math.inf}, "epochs is inf"),
        (rows, {"steps": "2"}, "steps is '2': Input should be a valid integer"),
        (rows, {"seed": -1}, "seed is -1"),
        (rows, {"num_slots": 1.5}, "num_slots is 1.5; it must be a whole number"),
        (rows, {"learn": ()}, "learn is empty; learn any of: task, attributes, user"),
        (rows, {"num_slots": 1000}, "num_slots is 1000; it must be between 1 and 256, the context"),
    ]
    for examples, options, message in cases:
        with pytest.raises(TrainingDataError, match=message):
            cp.train(examples, **{"progress": False, **options})  # type: ignore[arg-type]
    with pytest.raises(ControlPrefixError, match="an example has"):
        cp.train([rows[0].model_copy(update={"completion": "x" * 400})], progress=False)
    assert cp.store.prefixes() == []


@pytest.mark.slow
def test_a_loss_that_is_no_number_stores_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cp = engine()
    cp.train(greetings(2), **{**SETTINGS, "steps": 1})
    from controlprefix.training import objectives

    def broken(logits: torch.Tensor, target_ids: torch.Tensor) -> torch.Tensor:
        return honest(logits, target_ids) * math.nan

    honest = objectives.chunked_losses  # type: ignore[attr-defined]  # imported there
    monkeypatch.setattr(objectives, "chunked_losses", broken)
    with pytest.raises(TrainingDataError, match="the loss is nan at step 1; nothing was stored"):
        cp.train(greetings(2), **SETTINGS)
    assert [v.version for v in cp.versions("task", "greet")] == [1]
    assert probe(cp.model)[0].fingerprint == cp.geometry.fingerprint


def test_an_interrupted_run_stores_nothing_and_leaves_nothing_attached() -> None:
    cp = engine()
    count = 0

    def interrupt(*_: object) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt

    handle = cp.model.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        cp.train(greetings(2), **{**SETTINGS, "validation": 0, "gradient_checkpointing": True})
    handle.remove()
    assert cp.store.prefixes() == []
    assert not any(LAYER_ATTRIBUTE in vars(m) for m in cp.model.modules())
    assert not cp.model.training


@pytest.mark.slow
def test_what_cannot_be_stored_is_refused_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    cp = engine()
    steps = 0

    def count(*_: object) -> None:
        nonlocal steps
        steps += torch.is_grad_enabled()  # starts are computed without

    cp.model.register_forward_hook(count)
    bad = [Example(prompt="Hi", user="ana\n", completion="hello")] * 2
    with pytest.raises(ControlPrefixError, match="is not 1 to 255 printable characters"):
        cp.train(bad, learn=("user",), **SETTINGS)

    def refuse(*_: object) -> None:
        raise StoreError("read only")

    monkeypatch.setattr(cp.store, "require_writable", refuse)
    with pytest.raises(StoreError):
        cp.train(greetings(1), init="random", **SETTINGS)
    assert steps == 0
    monkeypatch.undo()
    cp.train(greetings(1), init="random", **SETTINGS)
    assert steps > 0


@pytest.mark.slow
def test_two_runs_with_checkpointing_leave_the_model_as_it_was() -> None:
    cp = engine("gpt2", resid_pdrop=0.3)
    settings = {**SETTINGS, "steps": 3, "gradient_checkpointing": True, "validation": 0}
    threads = [
        threading.Thread(target=cp.train, args=(greetings(2),), kwargs=settings) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not any(module.training for module in cp.model.modules())
    assert {m.p for m in cp.model.modules() if isinstance(m, torch.nn.Dropout)} == {0.1, 0.3}
    assert len(cp.versions("task", "greet")) == 2
