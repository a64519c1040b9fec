"""The methods of `ControlPrefix` that train task and attribute prefixes."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar, Unpack

from controlprefix.data import Columns, Rows, as_examples
from controlprefix.engine.arguments import checks_method_arguments
from controlprefix.engine.generation import GenerationMethods
from controlprefix.errors import ContextLengthError, TrainingDataError
from controlprefix.example import Example, Preference
from controlprefix.prefixes import Kind, PrefixKey
from controlprefix.request import Request
from controlprefix.training import (
    Initialization,
    Initializations,
    Learnable,
    ParameterizationName,
    PrefixModel,
    RunControl,
    ShorteningReport,
    SweepReport,
    TrainingOptions,
    TrainingReport,
    TrainingSettings,
)
from controlprefix.training.control import RunOptions
from controlprefix.training.distillation import distillation_target, with_instruction
from controlprefix.training.ordinal_labels import interpolated, ordinal_labels
from controlprefix.training.settings import TooLong

_DISTILL_BATCH_SIZE = 32
_NOT_FOR_SWEEPS = RunOptions.__annotations__.keys() - {"progress"}

Row = TypeVar("Row", Example, Preference)


@checks_method_arguments
class TrainingMethods(GenerationMethods):
    """Examples -> new versions of prefixes."""

    def train(
        self,
        examples: Rows,
        *,
        columns: Columns | None = None,
        task: str | None = None,
        learn: Learnable | Sequence[Learnable] | None = None,
        num_slots: int | Mapping[Learnable, int] = 16,
        init: Initialization | Initializations = "text",
        **options: Unpack[TrainingOptions],
    ) -> TrainingReport:
        """Train prefixes on examples, jointly, and store them as new versions.

        What an example names and `learn` leaves out is taken from the store and not changed,
        or is absent if nothing is stored for it yet (the report says so); the model's weights
        never change. All trained prefixes are published together, or none.

        Args:
            examples: Rows in any form: Examples, dicts, the path of a file, a
                `datasets.Dataset`, a DataFrame (see `controlprefix.data.as_examples`). Strengths
                apply as in a request. An attribute with more than 8 different numbers as labels is
                learned as 5 labels over their range, each row as a mixture of the two beside it.
            columns: Which columns of the rows hold what, if they have other names.
            task: Task of rows that name none.
            learn: Any of `task`, `attributes`, `user`; left out, the task and the attributes, as
                far as examples have them.
            num_slots: Slots of each trained prefix, or per entry of `learn`.
            init: `text`: start from the keys and values of the prefix's own training text (of
                its first 256 tokens, per kv head those that examples attend to most);
                `tokens`: from random tokens of it; `random`; or `stored`: from the stored
                version if there is one. Or a text or a `Prefix` for some prefixes, such as
                `{("task", "email"): "Write an email."}`; the others start from `text`.
            **options: Fields of `TrainingSettings` and of `RunControl` (folder, tracker,
                callbacks). `parameterization` is `shared`, or `direct` if only users are trained.
                `validation` may also be rows, in any form, such as a dataset's own development
                split.

        Returns:
            Losses, the best step, and the versions that were stored.

        Raises:
            UnknownNameError: If the attribute space does not have a label.
            ContextLengthError: If an example does not fit the model's context.
            GeometryMismatchError: If a prefix in `init` was made for another model.
            TrainingDataError: If the examples cannot be trained on, or an option is invalid.
            StoreError: If the store or the folder cannot be written.

        Reference:
            Clive et al., "Control Prefixes for Parameter-Efficient Text Generation", 2021,
            https://arxiv.org/abs/2110.08329.
        """
        rows, held_out, fields = self._training_rows(
            examples, options, learn, lambda rows: self._rows(rows, columns, task)
        )
        control, fields = RunControl.split_off(fields)
        only_users = learn == "user" or (learn is not None and list(learn) == ["user"])
        defaults = {"parameterization": "direct"} if only_users else {}
        return self._trainer.train(
            rows,
            TrainingSettings.from_options({**defaults, **fields}),
            learn=learn,
            num_slots=num_slots,
            init=init,
            validation=held_out,
            num_slots_of=self._num_slots_of,
            control=control,
        )

    def trainable(
        self,
        examples: Rows,
        *,
        columns: Columns | None = None,
        task: str | None = None,
        learn: Learnable | Sequence[Learnable] | None = None,
        num_slots: int | Mapping[Learnable, int] = 16,
        init: Initialization | Initializations = "text",
        parameterization: ParameterizationName = "shared",
        seed: int = 0,
    ) -> PrefixModel:
        """The prefixes that rows name as a `torch.nn.Module`, for a training loop of your own.

        Only the prefixes are parameters. Prefixes that rows name and `learn` leaves out are not
        attached. Train it with transformers' `Trainer`, with TRL or a bare loop, then `publish`.

        Args:
            examples, columns, task, learn, num_slots, init: As in `train`; the rows name the
                prefixes and are what they start from.
            parameterization, seed: Fields of `TrainingSettings`.

        Returns:
            A module to be called like the frozen model.

        Raises:
            TrainingDataError: If the rows cannot be trained on.
            StoreError: If the store cannot be written.
        """
        rows = self._rows(examples, columns, task)
        settings = TrainingSettings.from_options(
            {"parameterization": parameterization, "seed": seed, "validation": 0.0}
        )
        labels = self._ordinal_labels(rows, learn)

        def prepared(example: Example) -> Example:
            return interpolated(self.with_default_labels([example]), labels)[0]

        return self._trainer.trainable(
            interpolated(rows, labels),
            settings,
            prepared=prepared,
            learn=learn,
            num_slots=num_slots,
            init=init,
            num_slots_of=self._num_slots_of,
        )

    def distill(
        self,
        instruction: str,
        prompts: Sequence[str],
        *,
        task: str | None = None,
        attribute: str | None = None,
        label: str | float | None = None,
        user: str | None = None,
        completions: Sequence[str] | None = None,
        max_new_tokens: int = 48,
        num_slots: int = 16,
        **options: Unpack[TrainingOptions],
    ) -> TrainingReport:
        """Train a prefix that does what an instruction does, without labelled data.

        The teacher is the same frozen model with the instruction in front of each prompt; the
        prefix learns to make the same predictions without it. It is initialized with the
        instruction's own keys and values.

        Args:
            instruction: An instruction, or any other context.
            prompts: Prompts on which to imitate the instruction.
            task, attribute, label, user: The one prefix to train: a task, a label of an
                attribute, or a user.
            completions: One per prompt; left out, the teacher generates them with `seed`.
            max_new_tokens: Maximum length of those.
            num_slots: As in `train`.
            **options: As in `train`.

        Returns:
            As `train`.

        Raises:
            TrainingDataError: If not exactly one prefix is named, there is no prompt, or there
                is not one completion per prompt.
            UnknownNameError: If the attribute space has no such label.
            ContextLengthError: If a prompt does not fit the context with the instruction.

        Reference:
            Context distillation: Askell et al., 2021, https://arxiv.org/abs/2112.00861,
            and Snell et al., 2022, https://arxiv.org/abs/2209.15189.
        """
        if not isinstance(options.get("validation", 0.0), (int, float)):
            raise TrainingDataError("validation is a fraction of the prompts here; give a number")
        control, settings_fields = RunControl.split_off(options)
        settings = TrainingSettings.from_options(settings_fields)
        key, fields = distillation_target(task=task, attribute=attribute, label=label, user=user)
        (request,) = self.with_default_labels([Request(prompt="-", **fields)])
        if key.kind == "attribute" and key not in {part.key for part in request.named_parts}:
            raise TrainingDataError(
                f"{key} is a position between labels, and would never be asked for; name a label"
            )
        if not prompts:
            raise TrainingDataError("there are no prompts to distill on; give a list of texts")
        if settings.too_long == "cut":
            raise TrainingDataError(
                "too_long='cut' cannot be combined with an instruction that the same model reads "
                "in front of each prompt; give 'skip', or shorter prompts"
            )
        num_skipped = 0
        if completions is None:
            fitting = self._fitting_prompts(instruction, prompts, max_new_tokens, settings.too_long)
            num_skipped = len(prompts) - len(fitting)
            prompts, completions = self._write_as_teacher(
                instruction, fitting, max_new_tokens, settings.seed
            )
        if blank := [i for i, text in enumerate(completions, 1) if not text.strip()]:
            raise TrainingDataError(f"completion {blank[0]} is blank; leave its prompt out")
        if len(completions) != len(prompts):
            raise TrainingDataError(
                f"{len(completions)} completions for {len(prompts)} prompts; give one each"
            )
        examples = [
            Example(prompt=prompt, completion=completion, **fields)
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        return self._trainer.distill(
            instruction,
            key,
            examples,
            settings,
            num_slots=self._num_slots_of(key) or num_slots,
            num_skipped=num_skipped,
            control=control,
        )

    def _fitting_prompts(
        self, instruction: str, prompts: Sequence[str], max_new_tokens: int, too_long: TooLong
    ) -> list[str]:
        """The prompts that fit the context behind an instruction, with what is written."""
        tokenizer = self._frozen.request_tokenizer
        fitting = []
        for number, prompt in enumerate(prompts, 1):
            ids = self._answered_prompt(instruction, prompt)
            if tokenizer.has_room(ids, max_new_tokens - 1):  # which counts an end token too
                fitting.append(prompt)
            elif too_long == "refuse":
                raise ContextLengthError(
                    f"instruction and prompt {number} have {len(ids)} tokens, and {max_new_tokens} "
                    f"are to follow; the model's context has {tokenizer.context_length}; shorten "
                    "them, or give too_long='skip'"
                )
        if not fitting:
            raise TrainingDataError("no prompt fits the model's context with the instruction")
        return fitting

    def _teacher_requests(
        self, instruction: str, prompts: Sequence[str], max_new_tokens: int, seed: int
    ) -> list[Request]:
        """Requests for the model's own answers to prompts behind an instruction."""
        return [
            Request(
                prompt_ids=self._answered_prompt(instruction, prompt),
                max_new_tokens=max_new_tokens,
                temperature=1.0,
                seed=seed + i,
            )
            for i, prompt in enumerate(prompts)
        ]

    def _answered_prompt(self, instruction: str, prompt: str) -> tuple[int, ...]:
        """The ids of a prompt behind an instruction, whose answer follows without thoughts."""
        row = Example(prompt=with_instruction(instruction, prompt), completion="-")
        return tuple(self._frozen.request_tokenizer.prompt_ids(row))

    def _write_as_teacher(
        self, instruction: str, prompts: Sequence[str], max_new_tokens: int, seed: int
    ) -> tuple[list[str], list[str]]:
        """The prompts that the model answers with an instruction, and its completions."""
        requests = self._teacher_requests(instruction, prompts, max_new_tokens, seed)
        generated = self.without_defaults().generate(requests, batch_size=_DISTILL_BATCH_SIZE)
        # The teacher may write nothing, from which there is nothing to learn.
        written = [i for i, completion in enumerate(generated) if completion.text.strip()]
        if not written:
            raise TrainingDataError(
                "the model answered no prompt with this instruction; give other prompts, or "
                "completions"
            )
        return [prompts[i] for i in written], [generated[i].text for i in written]

    def sweep(
        self,
        examples: Rows,
        *,
        columns: Columns | None = None,
        task: str | None = None,
        num_slots: Sequence[int] = (1, 2, 4, 8, 16, 32),
        parameterizations: Sequence[ParameterizationName] = ("shared",),
        learn: Learnable | Sequence[Learnable] | None = None,
        init: Initialization | Initializations = "text",
        **options: Unpack[TrainingOptions],
    ) -> SweepReport:
        """Train with different numbers of slots, store nothing, and compare validation losses.

        Args:
            examples, columns, task, learn, init: As in `train`.
            **options: As in `train`, but for those that record or watch a run; see
                `SweepReport.save`.
            num_slots: Slots of each trained prefix; each number is tried.
            parameterizations: Each is tried with each number of slots.

        Returns:
            The validation loss of each combination, and the best one.

        Raises:
            TrainingDataError: If the examples cannot be trained on, or none are held out.
        """
        rows, held_out, fields = self._training_rows(
            examples, options, learn, lambda rows: self._rows(rows, columns, task)
        )
        for option in _NOT_FOR_SWEEPS & fields.keys():
            raise TrainingDataError(f"{option} has no effect in a sweep; leave it out")
        if "parameterization" in fields:
            raise TrainingDataError("give a sweep parameterizations, not parameterization")
        control, fields = RunControl.split_off(fields)
        return self._trainer.sweep(
            rows,
            num_slots=num_slots,
            parameterizations=parameterizations,
            learn=learn,
            init=init,
            validation=held_out,
            options=fields,
            progress=control.progress,
        )

    def shorten(
        self,
        kind: Kind,
        name: str,
        examples: Rows,
        *,
        columns: Columns | None = None,
        keep: float = 0.95,
    ) -> ShorteningReport:
        """Store a shorter prefix: the slots attended to most, with refitted keys and values.

        Args:
            kind, name: A stored prefix.
            examples: Held-out rows that name the prefix, in any form.
            columns: As in `train`.
            keep: Fraction of its gain on them, over no prefix, that must stay.

        Returns:
            The number of slots that were kept, and the loss by number of slots.

        Raises:
            UnknownNameError: If there is no such prefix, or none for another part.
            TrainingDataError: If the examples do not name it, or it gains nothing on them.
        """
        removal_number = self.store.last_removal_number()
        rows = self._rows(examples, columns, None)
        return self._trainer.shorten(
            PrefixKey(kind, name), rows, keep=keep, removal_number=removal_number
        )

    def _rows(self, rows: Rows, columns: Columns | None, task: str | None) -> list[Example]:
        """Rows in any form as examples with default labels."""
        defaults = {} if task is None else {"task": task}
        examples = as_examples(rows, columns=columns, defaults=defaults)
        return self.with_default_labels(examples)

    def _training_rows(
        self,
        rows: Rows,
        options: Mapping[str, Any],
        learn: Learnable | Sequence[Learnable] | None,
        read: Callable[[Rows], list[Row]],
    ) -> tuple[list[Row], list[Row], dict[str, Any]]:
        """Rows to train on, rows given as `validation`, and the options without those."""
        own, held_out, fields = read(rows), [], dict(options)
        validation = options.get("validation", 0.0)
        if not isinstance(validation, (int, float)):
            held_out, fields["validation"] = read(validation), 0.0
        labels = self._ordinal_labels(own, learn)
        held_out = interpolated(held_out, labels, source="validation, ")
        return interpolated(own, labels), held_out, fields

    def _ordinal_labels(
        self, rows: Sequence[Request], learn: Learnable | Sequence[Learnable] | None
    ) -> dict[str, Collection[str]]:
        """Per attribute with numbers as labels, those that others are mixtures of."""
        return ordinal_labels(
            rows,
            self.attributes,
            lambda: [PrefixKey("attribute", name) for name in self._model_store.names("attribute")],
            may_add=learn is None or "attributes" in ([learn] if isinstance(learn, str) else learn),
        )

    def _num_slots_of(self, key: PrefixKey) -> int | None:
        """The attribute space's number of slots for a label."""
        space = self.attributes
        return space.attributes[key.attribute].num_slots if space and key.attribute else None
