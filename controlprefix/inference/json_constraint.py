"""JsonConstraint: only tokens that continue JSON of a schema can be chosen."""

import json
import math
import weakref
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

import numpy
import torch
from torch import Tensor

from controlprefix._io import requires_extra
from controlprefix.errors import RequestError, UnsupportedModelError, short_reason
from controlprefix.model import FrozenModel
from controlprefix.model.special_tokens import special_token_ids

_MAX_SCHEMA_BYTES = 64 << 10
_MAX_DIVISOR = 10_000
_LISTS_OF_SCHEMAS = ("properties", "patternProperties", "prefixItems")
_SCHEMAS_OF_PARTS = (
    "items", "additionalProperties", "unevaluatedProperties", "additionalItems", "contains",
)  # fmt: skip
_VALUES = ("enum", "const", "default", "examples")
# One line, as `json.dumps` writes it: models that may write blanks can do so without end.
_FORMAT: Any = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
_tokenizers: "weakref.WeakKeyDictionary[FrozenModel, Any]" = weakref.WeakKeyDictionary()


class JsonConstraint:
    """Rules out, for one completion, the tokens after which its text is no JSON of a schema.

    The end token is possible once the JSON is complete.

    Args:
        frozen: The model.
        schema: A JSON schema; an empty one allows any JSON.
        num_before: Ids before the first generated one.

    Raises:
        MissingDependencyError: If llguidance is not installed.
        RequestError: If the schema is not valid, or uses what llguidance does not support.
        UnsupportedModelError: If the tokenizer cannot be used.

    Reference:
        Willard & Louf, "Efficient Guided Generation for Large Language Models", 2023,
        https://arxiv.org/abs/2307.09702; computed by https://github.com/guidance-ai/llguidance.
    """

    def __init__(self, frozen: FrozenModel, schema: Mapping[str, Any], num_before: int) -> None:
        self._matcher = _matcher(frozen, schema)
        self._end_ids = list(frozen.request_tokenizer.end_ids)
        # The text of a special token may be part of a value; the token may not.
        self._special_ids = sorted(special_token_ids(frozen.tokenizer) - set(self._end_ids))
        self._num_consumed = num_before
        self._allowed: numpy.ndarray[Any, Any] | None = None  # by the last mask

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Mask one row's logits; it must be called at each token.

        Args:
            input_ids: The prompt and what was generated, `(1, num_tokens)`.
            scores: Logits, `(1, vocab_size)`.

        Returns:
            Logits with -inf for tokens that are ruled out, `(1, vocab_size)`.

        Raises:
            RequestError: If llguidance meets a limit of its own.
        """
        for token in input_ids[0, self._num_consumed :].tolist():
            if not self._matcher.is_stopped():
                self._matcher.consume_token(token)
                if self._allowed is None or self._allowed[token]:  # not where none was possible
                    self._require_no_error()
        self._num_consumed = input_ids.shape[1]
        allowed = numpy.zeros(scores.shape[1], dtype=bool)
        if self._matcher.is_stopped():
            allowed[[i for i in self._end_ids if i < len(allowed)]] = True
        else:
            packed = numpy.frombuffer(self._matcher.compute_bitmask(), dtype=numpy.uint8)
            self._require_no_error()
            bits = numpy.unpackbits(packed, bitorder="little").astype(bool)
            allowed[: len(bits)] = bits[: len(allowed)]
            allowed[[i for i in self._special_ids if i < len(allowed)]] = False
            if not self._matcher.is_accepting():
                allowed[[i for i in self._end_ids if i < len(allowed)]] = False
        self._allowed = allowed
        mask = torch.from_numpy(~allowed).to(scores.device)
        return scores.masked_fill(mask, -torch.inf)

    def _require_no_error(self) -> None:
        if self._matcher.is_error():
            raise RequestError(
                f"the JSON schema cannot be used: {self._matcher.get_error().splitlines()[0]}"
            )


def _matcher(frozen: FrozenModel, schema: Mapping[str, Any]) -> Any:
    with requires_extra("json", "JSON output"):
        from llguidance import LLMatcher
    try:
        text = json.dumps(schema)
    except (TypeError, ValueError, RecursionError) as error:
        reason = short_reason(error)
        raise RequestError(f"the JSON schema cannot be written as JSON: {reason}") from None
    if len(text) > _MAX_SCHEMA_BYTES:
        raise RequestError(
            f"the JSON schema has {len(text):,} bytes; up to {_MAX_SCHEMA_BYTES:,} are accepted"
        )
    try:
        # A reference may be to any part of the schema.
        divisors = [_divisors(schema)] if "$ref" in text else _divisors_by_value(schema)
        largest = max(math.lcm(*own) for own in divisors)
    except ArithmeticError as error:
        reason = short_reason(error)
        raise RequestError(f"a multipleOf of the JSON schema is too large: {reason}") from None
    except RecursionError:
        raise RequestError("the JSON schema is nested too deeply") from None
    if largest > _MAX_DIVISOR:
        raise RequestError(
            "the JSON schema has multipleOf values whose least common multiple is above "
            f"{_MAX_DIVISOR:,}; leave multipleOf out"
        )
    try:
        grammar = LLMatcher.grammar_from_json_schema(text, defaults=_FORMAT)
        matcher = LLMatcher(_tokenizer(frozen), grammar, log_level=0)
        problem = matcher.get_error() if matcher.is_error() else ""
    except (ValueError, RuntimeError) as error:
        problem = short_reason(error)
    if problem:
        raise RequestError(f"the JSON schema cannot be used: {problem.splitlines()[0]}")
    return matcher


def _divisors_by_value(schema: Any) -> Iterator[set[int]]:
    """The values of `multipleOf` that may be those of one number, for each number of a schema.

    Numbers are recognized by a state machine with a state for each remainder.
    """
    parts: list[Any] = []
    if isinstance(schema, Mapping):
        for name in _LISTS_OF_SCHEMAS:
            own = schema.get(name)
            parts += own.values() if isinstance(own, Mapping) else own or ()
        parts += [schema[name] for name in _SCHEMAS_OF_PARTS if name in schema]
        names = {*_LISTS_OF_SCHEMAS, *_SCHEMAS_OF_PARTS}
        schema = {name: value for name, value in schema.items() if name not in names}
    yield _divisors(schema)
    for part in parts:
        yield from _divisors_by_value(part)


def _divisors(schema: Any) -> set[int]:
    """The values of `multipleOf` anywhere in a schema, without their decimal points."""
    if isinstance(schema, Mapping):
        own = schema.get("multipleOf")
        divisors = set().union(*(_divisors(v) for k, v in schema.items() if k not in _VALUES))
        is_number = not isinstance(own, bool) and isinstance(own, (int, float))
        if is_number and own > 0 and math.isfinite(own):  # type: ignore[arg-type, operator]
            _, digits, exponent = Decimal(str(own)).as_tuple()
            number = int("".join(map(str, digits))) * 10 ** max(0, int(exponent))
            divisors.add(number)
        return divisors
    if isinstance(schema, (list, tuple)):
        return set().union(*(_divisors(value) for value in schema))
    return set()


def _without_special_tokens(tokenizer: Any) -> str:
    """A fast tokenizer as JSON without special tokens, whose text values may have."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    special_ids = special_token_ids(tokenizer)
    names = {}
    for token in backend["added_tokens"]:
        if token["id"] in special_ids:
            names[token["content"]] = token["content"] = f"\uf8ff{token['id']}\uf8ff"
    vocab = backend["model"]["vocab"]
    backend["model"]["vocab"] = (
        {names.get(text, text): number for text, number in vocab.items()}
        if isinstance(vocab, dict)
        else [[names.get(text, text), score] for text, score in vocab]
    )
    backend |= {"post_processor": None, "padding": None, "truncation": None}
    if backend["model"].get("unk_token") in names:
        backend["model"]["unk_token"] = names[backend["model"]["unk_token"]]
    return json.dumps(backend)


def _tokenizer(frozen: FrozenModel) -> Any:
    if frozen not in _tokenizers:
        from llguidance import LLTokenizer

        embeddings: Any = frozen.model.get_output_embeddings()
        num_logits = frozen.model.config.get_text_config().vocab_size
        if embeddings is not None and getattr(embeddings, "weight", None) is not None:
            num_logits = embeddings.weight.shape[0]
        try:
            _tokenizers[frozen] = LLTokenizer(
                _without_special_tokens(frozen.tokenizer),
                n_vocab=max(num_logits, len(frozen.tokenizer)),
                eos_token=list(frozen.request_tokenizer.end_ids) or None,
            )
        except (ValueError, RuntimeError, TypeError, AttributeError) as error:
            raise UnsupportedModelError(
                f"JSON output is not possible with this tokenizer: {short_reason(error)}"
            ) from error
    return _tokenizers[frozen]
