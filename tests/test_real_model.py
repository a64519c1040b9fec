"""The same claims on SmolLM2-135M-Instruct, the model that pip installs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from controlprefix import ControlPrefix, Example, Prefix, Request
from controlprefix.data import as_examples
from controlprefix.evaluation import AttributeClassifier
from controlprefix.model.loading import packaged_model
from controlprefix.model.probing import probe

pytestmark = pytest.mark.slow

DATA = Path(__file__).parent.parent / "controlprefix" / "cli" / "demo_data"
PIRATE = "You are a pirate. You talk like a pirate, matey, and you love the sea."


@pytest.fixture(scope="module")
def cp(smollm2: PreTrainedModel) -> Iterator[ControlPrefix]:
    from transformers import AutoTokenizer

    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # this model is large enough to use them
    tokenizer = AutoTokenizer.from_pretrained(packaged_model("smollm2"))
    yield ControlPrefix.from_pretrained(smollm2, tokenizer=tokenizer, store="sqlite://")
    torch.set_num_threads(threads)


def test_the_alias_names_the_model_and_not_a_folder(cp: ControlPrefix) -> None:
    assert cp.geometry.model_name == "smollm2"
    assert len(cp.geometry.decoder) == 30
    assert cp.geometry.slot_size("decoder") == 30 * 2 * 3 * 64


def test_a_prefix_from_a_text_equals_prompting_with_it(cp: ControlPrefix) -> None:
    then = " The first thing I do in the morning is"
    before, after = (cp.tokenizer(text)["input_ids"] for text in (PIRATE, then))
    cp.put("attribute", "tone=pirate", cp.prefix_from_text(PIRATE))
    with torch.no_grad():
        expected = cp.model(torch.tensor([before + after])).logits[0, len(before) :]
        with cp.assembled(Request(prompt="-", attributes={"tone": "pirate"})):
            steered = cp.model(torch.tensor([after])).logits[0]
        plain = cp.model(torch.tensor([after])).logits[0]
    assert (steered - expected).abs().max() < 5e-4
    assert (plain - expected).abs().max() > 1


def test_a_mixed_batch_gives_each_row_what_it_gets_alone(cp: ControlPrefix) -> None:
    cp.put("attribute", "tone=pirate", cp.prefix_from_text(PIRATE))
    cp.enroll("ana", ["omg i love this sooo much!! xo ana", "haha see you soon!! xo ana"])
    requests = [
        Request(prompt="Who are you?", max_new_tokens=12),
        Request(
            prompt="Tell me about the weather in the north.",
            attributes={"tone": "pirate"},
            strengths={"tone": 0.5},
            max_new_tokens=16,
        ),
        Request(prompt="Hi!", user="ana", temperature=0.8, top_p=0.95, seed=3, max_new_tokens=10),
    ]
    together = cp.generate(requests)
    assert together == [cp.generate(request) for request in requests]
    assert "".join(cp.stream(requests[1])) == together[1].text


def test_a_few_steps_teach_two_labels_and_leave_the_model_alone(cp: ControlPrefix) -> None:
    texts = {"polite": "I would be most grateful, thank you.", "rude": "Hurry up, you fool."}
    examples = [
        Example(prompt="Ask for help.", attributes={"manner": label}, completion=text)
        for label, text in texts.items()
    ]
    before = [s.log_likelihood for s in cp.score([_plain(e) for e in examples])]
    cp.train(
        examples * 2,
        learn=("attributes",),
        num_slots=4,
        steps=12,
        batch_size=4,
        validation=0,
        progress=False,
    )
    after = [s.log_likelihood for s in cp.score(examples)]
    swapped = [
        e.model_copy(update={"attributes": {"manner": other}})
        for e, other in zip(examples, ("rude", "polite"), strict=True)
    ]
    crossed = [s.log_likelihood for s in cp.score(swapped)]
    for plain, right, invalid in zip(before, after, crossed, strict=True):
        assert right > plain + 5
        assert right > invalid + 5
    assert probe(cp.model)[0].fingerprint == cp.geometry.fingerprint


def _plain(example: Example) -> Example:
    return example.model_copy(update={"attributes": {}})


def test_an_instruction_distills_into_a_prefix_without_labelled_data(cp: ControlPrefix) -> None:
    instruction = "Answer like an old pirate. Say arr and matey."
    request = ["Where do you live?", "What is for dinner?", "How is the weather?", "Who are you?"]
    new = ["What do you like to drink?", "Where is the captain?"]
    text = [Request(prompt=f"{instruction}\n\n{item}", max_new_tokens=20) for item in new]
    answers = [item.text for item in cp.generate(text)]
    before = cp.model.state_dict()["model.layers.0.self_attn.q_proj.weight"].clone()
    report = cp.distill(
        instruction,
        request,
        attribute="tone",
        label="distilled",
        max_new_tokens=16,
        num_slots=8,
        steps=8,
        batch_size=4,
        validation=0,
        progress=False,
    )
    assert report.losses[-1] < 0.7 * report.losses[0]
    with_it, bare = (
        sum(
            score.log_likelihood
            for score in cp.score(
                [
                    Example(prompt=prompt, completion=answer, attributes=attributes)
                    for prompt, answer in zip(new, answers, strict=True)
                ]
            )
        )
        for attributes in ({"tone": "distilled"}, {})
    )
    assert with_it > bare + 3
    assert torch.equal(cp.model.state_dict()["model.layers.0.self_attn.q_proj.weight"], before)


def test_a_classifier_of_real_embeddings_tells_formal_from_casual(cp: ControlPrefix) -> None:
    train, test = (as_examples(DATA / f"messages.{split}.jsonl") for split in ("train", "heldout"))
    texts, labels = zip(*((r.completion, r.attributes["formality"]) for r in train), strict=True)
    classifier = AttributeClassifier.train("formality", texts, labels)
    chances = classifier.probabilities([row.completion for row in test])
    right = [
        classifier.labels[int(best)] == row.attributes["formality"]
        for best, row in zip(chances.argmax(1), test, strict=True)
    ]
    assert sum(right) / len(right) > 0.8


def test_a_user_is_enrolled_from_a_decoder_in_a_kilobyte(cp: ControlPrefix) -> None:
    texts: dict[str, list[str]] = {}
    for row in as_examples(DATA / "users.train.jsonl"):
        texts.setdefault(str(row.user), []).append(row.completion)
    names = sorted(texts)
    # Twelve who write like the three of them.
    many = {f"{name}{i}": texts[name][4 * i : 4 * i + 2] for i in range(4) for name in names}
    quick: dict[str, Any] = {"steps": 4, "batch_size": 8, "validation": 0, "progress": False}
    report = cp.learn_decoder(many, num_slots=8, width=32, **quick)
    assert report.num_users == len(many)
    for name in names:
        cp.enroll(name, texts[name][:4], decoder="users", keep_profile=True)
        assert cp.versions("user", name)[-1].size_bytes < 1200
    assert cp.similar_users(texts["ana"][4:8])[0].user == "ana"
    row = Example(prompt="", raw=True, completion=texts["bo"][20])
    with_it, without = cp.score([row.model_copy(update={"user": "bo"}), row])
    assert with_it.log_likelihood > without.log_likelihood
    for name in names:
        cp.forget_user(name)


def test_pefts_prefix_tuning_is_a_prefix_and_back(cp: ControlPrefix, tmp_path: Path) -> None:
    import peft

    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, num_attention_heads=3, token_dim=3 * 64
    )
    model = peft.get_peft_model(cp.model, config)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.normal_()
    model.eval().save_pretrained(str(tmp_path))
    ids = torch.tensor([cp.tokenizer("The first thing I do in the morning is")["input_ids"]])
    with torch.no_grad():
        expected = model(ids).logits
    prefix = Prefix.from_peft(tmp_path, cp.geometry)
    cp.put("task", "from peft", prefix)
    with torch.no_grad(), cp.assembled(Request(prompt="-", task="from peft")):
        steered = cp.model(ids).logits
    assert (steered - expected).abs().max() < 5e-4
    cp.save_peft(Request(prompt="-", task="from peft"), tmp_path / "again")
    again = Prefix.from_peft(tmp_path / "again", cp.geometry)
    torch.testing.assert_close(again.slots["decoder"], prefix.slots["decoder"])
