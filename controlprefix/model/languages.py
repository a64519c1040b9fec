"""What an encoder-decoder's decoder starts from, and the languages of multilingual ones.

In mBART, NLLB and M2M100 the source's language is a special token beside its text; the target's
is the first token of the decoder, behind its start token or, in the first mBART and in PLBart, in
place of it.
"""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from controlprefix.errors import RequestError, UnsupportedModelError, shortened


class TargetedPrompt(tuple[int, ...]):
    """Token ids of a prompt whose target language was named.

    Attributes:
        start_ids: The ids that the decoder starts from.
    """

    start_ids: tuple[int, ...]

    @classmethod
    def of(cls, ids: Sequence[int], start_ids: Sequence[int]) -> "TargetedPrompt":
        """A prompt with its start ids."""
        prompt = cls(ids)
        prompt.start_ids = tuple(start_ids)
        return prompt


class Languages:
    """The language tokens of a tokenizer.

    Args:
        tokenizer: The model's tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer: Any = tokenizer
        codes = getattr(tokenizer, "lang_code_to_id", None)
        if not isinstance(codes, dict):
            tokens = tokenizer.all_special_tokens if self.source_language else ()
            codes = {str(token): tokenizer.convert_tokens_to_ids(token) for token in tokens}
        named = {str(token) for token in tokenizer.special_tokens_map.values() if token}
        self._ids: dict[str, int] = {c: i for c, i in codes.items() if c not in named}

    @property
    def source_language(self) -> str | None:
        """The language that the tokenizer is set to, if it has languages."""
        language = getattr(self._tokenizer, "src_lang", None)
        return language if isinstance(language, str) else None

    def id_of(self, language: str) -> int:
        """The token id of a language.

        Raises:
            RequestError: If the tokenizer has no such language, with those that it has.
        """
        if not self._ids:
            raise RequestError(
                "this model's tokenizer has no languages; leave source_language and "
                "target_language out"
            )
        if language not in self._ids:
            languages = shortened(sorted(self._ids))
            raise RequestError(f"there is no language {language!r}; the tokenizer has: {languages}")
        return self._ids[language]

    def start_ids(self, start_id: int, language: str) -> tuple[int, ...]:
        """The ids that a decoder starts from to write a language.

        Args:
            start_id: The model's own start token.
            language: The target's language.

        Raises:
            RequestError: As `id_of`.
        """
        target = self.id_of(language)
        # The first mBART names a start token only where it was trained on one language.
        name = type(self._tokenizer).__name__
        starts_with_language = name.removesuffix("Fast") in {"MBartTokenizer", "PLBartTokenizer"}
        if starts_with_language or start_id in self._ids.values():
            return (target,)
        return (start_id, target)

    def with_source(self, ids: Sequence[int], language: str) -> list[int]:
        """The ids of a source as if the tokenizer were set to another language.

        Args:
            ids: Ids with the token of the language that the tokenizer is set to.
            language: The source's language.

        Raises:
            RequestError: As `id_of`; or the ids have no token of that language to replace.
        """
        new = self.id_of(language)
        earlier = self.id_of(self.source_language or "")
        if earlier not in ids:
            raise RequestError(
                f"the prompt has no token of {self.source_language!r} to replace by {language!r}; "
                "leave source_language out, and give ids with the right one"
            )
        return [new if token == earlier else token for token in ids]


def start_ids_of(prompt: Sequence[int], default: tuple[int, ...]) -> tuple[int, ...]:
    """The ids that a decoder starts from behind a prompt.

    Args:
        prompt: What the encoder reads.
        default: Where the prompt names no target language.
    """
    return prompt.start_ids if isinstance(prompt, TargetedPrompt) else default


def decoder_start_ids(model: PreTrainedModel) -> tuple[int, ...]:
    """The ids that an encoder-decoder's decoder starts from.

    Those are its start token and what its generation config forces first, such as the token of
    the target language.

    Raises:
        UnsupportedModelError: If the model has no start token.
    """
    generation, config = model.generation_config, model.config
    decoder = getattr(config, "decoder", None)
    start = next(
        (
            token
            for name in ("decoder_start_token_id", "bos_token_id")
            for source in (generation, config, decoder)
            if isinstance(token := getattr(source, name, None), int)
        ),
        None,
    )
    if start is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} names no token to start its decoder with; set "
            "model.generation_config.decoder_start_token_id"
        )
    forced = getattr(generation, "forced_bos_token_id", None)
    return (start, forced) if isinstance(forced, int) else (start,)
