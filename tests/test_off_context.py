"""Off-context rows: the plain model's own texts, which keep it as it is elsewhere."""

from typing import Any

import pytest
import torch

from controlprefix import (
    TrainingDataError,
)
from controlprefix.evaluation.comparison.methods import ControlPrefixMethod
from controlprefix.training import off_context

from helpers import QUICK, comparison_setup, engine, greetings, nats_per_token


@pytest.mark.slow
def test_off_context_rows_leave_the_model_as_it_is_elsewhere() -> None:
    rows = [row.model_copy(update={"attributes": {}}) for row in greetings(12)]
    from controlprefix.evaluation.comparison.measures import divergence, elsewhere

    def measured(share: float) -> tuple[float, float]:
        cp = engine()
        split = comparison_setup(cp, rows)
        method = ControlPrefixMethod(split, labels=False)
        settings = {**QUICK, "steps": 30, "validation": 0, "off_context": share}
        method.cp.train(split.training, **settings)
        others = elsewhere(split, [], None, "refuse")
        value = divergence(method, others.answers)
        assert value is not None
        return value, nats_per_token(method.cp, rows[14:])

    without, own = measured(0.0)
    with_rows, own_with_rows = measured(0.3)
    assert with_rows < 0.85 * without
    assert own_with_rows < own + 0.2


@pytest.mark.slow
def test_off_context_rows_have_their_share_of_the_tokens() -> None:
    cp = engine()
    rows = [row.model_copy(update={"attributes": {}}) for row in greetings(40)]
    from controlprefix.training import TrainingSettings
    from controlprefix.training.preparation import prepare

    def prepared(share: float) -> Any:
        return prepare(
            rows,
            cp.frozen_model,
            cp._resolver,
            TrainingSettings(off_context=share, validation=0),
            learn="task",
            num_slots=2,
            init="text",
        ).rows

    plain, mixed = prepared(0.0), prepared(0.2)
    added = mixed[len(plain) :]
    assert mixed[: len(plain)] == plain
    tokens = sum(len(row.targets) for row in added)
    total = tokens + sum(len(row.targets) for row in plain)
    assert 0.2 <= tokens / total < 0.23  # the last answer may go beyond
    assert all(row.teacher == row.prompt and row.learned for row in added)
    assert prepared(0.2) == mixed
    with pytest.raises(TrainingDataError, match="decoder-only"):
        off_context.off_context_rows(engine("bart").frozen_model, plain, 0.1, 0)


@pytest.mark.slow
def test_a_model_in_training_elsewhere_draws_the_same_numbers() -> None:
    """The answers are sampled without touching the caller's random numbers."""
    cp = engine()
    rows = [row.model_copy(update={"attributes": {}}) for row in greetings(4)]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    cp.train(rows, **{**QUICK, "steps": 1, "off_context": 0.1})
    assert torch.equal(torch.rand(3), expected)
