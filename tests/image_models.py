"""Small random models that read images, each with a processor and a tokenizer of bytes."""

import io
from typing import Any

import torch
import transformers
from PIL import Image
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from models import DEVICE, byte_tokenizer

VOCAB = 320
_TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
NAMES = ("llava", "idefics3", "gemma3", "qwen2_5_vl", "qwen3_vl")
_TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {% if m.content is string %}{{ m.content }}"
    "{% else %}{% for part in m.content %}{% if part.type == 'image' %}PLACEHOLDER"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def picture(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    """An image of large random blocks."""
    blocks = torch.randint(0, 256, (4, 4, 3), generator=torch.Generator().manual_seed(seed))
    image = Image.fromarray(blocks.to(torch.uint8).numpy())
    return image.resize((width, height), Image.Resampling.NEAREST)


def _tokenizer(placeholder: str, *tokens: str, around: str = "{}") -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [placeholder, *tokens]})
    tokenizer.chat_template = _TEMPLATE.replace("PLACEHOLDER", around.format(placeholder))
    return tokenizer


class _QwenProcessor:
    """What Qwen2.5-VL's processor does with images; that one needs torchvision for videos."""

    image_token = "<|image_pad|>"

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self._image_processor = Qwen2VLImageProcessorPil(
            patch_size=14, merge_size=2, size={"shortest_edge": 28 * 28, "longest_edge": 56 * 56}
        )

    def __call__(self, *, text: str, images: list[Image.Image], **_: Any) -> Any:
        inputs = dict(self._image_processor(images=images, return_tensors="pt"))
        count = int(inputs["image_grid_thw"].prod(1)[0]) // 4
        ids = self.tokenizer(
            text.replace(self.image_token, self.image_token * count),
            return_tensors="pt",
            add_special_tokens=False,
        )["input_ids"]
        marks = (ids == self.image_token_id).long()
        return {"input_ids": ids, "mm_token_type_ids": marks, **inputs}


def png(image: Image.Image) -> bytes:
    """The bytes of an image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def image_model(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, Any]:
    """A random model, its tokenizer and its processor."""
    processor: Any
    config: Any
    if name == "llava":
        tokenizer = _tokenizer("<image>")
        processor = transformers.LlavaProcessor(
            CLIPImageProcessorPil(
                size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
            ),
            tokenizer,
            patch_size=14,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
        config = transformers.LlavaConfig(
            vision_config={"model_type": "clip_vision_model", **_VISION},
            text_config={"model_type": "llama", **_TEXT},
            image_token_index=processor.image_token_id,
        )
        model_class: Any = transformers.LlavaForConditionalGeneration
    elif name == "idefics3":
        tokenizer = _tokenizer(
            "<image>", "<fake_token_around_image>", "<global-img>", "<row_1_col_1>"
        )
        processor = transformers.Idefics3Processor(
            Idefics3ImageProcessorPil(
                size={"longest_edge": 28}, max_image_size={"longest_edge": 28},
                do_image_splitting=False,
            ),
            tokenizer,
            image_seq_len=1,
        )  # fmt: skip
        config = transformers.Idefics3Config(
            vision_config={"model_type": "idefics3_vision", **_VISION},
            text_config={"model_type": "llama", **_TEXT},
            image_token_id=processor.image_token_id,
            scale_factor=2,
        )
        model_class = transformers.Idefics3ForConditionalGeneration
    elif name == "gemma3":
        tokenizer = _tokenizer("<start_of_image>", "<end_of_image>", "<image_soft_token>")
        marks: Any = tokenizer
        marks.boi_token, marks.eoi_token = "<start_of_image>", "<end_of_image>"
        marks.image_token = "<image_soft_token>"
        marks.boi_token_id = tokenizer.convert_tokens_to_ids("<start_of_image>")
        marks.image_token_id = tokenizer.convert_tokens_to_ids("<image_soft_token>")
        processor = transformers.Gemma3Processor(
            Gemma3ImageProcessorPil(size={"height": 28, "width": 28}), tokenizer, image_seq_length=4
        )
        config = transformers.Gemma3Config(
            text_config={"sliding_window": 64, **_TEXT},
            vision_config={"model_type": "siglip_vision_model", **_VISION},
            mm_tokens_per_image=4,
            image_token_index=int(tokenizer.get_vocab()["<image_soft_token>"]),
        )
        model_class = transformers.Gemma3ForConditionalGeneration
    else:
        tokenizer = _tokenizer(
            "<|image_pad|>",
            "<|vision_start|>",
            "<|vision_end|>",
            around="<|vision_start|>{}<|vision_end|>",
        )
        processor = _QwenProcessor(tokenizer)
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
        vision: dict[str, Any] = {
            "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2,
            "out_hidden_size": 32, "patch_size": 14,
        }  # fmt: skip
        if name == "qwen3_vl":
            vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
            config_class: Any = transformers.Qwen3VLConfig
            model_class = transformers.Qwen3VLForConditionalGeneration
        else:
            vision |= {"fullatt_block_indexes": [1]}
            config_class = transformers.Qwen2_5_VLConfig
            model_class = transformers.Qwen2_5_VLForConditionalGeneration
        config = config_class(
            text_config={**_TEXT, "rope_parameters": rope},
            vision_config=vision,
            image_token_id=processor.image_token_id,
        )
    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model.to(DEVICE).eval().requires_grad_(False), tokenizer, processor
