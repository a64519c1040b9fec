"""Personalizer: texts of users in, their stored prefixes out, for one model and one store."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from controlprefix.embeddings import embeddings
from controlprefix.errors import TrainingDataError
from controlprefix.model.steering import Steering
from controlprefix.model.text_prefix import prefix_from_tokens
from controlprefix.model.tokenization import RequestEncoder
from controlprefix.prefixes.prefix import Prefix
from controlprefix.prefixes.user_code import CodedPrefix, PrefixDecoder
from controlprefix.store import NewVersion, PrefixKey, PrefixStore, Similar
from controlprefix.training.initialization import typical_scale
from controlprefix.training.parameterization import LearnedSlots
from controlprefix.training.run import TrainingReport
from controlprefix.training.settings import TrainingSettings
from controlprefix.users.decoder_training import CODE_RATE, DecoderReport, learn_decoder
from controlprefix.users.multi_user import Begin, UsersReport, train_users, usable_texts
from controlprefix.users.privacy_audit import Auditor, LeakReport
from controlprefix.users.text_features import TextFeatures
from controlprefix.users.user_codes import LearnedCodes

_USUAL = {"parameterization": "direct", "batch_size": 4, "patience": 2}
# A start that many users shaped is near: small steps. Measured on blogs (docs/decisions.md).
_RATE_FROM_DECODER = 1e-2


class Personalizer:
    """Learns users' prefixes for one frozen model, and keeps them in one store."""

    def __init__(self, model: PreTrainedModel, encoder: RequestEncoder, store: PrefixStore) -> None:
        self._model = model
        self._encoder = encoder
        self._store = store
        self._fingerprint = Steering.of(model).geometry.fingerprint

    def decoder(self, name: str) -> PrefixDecoder:
        """A stored decoder, on the model's device."""
        return self._store.decoder(name, self._fingerprint).to(self._model.device)

    def learn_decoder(
        self,
        users: Mapping[str, Sequence[str]],
        name: str,
        *,
        num_slots: int,
        width: int,
        embedder: str,
        folder: str | Path | None,
        resume: bool,
        progress: bool,
        settings: Mapping[str, Any],
    ) -> DecoderReport:
        """Learn a decoder, and store it with the codes of those it was learned from."""
        key = PrefixKey("decoder", name)
        self._store.require_writable([key])
        chosen = TrainingSettings.of({"batch_size": 16, **settings})
        decoder, codes, report = learn_decoder(
            self._model,
            self._encoder,
            users,
            chosen,
            num_slots=num_slots,
            width=width,
            features=TextFeatures(embedder),
            folder=None if folder is None else Path(folder),
            resume=resume,
            progress=progress,
        )
        details = {
            "decoder": {
                "users": report.num_users,
                "told": round(report.told, 4),
                "best_loss": round(report.training.best_loss, 4),
                **chosen.as_dict(),
            }
        }
        (version,) = self._store.put([NewVersion(key, decoder, details, sources=tuple(codes))])
        return replace(report, version=version)

    def train_users(
        self,
        texts: Mapping[str, Sequence[str]] | Iterable[tuple[str, Sequence[str]]],
        *,
        num_slots: int,
        decoder: str | None,
        as_codes: bool,
        together: int,
        folder: str | Path | None,
        resume: bool,
        progress: bool,
        settings: Mapping[str, Any],
    ) -> UsersReport:
        """Learn each user's prefix from texts they wrote, and store it when it is done."""
        usual: dict[str, Any] = dict(_USUAL)
        if decoder is not None:
            usual["learning_rate"] = CODE_RATE if as_codes else _RATE_FROM_DECODER
        chosen = TrainingSettings.of({**usual, **settings})
        self._store.require_writable(())

        def publish(user: str, prefix: Prefix, report: TrainingReport) -> int:
            details = {
                "training": {
                    "best_step": report.best_step,
                    "best_loss": round(report.best_loss, 4),
                    "decoder": decoder,
                    **chosen.as_dict(),
                }
            }
            return self._put(user, prefix, details)

        return train_users(
            self._model,
            self._encoder,
            texts.items() if isinstance(texts, Mapping) else texts,
            publish,
            chosen,
            begin=self._begin(chosen, decoder, as_codes, num_slots),
            together=together,
            folder=None if folder is None else Path(folder),
            resume=resume,
            progress=progress,
        )

    def enroll(self, user: str, texts: Sequence[str], decoder: str | None, num_slots: int) -> int:
        """Store a prefix made of texts without training; gives the version."""
        written = usable_texts(user, texts)
        details = {"enrolled": {"texts": len(written), "decoder": decoder}}
        return self._put(user, self._enrolled(written, decoder, num_slots), details)

    def _enrolled(self, texts: Sequence[str], decoder: str | None, num_slots: int) -> Prefix:
        if decoder is not None:
            return self.guess(self.decoder(decoder), texts)
        ids = self._encoder.text_ids("\n\n".join(texts))[:num_slots]
        return prefix_from_tokens(self._model, ids)

    def keep_profile(self, user: str, texts: Sequence[str], embedder: str) -> None:
        """Store what a user's texts are like."""
        name, numbers = _profile(user, texts, embedder)
        self._store.keep_profile(user, name, numbers, num_texts=len(texts))

    def similar_users(self, texts: Sequence[str], embedder: str, most: int) -> list[Similar]:
        """Who of those with a profile writes most like that."""
        name, numbers = _profile("", texts, embedder)
        return self._store.similar_users(name, numbers, most=most)

    def guess(self, decoder: PrefixDecoder, texts: Sequence[str]) -> CodedPrefix:
        """The prefix that a decoder expects of a user who writes such texts."""
        if not decoder.generator.tells:
            return decoder.decode(decoder.common)
        return decoder.decode(decoder.guess(TextFeatures.named(decoder.embedder).of(texts)))

    def audit(
        self,
        user: str,
        texts: Sequence[str],
        held_out: Sequence[str],
        *,
        canaries: int,
        seed: int,
    ) -> LeakReport:
        """What the current prefix of a user gives away."""
        key = PrefixKey("user", user)
        prefix = self._store.get(key, self._fingerprint).prefix.to(device=self._model.device)
        (current,) = (v for v in self._store.versions(key, self._fingerprint) if v.current)
        alone = "learned" not in current.details.get("training", {"learned": ()})
        if canaries and not alone and "enrolled" not in current.details:
            raise TrainingDataError(
                f"{key} version {current.version} was not made by train_users or enroll, so it "
                "cannot be made again with canaries among its texts; leave them out"
            )

        def learn(planted: list[str]) -> Prefix:
            return self._made_again(key, planted, current.details, prefix)

        return Auditor(self._model, self._encoder).report(
            prefix,
            usable_texts(user, texts),
            usable_texts(user, held_out),
            canaries=canaries,
            learn=learn,
            seed=seed,
        )

    def _made_again(
        self, key: PrefixKey, texts: list[str], details: Mapping[str, Any], like: Prefix
    ) -> Prefix:
        """A prefix of texts, made as another was, and not stored."""
        if "enrolled" in details:
            return self._enrolled(texts, details["enrolled"]["decoder"], like.num_slots)
        settings = dict(details["training"])
        decoder = settings.pop("decoder", None)
        known = {field.name for field in fields(TrainingSettings)}
        chosen = TrainingSettings.of({k: v for k, v in settings.items() if k in known})
        made: dict[str, Prefix] = {}

        def keep(user: str, prefix: Prefix, _: TrainingReport) -> int:
            made[user] = prefix.to(dtype=self._model.dtype)
            return 0

        begin = self._begin(chosen, decoder, isinstance(like, CodedPrefix), like.num_slots)
        report = train_users(
            self._model,
            self._encoder,
            [(key.name, texts)],
            keep,
            chosen,
            begin=begin,
            together=1,
            folder=None,
            resume=False,
            progress=False,
        )
        for reason in report.failed.values():
            raise TrainingDataError(reason)
        return made[key.name]

    def _put(self, user: str, prefix: Prefix, details: Mapping[str, Any]) -> int:
        key = PrefixKey("user", user)
        new = NewVersion(key, prefix.to(dtype=self._model.dtype), details)
        return self._store.put([new])[0]

    def _begin(
        self, settings: TrainingSettings, decoder: str | None, as_codes: bool, num_slots: int
    ) -> Begin:
        if decoder is None:
            return self._from_texts(settings, num_slots)
        return self._from_decoder(settings, decoder, as_codes)

    def _from_texts(self, settings: TrainingSettings, num_slots: int) -> Begin:
        def begin(key: PrefixKey, written: list[str]) -> LearnedSlots:
            ids = self._encoder.text_ids("\n".join(written[:num_slots]))
            start = prefix_from_tokens(self._model, ids, num_slots=num_slots)
            return settings.parameterized({key: start}, typical_scale(self._model, ids))

        return begin

    def _from_decoder(self, settings: TrainingSettings, name: str, as_codes: bool) -> Begin:
        decoder = self.decoder(name)

        def begin(key: PrefixKey, written: list[str]) -> LearnedSlots:
            guess = self.guess(decoder, written)
            if as_codes:
                return LearnedCodes(decoder, {key: guess.code.numbers})
            start = Prefix(guess.geometry, guess.slots)
            return settings.parameterized({key: start}, decoder.scales)

        return begin


def _profile(user: str, texts: Sequence[str], embedder: str) -> tuple[str, list[float]]:
    """The mean of the texts' embeddings, and what it is called."""
    embedded = embeddings(usable_texts(user, texts), embedder)
    return embedder, embedded.mean(0).tolist()
