"""Capacity: what users and requests take, in bytes, memory and processes.

Arithmetic only; what depends on the machine (tokens per second, seconds per user) is measured and
given.
"""

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, Self, get_args

from controlprefix.errors import RequestError

if TYPE_CHECKING:
    from controlprefix.model import FrozenModel

StorageFormat = Literal["code", "int8", "bfloat16"]

CODE_WIDTH: Final = 64  # values per slot that a decoder has by default, whatever the model
_CODE_HEADER_BYTES: Final = 352
_ROW_BYTES: Final = 750  # of names, versions and indexes per user, on PostgreSQL
_HEADER_BYTES: Final = 800  # of a safetensors file
_PAGE_OVERHEAD: Final = 1.03  # pages that are not full
_CACHE_BYTES: Final = 512 << 20  # of prefixes in a server's memory, at most
_RUNTIME_BYTES: Final = 600 << 20  # of Python, torch and transformers
_HOURS_PER_MONTH: Final = 730
_UTILIZATION: Final = 0.7  # above which waiting queues grow


@dataclass(frozen=True)
class Workload:
    """What is asked of a deployment.

    Attributes:
        slot_values: Values of one slot: keys and values of all layers and kv heads.
        slot_heads: Key heads and value heads of all layers; int8 has a scale for each.
        weight_bytes: The model's weights in memory.
        value_bytes: A value in memory: 2, or 4 in float32.
        users, num_slots: Users, and slots of each prefix.
        storage_format: How prefixes are stored.
        requests_per_second: At the peak.
        prompt_tokens, new_tokens: Per request.
        tokens_per_second: New tokens of all requests together that one process writes.
        seconds_per_user: Training of a user, as `train_users` reports it; 0 for codes that are
            predicted.
        max_sequences: Rows that a process decodes at a time, as in `serve`.
        price_per_hour: Price of the machine, or the share of one, that a process needs.
        price_per_gb: Price of a gigabyte of the store per month.
    """

    slot_values: int
    slot_heads: int
    weight_bytes: int
    value_bytes: int = 2
    users: int = 1000
    num_slots: int = 16
    storage_format: StorageFormat = "int8"
    requests_per_second: float = 1.0
    prompt_tokens: int = 200
    new_tokens: int = 200
    tokens_per_second: float = 100.0
    seconds_per_user: float = 0.0
    max_sequences: int = 32
    price_per_hour: float = 0.0
    price_per_gb: float = 0.0

    @classmethod
    def for_model(cls, frozen: "FrozenModel", **numbers: Any) -> Self:
        """The workload of a loaded model, from its own shapes and weights.

        Args:
            frozen: The model.
            **numbers: The other fields.
        """
        geometry = frozen.geometry
        shapes = [shape for site in geometry.sites for shape in geometry.layers(site)]
        return cls(
            slot_values=sum(sum(shape.sizes) for shape in shapes),
            slot_heads=sum(2 * shape.num_kv_heads for shape in shapes),
            weight_bytes=sum(p.nbytes for p in frozen.model.parameters()),
            value_bytes=frozen.dtype.itemsize,
            **numbers,
        )


@dataclass(frozen=True)
class Capacity:
    """What a workload takes.

    Attributes:
        slot_bytes: One slot, or one token, in a running request's memory.
        prefix_bytes: A user's prefix in memory.
        stored_bytes: A user in the store, rows and indexes included.
        store_bytes: All users in the store.
        num_processes: Processes that serve the requests at 70 % of their speed.
        process_bytes: Memory of each: weights, prefixes in use, keys and values, and what Python
            and torch take.
        training_hours: Hours of one process to train all users once.
        monthly_cost: Cost of the processes and the store, in the currency of the prices.
        cost_per_million: Cost of storing a million users for a month, and training them once.
    """

    slot_bytes: int
    prefix_bytes: int
    stored_bytes: int
    store_bytes: int
    num_processes: int
    process_bytes: int
    training_hours: float
    monthly_cost: float
    cost_per_million: float

    @property
    def advice(self) -> str:
        """What to run, as the guide on capacity describes it."""
        if self.num_processes == 1 and self.store_bytes < 50e9:
            return "one process and SQLite"
        if self.num_processes <= 4:
            return "processes that share PostgreSQL, behind a balancer"
        return "vLLM and gateways that share PostgreSQL, behind a balancer"


def capacity(workload: Workload) -> Capacity:
    """What a workload takes.

    Raises:
        RequestError: If a number is negative, or a size is not above 0.
    """
    sizes = (workload.slot_values, workload.slot_heads, workload.num_slots, workload.max_sequences)
    numbers = (
        workload.users,
        workload.requests_per_second,
        workload.prompt_tokens,
        workload.new_tokens,
        workload.seconds_per_user,
        workload.price_per_hour,
        workload.price_per_gb,
    )
    if workload.storage_format not in get_args(StorageFormat):
        formats = ", ".join(get_args(StorageFormat))
        raise RequestError(f"storage_format is {workload.storage_format!r}; give one of: {formats}")
    if not all(map(math.isfinite, (*sizes, *numbers, workload.tokens_per_second))):
        raise RequestError("all numbers must be finite")
    if min(sizes) < 1 or min(numbers) < 0 or workload.tokens_per_second <= 0:
        values_by_name = {
            name: value for name, value in asdict(workload).items() if name != "storage_format"
        }
        negative = [f"{n} is {v}" for n, v in values_by_name.items() if v is not None and v < 0]
        reason = f": {', '.join(negative)}" if negative else ""
        raise RequestError(
            f"sizes and tokens_per_second must be above 0, and no number negative{reason}"
        )
    values, scales = workload.slot_values, workload.slot_heads
    payload = {
        "code": _CODE_HEADER_BYTES + workload.num_slots * (CODE_WIDTH + 2),
        "int8": _HEADER_BYTES + workload.num_slots * (values + 2 * scales),
        "bfloat16": _HEADER_BYTES + workload.num_slots * 2 * values,
    }[workload.storage_format]
    stored = round(payload * _PAGE_OVERHEAD) + _ROW_BYTES
    slot_bytes = workload.value_bytes * values
    tokens_per_request = workload.prompt_tokens + workload.new_tokens + workload.num_slots
    needed = workload.requests_per_second * workload.new_tokens
    num_processes = max(1, math.ceil(needed / (_UTILIZATION * workload.tokens_per_second)))
    training_hours = workload.users * workload.seconds_per_user / 3600
    storing = stored * workload.price_per_gb / 1e9
    return Capacity(
        slot_bytes=slot_bytes,
        prefix_bytes=slot_bytes * workload.num_slots,
        stored_bytes=stored,
        store_bytes=stored * workload.users,
        num_processes=num_processes,
        process_bytes=_RUNTIME_BYTES
        + workload.weight_bytes
        + min(_CACHE_BYTES, workload.users * slot_bytes * workload.num_slots)
        + workload.max_sequences * tokens_per_request * slot_bytes,
        training_hours=training_hours,
        monthly_cost=num_processes * _HOURS_PER_MONTH * workload.price_per_hour
        + storing * workload.users,
        cost_per_million=1e6
        * (storing + workload.seconds_per_user / 3600 * workload.price_per_hour),
    )
