"""The methods of `ControlPrefix` that read and write stored prefixes."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from controlprefix.engine.arguments import checks_method_arguments
from controlprefix.engine.components import Components
from controlprefix.errors import RequestError
from controlprefix.inference.relevance import LearnedRelevance, learn_relevance
from controlprefix.model.condensed_text import prefix_from_text
from controlprefix.prefixes import Kind, Prefix, PrefixKey, StorageDtype
from controlprefix.store import NewVersion, VersionInfo, VersionRef


@checks_method_arguments
class PrefixMethods(Components):
    """Names -> stored prefixes and their versions."""

    def prefix_from_text(self, text: str, *, max_slots: int | None = None) -> Prefix:
        """A text as a prefix: its keys and values, computed just before position 0.

        On a rotary model, attending to it equals prompting with the text, as long as both fit
        a layer's sliding window. Elsewhere (absolute positions, encoder-decoder, recurrent
        layers) it is a good initialization for training. `is_exact` of the result says which.

        Args:
            text: Any text; without `max_slots`, each token is a slot.
            max_slots: Slots at most. A longer text, however long, becomes slots that stand for all
                of it (see `controlprefix.model.attention_matching`).

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
            RequestError: If it is no prefix.
            GeometryMismatchError: If it was made for another model.
            PrefixFormatError: If it holds NaN or infinite values.
            VersionConflictError: If `replaces` is not the current version.
            StoreError: If the store cannot be written.
        """
        key = PrefixKey(kind, name)
        if not isinstance(prefix, Prefix):
            raise RequestError(
                f"a {type(prefix).__name__} cannot be stored as {key}; give a Prefix"
            )
        self.geometry.require(prefix.geometry, f"the prefix for {key}")
        prefix.to(dtype=self._frozen.dtype).require_finite(f"the prefix for {key}")
        details = {**(details or {})}
        if prefix.dial:
            details.setdefault("calibrated", {})
        else:  # the dial of another prefix
            details.pop("calibrated", None)
        return self.store.put([NewVersion(key, prefix, details, replaces, dtype)])[0]

    def learn_relevance(
        self, kind: Kind, name: str, prompts: Sequence[str], *, others: Sequence[str] = ()
    ) -> LearnedRelevance:
        """Learn which prompts a stored prefix is meant for, and store it with that knowledge.

        Requests with `when="relevant"` then use the prefix only for prompts that are, by sentence
        embedding, as near to the prefix's own as those are to each other, and nearer to them than
        to other prompts. The embeddings of up to 128 of its prompts are stored with it.

        Args:
            kind, name: A stored prefix, of a task, a label or a user (no user code).
            prompts: At least 8 different prompts that it is for, such as those it was trained on.
            others: Prompts that it is not for, such as those of another task.

        Returns:
            The share of held-out prompts that is accepted, and the new version.

        Raises:
            UnknownNameError: If there is no such name for this model.
            TrainingDataError: If there are too few prompts.
            RequestError: If it is stored as a code.
            MissingDependencyError: If sentence-transformers is not installed.
            VersionConflictError: If another version was published meanwhile.
            ForgottenError: If the user was forgotten meanwhile.
        """
        key = PrefixKey(kind, name)
        removal_number = self.store.last_removal_number()
        current = self.version_info(kind, name)
        if not isinstance(self._model_store.get(key, version=current.version).value, Prefix):
            raise RequestError(f"{key} is a code, which has no room for prompts; give a prefix")
        prefix = self.get(kind, name, version=current.version)
        relevance, accepted = learn_relevance(prompts, others)
        learned = {"num_prompts": len(set(prompts)), "accepted": accepted}
        new = NewVersion(
            key,
            replace(prefix, relevance=relevance),
            {**current.details, "relevance": learned},
            current.version,
            current.storage_dtype,
            derived_from=VersionRef(self._frozen.fingerprint, current.version),
        )
        (version,) = self.store.put([new], removal_number=removal_number)
        return LearnedRelevance(accepted, version)

    def get(self, kind: Kind, name: str, *, version: int | str | None = None) -> Prefix:
        """Read a stored prefix; the code of a user is decoded.

        Args:
            kind, name: What it is for.
            version: A version's number or alias; left out, the current one.

        Raises:
            UnknownNameError: If there is no such name or version for this model.
            PrefixFormatError: If the stored bytes are damaged.
        """
        prefix = self._resolver.get(PrefixKey(kind, name), version=version)
        return replace(prefix, geometry=self.geometry)

    def names(self, kind: Kind, *, after: str = "", limit: int | None = None) -> list[str]:
        """The tasks, labels (`formality=formal`) or users with a prefix for this model, sorted.

        Args:
            kind: Which of them.
            after: Only names that come after this one.
            limit: Maximum number of names.

        Raises:
            RequestError: If the limit is below 0.
        """
        if limit is not None and limit < 0:
            raise RequestError(f"limit is {limit}; it must be 0 or more")
        return self._model_store.names(kind, after=after, limit=limit)

    def exists(self, kind: Kind, name: str) -> bool:
        """Whether a name has a prefix for this model."""
        return self._model_store.exists(PrefixKey(kind, name))

    def versions(self, kind: Kind, name: str) -> list[VersionInfo]:
        """All versions of a name, oldest first.

        Raises:
            UnknownNameError: If there is no such name for this model.
        """
        return self._model_store.versions(PrefixKey(kind, name))

    def version_info(
        self, kind: Kind, name: str, *, version: int | str | None = None
    ) -> VersionInfo:
        """What is stored of one version beside its slots.

        Args:
            kind, name: What the version is for.
            version: A version's number or alias; left out, the current one.

        Raises:
            UnknownNameError: If there is no such name or version for this model.
        """
        return self._model_store.version_info(PrefixKey(kind, name), version=version)

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

        For a user, all that is stored is removed: kept texts, feedback, jobs and profile too.

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
