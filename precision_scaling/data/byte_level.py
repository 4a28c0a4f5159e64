"""Byte-level tokenizers with a memory for words: the ids of the `tokenizers` library, several times faster.

The library spends nearly all of its time cutting text into words, which it then encodes one by one. Here `re` cuts the
text by the same rule and each distinct word is encoded by the library once. Used by `tokenizer.LearnedTokenizer`.
"""

import functools
import json
import re
import unicodedata
from collections.abc import Iterable
from typing import Any

import numpy as np

_WORDS_KEPT = 1 << 19  # about 100 MB; text has few distinct words, and most of them often
_WIDE = re.compile("[\U00010000-\U0010ffff]")
_UNASSIGNED = ("Cn", "Co", "Cs")  # characters that two releases of Unicode may disagree on


class WordTokenizer:
    """Encodes documents by words. Make it with `of`, which knows the tokenizers that this holds for."""

    def __init__(self, tokenizer, added: Iterable[str], nfc: bool):
        self._tokenizer, self._nfc = tokenizer, nfc
        self._added = re.compile(f"({alternatives})") if (alternatives := _longest_of(set(added))) else None
        self._words: dict[str, bytes] = {}  # word -> its ids, uint32

    def encode(self, document: bytes) -> np.ndarray:
        """Ids of one UTF-8 document, uint32."""
        text = document.decode("utf-8")
        split, unassigned = (_ascii_rule(), None) if text.isascii() else _rules(_WIDE.search(text) is not None)
        if unassigned is not None and unassigned.search(text):
            return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.uint32)
        if self._nfc and not text.isascii():
            text = unicodedata.normalize("NFC", text)
        if len(self._words) > _WORDS_KEPT:
            self._words.clear()
        if self._added is None:
            words = split.findall(text)
        else:
            words = []  # a word does not reach across an added token
            for i, piece in enumerate(self._added.split(text)):
                if i % 2:
                    words.append(piece)
                else:
                    words += split.findall(piece)
        try:
            ids = b"".join(map(self._words.__getitem__, words))
        except KeyError:
            self._learn(list(set(words) - self._words.keys()))
            ids = b"".join(map(self._words.__getitem__, words))
        return np.frombuffer(ids, np.uint32)

    def _learn(self, words: list[str]) -> None:
        encodings = self._tokenizer.encode_batch_fast(words, add_special_tokens=False)
        self._words.update(
            (word, np.asarray(encoding.ids, np.uint32).tobytes())
            for word, encoding in zip(words, encodings, strict=True)
        )


def of(tokenizer) -> WordTokenizer | None:
    """The same tokenizer by words, or None where words are not cut by GPT-2's rule (GPT-NeoX's and ours are)."""
    parts: dict[str, Any] = json.loads(tokenizer.to_str())
    pre, normalizer = parts["pre_tokenizer"] or {}, parts["normalizer"] or {}
    if pre.get("type") != "ByteLevel" or pre["add_prefix_space"] or not pre.get("use_regex", True):
        return None
    if normalizer.get("type", "NFC") != "NFC" or parts["model"].get("dropout"):
        return None
    added = [token for token in parts["added_tokens"] if not token["special"]]
    for token in added:
        if token["single_word"] or token["lstrip"] or token["rstrip"] or (normalizer and not token["normalized"]):
            return None
        if not unicodedata.is_normalized("NFC", token["content"]):
            return None
    return WordTokenizer(tokenizer, (token["content"] for token in added), bool(normalizer))


def _longest_of(names: set[str]) -> str:
    """The library takes the leftmost added token, and of several there the longest: so does this pattern."""
    patterns = []
    for first in sorted({name[0] for name in names}):
        alike = sorted((name for name in names if name[0] == first), key=len, reverse=True)
        if alike == [first * n for n in range(len(alike[0]), len(alike[-1]) - 1, -1)]:
            # GPT-NeoX's runs of spaces: one attempt at a space, not one for each length.
            patterns.append(f"{re.escape(first)}{{{len(alike[-1])},{len(alike[0])}}}")
        else:
            patterns += map(re.escape, alike)
    return "|".join(patterns)


def _rule(letters: str, numbers: str, spaces: str) -> re.Pattern:
    """GPT-2's rule (Radford et al. 2019, `encoder.py`) with its classes of characters spelled out."""
    other = f"[^{spaces}{letters}{numbers}]"
    return re.compile(
        f"'(?:[sdmt]|ll|ve|re)| ?[{letters}]+| ?[{numbers}]+| ?{other}+|[{spaces}]+(?![^{spaces}])|[{spaces}]+"
    )


@functools.cache
def _ascii_rule() -> re.Pattern:
    return _rule(*(_ranges(characters, 0x80) for characters in _classes()))


@functools.cache
def _rules(wide: bool) -> tuple[re.Pattern, re.Pattern]:
    """The rule for text of any characters or (much faster) those below U+10000, and the unassigned ones among them."""
    end = 0x110000 if wide else 0x10000
    unassigned = [i for i in range(end) if unicodedata.category(chr(i)) in _UNASSIGNED]
    return _rule(*(_ranges(characters, end) for characters in _classes())), re.compile(f"[{_ranges(unassigned, end)}]")


@functools.cache
def _classes() -> tuple[list[int], list[int], list[int]]:
    """Letters, numbers and spaces as the library sees them: asked of it, as its Unicode need not be Python's (1 s)."""
    from tokenizers.pre_tokenizers import ByteLevel

    words = ByteLevel(add_prefix_space=False).pre_tokenize_str
    letters, numbers, spaces = [], [], []
    for i in range(0x110000):
        character = chr(i)
        if unicodedata.category(character) in _UNASSIGNED:
            continue
        if len(words("a" + character)) == 1:
            letters.append(i)
        elif len(words("1" + character)) == 1:
            numbers.append(i)
        elif len(words("!" + character)) > 1:
            spaces.append(i)
    return letters, numbers, spaces


def _ranges(characters: list[int], end: int) -> str:
    """What stands between the brackets of a class in `re`: characters below `end`, in ascending order."""
    runs: list[list[int]] = []
    for i in characters:
        if i >= end:
            break
        if runs and runs[-1][1] == i - 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return "".join(f"{re.escape(chr(first))}-{re.escape(chr(last))}" for first, last in runs)
