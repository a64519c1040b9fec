"""ControlPrefix: one frozen model, a store of prefixes, and everything to do with them."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, Unpack

from torch import nn

from controlprefix.attributes import AttributeSpace
from controlprefix.engine.on_demand import OnDemandMethods
from controlprefix.engine.users import UserMethods
from controlprefix.model import FrozenModel, LoadOptions
from controlprefix.store import EncryptionKeys, PrefixStore


class ControlPrefix(OnDemandMethods, UserMethods):
    """A frozen model and the prefixes that one tenant has stored for it.

    Make one with `from_pretrained`. The methods are defined in the modules of this package.

    Args:
        frozen: The model.
        store: The tenant's store.
        attributes: Which attributes and labels exist.

    Attributes:
        store: As given.
        distill_timeout_s: Approximate time limit of `unseen="distill"` per label, in seconds (60).
    """

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str] | nn.Module = "smollm2",
        *,
        store: str | os.PathLike[str] = "prefixes.db",
        tenant: str = "default",
        encryption_keys: EncryptionKeys | None = None,
        attributes: AttributeSpace | str | Path | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        processor: Any = None,
        **options: Unpack[LoadOptions],
    ) -> Self:
        """Load and freeze a model, and open the store of its prefixes.

        Args:
            model: `"smollm2"` (the model that pip installs), a folder, a hub id, or a
                loaded transformers model, which is frozen in place.
            store: Path of an SQLite file, or an SQLAlchemy URL; `"sqlite://"` keeps everything in
                memory.
            tenant: The tenant whose prefixes are used.
            encryption_keys: Keys to encrypt stored prefixes with, such as
                `controlprefix.store.JsonEncryptionKeys`.
            attributes: An attribute space, or an attribute file (see
                `controlprefix.attributes.space`): labels that are not in it are refused,
                requests get its default labels, and training uses its numbers of slots.
            chat_template_kwargs: Variables for the chat template in every prompt, such as
                `{"enable_thinking": False}`; those of a request come on top.
            processor: Reads images, for models that do; left out, the one stored with the model.
            **options: `tokenizer`, needed for a loaded model whose tokenizer cannot be found by its
                name; `dtype`, `device`, `revision`, `trust_remote_code` and `quantization`: see
                `controlprefix.model.loading.load`.

        Raises:
            UnsupportedModelError: If the model's attention cannot take slots.
            StoreError: If the store cannot be opened.
            AttributeSpaceError: If the attribute file is not valid.
            ControlPrefixError: If nothing can be loaded under that name.
        """
        if isinstance(attributes, (str, Path)):
            attributes = AttributeSpace.read(attributes)
        opened = PrefixStore(store, tenant=tenant, encryption_keys=encryption_keys)
        frozen = FrozenModel.from_pretrained(
            model,
            chat_template_kwargs=chat_template_kwargs,
            processor=processor,
            **options,
        )
        return cls(frozen, opened, attributes)
