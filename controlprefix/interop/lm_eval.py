"""A model class for lm-evaluation-harness, steered per task of the harness.

`python -m controlprefix.interop.lm_eval` is the harness's own command line with the model
`controlprefix` added:

    python -m controlprefix.interop.lm_eval run --model controlprefix --tasks hellaswag \\
        --model_args model=smollm2,store=prefixes.db,task=message,attributes=formality:formal

Reference:
    https://github.com/EleutherAI/lm-evaluation-harness, version 0.4.13: `lm_eval.models.HFLM`.
"""

import contextlib
import inspect
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from controlprefix._io import requires_extra
from controlprefix.engine import ControlPrefix
from controlprefix.errors import RequestError, known_names, shortened
from controlprefix.labels import label_text
from controlprefix.request import Request

with requires_extra("lm-eval", "lm-evaluation-harness"):
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM

Result = TypeVar("Result")
_LOADING = ("dtype", "device", "revision", "trust_remote_code", "quantization")
_OWN_OPTIONS = ("model", "store", "tenant", "task", "user", "attributes", "strengths", "steering")
# Those that name, load or adapt a model have no effect beside a loaded one.
_HARNESS_OPTIONS = {
    name
    for name, parameter in inspect.signature(HFLM.__init__).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY or parameter.default is not parameter.empty
} - {"self", "pretrained", "tokenizer", "peft", "delta", "autogptq", "gptqmodel", *_LOADING}

_log = logging.getLogger("controlprefix")


@register_model("controlprefix")
class ControlPrefixLM(HFLM):  # type: ignore[misc]  # the harness has no types
    """A frozen model steered by a request's prefixes, for the harness.

    Log-likelihoods equal those of `ControlPrefix.score`.

    Args:
        model: Name, folder or hub id of the model; or a `ControlPrefix`.
        store, tenant: As in `ControlPrefix.from_pretrained`.
        task, user: Fields of the request that steers.
        attributes: Its attributes; or as a text, `formality:formal+tone:warm`.
        strengths: Its strengths; or as a text, `task:0.5+tone:2`.
        steering: Per task of the harness, fields of the request instead of those above; or the
            path of a JSON file of such a mapping.
        **options: Options of the harness's `HFLM`, such as `batch_size`, and of
            `controlprefix.model.loading.load`.

    Raises:
        RequestError: If the request cannot steer the model's own calls: `mixing="logits"`,
            strengths below 0 and schedules cannot.
        UnknownNameError: If there is no such task, label or user.
    """

    def __init__(
        self,
        model: str | ControlPrefix = "smollm2",
        store: str = "prefixes.db",
        tenant: str = "default",
        task: str | None = None,
        user: str | None = None,
        attributes: Mapping[str, Any] | str | None = None,
        strengths: Mapping[str, float] | str | None = None,
        steering: Mapping[str, Mapping[str, Any]] | str | None = None,
        **options: Any,
    ) -> None:
        loading = {name: options.pop(name) for name in _LOADING if name in options}
        if str(loading.get("device") or "").startswith("cuda") and not torch.cuda.is_available():
            del loading["device"]  # it is the harness's default
        if isinstance(model, ControlPrefix):
            if loading:
                raise RequestError(f"{min(loading)} has no effect on a loaded model; leave it out")
            self._cp = model
        else:
            self._cp = ControlPrefix.from_pretrained(model, store=store, tenant=tenant, **loading)
        if "pretrained" in options:
            raise RequestError("give the model as model=, not pretrained=")
        if unknown := sorted(set(options) - _HARNESS_OPTIONS):
            names = known_names(unknown[0], [*_OWN_OPTIONS, *_LOADING, *_HARNESS_OPTIONS])
            raise RequestError(f"there is no option {unknown[0]!r}; there are: {names}")
        super().__init__(pretrained=self._cp.model, tokenizer=self._cp.tokenizer, **options)
        fields = {
            "task": task,
            "user": user,
            "attributes": _pairs(attributes),
            "strengths": {part: _number(part, text) for part, text in _pairs(strengths).items()},
        }
        self._request = _request(fields)
        self._by_task = {name: _request(own) for name, own in _read_steering(steering).items()}
        for request in (self._request, *self._by_task.values()):
            with self._cp.assembled(request):  # fail before anything is evaluated
                pass
        self._current = self._request

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Log-likelihoods of continuations, in nats, and whether each is the greedy one."""
        call = super().loglikelihood
        return self._per_steering(requests, lambda own: call(own, disable_tqdm=disable_tqdm))

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihoods of whole texts, in nats."""
        call = super().loglikelihood_rolling
        return self._per_steering(requests, lambda own: call(own, disable_tqdm=disable_tqdm))

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts up to a stop text."""
        call = super().generate_until
        return self._per_steering(requests, lambda own: call(own, disable_tqdm=disable_tqdm))

    def _model_call(self, *arguments: Any, **options: Any) -> Tensor:
        with self._cp.assembled(self._current):
            logits: Tensor = super()._model_call(*arguments, **options)
        return logits

    def _model_generate(self, *arguments: Any, **options: Any) -> Tensor:
        with self._cp.assembled(self._current), torch.no_grad():
            ids: Tensor = super()._model_generate(*arguments, **options)
        return ids

    def _per_steering(
        self, requests: Sequence[Any], evaluate: Callable[[list[Any]], list[Result]]
    ) -> list[Result]:
        """Evaluate the requests of each task of the harness with its own steering."""
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            name = getattr(request, "task_name", None) or ""
            groups.setdefault(name if name in self._by_task else "", []).append(i)
        if self._by_task and not groups.keys() & self._by_task.keys():
            names = sorted({str(getattr(request, "task_name", "")) for request in requests})
            _log.warning(
                "the steering is for the tasks %s, and these requests are of %s, so they get what "
                "applies to all tasks; tasks of a group are named one by one",
                ", ".join(self._by_task),
                shortened(names),
            )
        results: dict[int, Result] = {}
        for name, indices in groups.items():
            with self._steered(self._by_task.get(name, self._request)):
                values = evaluate([requests[i] for i in indices])
            results.update(zip(indices, values, strict=True))
        return [results[i] for i in range(len(requests))]

    @contextlib.contextmanager
    def _steered(self, request: Request) -> Iterator[None]:
        self._current, earlier = request, self._current
        try:
            yield
        finally:
            self._current = earlier


def _request(fields: Mapping[str, Any]) -> Request:
    if "prompt" in fields:
        raise RequestError("the harness has the prompts; leave prompt out of the steering")
    # The harness reads numbers, which may be names here: `user=42`.
    named = {name: label_text(fields[name]) for name in ("task", "user") if name in fields}
    options = {name: value for name, value in {**fields, **named}.items() if value}
    request = Request(prompt="-", **options)
    if request.when == "relevant":
        raise RequestError(
            "when='relevant' needs the prompts, which only the harness has; leave it out"
        )
    return request


def _number(part: str, text: Any) -> float:
    try:
        return float(text)
    except (TypeError, ValueError):
        raise RequestError(f"the strength of {part!r} is {text!r}; give a number") from None


def _pairs(value: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """`formality:formal+tone:warm` as a mapping; the harness splits its arguments at commas."""
    if not isinstance(value, str):
        return dict(value or {})
    pairs = {}
    for item in value.split("+"):
        name, _, text = item.partition(":")
        if not name or not text:
            raise RequestError(f"{value!r} is not of the form formality:formal+tone:warm")
        pairs[name] = text
    return pairs


def _read_steering(
    steering: Mapping[str, Mapping[str, Any]] | str | None,
) -> Mapping[str, Mapping[str, Any]]:
    if not isinstance(steering, str):
        return steering or {}
    try:
        content = json.loads(Path(steering).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(f"cannot read the steering of tasks in {steering}: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(v, dict) for v in content.values()):
        raise RequestError(
            f'{steering} must hold request fields per task: {{"hellaswag": {{"user": "ana"}}}}'
        )
    return content


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
