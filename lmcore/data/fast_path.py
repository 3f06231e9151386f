"""What the fast encoder is proven to do exactly as the library: the kinds of tokenizer, and the characters.

gigatoken loads more than is listed here, and differs in silence from `tokenizers` on some of it: added tokens that must
stand alone as words or take the blanks around them, merges left to chance, text that is not cut into words, and marks
(accents) that entered Unicode after the library's tables were made, whose order its NFC does not know. A sample of the
data does not find what is rare, so only what is listed is trusted. `tests/data/test_fast_path.py` makes tokenizers of
every listed form at random and compares; its slow part compares every character of Unicode.

Versions: gigatoken 0.10, tokenizers 0.23.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
_LETTERS = _LEAD + r"\p{L}+"
_LOWER = _LEAD + r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_UPPER = _LEAD + r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_OTHERS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_PATHS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_PATTERNS = frozenset(
    {
        "|".join([_SUFFIX, _LETTERS, r"\p{N}{1,3}", _OTHERS, _BLANKS]),  # Llama 3
        "|".join([_SUFFIX, _LETTERS, r"\p{N}{1,3}", _OTHERS, r"\s*[\r\n]|\s+(?!\S)|\s+"]),  # OLMo 2
        "|".join([_SUFFIX, _LETTERS, r"\p{N}", _OTHERS, _BLANKS]),  # Qwen 2 and 3
        "|".join([_SUFFIX, _LEAD + r"[\p{L}\p{M}]+", r"\p{N}", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*", _BLANKS]),  # Qwen 3.5
        "|".join([f"{_LOWER}{_SUFFIX}?", f"{_UPPER}{_SUFFIX}?", r"\p{N}{1,3}", _PATHS, _BLANKS]),  # o200k
        "|".join([_LOWER, _UPPER, r"\p{N}", _PATHS, _BLANKS]),  # o200k without suffixes
    }
)
"""Patterns that cut text into words. Not among them is the one that tiktoken writes for cl100k: `\\p{N}{1,3}+` means at
most three digits there and in gigatoken, but any number of them to the library's regular expressions."""

_NFC_DIFFERS = (
    "07fd 0897-089f 08ca-08d3 09fe 0c3c 0d3b-0d3c 0eba 1715 1abf-1add 1ae0-1aeb 1df6-1dfa a82c 10d24-10d27 10d69-10d6d "
    "10eab-10eac 10efa-10eff 10f46-10f50 10f82-10f85 11070 1133b 11380-113ff 1145e 11839-1183a 11900-1195f 119e0 11a34 "
    "11a47 11a99 11d42-11d45 11d97 11f41-11f42 16100-1613f 16d40-16d7f 16ff0-16ff1 1e08f 1e130-1e136 1e2ae 1e2ec-1e2ef "
    "1e4ec-1e4ef 1e5ee-1e5ef 1e6e3 1e6e6 1e6ee-1e6ef 1e6f5"
)
"""Characters that the two order or compose in other ways under NFC, hexadecimal; whole blocks where pairs compose."""

_PREPEND = {"type": "Prepend", "prepend": "\u2581"}
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
_SPLIT_BLANKS = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}


def why_not(definition: dict[str, Any]) -> str:
    """Why the fast encoder is not proven for a tokenizer.json, in words that continue "it is not used for"; "" when it
    is. definition: without control tokens."""
    model = definition["model"]
    if "merges" not in model or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return "a model that is not plain BPE"
    added = definition.get("added_tokens") or []
    if any(token.get(key) for token in added for key in ("lstrip", "rstrip", "single_word")):
        return "added tokens that take blanks or stand alone"
    if len({bool(token.get("normalized")) for token in added}) > 1:
        return (
            "added tokens of which only some are looked for in normalized text"  # the library does that in two passes
        )
    normalizer, pre = definition.get("normalizer"), definition.get("pre_tokenizer")
    if model.get("byte_fallback"):
        prefixed = {"type": "Sequence", "normalizers": [_PREPEND, _REPLACE]}
        known = (prefixed, None), (_REPLACE, _SPLIT_BLANKS)
        return "" if (normalizer, pre) in known else "this way of writing blanks"
    if model.get("unk_token"):
        return "a byte-level vocabulary with an unknown token"
    if normalizer is not None and normalizer != {"type": "NFC"}:
        return f"the normalizer {normalizer.get('type')}"
    if normalizer is not None and not all(str(token["content"]).isascii() for token in added):
        return "added tokens that a normalizer may change"
    return "" if _cuts_words(pre) else "this way of cutting text into words"


def _cuts_words(pre: dict[str, Any] | None) -> bool:
    if pre is None:
        return False
    if pre["type"] == "ByteLevel":
        return bool(pre.get("use_regex", True))
    steps = pre.get("pretokenizers") or []
    if pre["type"] != "Sequence" or len(steps) != 2:
        return False
    split, then = steps
    return (
        split["type"] == "Split"
        and split["pattern"].get("Regex") in _PATTERNS
        and (split["behavior"], split.get("invert", False)) == ("Isolated", False)
        and then["type"] == "ByteLevel"
        and (then.get("add_prefix_space", True), then.get("use_regex", True)) == (False, False)
    )


class Unproven:
    """The characters on which the two may differ, looked for in UTF-8 text."""

    def __init__(self, ranges: str) -> None:
        self._codes = np.zeros(0x110000, np.bool_)
        self._leads = np.zeros(256, np.bool_)  # first bytes of these characters
        for part in ranges.split():
            first, _, last = part.partition("-")
            codes = range(int(first, 16), int(last or first, 16) + 1)
            self._codes[codes.start : codes.stop] = True
            self._leads[[chr(code).encode()[0] for code in codes]] = True

    def documents(self, data: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Indices of the texts that hold one; text k is data[offsets[k]:offsets[k + 1]]."""
        begin = int(offsets[0])
        raw = data[begin : offsets[-1]]
        at = np.flatnonzero(self._leads[raw])
        if not len(at):
            return at
        first, *rest = (raw[np.minimum(at + k, len(raw) - 1)].astype(np.uint32) for k in range(4))
        second, third, fourth = (byte & 0x3F for byte in rest)
        two = (first & 0x1F) << 6 | second
        three = (first & 0x0F) << 12 | second << 6 | third
        four = (first & 0x07) << 18 | second << 12 | third << 6 | fourth
        codes = np.where(first >= 0xF0, four, np.where(first >= 0xE0, three, two))
        return np.unique(np.searchsorted(offsets - begin, at[self._codes[codes]], "right") - 1)


def unproven_characters(definition: dict[str, Any]) -> Unproven | None:
    """The characters on which the two may differ for this tokenizer; None when there is none."""
    return Unproven(_NFC_DIFFERS) if definition.get("normalizer") == {"type": "NFC"} else None
