"""Placement: a request's slots as placeholder tokens, a cache salt, and a file of slots.

vLLM caches the keys and values of full blocks, and finds them again by the tokens of the block
and of all blocks before it, and by the salt. It does not know what placeholders stand for. So
salt and placeholders together must identify all slots: requests with different slots in a
block must have different tokens there or before, or another salt.

The task's slots come first. If they fill whole blocks, the salt identifies the task only, and
the first block beyond begins with a digest of all slots as token ids: so requests of one task
share its blocks and nothing else. Otherwise the salt identifies all slots.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from controlprefix.errors import RequestError
from controlprefix.inference.guidance import plan_rows
from controlprefix.inference.resolved_request import ResolvedRequest
from controlprefix.model.rotation import Rotation
from controlprefix.prefixes import Prefix

_DIGEST_BITS = 128  # must fit into one block, so that no two requests share it by chance
_FIRST_ID = 3  # many vocabularies have their special tokens below
MAX_SLOTS = 1024


class _Copies(NamedTuple):
    """A prefix that is written as many times as its strength."""

    digest: str
    strength: int
    prefix: Prefix


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a request's slots go.

    Attributes:
        prefixes: In order, each as many times as its strength.
        num_slots: Slots of all of them: positions in front of the text.
        digest: Hash of everything that determines their keys and values; names their file.
        placeholder_ids: One token id per slot.
        salt: For vLLM's prefix cache.
    """

    prefixes: tuple[Prefix, ...]
    num_slots: int
    digest: str
    placeholder_ids: tuple[int, ...]
    salt: str

    def slots(self, rotation: Rotation) -> Prefix:
        """The slots as vLLM's cache needs them: at the positions 0 to `num_slots` - 1."""
        rows = torch.cat([prefix.slots["decoder"] for prefix in self.prefixes])
        whole = Prefix(self.prefixes[0].geometry, {"decoder": rows})
        return rotation.shifted(whole, self.num_slots)


def place(
    resolved: ResolvedRequest[Any],
    model_id: str,
    *,
    vocab_size: int,
    block_size: int | None = None,
) -> Placement:
    """Where the slots of one request go.

    Args:
        resolved: The request.
        model_id: Fingerprint of the weights, and the dtype they are served in.
        vocab_size: Size of the model's vocabulary.
        block_size: Block size of vLLM's cache; None: requests share no blocks.

    Raises:
        RequestError: If this engine cannot apply a strength. Slots have no weights in vLLM, so
            a strength must be a whole number, for which each slot is written as many times.
    """
    plan = plan_rows([resolved])
    if plan.has_guidance:
        raise RequestError(
            "strengths below 0, and mixing='logits', need the logits of other rows, which this "
            "server's engine (vLLM) does not provide; leave them out"
        )
    task_copies: list[_Copies] = []
    other_copies: list[_Copies] = []
    for part in resolved.parts:
        used, strength, prefix = part.used, part.part.strength, part.part.prefix
        if part.part.schedule:
            raise RequestError(
                "schedules change slots between tokens, which this server's engine (vLLM) "
                "cannot; leave them out"
            )
        if strength != round(strength):
            raise RequestError(
                f"the strength of {used.kind} {used.name!r} is {strength:g}; this server's "
                "engine (vLLM) supports only whole numbers: 0, 1, 2, …"
            )
        if prefix.num_slots and strength:
            copies = _Copies(prefix.digest, round(strength), prefix)
            (task_copies if used.kind == "task" else other_copies).append(copies)
    task_copies.sort(key=lambda copies: copies.digest)
    other_copies.sort(key=lambda copies: copies.digest)
    all_copies = [*task_copies, *other_copies]
    num_task_slots, num_slots = _num_slots(task_copies), _num_slots(all_copies)
    if num_slots > MAX_SLOTS:
        raise RequestError(
            f"the strengths ask for {num_slots:,} slots; this server supports {MAX_SLOTS:,}"
        )
    base = f"{model_id}:{num_slots}"  # keys depend on the distance to the text
    digest = _hash("all", base, _contents(task_copies), _contents(other_copies))
    salt = _hash("salt", resolved.tenant, digest)
    ids = _token_ids(digest, vocab_size, num_slots)
    num_shared = num_task_slots - num_task_slots % block_size if block_size else 0
    num_beyond = min(block_size or 0, num_slots - num_shared)
    bits_beyond = num_beyond * math.log2(vocab_size - _FIRST_ID)
    if num_shared and (not other_copies or bits_beyond >= _DIGEST_BITS):
        salt = _hash("salt", resolved.tenant, _hash("head", base, _contents(task_copies)))
        ids = (_FIRST_ID,) * num_shared + ids[: num_slots - num_shared]
    prefixes = tuple(copies.prefix for copies in all_copies for _ in range(copies.strength))
    return Placement(prefixes, num_slots, digest, ids, salt)


def _num_slots(copies: Sequence[_Copies]) -> int:
    return sum(count * len(prefix.slots["decoder"]) for _, count, prefix in copies)


def _contents(copies: Sequence[_Copies]) -> list[tuple[str, int]]:
    return [(digest, count) for digest, count, _ in copies]


def _hash(*values: object) -> str:
    return hashlib.sha256(repr(list(values)).encode()).hexdigest()


def _token_ids(digest: str, vocab_size: int, count: int) -> tuple[int, ...]:
    """A digest as a sequence of token ids of any length."""
    stream = hashlib.shake_256(digest.encode()).digest(4 * count)
    words = (int.from_bytes(stream[4 * i : 4 * i + 4], "little") for i in range(count))
    return tuple(_FIRST_ID + word % (vocab_size - _FIRST_ID) for word in words)
