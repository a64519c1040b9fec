"""Rope: shifting a prefix along rotary positions, for engines and files that count slots.

Reference:
    Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021,
    https://arxiv.org/abs/2104.09864.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from controlprefix.errors import UnsupportedModelError
from controlprefix.model.kv_cache import cache_argument
from controlprefix.model.steering import SteeredModel
from controlprefix.model.text_prefix import is_rotary, keys_and_values, prefix_from_tokens
from controlprefix.prefixes import Geometry, Part, Prefix

_PROBE = (5, 11, 17, 23, 29)  # token ids; every vocabulary has them
_SHIFT = 13  # positions by which the probe is shifted
# Relative difference that still counts as rounding.
_TOLERANCE = {
    torch.float64: 1e-3,
    torch.float32: 1e-3,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}


class _LayerRope(NamedTuple):
    """How one layer rotates keys: pairs of values, by angles proportional to the position.

    Attributes:
        cos_sin: Position -> cosines and sines, `(num_pairs,)` each.
        interleaved: Pairs are (0, 1), (2, 3), …, rather than (0, n), (1, n + 1), ….
    """

    cos_sin: Callable[[int], tuple[Tensor, Tensor]]
    interleaved: bool

    def __call__(self, keys: Tensor, shift: int) -> Tensor:
        """Rotate keys `(…, key_dim)`, float32, by some positions; values beyond the pairs stay."""
        cos, sin = self.cos_sin(shift)
        count = len(cos)
        rotated = keys.clone()
        first, second = (
            (slice(0, 2 * count, 2), slice(1, 2 * count, 2))
            if self.interleaved
            else (slice(0, count), slice(count, 2 * count))
        )
        a, b = keys[..., first], keys[..., second]
        rotated[..., first], rotated[..., second] = a * cos - b * sin, b * cos + a * sin
        return rotated


class Rope:
    """How the layers of one model rotate keys. Get it with `Rope.of`.

    Args:
        geometry: Geometry of the model.
        layers: Per layer its rotation; None if it does not rotate.
    """

    def __init__(self, geometry: Geometry, layers: list[_LayerRope | None]) -> None:
        self._geometry = geometry
        self._layers = layers

    @classmethod
    def of(cls, frozen: SteeredModel) -> Self:
        """Read the rotations off the model's own rotary modules, and check them on the model.

        Raises:
            UnsupportedModelError: If its prefixes cannot be shifted exactly.
        """
        model = frozen.model
        _require_rotations(frozen)
        here = keys_and_values(frozen, _PROBE[:1])["decoder"]
        there = keys_and_values(frozen, _PROBE[:1], first_position=_SHIFT)["decoder"]
        candidates = list(_candidate_rotations(model))
        layers: list[_LayerRope | None] = []
        tolerance = _TOLERANCE[model.dtype]
        for i, ((keys, values), (shifted_keys, shifted_values)) in enumerate(
            zip(here, there, strict=True)
        ):
            if not _is_close(values, shifted_values, tolerance):
                raise _unsupported(model, f"layer {i} uses positions outside its rotations")
            fitting = [
                rotation
                for rotation in candidates
                if _fits(rotation, keys.float(), shifted_keys.float(), tolerance)
            ]
            if not fitting and not _is_close(keys, shifted_keys, tolerance):
                raise _unsupported(model, f"the rotation of layer {i} is not known")
            layers.append(fitting[0] if fitting else None)
        rope = cls(frozen.geometry, layers)
        rope._check(frozen)
        return rope

    def shifted(self, prefix: Prefix, shift: int) -> Prefix:
        """The prefix with its keys rotated by `shift` positions, in float32; values unchanged."""
        layers = []
        for i, rotation in enumerate(self._layers):
            keys, values = prefix.layer("decoder", i)
            if rotation is not None:
                keys = rotation(keys.float().cpu(), shift).to(keys)
            layers.append((keys, values))
        return Prefix.from_layers(self._geometry, decoder=layers)

    @torch.no_grad()
    def _check(self, frozen: SteeredModel) -> None:
        """Check that a shifted prefix in the model's own cache gives the logits of slots."""
        model = frozen.model
        prefix = prefix_from_tokens(frozen, _PROBE[:2])
        ids = torch.tensor([_PROBE[2:5]], device=frozen.device)
        with frozen.steering.attached(frozen.steering.assemble([[Part(prefix)]])):
            expected = model(input_ids=ids, use_cache=False).logits
        shifted = self.shifted(prefix, prefix.num_slots)
        shifted = shifted.to(device=frozen.device, dtype=frozen.dtype)
        layers = [shifted.layer("decoder", i) for i in range(len(self._layers))]
        cache = DynamicCache(
            ddp_cache_data=[(keys[None], values[None]) for keys, values in layers],
            config=model.config,
        )
        positions = torch.arange(ids.shape[1], device=frozen.device)[None] + prefix.num_slots
        options = {cache_argument(model): cache}
        logits = model(input_ids=ids, position_ids=positions, **options).logits
        if not _is_close(expected, logits, _TOLERANCE[model.dtype]):
            raise _unsupported(model, "its logits change when all positions shift together")


def _require_rotations(frozen: SteeredModel) -> None:
    """Refuse, by name, kinds of models whose slots cannot stand at positions before a text."""
    model = frozen.model
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    rope_types = {
        parameters.get("rope_type")
        for parameters in (rope, *rope.values())
        if isinstance(parameters, dict)
    }
    num_layers = getattr(config, "num_hidden_layers", 0)
    for is_refused, reason in (
        (model.config.is_encoder_decoder, "it has an encoder"),
        (getattr(config, "kv_lora_rank", None), "its attention is latent (MLA)"),
        (getattr(config, "num_kv_shared_layers", None), "its layers share keys and values"),
        (rope_types & {"dynamic", "longrope"}, "its rotations change with the length of the text"),
        (not is_rotary(model), "its positions are not rotary"),
    ):
        if is_refused:
            raise _unsupported(model, reason)
    if len(frozen.geometry.decoder) != num_layers:
        raise _unsupported(model, "some of its layers are not attention (state-space or linear)")


def _candidate_rotations(model: PreTrainedModel) -> Iterator[_LayerRope]:
    """The rotations that this model's rotary modules could apply."""
    config = model.config.get_text_config()
    layer_types = [None, *dict.fromkeys(getattr(config, "layer_types", None) or ())]
    for module in model.modules():
        if "RotaryEmbedding" not in type(module).__name__:
            continue
        for layer_type in layer_types:
            try:
                cos, _ = _cos_sin(module, layer_type, 1)
            except (TypeError, AttributeError, ValueError, KeyError):
                continue  # the module takes no layer type, or requires one
            half = len(cos) // 2
            # Each angle once: it may be repeated in pairs, repeated in halves, or not repeated.
            for distinct in (slice(0, half), slice(0, None, 2), slice(0, None)):

                def cos_sin(
                    position: int,
                    module: nn.Module = module,
                    layer_type: str | None = layer_type,
                    distinct: slice = distinct,
                ) -> tuple[Tensor, Tensor]:
                    cos, sin = _cos_sin(module, layer_type, position)
                    return cos[distinct], sin[distinct]

                yield _LayerRope(cos_sin, interleaved=False)
                yield _LayerRope(cos_sin, interleaved=True)


@torch.no_grad()
def _cos_sin(module: nn.Module, layer_type: str | None, position: int) -> tuple[Tensor, Tensor]:
    """A rotary module's cosines and sines at a position, without its attention scaling."""
    example = torch.zeros(1, 1, 1, device=next(iter(module.buffers())).device)
    positions = torch.tensor([[0, position]], device=example.device)
    options = {} if layer_type is None else {"layer_type": layer_type}
    cos, sin = module(example, positions, **options)
    scale = cos[0, 0].cpu()  # the cosine of 0 is 1
    return cos[0, 1].cpu() / scale, sin[0, 1].cpu() / scale


def _fits(rotation: _LayerRope, keys: Tensor, shifted: Tensor, tolerance: float) -> bool:
    if 2 * len(rotation.cos_sin(1)[0]) > keys.shape[-1]:
        return False
    return _is_close(rotation(keys.cpu(), _SHIFT), shifted.cpu(), tolerance)


def _is_close(expected: Tensor, actual: Tensor, tolerance: float) -> bool:
    expected, actual = expected.float(), actual.float()
    return bool((expected - actual).norm() <= tolerance * expected.norm())


def _unsupported(model: PreTrainedModel, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"prefixes of {type(model).__name__} cannot be shifted along positions: {reason}"
    )
