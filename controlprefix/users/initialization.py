"""What training of a user starts from: the tokens of their texts, or the code of a decoder."""

from controlprefix.model import FrozenModel, prefix_from_tokens
from controlprefix.prefixes import PrefixDecoder, PrefixKey
from controlprefix.training.initialization import as_decoupled, typical_scale
from controlprefix.training.parameterization import TrainablePrefixes, parameterize
from controlprefix.training.settings import TrainingSettings
from controlprefix.users.enrolment import predict_code
from controlprefix.users.user_codes import TrainableCodes
from controlprefix.users.user_training import Initialize
from controlprefix.users.user_vectors import has_vectors


def initializer(
    frozen: FrozenModel,
    settings: TrainingSettings,
    *,
    decoder: PrefixDecoder | None,
    as_codes: bool,
    num_slots: int,
) -> Initialize:
    """What to train, given a user's key and texts.

    Args:
        frozen: The model.
        settings: Hyperparameters.
        decoder: Start from the code that it predicts; None: from the texts' first tokens.
        as_codes: Train that code, not the slots that it is decoded to.
        num_slots: Slots of a prefix, without a decoder.
    """

    def from_texts(key: PrefixKey, texts: list[str]) -> TrainablePrefixes:
        ids = frozen.request_tokenizer.text_ids("\n".join(texts[:num_slots]))
        initial = prefix_from_tokens(frozen, ids, num_slots=num_slots)
        if settings.form == "decoupled":
            initial = as_decoupled(initial)
        return parameterize(settings, {key: initial}, typical_scale(frozen, ids))

    if decoder is None:
        return from_texts
    own = decoder

    def from_decoder(key: PrefixKey, texts: list[str]) -> TrainablePrefixes:
        code = own.mean_code if has_vectors(own) else predict_code(own, texts)
        if as_codes:
            return TrainableCodes(own, {key: code.values})
        return parameterize(settings, {key: own.decode(code)}, own.scales)

    return from_decoder
