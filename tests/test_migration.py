"""Migration: users of one model get codes of another, learned from those who have both."""

from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from controlprefix import ControlPrefix, Prefix, TrainingDataError, UnknownNameError
from controlprefix.prefixes import PrefixKey
from controlprefix.prefixes.user_code import PrefixDecoder, UserCode
from controlprefix.store import NewVersion
from controlprefix.training.initialization import scale_of
from controlprefix.users.migration import fit_code_map

from helpers import engine, raw

SLOTS, OLD_WIDTH, NEW_WIDTH = 3, 4, 5


def related_codes(num_users: int, noise: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Old and new codes that depend on two traits of each user."""
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    traits = random(num_users, 2)
    old = 1 + traits @ random(2, SLOTS * OLD_WIDTH)
    new = -2 + traits @ random(2, SLOTS * NEW_WIDTH)
    return old, new + noise * random(*new.shape)


def test_a_linear_relation_is_found() -> None:
    old, new = related_codes(40)
    code_map = fit_code_map(old[:20], new[:20])
    assert code_map.r2 > 0.999
    predicted = torch.stack([code_map(code) for code in old[20:]])
    assert torch.allclose(predicted, new[20:].double(), atol=0.01)


def test_r2_is_that_of_users_who_are_left_out() -> None:
    old, new = related_codes(12, noise=0.5)
    code_map = fit_code_map(old, new)
    assert 0 < code_map.r2 < 1
    # Explicitly, with the penalty that the fit on all users chose: the closed form of one penalty.
    from controlprefix.users import migration

    errors = []
    for penalty in migration._PENALTIES:
        error = baseline = 0.0
        for i in range(12):
            rest = [j for j in range(12) if j != i]
            inputs, targets = old[rest].double(), new[rest].double()
            centred, mean = inputs - old.double().mean(0), targets.mean(0)
            scale = torch.linalg.eigvalsh(
                (old.double() - old.double().mean(0)) @ (old.double() - old.double().mean(0)).T
            ).mean()
            joined = torch.cat([centred, torch.ones(11, 1)], dim=1)
            weights = torch.linalg.solve(
                joined.T @ joined
                + penalty * scale * torch.diag(torch.tensor([1.0] * 12 + [0.0]).double()),
                joined.T @ targets,
            )
            own = torch.cat([old[i].double() - old.double().mean(0), torch.ones(1)])
            error += float((new[i].double() - own @ weights).square().sum())
            baseline += float((new[i].double() - mean).square().sum())
        errors.append(1 - error / baseline)
    assert code_map.r2 == pytest.approx(max(0.0, *errors), abs=1e-6)


def test_what_tells_nothing_gives_the_mean() -> None:
    draw = torch.Generator().manual_seed(1)
    old, new = torch.randn(30, 50, generator=draw), torch.randn(30, 20, generator=draw)
    code_map = fit_code_map(old, new)
    assert code_map.r2 < 0.05
    assert torch.allclose(code_map(torch.zeros(50)), new.double().mean(0), atol=0.2)
    with pytest.raises(TrainingDataError, match="7 users"):
        fit_code_map(old[:7], new[:7])


def put_decoder(cp: ControlPrefix, width: int, seed: int) -> PrefixDecoder:
    start = Prefix.random(cp.geometry, num_slots=SLOTS, scale=0.5, seed=seed)
    decoder = PrefixDecoder(start, scale_of(start), width=width, hidden_size=8, seed=seed)
    key = PrefixKey("decoder", "users")
    cp.store.put([NewVersion(key, decoder)])
    stored = cp.store.for_model(cp.geometry.fingerprint).get(key).value
    assert isinstance(stored, PrefixDecoder)
    return stored


def put_code(cp: ControlPrefix, decoder: PrefixDecoder, user: str, values: torch.Tensor) -> None:
    code = UserCode(decoder.content_hash, values.reshape(SLOTS, -1))
    cp.store.put([NewVersion(PrefixKey("user", user), code, dtype="float32")])


@pytest.fixture
def both(url: str) -> tuple[ControlPrefix, ControlPrefix]:
    """Two models and a store: 30 users with old codes, 12 of whom have new ones."""
    old_cp, new_cp = engine("llama", url), engine("qwen3", url)
    old_decoder = put_decoder(old_cp, OLD_WIDTH, 1)
    new_decoder = put_decoder(new_cp, NEW_WIDTH, 2)
    old, new = related_codes(30)
    for i in range(30):
        put_code(old_cp, old_decoder, f"user{i}", old[i])
    for i in range(12):
        put_code(new_cp, new_decoder, f"user{i}", new[i])
    return old_cp, new_cp


@pytest.fixture
def url(tmp_path: Any) -> str:
    return f"sqlite:///{tmp_path}/prefixes.db"


def code_of(cp: ControlPrefix, user: str) -> torch.Tensor:
    value = cp.store.for_model(cp.geometry.fingerprint).get(PrefixKey("user", user)).value
    assert isinstance(value, UserCode)
    return value.values.flatten()


@pytest.mark.slow
def test_users_are_migrated_and_nobody_is_overwritten(
    both: tuple[ControlPrefix, ControlPrefix],
) -> None:
    old_cp, new_cp = both
    _, new = related_codes(30)
    old_cp.put("user", "full", Prefix.random(old_cp.geometry, num_slots=2, seed=5))
    report = new_cp.migrate_users(old_cp)
    assert report.num_shared == 12
    assert report.r2 > 0.99
    assert set(report.saved) == {f"user{i}" for i in range(12, 30)}
    assert set(report.saved.values()) == {1}
    assert report.skipped == {"full": "it has all slots there, not a code"}
    for i in range(30):
        assert torch.allclose(code_of(new_cp, f"user{i}"), new[i], atol=0.1)
    assert len(new_cp.versions("user", "user0")) == 1
    (info,) = new_cp.versions("user", "user20")
    assert info.details["migrated"]["shared_users"] == 12
    assert new_cp.generate("Hi", user="user20", max_new_tokens=3).parts[0].version == 1
    again = new_cp.migrate_users(old_cp)
    assert not again.saved  # all have a code now
    assert again.num_shared == 12  # what was migrated teaches nothing
    for i in range(6):
        new_cp.forget_user(f"user{i}")
    with pytest.raises(TrainingDataError, match="6 users"):
        new_cp.migrate_users(old_cp)


@pytest.mark.slow
def test_a_damaged_code_keeps_nobody_else_from_theirs(
    both: tuple[ControlPrefix, ControlPrefix],
) -> None:
    old_cp, new_cp = both
    for cp, user in ((old_cp, "user20"), (new_cp, "user0")):
        raw(
            cp.store.url,
            "UPDATE controlprefix_payloads SET payload = :p WHERE prefix_id = (SELECT id FROM "
            "controlprefix_prefixes WHERE name = :user AND fingerprint = :fingerprint)",
            p=b"0" * 9,
            user=user,
            fingerprint=cp.geometry.fingerprint,
        )
    report = new_cp.migrate_users(old_cp)
    assert report.num_shared == 11
    assert set(report.saved) == {f"user{i}" for i in range(12, 30)} - {"user20"}
    assert report.skipped.keys() == {"user20"}
    assert "is damaged" in report.skipped["user20"]


@pytest.mark.slow
def test_too_few_shared_users_store_nothing(both: tuple[ControlPrefix, ControlPrefix]) -> None:
    old_cp, new_cp = both
    for i in range(6):
        new_cp.forget_user(f"user{i}")
    # Forgetting a user forgets them on every model.
    with pytest.raises(TrainingDataError, match="6 users"):
        new_cp.migrate_users(old_cp)
    assert len(new_cp.names("user")) == 6
    with pytest.raises(UnknownNameError, match="people"):
        new_cp.migrate_users(old_cp, decoder="people")


@pytest.mark.slow
def test_the_command_migrates(
    both: tuple[ControlPrefix, ControlPrefix], monkeypatch: pytest.MonkeyPatch
) -> None:
    from controlprefix.cli import app
    from controlprefix.cli.groups import EngineArguments

    old_cp, new_cp = both
    engines = {"old": old_cp, "new": new_cp}
    monkeypatch.setattr(EngineArguments, "open", lambda self, **_: engines[self.model])
    result = CliRunner().invoke(app, ["users", "migrate", "--from", "old", "--model", "new"])
    assert result.exit_code == 0, result.output
    assert "stored 18 users; learned from 12" in result.output


@pytest.mark.slow
def test_codes_of_another_decoder_teach_nothing(both: tuple[ControlPrefix, ControlPrefix]) -> None:
    old_cp, new_cp = both
    stored = new_cp.store.for_model(new_cp.geometry.fingerprint).get(PrefixKey("decoder", "users"))
    assert isinstance(stored.value, PrefixDecoder)
    is_full = stored.value.dtype == torch.float32
    other = PrefixDecoder.from_bytes(stored.value.to_bytes("bfloat16" if is_full else "float32"))
    code = UserCode(other.content_hash, torch.zeros(SLOTS, NEW_WIDTH))
    new_cp.store.put([NewVersion(PrefixKey("decoder", "others"), other)])
    new_cp.store.put([NewVersion(PrefixKey("user", "user20"), code)])
    report = new_cp.migrate_users(old_cp)
    assert report.num_shared == 12
    assert "user20" not in report.saved


@pytest.mark.slow
def test_users_cannot_be_migrated_to_where_they_are(
    both: tuple[ControlPrefix, ControlPrefix],
) -> None:
    old_cp, _ = both
    with pytest.raises(TrainingDataError, match="nothing to migrate"):
        old_cp.migrate_users(old_cp)
