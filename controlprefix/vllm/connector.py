"""KV connector for vLLM: writes assembled prefixes into its cache instead of computing them.

It runs inside vLLM, in an environment that has both packages:

    --kv-transfer-config '{"kv_connector": "ControlPrefixConnector",
        "kv_connector_module_path": "controlprefix.vllm.connector", "kv_role": "kv_both",
        "kv_connector_extra_config": {"folder": "/prefixes"}}'

A request with `kv_transfer_params={"controlprefix": {"file": …, "num_slots": P}}` starts with P
placeholder tokens; before it runs, their keys and values are written by the attention backend's
own function, so no layout is assumed. A prefix that cannot be read fails its own request, if that
has a token to compute beside the last one. A client that sets these parameters is trusted: expose
vLLM to the server only.
"""

import logging
import re
import time
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
from controlprefix.prefixes import Prefix
from controlprefix.store import PrefixCache
from controlprefix.vllm.prefix_folder import PrefixFolder

PARAMETER = "controlprefix"  # key in `kv_transfer_params`
_FILE = re.compile(r"(?:[0-9a-f]{32}-)?[0-9a-f]{64}")
_LAYER = re.compile(r"\blayers\.(\d+)\.")
_CHECK_INTERVAL_S = 60.0  # between looks for files that were removed
_log = logging.getLogger("vllm.controlprefix")


@dataclass(frozen=True)
class SlotLoad:
    """Slots to write for one request.

    Attributes:
        request: Id of the request.
        file: Names the file of slots.
        first, last: Slots `first:last`; those before are in the cache already.
        blocks: Per group of layers, the request's blocks from its first token on.
    """

    request: str
    file: str
    first: int
    last: int
    blocks: tuple[list[int], ...]


@dataclass
class Loads(KVConnectorMetadata):  # type: ignore[misc]  # vLLM is not installed here
    """Slots that the workers write before the next step."""

    loads: list[SlotLoad] = field(default_factory=list)


class ControlPrefixConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """Writes slots into vLLM's KV cache: see the module.

    Settings in `kv_connector_extra_config`: `folder`, where the server writes prefixes,
    `key_file`, with the key that it encrypts them with, if it does, and `cached_bytes`, how much of
    them a worker keeps in host memory (1 GiB).

    Raises:
        ValueError: If the folder is missing, or failed loads would be recomputed.
    """

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        get_setting = self._kv_transfer_config.get_from_extra_config
        folder = get_setting("folder", None)
        if folder is None:
            raise ValueError("kv_connector_extra_config needs the folder of prefixes")
        if self._kv_transfer_config.kv_load_failure_policy != "fail":
            raise ValueError(
                "kv_load_failure_policy must be 'fail': placeholders cannot be recomputed"
            )
        self._folder = PrefixFolder(folder, key_file=get_setting("key_file", None))
        self._cache: PrefixCache[str] = PrefixCache(int(get_setting("cached_bytes", 1 << 30)))
        self._checked_at = time.monotonic()
        self._pending: list[SlotLoad] = []
        self._done: set[str] = set()
        self._failed: set[str] = set()
        self._groups = kv_cache_config.kv_cache_groups

    # --- in the scheduler process -------------------------------------------------------------

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int, bool]:
        """How many placeholders are not cached; loads run asynchronously to other requests."""
        slots = _requested_slots(request)
        if slots is None:
            return 0, False
        missing = max(0, slots[1] - num_computed_tokens)
        return missing, missing > 0

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Queue the slots to write, now that blocks are allocated for them."""
        slots = _requested_slots(request)
        if slots is None or num_external_tokens <= 0:
            return
        file, num_slots = slots
        self._pending.append(
            SlotLoad(
                request.request_id,
                file,
                num_slots - num_external_tokens,
                num_slots,
                tuple(list(group) for group in blocks.get_block_ids()),
            )
        )

    def build_connector_meta(self, scheduler_output: Any) -> Loads:
        """The slots to write before the next step."""
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
        """Write the queued slots."""
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, Loads)
        self._drop_removed()
        for load in metadata.loads:
            try:
                self._write(load, forward_context.no_compile_layers)
            except (ControlPrefixError, OSError) as error:
                _log.error("request %s: %s", load.request, error)
                self._failed.add(load.request)
            self._done.add(load.request)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """The requests whose slots are written, and those whose slots could not be read."""
        done, failed = self._done, self._failed
        self._done, self._failed = set(), set()
        return KVConnectorTransferResults(finished_recving=done, failed_recving=failed)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Does nothing: slots are written before a step."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Does nothing: no KV cache is saved."""

    def wait_for_save(self) -> None:
        """Does nothing: no KV cache is saved."""

    def _drop_removed(self) -> None:
        """Drop from memory, now and then, the prefixes whose files were removed."""
        if time.monotonic() - self._checked_at < _CHECK_INTERVAL_S:
            return
        self._checked_at = time.monotonic()
        for file in self._cache.cached_keys():
            if not self._folder.file(file).exists():
                self._cache.forget(file)

    def _read(self, file: str) -> Prefix:
        cached = self._cache.get([file]).get(file)
        if cached is not None:
            return cached.prefix
        prefix = self._folder.read(file)
        self._cache.put(file, file, prefix)
        return prefix

    def _write(self, load: SlotLoad, layers: dict[str, Any]) -> None:
        prefix = self._read(load.file)
        if prefix.num_slots != load.last:
            raise GeometryMismatchError(
                f"prefix {load.file} has {prefix.num_slots} slots; the request says {load.last}"
            )
        positions = torch.arange(load.first, load.last)
        for group, blocks in zip(self._groups, load.blocks, strict=True):
            if not getattr(group, "enable_kv_transfer", True):  # vLLM 0.33 makes these itself
                continue
            size = group.kv_cache_spec.block_size
            block = torch.tensor(blocks)[positions // size]
            # Block 0 is the null block of tokens that have left a sliding window.
            is_real = block != 0
            cache_slots = (block * size + positions % size)[is_real]
            for name in group.layer_names:
                if name in layers and len(cache_slots):
                    self._write_layer(name, layers[name], prefix, positions[is_real], cache_slots)

    @staticmethod
    def _write_layer(
        name: str, layer: Any, prefix: Prefix, slots: Tensor, cache_slots: Tensor
    ) -> None:
        index = _layer_index(name)
        keys, values = prefix.layer("decoder", index)  # (num_kv_heads, num_slots, head_dim)
        num_heads = layer.num_kv_heads
        rank, world = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        first = rank * len(keys) // world  # with fewer heads than ranks, heads are repeated
        shard = slice(first, first + num_heads)
        if len(keys[shard]) != num_heads or keys.shape[2] != layer.head_size:
            raise GeometryMismatchError(
                f"layer {name} of vLLM has {num_heads} kv heads of size {layer.head_size}; the "
                f"prefix has {len(keys)} of size {keys.shape[2]}: it is for another model"
            )
        cache = layer.kv_cache
        dtype = cache.dtype if cache.dtype.is_floating_point else keys.dtype
        new_keys, new_values = (
            tensor[shard][:, slots].transpose(0, 1).to(cache.device, dtype).contiguous()
            for tensor in (keys, values)
        )
        cache_slots = cache_slots.to(cache.device)
        layer.impl.do_kv_cache_update(layer, new_keys, new_values, cache, cache_slots)


def _requested_slots(request: Any) -> tuple[str, int] | None:
    """The file and the number of slots that a request asks for.

    Invalid parameters ask for a prefix that does not exist: the request must fail, and the
    scheduler must not.
    """
    parameters = (request.kv_transfer_params or {}).get(PARAMETER)
    if parameters is None:
        return None
    file = parameters.get("file") if isinstance(parameters, dict) else None
    count = parameters.get("num_slots") if isinstance(parameters, dict) else None
    if (
        isinstance(file, str)
        and _FILE.fullmatch(file)
        and isinstance(count, int)
        and 0 < count < request.num_tokens
    ):
        return file, count
    return "invalid", min(1, request.num_tokens - 1)


def _layer_index(name: str) -> int:
    """The index in the name of a vLLM layer."""
    indices = _LAYER.findall(name)
    if len(indices) != 1:
        raise GeometryMismatchError(f"vLLM has a layer {name!r}, whose name contains no index")
    return int(indices[0])
