"""Texts of any length as a prefix with few slots."""

import contextlib
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from controlprefix.errors import ContextLengthError, RequestError, UnsupportedModelError
from controlprefix.example import Example
from controlprefix.model.attention_matching import matched
from controlprefix.model.frozen import FrozenModel
from controlprefix.model.slot_attention import QueryText, observe
from controlprefix.model.text_prefix import prefix_from_tokens
from controlprefix.prefixes import Part, Prefix, PrefixBatch
from controlprefix.request import is_valid_unicode

_MAX_QUERY_TEXTS = 16
_CHAT_INTERVAL = 4  # every fourth query text is an answer in a chat
_MIN_QUERY_TEXT_TOKENS, _MAX_QUERY_TEXT_TOKENS = 16, 96
_MAX_QUERIES = 24  # tokens per query text
_PIECE_TOKENS = 64  # size of the pieces that a single text is cut into
_MAX_PASS_TOKENS = 2048  # tokens that see each other
_NUM_PROBED = 4
_MAX_DIFFERENCE, _MAX_DIFFERENCE_IN_HALF = 0.005, 0.05  # of the largest logit


def prefix_from_text(frozen: FrozenModel, text: str, *, max_slots: int | None = None) -> Prefix:
    """A text as a prefix: its keys and values (see `prefix_from_tokens`).

    The result's `is_exact` says whether attending to it equals prompting with the text.

    Args:
        frozen: The model.
        text: Any text.
        max_slots: Slots at most. A longer text, however long, is matched (see
            `attention_matching`), so that they stand for all of it.

    Raises:
        RequestError: If the text is empty, or `max_slots` is below 1.
        ContextLengthError: If it does not fit the context.
    """
    if not isinstance(text, str):
        raise RequestError(f"expected a text (str), got {type(text).__name__}")
    if not is_valid_unicode(text):
        raise RequestError("the text contains half a surrogate pair, which is not a character")
    if max_slots is not None and max_slots < 1:
        raise RequestError(f"max_slots is {max_slots}; it must be 1 or more")
    tokenizer = frozen.request_tokenizer
    ids = tokenizer.text_ids(text) if text.strip() else ()
    if not ids:
        raise RequestError("cannot make a prefix from an empty text")
    if max_slots is not None and len(ids) > max_slots:
        return replace(prefix_from_pieces(frozen, [ids], max_slots), is_exact=False)
    if tokenizer.context_length is not None and len(ids) > tokenizer.context_length:
        raise ContextLengthError(
            f"the text has {len(ids)} tokens, but the context of this model is "
            f"{tokenizer.context_length}; give max_slots, or shorten it"
        )
    prefix = prefix_from_tokens(frozen, ids)
    return replace(prefix, is_exact=_equals_prompting(frozen, ids, prefix))


def prefix_from_pieces(
    frozen: FrozenModel, pieces: Sequence[Sequence[int]], num_slots: int
) -> Prefix:
    """A prefix of all tokens of some texts, however many there are.

    If they have more tokens than slots, they are matched. The texts themselves are the
    query texts. None of those that are read in one pass attends to its own slots; where several
    passes are matched again, into one prefix, each attends to all.

    Args:
        frozen: The model.
        pieces: Token ids per text, with what separates it from the next; at least one token.
        num_slots: Slots at most.
    """
    pieces = [piece for piece in pieces if piece]
    if len(pieces) == 1:
        (ids,) = pieces
        pieces = [ids[at : at + _PIECE_TOKENS] for at in range(0, len(ids), _PIECE_TOKENS)]
    num_tokens = sum(map(len, pieces))
    context = frozen.request_tokenizer.context_length or num_tokens
    max_tokens = context if num_tokens <= num_slots else min(_MAX_PASS_TOKENS, context)
    groups = _groups(pieces, max_tokens)
    prefixes = [_match_group(frozen, group, num_slots) for group in groups]
    if len(prefixes) == 1:
        return prefixes[0]
    query_texts = _query_texts(frozen, pieces, [range(0)] * len(pieces))
    per_round = max(2, _MAX_PASS_TOKENS // num_slots)  # what is recorded of them grows with slots
    while len(prefixes) > 1:
        joined = [
            Prefix.joined(prefixes[at : at + per_round])
            for at in range(0, len(prefixes), per_round)
        ]
        prefixes = [_matched(frozen, prefix, query_texts, num_slots) for prefix in joined]
    return prefixes[0]


def _matched(
    frozen: FrozenModel, prefix: Prefix, query_texts: Sequence[QueryText], num_slots: int
) -> Prefix:
    """A prefix with no more slots than this."""
    if prefix.num_slots <= num_slots:
        return prefix
    return matched(
        prefix, observe(frozen, prefix, query_texts, max_queries=_MAX_QUERIES), num_slots
    )


def _match_group(frozen: FrozenModel, pieces: Sequence[Sequence[int]], num_slots: int) -> Prefix:
    """The matched slots of texts that the model reads in one pass."""
    whole = prefix_from_tokens(frozen, [token for piece in pieces for token in piece])
    if whole.num_slots <= num_slots:
        return whole
    ends = torch.tensor([len(piece) for piece in pieces]).cumsum(0).tolist()
    spans = [range(end - len(piece), end) for piece, end in zip(pieces, ends, strict=True)]
    if len(pieces) == 1:  # nothing else to attend to
        spans = [range(0)]
    return _matched(frozen, whole, _query_texts(frozen, pieces, spans), num_slots)


def _groups(pieces: Sequence[Sequence[int]], max_tokens: int) -> list[list[Sequence[int]]]:
    """Pieces that fit one pass together, in their order; a longer piece is cut."""
    groups: list[list[Sequence[int]]] = [[]]
    room = max_tokens
    for whole in pieces:
        for at in range(0, len(whole), max_tokens):
            piece = whole[at : at + max_tokens]
            if len(piece) > room:
                groups.append([])
                room = max_tokens
            groups[-1].append(piece)
            room -= len(piece)
    return groups


def _query_texts(
    frozen: FrozenModel, pieces: Sequence[Sequence[int]], hidden: Sequence[range]
) -> list[QueryText]:
    """Some of the texts as query texts, most from an empty prompt, some as answers in a chat."""
    tokenizer = frozen.request_tokenizer
    start = tokenizer.prompt_ids(Example(prompt="", raw=True, completion="-"))
    prompts = [start] * _CHAT_INTERVAL
    if tokenizer.has_chat_template:
        with contextlib.suppress(RequestError):  # a template may want other messages
            prompts[-1] = tokenizer.prompt_ids(Example(prompt="Write a text.", completion="-"))
    count = min(_MAX_QUERY_TEXTS, len(pieces))
    query_texts = []
    for n in range(count):
        i, prompt = n * len(pieces) // count, prompts[n % len(prompts)]
        room = _MAX_QUERY_TEXT_TOKENS
        if tokenizer.context_length is not None:
            if len(prompt) + _MIN_QUERY_TEXT_TOKENS > tokenizer.context_length:
                prompt = start
            room = min(room, max(1, tokenizer.context_length - len(prompt)))
        query_texts.append(QueryText(prompt, pieces[i][:room], hidden=hidden[i]))
    return query_texts


def _equals_prompting(frozen: FrozenModel, ids: Sequence[int], prefix: Prefix) -> bool:
    """Whether a few tokens have the same logits after the prefix as after its text."""
    if frozen.is_encoder_decoder:
        return False
    context = frozen.request_tokenizer.context_length
    if context is not None and len(ids) + _NUM_PROBED > context:
        try:
            _ = frozen.rope
        except UnsupportedModelError:  # it has no positions for further tokens
            return False
    probe = [ids[i % len(ids)] for i in range(_NUM_PROBED)]
    with torch.no_grad(), frozen.exclusive():
        with frozen.attached(PrefixBatch(num_rows=1, blocks={})):
            expected = _last_logits(frozen, [*ids, *probe])
        with frozen.attached(frozen.assemble([[Part(prefix)]])):
            logits = _last_logits(frozen, probe)
    difference = (logits - expected).abs().max() / expected.abs().max()
    full = frozen.dtype in (torch.float32, torch.float64)
    return bool(difference <= (_MAX_DIFFERENCE if full else _MAX_DIFFERENCE_IN_HALF))


def _last_logits(frozen: FrozenModel, ids: Sequence[int]) -> Tensor:
    """Logits of the probed tokens, `(num_probed, vocab_size)`, float32."""
    tokens = torch.tensor([list(ids)], device=frozen.device)
    logits: Tensor = frozen.model(
        input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False
    ).logits
    return logits[0, -_NUM_PROBED:].float()
