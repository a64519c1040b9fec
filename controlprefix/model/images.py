"""Images in prompts: tokens that stand for them, and what else the model reads of them."""

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from controlprefix.cancellation import raise_if_stopped
from controlprefix.errors import RequestError, short_reason
from controlprefix.image_files import open_images

_TEXT_INPUTS = frozenset({"input_ids", "attention_mask"})
# Inputs of models that attend to images in layers of their own, row by row.
_ROW_INPUTS: Final = frozenset({"cross_attention_mask", "aspect_ratio_ids"})


class ImagePrompt(tuple[int, ...]):
    """Token ids of a prompt with images.

    Attributes:
        features: Name -> tensor that the model reads beside the ids; images along dim 0.
        marks: Name -> token ids that this input marks with 1; all other tokens have 0.
    """

    features: Mapping[str, Tensor]
    marks: Mapping[str, frozenset[int]]

    @classmethod
    def of(cls, ids: Sequence[int], images: "PromptImages | ImagePrompt") -> "ImagePrompt":
        """The ids of a prompt in which the tokens of all images are."""
        prompt = cls(ids)
        prompt.features, prompt.marks = images.features, images.marks
        return prompt

    @property
    def digest(self) -> str:
        """A hash of what is read beside the ids."""
        sha = hashlib.sha256()
        for name, value in sorted(self.features.items()):
            sha.update(f"{name}{tuple(value.shape)}".encode())
            sha.update(value.contiguous().numpy().tobytes())
        return sha.hexdigest()


def followed_by(prompt: Sequence[int], ids: Sequence[int]) -> Sequence[int]:
    """A prompt with more ids behind it."""
    if not ids:
        return prompt
    both = (*prompt, *ids)
    return ImagePrompt.of(both, prompt) if isinstance(prompt, ImagePrompt) else both


class PromptImages(NamedTuple):
    """What a processor makes of a prompt's images.

    Attributes:
        texts: Per image, the text whose tokens stand for it.
        token, num_tokens: The id of an image's tokens, and how many the images take.
        features, marks: As in `ImagePrompt`.
    """

    texts: list[str]
    token: int
    num_tokens: int
    features: dict[str, Tensor]
    marks: dict[str, frozenset[int]]


class ImageReader:
    """Reads images with a model's processor.

    Args:
        processor: A processor of transformers, for images and texts.

    Attributes:
        placeholder: What stands for one image in a rendered chat template.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        token = getattr(processor, "boi_token", None) or getattr(processor, "image_token", None)
        if token is None or getattr(processor, "image_token_id", None) is None:
            raise RequestError(
                f"{type(processor).__name__} names no image token, so images have no place in a "
                "prompt"
            )
        self.placeholder = str(token)

    def read(self, images: Sequence[bytes]) -> PromptImages:
        """Read a prompt's images.

        Raises:
            RequestError: If one is no image, or the model reads images in another way.
        """
        token = int(self._processor.image_token_id)
        texts: list[str] = []
        num_tokens = 0
        marks: dict[str, frozenset[int]] = {}
        features: list[dict[str, Tensor]] = []
        for number, image in enumerate(open_images(images), 1):
            raise_if_stopped()
            try:
                inputs = self._processor(
                    text=self.placeholder,
                    images=[image],
                    return_tensors="pt",
                    add_special_tokens=False,
                )
            except Exception as error:  # such as of an image that is too narrow for it
                raise RequestError(
                    f"image {number} cannot be read by this model: {short_reason(error)}"
                ) from error
            ids = inputs["input_ids"]
            by_token = {
                name: value.bool()
                for name, value in inputs.items()
                if name not in _TEXT_INPUTS and value.shape == ids.shape
            }
            for name, value in by_token.items():
                marks[name] = marks.get(name, frozenset()) | set(ids[value].tolist())
            differ = any(
                not torch.equal(value, torch.isin(ids, torch.tensor(sorted(marks[name]))))
                for name, value in by_token.items()
            )
            if differ or _ROW_INPUTS & inputs.keys() or not (ids == token).any():
                raise RequestError(
                    f"images of {type(self._processor).__name__} are not supported: its model does "
                    "not read them as tokens among those of the text"
                )
            features.append(
                {n: v for n, v in inputs.items() if n not in _TEXT_INPUTS and n not in by_token}
            )
            num_tokens += int((ids == token).sum())
            texts.append(
                self._processor.tokenizer.decode(
                    ids[0].tolist(),
                    skip_special_tokens=False,
                    clean_up_tokenization_spaces=False,
                )
            )
        return PromptImages(texts, token, num_tokens, _joined(features), marks)


def image_inputs(
    prompts: Sequence[Sequence[int]],
    lengths: Sequence[int],
    model: PreTrainedModel,
) -> dict[str, Tensor]:
    """What a model reads beside the token ids of rows, of which some may have images.

    Args:
        prompts: Token ids per row.
        lengths: Tokens per row, with what follows the prompt; rows are padded on the left.
        model: The model.

    Returns:
        The processor's features, joined over rows, and `(num_rows, longest)` marks of image
        tokens where the model reads them; nothing if no row has an image.
    """
    with_images = [(i, row) for i, row in enumerate(prompts) if isinstance(row, ImagePrompt)]
    if not with_images:
        return {}
    inputs = _joined([row.features for _, row in with_images])
    longest = max(lengths)
    for name in with_images[0][1].marks:
        marks = torch.zeros(len(prompts), longest, dtype=torch.long)
        for i, row in with_images:
            start = longest - lengths[i]
            own = torch.tensor([token in row.marks[name] for token in row])
            marks[i, start : start + len(row)] = own.long()
        inputs[name] = marks
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }


def image_positions(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, inputs: Mapping[str, Tensor]
) -> tuple[Tensor, list[int]] | None:
    """The positions of rows with images, if the model has its own for them.

    Args:
        model: The model.
        ids, mask: Token ids and attention mask of the rows, `(num_rows, length)`.
        inputs: See `image_inputs`.

    Returns:
        Positions `(4, num_rows, length)`, counted first and then by time, height and width; and
        per row, by how much the position behind it differs from the number of its tokens. None if
        the model's positions count tokens.
    """
    module = next((m for m in model.modules() if hasattr(m, "get_rope_index")), None)
    if module is None:
        return None
    accepted = inspect.signature(module.get_rope_index).parameters  # type: ignore[arg-type]
    own = {name: value for name, value in inputs.items() if name in accepted}
    positions, offsets = module.get_rope_index(ids, attention_mask=mask, **own)  # type: ignore[operator]
    counted = (mask.cumsum(1) - 1).clamp(min=0)
    padding = (mask == 0).sum(1)
    return torch.cat([counted[None], positions]), (offsets.flatten() + padding).tolist()


def _joined(features: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of several images, behind each other along dim 0, and padded in the others."""
    result: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for own in features for name in own):
        tensors = [own[name] for own in features if name in own]
        sizes = [max(t.shape[dim] for t in tensors) for dim in range(1, tensors[0].dim())]
        result[name] = torch.cat([_padded(tensor, sizes) for tensor in tensors])
    return result


def _padded(tensor: Tensor, sizes: Sequence[int]) -> Tensor:
    missing = [size - own for size, own in zip(sizes, tensor.shape[1:], strict=True)]
    return pad(tensor, [n for count in reversed(missing) for n in (0, count)])
