"""Comparisons of ways to adapt a model: the same rows, honest figures, nothing changed."""

import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import psutil
import pytest
import torch

from controlprefix import (
    ControlPrefix,
    Example,
    Request,
    StoreError,
    TrainingDataError,
)
from controlprefix.evaluation.comparison import (
    METHODS,
    ComparisonReport,
    compare,
    measures,
    method_runner,
)
from controlprefix.evaluation.comparison.adapter_training import sample
from controlprefix.evaluation.comparison.adapters import PrefixMemory
from controlprefix.evaluation.comparison.methods import ComparisonSetup, ControlPrefixMethod, Method
from controlprefix.inference import relevance, unseen_labels
from controlprefix.inference.unseen_labels import NearestLabels
from controlprefix.model.probing import probe
from controlprefix.users.privacy_audit import PrivacyAuditor

from helpers import COMPARISON, comparison_setup, engine, greetings, nats_per_token, tokens


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[ControlPrefix, ComparisonReport]:
    cp = engine("gpt2")  # it has biases
    general = [{"text": "The sea is wide."}]
    folder = tmp_path_factory.mktemp("comparison")
    result = compare(cp, greetings(12), general=general, folder=folder, **COMPARISON)
    assert json.loads((folder / "comparison.json").read_text())["methods"] == result.methods
    return cp, result


@pytest.mark.slow
def test_every_method_is_measured_or_says_why_not(
    report: tuple[ControlPrefix, ComparisonReport],
) -> None:
    _, result = report
    assert list(result.methods) == list(METHODS)
    for name, method in result.methods.items():
        if name in result.skipped:
            assert result.skipped[name]
            continue
        (figures,) = method["runs"].values()
        assert all(map(math.isfinite, figures.values())), name
    assert {"PEFT LoRA r8", "BitFit", "prefix, then LoRA", "full fine-tuning"} <= {
        name for name, method in result.methods.items() if method.get("runs")
    }


@pytest.mark.slow
def test_a_comparison_changes_neither_the_model_nor_the_store(
    report: tuple[ControlPrefix, ComparisonReport],
) -> None:
    cp, _ = report
    assert not cp.names("task")
    assert not cp.names("attribute")
    assert probe(cp.model)[0].fingerprint == cp.geometry.fingerprint
    assert not any(p.requires_grad for p in cp.model.parameters())


@pytest.mark.slow
def test_what_is_switched_off_is_the_plain_model_exactly(
    report: tuple[ControlPrefix, ComparisonReport],
) -> None:
    _, result = report
    assert result.figures("plain", "divergence, written") == [0.0]
    assert result.figures("plain", "spectrum gap") == [0.0]
    for name in (
        "controlprefix",
        "controlprefix, task only",
        "PEFT LoRA r8",
        "prefix, then LoRA",
        "controlprefix, decoupled",
        "prefix memory",
    ):
        assert result.figures(name, "divergence, off") == [0.0]
        if name in ("controlprefix, decoupled", "prefix memory"):
            continue  # two steps from zero
        assert result.figures(name, "divergence, written")[0] > 0
    for name in ("full fine-tuning", "BitFit", "LoRA, then prefix"):
        assert not result.figures(name, "divergence, off")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_losses_are_those_of_the_library(name: str) -> None:
    cp = engine(name)
    rows = greetings(8)
    plain = [row.model_copy(update={"task": None, "attributes": {}}) for row in rows]
    split = comparison_setup(cp, rows)
    from controlprefix.evaluation.comparison.measures import nats_per_token as measured

    assert measured(Method(split), rows) == pytest.approx(nats_per_token(cp, plain), abs=1e-5)
    method = ControlPrefixMethod(split, parameterization="direct")
    method.train(rate=0.1, seed=3)
    own = nats_per_token(method.cp, rows[14:])
    assert measured(method, rows[14:]) == pytest.approx(own, abs=1e-5)
    assert own != pytest.approx(nats_per_token(cp, plain[14:]), abs=1e-3)


def test_prefix_memory_adds_a_product_with_the_query() -> None:
    cp = engine("gpt2")  # whose queries have no rotation
    method = PrefixMemory(comparison_setup(cp, greetings(8)))
    model: Any = method.add_adapter(copy.deepcopy(cp.model), [])
    layer, outputs = model.transformer.h[0].attn, []
    layer.c_attn.register_forward_hook(lambda _, inputs, output: outputs.append(output))
    layer.c_proj.register_forward_pre_hook(lambda _, inputs: outputs.append(inputs[0]))
    ids = tokens(5)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, cp.model(ids).logits)
        layer.prefix_memory.matrices.normal_(generator=torch.Generator().manual_seed(0))
        model(ids)
    states, before, _, after = outputs
    num_heads = layer.num_heads
    queries = states.split(states.shape[2] // 3, dim=2)[0].unflatten(2, (num_heads, -1))
    products = torch.nn.functional.elu(queries)[:, :, :, None] @ layer.prefix_memory.matrices
    assert torch.allclose(after - before, products.flatten(2), atol=1e-5)


@pytest.mark.slow
def test_an_interrupted_comparison_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cp, rows, trained = engine(), greetings(8), []
    train = ControlPrefixMethod.train

    def counted(self: ControlPrefixMethod, *, rate: float, seed: int) -> None:
        trained.append(rate)
        if len(trained) == 2:
            raise KeyboardInterrupt
        train(self, rate=rate, seed=seed)

    monkeypatch.setattr(ControlPrefixMethod, "train", counted)
    names = ["controlprefix, task only", "controlprefix"]
    settings = {**COMPARISON, "methods": names, "folder": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        compare(cp, rows, **settings)
    first = json.loads((tmp_path / "comparison.json").read_text())["methods"][names[0]]
    result = compare(cp, rows, **settings)
    assert len(trained) == 3
    assert result.methods[names[0]] == first
    assert list(result.methods) == names
    with pytest.raises(StoreError, match="holds a comparison with another steps"):
        compare(cp, rows, **{**settings, "steps": 3})


@pytest.mark.slow
def test_another_classifier_is_another_comparison(tmp_path: Path) -> None:
    class Fixed:
        attribute, labels = "formality", ("formal", "informal")

        def __init__(self, probability: float) -> None:
            self.probability = probability

        def probabilities(self, texts: Sequence[str]) -> torch.Tensor:
            return torch.tensor([[self.probability, 1 - self.probability]] * len(texts))

    settings = {**COMPARISON, "methods": ["plain"], "folder": tmp_path}
    first: Any = Fixed(0.9)
    compare(engine(), greetings(8), classifiers=[first], **settings)
    compare(engine(), greetings(8), classifiers=[first], **settings)
    with pytest.raises(StoreError, match="another classifiers"):
        compare(engine(), greetings(8), classifiers=[Fixed(0.1)], **settings)  # type: ignore[list-item]


@pytest.mark.slow
def test_rows_with_numbers_and_mixtures_as_labels_are_those_of_the_library(tmp_path: Path) -> None:
    rows = [
        Example(prompt=f"Write {n}", completion="word " * n, task="t", attributes={"words": str(n)})
        for n in range(1, 13)
    ]
    own = ComparisonSetup(
        engine().frozen_model, rows, rows, rows, steps=4, batch_size=6, num_slots=2
    )
    method = ControlPrefixMethod(own)
    method.train(rate=0.01, seed=0)
    (expected,) = method.cp.score([rows[1]])  # between two numbers that were learned
    nats = measures.nats_per_token(method, rows[1:2])
    assert nats == pytest.approx(-expected.log_likelihood / expected.num_tokens, abs=1e-4)
    mixed = [
        row.model_copy(update={"attributes": {"formality": {"formal": 0.5, "informal": 0.5}}})
        for row in greetings(8)
    ]
    report = compare(engine(), mixed, methods=["plain"], **COMPARISON)
    assert "0.5 formal + 0.5 informal" in report.save(tmp_path).read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_method_that_fails_ends_no_other_and_runs_are_those_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Any, *, rate: float, seed: int) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(ControlPrefixMethod, "train", fails)
    settings = {**COMPARISON, "folder": tmp_path, "methods": ["controlprefix", "plain"]}
    report = compare(engine(), greetings(8), **settings)
    assert report.skipped == {"controlprefix": "DefaultCPUAllocator: can't allocate memory"}
    assert report.methods["plain"]["runs"]
    alone = compare(engine(), greetings(8), **{**settings, "methods": ["plain"]})
    assert alone.methods.keys() == {"plain"}
    monkeypatch.undo()
    both = {**settings, "methods": ["controlprefix, direct"], "seeds": (0, 1)}
    assert compare(engine(), greetings(8), **both).methods["controlprefix, direct"][
        "runs"
    ].keys() == {"0", "1"}
    first = {**both, "seeds": (1,)}
    assert compare(engine(), greetings(8), **first).methods["controlprefix, direct"][
        "runs"
    ].keys() == {"1"}


@pytest.mark.slow
def test_the_learning_rate_is_that_of_the_lowest_validation_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {**COMPARISON, "methods": ["controlprefix"], "num_rates": 3, "seeds": (0, 1)}
    rates: dict[int, list[float]] = {}
    train = ControlPrefixMethod.train

    def noting(self: Any, *, rate: float, seed: int) -> None:
        rates.setdefault(seed, []).append(rate)
        train(self, rate=rate, seed=seed)

    monkeypatch.setattr(ControlPrefixMethod, "train", noting)
    method = compare(engine(), greetings(8), **settings).methods["controlprefix"]
    losses = method["validation"]
    assert len(set(losses.values())) == len(rates[0]) == 3
    assert rates[1] == [float(min(losses, key=losses.__getitem__))]
    assert list(method["runs"]) == ["0", "1"]


@pytest.mark.slow
def test_rates_are_those_of_the_first_seed(tmp_path: Path) -> None:
    settings = {**COMPARISON, "methods": ["controlprefix"], "num_rates": 2, "folder": tmp_path}
    compare(engine(), greetings(8), **{**settings, "seeds": (0, 1)})
    with pytest.raises(StoreError, match="chosen with seed 0; begin seeds with it"):
        compare(engine(), greetings(8), **{**settings, "seeds": (1, 2)})
    again = compare(engine(), greetings(8), **{**settings, "seeds": (1,)}).methods
    assert again["controlprefix"]["runs"].keys() == {"1"}  # it was measured before


@pytest.mark.slow
def test_texts_of_all_methods_are_greedy_whatever_the_generation_config_says() -> None:
    cp = engine()
    frozen = cp.frozen_model
    prompts = [frozen.request_tokenizer.prompt_ids(Request(prompt="abcabcabcabc"))] * 2
    options: dict[str, Any] = {"max_new_tokens": 8, "seed": 0}
    written = [sample(cp.model, frozen, prompts, temperature=t, **options) for t in (None, 0.8)]
    text = cp.prefix_from_text("abc abc abc abc abc")
    own = PrivacyAuditor(frozen).extraction_rate(["abc " * 40], text)
    cp.model.generation_config.update(
        repetition_penalty=9.0, no_repeat_ngram_size=1, top_k=1, stop_strings=["a"]
    )
    again = [sample(cp.model, frozen, prompts, temperature=t, **options) for t in (None, 0.8)]
    assert again == written
    assert PrivacyAuditor(frozen).extraction_rate(["abc " * 40], text) == own


@pytest.mark.slow
def test_a_learning_rate_that_diverges_loses_and_ends_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train = ControlPrefixMethod.train

    def diverges(self: ControlPrefixMethod, *, rate: float, seed: int) -> None:
        if rate in diverging:
            raise TrainingDataError("the loss is nan at step 1; nothing was stored")
        train(self, rate=rate, seed=seed)

    monkeypatch.setattr(ControlPrefixMethod, "train", diverges)
    settings = {**COMPARISON, "methods": ["controlprefix"], "num_rates": 3}
    diverging: set[float] = {5e-4, 1e-3}
    method = compare(engine(), greetings(8), **settings).methods["controlprefix"]
    assert [rate for rate, loss in method["validation"].items() if loss is None] == [
        "0.0005",
        "0.001",
    ]
    assert method["runs"]
    diverging = {2.5e-4, 5e-4, 1e-3}
    result = compare(engine(), greetings(8), **settings)
    assert result.skipped == {"controlprefix": "it diverges at every learning rate"}


@pytest.mark.slow
def test_rows_of_a_label_that_was_not_trained_are_measured_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = greetings(8)
    unseen = [rows[0].model_copy(update={"attributes": {"formality": "rude"}}), rows[1]]
    names = ["controlprefix", "controlprefix, nearest label", "PEFT LoRA r8"]
    stand_ins = []

    def nearest(label: Any, *_: Any, **__: Any) -> NearestLabels:
        stand_ins.append(label.label)
        return NearestLabels({"informal": 1.0}, 0.9)

    monkeypatch.setattr(unseen_labels, "nearest_labels", nearest)
    result = compare(engine(), rows, test=unseen, **{**COMPARISON, "methods": names})
    for name in names:
        assert result.figures(name, "nats, unseen")
    assert not result.skipped
    assert set(stand_ins) == {"rude"}
    left_out, replaced, _ = (result.figures(name, "nats, unseen")[0] for name in names)
    assert left_out != pytest.approx(replaced, abs=1e-4)
    result = compare(engine(), rows, **{**COMPARISON, "methods": names[:2]})
    assert "no label that was not trained" in result.skipped["controlprefix, nearest label"]


@pytest.mark.slow
def test_a_prefix_that_knows_its_prompts_does_nothing_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def embed(texts: Sequence[str], embedder: str = "") -> torch.Tensor:
        """A direction for texts about boats, others for all others."""
        axes = [0 if "boat" in text else 1 + sum(map(ord, text)) % 40 for text in texts]
        return torch.nn.functional.one_hot(torch.tensor(axes), 64).float()

    monkeypatch.setattr(relevance, "embed", embed)
    rows = [Example(prompt=f"The boat {c}", completion=f" {c} sails") for c in ascii_lowercase]
    names = ["controlprefix", "controlprefix, when relevant"]
    result = compare(engine(), rows, **{**COMPARISON, "methods": names})
    assert not result.skipped
    always, gated = names
    assert result.figures(always, "nats") == pytest.approx(result.figures(gated, "nats"), abs=1e-4)
    for key in ("divergence, written", "divergence, answers"):
        assert result.figures(always, key)[0] > 1e-4
        assert result.figures(gated, key) == [0.0]
    without = [row.model_copy(update={"prompt": "", "raw": True}) for row in rows]
    result = compare(engine(), without, **{**COMPARISON, "methods": names})
    assert result.skipped == {gated: "the rows have no prompts by which to tell when it is meant"}


@pytest.mark.slow
def test_what_does_not_fit_the_memory_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        available = 1000

    monkeypatch.setattr(psutil, "virtual_memory", Full)
    names = ["plain", "full fine-tuning"]
    result = compare(engine(), greetings(8), **{**COMPARISON, "methods": names})
    assert "GB of memory" in result.skipped["full fine-tuning"]
    assert result.figures("plain", "nats")
    assert "GB of memory" in result.markdown()
    settings = {**COMPARISON, "methods": names, "folder": tmp_path}
    assert compare(engine(), greetings(8), **settings).skipped
    monkeypatch.undo()
    files = tmp_path / "memory.max", tmp_path / "memory.current"
    for file, text in zip(files, ("2000", "1500"), strict=True):
        file.write_text(text)
    with monkeypatch.context() as patch:  # in a container
        patch.setattr(method_runner, "_CGROUP_FILES", (files, (tmp_path / "none",) * 2))
        assert method_runner._available_bytes() == 500
        assert "GB of memory" in compare(engine(), greetings(8), **settings).markdown()
        files[0].write_text("max")
        assert method_runner._available_bytes() > 10**6
    assert not compare(engine(), greetings(8), **settings).skipped  # there is more memory now
    monkeypatch.setattr(psutil, "virtual_memory", Full)
    assert not compare(engine(), greetings(8), **settings).skipped  # it was measured
