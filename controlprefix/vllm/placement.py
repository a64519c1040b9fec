"""A request's parts as vLLM takes them: placeholder tokens, a cache salt, and a file of slots.

vLLM keeps the keys and values of full blocks of tokens, and finds them again by the tokens of
the block and all before it, and by the salt. It does not know what is behind placeholders. So
salt and placeholders together must say all of it: whoever has other slots in a block must have
other tokens there or before, or another salt.

The task's slots come first. Where they fill blocks of their own, the salt says the task alone,
and the first block beyond begins with the digest of everything, as token ids: so requests of
one task share its blocks, and nothing else. Where they do not, the salt says everything.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from controlprefix.errors import RequestError
from controlprefix.inference.continuous_batching import Prepared
from controlprefix.prefixes.prefix import Prefix
from controlprefix.vllm.rotation import Rotation

_DIGEST_BITS = 128  # that must stand in one block: two requests never share them by chance
_FIRST_ID = 3  # below stand the special tokens of many vocabularies
MOST_SLOTS = 1024


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a request's slots go.

    Attributes:
        pieces: The prefixes in order, each as often as its strength says.
        num_slots: Of all of them: positions that come before the text.
        digest: Of all that decides their keys and values; the name of their file.
        ids: Placeholder tokens, one a slot.
        salt: Of vLLM's prefix cache.
    """

    pieces: tuple[Prefix, ...]
    num_slots: int
    digest: str
    ids: tuple[int, ...]
    salt: str

    def slots(self, rotation: Rotation) -> Prefix:
        """The slots as vLLM's cache takes them: at the positions 0 to `num_slots` - 1."""
        first = self.pieces[0]
        together = torch.cat([piece.slots["decoder"] for piece in self.pieces])
        return rotation.moved(Prefix(first.geometry, {"decoder": together}), self.num_slots)


def place(
    prepared: Prepared,
    model: str,
    *,
    vocab_size: int,
    block_size: int | None = None,
) -> Placement:
    """Where the parts of one request go.

    Args:
        prepared: The request, resolved.
        model: The fingerprint of its weights, and the dtype they are served in.
        vocab_size: Of the model.
        block_size: Of vLLM's cache; None: nothing is shared between requests with other parts.

    Raises:
        RequestError: If a strength cannot be had there. Slots cannot be weighed in vLLM, so it
            must be a whole number, for which each slot is written as many times.
    """
    if not prepared.guidance.is_plain:
        raise RequestError(
            "strengths below 0, and mixing='logits', need the logits of other rows, which this "
            "server's engine (vLLM) does not give; leave them out"
        )
    copies: dict[bool, list[tuple[str, int, Prefix]]] = {True: [], False: []}
    for used, part in zip(prepared.parts, prepared.guidance.rows[0], strict=True):
        if part.course:
            raise RequestError(
                "schedules change slots between tokens, which this server's engine (vLLM) "
                "cannot; leave them out"
            )
        if part.strength != round(part.strength):
            raise RequestError(
                f"the strength of {used.kind} {used.name!r} is {part.strength:g}; this server's "
                "engine (vLLM) takes whole numbers alone: 0, 1, 2, …"
            )
        if part.prefix.num_slots and part.strength:
            one = (part.prefix.digest, round(part.strength), part.prefix)
            copies[used.kind == "task"].append(one)
    head, tail = (sorted(copies[kind], key=lambda one: one[0]) for kind in (True, False))
    num_head, num_slots = _count(head), _count([*head, *tail])
    if num_slots > MOST_SLOTS:
        raise RequestError(
            f"the strengths ask for {num_slots:,} slots; this server takes {MOST_SLOTS:,}"
        )
    about = f"{model}:{num_slots}"  # keys depend on how far the text is
    digest = _digest("all", about, head, tail)
    own = _digest("salt", prepared.tenant, digest)
    ids = _ids(digest, vocab_size, num_slots)
    shared = num_head - num_head % block_size if block_size else 0
    beyond = min(block_size or 0, num_slots - shared)
    if shared and (not tail or beyond * math.log2(vocab_size - _FIRST_ID) >= _DIGEST_BITS):
        own = _digest("salt", prepared.tenant, _digest("head", about, head))
        ids = (_FIRST_ID,) * shared + ids[: num_slots - shared]
    pieces = tuple(prefix for _, count, prefix in [*head, *tail] for _ in range(count))
    return Placement(pieces, num_slots, digest, ids, own)


def _count(parts: Sequence[tuple[str, int, Prefix]]) -> int:
    return sum(count * len(prefix.slots["decoder"]) for _, count, prefix in parts)


def _digest(*what: object) -> str:
    told = [
        [one[:2] for one in part] if isinstance(part, list) else part for part in what
    ]  # parts by their content's digest and count
    return hashlib.sha256(repr(told).encode()).hexdigest()


def _ids(digest: str, vocab_size: int, count: int) -> tuple[int, ...]:
    """Tokens that say a digest, over and over: as many as there are slots."""
    stream = hashlib.shake_256(digest.encode()).digest(4 * count)
    words = (int.from_bytes(stream[4 * i : 4 * i + 4], "little") for i in range(count))
    return tuple(_FIRST_ID + word % (vocab_size - _FIRST_ID) for word in words)
