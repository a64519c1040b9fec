"""A model that reads images of digits: a small vision encoder and a bridge, trained in front of a
frozen language model, since no package carries a model of images and texts.

The images are scikit-learn's: 1,797 handwritten digits of 8 x 8 pixels.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from PIL import Image
from sklearn.datasets import load_digits
from torch.nn import functional
from transformers import LlavaForConditionalGeneration
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from controlprefix import ControlPrefix
from controlprefix.model import FrozenModel

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PROMPT = "The digit is"
_SIZE, _PATCH = 32, 16
_NUM_TEST = 300


def digits() -> tuple[list[tuple[Image.Image, int]], list[tuple[Image.Image, int]]]:
    """Images with their numbers, for training and for testing."""
    data = load_digits()
    pairs = [
        (
            Image.fromarray((image * 15.9).astype("uint8")).resize((_SIZE, _SIZE)).convert("RGB"),
            int(number),
        )
        for image, number in zip(data.images, data.target, strict=True)
    ]
    random.Random(0).shuffle(pairs)
    return pairs[_NUM_TEST:], pairs[:_NUM_TEST]


def reader_of_digits(frozen: FrozenModel, *, steps: int, batch_size: int = 32) -> ControlPrefix:
    """The language model with eyes: only the encoder and the bridge are trained.

    Args:
        frozen: The language model; its weights are copied, and stay as they are.
        steps: Steps of the encoder by itself, and of both through the language model.
        batch_size: Images per step.
    """
    model, tokenizer, processor = _untrained(frozen)
    train, _ = digits()
    pixels = _pixels(processor, [image for image, _ in train])
    numbers = torch.tensor([number for _, number in train])
    encoder = model.model.vision_tower
    head = torch.nn.Linear(model.config.vision_config.hidden_size, len(NAMES))
    generator = torch.Generator().manual_seed(0)

    def optimize(
        parameters: Sequence[torch.nn.Parameter], rate: float, num_steps: int
    ) -> Callable[[torch.Tensor], None]:
        for parameter in parameters:
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(parameters, rate, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=num_steps)

        def step(loss: torch.Tensor) -> None:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

        return step

    bridge = model.model.multi_modal_projector
    embed = model.get_input_embeddings()
    answers = [tokenizer(f" {name}")["input_ids"] for name in NAMES]
    words = torch.stack([embed(torch.tensor(answer)).mean(0) for answer in answers])
    # First without the language model: patches tell the digit, and look like its name.
    seeing = [*encoder.parameters(), *head.parameters(), *bridge.parameters()]
    step = optimize(seeing, 2e-3, 20 * steps)
    for _ in range(20 * steps):
        batch = torch.randint(len(train), (batch_size,), generator=generator)
        patches = encoder(pixel_values=pixels[batch]).last_hidden_state[:, 1:]
        class_loss = functional.cross_entropy(head(patches.mean(1)), numbers[batch])
        targets = words[numbers[batch]][:, None].expand(-1, patches.shape[1], -1)
        step(class_loss + functional.mse_loss(bridge(patches), targets) / words.var())
    encoder.requires_grad_(False)
    step = optimize([*bridge.parameters()], 1e-3, steps)
    prompt = tokenizer(f"{'<image>' * _num_patches()}\n{PROMPT}")["input_ids"]
    longest = max(map(len, answers))
    for _ in range(steps):
        batch = torch.randint(len(train), (batch_size,), generator=generator)
        rows = [answers[numbers[i]] for i in batch.tolist()]
        padded = [row + [tokenizer.eos_token_id] * (longest - len(row)) for row in rows]
        targets = torch.tensor(padded)
        logits = model(
            input_ids=torch.tensor([prompt + row[:-1] for row in padded]),
            pixel_values=pixels[batch],
            logits_to_keep=longest,
        ).logits
        step(functional.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    model.requires_grad_(False).eval()
    return ControlPrefix.from_pretrained(
        model, tokenizer=tokenizer, processor=processor, store="sqlite://"
    )


def _untrained(frozen: FrozenModel) -> tuple[Any, Any, Any]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(frozen.tokenizer.name_or_path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    processor = transformers.LlavaProcessor(
        CLIPImageProcessorPil(
            size={"shortest_edge": _SIZE}, crop_size={"height": _SIZE, "width": _SIZE}
        ),
        tokenizer,
        patch_size=_PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    config = transformers.LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": _SIZE,
            "patch_size": _PATCH,
        },
        text_config=frozen.model.config.to_dict(),
        image_token_index=processor.image_token_id,
        vision_feature_layer=-1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).float()
    own = {
        f"model.language_model.{name.removeprefix('model.')}": value
        for name, value in frozen.model.state_dict().items()
        if not name.startswith("lm_head")
    }
    own["lm_head.weight"] = frozen.model.get_output_embeddings().weight
    missing = set(model.load_state_dict(own, strict=False).unexpected_keys)
    if missing:
        raise ValueError(f"the language model has weights that LLaVA has not: {sorted(missing)}")
    if len(tokenizer) > model.config.text_config.vocab_size:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return model.requires_grad_(False), tokenizer, processor


def _num_patches() -> int:
    return (_SIZE // _PATCH) ** 2


def _pixels(processor: Any, images: Sequence[Image.Image]) -> torch.Tensor:
    inputs = processor.image_processor(images=list(images), return_tensors="pt")
    pixels: torch.Tensor = inputs["pixel_values"]
    return pixels
