"""BatchCache: keys, values and masks of the rows of a running batch."""

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from controlprefix.model import FrozenModel
from controlprefix.model.cache_rows import CacheRow, arrange_rows, overwrite_row, rows_can_move
from controlprefix.model.kv_cache import cache_argument, new_cache
from controlprefix.model.text_prefix import is_rotary


def can_share_running_batch(frozen: FrozenModel) -> bool:
    """Whether rows of a model can join and leave a running batch."""
    rows = frozen.rows
    if rows.padding_counts or rows.max_shared_tokens is not None:
        return False
    if not rows_can_move(frozen.model, len(frozen.geometry.decoder)):
        return False
    if not frozen.is_encoder_decoder:
        return True
    is_mixture = hasattr(frozen.model.config, "num_experts")  # reads more of the encoder's outputs
    return _positions_can_be_set(frozen) and not is_mixture


class BatchCache:
    """The cache of a running batch: rows end at the same column, whatever their lengths.

    An encoder-decoder's rows have a second one, of the tokens that the encoder read.

    Args:
        frozen: The model.

    Attributes:
        mask: Which columns are tokens of a row, `(num_rows, num_columns)`.
        num_slots: Slots of a row for which there is room in front of its tokens.
    """

    def __init__(self, frozen: FrozenModel) -> None:
        self._frozen = frozen
        self.clear()

    def clear(self) -> None:
        """Remove all rows."""
        self._cache = new_cache(self._frozen.model)
        if self._frozen.is_encoder_decoder:
            self._cross = new_cache(self._frozen.model)
        self.mask = self._cross_mask = torch.zeros(0, 0, dtype=torch.long)
        self.num_slots = 0

    def row(self, index: int, num_tokens: int, num_read: int) -> CacheRow:
        """A row of this cache.

        Args:
            index: Which one.
            num_tokens: Its tokens.
            num_read: Tokens that an encoder read for it.
        """
        cross = None
        if self._frozen.is_encoder_decoder:
            cross = CacheRow(self._cross, index, num_read)
        return CacheRow(self._cache, index, num_tokens, cross)

    def arrange(self, rows: Sequence[CacheRow], num_slots: int) -> None:
        """Replace all rows by these, of which some may be rows of this cache.

        Args:
            rows: At least one.
            num_slots: Slots for which there is room in front of the tokens.
        """
        self.num_slots = num_slots
        self.mask = self._arranged(self._cache, rows, num_slots)
        read = [row.cross for row in rows if row.cross is not None]
        if read:
            self._cross_mask = self._arranged(self._cross, read, num_slots)

    def fits(self, row: CacheRow) -> bool:
        """Whether a row is no longer than the longest here."""
        cross = row.cross
        has_room = cross is None or cross.num_tokens <= self._cross_mask.shape[1]
        return row.num_tokens <= self.mask.shape[1] and has_room

    def overwrite(self, index: int, row: CacheRow) -> None:
        """Put a row that fits in the place of another."""
        overwrite_row(self._cache, index, row)
        _mark(self.mask, index, row.num_tokens)
        if row.cross is not None:
            overwrite_row(self._cross, index, row.cross)
            _mark(self._cross_mask, index, row.cross.num_tokens)

    @contextlib.contextmanager
    def next_column(self, ids: Sequence[int], positions: Sequence[int]) -> Iterator[dict[str, Any]]:
        """The model's inputs of one further token per row, for a pass inside this block."""
        device = self._frozen.device
        visible = torch.ones(len(ids), 1, dtype=torch.long, device=device)
        self.mask = torch.cat([self.mask, visible], dim=1)
        tokens = torch.tensor(ids, device=device)[:, None]
        position_ids = torch.tensor(positions, device=device)[:, None]
        if not self._frozen.is_encoder_decoder:
            yield {
                "input_ids": tokens,
                "attention_mask": self.mask,
                "position_ids": position_ids,
                cache_argument(self._frozen.model): self._cache,
            }
            return
        own: dict[str, Any] = {}
        if _takes_positions(self._frozen):
            own["decoder_position_ids"] = position_ids
        with _decoder_positions(self._frozen, position_ids):
            yield {
                **own,
                "decoder_input_ids": tokens,
                "decoder_attention_mask": self.mask,
                "attention_mask": self._cross_mask,
                "encoder_outputs": self._shape_of_states(),
                cache_argument(self._frozen.model): EncoderDecoderCache(self._cache, self._cross),
            }

    def _arranged(self, cache: DynamicCache, rows: Sequence[CacheRow], num_slots: int) -> Tensor:
        device = self._frozen.device
        length = max(row.num_tokens for row in rows)
        arrange_rows(cache, rows, length, device, num_slots)
        mask = torch.zeros(len(rows), length, dtype=torch.long, device=device)
        for i, row in enumerate(rows):
            _mark(mask, i, row.num_tokens)
        return mask

    def _shape_of_states(self) -> BaseModelOutput:
        """States of the encoder, of which nothing but the shape is read: the rest is cached."""
        size = self._frozen.model.config.get_text_config(decoder=True).hidden_size
        nothing = torch.zeros(1, 1, 1, dtype=self._frozen.dtype, device=self._frozen.device)
        states: Any = nothing.expand(*self._cross_mask.shape, size)
        return BaseModelOutput(last_hidden_state=states)


def _mark(mask: Tensor, row: int, num_tokens: int) -> None:
    """Set the mask of a row to `num_tokens` tokens, which end at the last column."""
    mask[row] = 0
    mask[row, mask.shape[1] - num_tokens :] = 1


def _position_module(frozen: FrozenModel) -> Any:
    decoder = frozen.model.get_decoder()
    return getattr(decoder, "embed_positions", None)


def _takes_positions(frozen: FrozenModel) -> bool:
    """Whether an encoder-decoder is given its decoder's positions, as T5Gemma is."""
    return "decoder_position_ids" in inspect.signature(frozen.model.forward).parameters


def _positions_can_be_set(frozen: FrozenModel) -> bool:
    """Whether a decoder's positions are relative, or can be given to it per row."""
    module = _position_module(frozen)
    if module is None:
        return _takes_positions(frozen) or not is_rotary(frozen.model)
    return "position_ids" in inspect.signature(module.forward).parameters


@contextlib.contextmanager
def _decoder_positions(frozen: FrozenModel, positions: Tensor) -> Iterator[None]:
    """Let a decoder with absolute positions, which counts columns, use these in this block."""
    module = _position_module(frozen)
    if module is None:
        yield
        return

    def replace(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "position_ids": positions.flatten()}

    def one_per_row(module: Any, args: Any, output: Tensor) -> Tensor:
        return output.reshape(len(positions), 1, -1)  # some take positions of one row alone

    hooks = (
        module.register_forward_pre_hook(replace, with_kwargs=True),
        module.register_forward_hook(one_per_row),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
