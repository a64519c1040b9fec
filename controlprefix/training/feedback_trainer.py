"""FeedbackTrainer: trains prefixes on rewards and on preferences, and stores them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from controlprefix.errors import TrainingDataError
from controlprefix.example import Example, Preference
from controlprefix.prefixes import PrefixKey
from controlprefix.request import Request
from controlprefix.training.control import RunControl
from controlprefix.training.initialization import scale_of_all
from controlprefix.training.objectives import Objective, Rejected, TrainingRow
from controlprefix.training.policy import PolicyObjective, Reward
from controlprefix.training.preferences import with_margins
from controlprefix.training.preparation import Learnable, Preparation, prepare, prepare_requests
from controlprefix.training.report import TrainingReport
from controlprefix.training.settings import PolicySettings, PreferenceSettings, TrainingSettings
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
            learn: As there.
            control: Where the run is recorded, and who watches it.
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
            scale=scale_of_all(prepared.initial.values()),
            left_out=(),
            num_cut=0,
            num_skipped=0,
            users=prepared.users,
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
        control: RunControl,
    ) -> TrainingReport:
        """Train on preferences: see `ControlPrefix.train_preferences`.

        Args:
            preferences: With default labels.
            settings, own_settings: Hyperparameters.
            learn, num_slots: As there.
            num_slots_of: Slots of one prefix, where that differs from `num_slots`.
            control: Where the run is recorded, and who watches it.
        """
        pairs = [preference.examples() for preference in preferences]
        rejected = {id(chosen): other for chosen, other in pairs}
        tokenizer = self._frozen.request_tokenizer

        def with_rejected(example: Example, row: TrainingRow) -> TrainingRow:
            ids = tokenizer.example_ids(rejected[id(example)])
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
            complete=with_rejected,
        )
        is_start = own_settings.reference == "start"
        reference = preparation.initial if is_start else {}
        preparation = replace(
            preparation,
            rows=with_margins(self._frozen, preparation.rows, reference),
            held_out=with_margins(self._frozen, preparation.held_out, reference),
        )
        objective = Objective(
            self._frozen,
            beta=own_settings.beta,
            likelihood_weight=own_settings.likelihood_weight,
        )
        return self._train_and_publish(preparation, settings, control, objective)
