"""One frozen transformers model: loading, tokenization, attention over slots, steering."""

from controlprefix.model.frozen import FrozenModel
from controlprefix.model.loading import LoadOptions
from controlprefix.model.steering import Steering
from controlprefix.model.text_prefix import prefix_from_tokens

__all__ = ["FrozenModel", "LoadOptions", "Steering", "prefix_from_tokens"]
