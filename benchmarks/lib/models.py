"""The models of the benchmarks: SmolLM2, larger shapes with random weights, and a tiny one.

Speed does not depend on the values of weights. The tiny one is for tests of the benchmarks.
"""

import argparse
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from controlprefix import ControlPrefix, Example, Part, Prefix, PrefixBatch, assemble
from controlprefix.model import FrozenModel
from controlprefix.model.loading import packaged_model
from controlprefix.model.steering import Steering

# Qwen2.5 0.5B and 1.5B, Llama 3.2 1B and 3.1 8B as published, and the tiny one: hidden size,
# layers, heads, kv heads, intermediate size. All are built as Llamas.
_SHAPES = {
    "qwen-0.5b": (896, 24, 14, 2, 4864),
    "qwen-1.5b": (1536, 28, 12, 2, 8960),
    "llama-1b": (2048, 16, 32, 8, 8192),
    "llama-8b": (4096, 32, 32, 8, 14336),
    "tiny": (16, 2, 2, 1, 32),
}
NAMES = ("smollm2", *_SHAPES)
DTYPES = ("auto", "bfloat16", "float32")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add `--model`, `--device` and `--dtype`."""
    parser.add_argument("--model", choices=NAMES, default="smollm2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="auto: as the library chooses it"
    )


@cache
def load(name: str, device: str = "cpu", dtype: str = "auto") -> FrozenModel:
    """A frozen model with SmolLM2's tokenizer; all shapes have at least its vocabulary."""
    if name == "smollm2":
        return FrozenModel.from_pretrained(name, device=device, dtype=dtype)
    hidden_size, num_layers, num_heads, num_kv_heads, intermediate_size = _SHAPES[name]
    config = LlamaConfig(
        vocab_size=49152 if name == "tiny" else 128256,
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        intermediate_size=intermediate_size,
        max_position_embeddings=8192,
        tie_word_embeddings=name != "llama-8b",
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    by_default = torch.float32 if name == "tiny" else torch.bfloat16
    torch.set_default_dtype(by_default if dtype == "auto" else getattr(torch, dtype))
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    tokenizer = AutoTokenizer.from_pretrained(packaged_model("smollm2"))
    return FrozenModel(model.requires_grad_(False).eval(), tokenizer)


def load_from(options: argparse.Namespace) -> FrozenModel:
    """The model that the options name."""
    return load(options.model, options.device, options.dtype)


def folder_of(options: argparse.Namespace, folder: Path) -> str:
    """What another process loads the model by: its name, or a folder that it is saved to."""
    if options.model == "smollm2":
        return "smollm2"
    frozen = load_from(options)
    frozen.model.save_pretrained(folder)
    frozen.tokenizer.save_pretrained(folder)
    return str(folder)


def engine(frozen: FrozenModel, store: str = "sqlite://") -> ControlPrefix:
    """The public class over a loaded model."""
    return ControlPrefix.from_pretrained(frozen.model, tokenizer=frozen.tokenizer, store=store)


def nats(cp: ControlPrefix, rows: Sequence[Example]) -> float:
    """Nats per token of the completions."""
    scores = cp.score(rows)
    return -sum(s.log_likelihood for s in scores) / sum(s.num_tokens for s in scores)


def random_prefix(model: PreTrainedModel, num_slots: int, seed: int) -> Prefix:
    """Random slots of a scale that attention notices, but that does not derail the model."""
    geometry = Steering.for_model(model).geometry
    prefix = Prefix.random(geometry, num_slots=num_slots, scale=0.5, seed=seed)
    return prefix.to(device=model.device, dtype=model.dtype)


def mixed_parts(
    model: PreTrainedModel, rows: int, own_slots: int, task_slots: int = 0
) -> list[list[Part]]:
    """Rows that each have slots of their own, and optionally those of a shared task."""
    task = [Part(random_prefix(model, task_slots, 0))] if task_slots else []
    return [[*task, Part(random_prefix(model, own_slots, i + 1))] for i in range(rows)]


def assembled(model: PreTrainedModel, parts: list[list[Part]]) -> PrefixBatch:
    """Parts put together for the model."""
    geometry = Steering.for_model(model).geometry
    return assemble(parts, geometry, device=model.device, dtype=model.dtype)


def mixed_batch(
    model: PreTrainedModel, rows: int, own_slots: int, task_slots: int = 0
) -> PrefixBatch:
    """A prefix batch of `mixed_parts`."""
    return assembled(model, mixed_parts(model, rows, own_slots, task_slots))


def random_prompts(rows: int, length: int, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Token ids and mask of prompts of up to four lengths, padded on the left."""
    ids = torch.randint(5, 40_000, (rows, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    for i in range(rows):
        mask[i, : 2 * (i % 4)] = 0
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
