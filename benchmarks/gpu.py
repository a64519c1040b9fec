"""What a GPU is measured with, in one command of under nine minutes.

The exactness tests run on the device first. Then follow decoding and training steps of models of
several shapes with random weights, attention of one new token in several ways, and generation
with compiled static caches. On another device the same runs, on smaller shapes if asked to.
"""

import shlex
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import decoding
import sampling
import torch
import training_speed
from rich.console import Console
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from controlprefix.errors import short_reason
from controlprefix.model.decode_kernel import Segment, segmented_attention
from controlprefix.model.steering import Steering

from lib.interleaved import Comparison, Measures, compare, now, timed
from lib.models import NAMES, load, mixed_batch, random_prompts
from lib.results import ROOT, arguments, save_comparisons

EXACTNESS = (
    "assembly",
    "attention",
    "attention_gradients",
    "batching",
    "cache",
    "compile",
    "guidance",
    "resolve",
    "steering",
)
PARTS = ("exactness", "attention", "kernels", "decoding", "training", "compiled", "sampling")
console = Console()
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128  # of a layer of Llama 3.1 8B


def exactness(device: str, options: Sequence[str]) -> list[str]:
    """Run the tests of exactness on the device, and count their outcomes."""
    files = [str(ROOT / "tests" / f"test_{name}.py") for name in EXACTNESS]
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = (
            sys.executable,
            "-m",
            "pytest",
            "-q",
            f"--device={device}",
            "-p no:cacheprovider",
        )
        subprocess.run([*command, f"--junitxml={report}", *options, *files], cwd=ROOT, check=False)
        suite = ElementTree.parse(report).getroot()[0]
    total, failed, skipped = (int(suite.get(name, 0)) for name in ("tests", "failures", "skipped"))
    failed += int(suite.get("errors", 0))
    return [
        f"exactness tests on {device}: {total - failed - skipped} passed, {failed} failed, "
        f"{skipped} skipped"
    ]


def attention(
    device: str, rows: Sequence[int], slots: Sequence[int], tokens: int, rounds: int
) -> list[Comparison]:
    """One new token per row in one layer: ways to attend to slots beside the tokens."""
    dtype = torch.bfloat16 if device != "cpu" else torch.float32
    results = []
    for num_rows in rows:
        for num_slots in slots:
            query, *cached = (
                torch.randn(num_rows, heads, length, HEAD_DIM, device=device, dtype=dtype)
                for heads, length in (
                    (HEADS, 1),
                    (KV_HEADS, tokens),
                    (KV_HEADS, tokens),
                    (KV_HEADS, num_slots),
                    (KV_HEADS, num_slots),
                )
            )
            grouped = query.view(num_rows, KV_HEADS, -1, HEAD_DIM)
            ways: dict[str, Callable[[], Tensor]] = {
                "tokens alone": partial(_joined, grouped, cached[:2]),
                "joined": partial(_joined, grouped, cached),
                "segments": partial(_in_segments, query, cached),
                "flash, merged": partial(_merged, grouped, cached),
            }
            flex = partial(_with_flex_attention, query, cached)
            try:
                flex()  # compiled here, for any number of rows, slots and tokens
                ways["FlexAttention"] = flex
            except Exception as error:  # such as without a compiler
                console.print(f"FlexAttention: {short_reason(error)}", style="yellow")
            contenders = {name: timed(partial(_repeat, way)) for name, way in ways.items()}
            case = f"{num_rows} rows, {num_slots} own slots, {tokens} tokens"
            results += compare(case, contenders, rounds=rounds, warm_up=3)
    return results


def _joined(query: Tensor, cached: Sequence[Tensor]) -> Tensor:
    key, value, *slots = cached
    if slots:
        key, value = torch.cat([slots[0], key], 2), torch.cat([slots[1], value], 2)
    return scaled_dot_product_attention(query, key, value)


def _in_segments(query: Tensor, cached: Sequence[Tensor]) -> Tensor:
    key, value, slot_keys, slot_values = cached
    segments = [Segment(key, value, None), Segment(slot_keys, slot_values, None)]
    return segmented_attention(query, segments, None)


def _merged(query: Tensor, cached: Sequence[Tensor]) -> Tensor:
    """Two calls of flash attention, merged by the logarithms of their normalizers."""
    aten = torch.ops.aten
    flash = (
        aten._scaled_dot_product_flash_attention_for_cpu
        if query.device.type == "cpu"
        else aten._scaled_dot_product_flash_attention
    )
    outputs, log_sums = zip(*(flash(query, *cached[i : i + 2])[:2] for i in (0, 2)), strict=True)
    weights = torch.stack(log_sums).softmax(0)[..., None].to(query.dtype)
    merged: Tensor = weights[0] * outputs[0] + weights[1] * outputs[1]
    return merged


def _with_flex_attention(query: Tensor, cached: Sequence[Tensor]) -> Tensor:
    """One fused call on joined keys, with the slots' log strengths in its function of scores."""
    key, value, slot_keys, slot_values = cached
    num_slots = slot_keys.shape[2]
    log_strengths = torch.zeros(len(query), num_slots + key.shape[2], device=query.device)

    def with_strength(score: Tensor, row: Tensor, head: Tensor, at: Tensor, slot: Tensor) -> Tensor:
        return score + log_strengths[row, slot]

    attend: Any = flex_attention if query.device.type == "cpu" else _compiled_flex_attention()
    keys, values = torch.cat([slot_keys, key], 2), torch.cat([slot_values, value], 2)
    output: Tensor = attend(query, keys, values, score_mod=with_strength, enable_gqa=True)
    return output


@cache
def _compiled_flex_attention() -> Any:
    return torch.compile(flex_attention, dynamic=True)


def _repeat(work: Callable[[], Tensor], times: int = 20) -> None:
    for _ in range(times):
        work()


def compiled(name: str, device: str, rows: int, tokens: int, rounds: int) -> list[Comparison]:
    """`generate` with transformers' dynamic cache and with its compiled static cache."""
    model = load(name, device).model
    generate: Any = model.generate
    steering = Steering.for_model(model)
    batches = {"plain": None, "16 own slots": mixed_batch(model, rows, 16)}
    options = {
        **random_prompts(rows, 24, device),
        "do_sample": False,
        "max_new_tokens": tokens,
        "min_new_tokens": tokens,
    }

    def run(batch: Any, **cache: Any) -> Measures:
        start = now()
        if batch is None:
            generate(**options, **cache)
        else:
            with steering.attached(batch):
                generate(**options, **cache)
        return {"seconds": now() - start}

    contenders = {
        f"{title}, {cache} cache": partial(
            run, batch, **({"cache_implementation": "static"} if cache == "static" else {})
        )
        for cache in ("dynamic", "static")
        for title, batch in batches.items()
    }
    return compare(f"{rows} rows, {tokens} tokens", contenders, rounds=rounds, warm_up=2)


def kernels(name: str, device: str, rows: int, tokens: int) -> list[Comparison]:
    """Decode steps with torch's choice of attention kernels, and without cuDNN's."""
    model = load(name, device).model
    batches = {"plain": None, "16 own slots": mixed_batch(model, rows, 16)}
    results = []
    for title, batch in batches.items():
        contenders: dict[str, Callable[[], Measures]] = {}
        for uses_cudnn in (True, False):
            decoder = decoding.Decoder(model, batch, rows, 24, growing=batch is not None)
            decoder.first()

            def step(decoder: decoding.Decoder = decoder, cudnn: bool = uses_cudnn) -> Measures:
                torch.backends.cuda.enable_cudnn_sdp(cudnn)
                return decoder.next()

            contenders["torch's choice" if uses_cudnn else "without cuDNN"] = step
        results += compare(f"{title}, {rows} rows", contenders, rounds=tokens, warm_up=2)
    return results


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", choices=NAMES, default=["qwen-0.5b", "qwen-1.5b"])
    parser.add_argument("--large", choices=NAMES, default="llama-8b", help="decodes only")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--num-slots", type=int, nargs="+", default=[16, 48, 128])
    parser.add_argument("--tokens", type=int, default=16, help="decode steps measured")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="only these")
    parser.add_argument("--pytest", default="-n 8", help="options for pytest")
    options = parser.parse_args(argv)
    device, results, rounds = options.device, options.results, options.rounds

    common = ["--device", device, "--rounds", str(rounds), "--results", str(results)]
    first = options.models[0]
    rows, tokens = options.rows[-2], 4 * options.tokens
    parts = options.parts
    if "exactness" in parts:
        notes = exactness(device, shlex.split(options.pytest))
        save_comparisons(
            results, f"exactness-{device}", [], reference="the same on the CPU", notes=notes
        )
    if "attention" in parts:
        save_comparisons(
            results,
            f"attention-{device}",
            attention(device, options.rows, options.num_slots, 256, rounds),
            reference="the tokens alone",
            notes=[f"{HEADS} heads, {KV_HEADS} kv heads of {HEAD_DIM}; each measure is 20 calls"],
        )
    if "kernels" in parts:
        save_comparisons(
            results,
            f"kernels-{device}",
            kernels(first, device, options.rows[1], options.tokens),
            reference="torch's choice",
            model=load(first, device),
        )
    torch.backends.cuda.enable_cudnn_sdp(False)  # from here on, for plain models too
    if "decoding" in parts:
        numbers = [
            *("--rows", *map(str, options.rows)),
            *("--num-slots", *map(str, options.num_slots)),
            *("--tokens", str(options.tokens)),
        ]
        for name in (*options.models, options.large):
            decoding.main([*common, "--model", name, *numbers])
    if "training" in parts:
        for name in options.models:
            training_speed.main([*common, "--model", name])
    if "compiled" in parts:
        save_comparisons(
            results,
            f"compiled-{first}-{device}",
            compiled(first, device, rows, tokens, rounds),
            reference="plain, dynamic cache",
            model=load(first, device),
        )
    if "sampling" in parts:
        sizes = ["--rows", str(rows), "--tokens", str(tokens)]
        sampling.main([*common, "--model", first, *sizes])


if __name__ == "__main__":
    main()
