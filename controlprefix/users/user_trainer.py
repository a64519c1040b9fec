"""UserTrainer: texts of users -> their stored prefixes or codes."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from controlprefix.cancellation import raise_if_stopped
from controlprefix.embeddings import MAX_CHARACTERS
from controlprefix.errors import (
    ForgottenError,
    RequestError,
    TrainingDataError,
    UnknownNameError,
)
from controlprefix.inference.resolver import Resolver
from controlprefix.model import FrozenModel
from controlprefix.prefixes import Prefix, PrefixDecoder, PrefixKey, UserCode
from controlprefix.processes import in_main_process, process_state
from controlprefix.store import ModelStore, NewVersion, PrefixStore, SimilarUser
from controlprefix.training.control import RunControl, run_destination
from controlprefix.training.preparation import check_num_slots
from controlprefix.training.report import TrainingReport
from controlprefix.training.settings import TrainingSettings
from controlprefix.users.decoder_training import CODE_LEARNING_RATE, DecoderReport, train_decoder
from controlprefix.users.enrolment import (
    DEFAULT_NUM_SLOTS,
    EnrolmentOptions,
    added_code,
    profile_of,
)
from controlprefix.users.guard import enrolled_value
from controlprefix.users.initialization import initializer
from controlprefix.users.migration import MigrationReport, migrate
from controlprefix.users.text_features import TextFeatures
from controlprefix.users.user_training import UsersReport, UserTexts, train_users, usable_texts
from controlprefix.users.user_vectors import VectorFeatures, code_of_vector

_DEFAULT_OPTIONS = {"parameterization": "direct", "batch_size": 4, "patience": 2}
# A decoder's initialization is good, so small steps are enough: see docs/decisions.md.
_LEARNING_RATE_FROM_DECODER = 1e-2
_MAX_REFINED_SLOTS = 16
# Training options that have no effect here.
_NOT_FOR_USERS = ("contrast", "off_context", "gradient_checkpointing", "save_steps", "too_long")
_NOT_FOR_RUNS_OF_USERS = ("accelerator", "tracker", "on_step", "on_validation")
_NUM_SLOTS = 16  # of a user's prefix without a decoder
_NOT_FOR_CODES = ("form", "hidden_size", "nested", "parameterization", "slot_dropout")
_NOT_FOR_PREFIXES_FROM_CODES = ("form",)
_NOT_FOR_DECODERS = (
    "contrast",
    "form",
    "nested",
    "off_context",
    "parameterization",
    "slot_dropout",
    "too_long",
)


class UserTrainer:
    """Trains and enrolls users of one frozen model, and keeps their prefixes in one store.

    Args:
        frozen: The model.
        store: Where to publish.
        resolver: Decodes stored user codes.
    """

    def __init__(self, frozen: FrozenModel, store: PrefixStore, resolver: Resolver) -> None:
        self._frozen = frozen
        self._resolver = resolver
        self._store = store
        self._model_store = store.for_model(frozen.fingerprint)

    def decoder(self, name: str) -> PrefixDecoder:
        """A copy of a stored decoder, on the model's device.

        Raises:
            UnknownNameError: If there is no such decoder.
        """
        value = self._model_store.get(PrefixKey("decoder", name)).value
        assert isinstance(value, PrefixDecoder)
        return value.to(self._frozen.device)

    def optional_decoder(self, name: str | None) -> PrefixDecoder | None:
        """The same, or None for no name."""
        return None if name is None else self.decoder(name)

    def learn_decoder(
        self,
        texts: Mapping[str, Sequence[str]],
        name: str,
        *,
        num_slots: int,
        width: int,
        embedder: str,
        vectors: Mapping[str, Sequence[float]] | None,
        control: RunControl,
        options: Mapping[str, Any],
    ) -> DecoderReport:
        """Train and store a decoder: see `ControlPrefix.learn_decoder`."""
        key = PrefixKey("decoder", name)
        self._store.require_writable([key])
        removal_number = self._store.last_removal_number()
        _refuse(options, _NOT_FOR_DECODERS, "a decoder")
        self._check_num_slots(num_slots)
        if width < 1:
            raise TrainingDataError(f"width is {width}; it must be 1 or more")
        settings = TrainingSettings.from_options({"batch_size": 16, **options})
        destination = run_destination(self._store, self._frozen)
        # Read before any process stores something.
        earlier = in_main_process(lambda: control.stored_report(destination))
        decoder, codes, report = train_decoder(
            self._frozen,
            texts,
            settings,
            num_slots=num_slots,
            width=width,
            features=TextFeatures(embedder) if vectors is None else VectorFeatures(vectors),
            control=control,
        )
        details = {
            "decoder": {
                "users": report.num_users,
                "r2": round(report.r2, 4),
                "best_loss": round(report.training.best_loss, 4),
                **settings.to_dict(),
            }
        }
        new = NewVersion(key, decoder, details, sources=tuple(codes))

        def publish() -> int:
            if (
                earlier is not None
                and str(key) in earlier.saved
                and earlier.is_same_run(report.training)
                # The run may have got other features than before, which it does not record.
                and self._model_store.has_content(
                    key, earlier.saved[str(key)], decoder.content_hash
                )
            ):
                return earlier.saved[str(key)]
            (version,) = self._store.put([new], removal_number=removal_number)
            if control.folder is not None:
                done = replace(report.training, saved={str(key): version}, **destination)
                done.save(control.folder)
            return version

        return replace(report, version=in_main_process(publish))

    def train_users(
        self,
        texts: Mapping[str, UserTexts] | Iterable[tuple[str, UserTexts]] | None,
        *,
        num_slots: int | None,
        decoder: str | None,
        as_codes: bool | None,
        concurrent_users: int,
        control: RunControl,
        options: Mapping[str, Any],
        removal_number: int | None = None,
        extras: Callable[[str], dict[str, Any]] = lambda user: {},
    ) -> UsersReport:
        """Train and store users: see `ControlPrefix.train_users`.

        Args:
            texts: None: the texts that are kept in the store.
            num_slots, decoder, as_codes, concurrent_users: As in
                `ControlPrefix.train_users`.
            control: Where the run is recorded.
            options: Fields of `TrainingSettings`.
            removal_number: As in `enroll`.
            extras: Per user, further fields of the `NewVersion`.
        """
        if process_state().num_processes > 1:
            raise TrainingDataError(
                "each process would train all users; run one, or share them among the actors of a "
                "Ray cluster (`controlprefix users train --ray`)"
            )
        if decoder is None and as_codes is not None:
            raise TrainingDataError("as_codes is for a decoder; name one, or leave it out")
        if decoder is not None and num_slots is not None:
            raise TrainingDataError(
                f"num_slots is for users without a decoder, and {decoder!r} has a number of its "
                "own; leave one of them out"
            )
        num_slots = _NUM_SLOTS if num_slots is None else num_slots
        as_codes = decoder is not None if as_codes is None else as_codes
        self._check_num_slots(num_slots)
        _refuse(options, _NOT_FOR_USERS, "users")
        watchers = [name for name in _NOT_FOR_RUNS_OF_USERS if getattr(control, name) is not None]
        _refuse(watchers, _NOT_FOR_RUNS_OF_USERS, "users")
        if as_codes:
            _refuse(options, _NOT_FOR_CODES, "user codes")
        elif decoder is not None:
            _refuse(options, _NOT_FOR_PREFIXES_FROM_CODES, "prefixes that start from codes")
        defaults: dict[str, Any] = dict(_DEFAULT_OPTIONS)
        if decoder is not None:
            rate = CODE_LEARNING_RATE if as_codes else _LEARNING_RATE_FROM_DECODER
            defaults["learning_rate"] = rate
        settings = TrainingSettings.from_options({**defaults, **options})
        self._store.require_writable(())
        if removal_number is None:
            removal_number = self._store.last_removal_number()
        if texts is None:
            users = self._store.users_with_texts()
            texts = {user: partial(self._store.user_texts, user) for user in users}
            if not texts:
                raise TrainingDataError(
                    "no texts are kept in the store; give texts, or enroll users with keep_texts"
                )

        def publish(user: str, value: Prefix | UserCode, report: TrainingReport) -> int:
            details = {
                "training": {
                    "best_step": report.best_step,
                    "best_loss": round(report.best_loss, 4),
                    "decoder": decoder,
                    **settings.to_dict(),
                }
            }
            own = extras(user)
            return self._put(user, value, details, removal_number=removal_number, **own)

        return train_users(
            self._frozen,
            texts.items() if isinstance(texts, Mapping) else texts,
            publish,
            settings,
            initialize=initializer(
                self._frozen,
                settings,
                decoder=self.optional_decoder(decoder),
                as_codes=as_codes,
                num_slots=num_slots,
            ),
            concurrent_users=concurrent_users,
            control=control,
            destination=" ".join(
                (self._store.display_name, self._store.tenant, self._frozen.fingerprint)
            ),
            is_stored=self._was_trained,
        )

    def enroll(
        self,
        user: str,
        texts: Sequence[str],
        options: EnrolmentOptions,
        *,
        removal_number: int | None = None,
    ) -> int:
        """Store a user's prefix or code at once: see `ControlPrefix.enroll`.

        The version, the texts and the profile are stored in one transaction.

        Args:
            user, texts, options: As there.
            removal_number: Number of the last entry of the store's audit log from before the
                texts were read; left out, that of now.
        """
        if removal_number is None:
            removal_number = self._store.last_removal_number()
        texts, decoder = usable_texts(user, texts), options.decoder
        extras: dict[str, Any] = {"texts": texts} if options.keep_texts else {}
        if options.keep_profile:
            extras["profile"] = profile_of(texts)
        if options.refine:
            report = self.train_users(
                {user: texts},
                num_slots=_refined_slots(options),
                decoder=decoder,
                as_codes=None,
                concurrent_users=1,
                control=RunControl(progress=False),
                options={},
                removal_number=removal_number,
                extras=lambda user: extras,
            )
            if user in report.failed:
                if self._store.last_removal_number(forgotten=user) > removal_number:
                    raise ForgottenError(user)
                raise TrainingDataError(report.failed[user])
            (version,) = report.users[user].saved.values()
            return version
        tokenizer = self._frozen.request_tokenizer
        limit = None if decoder is None else MAX_CHARACTERS  # of each text, to predict a code
        num_tokens = sum(len(tokenizer.inner_ids(text[:limit])) for text in texts)
        enrolled: dict[str, Any] = {"texts": len(texts), "tokens": num_tokens, "decoder": decoder}
        if options.add and decoder is not None:
            key = PrefixKey("user", user)
            current = self._model_store.version_info(key)
            stored = self._model_store.get(key, version=current.version)
            share = current.details.get("enrolled", {}).get("share", 1)
            if share != 1:
                raise RequestError(
                    f"user {user!r} was enrolled with guard, which kept {share:.0%} of what is "
                    "personal, so texts cannot be added; enroll them from all texts"
                )
            code, enrolled["texts"] = added_code(
                self.decoder(decoder), user, stored.value, current, texts
            )
            enrolled["tokens"] += current.details.get("enrolled", {}).get("tokens", 0)
            # Nothing is lost where two add at once: the second is refused.
            extras["replaces"] = current.version
            # Rounded to int8, a code would not move by a single text any more.
            return self._put(
                user,
                code,
                {"enrolled": enrolled},
                removal_number=removal_number,
                dtype="float32",
                **extras,
            )
        num_slots = options.num_slots or DEFAULT_NUM_SLOTS
        if decoder is None:
            enrolled["num_slots"] = num_slots  # at most
        value, share = enrolled_value(
            self._frozen,
            texts,
            self.optional_decoder(decoder),
            num_slots=num_slots,
            guard=options.guard,
        )
        if options.guard:
            enrolled["share"] = share
        return self._put(
            user, value, {"enrolled": enrolled}, removal_number=removal_number, **extras
        )

    def enroll_vector(self, user: str, vector: Sequence[float], decoder: str) -> int:
        """Store the code of a user's vector: see `ControlPrefix.enroll`."""
        removal_number = self._store.last_removal_number()
        code = code_of_vector(self.decoder(decoder), decoder, user, vector)
        details = {"enrolled": {"vector": len(vector), "decoder": decoder}}
        return self._put(user, code, details, removal_number=removal_number)

    def migrate(self, source: ModelStore, decoder: str) -> MigrationReport:
        """Give users of another model codes of this one: see `ControlPrefix.migrate_users`.

        Args:
            source: The other model's stored prefixes.
            decoder: Name of this model's decoder.
        """
        self._store.require_writable(())
        removal_number = self._store.last_removal_number()

        def publish(new: Sequence[NewVersion]) -> dict[PrefixKey, int]:
            return self._store.put_unless_forgotten(new, removal_number)

        return migrate(source, self._model_store, publish, self.decoder(decoder))

    def similar_users(self, texts: Sequence[str], limit: int) -> list[SimilarUser]:
        """Users with a kept profile that is most similar to texts.

        Raises:
            TrainingDataError: If there is no text.
        """
        profile = profile_of(usable_texts("", texts))
        return self._store.similar_users(profile.embedder, profile.values, limit=limit)

    def _was_trained(self, key: PrefixKey, version: int) -> bool:
        """Whether a version that `train_users` stored, or a later one, is still there.

        Where a user was forgotten, numbers begin again: then it may be an enrolment.
        """
        try:
            return "training" in self._model_store.version_info(key, version=version).details
        except UnknownNameError:
            return self._model_store.current_version(key) > version

    def _check_num_slots(self, num_slots: int) -> None:
        check_num_slots(num_slots, self._frozen.request_tokenizer.context_length)

    def _put(
        self,
        user: str,
        value: Prefix | UserCode,
        details: Mapping[str, Any],
        *,
        removal_number: int,
        **extras: Any,
    ) -> int:
        raise_if_stopped()
        if isinstance(value, Prefix):
            value = value.to(dtype=self._frozen.dtype)
        new = NewVersion(PrefixKey("user", user), value, details, **extras)
        return self._store.put([new], removal_number=removal_number)[0]


def _refuse(options: Collection[str], names: Sequence[str], what: str) -> None:
    for name in names:
        if name in options:
            raise TrainingDataError(f"{name} has no effect when training {what}; leave it out")


def _refined_slots(options: EnrolmentOptions) -> int | None:
    """Slots of a prefix that is trained at once; a decoder has a number of its own."""
    if options.decoder is not None:
        return None
    return min(options.num_slots or _MAX_REFINED_SLOTS, _MAX_REFINED_SLOTS)
