"""A KV connector for vLLM: writes assembled prefixes into its cache, in place of computing them.

It runs inside vLLM, in an environment that has both packages:

    --kv-transfer-config '{"kv_connector": "ControlPrefixConnector",
        "kv_connector_module_path": "controlprefix.vllm.connector", "kv_role": "kv_both",
        "kv_connector_extra_config": {"folder": "/prefixes"}}'

A request with `kv_transfer_params={"controlprefix": {"digest": …, "num_slots": P}}` begins with P
placeholder tokens; before it is run, their keys and values are written by the backend's own
function, so no layout is assumed. A prefix that cannot be had ends its own request with an
error, never in text without it. Whoever sets these parameters is trusted: the gateway alone.
"""

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorTransferResults,
    SupportsHMA,
)
from vllm.distributed.parallel_state import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)

from controlprefix.errors import ControlPrefixError, GeometryMismatchError
from controlprefix.prefixes.prefix import Prefix
from controlprefix.store import PrefixCache, PrefixKey
from controlprefix.vllm.prefix_folder import PrefixFolder

PARAMETER = "controlprefix"
_DIGEST = re.compile(r"[0-9a-f]{64}")
_LAYER = re.compile(r"\blayers\.(\d+)\.")
_log = logging.getLogger("vllm.controlprefix")


@dataclass(frozen=True)
class Load:
    """Slots to write for one request.

    Attributes:
        digest: The file.
        first, last: Slots from `first` to before `last`; those before are in the cache.
        blocks: For each group of layers, the request's blocks from its first token on.
    """

    request: str
    digest: str
    first: int
    last: int
    blocks: tuple[list[int], ...]


@dataclass
class Loads(KVConnectorMetadata):  # type: ignore[misc]  # vLLM is not installed here
    """What the workers shall do before the next step."""

    loads: list[Load] = field(default_factory=list)


class ControlPrefixConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """See the module. Of `kv_connector_extra_config`:

    `folder` is where the gateway writes prefixes; `cached_bytes` how much of them a worker keeps
    in its host's memory (1 GiB).
    """

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        told = self._kv_transfer_config.get_from_extra_config
        folder = told("folder", None)
        if folder is None:
            raise ValueError("kv_connector_extra_config names no folder of prefixes")
        if self._kv_transfer_config.kv_load_failure_policy != "fail":
            raise ValueError(
                "kv_load_failure_policy must be 'fail': placeholders cannot be computed again"
            )
        self._folder = PrefixFolder(folder)
        self._cache = PrefixCache(int(told("cached_bytes", 1 << 30)))
        self._pending: list[Load] = []
        self._done: set[str] = set()
        self._failed: set[str] = set()
        self._groups = kv_cache_config.kv_cache_groups

    # --- in the scheduler --------------------------------------------------------------------

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int, bool]:
        """How many placeholders are still to be filled; loads run beside other requests."""
        asked = _asked(request)
        if asked is None:
            return 0, False
        missing = max(0, asked[1] - num_computed_tokens)
        return missing, missing > 0

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Note what to write, now that there is a place for it."""
        asked = _asked(request)
        if asked is None or num_external_tokens <= 0:
            return
        digest, num_slots = asked
        self._pending.append(
            Load(
                request.request_id,
                digest,
                num_slots - num_external_tokens,
                num_slots,
                tuple(list(group) for group in blocks.get_block_ids()),
            )
        )

    def build_connector_meta(self, scheduler_output: Any) -> Loads:
        """What there is to do in the next step."""
        pending, self._pending = self._pending, []
        return Loads(pending)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, None]:
        """Blocks may be freed at once."""
        return False, None

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, None]:
        """Blocks may be freed at once."""
        return False, None

    # --- in a worker -------------------------------------------------------------------------

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Write all slots that are to be loaded."""
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, Loads)
        for load in metadata.loads:
            try:
                self._write(load, forward_context.no_compile_layers)
            except (ControlPrefixError, OSError) as error:
                _log.error("request %s: %s", load.request, error)
                self._failed.add(load.request)
            self._done.add(load.request)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Which requests have their slots, and which will never have them."""
        done, failed = self._done, self._failed
        self._done, self._failed = set(), set()
        return KVConnectorTransferResults(finished_recving=done, failed_recving=failed)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing is loaded during a step."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Nothing is saved."""

    def wait_for_save(self) -> None:
        """Nothing is saved."""

    def _read(self, digest: str) -> Prefix:
        key = PrefixKey("user", digest)
        prefix = self._cache.held([key]).get(digest)
        if prefix is None:
            prefix = self._folder.read(digest)
            self._cache.put(key, digest, prefix)
        return prefix

    def _write(self, load: Load, layers: dict[str, Any]) -> None:
        prefix = self._read(load.digest)
        if prefix.num_slots != load.last:
            raise GeometryMismatchError(
                f"prefix {load.digest} has {prefix.num_slots} slots; the request says {load.last}"
            )
        positions = torch.arange(load.first, load.last)
        for group, blocks in zip(self._groups, load.blocks, strict=True):
            size = group.kv_cache_spec.block_size
            block = torch.tensor(blocks)[positions // size]
            # Block 0 is nobody's: its tokens have left a sliding window.
            kept = block != 0
            where = (block * size + positions % size)[kept]
            for name in group.layer_names:
                if name in layers and len(where):
                    self._write_layer(name, layers[name], prefix, positions[kept], where)

    @staticmethod
    def _write_layer(name: str, layer: Any, prefix: Prefix, slots: Tensor, where: Tensor) -> None:
        index = int(_only(_LAYER.findall(name), name))
        keys, values = prefix.layer("decoder", index)  # (num_kv_heads, num_slots, head_dim)
        here = layer.num_kv_heads
        rank, of = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        first = rank * len(keys) // of  # fewer heads than ranks: they are repeated
        shard = slice(first, first + here)
        if len(keys[shard]) != here or keys.shape[2] != layer.head_size:
            raise GeometryMismatchError(
                f"layer {name} of vLLM has {here} kv heads of {layer.head_size} numbers; the "
                f"prefix has {len(keys)} of {keys.shape[2]}: it is another model's"
            )
        cache = layer.kv_cache
        dtype = cache.dtype if cache.dtype.is_floating_point else keys.dtype
        chosen = [
            one[shard][:, slots].transpose(0, 1).to(cache.device, dtype).contiguous()
            for one in (keys, values)
        ]
        layer.impl.do_kv_cache_update(layer, *chosen, cache, where.to(cache.device))


def _asked(request: Any) -> tuple[str, int] | None:
    """The digest and the number of slots that a request asks for.

    What makes no sense asks for a prefix that nobody has: the scheduler must not fail, and the
    request must.
    """
    about = (request.kv_transfer_params or {}).get(PARAMETER)
    if about is None:
        return None
    digest = about.get("digest") if isinstance(about, dict) else None
    count = about.get("num_slots") if isinstance(about, dict) else None
    if (
        isinstance(digest, str)
        and _DIGEST.fullmatch(digest)
        and isinstance(count, int)
        and 0 < count < request.num_tokens
    ):
        return digest, count
    return "nonsense", min(1, request.num_tokens - 1)


def _only(found: Iterable[str], name: str) -> str:
    (one,) = found or ("",)
    if not one:
        raise GeometryMismatchError(f"vLLM calls a layer {name!r}, in which no number is found")
    return one
