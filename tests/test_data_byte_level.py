"""Tokenizing by words gives the ids of the `tokenizers` library, whatever the text: the library itself is the judge."""

import random
import sys
import unicodedata

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from precision_scaling.data import byte_level

TEXTS = [
    "The cat's don't we'll they've I'm you're he'd 'tis O'Neil ''s",
    "def f(x):\n    return  x**2 + 1e-5   # twice\n\n\n\tyield\t \n",
    "naïve café über Ελληνικά русский 中文字 日本語 한국어 العربية हिन्दी ไทย",
    "e\u0301 \u1100\u1161 \ufb01 ² ½ Ⅷ ٣ \u00a0\u2003\u3000\x1c\x85\u2028 \u200b\ufeff",
    "emoji 🙂👩‍👩‍👧 𝒳𝓎 𐍈 🇺🇸",
    "new or never: \u0378 \ue000 \U000e0001 \U0003fffd",
    "",
    " ",
    "   ",
    "a" * 300,
]


def trained(normalizer=None, added=()) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.add_tokens(list(added))
    tokenizer.encode_special_tokens = True
    return tokenizer


PLAIN = trained()
# As GPT-NeoX's: composed characters, and runs of 2 to 24 spaces that are tokens of their own.
SPACES = [AddedToken(" " * n, normalized=True, special=False) for n in range(2, 25)]
NEOX = trained(normalizers.NFC(), SPACES)


# Added tokens of which some begin as others do.
MIXED = trained(added=["  ", "    ", "the", "then", "|||", "|||X|||", "x" * 3, "x" * 4])


def library(tokenizer, text: str) -> list[int]:
    return tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids


@pytest.mark.parametrize("tokenizer", [PLAIN, NEOX, MIXED], ids=["plain", "neox", "mixed"])
@pytest.mark.parametrize(
    "text",
    [
        *TEXTS,
        "spells <|endoftext|> itself",
        "x" + " " * 60 + "y \n" + " " * 3,
        "the then thenth |||X|||X||| |||| xx xxx xxxxx xxxxxxxx  a   b    c     d",
    ],
)
def test_a_text_has_the_librarys_ids(tokenizer, text):
    ids = byte_level.of(tokenizer).encode(text.encode())
    assert ids.dtype == np.uint32
    assert ids.tolist() == library(tokenizer, text)


@pytest.mark.parametrize("tokenizer", [PLAIN, NEOX], ids=["plain", "neox"])
def test_random_characters_of_all_of_unicode_have_the_librarys_ids(tokenizer):
    draw = random.Random(0)
    words = byte_level.of(tokenizer)
    ranges = [(0, 0x80)] * 4 + [(0x80, 0x3000), (0x3000, 0xD800), (0xE000, 0x10000), (0x10000, 0x30000)]
    common = " \n\t'sdmtlrve  aA1!"
    for _ in range(400):
        last = draw.choice([1, 4, 6, 8])
        pick = lambda last=last: chr(draw.randrange(*draw.choice(ranges[:last])))
        text = "".join(draw.choice(common) if draw.random() < 0.5 else pick() for _ in range(draw.randrange(60)))
        assert words.encode(text.encode()).tolist() == library(tokenizer, text), ascii(text)


@pytest.mark.slow
def test_every_third_character_there_is_has_the_librarys_ids():
    words = byte_level.of(PLAIN)
    characters = [chr(i) for i in range(0, sys.maxunicode + 1, 3) if unicodedata.category(chr(i))[0] != "C"]
    for start in range(0, len(characters), 4096):
        text = "".join(f"a{c}1{c} {c}" for c in characters[start : start + 4096])
        assert words.encode(text.encode()).tolist() == library(PLAIN, text), hex(ord(characters[start]))


def test_the_memory_of_words_is_bounded_and_forgetting_changes_nothing(monkeypatch):
    words = byte_level.of(PLAIN)
    monkeypatch.setattr(byte_level, "_WORDS_KEPT", 3)
    for text in TEXTS * 2:
        assert words.encode(text.encode()).tolist() == library(PLAIN, text)
    assert len(words._words) < 100


def test_tokenizers_with_other_rules_are_left_to_the_library():
    def changed(**parts):
        tokenizer = trained()
        for name, part in parts.items():
            setattr(tokenizer, name, part)
        return byte_level.of(tokenizer)

    split = pre_tokenizers.Split(tokenizers.Regex(r"\d"), "isolated")
    assert changed() is not None
    assert changed(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)) is None
    assert changed(pre_tokenizer=pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(use_regex=False)])) is None
    assert changed(pre_tokenizer=pre_tokenizers.Whitespace()) is None
    assert changed(normalizer=normalizers.Lowercase()) is None
    assert changed(model=models.BPE(dropout=0.1)) is None
    assert byte_level.of(trained(added=[AddedToken("x", lstrip=True)])) is None
    assert byte_level.of(trained(added=[AddedToken("word", single_word=True)])) is None
