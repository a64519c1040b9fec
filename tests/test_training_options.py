"""Options of training: initialization, contrast, distillation, shortening and sweeps."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import DynamicCache

from controlprefix import (
    ContextLengthError,
    ControlPrefix,
    Example,
    Prefix,
    TrainingDataError,
)
from controlprefix.model.slot_attention import (
    LayerAttention,
    QueryText,
    mean_masses,
    observe,
)
from controlprefix.prefixes import Kind, PrefixKey
from controlprefix.prefixes.geometry import Site
from controlprefix.training import TrainingRow, TrainingSettings
from controlprefix.training.loop import TrainingLoop
from controlprefix.training.objectives import ContrastPair, add_contrast
from controlprefix.training.parameterization import parameterize
from controlprefix.training.preparation import prepare
from controlprefix.training.run import TrainingRun
from controlprefix.training.shortening import shorten

from helpers import QUICK, engine, frozen, greetings, nats_per_token, random_prefix
from models import build, byte_tokenizer


@pytest.mark.slow
def test_patience_ends_a_run_that_no_longer_gets_better() -> None:
    settings = {**QUICK, "steps": 40, "learning_rate": 1e-12, "num_evaluations": 20, "patience": 2}
    report = engine().train(greetings(), **settings)
    assert len(report.losses) < 40
    losses = [loss for _, loss in report.validation]
    assert min(losses[-2:]) >= min(losses[:-2])
    assert report.best_loss == min(losses)


@pytest.mark.slow
def test_weight_decay_pulls_to_the_start_and_slot_dropout_is_for_training_only() -> None:
    def distance(**settings: float) -> float:
        cp = engine()
        cp.train(greetings(), **{**QUICK, "init": {("task", "greet"): "Say "}, **settings})
        start = cp.prefix_from_text("Say ").slots["decoder"]
        trained = cp.get("task", "greet")
        assert trained.num_slots == 4
        return float((trained.slots["decoder"] - start).norm())

    free = distance()
    assert distance(weight_decay=5.0) < 0.7 * free
    assert distance(slot_dropout=0.5) != free


@pytest.mark.slow
def test_prefixes_start_from_a_text_a_prefix_or_tokens(tmp_path: Path) -> None:
    cp = engine()
    cp.train(greetings(), **{**QUICK, "steps": 1, "learning_rate": 1e-9})
    label: tuple[Kind, str] = ("attribute", "formality=formal")
    task: tuple[Kind, str] = ("task", "greet")
    custom = Prefix.random(cp.geometry, num_slots=7, seed=5)
    settings = {**QUICK, "steps": 1, "learning_rate": 1e-9}
    cp.train(greetings(), init={task: "Hail", label: custom}, **settings)
    text = cp.prefix_from_text("Hail")
    for (kind, name), expected in ((task, text), (label, custom)):
        result = cp.get(kind, name)
        assert torch.allclose(result.slots["decoder"], expected.slots["decoder"], atol=1e-6)
    cp.train(greetings(), init="tokens", **settings)
    tokens = cp.get("task", "greet")
    assert not torch.allclose(tokens.slots["decoder"], text.slots["decoder"], atol=1e-2)
    other = ControlPrefix.from_pretrained(
        build("gpt2"), tokenizer=byte_tokenizer(), store="sqlite://"
    )
    for init, message in (
        ({("task", "great"): "x"}, r"init names \('task', 'great'\), which is not trained"),
        ({"greet": "x"}, "init names 'greet', which is not trained"),
        ({("task", "greet"): " "}, "init of task 'greet' is ' '; give a text or a Prefix"),
    ):
        with pytest.raises(TrainingDataError, match=message):
            cp.train(greetings(), init=init, **QUICK)  # type: ignore[arg-type]
    foreign = Prefix.random(other.geometry, num_slots=2)
    with pytest.raises(ValueError, match="the initialization of task 'greet' has"):
        cp.train(greetings(), init={("task", "greet"): foreign}, **QUICK)


@pytest.mark.slow
def test_contrast_drives_labels_apart() -> None:
    examples = greetings()
    swapped = [
        e.model_copy(
            update={
                "attributes": {
                    "formality": {"formal": "informal", "informal": "formal"}[
                        str(e.attributes["formality"])
                    ]
                }
            }
        )
        for e in examples
    ]
    margins = []
    for contrast in (0.0, 0.7):
        cp = engine()
        cp.train(examples, contrast=contrast, **{**QUICK, "steps": 30})
        margins.append(nats_per_token(cp, swapped) - nats_per_token(cp, examples))
    assert margins[1] > margins[0] + 0.1


def test_a_row_is_contrasted_with_another_label_of_its_attribute_only() -> None:
    keys = [PrefixKey("attribute", name) for name in ("f=a", "f=b", "f=c", "ff=a", "t=x")] + [
        PrefixKey("task", "f=z")
    ]
    row = TrainingRow((1,), (2,), (), ((keys[0], 0.5), (keys[5], 1.0)))
    result = [add_contrast([row], keys, random.Random(i))[0].other for i in range(50)]
    swapped = {item.learned[0] for item in result if item is not None}
    assert swapped == {(keys[1], 0.5), (keys[2], 0.5)}
    assert {item.learned[1] for item in result if item is not None} == {(keys[5], 1.0)}
    lone = TrainingRow((1,), (2,), (), ((keys[4], 1.0),))
    assert add_contrast([lone], keys, random.Random(0))[0].other is None


@pytest.mark.slow
def test_a_prefix_distilled_from_an_instruction_replaces_it() -> None:
    cp = engine()
    instruction = "Answer in a very formal way, please."
    prompts = [f"Greet {i}" for i in range(12)]
    report = cp.distill(
        instruction,
        prompts,
        attribute="formality",
        label="formal",
        max_new_tokens=8,
        **{**QUICK, "steps": 60, "num_slots": 8},
    )
    assert report.saved == {"attribute 'formality=formal'": 1}
    assert report.best_loss < 0.6 * report.validation[0][1]

    def divergence(prompt: str, **parts: Any) -> float:
        """Between what follows the instructed prompt and what follows the bare one, steered."""
        from controlprefix import Request

        def after(text: str) -> torch.Tensor:
            ids = torch.tensor([cp.tokenizer(text)["input_ids"]])
            with torch.no_grad():
                return cp.model(ids).logits[0, -1].log_softmax(-1)

        expected = after(f"{instruction}\n\n{prompt}")
        with cp.assembled(Request(prompt=prompt, raw=True, **parts)):
            result = after(prompt)
        return float((expected.exp() * (expected - result)).sum())

    new = [f"Greet {i}" for i in range(50, 60)]
    bare = sum(divergence(p) for p in new)
    steered = sum(divergence(p, attributes={"formality": "formal"}) for p in new)
    assert steered < 0.8 * bare
    for invalid, message in (
        ({"prompts": [], "task": "a"}, "there are no prompts"),
        ({"prompts": prompts, "task": "a", "user": "b"}, "name one to learn"),
        ({"prompts": prompts, "attribute": "a"}, "give an attribute and its label"),
        ({"prompts": prompts, "task": "a", "completions": ["x"]}, "1 completions for 12 prompts"),
    ):
        with pytest.raises(TrainingDataError, match=message):
            cp.distill(instruction, progress=False, **invalid)  # type: ignore[arg-type]


def test_what_does_not_fit_behind_the_instruction_is_refused_or_skipped() -> None:
    cp = engine()
    limit = cp.frozen_model.request_tokenizer.context_length
    assert limit is not None
    instruction, prompts = "x" * (limit // 2), ["Hi", "y" * (limit // 2)]
    options: dict[str, Any] = {"task": "t", "completions": ["a", "b"], **QUICK, "validation": 0}
    with pytest.raises(ContextLengthError, match="completion 2 have"):
        cp.distill(instruction, prompts, **options)
    with pytest.raises(TrainingDataError, match="too_long='cut' cannot"):
        cp.distill(instruction, prompts, too_long="cut", **options)
    report = cp.distill(instruction, prompts, too_long="skip", **{**options, "steps": 1})
    assert (report.num_examples, report.num_skipped) == (1, 1)


def test_every_token_counts_alike_however_rows_are_batched() -> None:
    """Gradients of batches add up to the same, be they of similar length or mixed."""
    cp = engine()
    texts = ("a", "bc", "de, at length, and more", "fg, at some length too")
    examples = [Example(prompt="Hi", task="greet", completion=text) for text in texts]
    settings = TrainingSettings.from_options(
        {"batch_size": 2, "validation": 0, "parameterization": "direct"}
    )
    result = []
    for batches in (((0, 1), (2, 3)), ((0, 2), (1, 3))):
        prepared = prepare(
            examples,
            cp.frozen_model,
            cp._resolver,
            settings,
            learn="task",
            num_slots=3,
            init="text",
        )
        slots = parameterize(settings, prepared.initial, prepared.scale)
        run = TrainingRun(prepared.rows, (), slots, settings, cp.model.device)
        loop = TrainingLoop(cp.frozen_model, settings, Accelerator())
        for batch in batches:
            rows = [prepared.rows[i] for i in batch]
            loop._losses([(run, ContrastPair(row)) for row in rows], {})
        (trained,) = (p.grad for p in slots.parameters())
        assert trained is not None
        result.append(trained.clone())
    torch.testing.assert_close(*result)


def test_slot_masses_are_the_models_own_attention_weights() -> None:
    """Against the same slots in a cache, with the weights that eager attention gives out."""
    model = frozen("llama")
    prefix = Prefix.random(model.geometry, num_slots=5, scale=1.0, seed=1)
    rows = [QueryText((5, 6, 7), (8, 9)), QueryText((5, 6), (10, 11, 12))]
    result = observe(model, prefix, rows)
    eager = build("llama")
    eager.set_attn_implementation("eager")
    expected = torch.zeros(len(prefix.geometry.decoder), 4, 5)  # layers, heads, slots
    for row in rows:
        ids = torch.tensor([[*row.prompt, *row.targets]])
        cache = DynamicCache()
        for i in range(len(prefix.geometry.decoder)):
            keys, values = prefix.layer("decoder", i)
            cache.update(keys[None], values[None], i)
        with torch.no_grad():
            weights = eager(
                ids,
                past_key_values=cache,
                position_ids=torch.arange(ids.shape[1])[None],
                attention_mask=torch.ones(1, 5 + ids.shape[1]),
                output_attentions=True,
            ).attentions
        expected += torch.stack(weights)[:, 0, :, :, :5].mean(dim=2) / len(rows)
    for layer, observed in zip(expected, result["decoder"], strict=True):
        mass = observed.weights.mean(dim=1).float()
        groups = layer.chunk(len(mass))  # heads that read one kv head
        assert torch.allclose(mass, torch.stack([group.mean(dim=0) for group in groups]), atol=1e-6)
    assert torch.allclose(mean_masses(result).float(), expected.mean(dim=(0, 1)), atol=1e-6)


@pytest.mark.slow
def test_shortening_keeps_the_slots_that_matter_and_most_of_the_gain() -> None:
    cp = engine()
    examples = [e.model_copy(update={"attributes": {}}) for e in greetings()]
    cp.train(examples, learn="task", **{**QUICK, "steps": 40})
    trained = cp.get("task", "greet")
    # Slots that attention cannot see: keys that no query likes, far from all others.
    dead = Prefix(cp.geometry, {"decoder": torch.zeros(6, cp.geometry.slot_size("decoder"))})
    joined = torch.cat([trained.slots["decoder"], dead.slots["decoder"]])
    cp.put("task", "greet", Prefix(cp.geometry, {"decoder": joined}))
    whole = nats_per_token(cp, examples)
    report = cp.shorten("task", "greet", examples, keep=0.9)
    shorter = cp.get("task", "greet")
    assert report.version == 3
    assert shorter.num_slots == report.num_slots < 10
    curve = dict(report.curve)
    assert set(curve) >= {0, 10, report.num_slots}
    assert curve[report.num_slots] <= curve[0] - 0.9 * (curve[0] - curve[10])
    assert len(report.masses) == 10
    bare = nats_per_token(cp, [e.model_copy(update={"task": None}) for e in examples])
    assert nats_per_token(cp, examples) <= bare - 0.85 * (bare - whole)
    with pytest.raises(TrainingDataError, match="row 1 does not name task 'greet'"):
        cp.shorten("task", "greet", [examples[0].model_copy(update={"task": None})])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("losses", "keep", "chosen"),
    [
        ([5.0, 4.0, 3.0, 2.5, 2.0], 1.0, 4),
        ([5.0, 4.0, 3.0, 2.1, 2.0], 0.95, 3),
        ([5.0, 2.0, 4.0, 2.0, 2.0], 0.9, 3),  # one slot alone was luck: two are worse
    ],
)
def test_the_fewest_slots_are_chosen_from_which_on_all_are_good_enough(
    losses: list[float], keep: float, chosen: int
) -> None:
    geometry = engine().geometry
    prefix = Prefix.random(geometry, num_slots=4, seed=0)
    weights = torch.rand(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / 4
    everywhere: dict[Site, list[LayerAttention]] = {
        "decoder": [
            LayerAttention(
                torch.ones(layer.num_kv_heads, 8, layer.key_dim, dtype=torch.float64),
                weights.expand(layer.num_kv_heads, -1, -1),
            )
            for layer in geometry.decoder
        ]
    }

    def nats_with(candidate: Prefix | None) -> float:
        return losses[0 if candidate is None else candidate.num_slots]

    shorter, report = shorten(prefix, everywhere, nats_with, keep=keep)
    assert shorter.num_slots == report.num_slots == chosen
    assert report.curve == tuple(enumerate(losses))
    assert report.masses == pytest.approx(tuple(weights.mean(dim=0).tolist()))
    with pytest.raises(TrainingDataError, match="gains nothing on these examples"):
        shorten(prefix, everywhere, lambda item: 2.0 if item else 1.0, keep=keep)
    with pytest.raises(TrainingDataError, match="keep is 0"):
        shorten(prefix, everywhere, nats_with, keep=0)


@pytest.mark.slow
def test_a_sweep_compares_and_stores_nothing(tmp_path: Path) -> None:
    cp = engine()
    report = cp.sweep(
        greetings(),
        num_slots=(1, 4),
        parameterizations=("direct", "shared"),
        **{k: v for k, v in QUICK.items() if k not in ("num_slots", "parameterization")},
    )
    tried = [(point.parameterization, point.num_slots) for point in report.points]
    assert tried == [("direct", 1), ("direct", 4), ("shared", 1), ("shared", 4)]
    assert report.best in report.points
    assert report.best.loss <= min(point.loss for point in report.points) + 0.01
    report.save(tmp_path)
    assert len(json.loads((tmp_path / "sweep.json").read_text())["points"]) == 4
    assert cp.store.prefixes() == []
    for rows, validation in ((greetings(), 0.0), (greetings()[:4], 0.1)):
        with pytest.raises(TrainingDataError, match=f"validation {validation} of .* is none"):
            cp.sweep(rows, validation=validation, progress=False)


def test_a_sweep_starts_from_no_prefix_of_its_own_number_of_slots() -> None:
    cp = engine()
    prefixes = {("task", "greet"): random_prefix(cp.model, 4)}
    for init in ("stored", prefixes):
        with pytest.raises(TrainingDataError, match="keeps its own; give another init"):
            cp.sweep(greetings(), init=init, progress=False)  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_first_slots_of_a_nested_prefix_serve_alone() -> None:
    def losses(**settings: Any) -> list[float]:
        cp = engine()
        cp.train(greetings(), **{**QUICK, "steps": 200, "num_slots": 8, **settings})
        whole = cp.get("task", "greet")
        totals = []
        for count in (2, 8):
            cp.put("task", "greet", whole.first(count))
            assert cp.get("task", "greet").num_slots == count
            scores = cp.score(greetings())
            totals.append(-sum(s.log_likelihood for s in scores))
        return totals

    (few, whole), (few_nested, whole_nested) = losses(), losses(nested=True)
    assert few_nested < few  # the others were trained to work together
    assert few_nested - whole_nested < 0.3 * (few - whole)
    with pytest.raises(ValueError, match="must be 1 or more"):
        Prefix.random(engine().geometry, num_slots=2).first(0)


def test_a_sweep_refuses_what_records_or_watches_a_run(tmp_path: Path) -> None:
    all_options: list[dict[str, Any]] = [
        {"folder": tmp_path / "run"},
        {"on_step": print},
        {"tracker": "tensorboard"},
    ]
    for options in all_options:
        with pytest.raises(TrainingDataError, match=f"{next(iter(options))} has no effect"):
            engine().sweep(greetings(), num_slots=[1], **options)
    assert not (tmp_path / "run").exists()


def test_slot_masses_are_those_of_the_site_with_the_most_slots() -> None:
    queries = torch.zeros(1, 2, 8, dtype=torch.float64)
    attention: dict[Site, list[LayerAttention]] = {
        "encoder": [LayerAttention(queries, torch.zeros(1, 2, 0, dtype=torch.float64))],
        "decoder": [LayerAttention(queries, torch.full((1, 2, 3), 0.2, dtype=torch.float64))],
    }
    assert mean_masses(attention).tolist() == pytest.approx([0.2] * 3)


def test_contrast_without_two_labels_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": "a", "completion": "b", "task": "t", "attributes": {"tone": "warm"}}]
    engine().train(rows, contrast=0.5, **{**QUICK, "steps": 1, "validation": 0.0})
    assert "contrast has no effect" in caplog.text


@pytest.mark.parametrize(
    "wrong",
    [
        {"strengths": {"formality": -1.0}},
        {"mixing": "logits"},
        {"when": "relevant"},
    ],
)
def test_rows_given_for_validation_are_checked(wrong: dict[str, Any]) -> None:
    cp, rows = engine(), greetings(4)
    held_out = [rows[0].model_copy(update={"prompt": "Another", **wrong})]
    with pytest.raises(TrainingDataError, match=r"validation, row 1 has .*; leave it out"):
        cp.train(rows, validation=held_out, **QUICK)
    assert cp.names("task") == []


@pytest.mark.slow
def test_a_label_at_strength_0_is_not_learned() -> None:
    cp, rows = engine(), greetings(4)
    rows[0] = rows[0].model_copy(update={"attributes": {"formality": {"formal": 1.0, "odd": 0.0}}})
    for seed in range(3):  # whether the row is held out or not
        cp.train(rows, **{**QUICK, "seed": seed})
    assert "formality=odd" not in cp.names("attribute")


@pytest.mark.slow
def test_an_own_accelerator_keeps_no_optimizer_and_accumulates_nothing() -> None:
    cp = engine()
    accelerator = Accelerator()
    for _ in range(2):
        cp.train(greetings(1), accelerator=accelerator, **QUICK)
    assert accelerator._optimizers == []
    accumulating = Accelerator(gradient_accumulation_steps=2)
    with pytest.raises(TrainingDataError, match="gradient_accumulation_steps 2; leave it at 1"):
        cp.train(greetings(1), accelerator=accumulating, **QUICK)
