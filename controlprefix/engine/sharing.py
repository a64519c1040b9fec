"""The methods of `ControlPrefix` that share prefixes: folders, the Hub, PEFT checkpoints."""

import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from controlprefix.engine.arguments import checks_method_arguments
from controlprefix.engine.prefixes import PrefixMethods
from controlprefix.errors import (
    GeometryMismatchError,
    RequestError,
    StoreError,
    UnsupportedModelError,
)
from controlprefix.model.text_prefix import prefix_before_text
from controlprefix.prefixes import Kind, Prefix, PrefixKey
from controlprefix.prefixes.folder import (
    INFO_FILE,
    PREFIX_FILE,
    SharedPrefix,
    load_folder,
    save_folder,
)
from controlprefix.prefixes.original_files import read_original
from controlprefix.prefixes.peft_files import read_checkpoint
from controlprefix.request import Request
from controlprefix.store import NewVersion

_log = logging.getLogger("controlprefix")


@checks_method_arguments
class SharingMethods(PrefixMethods):
    """Folders, the Hub and checkpoints of other libraries <-> prefixes."""

    def export(
        self, kind: Kind, name: str, folder: str | Path, *, version: int | str | None = None
    ) -> None:
        """Write a stored prefix to a folder, with a card that says what it is.

        Args:
            kind, name: What it is for.
            folder: Created if it does not exist; `controlprefix.prefixes.folder` reads it.
            version: A version's number or alias; left out, the current one.

        Raises:
            UnknownNameError: If there is no such name or version.
            StoreError: If the folder cannot be written.
        """
        save_folder(self._shared(kind, name, version), folder)

    def push_to_hub(
        self,
        kind: Kind,
        name: str,
        repo_id: str,
        *,
        version: int | str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
    ) -> str:
        """Upload a stored prefix with its card to the Hugging Face Hub.

        Args:
            kind, name, version: As in `export`.
            repo_id: Such as `me/formal-emails`; created if it does not exist.
            private: Whether a new repository is private.
            token: Access token, or False for none; left out, the one you are logged in with.

        Returns:
            URL of the commit.

        Raises:
            UnknownNameError: If there is no such name or version.
            StoreError: If the Hub refuses, or cannot be reached.
        """
        import huggingface_hub

        with tempfile.TemporaryDirectory() as folder:
            self.export(kind, name, folder, version=version)
            try:
                api = huggingface_hub.HfApi(token=token)
                api.create_repo(repo_id, private=private, exist_ok=True)
                commit = api.upload_folder(
                    repo_id=repo_id,
                    folder_path=folder,
                    commit_message=f"Add {PrefixKey(kind, name)}",
                )
            except Exception as error:  # the Hub's own, and those of its HTTP library
                raise StoreError(f"cannot upload to {repo_id!r}: {error}") from error
        return str(commit.commit_url)

    def pull_from_hub(
        self, repo_id: str, *, revision: str | None = None, token: str | bool | None = None
    ) -> tuple[PrefixKey, int]:
        """Download a prefix from the Hugging Face Hub, and store it under its name.

        Args:
            repo_id: A repository that `push_to_hub` wrote.
            revision: Branch, tag or commit.
            token: Access token, or False for none; left out, the one you are logged in with.

        Returns:
            Its key and the number of the new version.

        Raises:
            GeometryMismatchError: If it was made for another model.
            PrefixFormatError: If the repository holds no prefix.
            StoreError: If the Hub cannot be reached, or the store cannot be written.
        """
        import huggingface_hub

        try:
            folder = huggingface_hub.snapshot_download(
                repo_id, revision=revision, token=token, allow_patterns=[PREFIX_FILE, INFO_FILE]
            )
        except Exception as error:  # the Hub's own, and those of its HTTP library
            raise StoreError(f"cannot download {repo_id!r}: {error}") from error
        key, prefix, details = load_folder(folder)
        return key, self.put(*key, prefix, details={**details, "hub": repo_id})

    def _shared(self, kind: Kind, name: str, version: int | str | None) -> SharedPrefix:
        key = PrefixKey(kind, name)
        stored = self._model_store.get(key, version=version)
        info = self._model_store.version_info(key, version=stored.version)
        return SharedPrefix(key, self._resolver.decoded(key, stored), info.details)

    def prefix_from_peft(self, folder: str | Path, *, task: int | None = None) -> Prefix:
        """Read a PEFT checkpoint of virtual tokens: prefix or prompt tuning, or a cartridge.

        On rotary decoders, logits equal PEFT's. On others the result is a start for training
        (`is_exact` is False). The checkpoint does not say which weights it was made for, so
        this is not checked.

        Args:
            folder: With `adapter_config.json` and `adapter_model.safetensors`.
            task: Index of the task, from 0, in a multitask prompt tuning checkpoint.

        Raises:
            PrefixFormatError: If it is no such checkpoint.
            GeometryMismatchError: If it was made for a model with other shapes.
            UnsupportedModelError: If the model has an encoder.
        """
        checkpoint = read_checkpoint(folder, task=task)
        if not checkpoint.has_embeddings:
            return Prefix.from_peft(folder, self.geometry)
        if self.frozen_model.is_encoder_decoder:
            raise UnsupportedModelError(
                "PEFT's virtual tokens of an encoder-decoder cannot become slots; train a prefix"
            )
        hidden_size = self.model.config.get_text_config().hidden_size
        if checkpoint.values.shape[1] != hidden_size:
            raise GeometryMismatchError(
                f"{folder} has embeddings of size {checkpoint.values.shape[1]}, but this model's "
                f"have size {hidden_size}; load the model that it was made for"
            )
        prefix = prefix_before_text(self._frozen, checkpoint.values)
        try:
            self._frozen.rope  # noqa: B018 (it is an error if there is none)
        except UnsupportedModelError as error:
            _log.warning("%s: its prefix is only a start for training: %s", folder, error)
            return replace(prefix, is_exact=False)
        return replace(prefix, is_exact=True)

    def save_peft(self, request: Request, folder: str | Path) -> None:
        """Write the union of a request's prefixes as one PEFT checkpoint of prefix tuning.

        Args:
            request: Its prompt is ignored.
            folder: Created if it does not exist.

        Raises:
            RequestError: If a strength is not a whole number from 0 up, or `when` is `relevant`,
                which PEFT cannot express.
            UnsupportedModelError: If the model's positions are not rotations of keys.
            StoreError: If the folder cannot be written.
        """
        if not isinstance(request, Request):
            raise RequestError(f"expected a Request, got {type(request).__name__}")
        if request.when == "relevant":
            raise RequestError(
                "when='relevant' decides by the prompt, which a checkpoint does not see; leave it "
                "out"
            )
        (resolved,) = self._resolver.resolve([request])
        copies: list[Prefix] = []
        for item in resolved.parts:
            part, used = item.part, item.used
            part.prefix.require_joint("PEFT, whose prefixes are in the KV cache")
            is_whole = float(part.strength).is_integer() and not item.in_logit_space
            if not is_whole or part.schedule:
                raise RequestError(
                    f"{used.kind} {used.name!r} has strength {used.strength:g}; a PEFT checkpoint "
                    "can only express whole numbers from 0 up, without a schedule"
                )
            copies += [part.prefix] * int(part.strength)
        if not copies:
            raise RequestError("the request names no prefix to write")
        joined = Prefix.joined([prefix.to(dtype=torch.float32) for prefix in copies])
        joined.to_peft(folder, self.geometry)

    def import_original(
        self,
        path: str | Path,
        *,
        task: str,
        labels: Mapping[str, Sequence[str]] | None = None,
    ) -> dict[str, int]:
        """Store the prefixes of a checkpoint of the original Prefix-Tuning or Control Prefixes.

        On BART and T5 the model then gives the original's logits. On GPT-2, where that code moves
        the text behind the slots, they are a start for training.

        Args:
            path: A Lightning checkpoint (`.ckpt`) or a `pytorch_model.bin`.
            task: Name for the task prefix.
            labels: Per attribute of the checkpoint (such as `cats`), the names of its labels in
                order.

        Returns:
            The number of each new version.

        Raises:
            PrefixFormatError: If it is no such checkpoint, or `labels` do not fit it.
            GeometryMismatchError: If it was made for a model with other shapes.
            StoreError: If the store cannot be written; nothing is stored then.
        """
        prefixes = read_original(path, self.geometry, task=task, labels=labels)
        if any(prefix.is_exact is False for prefix in prefixes.values()):
            _log.warning("%s: on this model its prefixes are only a start for training", path)
        details = {"imported": {"from": str(path)}}
        versions = self.store.put(
            [
                NewVersion(key, prefix.to(dtype=self._frozen.dtype), details)
                for key, prefix in prefixes.items()
            ]
        )
        return {str(key): version for key, version in zip(prefixes, versions, strict=True)}
