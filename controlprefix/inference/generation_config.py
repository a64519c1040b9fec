"""The model's generation config, as one batch or one row means it.

`generate` has one config per batch, and fills what it leaves out from the model's own. What a
config says of a row must mean the same in a batch, in the running batch and alone.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from controlprefix.model import FrozenModel
from controlprefix.request import Request

# Settings whose processors read the prompt (run per row, without padding), or follow the choice.
_OF_PROMPTS = (
    "watermarking_config",
    "no_repeat_ngram_size",
    "min_length",
    "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "repetition_penalty",
)
# Decoding methods that a request cannot have, or that need a second model or constraints.
_OTHER_MODES = (
    "assistant_early_exit",
    "constraints",
    "dola_layers",
    "force_words_ids",
    "guidance_scale",
    "is_assistant",
    "max_time",  # limits are those of requests
    "num_beam_groups",
    "penalty_alpha",
    "prompt_lookup_num_tokens",
    "stop_strings",  # among the stop texts of each request
    "token_healing",
)
_SET_HERE = frozenset(
    {*_OF_PROMPTS, *_OTHER_MODES, "cache_implementation", "forced_bos_token_id",
     "forced_eos_token_id", "max_length", "renormalize_logits", "temperature", "top_k", "top_p",
     "min_p"}
)  # fmt: skip


def model_processors(
    frozen: FrozenModel, request: Request, prompt: Sequence[int], start: Sequence[int]
) -> LogitsProcessorList:
    """What the model's generation config does to logits, as in `generate`, for one row.

    Args:
        frozen: The model.
        request: The request.
        prompt: Ids of its prompt.
        start: Ids in front of the first generated one.
    """
    config = batch_config(frozen, [request])
    config.forced_eos_token_id = None  # by the sampler, after the row's own settings
    return _processors(frozen, config, prompt, len(start))


def forced_end_id(frozen: FrozenModel) -> int | None:
    """The id that the generation config forces at a request's limit; None if there is none."""
    ids = getattr(frozen.model.generation_config, "forced_eos_token_id", None)
    if ids is None:
        return None
    return ids if isinstance(ids, int) else min(ids)


def _processors(
    frozen: FrozenModel, config: GenerationConfig, prompt: Sequence[int], num_before: int
) -> LogitsProcessorList:
    model: Any = frozen.model
    model._prepare_special_tokens(config, True, device=frozen.device)
    processors: LogitsProcessorList = model._get_logits_processor(
        generation_config=config,
        input_ids_seq_length=num_before,
        encoder_input_ids=torch.tensor([list(prompt)], device=frozen.device),
        device=frozen.device,
    )
    return processors


def own_prompt_processors(
    frozen: FrozenModel,
    config: GenerationConfig,
    prompts: Sequence[Sequence[int]],
    paddings: Sequence[int],
    num_before: int,
) -> list[LogitsProcessor]:
    """Move what looks at prompts from a batch's config to a processor that does so per row."""
    settings = {name: value for name in _OF_PROMPTS if (value := getattr(config, name, None))}
    settings = {n: v for n, v in settings.items() if not (n.endswith("penalty") and v == 1)}
    if not settings:
        return []
    config.update(**dict.fromkeys(_OF_PROMPTS))
    rows = []
    for prompt, padding in zip(prompts, paddings, strict=True):
        own = GenerationConfig(**settings)
        own.update(eos_token_id=config.eos_token_id, decoder_start_token_id=0)
        rows.append(_processors(frozen, own, prompt, num_before - padding))
    return [_OwnPrompt(rows, paddings)]


class _BatchConfig(GenerationConfig):
    """A config whose empty settings stay empty: `generate` fills others from the model's."""

    def update(self, *args: Any, **settings: Any) -> Any:
        if settings.get("defaults_only"):
            settings = {name: v for name, v in settings.items() if name not in _SET_HERE}
        return super().update(*args, **settings)


def batch_config(frozen: FrozenModel, requests: Sequence[Request]) -> GenerationConfig:
    """The config of `generate` for a batch: the model's, without what each row does by itself."""
    config = _BatchConfig()
    if frozen.model.generation_config is not None:
        vars(config).update(copy.deepcopy(vars(frozen.model.generation_config)))
    first = requests[0]
    config.update(**{name: None for name in _OTHER_MODES if hasattr(config, name)})
    if frozen.device.type == "cpu" and "offloaded" in str(config.cache_implementation):
        config.update(cache_implementation=None)
    config.update(
        do_sample=False,
        temperature=None,
        top_k=None,
        top_p=None,
        min_p=None,
        num_return_sequences=1,
        num_beams=first.num_beams,
        repetition_penalty=first.repetition_penalty if first.num_beams > 1 else 1.0,
        max_length=None,
        max_new_tokens=max(request.max_new_tokens for request in requests),
        eos_token_id=list(frozen.request_tokenizer.end_ids) or None,
        pad_token_id=frozen.pad_id,
        return_dict_in_generate=False,
        use_cache=True,
        # It only affects beam scores, and would change later penalties.
        renormalize_logits=first.num_beams > 1 and bool(config.renormalize_logits),
        forced_bos_token_id=None,  # of encoder-decoders, among the decoder's start ids
    )
    if frozen.is_encoder_decoder:
        start = frozen.request_tokenizer.decoder_start_ids[0]
        config.update(decoder_start_token_id=start)
    return config


class _OwnPrompt(LogitsProcessor):
    """What looks at a row's prompt, for each row with its own, without padding."""

    def __init__(self, rows: Sequence[LogitsProcessorList], paddings: Sequence[int]) -> None:
        self._rows, self._paddings = rows, paddings

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        num_beams = len(input_ids) // len(self._rows)
        rows = [
            self._rows[i // num_beams](
                input_ids[i : i + 1, self._paddings[i // num_beams] :],  # type: ignore[arg-type]
                scores[i : i + 1],
            )
            for i in range(len(input_ids))
        ]
        return torch.cat(rows)
