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

from controlprefix.errors import RequestError, UnsupportedModelError
from controlprefix.inference.guidance import plan_rows
from controlprefix.inference.resolved_request import ResolvedRequest
from controlprefix.model.mass_in_keys import MassInKeys
from controlprefix.model.rope import Rope
from controlprefix.prefixes import Prefix
from controlprefix.vllm.prefix_folder import file_name

_DIGEST_BITS = 128  # must fit into one block, so that no two requests share it by chance
_FIRST_ID = 3  # many vocabularies have their special tokens below
MAX_SLOTS = 1024
_STRENGTH_DIGITS = 3  # so that a dial that is dragged does not fill the folder


class _Copies(NamedTuple):
    """A prefix that is written several times, with a mass that its keys hold."""

    digest: str
    times: int
    mass: float
    prefix: Prefix


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a request's slots go.

    Attributes:
        prefixes: In order, each with the mass that its keys hold.
        num_slots: Slots of all of them: positions in front of the text.
        file_name: Names the file of their keys and values, by a hash of what determines them.
        placeholder_ids: One token id per slot.
        salt: For vLLM's prefix cache.
    """

    prefixes: tuple[tuple[Prefix, float], ...]
    num_slots: int
    file_name: str
    placeholder_ids: tuple[int, ...]
    salt: str

    def slots(self, rope: Rope, masses: MassInKeys) -> Prefix:
        """The slots as vLLM's cache needs them: at the positions 0 to `num_slots` - 1.

        Raises:
            RequestError: If the keys of a prefix cannot hold its mass.
        """
        scaled = [
            prefix if mass == 1 else masses.scaled(prefix, mass) for prefix, mass in self.prefixes
        ]
        rows = torch.cat([prefix.slots["decoder"] for prefix in scaled])
        whole = Prefix(scaled[0].geometry, {"decoder": rows})
        return rope.shifted(whole, self.num_slots)


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
        RequestError: If this engine cannot apply a strength or a schedule. Slots have no weights
            in vLLM: at strength 2 each is written twice, and at 1.5 twice with keys that receive
            three quarters of the attention.
    """
    plan = plan_rows([resolved])
    if plan.has_guidance:
        raise RequestError(
            "strengths below 0, and mixing='logits', need the logits of other rows, which this "
            "server's engine (vLLM) does not provide; leave them out" + resolved.note_on_opposites
        )
    task_copies: list[_Copies] = []
    other_copies: list[_Copies] = []
    user: str | None = None
    for part in resolved.parts:
        used, strength, prefix = part.used, part.part.strength, part.part.prefix
        if part.part.schedule:
            raise RequestError(
                "schedules change strengths between tokens, which this server's engine (vLLM) "
                "does not support; leave them out"
            )
        try:
            prefix.require_joint("this server's engine (vLLM), where slots are in the KV cache")
        except UnsupportedModelError as error:
            raise RequestError(f"{used.kind} {used.name!r}: {error}") from error
        strength = round(strength, _STRENGTH_DIGITS)
        if prefix.num_slots and strength:
            count = math.ceil(strength)
            copies = _Copies(prefix.digest, count, strength / count, prefix)
            (task_copies if used.kind == "task" else other_copies).append(copies)
            user = used.name if used.kind == "user" else user
    task_copies.sort(key=lambda copies: copies[:3])
    other_copies.sort(key=lambda copies: copies[:3])
    all_copies = [*task_copies, *other_copies]
    num_task_slots, num_slots = _num_slots(task_copies), _num_slots(all_copies)
    if num_slots > MAX_SLOTS:
        raise RequestError(
            f"the request needs {num_slots:,} slots, but this server supports {MAX_SLOTS:,}; lower "
            "its strengths, or use fewer or shorter prefixes"
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
    prefixes = tuple((c.prefix, c.mass) for c in all_copies for _ in range(c.times))
    return Placement(prefixes, num_slots, file_name(digest, resolved.tenant, user), ids, salt)


def _num_slots(copies: Sequence[_Copies]) -> int:
    return sum(own.times * len(own.prefix.slots["decoder"]) for own in copies)


def _contents(copies: Sequence[_Copies]) -> list[tuple[str, int, float]]:
    return [(own.digest, own.times, own.mass) for own in copies]


def _hash(*values: object) -> str:
    return hashlib.sha256(repr(list(values)).encode()).hexdigest()


def _token_ids(digest: str, vocab_size: int, count: int) -> tuple[int, ...]:
    """A digest as a sequence of token ids of any length."""
    stream = hashlib.shake_256(digest.encode()).digest(4 * count)
    words = (int.from_bytes(stream[4 * i : 4 * i + 4], "little") for i in range(count))
    return tuple(_FIRST_ID + word % (vocab_size - _FIRST_ID) for word in words)
