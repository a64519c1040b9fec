"""The methods of `ControlPrefix` for users and their prefixes."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Unpack

from controlprefix.data import Columns, Rows, UserTexts, as_texts, read_texts_by_user, read_users
from controlprefix.embeddings import DEFAULT_EMBEDDER
from controlprefix.engine.arguments import checks_method_arguments
from controlprefix.engine.sharing import SharingMethods
from controlprefix.errors import RequestError, TrainingDataError
from controlprefix.store import SimilarUser
from controlprefix.training import RunControl, TrainingOptions
from controlprefix.users import (
    DecoderReport,
    EnrolmentReport,
    MigrationReport,
    PrivacyReport,
    UsersReport,
    enroll_each,
)
from controlprefix.users.enrolment import EnrolmentOptions


@checks_method_arguments
class UserMethods(SharingMethods):
    """Texts of users -> their prefixes."""

    def train_users(
        self,
        texts: UserTexts | None = None,
        *,
        columns: Columns | None = None,
        num_slots: int | None = None,
        decoder: str | None = None,
        as_codes: bool | None = None,
        concurrent_users: int = 16,
        **options: Unpack[TrainingOptions],
    ) -> UsersReport:
        """Train a prefix for each user on texts they wrote, many users in one run.

        Each user trains as they would alone: on their own texts in their own order, with an
        own optimizer, validation and end. A finished user is stored at once. A user that cannot
        be trained (no text, a loss that is not finite) is reported, and affects nobody.

        Args:
            texts: Texts per user; rows in any form with a user and a text each (see
                `controlprefix.data.as_examples`); or pairs of a user and texts, which are consumed
                as there is room, so there may be any number of users. Left out: the texts that
                `enroll` kept in the store.
            columns: Which columns of rows hold what, if they have other names.
            num_slots: Slots of each prefix, without a decoder; left out, 16.
            decoder: Start from what this decoder (see `learn_decoder`) predicts for the user:
                better, the fewer texts there are. Left out, from the user's own text.
            as_codes: With a decoder: train and store a user's code only, as when left out, or
                all slots (False).
            concurrent_users: Users at a time.
            **options: Fields of `TrainingSettings`, for each user, and of `RunControl`. Defaults
                differ: `parameterization` is `direct`, `batch_size` 4, `patience` 2. In `folder`,
                finished users are recorded; `resume` skips those with the same texts and settings.

        Returns:
            A report per user with losses and version; why others failed; who was skipped.

        Raises:
            TrainingDataError: If an option is invalid, or no texts are kept.
            UnknownNameError: If there is no such decoder.
            StoreError: If a prefix cannot be stored.
        """
        control, fields = RunControl.split_off(options)
        return self._user_trainer.train_users(
            None if texts is None else read_users(texts, columns=columns),
            num_slots=num_slots,
            decoder=decoder,
            as_codes=as_codes,
            concurrent_users=concurrent_users,
            control=control,
            options=fields,
        )

    def learn_decoder(
        self,
        texts: UserTexts,
        *,
        columns: Columns | None = None,
        name: str = "users",
        num_slots: int = 16,
        width: int = 64,
        embedder: str = DEFAULT_EMBEDDER,
        vectors: Mapping[str, Sequence[float]] | None = None,
        **options: Unpack[TrainingOptions],
    ) -> DecoderReport:
        """Train a decoder of user codes on many users, and store it under a name.

        It turns a code of `num_slots` times `width` values into a prefix. With it, a user is
        enrolled at once (`enroll(decoder=)`), or trained better from few texts and stored in
        a kilobyte (`train_users(decoder=)`). The users it is trained on get no prefix. If one
        of them is forgotten later, `num_forgotten` of the decoder's versions counts it.

        Args:
            texts, columns: As in `train_users`; of a hundred users or more, to be of use to others.
            name: Name of the decoder.
            num_slots: Slots of the prefixes.
            width: Values of a code per slot.
            embedder: A sentence-transformers model, by name or folder, for text features.
            vectors: A vector per user, all of one size, from which codes are predicted in place
                of text features: of a recommender, of images, of answers to questions. Then
                `enroll(vector=)` enrolls users without any text.
            **options: Fields of `TrainingSettings` and `RunControl`; `batch_size` is 16 by default.

        Returns:
            The number of users, the cross-validated R² of predicted codes, and the training report.

        Raises:
            TrainingDataError: If there are fewer than two users, or one without a text or a
                vector.
            MissingDependencyError: If sentence-transformers is not installed.

        Reference:
            The shared reparameterization of Control Prefixes (Clive et al., 2021) over users,
            as in Tan et al., "Personalized Pieces", 2024, https://arxiv.org/abs/2406.10471;
            codes predicted from texts as in PPlug (Liu et al., 2024,
            https://arxiv.org/abs/2409.11901), or from vectors, as in Embedding-to-Prefix
            (Huber et al., 2025, https://arxiv.org/abs/2505.17051) and ClipCap (Mokady et al.,
            2021, https://arxiv.org/abs/2111.09734).
        """
        control, fields = RunControl.split_off(options)
        return self._user_trainer.learn_decoder(
            read_texts_by_user(texts, columns=columns),
            name,
            num_slots=num_slots,
            width=width,
            embedder=embedder,
            vectors=vectors,
            control=control,
            options=fields,
        )

    def enroll(
        self,
        user: str,
        texts: str | Sequence[str] | Rows | None = None,
        *,
        columns: Columns | None = None,
        vector: Sequence[float] | None = None,
        decoder: str | None = None,
        refine: bool = False,
        num_slots: int | None = None,
        keep_texts: bool = False,
        keep_profile: bool = False,
        add: bool = False,
        guard: bool = False,
    ) -> int:
        """Store a usable prefix for a user at once, from texts they wrote.

        With a decoder it is the code predicted from the texts. Without, all texts are read, and
        `num_slots` slots are matched to what the model gets from all of their tokens (see
        `controlprefix.model.attention_matching`); so the prefix tells more of them than a code.

        Args:
            user: Name of the user.
            texts: What they wrote: texts, the `Path` of a file of texts, or rows in any form; of
                rows that name users, those of this user.
            columns: Which columns of rows hold what, if they have other names.
            vector: The user's vector instead of texts, with a decoder that was trained with
                vectors. Then there are no other options.
            decoder: A stored decoder, by name (see `learn_decoder`).
            refine: With a decoder: train the predicted code further, for some seconds. Without:
                train 16 slots at most from the texts' first tokens, instead of matching them.
            num_slots: Without a decoder: slots at most; left out, 64.
            keep_texts: Store the texts too, so that `train_users()` can train on them later.
            keep_profile: Store their mean sentence embedding, to find `similar_users`.
            add: Update the user's code with these texts too. It needs the decoder of the earlier
                enrolment; earlier texts need not be given again, and the result equals enrolling
                from all.
            guard: With a decoder: shrink the predicted code towards the mean code, by the factor
                with the lowest loss on held-out texts of the user. The share of the distance that
                remains is in the version's `details["enrolled"]["share"]`; 0 means that
                nothing personal helped.

        Returns:
            The number of the new version.

        Raises:
            TrainingDataError: If there is no text.
            UnknownNameError: If there is no such decoder, or no such user to add to.
            RequestError: If the user's current prefix is nothing that texts can be added to,
                options do not go together, or a vector is not one of the decoder's.
            VersionConflictError: If another version was stored meanwhile, with `add`.
            ForgottenError: If the user was forgotten meanwhile.
            MissingDependencyError: If a decoder or a profile needs sentence-transformers.
            StoreError: If the store cannot be written.
        """
        options = EnrolmentOptions(
            decoder=decoder,
            refine=refine,
            num_slots=num_slots,
            keep_texts=keep_texts,
            keep_profile=keep_profile,
            add=add,
            guard=guard,
        )
        if vector is not None:
            if texts is not None or decoder is None or options != EnrolmentOptions(decoder=decoder):
                raise RequestError(
                    "vector takes the place of texts, and goes with decoder alone; leave the "
                    "others out"
                )
            return self._user_trainer.enroll_vector(user, vector, decoder)
        if texts is None:
            raise RequestError("there is nothing to enroll from; give texts, or vector and decoder")
        own = as_texts(texts, columns=columns, user=user)
        return self._user_trainer.enroll(user, own, options)

    def enroll_users(
        self,
        texts: UserTexts,
        *,
        columns: Columns | None = None,
        decoder: str | None = None,
        refine: bool = False,
        num_slots: int | None = None,
        keep_texts: bool = False,
        keep_profile: bool = False,
        guard: bool = False,
        progress: bool = True,
    ) -> EnrolmentReport:
        """Enroll many users, one after another: see `enroll`.

        A user that cannot be enrolled is reported, and affects nobody.

        Args:
            texts: As in `train_users`; pairs of a user and texts are consumed one by one.
            columns: Which columns of rows hold what, if they have other names.
            decoder, refine, num_slots, keep_texts, keep_profile, guard: As in `enroll`.
            progress: Show a bar.

        Returns:
            The version of each user, and why others failed.

        Raises:
            TrainingDataError: If rows cannot be read.
            UnknownNameError: If there is no such decoder.
            StoreError: If a prefix cannot be stored.
        """
        options = EnrolmentOptions(
            decoder=decoder,
            refine=refine,
            num_slots=num_slots,
            keep_texts=keep_texts,
            keep_profile=keep_profile,
            guard=guard,
        )
        removal_number = self.store.last_removal_number()
        users = read_users(texts, columns=columns)
        if decoder is not None:
            self.version_info("decoder", decoder)  # fail before any user is read
        enroll = partial(self._user_trainer.enroll, options=options)
        if isinstance(users, (Mapping, Sequence)):  # all are read
            enroll = partial(enroll, removal_number=removal_number)
        pairs = users.items() if isinstance(users, Mapping) else users
        return enroll_each(pairs, enroll, progress=progress)

    def migrate_users(self, source: "UserMethods", *, decoder: str = "users") -> MigrationReport:
        """Give the users of another model codes of this one, without their texts.

        What a code becomes is learned by ridge regression from users who have a code on both
        models: enroll or train some dozens on this model first. Users who have something stored
        for this model are left as they are.

        Args:
            source: The other model, with the store that holds its users' codes.
            decoder: This model's decoder of the new codes.

        Returns:
            The cross-validated R², the versions of migrated users, and why others were not.

        Raises:
            UnknownNameError: If there is no such decoder.
            TrainingDataError: If fewer than eight users have a code on both, or both are the same
                model and store.
            StoreError: If the store cannot be written; nothing is stored then.

        Reference:
            See `controlprefix.users.migration.fit_code_map`.
        """
        place = (source.store.url, source.tenant, source.geometry.fingerprint)
        if source is self or place == (self.store.url, self.tenant, self.geometry.fingerprint):
            raise TrainingDataError(
                "both are the same model with the same store, so there is nothing to migrate"
            )
        return self._user_trainer.migrate(source._model_store, decoder)

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

        Fewer `epochs`, early stopping, or a code instead of all slots reveal less, each at some
        cost in likelihood.

        Args:
            user: Name of the user.
            texts: Texts that the prefix was trained on.
            held_out: Other texts of the same author.
            num_canaries: Secret numbers to plant among the texts. The prefix is made again with
                them, in the same way (it is not stored), and their exposure is measured.
            seed: Seed of those numbers.

        Returns:
            Membership AUC, extraction rate, exposure in bits, and the gain in nats per token.

        Raises:
            UnknownNameError: If there is no such user.
            TrainingDataError: If there are no texts, or canaries are wanted and the prefix was not
                made by `enroll` or `train_users`.
        """
        return self._user_auditor.audit(user, texts, held_out, num_canaries=num_canaries, seed=seed)

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
        """Remove every version of a user's prefix, kept texts, feedback, jobs and profile.

        For a user it is the same as `remove("user", user)`.

        Args:
            user: Name of the user.

        Returns:
            How many versions were removed.

        Raises:
            UnknownNameError: If nothing is stored for the user.
        """
        return self.remove("user", user)
