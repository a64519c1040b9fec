"""The models that benchmarks run on: the real small one, and larger shapes with random weights.

Speed does not depend on what the weights are.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from controlprefix import Part, Prefix, PrefixBatch, assemble
from controlprefix.model.loading import load
from controlprefix.model.steering import Steering

# From the configurations published with Llama 3.2 1B and 3.1 8B.
_SHAPES = {
    "llama-1b": {"hidden": 2048, "layers": 16, "heads": 32, "kv_heads": 8, "inner": 8192},
    "llama-8b": {"hidden": 4096, "layers": 32, "heads": 32, "kv_heads": 8, "inner": 14336},
}
NAMES = ("smollm2", *_SHAPES)


def build(name: str, device: str) -> PreTrainedModel:
    """A frozen model in bfloat16: `smollm2`, or a shape with random weights."""
    if name not in _SHAPES:
        return load(name, device=device)[0]
    shape = _SHAPES[name]
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=shape["hidden"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        intermediate_size=shape["inner"],
        max_position_embeddings=8192,
        tie_word_embeddings=name == "llama-1b",
    )
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    return model.requires_grad_(False).eval()


def prefix(model: PreTrainedModel, num_slots: int, seed: int) -> Prefix:
    """Random slots that attention notices but that do not derail the model's numbers."""
    geometry = Steering.for_model(model).geometry
    drawn = Prefix.random(geometry, num_slots=num_slots, scale=0.5, seed=seed)
    return drawn.to(device=model.device, dtype=model.dtype)


def mixed_parts(
    model: PreTrainedModel, rows: int, own_slots: int, task_slots: int = 0
) -> list[list[Part]]:
    """Requests that each have slots of their own, and maybe those of a shared task."""
    task = [Part(prefix(model, task_slots, 0))] if task_slots else []
    return [[*task, Part(prefix(model, own_slots, i + 1))] for i in range(rows)]


def assembled(model: PreTrainedModel, parts: list[list[Part]]) -> PrefixBatch:
    """Put together for the model."""
    geometry = Steering.for_model(model).geometry
    return assemble(parts, geometry, device=model.device, dtype=model.dtype)


def mixed_batch(
    model: PreTrainedModel, rows: int, own_slots: int, task_slots: int = 0
) -> PrefixBatch:
    """Both at once."""
    return assembled(model, mixed_parts(model, rows, own_slots, task_slots))


def prompts(rows: int, length: int, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Token ids and the mask of prompts of up to four lengths, padded on the left."""
    ids = torch.randint(5, 40_000, (rows, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    for i in range(rows):
        mask[i, : 2 * (i % 4)] = 0
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
