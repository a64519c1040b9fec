"""Reinforcement learning raises the reward, changes what it may, and resumes exactly."""

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rewarded import OPTIONS, requests, share_of_vowels, trained
from typer.testing import CliRunner

from controlprefix import (
    ControlPrefix,
    Example,
    Part,
    Prefix,
    Request,
    TrainingDataError,
    UnknownNameError,
)
from controlprefix.data import as_requests
from controlprefix.inference import static_generation
from controlprefix.prefixes import PrefixKey
from controlprefix.training.objectives import ContrastPair, Rollout, TrainingRow
from controlprefix.training.parameterization import parameterize
from controlprefix.training.policy import (
    PolicyObjective,
    Reward,
)
from controlprefix.training.settings import PolicySettings, TrainingSettings

from helpers import QUICK, engine, greetings
from models import byte_tokenizer

TRAINED = ("greet", "formal", "informal")


def slots(cp: ControlPrefix, kind: Any, name: str) -> torch.Tensor:
    return cp.get(kind, name).slots["decoder"]


def noting(noted: list[str]) -> Reward:
    """A reward that notes what it is given."""

    def reward(requests: Sequence[Request], texts: Sequence[str]) -> list[float]:
        noted.extend(texts)
        return share_of_vowels(requests, texts)

    return reward


def letter_probability(cp: ControlPrefix) -> float:
    """The probability that the first byte of an answer is a letter, a mean over requests."""
    frozen = cp.frozen_model
    prompts = [frozen.request_tokenizer.prompt_ids(request) for request in requests()]
    letters = [i for i in range(200) if frozen.request_tokenizer.decode([i]).isalpha()]
    total = 0.0
    for request, prompt in zip(requests(), prompts, strict=True):
        with torch.no_grad(), cp.assembled(request):
            logits = cp.model(input_ids=torch.tensor([prompt])).logits[0, -1]
        total += float(logits.softmax(0)[letters].sum())
    return total / len(prompts)


@pytest.mark.slow
def test_the_reward_rises_and_the_model_stays() -> None:
    cp = engine()
    cp.train(greetings(), **{**QUICK, "steps": 40, "learning_rate": 0.2})
    before = {n: p.clone() for n, p in cp.model.state_dict().items()}
    probability = letter_probability(cp)
    report = cp.reinforce(
        requests(max_new_tokens=1),
        reward=lambda requests, texts: [float(text.isalpha()) for text in texts],
        steps=20,
        batch_size=4,
        num_samples=16,
        learning_rate=0.5,
        kl=0.0,
        diversity=0.0,
        progress=False,
    )
    assert letter_probability(cp) > 1.1 * probability
    assert all(torch.equal(p, before[n]) for n, p in cp.model.state_dict().items())
    assert set(report.saved.values()) == {2}
    assert len(report.metrics) == 20
    assert all({"reward", "length", "diversity"} <= m.keys() for m in report.metrics)


@pytest.mark.slow
def test_only_what_is_learned_changes() -> None:
    cp = trained()
    task, label = slots(cp, "task", "greet"), slots(cp, "attribute", "formality=formal")
    report = cp.reinforce(
        requests(), reward=share_of_vowels, learn="attributes", learning_rate=0.1, **OPTIONS
    )
    assert torch.equal(task, slots(cp, "task", "greet"))
    assert not torch.equal(label, slots(cp, "attribute", "formality=formal"))
    assert not any("greet" in name for name in report.saved)


@pytest.mark.slow
def test_a_reward_that_gives_nothing_is_a_clear_error() -> None:
    rewards: list[Any] = [lambda _, texts: None, lambda _, texts: ["good"] * len(texts)]
    for reward in rewards:
        with pytest.raises(TrainingDataError, match="give a list with a number for each text"):
            trained().reinforce(requests(), reward=reward, **OPTIONS)


@pytest.mark.slow
def test_a_constant_reward_and_no_divergence_have_no_gradient() -> None:
    """Leave-one-out advantages of equal rewards are 0, and the start is its own reference."""
    cp = trained()
    report = cp.reinforce(
        requests(),
        reward=lambda requests, texts: [1.0] * len(texts),
        learning_rate=0.1,
        diversity=0.0,
        kl=1.0,
        **OPTIONS,
    )
    assert report.grad_norms[0] < 1e-5
    assert report.metrics[0]["kl"] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.slow
def test_the_divergence_from_the_plain_model_is_measured() -> None:
    cp = trained()
    report = cp.reinforce(requests(), reward=share_of_vowels, reference="plain", **OPTIONS)
    assert report.metrics[0]["kl"] > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["start", "plain"])
def test_the_loss_is_that_of_the_formula(reference: Any) -> None:
    """Against the definition, computed with transformers' own forward pass per row."""
    cp = trained()
    frozen = cp.frozen_model
    key = PrefixKey("task", "greet")
    initial = {key: cp.get("task", "greet")}
    settings = PolicySettings(num_samples=2, kl=0.3, reference=reference, demonstration_weight=0.5)
    objective = PolicyObjective(frozen, settings, share_of_vowels, initial)
    now = {key: Prefix.random(cp.geometry, num_slots=4, scale=0.5, seed=3)}
    rows = [
        TrainingRow([5, 6, 7], [8, 9], (), [(key, 1.0)], rollout=Rollout(0.7)),
        TrainingRow([5, 6], [10, 11, 12], (), [(key, 1.0)], rollout=Rollout(-0.4)),
        TrainingRow([5], [13, 14], (), [(key, 1.0)]),
    ]
    pairs = [ContrastPair(row) for row in rows]
    with torch.no_grad(), frozen.attached(objective.assemble(pairs, now)):
        losses = objective(pairs)

    def log_probs(row: TrainingRow, prefix: Prefix | None) -> torch.Tensor:
        parts = [] if prefix is None else [Part(prefix)]
        ids = torch.tensor([[*row.prompt, *row.targets]])
        with torch.no_grad(), frozen.attached(frozen.assemble([parts])):
            logits = cp.model(input_ids=ids).logits[0]
        return logits[len(row.prompt) - 1 : -1].log_softmax(1)

    reference_prefix = initial[key] if reference == "start" else None
    for row, loss in zip(rows, losses.tolist(), strict=True):
        own = log_probs(row, now[key])
        likelihood = own[range(len(row.targets)), list(row.targets)].sum()
        if row.rollout is None:
            assert loss == pytest.approx(float(-0.5 * likelihood), rel=1e-4)
            continue
        divergence = (own.exp() * (own - log_probs(row, reference_prefix))).sum()
        expected = (-row.rollout.advantage * likelihood + 0.3 * divergence) / 2
        assert loss == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.slow
def test_advantages_leave_the_own_sample_out() -> None:
    cp = trained()
    values = iter([1.0, 2.0, 6.0, 0.0, 0.0, 3.0])
    objective = PolicyObjective(
        cp.frozen_model,
        PolicySettings(num_samples=3, diversity=0.0),
        lambda requests, texts: [next(values) for _ in texts],
        {},
    )
    keys = {PrefixKey("task", "greet"): cp.get("task", "greet")}
    prefixes = parameterize(
        TrainingSettings(parameterization="direct"),
        keys,
        {"decoder": torch.ones(cp.geometry.slot_size("decoder"))},
    )
    rows = [
        TrainingRow([5, 6], (), (), [(key, 1.0)], request=request)
        for key in keys
        for request in requests(2)
    ]
    pairs = objective.expand([ContrastPair(row) for row in rows], prefixes, seed=0)
    advantages = [pair.row.rollout.advantage for pair in pairs if pair.row.rollout]
    assert advantages == [1 - 4, 2 - 3.5, 6 - 1.5, 0 - 1.5, 0 - 1.5, 3.0]
    assert all(0 < len(pair.row.targets) <= 6 for pair in pairs)


@pytest.mark.slow
def test_requests_are_sampled_with_all_their_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `generate` writes with the same seed at temperature 1 is what the reward gets."""
    cp = trained()
    cp.put("user", "ana", Prefix.random(cp.geometry, num_slots=3, scale=0.5, seed=5))
    seeds: list[int] = []
    rewarded: list[str] = []

    def spying(frozen: Any, resolved: Any, prompts: Any, **options: Any) -> Any:
        seeds.extend(request.request.seed for request in resolved)
        return static_generation.generate_tokens(frozen, resolved, prompts, **options)

    def reward(requests: Sequence[Request], texts: Sequence[str]) -> list[float]:
        rewarded.extend(texts)
        return [0.0] * len(texts)

    monkeypatch.setattr("controlprefix.training.policy.generate_tokens", spying)
    own = {"user": "ana", "stop": ("e",), "temperature": 0.3, "strengths": {"task": 0.5}}
    sampled = [r.model_copy(update=own) for r in requests(2)]
    before = cp.without_defaults()
    cp.reinforce(sampled, reward=reward, **{**OPTIONS, "steps": 1, "learning_rate": 1e-9})
    twice = [request for request in sampled for _ in range(2)]
    for order in (twice, [*twice[2:], *twice[:2]]):  # the step's batch is shuffled
        expected = before.generate(
            [
                request.model_copy(update={"temperature": 1.0, "seed": seed})
                for request, seed in zip(order, seeds, strict=True)
            ]
        )
        if [completion.text for completion in expected] == rewarded:
            return
    raise AssertionError(rewarded)


@pytest.mark.slow
def test_demonstrations_are_learned_beside_the_reward() -> None:
    examples = greetings(4)
    losses = []
    for weight in (0.0, 1.0):
        cp = trained()
        cp.reinforce(
            requests(),
            reward=lambda requests, texts: [0.0] * len(texts),
            demonstrations=examples,
            demonstration_weight=weight,
            diversity=0.0,
            learning_rate=0.05,
            **{**OPTIONS, "steps": 12, "batch_size": 4},
        )
        scores = cp.score(examples)
        losses.append(-sum(score.log_likelihood for score in scores))
    assert losses[1] < losses[0] - 1


@pytest.mark.slow
def test_a_label_of_demonstrations_alone_is_stored_if_they_are_learned_from() -> None:
    formal = [row for row in requests() if row.attributes == {"formality": "formal"}]
    for weight, label_is_stored in ((0.0, False), (1.0, True)):
        report = trained().reinforce(
            formal,
            reward=share_of_vowels,
            demonstrations=greetings(4),
            demonstration_weight=weight,
            **OPTIONS,
        )
        assert ("attribute 'formality=informal'" in report.saved) == label_is_stored
        assert ("attribute 'formality=informal'" in report.untrained) != label_is_stored


@pytest.mark.slow
def test_a_resumed_run_is_bit_identical(tmp_path: Path) -> None:
    def run(steps: int, **options: Any) -> ControlPrefix:
        cp = trained()
        cp.reinforce(
            requests(),
            reward=share_of_vowels,
            demonstrations=greetings(2),
            learning_rate=0.1,
            save_steps=1,
            **{**OPTIONS, "steps": steps, **options},
        )
        return cp

    class Stop(Exception):
        pass

    def stop(info: Any) -> None:
        if info.step == 2:
            raise Stop

    with pytest.raises(Stop):
        run(4, folder=tmp_path, on_step=stop)
    resumed, whole = run(4, folder=tmp_path, resume=True), run(4)
    assert torch.equal(slots(resumed, "task", "greet"), slots(whole, "task", "greet"))
    header, *lines = (tmp_path / "history.csv").read_text().splitlines()
    assert "reward" in header
    assert len(lines) == 4
    with pytest.raises(TrainingDataError, match="another run"):
        run(4, folder=tmp_path, resume=True, kl=0.9)
    done = tmp_path / "done"
    resumed.reinforce(requests(), reward=share_of_vowels, folder=done, **OPTIONS)
    longer = {**OPTIONS, "steps": 5}
    with pytest.raises(TrainingDataError, match="is finished, and training starts from what it"):
        resumed.reinforce(requests(), reward=share_of_vowels, folder=done, resume=True, **longer)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"reward": lambda requests, texts: [1.0]}, "1 numbers for 4 texts"),
        ({"reward": lambda requests, texts: [math.nan] * len(texts)}, "is nan"),
        ({"reward": "length"}, "give a function"),
        ({"num_samples": 1}, "num_samples"),
        ({"kl": -1.0}, "kl"),
        ({"reference": "other"}, "reference"),
        ({"validation": 0.5}, "nothing is held out"),
        ({"klx": 1}, "klx"),
        ({"learn": "user"}, "no example has one"),
        ({"too_long": "skip"}, "too_long applies to train"),
    ],
)
def test_mistakes_are_told_and_store_nothing(change: dict[str, Any], match: str) -> None:
    cp = trained()
    options = {"reward": share_of_vowels, **OPTIONS, **change}
    with pytest.raises(TrainingDataError, match=match):
        cp.reinforce(requests(), **options)
    assert [v.version for v in cp.versions("task", "greet")] == [1]


@pytest.mark.slow
def test_activation_checkpoints_change_no_sample() -> None:
    texts: list[list[str]] = [[], []]
    losses = []
    for checkpointing, own in zip((False, True), texts, strict=True):
        report = trained().reinforce(
            requests(), reward=noting(own), gradient_checkpointing=checkpointing, **OPTIONS
        )
        losses.append(report.losses)
    assert texts[0] == texts[1]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@pytest.mark.slow
def test_samples_are_those_of_the_model_without_penalties() -> None:
    texts: list[list[str]] = [[], []]
    penalties = {"repetition_penalty": 1.8, "presence_penalty": 2.0, "logit_bias": {101: 50.0}}
    for fields, own in zip(({}, penalties), texts, strict=True):
        sampled = [request.model_copy(update=fields) for request in requests()]
        trained().reinforce(sampled, reward=noting(own), **{**OPTIONS, "steps": 1})
    assert texts[0] == texts[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"num_beams": 2}, "row 1 has num_beams=2, but texts are sampled"),
        ({"schedules": {"task": ((0, 1.0), (4, 0.0))}}, "row 1 has schedules"),
    ],
)
def test_requests_that_cannot_be_sampled_are_refused(fields: dict[str, Any], match: str) -> None:
    cp = trained()
    sampled = [
        Request(**{**request.model_dump(exclude_unset=True), **fields}) for request in requests()
    ]
    with pytest.raises(TrainingDataError, match=match):
        cp.reinforce(sampled, reward=share_of_vowels, **OPTIONS)


@pytest.mark.slow
def test_a_prefix_must_be_stored() -> None:
    cp = trained()
    sampled = [request.model_copy(update={"task": "grete"}) for request in requests()]
    with pytest.raises(UnknownNameError, match="greet"):
        cp.reinforce(sampled, reward=share_of_vowels, **OPTIONS)


def test_rows_are_read_as_requests(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    rows = [
        {"prompt": "Hi", "task": "greet", "max_new_tokens": 3},
        {"messages": [{"role": "user", "content": "Hi"}]},
        {"prompt": "Hi", "completion": "Hello"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    first, second, third = as_requests(path)
    assert (first.prompt, first.max_new_tokens) == ("Hi", 3)
    assert second.messages is not None
    assert isinstance(third, Example)
    assert not isinstance(first, Example)
    begun = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Dear"}]
    (row,) = as_requests([{"messages": begun, "continue_final_message": True}])
    assert row.messages is not None
    assert [message.content for message in row.messages] == ["Hi", "Dear"]
    path.write_text('{"prompt": "Hi", "tsk": "greet"}')
    with pytest.raises(TrainingDataError, match=r"line 1.*tsk"):
        as_requests(path)
    with pytest.raises(TrainingDataError, match="expected an Example or a dict, got Request"):
        engine().train([first], **QUICK)


@pytest.mark.slow
def test_the_command_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from controlprefix.cli import app
    from controlprefix.cli.groups import EngineArguments

    cp = trained()
    monkeypatch.setattr(EngineArguments, "open", lambda self, **_: cp)
    path = tmp_path / "sampled.jsonl"
    path.write_text(
        "\n".join(request.model_dump_json(exclude_unset=True) for request in requests())
    )
    result = CliRunner().invoke(
        app,
        ["reinforce", str(path), "--reward", "length=3..5", "--steps", "2", "--num-samples", "2",
         "--folder", str(tmp_path / "run")],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "stored task 'greet' version 2" in result.output
    assert "reward" in result.output


def test_an_end_is_learned_where_it_was_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that have ended are padded, here with the end token itself."""
    own_tokenizer = byte_tokenizer()
    own_tokenizer.pad_token = own_tokenizer.eos_token
    cp = engine(tokenizer=own_tokenizer)
    assert cp.frozen_model.request_tokenizer.pad_id == 1
    tokenizer = cp.frozen_model.request_tokenizer
    a, b = tokenizer.inner_ids("a")[0], tokenizer.inner_ids("b")[0]
    end = tokenizer.end_ids[0]
    rows: list[tuple[dict[str, Any], list[int], list[int]]] = [
        ({"max_new_tokens": 2}, [a, b, end, end], [a, b]),  # cut at its limit
        ({"max_new_tokens": 4}, [a, end, end, end], [a, end]),
        ({"max_new_tokens": 4, "stop": ("b",)}, [a, b, end, end], [a, b]),
    ]
    objective = PolicyObjective(cp.frozen_model, PolicySettings(), share_of_vowels, {})
    for fields, new, expected in rows:
        monkeypatch.setattr(
            "controlprefix.training.policy.generate_tokens", lambda *_, new=new, **__: [new]
        )
        request = Request(prompt="-", raw=True, **fields)
        row = TrainingRow((a,), (), (), (), request=request)
        ((tokens, _),) = objective._sample([row], [()], {}, random.Random(0))
        assert list(tokens) == expected
    ((tokens, text),) = objective._sample([row], [(a,)], {}, random.Random(0))
    assert (list(tokens), text) == ([a, a, b], "aa")  # without the stop text, as all others


def test_epochs_are_in_place_of_steps() -> None:
    cp = trained()
    options = {name: value for name, value in OPTIONS.items() if name != "steps"}
    report = cp.reinforce(requests(), reward=share_of_vowels, epochs=1, **options)
    assert len(report.losses) == -(-len(requests()) // int(options["batch_size"]))
