"""Prefixes as a module that other libraries' loops can train."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from controlprefix import ControlPrefix, Example, Request, TrainingDataError
from controlprefix.data import as_examples
from controlprefix.prefixes import PrefixKey

from helpers import engine, greetings, nats_per_token
from image_models import image_model, picture


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_its_parameters_are_those_of_the_prefixes_alone() -> None:
    cp = engine()
    model = cp.trainable(greetings(), num_slots=4)
    assert set(model.keys) == {
        PrefixKey("task", "greet"),
        PrefixKey("attribute", "formality=formal"),
        PrefixKey("attribute", "formality=informal"),
    }
    own = {id(p) for p in model.parameters()}
    assert own
    assert not own & {id(p) for p in cp.model.parameters()}
    assert all(p.requires_grad for p in model.parameters())
    assert not any(name.startswith("model.") for name in model.state_dict())
    assert model.config is cp.model.config


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_its_loss_is_the_score_of_the_published_prefixes(name: str) -> None:
    cp = engine(name)
    rows = greetings(3)
    model = cp.trainable(rows, num_slots=3, init="random", parameterization="direct")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    batch = model.collate([model.features(row) for row in rows])
    logits = model(**batch).logits
    model.publish()
    with torch.no_grad(), cp.assembled([row.model_copy() for row in rows]):
        ids = {name: batch[name] for name in ("input_ids", "attention_mask")}
        if cp.frozen_model.is_encoder_decoder:
            ids["labels"] = batch["labels"]
        expected = cp.model(**ids).logits
    torch.testing.assert_close(logits, expected)


def test_a_row_attends_to_its_own_prefixes_only() -> None:
    cp = engine()
    rows = greetings(2)
    model = cp.trainable(rows, num_slots=3)
    features = [model.features(row) for row in rows]
    together = model(**model.collate(features)).logits
    for i, row in enumerate(features):
        alone = model(**model.collate([row])).logits[0]
        torch.testing.assert_close(together[i, : len(alone)], alone, atol=1e-5, rtol=1e-5)
    direct = cp.trainable(rows, num_slots=3, parameterization="direct")
    direct(**direct.collate([direct.features(rows[0])])).loss.backward()
    gradients = [p.grad is not None and bool(p.grad.any()) for p in direct.parameters()]
    assert sorted(gradients) == [False, True, True]  # the task's and one label's


@pytest.mark.slow
def test_a_bare_loop_learns_and_freezes_the_model() -> None:
    cp = engine()
    rows = greetings()
    before, start = weights(cp.model), nats_per_token(cp, rows_without_prefixes(rows))
    model = cp.trainable(rows, num_slots=4, init="random")
    batch = model.collate([model.features(row) for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    for _ in range(30):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    saved = model.publish()
    assert set(saved.values()) == {1}
    assert nats_per_token(cp, rows) < start - 0.5
    assert all(torch.equal(before[name], value) for name, value in cp.model.state_dict().items())
    (info,) = cp.versions("task", "greet")
    assert info.details["training"]["loop"] == "own"


def rows_without_prefixes(rows: list[Example]) -> list[Example]:
    return [row.model_copy(update={"task": None, "attributes": {}}) for row in rows]


@pytest.mark.slow
def test_transformers_trainer_trains_it(tmp_path: Path) -> None:
    cp = engine()
    rows = greetings()
    model = cp.trainable(rows, num_slots=4)
    before = weights(cp.model)
    dataset = [model.features(row) for row in rows]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(tmp_path),
            max_steps=20,
            learning_rate=2e-2,
            per_device_train_batch_size=4,
            remove_unused_columns=False,
            report_to=[],
            use_cpu=True,
            save_steps=10,
            disable_tqdm=True,
        ),
        train_dataset=dataset,
        eval_dataset=dataset,
        data_collator=model.collate,
    )
    start = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < start - 0.5
    assert all(torch.equal(before[name], value) for name, value in cp.model.state_dict().items())
    saved = sum(f.stat().st_size for f in (tmp_path / "checkpoint-20").glob("*model*"))
    assert saved < 2 * sum(p.numel() * 4 for p in model.parameters())  # without the frozen model


@pytest.mark.slow
def test_trl_trains_it_on_texts_and_on_preferences(tmp_path: Path) -> None:
    import datasets
    import trl

    library: Any = trl  # its types ask for models of transformers
    cp = engine()
    before = weights(cp.model)
    texts = [{"prompt": f"Greet {i} ", "completion": "Good day."} for i in range(16)]
    options: dict[str, Any] = {
        "max_steps": 20, "per_device_train_batch_size": 4, "learning_rate": 2e-2, "report_to": [],
        "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True,
    }  # fmt: skip
    examples = as_examples(texts, defaults={"task": "greet"})
    model = cp.trainable(texts, task="greet", num_slots=4)
    library.SFTTrainer(
        model=model,
        args=library.SFTConfig(str(tmp_path), **options),
        train_dataset=datasets.Dataset.from_list(texts),
        processing_class=cp.tokenizer,
    ).train()
    plain = nats_per_token(cp, rows_without_prefixes(examples))
    model.publish()
    tuned = nats_per_token(cp, examples)
    assert tuned < plain - 0.5

    pairs = [
        {"prompt": text["prompt"], "chosen": text["completion"], "rejected": "hey you"}
        for text in texts
    ]
    model = cp.trainable(texts, task="greet", num_slots=4, init="stored")
    trainer = library.DPOTrainer(
        model=model,
        ref_model=cp.model,
        args=library.DPOConfig(str(tmp_path), logging_steps=20, **options),
        train_dataset=datasets.Dataset.from_list(pairs),
        processing_class=cp.tokenizer,
    )
    trainer.train()
    (log,) = [entry for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert log["rewards/margins"] > 0.5
    assert all(torch.equal(before[name], value) for name, value in cp.model.state_dict().items())


def test_it_generates_as_it_stands() -> None:
    cp = engine()
    model = cp.trainable(greetings(), num_slots=4, learn="task")
    ids = torch.tensor([[5, 6, 7]])
    texts = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(inputs=ids, max_new_tokens=4, do_sample=False), texts)
    with pytest.raises(TrainingDataError, match="give input_ids or inputs_embeds"):
        model.generate(max_new_tokens=4)
    model.publish()
    with cp.assembled(Request(prompt="x", task="greet")):
        assert torch.equal(texts, cp.model.generate(ids, max_new_tokens=4, do_sample=False))  # type: ignore[operator]


@pytest.mark.slow
def test_rows_that_name_nothing_and_unknown_prefixes_are_refused() -> None:
    cp = engine()
    model = cp.trainable(greetings(), num_slots=2)
    with pytest.raises(TrainingDataError, match="names none of what is trained"):
        model.features(Example(prompt="x", completion="y", task="other"))
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(TrainingDataError, match="give input_ids"):
        model()
    with pytest.raises(TrainingDataError, match="prefix_strengths must have the shape"):
        model(ids, prefix_ids=torch.tensor([[0]]), prefix_strengths=torch.ones(1, 2))
    for wrong, message in (
        ([[3]], "prefix_ids has 3"),
        ([[0], [1]], "2 rows for 1 rows"),
        ([0], "must be a tensor of shape"),
    ):
        with pytest.raises(TrainingDataError, match=message):
            model(ids, prefix_ids=torch.tensor(wrong))


def test_a_decoder_starts_as_the_library_starts_it() -> None:
    cp = engine("bart")
    cp.model.generation_config.forced_bos_token_id = 7
    rows = [Example(prompt="x", completion="ab", task="t")]
    model = cp.trainable(rows, num_slots=2)
    (inputs,) = (model.features(row) for row in rows)
    tokenizer = cp.frozen_model.request_tokenizer
    assert tokenizer.decoder_start_ids[1:] == (7,)
    assert inputs["labels"] == [7, *tokenizer.inner_ids("ab"), tokenizer.end_id]


def test_rows_with_images_are_refused() -> None:
    model, tokenizer, processor = image_model("llava")
    cp = ControlPrefix.from_pretrained(
        model, tokenizer=tokenizer, processor=processor, store="sqlite://"
    )
    row = Example(prompt="What?", images=[picture(1)], completion="one", task="t")
    trainable = cp.trainable([row], num_slots=2)
    with pytest.raises(TrainingDataError, match="rows with images"):
        trainable.features(row)


@pytest.mark.slow
def test_rows_have_their_strengths_and_mixtures() -> None:
    cp = engine()
    rows = [
        {"prompt": f"D {i}", "completion": "w", "task": "d", "attributes": {"n": i}}
        for i in range(20)
    ]
    model = cp.trainable(rows, num_slots=2)
    features = [model.features(example) for example in as_examples(rows)]
    for i, row in enumerate(features):
        shares = {
            model.keys[number].label: strength
            for number, strength in zip(row["prefix_ids"], row["prefix_strengths"], strict=True)
            if model.keys[number].kind == "attribute"
        }
        assert sum(shares.values()) == pytest.approx(1)
        mean = sum(float(label) * strength for label, strength in shares.items())
        assert mean == pytest.approx(i, abs=1e-4)
    mixed = cp.trainable(greetings(2), num_slots=2)
    weights = {"formality": {"formal": 0.2, "informal": 0.8}}
    example = Example(prompt="a", completion="b", task="greet", attributes=weights)
    batch = mixed.collate([mixed.features(example), mixed.features(greetings(1)[0])])
    logits = mixed(**batch).logits[0]
    mixed.publish()
    with torch.no_grad(), cp.assembled(example):
        expected = cp.model(batch["input_ids"][:1]).logits[0]
    length = int(batch["attention_mask"][0].sum())
    torch.testing.assert_close(logits[:length], expected[:length], atol=1e-5, rtol=1e-5)
    absent = example.model_copy(update={"strengths": {"task": 0.0}})
    assert PrefixKey("task", "greet") not in {
        mixed.keys[number] for number in mixed.features(absent)["prefix_ids"]
    }
