"""Every way to produce slots begins where it should and has the right gradient."""

from typing import Any, get_args

import pytest
import torch

from controlprefix import Geometry, Prefix
from controlprefix.store import PrefixKey
from controlprefix.training import ParameterizationName, TrainingRow
from controlprefix.training.initialization import scale_of
from controlprefix.training.objectives import ContrastPair, Objective
from controlprefix.training.parameterization import Parameterization

from helpers import frozen
from models import build

PARAMETERIZATIONS: tuple[ParameterizationName, ...] = get_args(ParameterizationName)

GEOMETRY = Geometry.uniform(num_layers=2, num_kv_heads=2, head_dim=4, fingerprint="f" * 64)
TASK, FORMAL = PrefixKey("task", "note"), PrefixKey("attribute", "formality=formal")
INFORMAL = PrefixKey("attribute", "formality=informal")


def starts(geometry: Geometry = GEOMETRY, num_slots: int = 3) -> dict[PrefixKey, Prefix]:
    return {
        key: Prefix.random(geometry, num_slots=num_slots + i, scale=1.0, seed=i)
        for i, key in enumerate((TASK, FORMAL, INFORMAL))
    }


def made(name: str, start: dict[PrefixKey, Prefix], **options: int | bool) -> Parameterization:
    scale = scale_of(next(iter(start.values())))
    return Parameterization(name, start, scale, hidden_size=8, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PARAMETERIZATIONS)
def test_each_begins_exactly_at_its_start(name: str) -> None:
    start = starts()
    for prefixes in (made(name, start).prefixes(start), made(name, start).materialize()):
        assert prefixes.keys() == start.keys()
        for key, prefix in prefixes.items():
            assert torch.equal(prefix.slots["decoder"], start[key].slots["decoder"])


@pytest.mark.parametrize("model_name", ["llama", "bart", "gemma4"])
@pytest.mark.parametrize("name", PARAMETERIZATIONS)
def test_gradients_are_those_of_finite_differences(
    name: ParameterizationName, model_name: str
) -> None:
    """Through parameters, prefixes, assembly, attention and loss, at all sites."""
    model = build(model_name).double()
    steered = frozen(model)
    slots = made(name, starts(steered.geometry))
    slots.double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # away from the start, where the last layers are zero
        for parameter in slots.parameters():
            noise = torch.randn(
                parameter.shape, generator=generator, device="cpu", dtype=torch.float64
            )
            parameter.add_(noise, alpha=0.3)
    rows = [
        TrainingRow((5, 6, 7), (8, 9), (), ((TASK, 1.0), (FORMAL, 0.5))),
        TrainingRow((5,), (10, 11, 12), (), ((TASK, 1.0), (INFORMAL, 1.0))),
    ]
    objective = Objective(steered)

    def loss() -> torch.Tensor:
        pairs = [ContrastPair(row) for row in rows]
        batch = objective.assemble(pairs, slots.prefixes(slots.keys))
        with steered.attached(batch, everywhere=True):
            return objective(pairs).sum()

    loss().backward()
    parameters = list(slots.parameters())
    gradients = [p.grad for p in parameters if p.grad is not None]
    assert len(gradients) == len(parameters)
    for seed in range(3):
        generator.manual_seed(seed)
        direction = [
            torch.randn(p.shape, generator=generator, device="cpu", dtype=torch.float64)
            for p in parameters
        ]
        products = [float((g * d).sum()) for g, d in zip(gradients, direction, strict=True)]
        expected = sum(products)
        result = 0.0
        for sign in (1, -1):
            with torch.no_grad():
                for p, d in zip(parameters, direction, strict=True):
                    p.add_(d, alpha=sign * 1e-4)
                result += sign * float(loss()) / 2e-4
                for p, d in zip(parameters, direction, strict=True):
                    p.sub_(d, alpha=sign * 1e-4)
        # Losses are computed in float32: differences of 1e-7 over steps of 1e-4.
        assert result == pytest.approx(expected, rel=0.02, abs=0.02)


@pytest.mark.parametrize("name", PARAMETERIZATIONS)
def test_only_what_a_batch_needs_is_computed(name: str) -> None:
    slots = made(name, starts())
    with torch.no_grad():
        for parameter in slots.parameters():
            parameter.add_(0.1)
    result = slots.prefixes({FORMAL})
    assert result.keys() == {FORMAL}
    result[FORMAL].slots["decoder"].square().sum().backward()
    reached = {n for n, p in slots.named_parameters() if p.grad is not None}
    per_prefix = {"direct": ".slots.", "mlp": ".networks."}.get(name, ".embeddings.")
    of_a_prefix = {n for n, _ in slots.named_parameters() if per_prefix in n}
    assert {n for n in reached if per_prefix in n} == {
        n
        for n in of_a_prefix
        if f"{per_prefix}1" in n  # the second of the three
    }
    assert reached


def test_what_is_shared_between_prefixes_and_between_keys_and_values() -> None:
    """`mlp` ties nothing across prefixes; `shared` does; `shared-kv` has two networks."""
    sizes = {
        name: sum(p.numel() for p in made(name, starts()).parameters())
        for name in PARAMETERIZATIONS
    }
    slot_size, counts, width = GEOMETRY.slot_size("decoder"), (3, 4, 5), 8
    network = width * width + width + width * slot_size + slot_size
    assert sizes == {
        "direct": sum(counts) * slot_size,
        "mlp": sum(counts) * width + 3 * network,
        "shared": sum(counts) * width + network,
        "shared-kv": sum(counts) * width + network + width * width + width,
    }


def test_the_networks_keys_and_values_land_where_they_belong() -> None:
    """`shared-kv` puts its two networks' numbers back into a slot's order."""
    slots = made("shared-kv", starts())
    with torch.no_grad():
        change: Any = slots.changes["decoder"]
        network = change.networks[0]
        network.output[0].bias.fill_(1.0)  # keys
        network.output[1].bias.fill_(-1.0)  # values
    changed = slots.materialize()[TASK]
    for layer in range(2):
        keys, values = changed.layer("decoder", layer)
        first_keys, first_values = starts()[TASK].layer("decoder", layer)
        assert bool((keys > first_keys).all())
        assert bool((values < first_values).all())
