"""PromptEcho: prompts that are repeated in an answer, with their log-probabilities."""

from collections.abc import Sequence

from controlprefix.cancellation import raise_if_stopped
from controlprefix.errors import RequestError
from controlprefix.inference.generator import Generator
from controlprefix.inference.resolved_request import ResolvedRequest
from controlprefix.model import FrozenModel
from controlprefix.model.log_probs import TokenLogProbs
from controlprefix.request import Request
from controlprefix.serving.openai import Echo

_MAX_BYTES = 2 << 30  # of the logits of a prompt, in float32


class PromptEcho:
    """Reads prompts, one after another within a bound of memory."""

    def __init__(self, frozen: FrozenModel) -> None:
        self._tokenizer = frozen.request_tokenizer
        self._generator = Generator(frozen)
        self._max_tokens = _MAX_BYTES // (4 * frozen.model.config.get_text_config().vocab_size)

    def read(self, resolved: Sequence[ResolvedRequest[Request]], top: int | None) -> list[Echo]:
        """The prompts of requests; equal ones are read once.

        Args:
            resolved: The requests.
            top: Likeliest tokens per position; None: no log-probabilities.

        Raises:
            RequestError: If the log-probabilities of a prompt would take too much memory.
        """
        ids_of_requests = [self._tokenizer.prompt_ids(own.request) for own in resolved]
        prompts = dict(zip(ids_of_requests, resolved, strict=True))
        for ids, own in prompts.items() if top is not None else ():
            self._require_memory(len(ids), own.num_rows)
        rows = self._log_probs(list(prompts.values()), top)
        echoes = {
            ids: Echo(own.request.prompt or self._tokenizer.decode(ids), ids, row)
            for (ids, own), row in zip(prompts.items(), rows, strict=True)
        }
        return [echoes[ids] for ids in ids_of_requests]

    def _require_memory(self, num_tokens: int, num_rows: int) -> None:
        if num_tokens * num_rows > self._max_tokens:
            rows = f" in each of {num_rows} rows" if num_rows > 1 else ""
            raise RequestError(
                f"the prompt has {num_tokens:,} tokens{rows}; this server computes the "
                f"log-probabilities of {self._max_tokens:,} at most"
            )

    def _log_probs(
        self, resolved: Sequence[ResolvedRequest[Request]], top: int | None
    ) -> Sequence[Sequence[TokenLogProbs | None]]:
        if top is None:
            return [()] * len(resolved)
        rows = []
        for own in resolved:  # each may take as much memory as there should be for it
            raise_if_stopped()
            rows += self._generator.prompt_log_probs([own], top=top, batch_size=1)
        return rows
