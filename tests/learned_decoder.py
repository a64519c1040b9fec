"""A decoder that was learned from users with one of two styles each."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from controlprefix import (
    ControlPrefix,
    embeddings,
)
from controlprefix.prefixes.user_code import PrefixDecoder
from controlprefix.store import NewVersion, PrefixKey

from helpers import Letters
from models import build, byte_tokenizer

QUIET: dict[str, Any] = {"progress": False, "validation": 0.0, "seed": 0}
LEARN: dict[str, Any] = {
    **QUIET, "num_slots": 4, "width": 8, "steps": 120, "learning_rate": 0.01, "batch_size": 8,
}  # fmt: skip


def written_by(style: str, count: int = 6) -> list[str]:
    return [f"{style} {style} {i % 3}" for i in range(count)]


USERS = {f"{style}{i}": written_by(style) for style in ("hello", "AHOY!") for i in range(6)}


def engine(store: str = "sqlite://") -> ControlPrefix:
    return ControlPrefix.from_pretrained(build("llama"), tokenizer=byte_tokenizer(), store=store)


def stored_decoder(cp: ControlPrefix) -> PrefixDecoder:
    value = cp.store.for_model(cp.geometry.fingerprint).get(PrefixKey("decoder", "users")).value
    assert isinstance(value, PrefixDecoder)
    return value


def stored_user(cp: ControlPrefix, user: str) -> object:
    """A user's stored value; `cp.get` returns the decoded prefix."""
    return cp.store.for_model(cp.geometry.fingerprint).get(PrefixKey("user", user)).value


def as_learned(decoder: PrefixDecoder) -> NewVersion:
    return NewVersion(PrefixKey("decoder", "users"), decoder, sources=tuple(USERS))


def learned_store(folder: Path) -> str:
    """URL of a store with a trained decoder."""
    url = f"sqlite:///{folder}/prefixes.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embeddings, "load_embedder", lambda embedder: Letters())
        cp = engine(url)
        before = {name: p.clone() for name, p in cp.model.named_parameters()}
        report = cp.learn_decoder(USERS, **LEARN)
        assert all(torch.equal(before[name], p) for name, p in cp.model.named_parameters())
    assert (report.num_users, report.version) == (12, 1)
    assert report.training.losses[-1] < report.training.losses[0] - 0.5
    assert report.r2 > 0.2
    return url


def copied(learned: str) -> Iterator[ControlPrefix]:
    """An engine with a copy of the trained decoder in a store of its own."""
    built = engine()
    source = engine(learned)
    built.store.put([as_learned(stored_decoder(source))])
    yield built
    built.store.close()
    source.store.close()
