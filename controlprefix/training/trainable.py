"""PrefixModel: prefixes being learned as a `torch.nn.Module`, for your own training loop."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from controlprefix.errors import TrainingDataError, known_names
from controlprefix.example import Example
from controlprefix.model import FrozenModel
from controlprefix.model.images import ImagePrompt
from controlprefix.model.languages import start_ids_of
from controlprefix.model.padding import pad_rows
from controlprefix.prefixes import Part, Prefix, PrefixKey
from controlprefix.training.objectives import TrainingRow
from controlprefix.training.parameterization import TrainablePrefixes
from controlprefix.training.preparation import check_trainable

_IGNORED = -100  # labels that transformers leaves out of the loss
_NO_PREFIX = -1
Publish = Callable[[dict[PrefixKey, Prefix]], dict[str, int]]


class PrefixModel(nn.Module):
    """A frozen model steered by prefixes that are trained. Get it with `ControlPrefix.trainable`.

    Its parameters are those of the prefixes alone; everything else (`config`, `generate`,
    `get_input_embeddings`, …) is the frozen model's. It is called as the frozen model is, with
    a further input, `prefix_ids`, that says which prefixes each row attends to. So
    transformers' `Trainer`, TRL's trainers and your own loop can train it.

    Args:
        frozen: The model.
        prefixes: What is trained.
        publish: Stores prefixes; returns their versions.
        prepared: An example with default labels, and with numbers as mixtures of labels.

    Attributes:
        prefixes: As given.
    """

    def __init__(
        self,
        frozen: FrozenModel,
        prefixes: TrainablePrefixes,
        publish: Publish,
        prepared: Callable[[Example], Example] = lambda example: example,
    ) -> None:
        super().__init__()
        self.prefixes = prefixes.to_device(frozen.device)
        # Outside of the module's own state, so that nothing trains, moves or saves the model.
        self.__dict__["_frozen"] = frozen
        self.__dict__["_publish"] = publish
        self.__dict__["_prepared"] = prepared

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        prefix_ids: Tensor | None = None,
        prefix_strengths: Tensor | None = None,
        **inputs: Any,
    ) -> Any:
        """Call the frozen model with each row's prefixes attached, with gradients to them.

        Args:
            input_ids, attention_mask, labels: As the frozen model takes them, `(num_rows,
                num_tokens)`.
            prefix_ids: Numbers of each row's prefixes, in the order of `keys`, `(num_rows,
                num_parts)`; -1 for none. Left out, every row attends to all prefixes.
            prefix_strengths: Their strengths, of the same shape; left out, 1.
            **inputs: Any other inputs of the frozen model.

        Returns:
            What the frozen model returns.

        Raises:
            TrainingDataError: If `prefix_ids` contains an index outside of `keys`.
        """
        if labels is not None:
            inputs["labels"] = labels
        return self._steered(
            self._frozen.model,
            input_ids,
            attention_mask=attention_mask,
            prefix_ids=prefix_ids,
            prefix_strengths=prefix_strengths,
            **inputs,
        )

    @property
    def base_model(self) -> Callable[..., Any]:
        """The frozen model without its head, steered like the whole; TRL calls it so."""
        return functools.partial(self._steered, self._frozen.model.base_model)

    def _steered(
        self,
        module: nn.Module,
        input_ids: Tensor | None = None,
        *,
        prefix_ids: Tensor | None = None,
        prefix_strengths: Tensor | None = None,
        **inputs: Any,
    ) -> Any:
        first = input_ids if input_ids is not None else inputs.get("inputs_embeds")
        if first is None:
            raise TrainingDataError("give input_ids or inputs_embeds")
        parts = self._parts(len(first), prefix_ids, prefix_strengths)
        with self._frozen.attached(self._frozen.assemble(parts), everywhere=True):
            return module(input_ids=input_ids, **inputs)

    @property
    def keys(self) -> tuple[PrefixKey, ...]:
        """The prefixes that are trained; `prefix_ids` are places in it."""
        return self.prefixes.keys

    def generate(
        self,
        *arguments: Any,
        prefix_ids: Tensor | None = None,
        prefix_strengths: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Generate with the prefixes as they are now: transformers' `generate`.

        Args:
            *arguments: As transformers takes them.
            prefix_ids, prefix_strengths: As in `forward`.
            **options: As transformers takes them.
        """
        names = ("inputs", "input_ids", "inputs_embeds")
        values = [*arguments[:1], *(options.get(name) for name in names)]
        ids = next((value for value in values if value is not None), None)
        if ids is None:
            raise TrainingDataError("give input_ids or inputs_embeds")
        with torch.no_grad():
            parts = self._parts(len(ids), prefix_ids, prefix_strengths)
            with self._frozen.attached(self._frozen.assemble(parts), everywhere=True):
                return self._frozen.model.generate(*arguments, **options)

    def features(self, example: Example) -> dict[str, list[Any]]:
        """An example as the inputs of one row, for a dataset; `collate` makes batches of them.

        Returns:
            `input_ids`, `labels` (-100 at the prompt), `prefix_ids` and `prefix_strengths`; for an
            encoder-decoder the labels are the completion alone, behind its language if the decoder
            starts from one.

        Raises:
            TrainingDataError: If it names none of the prefixes, or has images or a strength below
                0.
            ContextLengthError: If it does not fit the model's context.
        """
        example = self._prepared(example)
        named = [part for part in example.named_parts if part.key in self.keys and part.strength]
        if not named:
            names = ", ".join(map(str, self.keys))
            raise TrainingDataError(f"the example names none of what is trained: {names}")
        check_trainable([example])
        tokenizer = self._frozen.request_tokenizer
        row = TrainingRow.from_example(tokenizer.example_ids(example), tokenizer.end_id, (), ())
        if isinstance(row.prompt, ImagePrompt):
            raise TrainingDataError("rows with images cannot be trained on by one's own loop")
        prompt, targets = list(row.prompt), list(row.targets)
        inputs: dict[str, list[Any]] = {"input_ids": prompt, "labels": targets}
        if self._frozen.is_encoder_decoder:
            # The model puts its start token in front, not the others that a decoder starts from.
            start = start_ids_of(row.prompt, tokenizer.decoder_start_ids)
            inputs["labels"] = [*start[1:], *targets]
        else:
            inputs["labels"] = [_IGNORED] * len(prompt) + targets
            inputs["input_ids"] = prompt + targets
        inputs["prefix_ids"] = [self.keys.index(part.key) for part in named]
        inputs["prefix_strengths"] = [part.strength for part in named]
        return inputs

    def collate(self, rows: Sequence[dict[str, list[Any]]]) -> dict[str, Tensor]:
        """Pad rows of `features` to a batch: a data collator.

        Returns:
            `input_ids`, `attention_mask` and `labels`, `(num_rows, longest)`; `prefix_ids` and
            `prefix_strengths`, `(num_rows, most parts)`.
        """
        pad_id = self._frozen.request_tokenizer.pad_id
        ids, mask = pad_rows([row["input_ids"] for row in rows], pad_id, left=False)
        labels, _ = pad_rows([row["labels"] for row in rows], _IGNORED, left=False)
        prefix_ids, _ = pad_rows([row["prefix_ids"] for row in rows], _NO_PREFIX, left=False)
        strengths = torch.zeros(prefix_ids.shape)
        for own, row in zip(strengths, rows, strict=True):
            own[: len(row["prefix_strengths"])] = torch.tensor(row["prefix_strengths"])
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": labels,
            "prefix_ids": prefix_ids,
            "prefix_strengths": strengths,
        }

    def publish(self) -> dict[str, int]:
        """Store the prefixes as they are now as new versions, all or none.

        Returns:
            The number of each new version.

        Raises:
            PrefixFormatError: If a prefix holds NaN or infinite values; nothing is stored then.
            StoreError: If the store cannot be written.
        """
        return self._publish(self.prefixes.materialize())

    @property
    def device(self) -> torch.device:
        """Device of the frozen model."""
        return self._frozen.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the frozen model."""
        return self._frozen.dtype

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") and name not in {"_frozen"}:
                raise
            return getattr(self.__dict__["_frozen"].model, name)

    def _parts(
        self, num_rows: int, prefix_ids: Tensor | None, strengths: Tensor | None
    ) -> list[list[Part]]:
        """The parts of each row."""
        keys = self.keys
        if prefix_ids is None:
            prefix_ids = torch.arange(len(keys)).expand(num_rows, -1)
        if not isinstance(prefix_ids, Tensor) or prefix_ids.dim() != 2:
            raise TrainingDataError("prefix_ids must be a tensor of shape (num_rows, num_parts)")
        if len(prefix_ids) != num_rows:
            raise TrainingDataError(
                f"prefix_ids has {len(prefix_ids)} rows for {num_rows} rows of ids"
            )
        strengths = torch.ones(prefix_ids.shape) if strengths is None else strengths
        if strengths.shape != prefix_ids.shape:
            raise TrainingDataError("prefix_strengths must have the shape of prefix_ids")
        rows = [
            [
                (int(number), strength)
                for number, strength in zip(ids, own, strict=True)
                if number != _NO_PREFIX
            ]
            for ids, own in zip(prefix_ids.tolist(), strengths.tolist(), strict=True)
        ]
        unknown = next((n for row in rows for n, _ in row if not 0 <= n < len(keys)), None)
        if unknown is not None:
            raise TrainingDataError(
                f"prefix_ids has {unknown}, but there are {len(keys)} prefixes: "
                f"{known_names('', map(str, keys))}"
            )
        prefixes = self.prefixes.prefixes({keys[number] for row in rows for number, _ in row})
        return [[Part(prefixes[keys[n]], strength) for n, strength in row] for row in rows]
