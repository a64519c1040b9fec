"""Vocabulary: the token ids that a model has embeddings for, and those that have a role."""

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from controlprefix.errors import RequestError


class Vocabulary:
    """The token ids of one model and its tokenizer.

    A tokenizer may have ids that the model has no embeddings for, such as a padding id that was
    added later.

    Args:
        model: For its embeddings and generation config.
        tokenizer: Its tokenizer.

    Attributes:
        size: Number of embeddings; None if it is not told by the model.
        end_ids: Ids that end a completion, the tokenizer's own first.
        start_id: Id in front of a text that has no prompt, for decoder-only models.
        pad_id: Id to pad rows with.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        size = getattr(model.get_input_embeddings(), "num_embeddings", None)
        self.size: int | None = size if isinstance(size, int) else None
        generation = model.generation_config
        model_ends = generation.eos_token_id if generation is not None else None
        ends = dict.fromkeys([*_as_list(tokenizer.eos_token_id), *_as_list(model_ends)])
        self.end_ids: tuple[int, ...] = tuple(filter(self.contains, ends))
        self.start_id = self._first_of(tokenizer.bos_token_id)
        self.pad_id = self._first_of(tokenizer.pad_token_id)

    def contains(self, token: int) -> bool:
        """Whether the model has an embedding of an id."""
        return token >= 0 and (self.size is None or token < self.size)

    def require(self, ids: Sequence[int]) -> Sequence[int]:
        """The ids, if the model has embeddings of all.

        Raises:
            RequestError: If it does not: the tokenizer is that of another model.
        """
        if unknown := [token for token in ids if not self.contains(token)]:
            raise RequestError(
                f"a text has the token id {unknown[0]}, but this model has {self.size} embeddings; "
                "give ids of its own tokenizer, and load the tokenizer that belongs to the model"
            )
        return ids

    def _first_of(self, token: object) -> int:
        """An id of the tokenizer, or the first that can stand in for it."""
        candidates = [*([token] if isinstance(token, int) else []), *self.end_ids, 0]
        return next(candidate for candidate in candidates if self.contains(candidate))


def _as_list(ids: int | Sequence[int] | None) -> list[int]:
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)
