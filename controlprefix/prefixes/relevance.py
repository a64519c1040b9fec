"""Relevance: which prompts a prefix is meant for, by sentence embeddings."""

import base64
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from controlprefix.errors import PrefixFormatError

_NUM_NEAREST = 5
_MAX_PROMPTS = 4096


@dataclass(frozen=True, eq=False)
class Relevance:
    """Prompts that a prefix is meant for, others, and how near a prompt must be to them.

    Attributes:
        own: Sentence embeddings of prompts that it is for, of length 1, `(num_prompts,
            embedding_size)`.
        others: The same of prompts that it is not for.
        min_similarity: Minimum similarity to `own` of a prompt that the prefix is meant for.
        min_lead: Minimum of its similarity to `own` minus that to `others`.
        embedder: The embedding model.
    """

    own: Tensor
    others: Tensor
    min_similarity: float
    min_lead: float
    embedder: str

    def similarity(self, embedding: Tensor) -> float:
        """The mean cosine of a prompt's embedding, `(embedding_size,)`, and the nearest 5 own."""
        return _nearness(self.own, embedding)

    def lead(self, embedding: Tensor) -> float:
        """By how much a prompt is nearer to the prefix's own prompts than to others.

        Args:
            embedding: Of length 1, `(embedding_size,)`; the result is a difference of cosines.
        """
        return _nearness(self.own, embedding) - _nearness(self.others, embedding)

    def includes(self, embedding: Tensor) -> bool:
        """Whether a prompt is one that the prefix is meant for.

        Args:
            embedding: Of length 1, `(embedding_size,)`.
        """
        near = self.similarity(embedding) >= self.min_similarity
        return near and self.lead(embedding) >= self.min_lead

    def to_dict(self) -> dict[str, Any]:
        """A form that JSON can hold, with embeddings in float16."""
        return {
            "min_similarity": self.min_similarity,
            "min_lead": self.min_lead,
            "embedder": self.embedder,
            "own": _to_text(self.own),
            "others": _to_text(self.others),
            "embedding_size": self.own.shape[1],
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], name: str) -> Self:
        """Read what `to_dict` returned.

        Raises:
            PrefixFormatError: If it is damaged.
        """
        try:
            size = int(fields["embedding_size"])
            own, others = (_from_text(fields[key], size) for key in ("own", "others"))
            limits = float(fields["min_similarity"]), float(fields["min_lead"])
            relevance = cls(own, others, *limits, str(fields["embedder"]))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise PrefixFormatError(f"{name} has a relevance that cannot be read") from error
        relevance.check(name)
        return relevance

    def check(self, name: str) -> None:
        """Check sizes and limits.

        Args:
            name: How errors name the prefix.

        Raises:
            PrefixFormatError: If they do not fit together.
        """
        both = (self.own, self.others)
        fits = all(rows.ndim == 2 and 1 <= len(rows) <= _MAX_PROMPTS for rows in both)
        if (
            not fits
            or self.own.shape[1] != self.others.shape[1]
            or not all(rows.isfinite().all() for rows in both)
            or not (math.isfinite(self.min_similarity) and math.isfinite(self.min_lead))
        ):
            raise PrefixFormatError(f"{name} has a relevance whose sizes or limits are impossible")


def _nearness(embeddings: Tensor, embedding: Tensor) -> float:
    cosines = embeddings @ embedding
    return float(cosines.topk(min(_NUM_NEAREST, len(cosines))).values.mean())


def _to_text(embeddings: Tensor) -> str:
    values = embeddings.detach().cpu().half().contiguous().numpy().tobytes()
    return base64.b64encode(values).decode()


def _from_text(text: str, size: int) -> Tensor:
    data = base64.b64decode(text, validate=True)
    return torch.frombuffer(bytearray(data), dtype=torch.float16).float().view(-1, size)
