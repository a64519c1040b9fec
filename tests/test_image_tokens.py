"""Models that write images as tokens: prefixes steer them as they steer text, row by row."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from controlprefix import ControlPrefix, Example, Prefix, Request, RequestError

from helpers import QUICK
from models import byte_tokenizer

_FIRST, _COUNT = 270, 16  # ids of the image tokens, of 300
_TEXT: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_VQ: dict[str, Any] = {
    "embed_dim": 4,
    "latent_channels": 4,
    "base_channels": 32,
    "channel_multiplier": [1, 2],
    "num_res_blocks": 1,
}


def _chameleon() -> PreTrainedModel:
    vocabulary = {f"IMGIMG{chr(65 + i)}Z": _FIRST + i for i in range(_COUNT)}
    config = transformers.ChameleonConfig(
        **_TEXT,
        vq_config={**_VQ, "num_embeddings": _COUNT, "resolution": 32},
        vocabulary_map={**vocabulary, "<image>": 290},
    )
    return transformers.ChameleonForConditionalGeneration(config)


def _emu3() -> PreTrainedModel:
    vocabulary = {f"<|visual token {i:06d}|>": _FIRST + i for i in range(_COUNT)}
    config = transformers.Emu3Config(
        text_config=_TEXT,
        vq_config={**_VQ, "codebook_size": _COUNT, "hidden_size": 16, "attn_resolutions": []},
        vocabulary_map={**vocabulary, "<|extra_200|>": 290, "<image>": 291},
    )
    return transformers.Emu3ForConditionalGeneration(config)


def _janus() -> PreTrainedModel:
    vision = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
        "projection_dim": 32,
        "num_image_tokens": 4,
    }
    sizes = {"num_patches": 2, "projection_dim": 32, "image_token_embed_dim": 32}
    config = transformers.JanusConfig(
        text_config={"model_type": "llama", **_TEXT},
        vision_config=vision,
        vq_config={**_VQ, "num_embeddings": _COUNT, **sizes},
        image_token_id=290,
    )
    model = transformers.JanusForConditionalGeneration(config)
    setattr(model.generation_config, "generation_kwargs", {"boi_token_id": 291})  # noqa: B010
    return model


def engine(make: Callable[[], PreTrainedModel]) -> ControlPrefix:
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    cp = ControlPrefix.from_pretrained(model, tokenizer=byte_tokenizer(), store="sqlite://")
    for i, label in enumerate(("ink", "oil")):
        prefix = Prefix.random(cp.geometry, num_slots=3, scale=1.0, seed=i)
        cp.put("attribute", f"style={label}", prefix)
    return cp


def requests(*labels: str | None) -> list[Request]:
    return [Request(prompt="-", attributes={"style": x} if x else {}) for x in labels]


def image_tokens(cp: ControlPrefix, ids: Tensor, steered: Sequence[Request]) -> Tensor:
    """The image tokens that follow some prompts of one length."""
    model: Any = cp.model
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "do_sample": False}
    with torch.no_grad(), cp.assembled(steered):
        if model.config.model_type == "janus":
            images: Tensor = model.generate(ids, generation_mode="image", **options)
            return images
        outside = [i for i in range(300) if not _FIRST <= i < _FIRST + _COUNT]
        written = model.generate(ids, max_new_tokens=4, suppress_tokens=outside, **options)
        return torch.as_tensor(written[:, ids.shape[1] :])


def test_a_style_changes_the_image_tokens_of_its_row_alone() -> None:
    """Of Emu3; transformers' Chameleon rules its image tokens out."""
    cp = engine(_emu3)
    ids = torch.randint(3, 200, (3, 5), generator=torch.Generator().manual_seed(0))
    together = image_tokens(cp, ids, requests("ink", None, "oil"))
    for i, label in enumerate(("ink", None, "oil")):
        alone = image_tokens(cp, ids[i : i + 1], requests(label))
        assert torch.equal(together[i], alone[0])
    same = ids[:1].expand(3, -1)
    ink, plain, oil = image_tokens(cp, same, requests("ink", None, "oil")).tolist()
    assert len({tuple(row) for row in (ink, plain, oil)}) == 3


@pytest.mark.slow
def test_unconditional_rows_of_janus_have_requests_of_their_own() -> None:
    """It calls the model with twice the rows, of which the unconditional ones come last."""
    cp = engine(_janus)
    ids = torch.randint(3, 200, (2, 5), generator=torch.Generator().manual_seed(0))
    steered, bare = requests("ink", "oil"), requests(None, None)
    with pytest.raises(RequestError, match="unconditional rows of images behind"):
        image_tokens(cp, ids, steered)
    together = image_tokens(cp, ids, [*steered, *bare])
    for i in range(2):
        alone = image_tokens(cp, ids[i : i + 1], [steered[i], bare[i]])
        assert torch.equal(together[i], alone[0])
    both = image_tokens(cp, ids[:1], [steered[0]])  # one request steers both of its rows
    assert torch.equal(both, image_tokens(cp, ids[:1], [steered[0], steered[0]]))
    texts = [
        request.model_copy(update={"num_beams": 2, "max_new_tokens": 4}) for request in steered
    ]
    beams = [completion.text for completion in cp.generate(texts)]  # which stand together
    assert beams == [cp.generate(request).text for request in texts]
    plain = image_tokens(cp, ids, [*bare, *bare])
    assert not torch.equal(plain, together)


@pytest.mark.slow
@pytest.mark.parametrize("make", [_chameleon, _emu3, _janus], ids=["chameleon", "emu3", "janus"])
def test_text_and_training_are_those_of_any_model(make: Callable[[], PreTrainedModel]) -> None:
    cp = engine(make)
    rows = [
        request.model_copy(update={"max_new_tokens": 6, "prompt": prompt})
        for request, prompt in zip(requests("ink", None), ("a cat", "a dog, asleep"), strict=True)
    ]
    together = [completion.text for completion in cp.generate(rows)]
    assert together == [cp.generate(row).text for row in rows]
    examples = [
        Example(prompt=f"draw {i}", completion="@@##", attributes={"style": "pen"})
        for i in range(4)
    ]
    report = cp.train(examples, **{**QUICK, "validation": 0})
    assert report.losses[-1] < report.losses[0] - 0.2
