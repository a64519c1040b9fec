"""UserAuditor: what a stored prefix of a user gives away of the texts it was made of."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from controlprefix.errors import RequestError, TrainingDataError
from controlprefix.inference.resolver import Resolver
from controlprefix.model import FrozenModel
from controlprefix.prefixes import Prefix, PrefixDecoder, PrefixKey, UserCode
from controlprefix.store import PrefixStore, StoredVersion
from controlprefix.training.control import RunControl
from controlprefix.training.report import TrainingReport
from controlprefix.training.settings import TrainingSettings
from controlprefix.users.guard import enrolled_value
from controlprefix.users.initialization import initializer
from controlprefix.users.privacy_audit import PrivacyAuditor, PrivacyReport
from controlprefix.users.user_training import (
    MAX_TEXTS,
    sampled_texts,
    train_users,
    usable_texts,
)


class UserAuditor:
    """Audits stored prefixes and codes of users.

    Args:
        frozen: The model.
        store: Where they are.
        resolver: Decodes user codes.
        decoder: Name -> a stored decoder; None for None.
    """

    def __init__(
        self,
        frozen: FrozenModel,
        store: PrefixStore,
        resolver: Resolver,
        decoder: Callable[[str | None], PrefixDecoder | None],
    ) -> None:
        self._frozen = frozen
        self._resolver = resolver
        self._model_store = store.for_model(frozen.fingerprint)
        self._decoder = decoder

    def audit(
        self,
        user: str,
        texts: Sequence[str],
        held_out: Sequence[str],
        *,
        num_canaries: int,
        seed: int,
    ) -> PrivacyReport:
        """Audit a user's current prefix: see `ControlPrefix.audit_user`."""
        key = PrefixKey("user", user)
        current = self._model_store.version_info(key)
        stored = self._model_store.get(key, version=current.version)
        details = current.details
        training = details.get("training", {})
        trained_alone = bool(training) and not {"learned", "loop"} & training.keys()
        if num_canaries and "vector" in details.get("enrolled", {}):
            raise RequestError(
                f"{key} was enrolled from a vector, so there are no texts to plant canaries among; "
                "leave them out"
            )
        if num_canaries and not trained_alone and "enrolled" not in details:
            raise TrainingDataError(
                f"{key} version {current.version} was not made by train_users or enroll, so it "
                "cannot be made again with canaries among its texts; leave them out"
            )

        def decoded(version: StoredVersion) -> Prefix:
            prefix = self._resolver.decoded(key, version)
            return prefix.to(device=self._frozen.device, dtype=self._frozen.dtype)

        prefix = decoded(stored)

        own_texts = usable_texts(user, texts)
        if trained_alone:  # those that it was trained on
            own_texts = sampled_texts(own_texts, int(training.get("seed", 0)))
            own_texts = own_texts[: MAX_TEXTS - num_canaries] if num_canaries else own_texts

        def retrain(planted: list[str]) -> Prefix:
            value = self._make_again(key, planted, details, stored.value, prefix.num_slots)
            return decoded(stored._replace(value=value))

        return PrivacyAuditor(self._frozen).audit(
            prefix,
            own_texts,
            usable_texts(user, held_out),
            num_canaries=num_canaries,
            retrain=retrain,
            seed=seed,
        )

    def _make_again(
        self,
        key: PrefixKey,
        texts: list[str],
        details: Mapping[str, Any],
        stored: Any,
        num_slots: int,
    ) -> Prefix | UserCode:
        """A prefix or code of texts, made as a stored one was, and not stored."""
        if "enrolled" in details:
            enrolled = details["enrolled"]
            return enrolled_value(
                self._frozen,
                texts,
                self._decoder_of(stored, enrolled["decoder"]),
                # Not those it has: of texts with fewer tokens, more would have had a slot each.
                num_slots=enrolled.get("num_slots", num_slots),
                guard="share" in enrolled,
            )[0]
        options = dict(details["training"])
        decoder = options.pop("decoder", None)
        names = {field.name for field in fields(TrainingSettings)}
        # Nothing is held out, so that all that was planted is learned.
        learned = {k: v for k, v in options.items() if k in names - {"patience"}}
        settings = TrainingSettings.from_options({**learned, "validation": 0.0})
        values: dict[str, Prefix | UserCode] = {}

        def collect(user: str, value: Prefix | UserCode, _: TrainingReport) -> int:
            values[user] = value
            return 0

        report = train_users(
            self._frozen,
            [(key.name, texts)],
            collect,
            settings,
            initialize=initializer(
                self._frozen,
                settings,
                decoder=self._decoder_of(stored, decoder),
                as_codes=isinstance(stored, UserCode),
                num_slots=num_slots,
            ),
            concurrent_users=1,
            control=RunControl(progress=False),
        )
        for reason in report.failed.values():
            raise TrainingDataError(reason)
        return values[key.name]

    def _decoder_of(self, stored: Any, name: str | None) -> PrefixDecoder | None:
        """The decoder that made a code, which may have a newer version; else the current one."""
        if isinstance(stored, UserCode):
            own = self._model_store.decoder_by_hash(stored.decoder_hash)
            if own is not None:
                return own.to(device=self._frozen.device)
        return self._decoder(name)
