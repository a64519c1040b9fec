"""RequestTokenizer: requests and examples -> token ids, and generated ids -> text."""

import re
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from controlprefix.errors import ContextLengthError, RequestError, shortened
from controlprefix.example import Example
from controlprefix.model.chat_template import (
    END_OF_THINKING,
    ChatTemplate,
    with_images,
    without_thoughts,
)
from controlprefix.model.images import ImagePrompt, ImageReader, PromptImages
from controlprefix.model.languages import (
    Languages,
    TargetedPrompt,
    decoder_start_ids,
    start_ids_of,
)
from controlprefix.model.loading import load_processor
from controlprefix.model.special_tokens import TextTokenizer
from controlprefix.model.vocabulary import Vocabulary
from controlprefix.request import AnyRequest, Request

_ANY_TEXT = "a"
_CHARACTERS_PER_TOKEN = 8  # more than in most texts
_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")


@dataclass(frozen=True, slots=True)
class TokenizedExample:
    """Token ids of an example.

    Attributes:
        prompt: Ids that the model is given; never empty.
        completion: Ids that it should generate, without an end token.
        is_whole: Whether the completion ends there; otherwise it was cut.
    """

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    is_whole: bool = True


class RequestTokenizer:
    """Turns requests into the token ids that one model expects.

    Special tokens (such as `</s>`) that are typed in messages, completions and texts are read
    as the text they are. In a raw prompt they are special tokens.

    Args:
        model: For its config and generation config.
        tokenizer: Its tokenizer.
        chat_template_kwargs: Template variables of every prompt.
        processor, load_processor: Reads images, and loads what does: see `FrozenModel`.

    Attributes:
        is_encoder_decoder: Whether an encoder reads the prompt.
        end_ids: Ids that end a completion, the tokenizer's own first.
        pad_id: Id to pad rows with.
        context_length: Maximum number of positions; None if there is no limit.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        processor: Any = None,
        *,
        load_processor: Callable[[], Any] | None = None,
    ) -> None:
        self._model = weakref.ref(model)
        self._processor, self._load_processor = processor, load_processor
        self._texts = TextTokenizer(tokenizer)
        self._tokenizer = self._texts.tokenizer
        self._template = ChatTemplate(tokenizer, chat_template_kwargs)
        self._vocabulary = Vocabulary(model, tokenizer)
        self.end_ids, self.pad_id = self._vocabulary.end_ids, self._vocabulary.pad_id
        tokens = ("image_token_id", "image_token_index")
        image_ids = (getattr(model.config, name, None) for name in tokens)
        self._image_ids = {token for token in image_ids if isinstance(token, int)}
        self._has_byte_tokens = "<0x0A>" in tokenizer.get_vocab()
        self.is_encoder_decoder = bool(model.config.is_encoder_decoder)
        generation = model.generation_config
        self._stop_texts = _as_texts(getattr(generation, "stop_strings", None))
        text_config = model.config.get_text_config()
        lengths = ("max_position_embeddings", "max_target_positions")
        self.context_length: int | None = next(
            (n for name in lengths if isinstance(n := getattr(text_config, name, None), int)), None
        )

    @property
    def end_id(self) -> int | None:
        """The id that training teaches as the end of a completion."""
        return next(iter(self.end_ids), None)

    @property
    def joins_words(self) -> bool:
        """Whether decoding removes spaces between tokens, as for `do n't`."""
        return bool(getattr(self._tokenizer, "clean_up_tokenization_spaces", False))

    @property
    def has_chat_template(self) -> bool:
        """Whether prompts are wrapped as messages."""
        return self._template.exists

    @property
    def decoder_start_ids(self) -> tuple[int, ...]:
        """The ids in front of a completion in an encoder-decoder's decoder.

        Raises:
            UnsupportedModelError: If the model has no start token.
        """
        model = self._model()
        assert model is not None
        return decoder_start_ids(model)

    def prompt_ids(self, request: Request) -> tuple[int, ...]:
        """The ids that the completion follows.

        Raises:
            RequestError: If the tokenizer has no chat template and messages need one, or the
                template refuses them; the model has no embedding of an id; the request has
                images, and the model reads none, or other tokens of images than they take; or it
                names a language that the tokenizer does not have.
        """
        contents = [image for message in request.conversation for image in message.images]
        if not contents:
            ids = self._vocabulary.require(self._prompt_ids(request))
            if not ids:
                raise RequestError(
                    "the chat template of this model renders nothing for these messages"
                )
            if not self._image_ids.isdisjoint(ids):
                raise RequestError(
                    "the prompt has the token of an image, but the request has no image; give "
                    "images, or leave the token out"
                )
            return self._in_languages(tuple(ids), request)
        if self.is_encoder_decoder:
            raise RequestError("images are supported by decoder-only models; leave them out")
        images = self._image_reader.read(contents)
        ids = self._vocabulary.require(self._prompt_ids(request, images))
        if (count := list(ids).count(images.token)) != images.num_tokens:
            raise RequestError(
                f"the prompt has {count} tokens of images, and its images take "
                f"{images.num_tokens}, which are put in front of it; leave "
                f"{self._image_reader.placeholder!r} out"
            )
        return ImagePrompt.of(ids, images)

    def _in_languages(self, ids: tuple[int, ...], request: Request) -> tuple[int, ...]:
        """A prompt in the languages that a request names."""
        source, target = request.source_language, request.target_language
        if source is None and target is None:
            return ids
        if not self.is_encoder_decoder:
            raise RequestError(
                "source_language and target_language are for encoder-decoders; say in the prompt "
                "which language to write"
            )
        if source is not None:
            ids = tuple(self._languages.with_source(ids, source))
        if target is None:
            return ids
        start = self._languages.start_ids(self.decoder_start_ids[0], target)
        return TargetedPrompt.of(self._vocabulary.require(ids), self._vocabulary.require(start))

    def fitted(
        self, request: AnyRequest, *, num_slots: int = 0, context_length: int | None = None
    ) -> tuple[AnyRequest, tuple[int, ...]]:
        """A request whose new tokens fit the context, and the ids that they follow.

        A `max_new_tokens` that was left out becomes smaller where there is less room.

        Args:
            request: Any request.
            num_slots: Slots that take positions of the context.
            context_length: The limit, if it is another than the model's.

        Raises:
            RequestError: As `prompt_ids`.
            ContextLengthError: If the prompt and its new tokens do not fit the context.
        """
        limit = context_length or self.context_length
        if limit is not None:
            self._require_short(request, limit)
        ids = self.prompt_ids(request)
        vocabulary = self._vocabulary
        if unknown := [token for token in request.logit_bias if not vocabulary.contains(token)]:
            raise RequestError(
                f"logit_bias has the token id {unknown[0]}, but this model has "
                f"{vocabulary.size} embeddings"
            )
        if self._stop_texts:
            stop = (*request.stop, *self._stop_texts)
            request = request.model_copy(update={"stop": tuple(dict.fromkeys(stop))})
        if limit is None:
            return request, ids
        used = num_slots + self.num_before(ids)
        room = limit - used
        if "max_new_tokens" not in request.model_fields_set and 1 <= room < request.max_new_tokens:
            request = request.with_default_limit(room)
        if len(ids) > limit or request.max_new_tokens > room:
            beside = f" beside {num_slots} slots" if num_slots else ""
            # Clients such as LiteLLM know the error by the first words.
            raise ContextLengthError(
                f"this model's maximum context length is {limit} tokens{beside}, but the prompt "
                f"has {len(ids)} and asks for {request.max_new_tokens} more; shorten the prompt or "
                "ask for fewer new tokens"
            )
        return request, ids

    def _require_short(self, request: Request, limit: int) -> None:
        """Refuse a prompt that is far too long for the context before all of it is tokenized."""
        texts = [
            without_thoughts(message.content) if message.role == "assistant" else message.content
            for message in request.messages or ()
        ] or request.texts
        num_characters = _CHARACTERS_PER_TOKEN * limit
        if sum(map(len, texts)) <= num_characters:
            return
        head = "\n".join(texts)[:num_characters]
        num_tokens = len(self._texts.ids(head) if request.raw else self._texts.ids_of_text(head))
        if num_tokens > limit + 2 * len(texts):  # not by what joins them
            raise ContextLengthError(
                f"this model's maximum context length is {limit} tokens, but the first "
                f"{num_characters:,} characters of the prompt have {num_tokens} already; shorten it"
            )

    def example_ids(self, example: Example) -> TokenizedExample:
        """Prompt and completion of an example.

        Raises:
            RequestError: As `prompt_ids`.
            ContextLengthError: If together they do not fit the context.
        """
        prompt = self.prompt_ids(example)
        completion = self._vocabulary.require(self._texts.ids_of_text(example.completion))
        if not self.has_room(prompt, len(completion)):
            raise ContextLengthError(
                f"an example has {len(prompt)} + {len(completion)} tokens, but the context of this "
                f"model is {self.context_length}; shorten it"
            )
        return TokenizedExample(prompt, tuple(completion), example.is_whole)

    def num_tokens(self, example: Example) -> tuple[int, int]:
        """Tokens of an example's prompt and completion."""
        return len(self.prompt_ids(example)), len(self._texts.ids_of_text(example.completion))

    def fits(self, example: Example) -> bool:
        """Whether an example fits the model's context."""
        completion = self._texts.ids_of_text(example.completion)
        return self.has_room(self.prompt_ids(example), len(completion))

    def has_room(self, prompt: Sequence[int], num_completion: int) -> bool:
        """Whether a prompt and a completion with its end token fit the context."""
        needed = max(len(prompt), self.num_before(prompt) + num_completion + 1)
        return self.context_length is None or needed <= self.context_length

    def num_before(self, prompt: Sequence[int]) -> int:
        """Positions that are taken when the first new token is predicted."""
        if self.is_encoder_decoder:
            return len(start_ids_of(prompt, self.decoder_start_ids)) - 1
        return len(prompt)

    def ids_of_examples(self, examples: Sequence[Example]) -> list[TokenizedExample]:
        """Prompts and completions of examples.

        Raises:
            RequestError: With the places of the examples that cannot be tokenized.
            ContextLengthError: If the first of them does not fit the context.
        """
        tokenized, errors = [], dict[str, RequestError]()
        for number, example in enumerate(examples, 1):
            try:
                tokenized.append(self.example_ids(example))
            except RequestError as error:
                errors[example.place(number)] = error
        if errors:
            lines = [f"{place}: {error}" for place, error in errors.items()]
            raise type(next(iter(errors.values())))(shortened(lines, "\n"))
        return tokenized

    def chunks(self, text: str, max_tokens: int) -> Iterator[TokenizedExample]:
        """Cut a text into examples without a prompt.

        Args:
            text: Any text.
            max_tokens: Tokens per chunk.

        Yields:
            Each chunk; only the last one is whole.
        """
        ids = tuple(self._vocabulary.require(self._texts.ids_of_text(text)))
        if self.context_length is not None:
            max_tokens = min(max_tokens, max(1, self.context_length - 2))
        start = tuple(self._start_ids())
        for at in range(0, len(ids), max_tokens):
            is_last = at + max_tokens >= len(ids)
            yield TokenizedExample(start, ids[at : at + max_tokens], is_last)

    def text_ids(self, text: str) -> tuple[int, ...]:
        """The ids of a text at the start of a prompt, without an end token."""
        return tuple(self._vocabulary.require(self._at_start(self._texts.ids_of_text(text))))

    def inner_ids(self, text: str) -> tuple[int, ...]:
        """The ids of a text that follows another one, without a start or an end token."""
        return tuple(self._vocabulary.require(self._texts.ids_of_text(text)))

    def num_unsettled(self, ids: Sequence[int]) -> int:
        """How many of the last tokens are bytes, whose text the next byte may change."""
        if not self._has_byte_tokens:
            return 0
        unsettled = 0
        special = set(self._tokenizer.all_special_ids)  # decoded as nothing
        for count, token in enumerate(reversed(ids), 1):
            if token in special:
                continue
            if not _BYTE_TOKEN.fullmatch(str(self._tokenizer.convert_ids_to_tokens(token))):
                break
            unsettled = count
        return unsettled

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated ids, without special tokens."""
        text = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        assert isinstance(text, str)
        return text

    @cached_property
    def _languages(self) -> Languages:
        return Languages(self._tokenizer)

    @cached_property
    def _image_reader(self) -> ImageReader:
        model = self._model()
        assert model is not None
        if self._processor is None and self._load_processor is not None:
            return ImageReader(self._load_processor())
        return ImageReader(
            self._processor or load_processor(model, model.config.name_or_path or "")
        )

    def _prompt_ids(self, request: Request, images: PromptImages | None = None) -> Sequence[int]:
        if request.prompt_ids is not None:
            return request.prompt_ids
        if request.messages is None and (request.raw or not self.has_chat_template):
            # As it was written: special tokens are meant.
            lines = [*(images.texts if images else ()), request.prompt or ""]
            text = "\n".join(lines)
            return self._at_start(self._texts.ids(text)) if text else self._start_ids()
        conversation = request.conversation
        pieces = self._template.render(
            [message.model_dump(include={"role", "content"}) for message in conversation],
            request.chat_template_kwargs,
            num_images=[len(message.images) for message in conversation],
            continue_final_message=request.continue_final_message,
            # A completion is the answer, unless it has the thoughts before it too.
            close_thinking=isinstance(request, Example)
            and not END_OF_THINKING.search(request.completion),
        )
        if images is not None:
            pieces = with_images(pieces, self._image_reader.placeholder, images.texts)
        return [
            token
            for i, piece in enumerate(pieces)
            for token in self._texts.ids_of_piece(
                piece.text, is_literal=piece.is_literal, is_first=i == 0
            )
        ]

    def _at_start(self, ids: Sequence[int]) -> Sequence[int]:
        """Ids with what the tokenizer puts around a text, if it is not there already."""
        before, after = self._around_text
        ids = list(ids)
        if before and ids[: len(before)] == before:
            ids = ids[len(before) :]
        if not self.is_encoder_decoder:
            return [*before, *ids]
        if after and ids[-len(after) :] == after:
            ids = ids[: -len(after)]
        return [*before, *ids, *after]

    @property
    def _around_text(self) -> tuple[list[int], list[int]]:
        """The ids that the tokenizer puts before and after a text, as set to `src_lang` now."""
        inner = self._texts.ids(_ANY_TEXT)
        whole = list(self._tokenizer(_ANY_TEXT)["input_ids"])
        for at in range(len(whole) - len(inner) + 1):
            if whole[at : at + len(inner)] == inner:
                return whole[:at], whole[at + len(inner) :]
        return [], []

    def _start_ids(self) -> Sequence[int]:
        """The ids in front of a text that has no prompt."""
        if self.is_encoder_decoder:
            return list(self._tokenizer("")["input_ids"]) or [self.pad_id]
        return [self._vocabulary.start_id]


def _as_texts(texts: str | Sequence[str] | None) -> tuple[str, ...]:
    return (texts,) if isinstance(texts, str) else tuple(texts or ())
