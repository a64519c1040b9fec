"""Labels without a prefix never get their opposite: words decide what embeddings cannot."""

import pytest

from controlprefix.inference.unseen_labels import nearest_labels
from controlprefix.labels import weighted_labels
from controlprefix.prefixes import PrefixKey


@pytest.mark.parametrize(
    ("label", "trained", "opposite"),
    [
        ("rude", ("polite",), "polite"),
        ("hostile", ("polite", "neutral"), "polite"),
        ("insulting", ("polite", "rude"), "polite"),
        ("impolite", ("polite",), "polite"),
        ("informal", ("formal",), "formal"),
        ("negative", ("positive",), "positive"),
        ("gloomy", ("cheerful", "sad"), "cheerful"),
        ("unfriendly", ("friendly", "angry", "sad"), "friendly"),
        ("cold", ("warm",), "warm"),
        ("cold", ("warm", "stern"), "warm"),
        ("concise", ("terse", "verbose"), "verbose"),
        ("long", ("terse", "verbose"), "terse"),
        ("pessimistic", ("optimistic", "confident", "calm"), "optimistic"),
        ("not kind", ("kind", "cruel"), "kind"),
        ("not kind", ("friendly", "cruel"), "friendly"),
        ("careless", ("careful",), "careful"),
        ("polite", ("formal", "casual"), "casual"),
        ("courteous", ("formal", "casual"), "casual"),
        ("passive", ("active",), "active"),
        ("calm", ("excited",), "excited"),
    ],
)
def test_no_label_stands_in_for_its_opposite(
    label: str, trained: tuple[str, ...], opposite: str
) -> None:
    keys = [PrefixKey.for_label("tone", name) for name in trained]
    (asked_for,) = weighted_labels({"tone": label})
    assert opposite not in nearest_labels(asked_for, keys).shares


@pytest.mark.parametrize(
    ("label", "trained", "nearest"),
    [
        ("friendly", ("polite", "rude"), "polite"),
        ("insulting", ("polite", "rude"), "rude"),
        ("happy", ("cheerful", "gloomy"), "cheerful"),
        ("football", ("world", "sports", "business", "sci/tech"), "sports"),
        ("stocks", ("world", "sports", "business", "sci/tech"), "business"),
    ],
)
def test_what_words_agree_on_stands_in(label: str, trained: tuple[str, ...], nearest: str) -> None:
    keys = [PrefixKey.for_label("tone", name) for name in trained]
    (asked_for,) = weighted_labels({"tone": label})
    shares = nearest_labels(asked_for, keys).shares
    assert max(shares, key=lambda name: shares[name]) == nearest
