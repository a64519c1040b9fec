"""What several test modules use."""

import base64
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy
import torch
import typer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from controlprefix import ControlPrefix, Example, Geometry, Part, Prefix, Request, assemble
from controlprefix.message import Message
from controlprefix.model import FrozenModel
from controlprefix.model.steering import Steering
from controlprefix.prefixes.user_code import PrefixDecoder, UserCode
from controlprefix.store import JsonEncryptionKeys, NewVersion
from controlprefix.store.records import StoredVersion
from controlprefix.training.initialization import scale_of

import models
from models import build, byte_tokenizer

if TYPE_CHECKING:  # not where vLLM is tested
    from controlprefix.evaluation.comparison.methods import ComparisonSetup

# A random model responds less to its slots than a trained one, so the learning rate is high.
QUICK: dict[str, Any] = {
    "steps": 12,
    "batch_size": 4,
    "num_slots": 4,
    "learning_rate": 0.1,
    "parameterization": "direct",
    "hidden_size": 8,
    "progress": False,
    "seed": 1,
}


def engine(
    name: str = "llama", store: str = "sqlite://", *, tokenizer: Any = None, **changes: Any
) -> ControlPrefix:
    """A tiny random model, with changes to its config, and a store."""
    return ControlPrefix.from_pretrained(
        build(name, **changes), tokenizer=tokenizer or byte_tokenizer(), store=store
    )


def greetings(num_each: int = 8) -> list[Example]:
    """Greetings of one task, formal and informal."""
    return [
        Example(
            prompt=f"Greet {i}",
            task="greet",
            attributes={"formality": label},
            completion=f"{text}{'!' * (i % 3)}",
        )
        for i in range(num_each)
        for label, text in {"formal": "Good day.", "informal": "hey you"}.items()
    ]


def stocked(cp: ControlPrefix) -> ControlPrefix:
    """With one task, three labels of two attributes, and two users."""
    for seed, (kind, name, num_slots) in enumerate(
        [
            ("task", "email", 4),
            ("attribute", "formality=formal", 3),
            ("attribute", "formality=informal", 3),
            ("attribute", "tone=warm", 2),
            ("user", "ana", 5),
            ("user", "bo", 7),
        ]
    ):
        prefix = Prefix.random(cp.geometry, num_slots=num_slots, scale=1.0, seed=seed)
        cp.put(kind, name, prefix)  # type: ignore[arg-type]
    return cp


COMPARISON: dict[str, Any] = {
    "steps": 2,
    "batch_size": 2,
    "num_slots": 2,
    "seeds": (0,),
    "num_rates": 1,
    "num_rows": 6,
    "max_new_tokens": 4,
    "progress": False,
}


def comparison_setup(cp: ControlPrefix, rows: list[Example]) -> "ComparisonSetup":
    """The setup of a comparison, with two validation rows."""
    from controlprefix.evaluation.comparison.methods import ComparisonSetup

    return ComparisonSetup(cp.frozen_model, rows[:12], rows[12:14], rows[14:], steps=2, num_slots=2)


def nats_per_token(cp: ControlPrefix, examples: Sequence[Example]) -> float:
    """The negative log-likelihood of the examples' completions."""
    scores = cp.score(examples)
    return -sum(s.log_likelihood for s in scores) / sum(s.num_tokens for s in scores)


def frozen(
    model: str | PreTrainedModel = "llama", tokenizer: PreTrainedTokenizerBase | None = None
) -> FrozenModel:
    """A frozen model with the byte tokenizer; a tiny random one by name."""
    built = build(model) if isinstance(model, str) else model
    return FrozenModel(built, tokenizer or byte_tokenizer())


def commands() -> list[tuple[str, ...]]:
    """The path of every command of the command line, such as `("users", "train")`."""
    from controlprefix.cli import app

    def walk(command: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        if not hasattr(command, "commands"):
            yield path
            return
        for name, inner in command.commands.items():
            yield from walk(inner, (*path, name))

    return list(walk(typer.main.get_command(app), ()))


def raw(url: str, statement: str, tenant: str = "default", **values: object) -> list[Any]:
    """Run SQL without the library, in the role of a tenant."""
    engine = sqlalchemy.create_engine(url)
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            set_config = sqlalchemy.text("SELECT set_config(:setting, :value, true)")
            name = {"setting": "controlprefix.tenant_name", "value": tenant}
            connection.execute(set_config, name)
            query = sqlalchemy.text("SELECT id FROM controlprefix_tenants")
            number = connection.scalar(query) if tenant else None
            tenant_id = {"setting": "controlprefix.tenant", "value": f"{number or ''}"}
            connection.execute(set_config, tenant_id)
        result = connection.execute(sqlalchemy.text(statement), values)
        rows = list(result) if result.returns_rows else []
    engine.dispose()
    return rows


def decoder(seed: int = 0) -> PrefixDecoder:
    """A decoder of a two-layer geometry with random weights, under which codes differ."""
    geometry = Geometry.uniform(num_layers=2, num_kv_heads=2, head_dim=4, fingerprint="f" * 64)
    initial = Prefix.random(geometry, num_slots=3, scale=1.0, seed=seed)
    built = PrefixDecoder(
        initial, scale_of(initial), width=8, hidden_size=16, num_features=5, seed=seed
    )
    with torch.no_grad():
        for parameter in built.parameters():  # at the initial ones every code decodes to `initial`
            noise = torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(seed), device="cpu"
            )
            parameter.add_(noise, alpha=0.3)
    return built.rounded()


def coded(by: PrefixDecoder, seed: int = 1) -> UserCode:
    """A random code of a decoder."""
    values = torch.randn(3, 8, generator=torch.Generator().manual_seed(seed), device="cpu")
    return UserCode(by.content_hash, values)


def prefix_of(version: NewVersion | StoredVersion) -> Prefix:
    """The value of a version that holds a prefix."""
    assert isinstance(version.value, Prefix)
    return version.value


def payload_of(version: NewVersion | StoredVersion) -> bytes:
    """The bytes of the prefix that a version holds."""
    return prefix_of(version).to_bytes()


def random_prefix(model: PreTrainedModel, num_slots: int, seed: int = 1) -> Prefix:
    """Random slots for a model."""
    geometry = Steering.for_model(model).geometry
    return Prefix.random(geometry, num_slots=num_slots, scale=1.0, seed=seed).to(
        device=model.device
    )


def tokens(length: int, seed: int = 0) -> Tensor:
    """Random token ids, `(1, length)`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 259, (1, length), generator=generator, device="cpu").to(models.DEVICE)


def inputs(model: PreTrainedModel, rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """Rows of different lengths in one batch: left-padded, or right-padded for an encoder."""
    longest = max(row.shape[1] for row in rows)
    ids = torch.full((len(rows), longest), 2)
    mask = torch.zeros_like(ids)
    left = not model.config.is_encoder_decoder
    for i, row in enumerate(rows):
        where = slice(longest - row.shape[1], longest) if left else slice(row.shape[1])
        ids[i, where], mask[i, where] = row[0], 1
    batch = {"input_ids": ids, "attention_mask": mask}
    if left:
        batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    else:
        batch["decoder_input_ids"] = torch.cat([tokens(4, seed=9)] * len(rows))
    return batch


def run(model: PreTrainedModel, rows: Sequence[Tensor], parts: Sequence[Sequence[Part]]) -> Tensor:
    """Logits under the parts of each row."""
    steering = Steering.for_model(model)
    batch = assemble(parts, steering.geometry, dtype=model.dtype)
    with torch.no_grad(), steering.attached(batch):
        logits: Tensor = model(**inputs(model, rows)).logits
    return logits


class Histogram:
    """In place of a sentence embedding model: how often each character is in a text."""

    def encode(self, texts: Sequence[str], **_: object) -> torch.Tensor:
        counts = torch.zeros(len(texts), 64)
        for i, text in enumerate(texts):
            for character in text:
                counts[i, ord(character) % 64] += 1 / len(text)
        return counts


class Letters:
    """In place of a sentence embedding model: how often seven letters are in a text."""

    def encode(self, texts: Sequence[str], **_: object) -> torch.Tensor:
        return torch.tensor([[text.count(letter) / 10 for letter in "helAHOY"] for text in texts])


def letters_reward(requests: Sequence[Any], texts: Sequence[str]) -> list[float]:
    """A reward: the length of each text in characters."""
    return [float(len(text)) for text in texts]


class Instance:
    """As much of a request of lm-evaluation-harness as a model reads."""

    def __init__(self, *arguments: Any, task_name: str = "") -> None:
        self.task_name, self.args, self.arguments = task_name, arguments, arguments


class Keys(JsonEncryptionKeys):
    """A file of keys for the tenant `mine`, changed by the tests."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.path = path
        self.keys: dict[str, str] = {}

    def use(self, name: str | None) -> None:
        """Write with this key from now on, made if it is new."""
        if name is not None:
            self.keys.setdefault(name, base64.b64encode(os.urandom(32)).decode())
        output = {"mine": {"current": name, "keys": self.keys}} if name else {}
        self.path.write_text(json.dumps(output))


def says(*texts: str, **fields: Any) -> Request:
    roles = ("user", "assistant")
    messages = [Message(role=roles[i % 2], content=text) for i, text in enumerate(texts)]
    return Request(messages=messages, **fields)
