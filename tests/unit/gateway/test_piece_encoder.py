"""Ids made piece by piece are the tokenizer's own."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from gateway.services.piece_encoder import PieceEncoder

MERGES = [("a", "b"), ("ab", "c"), ("\u0120", "a"), ("\u0120a", "b"), ("\u00c3", "\u00a9"), ("<", "s"), ("c", "<")]
PRE_TOKENIZERS = {
    "plain": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "digits": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "prefix": pre_tokenizers.ByteLevel(add_prefix_space=True),
    "words": pre_tokenizers.Metaspace(prepend_scheme="first"),
}
ADDED = {
    "plain": [AddedToken(text, special=True) for text in ("<s>", "</s>", "<s>ab")],
    "strips": [AddedToken("<s>", special=True, lstrip=True, rstrip=True), AddedToken("</s>", special=True)],
    "normalized": [AddedToken("<s>", normalized=True), AddedToken("</s>", special=True)],
    "none": [],
}
TEXTS = st.lists(st.sampled_from(["<s>", "</s>", "<s>ab", "a", "ab", "abc", " ", "\n", "\u00e9", "e\u0301", "7", "<"]))


def tokenizer_of(pre_tokenizer="plain", added="plain", normalizer=None):
    alphabet = sorted({*pre_tokenizers.ByteLevel.alphabet(), "\u2581"})
    vocab = {text: i for i, text in enumerate([*alphabet, *("".join(pair) for pair in MERGES)])}
    tokenizer = Tokenizer(models.BPE(vocab, MERGES))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre_tokenizer]
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.add_tokens(ADDED[added])
    return tokenizer


@pytest.mark.parametrize("pre_tokenizer", PRE_TOKENIZERS)
@pytest.mark.parametrize("added", ADDED)
@pytest.mark.parametrize("normalizer", [None, normalizers.NFC(), normalizers.Prepend("a")], ids=str)
@settings(max_examples=40, deadline=None)
@given(parts=TEXTS)
def test_ids_are_the_tokenizers_own(pre_tokenizer, added, normalizer, parts):
    tokenizer = tokenizer_of(pre_tokenizer, added, normalizer)
    pieces, text = PieceEncoder(tokenizer), "".join(parts)
    expected = tokenizer.encode(text, add_special_tokens=False).ids
    for _ in range(2):  # the second time from memory
        assert pieces.encode(text) == expected


def test_a_piece_is_tokenized_once(monkeypatch):
    tokenized = []
    encode = PieceEncoder._encode

    def noted(self, text):
        tokenized.append(len(text))
        return encode(self, text)

    monkeypatch.setattr(PieceEncoder, "_encode", noted)
    pieces = PieceEncoder(tokenizer_of())
    for text in ("<s>bc</s>", "<s>bc</s>a<s>", "<s>" + 5000 * "b", "<s>" + 5000 * "b"):
        pieces.encode(text)
    assert tokenized == [2, 1, 5000, 5000]
