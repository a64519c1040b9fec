"""How far a strength in vLLM is from the exact one. Needs an environment with vLLM.

vLLM's attention has no weights: a strength between whole numbers changes the keys of slots
(`controlprefix.model.mass_in_keys`). The next token's distribution after general texts is compared
with that of this library's own engine, by KL divergence over the most likely tokens and all
others together. Strength 1 shows what vLLM's own arithmetic differs by.
"""

import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from controlprefix import ControlPrefix, Request, RequestError
from controlprefix.data.general import general_prompts
from controlprefix.inference.runner import Runner

from lib.results import arguments, save
from lib.servers import free_port, vllm_server
from lib.tables import header, line

TEXTS = {
    "pirate": "You are a pirate. Answer every question like a pirate, with arr and matey.",
    "formal": "Please answer in very formal and polite English, as a butler would speak.",
    "posts": "had the best day ever!!! went to the beach with my sister lol, so tired now :)",
}
NUM_TOP = 200


def distributions(
    cp: ControlPrefix, runner: Runner, requests: Iterable[Request], top: int
) -> list[dict[int, float]]:
    """The most likely next tokens of each request, with their log-probabilities."""
    tickets = [runner.submit(cp.resolve(request), top_log_probs=top) for request in requests]
    for ticket in tickets:
        ticket.result()
    return [dict(ticket.tokens[0].top) for ticket in tickets]


def kl_divergence(exact: Mapping[int, float], other: Mapping[int, float]) -> float:
    """KL divergence (nats) over the tokens that both name, and all others as one."""
    common = exact.keys() & other.keys()
    divergence = sum(math.exp(exact[token]) * (exact[token] - other[token]) for token in common)
    rest, other_rest = (
        max(1 - sum(math.exp(named[token]) for token in common), 1e-12) for named in (exact, other)
    )
    return divergence + rest * math.log(rest / other_rest)


def measured(
    cp: ControlPrefix,
    runner: Runner,
    users: Sequence[str],
    strengths: Sequence[float],
    *,
    num_prompts: int,
    top: int = NUM_TOP,
) -> dict[str, dict[str, Any]]:
    """Per user and strength: mean and largest divergence, and that of strength 1 in its place."""
    prompts = general_prompts(measuring=True)[:num_prompts]
    results: dict[str, dict[str, Any]] = {}

    def asked(user: str, strength: float) -> list[Request]:
        return [
            Request(prompt=prompt, user=user, strengths={"user": strength}, max_new_tokens=1)
            for prompt in prompts
        ]

    with closing(cp.batcher()) as own:
        for user in users:
            unchanged = distributions(cp, own, asked(user, 1.0), top)
            for strength in strengths:
                requests = asked(user, strength)
                exact = distributions(cp, own, requests, top)
                try:
                    there = distributions(cp, runner, requests, top)
                except RequestError as error:
                    results.setdefault(user, {})[str(strength)] = {"refused": str(error)}
                    continue
                divergences = [kl_divergence(*pair) for pair in zip(exact, there, strict=True)]
                off = [kl_divergence(*pair) for pair in zip(exact, unchanged, strict=True)]
                results.setdefault(user, {})[str(strength)] = {
                    "mean": sum(divergences) / len(divergences),
                    "largest": max(divergences),
                    "strength 1": sum(off) / len(off),
                }
                print(user, strength, results[user][str(strength)], flush=True)
    return results


def page(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    rows = [
        line(user, strength, *([f"refused: {figures['refused']}", "", ""] if "refused" in figures
             else [f"{figures[name]:.4f}" for name in ("mean", "largest", "strength 1")]))
        for user, by_strength in results["divergences"].items()
        for strength, figures in by_strength.items()
    ]  # fmt: skip
    return "\n\n".join(
        [
            "# Strengths in vLLM",
            f"SmolLM2-135M in {results['options']['dtype']}; next tokens of "
            f"{results['options']['prompts']} general prompts, prefixes of texts of "
            f"about 20 tokens. Written by `{results['command']}` at commit {results['commit']}, "
            f"{results['date']}.",
            "KL divergence (nats) of vLLM's next token from that of this library's own engine, "
            "and, for comparison, of strength 1 instead of the requested one.",
            "\n".join([header("prefix", "strength", "mean", "largest", "of strength 1"), *rows]),
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32")
    parser.add_argument("--prompts", type=int, default=30)
    parser.add_argument(
        "--strengths", type=float, nargs="+",
        default=[0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0],
    )  # fmt: skip
    options = parser.parse_args(argv)
    cp = ControlPrefix.from_pretrained("smollm2", store="sqlite://", dtype=options.dtype)
    for user, text in TEXTS.items():
        cp.put("user", user, cp.prefix_from_text(text))
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), free_port()
        more = ("--max-logprobs", str(NUM_TOP), "--enforce-eager")
        with vllm_server(
            port, folder / "prefixes", folder / "vllm.log", *more, dtype=options.dtype
        ) as url:
            runner = cp.vllm_runner(url, folder / "prefixes")
            results = measured(
                cp, runner, list(TEXTS), options.strengths, num_prompts=options.prompts
            )
            runner.close()
    about = {"dtype": options.dtype, "prompts": options.prompts}
    save(options.results, "vllm-strengths", {"options": about, "divergences": results}, page)


if __name__ == "__main__":
    main()
