"""The methods of `ControlPrefix` that read and write other libraries' files."""

import logging
from dataclasses import replace
from pathlib import Path

import torch

from controlprefix.engine.prefixes import PrefixMethods
from controlprefix.errors import GeometryMismatchError, RequestError, UnsupportedModelError
from controlprefix.model.text_prefix import prefix_before_text
from controlprefix.prefixes import Prefix
from controlprefix.prefixes.peft_files import read_checkpoint
from controlprefix.request import Request

_log = logging.getLogger("controlprefix")


class ExchangeMethods(PrefixMethods):
    """Checkpoints of other libraries <-> prefixes."""

    def prefix_from_peft(self, folder: str | Path, *, task: int | None = None) -> Prefix:
        """Read a PEFT checkpoint of virtual tokens: prefix or prompt tuning, or a cartridge.

        On rotary decoders, logits equal PEFT's. On others the result is a start for training
        (`is_exact` is False). The checkpoint does not say which weights it was made for, so
        nobody checks that.

        Args:
            folder: With `adapter_config.json` and `adapter_model.safetensors`.
            task: Task of a multitask checkpoint.

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
            self._frozen.rotation  # noqa: B018 (it is an error if there is none)
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
            RequestError: If a strength is not a whole number from 0 up, which PEFT cannot express.
            UnsupportedModelError: If the model's positions are not rotations of keys.
            StoreError: If the folder cannot be written.
        """
        (resolved,) = self._resolver.resolve([request])
        copies: list[Prefix] = []
        for item in resolved.parts:
            part, used = item.part, item.used
            is_whole = float(part.strength).is_integer() and not item.in_logit_space
            if not is_whole or part.schedule:
                raise RequestError(
                    f"{used.kind} {used.name!r} has strength {used.strength:g}; a PEFT checkpoint "
                    "can only express whole numbers from 0 up, without a schedule"
                )
            copies += [part.prefix] * int(part.strength)
        if not copies:
            raise RequestError("the request names no prefix to write")
        slots = {
            site: torch.cat([prefix.slots[site].float() for prefix in copies])
            for site in self.geometry.sites
        }
        Prefix(self.geometry, slots).to_peft(folder)
