"""Moving a prefix along the positions, for engines that count slots."""

from collections.abc import Callable, Iterator
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from controlprefix.errors import UnsupportedModelError
from controlprefix.model.steering import Steering
from controlprefix.model.text_prefix import is_rotary, keys_and_values, prefix_from_tokens
from controlprefix.prefixes.assembly import Part
from controlprefix.prefixes.geometry import Geometry
from controlprefix.prefixes.prefix import Prefix

_PROBE = (5, 11, 17, 23, 29)  # tokens; every vocabulary has them
_FAR = 13  # positions that the probe is moved by
# Of the size of what is compared: rounding, not another rotation.
_CLOSE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class _Turn(NamedTuple):
    """How one layer turns keys: pairs of numbers, by an angle that grows with the position.

    Attributes:
        angles: Of a position, `(num_pairs,)`: the cosines and the sines.
        neighbours: Pairs are (0, 1), (2, 3), …, rather than (0, n), (1, n + 1), ….
    """

    angles: Callable[[int], tuple[Tensor, Tensor]]
    neighbours: bool

    def __call__(self, keys: Tensor, by: int) -> Tensor:
        """Keys `(…, key_dim)`, float32, `by` positions further; what is beyond the pairs stays."""
        cos, sin = self.angles(by)
        count = len(cos)
        turned = keys.clone()
        first, second = (
            (slice(0, 2 * count, 2), slice(1, 2 * count, 2))
            if self.neighbours
            else (slice(0, count), slice(count, 2 * count))
        )
        a, b = keys[..., first], keys[..., second]
        turned[..., first], turned[..., second] = a * cos - b * sin, b * cos + a * sin
        return turned


class Rotation:
    """How the layers of one model turn keys. Get it with `Rotation.of(model)`."""

    def __init__(self, geometry: Geometry, turns: list[_Turn | None]) -> None:
        self._geometry = geometry
        self._turns = turns

    @classmethod
    def of(cls, model: PreTrainedModel) -> Self:
        """Read off the model's own rotary modules, and checked against the model itself.

        Raises:
            UnsupportedModelError: If an engine that counts slots cannot serve it exactly.
        """
        _require_countable(model)
        geometry = Steering.of(model).geometry
        here = keys_and_values(model, _PROBE[:1], 0)["decoder"]
        there = keys_and_values(model, _PROBE[:1], _FAR)["decoder"]
        known = list(_turns(model))
        turns: list[_Turn | None] = []
        close = _CLOSE[model.dtype]
        for layer, ((keys, values), (far, same)) in enumerate(zip(here, there, strict=True)):
            if not _alike(values, same, close):
                raise _unsupported(model, f"layer {layer} has positions outside its rotations")
            fitting = [one for one in known if _fits(one, keys.float(), far.float(), close)]
            if not fitting and not _alike(keys, far, close):
                raise _unsupported(model, f"how layer {layer} turns keys is not known here")
            turns.append(fitting[0] if fitting else None)
        found = cls(geometry, turns)
        found._check(model)
        return found

    def moved(self, prefix: Prefix, by: int) -> Prefix:
        """The prefix `by` positions further: keys turned, in float32, values as they are."""
        pieces = []
        for layer, turn in enumerate(self._turns):
            keys, values = prefix.layer("decoder", layer)
            if turn is not None:
                keys = turn(keys.float().cpu(), by).to(keys)
            pieces.append((keys, values))
        return Prefix.from_layers(self._geometry, decoder=pieces)

    @torch.no_grad()
    def _check(self, model: PreTrainedModel) -> None:
        """What the model says to a moved prefix in its cache must be what it says to slots."""
        prefix = prefix_from_tokens(model, _PROBE[:2])
        text = torch.tensor([_PROBE[2:5]], device=model.device)
        steering = Steering.of(model)
        batch = steering.assemble([[Part(prefix)]])
        with steering.attached(batch):
            wanted = model(input_ids=text, use_cache=False).logits
        moved = self.moved(prefix, prefix.num_slots).to(device=model.device, dtype=model.dtype)
        layers = [moved.layer("decoder", i) for i in range(len(self._turns))]
        cache = DynamicCache(
            ddp_cache_data=[(keys[None], values[None]) for keys, values in layers],
            config=model.config,
        )
        positions = torch.arange(text.shape[1], device=model.device)[None] + prefix.num_slots
        found = model(input_ids=text, position_ids=positions, past_key_values=cache).logits
        if not _alike(wanted, found, _CLOSE[model.dtype]):
            raise _unsupported(model, "its logits change when all positions move together")


def _require_countable(model: PreTrainedModel) -> None:
    """Refuse kinds of models that vLLM cannot serve with slots, by name."""
    config = model.config.get_text_config()
    ropes = getattr(config, "rope_parameters", None) or {}
    kinds = {rope.get("rope_type") for rope in (ropes, *ropes.values()) if isinstance(rope, dict)}
    num_layers = getattr(config, "num_hidden_layers", 0)
    for refused, why in (
        (model.config.is_encoder_decoder, "it has an encoder, which KV connectors do not take"),
        (getattr(config, "kv_lora_rank", None), "its attention is latent (MLA)"),
        (getattr(config, "num_kv_shared_layers", None), "its layers share keys and values"),
        (kinds & {"dynamic", "longrope"}, "its rotations change with the length of the text"),
        (not is_rotary(model), "its positions are no rotations"),
    ):
        if refused:
            raise _unsupported(model, why)
    if len(Steering.of(model).geometry.decoder) != num_layers:
        raise _unsupported(model, "some of its layers are no attention (state-space or linear)")


def _turns(model: PreTrainedModel) -> Iterator[_Turn]:
    """The ways in which this model could turn keys."""
    config = model.config.get_text_config()
    kinds = [None, *dict.fromkeys(getattr(config, "layer_types", None) or ())]
    for module in model.modules():
        if "RotaryEmbedding" not in type(module).__name__:
            continue
        for kind in kinds:
            try:
                whole, _ = _cos_sin(module, kind, 1)
            except (TypeError, AttributeError, ValueError, KeyError):
                continue  # not told by kind of layer, or only so
            half = len(whole) // 2
            # Each angle once: written twice in a row, or one after another, or not repeated.
            for once in (slice(0, half), slice(0, None, 2), slice(0, None)):

                def angles(
                    position: int,
                    module: nn.Module = module,
                    kind: str | None = kind,
                    once: slice = once,
                ) -> tuple[Tensor, Tensor]:
                    cos, sin = _cos_sin(module, kind, position)
                    return cos[once], sin[once]

                yield _Turn(angles, neighbours=False)
                yield _Turn(angles, neighbours=True)


@torch.no_grad()
def _cos_sin(module: nn.Module, kind: str | None, position: int) -> tuple[Tensor, Tensor]:
    """Of a position, without what some rotary modules multiply them by."""
    example = torch.zeros(1, 1, 1, device=next(iter(module.buffers())).device)
    positions = torch.tensor([[0, position]], device=example.device)
    told = {} if kind is None else {"layer_type": kind}
    cos, sin = module(example, positions, **told)
    scale = cos[0, 0].cpu()  # the cosine of no angle is 1
    return cos[0, 1].cpu() / scale, sin[0, 1].cpu() / scale


def _fits(turn: _Turn, keys: Tensor, far: Tensor, close: float) -> bool:
    if 2 * len(turn.angles(1)[0]) > keys.shape[-1]:
        return False
    return _alike(turn(keys.cpu(), _FAR), far.cpu(), close)


def _alike(one: Tensor, other: Tensor, close: float) -> bool:
    one, other = one.float(), other.float()
    return bool((one - other).norm() <= close * one.norm())


def _unsupported(model: PreTrainedModel, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(model).__name__} cannot be served from vLLM: {why}; serve it with "
        "--engine transformers"
    )
