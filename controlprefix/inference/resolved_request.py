"""ResolvedRequest: a request with the prefixes it is steered by."""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Generic

from controlprefix.completion import Completion, PartUsed, StandIn
from controlprefix.model.tokenization import RequestTokenizer
from controlprefix.prefixes import Part
from controlprefix.request import AnyRequest


@dataclass(frozen=True, slots=True)
class ResolvedPart:
    """One part of a request.

    Attributes:
        used: The prefix and the strength that was asked for.
        part: The prefix at that strength; at strength 1 if `in_logit_space`.
        in_logit_space: Apply the strength to logits, in a row of its own (see `guidance`).
    """

    used: PartUsed
    part: Part
    in_logit_space: bool = False


@dataclass(frozen=True)
class ResolvedRequest(Generic[AnyRequest]):
    """A request as it is carried out.

    Attributes:
        request: With default labels, and with stand-ins for labels that have no prefix.
        parts: Its parts.
        tenant: The tenant whose prefixes these are.
        stand_ins: What was used for labels without a prefix.
    """

    request: AnyRequest
    parts: tuple[ResolvedPart, ...]
    tenant: str = ""
    stand_ins: tuple[StandIn, ...] = ()

    @property
    def num_rows(self) -> int:
        """Rows of a batch that it needs: one, and one per part applied in logit space."""
        return 1 + sum(part.in_logit_space for part in self.parts)

    @property
    def note_on_opposites(self) -> str:
        """For errors about strengths below 0: which of them the request does not name itself."""
        names = ", ".join(item.label for item in self.stand_ins if item.how == "opposite")
        return f" (no prefix is stored for {names}; its opposite is used at -1)" if names else ""

    @cached_property
    def digest(self) -> str:
        """A hash over its prefixes and their strengths; it changes when any of them changes."""
        contents = [
            (
                (item.used.kind, item.used.name, item.used.strength),
                (item.part.prefix.digest, item.part.strength, item.part.schedule),
                item.in_logit_space,
            )
            for item in self.parts
        ]
        return hashlib.sha256(repr(contents).encode()).hexdigest()

    def for_prompt(self, request: AnyRequest) -> "ResolvedRequest[AnyRequest]":
        """The same prefixes for a request that differs in prompt and seed alone."""
        changes = {
            name: getattr(request, name)
            for name in ("prompt", "prompt_ids", "messages", "images", "seed")
        }
        return replace(self, request=self.request.model_copy(update=changes))

    def fitted(
        self, tokenizer: RequestTokenizer
    ) -> tuple["ResolvedRequest[AnyRequest]", tuple[int, ...]]:
        """The same with new tokens that fit the context, and the prompt's ids.

        Raises:
            RequestError, ContextLengthError: As `RequestTokenizer.fitted`.
        """
        request, prompt = tokenizer.fitted(self.request)
        return replace(self, request=request), prompt

    def report_in(self, completion: Completion) -> Completion:
        """A completion that names the parts and stand-ins it was steered by."""
        used = tuple(part.used for part in self.parts)
        return completion.model_copy(update={"parts": used, "stand_ins": self.stand_ins})
