"""The methods of `ControlPrefix` that generate and score."""

import contextlib
import copy
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, Unpack, overload

from controlprefix._io import requires_extra
from controlprefix.completion import Completion, Score
from controlprefix.data import Columns, Rows, as_examples
from controlprefix.engine.arguments import checks_method_arguments
from controlprefix.engine.components import Components
from controlprefix.errors import RequestError
from controlprefix.inference.batcher import Batcher
from controlprefix.inference.resolved_request import ResolvedRequest
from controlprefix.model.log_probs import TokenLogProbs
from controlprefix.prefixes import PrefixBatch
from controlprefix.request import AnyRequest, Request
from controlprefix.request_fields import RequestFields

if TYPE_CHECKING:
    from controlprefix.vllm.runner import VllmRunner


@checks_method_arguments
class GenerationMethods(Components):
    """Requests -> texts, scores, or a steered model."""

    @overload
    def generate(  # type: ignore[overload-overlap]  # a str is a sequence of str too
        self, request: str | Request, /, **fields: Unpack[RequestFields]
    ) -> Completion: ...
    @overload
    def generate(
        self,
        request: Sequence[str | Request],
        /,
        *,
        batch_size: int = ...,
        **fields: Unpack[RequestFields],
    ) -> list[Completion]: ...
    def generate(
        self,
        request: str | Request | Sequence[str | Request],
        /,
        *,
        batch_size: int = 64,
        **fields: Unpack[RequestFields],
    ) -> Completion | list[Completion]:
        """Generate for one request, or for a list of them in one mixed batch.

        Args:
            request: A prompt or a `Request`, or a list of them. Rows may differ in
                everything; a row gives the same as it would alone.
            batch_size: Requests at a time, for a long list.
            **fields: Fields of `Request`, for prompts given as text.

        Returns:
            A completion, or a list of them in the order of the requests.

        Raises:
            RequestError: If a request cannot be carried out as written.
            ContextLengthError: If prompt and completion do not fit the model's context.
            UnknownNameError: If it names a task, label or user that does not exist.
            PrefixFormatError: If a stored prefix is damaged.
            StoreError: If the store cannot be read.
            ModelOutputError: If no token can be chosen: the logits are NaN, or `logit_bias`, the
                JSON schema and the generation config together rule out every token.
            MissingDependencyError: If `unseen="nearest"` or `when="relevant"` needs
                sentence-transformers.
        """
        resolved = self._resolver.resolve([_as_request(row, fields) for row in _as_rows(request)])
        completions = self._generator.generate(resolved, batch_size=batch_size)
        return completions[0] if _is_single(request) else completions

    def stream(
        self, request: str | Request, /, **fields: Unpack[RequestFields]
    ) -> Generator[str, None, None]:
        """Generate for one request, yielding its text as it is generated.

        Leaving the loop early ends the generation.

        Args:
            request: A prompt or a `Request`.
            **fields: Fields of `Request`, for a prompt given as text.

        Raises:
            RequestError, UnknownNameError: As `generate`, when the first text is asked for.
        """
        yield from self._generator.stream(self.resolve(_as_request(request, fields)))

    def score(
        self, examples: Rows, *, columns: Columns | None = None, batch_size: int = 16
    ) -> list[Score]:
        """Log-likelihoods of examples' completions under the steered model.

        The end token is not counted.

        Args:
            examples: Rows in any form (see `controlprefix.data.as_examples`).
            columns: Which columns of the rows hold what, if they have other names.
            batch_size: Rows at a time.

        Returns:
            A score per example: the sum of log-probabilities in nats, and the number of tokens.

        Raises:
            TrainingDataError: If a row is not an Example.
            RequestError, UnknownNameError: As `generate`.
        """
        resolved = self._resolver.resolve(as_examples(examples, columns=columns))
        return self._generator.score(resolved, batch_size=batch_size)

    def prompt_log_probs(
        self, requests: Request | Sequence[Request], *, top: int = 0, batch_size: int = 16
    ) -> list[list[TokenLogProbs | None]]:
        """Log-probabilities of the tokens of prompts under the steered model.

        Args:
            requests: One or several.
            top: How many of the most likely tokens at each position to add.
            batch_size: Requests at a time.

        Returns:
            Per request an entry per token of its prompt, in nats; None for the first token.

        Raises:
            RequestError, UnknownNameError: As `generate`; and if the model is an
                encoder-decoder.
        """
        rows = [_as_request(request, {}) for request in _as_rows(requests)]
        resolved = self._resolver.resolve(rows)
        return self._generator.prompt_log_probs(resolved, top=top, batch_size=batch_size)

    @contextlib.contextmanager
    def assembled(self, requests: Request | Sequence[Request]) -> Iterator[PrefixBatch]:
        """Steer any transformers call on `model` while inside, row i by request i.

        A call may have a multiple of the rows (beams, returned sequences): those of one
        request must stand together, as transformers arranges them. One request steers all
        rows. Threads started inside, such as a streamer's, are steered too.

        Args:
            requests: One per row, or one for all rows. Their prompts are ignored, except that
                they decide where `when="relevant"`.

        Raises:
            RequestError: If a strength is below 0 or has a schedule, or `mixing` is `logits`:
                these need logits and new tokens, which only the caller has.
        """
        rows = [_as_request(request, {}) for request in _as_rows(requests)]
        with self._generator.assembled(self._resolver.resolve(rows)) as batch:
            yield batch

    def resolve(self, request: Request) -> ResolvedRequest[Request]:
        """Find the prefixes of a request, for `Batcher.submit`.

        Args:
            request: Any request.

        Raises:
            RequestError, UnknownNameError: As `generate`.
        """
        return self._resolver.resolve([_as_request(request, {})])[0]

    def with_default_labels(self, requests: Sequence[AnyRequest]) -> list[AnyRequest]:
        """Add the default labels of the attributes that requests leave out.

        Raises:
            UnknownNameError, RequestError: If the attribute space does not allow one.
        """
        return self._resolver.with_default_labels(requests)

    def without_defaults(self) -> Self:
        """The same model and store, without the attribute space's default labels."""
        bare = copy.copy(self)
        bare._use_resolver(self._resolver.without_defaults())
        return bare

    def batcher(
        self, *, max_sequences: int = 32, max_waiting: int = 1024, max_prefill_tokens: int = 512
    ) -> Batcher:
        """A running batch for a server, which requests join and leave between its steps.

        Models whose cached rows cannot be moved (caches of a model's own) get one
        batch after another.

        Args:
            max_sequences: Rows decoded concurrently. A request has a row, and more with strengths
                below 0 or `mixing="logits"`.
            max_waiting: Requests that may wait for a row; more are refused.
            max_prefill_tokens: Prompt tokens per step.

        Raises:
            RequestError: If a number is too small.
        """
        if max_prefill_tokens < 1:
            raise RequestError(f"max_prefill_tokens is {max_prefill_tokens}; it must be 1 or more")
        return self._generator.batcher(
            max_sequences=max_sequences,
            max_waiting=max_waiting,
            max_prefill_tokens=max_prefill_tokens,
        )

    def vllm_runner(
        self,
        url: str,
        folder: str | Path,
        *,
        api_key: str | None = None,
        model_name: str | None = None,
        max_requests: int = 1024,
        max_folder_bytes: int = 10 << 30,
        key_file: str | Path | None = None,
    ) -> "VllmRunner":
        """Run requests on a vLLM server of the same model, instead of a `batcher`.

        Args:
            url: URL of the server, such as `http://localhost:8001`.
            folder: Where its workers read prefixes (see `controlprefix.vllm.connector`).
            api_key: The server's own API key, if it has one.
            model_name: Which of its models to use, such as a LoRA adapter, which this model then
                has too; left out, the first.
            max_requests: Concurrent requests; more are refused.
            max_folder_bytes: Limit of the files in the folder.
            key_file: File with the key that they are encrypted with (see `PrefixFolder`).

        Raises:
            UnsupportedModelError: If vLLM, where slots take positions, cannot serve the model
                exactly.
            EngineError: If the server does not answer, or not as expected.
            MissingDependencyError: If httpx is not installed.
        """
        with requires_extra("vllm", "a vLLM server"):
            from controlprefix.vllm.prefix_folder import PrefixFolder
            from controlprefix.vllm.runner import VllmRunner

        return VllmRunner(
            self._frozen,
            url=url,
            folder=PrefixFolder(folder, max_bytes=max_folder_bytes, key_file=key_file),
            api_key=api_key,
            model_name=model_name,
            max_requests=max_requests,
        )


def _is_single(requests: object) -> bool:
    """Whether it is one request, valid or not, rather than several."""
    return isinstance(requests, (str, bytes, Mapping, Request)) or not isinstance(
        requests, Iterable
    )


def _as_rows(requests: Any) -> list[Any]:
    return [requests] if _is_single(requests) else list(requests)


def _as_request(request: str | Request, fields: Mapping[str, Any]) -> Request:
    if isinstance(request, str):
        return Request(prompt=request, **fields)
    if not isinstance(request, Request):
        raise RequestError(f"expected a prompt (str) or a Request, got {type(request).__name__}")
    if fields:
        raise RequestError(
            f"{', '.join(fields)}: fields beside a Request; put them into the Request itself"
        )
    return request
