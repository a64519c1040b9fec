"""The methods of `ControlPrefix` that train on rewards and on preferences."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Unpack

from controlprefix.data import Columns, Rows, as_preferences, as_requests
from controlprefix.engine.arguments import checks_method_arguments
from controlprefix.engine.training import TrainingMethods
from controlprefix.errors import ContextLengthError, TrainingDataError
from controlprefix.example import Example, Preference
from controlprefix.store.records import check_key, user_name
from controlprefix.training import (
    Learnable,
    PolicySettings,
    PreferenceOptions,
    PreferenceSettings,
    ReinforcementOptions,
    Reward,
    RunControl,
    TrainingReport,
    TrainingSettings,
)
from controlprefix.training.ordinal_labels import interpolated
from controlprefix.training.preparation import check_trainable


@checks_method_arguments
class FeedbackMethods(TrainingMethods):
    """Train prefixes on rewards and on preferences."""

    def reinforce(
        self,
        requests: Rows,
        *,
        reward: Reward,
        demonstrations: Rows | None = None,
        columns: Columns | None = None,
        task: str | None = None,
        learn: Learnable | Sequence[Learnable] | None = None,
        **options: Unpack[ReinforcementOptions],
    ) -> TrainingReport:
        """Train stored prefixes further on rewards of the texts they produce.

        Each step samples texts for some requests under all of their parts together, and makes
        those with a higher reward more likely. So parts that were trained apart learn to work
        together, and what can be checked but not shown by examples can be learned. Prefixes
        must be stored: train them on examples first.

        Args:
            requests: What to sample for, in any form: `Request`s, dicts, a file (see
                `controlprefix.data.as_requests`). Their `max_new_tokens` and `stop` apply;
                sampling has temperature 1.
            reward: A function of requests and texts that gives a number per text: one of
                `controlprefix.evaluation.rewards`, or your own.
            demonstrations: Examples that name the same prefixes; their likelihood is part of
                the objective, which preserves length and diversity.
            columns: Which columns of the rows hold what, if they have other names.
            task: Task of rows that name none.
            learn: As in `train`; what it leaves out is attached and not changed.
            **options: Fields of `PolicySettings`, of `TrainingSettings` and of `RunControl`.
                By default `steps` is 40 unless `epochs` are given, `learning_rate` .01 and
                `parameterization` `direct`; the last step is kept.

        Returns:
            As `train`; its `metrics` have each step's mean `reward`, the divergence `kl` from
            the reference, the mean `length` in tokens, and the `diversity` of samples.

        Raises:
            UnknownNameError: If a prefix is not stored.
            TrainingDataError: If the reward gives no finite number per text, or an option is
                invalid.
            StoreError: If the store or the folder cannot be written.

        Reference:
            See `controlprefix.training.policy.PolicyObjective`.
        """
        defaults = {} if task is None else {"task": task}
        rows = self.with_default_labels(as_requests(requests, columns=columns, defaults=defaults))
        examples: list[Example] = []
        if demonstrations is not None:
            examples = self._rows(demonstrations, columns, task)
        control, fields = RunControl.split_off(options)
        policy, fields = PolicySettings.split_off(fields)
        by_default = {"learning_rate": 0.01, "parameterization": "direct"}
        if fields.get("epochs") is None:
            by_default["steps"] = 40
        settings = TrainingSettings.from_options({**by_default, "validation": 0.0, **fields})
        if settings.validation or settings.patience:
            raise TrainingDataError("nothing is held out here; leave validation and patience out")
        for option in ("contrast", "off_context"):
            if getattr(settings, option):
                raise TrainingDataError(f"{option} applies to train; leave it out")
        if settings.too_long != "refuse":
            raise TrainingDataError("too_long applies to train; leave it out")
        if not callable(reward):
            raise TrainingDataError(f"reward is {reward!r}; give a function of requests and texts")
        labels = self._ordinal_labels([*rows, *examples], learn)
        return self._trainer.reinforce(
            interpolated(rows, labels),
            interpolated(examples, labels),
            reward,
            settings,
            policy,
            learn=learn,
            control=control,
        )

    def keep_feedback(self, preferences: Rows) -> dict[str, int]:
        """Keep preferences of users in the store, to learn from later; nothing is trained.

        What a user made of a draft is a preference too: the draft is rejected, the text that the
        user wrote of it is chosen. `forget_user` removes a user's feedback.

        Args:
            preferences: Rows in any form that name a user each (see
                `controlprefix.data.as_preferences`). A user's newest 1,000 are kept.

        Returns:
            How many preferences of each of these users are kept now.

        Raises:
            TrainingDataError: If a row is no preference, or names no user.
            UnknownNameError, RequestError: If a name is invalid, the attribute space does not
                allow a label, or a prompt cannot be tokenized.
            StoreError: If the store cannot be written.
        """
        rows = as_preferences(preferences)
        self._check_feedback(self.with_default_labels(rows))  # fail before anything is kept
        by_user: dict[str, list[str]] = {}
        for number, row in enumerate(rows, 1):
            if row.user is None:
                raise TrainingDataError(
                    f"{row.place(number)} names no user; feedback is kept by user"
                )
            text = row.model_dump_json(exclude_unset=True)
            by_user.setdefault(user_name(row.user), []).append(text)
        return {user: self.store.keep_feedback(user, texts) for user, texts in by_user.items()}

    def _check_feedback(self, rows: Sequence[Preference]) -> None:
        """Check that rows can be learned from, if they fit the context."""
        check_trainable(rows)
        for row in interpolated(rows, self._ordinal_labels(rows, "user")):
            for part in row.named_parts:
                check_key(part.key)
            with contextlib.suppress(ContextLengthError):
                self._frozen.request_tokenizer.prompt_ids(row)

    def feedback(self, user: str) -> list[Preference]:
        """The kept preferences of a user, oldest first.

        Raises:
            StoreKeyError: If they cannot be decrypted.
        """
        return [Preference(**json.loads(text)) for text in self.store.feedback(user)]

    def train_preferences(
        self,
        preferences: Rows | None = None,
        *,
        columns: Columns | None = None,
        task: str | None = None,
        learn: Learnable | Sequence[Learnable] | None = None,
        num_slots: int | Mapping[Learnable, int] = 16,
        **options: Unpack[PreferenceOptions],
    ) -> TrainingReport:
        """Train prefixes on which of two completions was preferred, such as users' feedback.

        The same frozen model under the prefixes as they are, or without them, is the
        reference, so no second model is needed. Many users may learn in one run. A prefix that is
        stored is trained further; another one starts from random tokens of the texts.

        Args:
            preferences: Rows in any form: `Preference`s, dicts, a file (see
                `controlprefix.data.as_preferences`). Left out, all that `keep_feedback` kept.
            columns: Which columns of the rows hold what, if they have other names.
            task: Task of rows that name none.
            learn: Any of `task`, `attributes`, `user`; left out, the users if rows name any, or
                else the task and the attributes. What it leaves out is attached and not changed.
            num_slots: Slots of prefixes that are new.
            **options: Fields of `PreferenceSettings`, of `TrainingSettings` and of `RunControl`.
                `parameterization` is `direct` and `learning_rate` .01 by default.

        Returns:
            As `train`; its `metrics` have each step's `accuracy`, the share of its preferences
            of which the chosen text became likelier than the rejected one, compared with the
            reference, and the mean `margin` in nats.

        Raises:
            TrainingDataError: If the rows cannot be trained on, or an option is invalid.
            ContextLengthError: If a text does not fit the model's context.
            StoreError: If the store or the folder cannot be written.

        Reference:
            Rafailov et al., "Direct Preference Optimization", 2023,
            https://arxiv.org/abs/2305.18290, plus a weighted likelihood of the chosen text.
        """
        defaults = {} if task is None else {"task": task}
        removal_number = self.store.last_removal_number()
        if preferences is None:
            users = self.store.users_with_feedback()
            preferences = [row for user in users for row in self.feedback(user)]
            if not preferences:
                raise TrainingDataError("no feedback is kept in the store; give preferences")

        def read(rows: Rows) -> list[Preference]:
            parsed = as_preferences(rows, columns=columns, defaults=defaults)
            return self.with_default_labels(parsed)

        preferences = read(preferences)
        if learn is None and any(row.user is not None for row in preferences):
            learn = "user"
        rows, held_out, fields = self._training_rows(preferences, options, learn, read)
        control, fields = RunControl.split_off(fields)
        own_settings, fields = PreferenceSettings.split_off(fields)
        by_default = {"learning_rate": 0.01, "parameterization": "direct"}
        settings = TrainingSettings.from_options({**by_default, **fields})
        if settings.contrast:
            raise TrainingDataError("contrast compares labels, not preferences; leave it out")
        if settings.off_context:
            raise TrainingDataError("off_context applies to train; leave it out")
        return self._trainer.train_preferences(
            rows,
            settings,
            own_settings,
            learn=learn,
            num_slots=num_slots,
            num_slots_of=self._num_slots_of,
            validation=held_out,
            removal_number=removal_number,
            control=control,
        )
