"""What a comparison measures: texts, spectra, ends and references."""

from typing import Any

import pytest
import torch

from controlprefix import (
    Example,
)
from controlprefix.evaluation.comparison import (
    adapter_training,
    measures,
)
from controlprefix.evaluation.comparison.measures import text_figures
from controlprefix.evaluation.comparison.methods import Method
from controlprefix.evaluation.simplification import sari

from helpers import comparison_setup, engine, greetings


def test_spectra_of_known_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """One direction has a rank of a tenth; ten equal ones of .9 (nine of ten are .9)."""
    cp = engine()
    texts = [Example(prompt="", raw=True, completion="twelve letters")]
    for states, rank in ((torch.ones(10, 16), 0.1), (torch.eye(10, 16), 0.9)):
        monkeypatch.setattr(adapter_training, "completion_states", lambda *_, own=states: [own])
        measured = measures.spectrum(Method(comparison_setup(cp, greetings(8))), texts)
        assert measured is not None
        assert measured.rank == pytest.approx(rank)
        assert measured.gap(measured) == 0.0


def test_bleu_of_rows_with_different_numbers_of_references() -> None:
    import sacrebleu

    long = "a much longer text with nine words in it"
    rows = [
        Example(prompt="A", completion="the cat sat on the mat"),
        Example(prompt="A", completion="a cat was sitting there"),
        Example(prompt="B", completion=long),
    ]
    texts = ["the cat sat on the mat", "a much longer text"]
    figures = text_figures(rows, [rows[0], rows[2]], texts)
    references: Any = [[rows[0].completion, long], [rows[1].completion, None]]
    assert figures["BLEU"] == pytest.approx(sacrebleu.corpus_bleu(texts, references).score)
    assert figures["BLEU"] < 80  # the second text is too short
    assert figures["chrF"] == pytest.approx(sacrebleu.corpus_chrf(texts, references).score)


@pytest.mark.parametrize(
    ("texts", "has_bleu"),
    [(["水上餐厅提供中国菜"], True), (["Кот сидит на ковре"], True), (["Cat 14."], False)],
)
def test_the_same_text_has_full_marks_in_any_script(texts: list[str], has_bleu: bool) -> None:
    rows = [Example(prompt="A", completion=text) for text in texts]
    figures = text_figures(rows, rows, texts)
    assert figures.get("BLEU") == (pytest.approx(100) if has_bleu else None)
    overlaps = {name: figures[name] for name in ("ROUGE-1", "ROUGE-L", "chrF")}
    assert set(overlaps.values()) == {100}


def test_rewritten_prompts_are_measured_as_such() -> None:
    source = "The committee resolved to adjourn the meeting."
    rows = [Example(prompt=source, completion="The committee ended the meeting.")]
    texts = ["The committee stopped the meeting."]
    figures = text_figures(rows, rows, texts)
    assert figures["SARI"] == pytest.approx(sari([source], texts, [[rows[0].completion]]))
    assert figures["ROUGE-1"] == pytest.approx(80)  # 4 of 5 words
    assert figures["ROUGE-2"] == pytest.approx(50)  # 2 of 4 pairs
    for prompt in ("What did they do?", "| meeting : ended by : the committee"):
        others = [Example(prompt=prompt, completion="The committee ended the meeting.")]
        assert "SARI" not in text_figures(others, others, texts)


def test_texts_end_where_completions_end() -> None:
    cp = engine("llama")
    frozen = cp.frozen_model
    frozen.model.generation_config.eos_token_id = None  # as some GGUF files are loaded
    end = frozen.request_tokenizer.end_id
    head = frozen.model.get_output_embeddings().weight
    with torch.no_grad():
        head[end] = 0
        head[end] += 50 * torch.randn(head.shape[1], generator=torch.Generator().manual_seed(0))
    lengths = []
    for seed in range(20):
        text = adapter_training.sample(
            frozen.model, frozen, [[5, 6]], max_new_tokens=12, seed=seed, temperature=1.0
        )[0]
        lengths.append(len(frozen.tokenizer(text)["input_ids"]))
    assert min(lengths) < 4


def test_spectra_are_those_of_the_same_text_however_rows_are_batched() -> None:
    cp = engine(hidden_size=64, head_dim=16)  # more dimensions than the texts have tokens
    texts = [
        Example(prompt="Hi", completion="word " * (3 + i), task="t", attributes={"tone": label})
        for i, label in enumerate(("warm", "cold", "warm", "cold"))
    ]

    class InTwoGroups(Method):
        def group(self, row: Example) -> str | None:
            return str(len(row.completion) % 2)

    together = measures.spectrum(Method(comparison_setup(cp, greetings(8))), texts)
    apart = measures.spectrum(InTwoGroups(comparison_setup(cp, greetings(8))), texts)
    assert together is not None
    assert apart is not None
    assert len({len(own) for own in together.cumulated}) == 4
    assert apart.gap(together) == pytest.approx(0, abs=1e-4)
