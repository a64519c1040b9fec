"""Handshake: comparing a vLLM server with the model here before anyone is served.

A server of other weights, without the connector, or that cannot read the prefix folder would
answer fluently and wrongly. So log-probabilities with and without a prefix are compared first.
"""

import secrets
import statistics
from collections.abc import Callable, Sequence

import torch

from controlprefix.completion import PartUsed
from controlprefix.errors import EngineError
from controlprefix.inference.resolved_request import ResolvedPart, ResolvedRequest
from controlprefix.model import FrozenModel, prefix_from_tokens
from controlprefix.prefixes import Part
from controlprefix.request import Request
from controlprefix.vllm.placement import Placement

# Token ids; every vocabulary has them.
_PREFIX_TOKENS = (5, 11, 17, 23, 29, 31)
_PROBES = (_PREFIX_TOKENS, (41, 43, 47, 53, 59), (101, 97, 89, 83))
_STRENGTH = 2.0
_MAX_DISTANCE = {  # nats
    torch.float64: 0.02,
    torch.float32: 0.02,
    torch.float16: 0.2,
    torch.bfloat16: 0.3,
}

RemoteLogProbs = Callable[[Placement, tuple[int, ...]], dict[int, float]]
Place = Callable[[ResolvedRequest[Request]], Placement]


@torch.no_grad()
def compare_with_local_model(
    frozen: FrozenModel, place: Place, remote_log_probs: RemoteLogProbs
) -> None:
    """Compare a server's next-token log-probabilities with those of the model here.

    Without the connector vLLM would read placeholders as text. So its log-probabilities with a
    prefix must also be much nearer to ours with it than to ours for a text of placeholders.

    Args:
        frozen: The model.
        place: Where the slots of a request go.
        remote_log_probs: The server's most likely tokens after a prompt, with their
            log-probabilities, given where the slots are.

    Raises:
        EngineError: If the server serves another model, has no connector, or cannot read the
            folder.
    """
    prefix = prefix_from_tokens(frozen, _PREFIX_TOKENS)
    used = PartUsed(kind="user", name="probe", version=0, strength=_STRENGTH)
    part = Part(prefix, _STRENGTH)
    request = Request(prompt="probe", raw=True, max_new_tokens=1)
    without_prefix = place(ResolvedRequest(request, ()))
    # A tenant of its own, so that nothing of an earlier comparison is in a cache or the folder.
    tenant = f"handshake {secrets.token_hex(8)}"
    with_prefix = place(ResolvedRequest(request, (ResolvedPart(used, part),), tenant))
    distances: dict[str, list[float]] = {"without": [], "with": [], "placeholders": []}
    for probe in _PROBES:
        remote = remote_log_probs(without_prefix, probe)
        distances["without"].append(_distance(remote, _local_log_probs(frozen, [], probe)))
        try:
            remote = remote_log_probs(with_prefix, probe)
        except EngineError as error:
            raise EngineError(
                f"vLLM cannot use a prefix ({error}): it must read the same folder, with the same "
                "key if there is one"
            ) from error
        distances["with"].append(_distance(remote, _local_log_probs(frozen, [part], probe)))
        as_text = _local_log_probs(frozen, [], (*with_prefix.placeholder_ids, *probe))
        distances["placeholders"].append(_distance(remote, as_text))
    # vLLM may serve the model in the dtype of its files, which a CPU here may be too old for.
    stored = frozen.model.config.get_text_config().dtype
    tolerance = _MAX_DISTANCE.get(stored, 0.0) if isinstance(stored, torch.dtype) else 0.0
    limit = max(_MAX_DISTANCE[frozen.dtype], tolerance)
    means = {name: statistics.fmean(values) for name, values in distances.items()}
    for name in ("without", "with"):
        if means[name] > limit:
            here = str(frozen.dtype).removeprefix("torch.")
            raise EngineError(
                f"vLLM's log-probabilities {name} a prefix are {means[name]:.2f} nats from those "
                f"of the model here, which is in {here}: it serves another model, has another "
                "--dtype, or no connector"
            )
    if means["with"] > means["placeholders"] / 2:
        raise EngineError(
            "vLLM reads placeholders as text: it runs without the connector "
            "(--kv-transfer-config, see docs/guides/deploy.md)"
        )


def _local_log_probs(frozen: FrozenModel, parts: list[Part], ids: Sequence[int]) -> torch.Tensor:
    """Log-probabilities of the token after some ids, `(vocab_size,)`."""
    tokens = torch.tensor([list(ids)], device=frozen.device)
    with frozen.attached(frozen.assemble([parts])):
        logits: torch.Tensor = frozen.model(input_ids=tokens, use_cache=False).logits[0, -1]
    return logits.float().log_softmax(-1)


def _distance(remote: dict[int, float], local: torch.Tensor) -> float:
    """Mean absolute difference of log-probabilities, in nats."""
    return statistics.fmean(abs(local[token].item() - value) for token, value in remote.items())
