"""The config of `generate` for measurements: nothing of the model's own but its special tokens."""

from typing import Any

from transformers import GenerationConfig

from controlprefix.model.frozen import FrozenModel

_OF_THE_MODEL = ("bos_token_id", "decoder_start_token_id", "eos_token_id", "pad_token_id")


class _NeutralConfig(GenerationConfig):
    """A config that `generate` fills from the library's defaults, not from the model's."""

    def update(
        self, defaults_only: bool = False, allow_custom_entries: bool = False, **settings: Any
    ) -> Any:
        if allow_custom_entries:  # the model's
            settings = {name: settings[name] for name in _OF_THE_MODEL if name in settings}
        return super().update(
            defaults_only=defaults_only, allow_custom_entries=allow_custom_entries, **settings
        )


def neutral_config(frozen: FrozenModel, **settings: Any) -> GenerationConfig:
    """A config without the model's own penalties, truncation, suppressed tokens and stop texts.

    Args:
        frozen: The model.
        **settings: Further settings; left out, it is greedy.
    """
    if frozen.is_encoder_decoder:  # as the rows' decoders start, or `generate` puts it before them
        start = frozen.request_tokenizer.decoder_start_ids[0]
        settings = {"decoder_start_token_id": start, **settings}
    return _NeutralConfig(
        pad_token_id=frozen.pad_id,
        eos_token_id=list(frozen.request_tokenizer.end_ids) or None,
        **settings,
    )
