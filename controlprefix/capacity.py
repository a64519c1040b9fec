"""Capacity: what users and requests take, in bytes, memory and processes.

Arithmetic only; what depends on the machine (tokens per second, seconds per user) is measured and
given.
"""

import math
from dataclasses import asdict, dataclass
from typing import Final, Literal

Form = Literal["code", "int8", "bfloat16"]

CODE_BYTES: Final = 1_416  # of the decoder with the default sizes, whatever the model
_ROW_BYTES: Final = 750  # of names, versions and indexes per user, on PostgreSQL
_HEADER_BYTES: Final = 800  # of a safetensors file
_PAGE_OVERHEAD: Final = 1.03  # pages that are not full
_CACHE_BYTES: Final = 512 << 20  # of prefixes in a server's memory
_UTILIZATION: Final = 0.7  # above which waiting lines grow


@dataclass(frozen=True)
class Load:
    """What is asked of a deployment.

    Attributes:
        slot_values: Values of one slot: keys and values of all layers and kv heads.
        slot_heads: Key heads and value heads of all layers; int8 has a scale for each.
        num_parameters: The model's weights.
        users, num_slots: Users, and slots of each prefix.
        form: How prefixes are stored.
        requests_per_second: At the peak.
        prompt_tokens, new_tokens: Per request.
        tokens_per_second: New tokens of all requests together that one process writes.
        seconds_per_user: Training of a user, as `train_users` reports it; 0 for codes that are
            predicted.
        max_sequences: Requests that a process runs at a time.
    """

    slot_values: int
    slot_heads: int
    num_parameters: int
    users: int = 1000
    num_slots: int = 16
    form: Form = "int8"
    requests_per_second: float = 1.0
    prompt_tokens: int = 200
    new_tokens: int = 200
    tokens_per_second: float = 100.0
    seconds_per_user: float = 0.0
    max_sequences: int = 32


@dataclass(frozen=True)
class Capacity:
    """What a load takes.

    Attributes:
        slot_bytes: One slot, or one token, in a running request's memory (16 bits per value).
        prefix_bytes: A user's prefix in memory.
        stored_bytes: A user in the store, rows and indexes included.
        store_bytes: All users in the store.
        num_processes: Processes that serve the requests at 70 % of their speed.
        process_bytes: Memory of each: weights, prefixes in use, and keys and values.
        training_hours: Hours of one process to train all users once.
    """

    slot_bytes: int
    prefix_bytes: int
    stored_bytes: int
    store_bytes: int
    num_processes: int
    process_bytes: int
    training_hours: float

    @property
    def advice(self) -> str:
        """What to run, as the guide on capacity describes it."""
        if self.num_processes == 1 and self.store_bytes < 50e9:
            return "one process and SQLite"
        if self.num_processes <= 4:
            return "processes that share PostgreSQL, behind a balancer"
        return "vLLM and gateways that share PostgreSQL, behind a balancer"


def capacity(load: Load) -> Capacity:
    """What a load takes.

    Raises:
        ValueError: If a number is negative, or a size is not above 0.
    """
    sizes = (load.slot_values, load.slot_heads, load.num_slots, load.max_sequences)
    numbers = (load.users, load.requests_per_second, load.prompt_tokens, load.new_tokens)
    if min(sizes) < 1 or min(*numbers, load.seconds_per_user) < 0 or load.tokens_per_second <= 0:
        values_by_name = {name: value for name, value in asdict(load).items() if name != "form"}
        negative = [f"{n} is {v}" for n, v in values_by_name.items() if v is not None and v < 0]
        reason = f": {', '.join(negative)}" if negative else ""
        raise ValueError(
            f"sizes and tokens_per_second must be above 0, and no number negative{reason}"
        )
    values, scales = load.slot_values, load.slot_heads
    payload = {
        "code": CODE_BYTES,
        "int8": _HEADER_BYTES + load.num_slots * (values + 2 * scales),
        "bfloat16": _HEADER_BYTES + load.num_slots * 2 * values,
    }[load.form]
    stored = round(payload * _PAGE_OVERHEAD) + _ROW_BYTES
    tokens_per_request = load.prompt_tokens + load.new_tokens + load.num_slots
    needed = load.requests_per_second * load.new_tokens
    return Capacity(
        slot_bytes=2 * values,
        prefix_bytes=2 * values * load.num_slots,
        stored_bytes=stored,
        store_bytes=stored * load.users,
        num_processes=max(1, math.ceil(needed / (_UTILIZATION * load.tokens_per_second))),
        process_bytes=2 * load.num_parameters
        + _CACHE_BYTES
        + load.max_sequences * tokens_per_request * 2 * values,
        training_hours=load.users * load.seconds_per_user / 3600,
    )
