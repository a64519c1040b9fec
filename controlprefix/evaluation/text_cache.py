"""Generated texts, kept in a folder so that an interrupted evaluation continues there."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from controlprefix._io import progress_bar
from controlprefix.engine import ControlPrefix
from controlprefix.errors import StoreError
from controlprefix.example import Example
from controlprefix.request import Request

_BATCH_SIZE = 32
_FILE = "texts.jsonl"


class TextCache:
    """Generates a text once per request, and caches it under a hash of request and prefixes.

    Args:
        cp: Generates the texts.
        folder: Where to keep them; None: in memory only.
        max_new_tokens, temperature: Settings of every request.
        seed: Seed of the sampling.
    """

    def __init__(
        self,
        cp: ControlPrefix,
        folder: str | Path | None,
        *,
        max_new_tokens: int,
        temperature: float | None,
        seed: int,
    ) -> None:
        self._cp = cp
        self._path = None if folder is None else Path(folder) / _FILE
        self._settings = {"max_new_tokens": max_new_tokens, "temperature": temperature}
        self._seed = seed
        self._texts: dict[str, str] = self._read()
        self._digests: dict[str, str] = {}

    def generate(self, rows: Sequence[Example], *, progress: bool) -> None:
        """Generate the texts that are missing.

        Raises:
            StoreError: If the folder cannot be written.
        """
        requests = map(self._request, rows)
        missing = {
            key: request
            for key, request in ((self._key(request), request) for request in requests)
            if key not in self._texts
        }
        keys = sorted(missing, key=lambda key: len(missing[key].prompt or ""))
        with progress_bar("texts", len(keys), visible=progress) as update:
            for at in range(0, len(keys), _BATCH_SIZE):
                batch = keys[at : at + _BATCH_SIZE]
                requests_in_batch = [missing[key] for key in batch]
                completions = self._cp.generate(requests_in_batch, batch_size=_BATCH_SIZE)
                texts = [completion.text for completion in completions]
                self._keep(dict(zip(batch, texts, strict=True)))
                update(at + len(batch), "")

    def texts(self, rows: Sequence[Example]) -> list[str]:
        """The texts that were generated for rows."""
        return [self._texts[self._key(self._request(row))] for row in rows]

    def _request(self, row: Example) -> Request:
        fields = row.model_dump(exclude_unset=True, exclude={"completion", *self._settings})
        settings = {name: value for name, value in self._settings.items() if value is not None}
        draw = hashlib.sha256(f"{self._seed}:{row.prompt}:{row.completion}".encode()).digest()
        return Request(**{**fields, **settings, "seed": int.from_bytes(draw[:4], "big")})

    def _key(self, request: Request) -> str:
        """Cache key over everything that determines the text, the contents of prefixes too."""
        fields = {"task", "attributes", "user", "unseen", "strengths", "calibrated", "when"}
        if request.when == "relevant":  # the prompt decides
            fields |= {"prompt", "prompt_ids", "messages"}
        names = json.dumps(request.model_dump(mode="json", include=fields), sort_keys=True)
        if names not in self._digests:
            self._digests[names] = self._cp.resolve(request).digest
        fingerprint = self._cp.geometry.fingerprint
        content = (fingerprint, request.model_dump_json(), self._digests[names])
        return hashlib.sha256(repr(content).encode()).hexdigest()

    def _read(self) -> dict[str, str]:
        if self._path is None or not self._path.exists():
            return {}
        texts = {}
        for line in self._path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                entry = json.loads(line)
                texts[entry["key"]] = entry["text"]
            except (ValueError, KeyError, TypeError):
                continue  # a line cut short by a kill
        return texts

    def _keep(self, texts: Mapping[str, str]) -> None:
        self._texts.update(texts)
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                for key, text in texts.items():
                    file.write("\n" + json.dumps({"key": key, "text": text}))
        except OSError as error:
            raise StoreError(f"cannot write to {self._path}: {error}") from error
