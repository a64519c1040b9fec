"""Sampled against greedy generation, and the running batch against `generate`.

The same requests, each of another user, in every way; and plain texts by transformers alone, by
its `generate` and by its continuous batching.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from transformers import ContinuousBatchingConfig, ContinuousBatchingManager

from controlprefix import ControlPrefix, Request
from controlprefix.model import FrozenModel
from controlprefix.model.padding import pad_rows

from lib.interleaved import Comparison, compare, timed
from lib.models import add_model_options, engine, load_from, random_prefix
from lib.results import arguments, save_comparisons

SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 0.9},
    "temperature, top_p": {"temperature": 0.9, "top_p": 0.9},
    "temperature, top_k, top_p, min_p, penalties": {
        "temperature": 0.9,
        "top_k": 50,
        "top_p": 0.9,
        "min_p": 0.02,
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.1,
    },
}


def requests(rows: int, tokens: int, fields: dict[str, Any]) -> list[Request]:
    """Requests of different users, with seeds if they are sampled."""
    return [
        Request(
            prompt=f"Write a short letter about topic {i}.",
            user=f"user-{i}",
            max_new_tokens=tokens,
            **fields,
            **({"seed": i} if fields else {}),
        )
        for i in range(rows)
    ]


def with_transformers(
    frozen: FrozenModel, rows: int, tokens: int, fields: dict[str, Any]
) -> Callable[[], object]:
    """Plain `generate` of transformers, with its own sampling."""
    prompts = [frozen.request_tokenizer.prompt_ids(r) for r in requests(rows, tokens, {})]
    ids, mask = pad_rows(prompts, frozen.pad_id, left=True)
    own = {name: value for name, value in fields.items() if name != "frequency_penalty"}
    generate: Any = frozen.model.generate
    return partial(
        generate,
        input_ids=ids.to(frozen.device),
        attention_mask=mask.to(frozen.device),
        do_sample=bool(fields),
        max_new_tokens=tokens,
        pad_token_id=frozen.pad_id,
        **({"top_k": 0, "top_p": 1.0, **own} if fields else {}),
    )


def continuous_batching(frozen: FrozenModel, rows: int, tokens: int) -> ContinuousBatchingManager:
    """transformers' own running batch, greedy, with a KV cache for all rows."""
    model: Any = frozen.model
    config = copy.deepcopy(model.generation_config)
    config.update(do_sample=False, max_new_tokens=tokens, pad_token_id=frozen.pad_id)
    pages = ContinuousBatchingConfig(
        page_size=64, num_blocks=4 * rows, max_batch_tokens=512, auto_switch_to_flash=False
    )
    manager: ContinuousBatchingManager = model.init_continuous_batching(
        generation_config=config, continuous_batching_config=pages
    )
    return manager


def run_all(manager: ContinuousBatchingManager, prompts: list[list[int]], tokens: int) -> None:
    """Wait for the texts of all prompts.

    Raises:
        RuntimeError: If transformers fails on a prompt.
    """
    waiting = set(manager.add_requests(prompts, max_new_tokens=tokens))
    while waiting:
        result = manager.get_result(timeout=1)
        if result is not None and result.is_finished():
            if result.error is not None:
                raise RuntimeError(result.error)
            waiting.remove(result.request_id)
        elif result is None and not manager.is_running():
            raise RuntimeError("transformers' continuous batching ended before its requests")


def measure(
    frozen: FrozenModel, cp: ControlPrefix, rows: int, tokens: int, rounds: int
) -> list[Comparison]:
    """All ways of one batch size."""
    batcher = cp.batcher(max_sequences=rows)

    def in_running_batch(fields: dict[str, Any]) -> None:
        tickets = [batcher.submit(cp.resolve(r)) for r in requests(rows, tokens, fields)]
        for ticket in tickets:
            ticket.result()

    def in_generate(fields: dict[str, Any]) -> None:
        cp.generate(requests(rows, tokens, fields), batch_size=rows)

    ways: dict[str, Callable[[], object]] = {}
    for name, fields in SETTINGS.items():
        ways[f"generate, {name}"] = partial(in_generate, fields)
    for name in ("greedy", list(SETTINGS)[-1]):
        ways[f"running batch, {name}"] = partial(in_running_batch, SETTINGS[name])
        plain = with_transformers(frozen, rows, tokens, SETTINGS[name])
        ways[f"transformers without prefixes, {name}"] = plain
    manager = continuous_batching(frozen, rows, tokens)
    prompts = [list(frozen.request_tokenizer.prompt_ids(r)) for r in requests(rows, tokens, {})]
    manager.start()
    ways["transformers' continuous batching without prefixes, greedy"] = partial(
        run_all, manager, prompts, tokens
    )
    contenders = {name: timed(way) for name, way in ways.items()}
    try:
        return compare(f"{rows} rows, {tokens} tokens", contenders, rounds=rounds)
    finally:
        manager.stop(block=True)
        batcher.close()


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, rounds=3)
    add_model_options(parser)
    parser.add_argument("--rows", type=int, nargs="+", default=[32])
    parser.add_argument("--tokens", type=int, default=24)
    options = parser.parse_args(argv)

    frozen = load_from(options)
    cp = engine(frozen)
    for i in range(max(options.rows)):
        cp.put("user", f"user-{i}", random_prefix(frozen.model, 16, i))
    save_comparisons(
        options.results,
        f"sampling-{options.model}-{options.device}",
        [
            comparison
            for rows in options.rows
            for comparison in measure(frozen, cp, rows, options.tokens, options.rounds)
        ],
        reference="generate, greedy",
        model=frozen,
    )


if __name__ == "__main__":
    main()
