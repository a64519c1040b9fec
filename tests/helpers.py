"""What several test modules use."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from controlprefix.model import FrozenModel

from models import build, byte_tokenizer


def frozen(
    model: str | PreTrainedModel = "llama", tokenizer: PreTrainedTokenizerBase | None = None
) -> FrozenModel:
    """A frozen model with the byte tokenizer; a tiny random one by name."""
    built = build(model) if isinstance(model, str) else model
    return FrozenModel(built, tokenizer or byte_tokenizer())
