"""What all methods of `ControlPrefix` share: the model, the store, and the workers."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from controlprefix.attributes import AttributeSpace
from controlprefix.inference.generator import Generator
from controlprefix.inference.resolver import PrefixCaches, Resolver
from controlprefix.model import FrozenModel
from controlprefix.prefixes import Geometry
from controlprefix.store import PrefixStore
from controlprefix.training import FeedbackTrainer
from controlprefix.users import UserAuditor, UserTrainer


class Components:
    """A frozen model, a tenant's store, and the objects that resolve, generate and train.

    Args:
        frozen: The model.
        store: The tenant's store.
        attributes: Which attributes and labels exist.
        caches: What is kept in memory, if other tenants share it.

    Attributes:
        store: As given.
    """

    def __init__(
        self,
        frozen: FrozenModel,
        store: PrefixStore,
        attributes: AttributeSpace | None = None,
        *,
        caches: PrefixCaches | None = None,
    ) -> None:
        self.store = store
        self._frozen = frozen
        self._model_store = store.for_model(frozen.fingerprint)
        self._generator = Generator(frozen)
        self._use_resolver(Resolver(frozen, store, attributes, caches=caches))

    def _use_resolver(self, resolver: Resolver) -> None:
        self._resolver = resolver
        self._trainer = FeedbackTrainer(self._frozen, self.store, resolver)
        self._user_trainer = UserTrainer(self._frozen, self.store, resolver)
        decoder = self._user_trainer.optional_decoder
        self._user_auditor = UserAuditor(self._frozen, self.store, resolver, decoder)

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
