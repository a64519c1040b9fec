"""FeedbackTrainer: trains prefixes on rewards and on preferences, and stores them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from controlprefix.errors import ContextLengthError, TrainingDataError
from controlprefix.example import Example, Preference
from controlprefix.prefixes import PrefixKey
from controlprefix.request import Request
from controlprefix.training.context_fit import cut_completion_ids, fit_to_context
from controlprefix.training.control import RunControl
from controlprefix.training.initialization import scale_of
from controlprefix.training.objectives import Objective, Rejected, TrainingRow
from controlprefix.training.policy import PolicyObjective, Reward
from controlprefix.training.preferences import with_margins
from controlprefix.training.preparation import Learnable, Preparation, prepare
from controlprefix.training.report import TrainingReport
from controlprefix.training.request_preparation import prepare_requests
from controlprefix.training.settings import (
    PolicySettings,
    PreferenceSettings,
    TooLong,
    TrainingSettings,
)
from controlprefix.training.trainer import Trainer


class FeedbackTrainer(Trainer):
    """A `Trainer` that also learns from what is said of texts."""

    def reinforce(
        self,
        requests: Sequence[Request],
        demonstrations: Sequence[Example],
        reward: Reward,
        settings: TrainingSettings,
        policy: PolicySettings,
        *,
        learn: Learnable | Sequence[Learnable] | None,
        control: RunControl,
    ) -> TrainingReport:
        """Train on rewards of sampled texts: see `ControlPrefix.reinforce`.

        Args:
            requests, demonstrations: With default labels.
            reward: Scores sampled texts.
            settings, policy: Hyperparameters.
            learn: As in `ControlPrefix.reinforce`.
            control: Run folder, progress, tracker and callbacks.
        """
        if policy.demonstrated and (self._frozen.is_encoder_decoder or not demonstrations):
            raise TrainingDataError(
                "demonstrated continues demonstrations, which needs demonstrations= and a model "
                "without an encoder; leave it out"
            )
        prepared = prepare_requests(
            requests, demonstrations, self._frozen, self._resolver, learn=learn
        )
        objective = PolicyObjective(
            self._frozen, policy, reward, prepared.initial, prepared.demonstrations
        )
        preparation = Preparation(
            rows=prepared.rows,
            held_out=[],
            initial=prepared.initial,
            scale=scale_of(*prepared.initial.values()),
            left_out=(),
            num_cut=0,
            num_skipped=0,
            users=prepared.users,
            removal_number=prepared.removal_number,
            initial_versions=prepared.initial_versions,
        )
        return self._train_and_publish(preparation, settings, control, objective)

    def train_preferences(
        self,
        preferences: Sequence[Preference],
        settings: TrainingSettings,
        own_settings: PreferenceSettings,
        *,
        learn: Learnable | Sequence[Learnable] | None,
        num_slots: int | Mapping[Learnable, int],
        num_slots_of: Callable[[PrefixKey], int | None],
        validation: Sequence[Preference],
        removal_number: int,
        control: RunControl,
    ) -> TrainingReport:
        """Train on preferences: see `ControlPrefix.train_preferences`.

        Args:
            preferences: With default labels.
            settings, own_settings: Hyperparameters.
            learn, num_slots: As in `ControlPrefix.train_preferences`.
            num_slots_of: Slots of one prefix, where that differs from `num_slots`.
            validation: Held-out preferences; if there are none, the settings hold some out.
            removal_number: As in `prepare`.
            control: Run folder, progress, tracker and callbacks.
        """
        tokenizer = self._frozen.request_tokenizer
        pairs, num_skipped = self._pairs(preferences, settings.too_long)
        held_out_pairs, num_held_out_skipped = self._pairs(validation, settings.too_long)
        rejected = {id(chosen): other for chosen, other in (*pairs, *held_out_pairs)}

        def with_rejected(example: Example, row: TrainingRow) -> TrainingRow:
            try:
                ids = tokenizer.example_ids(rejected[id(example)])
            except ContextLengthError:  # it is to be cut
                ids = cut_completion_ids(rejected[id(example)], row.prompt, tokenizer)
            other = TrainingRow.from_example(ids, tokenizer.end_id, (), ())
            return row._replace(rejected=Rejected(other.targets, 0.0))

        preparation = prepare(
            [chosen for chosen, _ in pairs],
            self._frozen,
            self._resolver,
            settings,
            learn=learn,
            num_slots=num_slots,
            init="stored or tokens",
            num_slots_of=num_slots_of,
            validation=[chosen for chosen, _ in held_out_pairs],
            complete=with_rejected,
            removal_number=removal_number,
        )
        is_start = own_settings.reference == "start"
        reference = preparation.initial if is_start else {}
        preparation = replace(
            preparation,
            rows=with_margins(self._frozen, preparation.rows, reference),
            held_out=with_margins(self._frozen, preparation.held_out, reference),
            num_skipped=preparation.num_skipped + num_skipped + num_held_out_skipped,
        )
        objective = Objective(
            self._frozen,
            beta=own_settings.beta,
            likelihood_weight=own_settings.likelihood_weight,
            reference=own_settings.reference,
        )
        return self._train_and_publish(preparation, settings, control, objective)

    def _pairs(
        self, preferences: Sequence[Preference], too_long: TooLong
    ) -> tuple[list[tuple[Example, Example]], int]:
        """Chosen and rejected examples, and how many preferences were skipped for the latter."""
        pairs = [preference.examples() for preference in preferences]
        if too_long == "cut" or not pairs:
            return pairs, 0
        others = [other for _, other in pairs]
        fitted = fit_to_context(others, self._frozen.request_tokenizer, too_long)
        fitting = set(map(id, fitted.examples))
        return [pair for pair in pairs if id(pair[1]) in fitting], fitted.num_skipped
