"""Ids back to bytes: what each id stands for inside a text, and whether a text survives the way there and back.

The bytes of an id are a property of the whole tokenizer, not of its vocabulary. Three kinds of tokenizer differ in how
the text of a sequence follows from its ids:

    bytes      each id is a string of bytes in GPT-2's alphabet; the text is their concatenation
    pieces     each id adds the same characters wherever it stands, except that the first one loses a blank in front
               (SentencePiece, WordPiece, whole words); found by asking the library, and proven on random sequences
    context    what an id adds depends on its neighbours; only the library's decoding of all ids tells

A tokenizer is `lossless` when every text comes back byte for byte, so that the bytes of its ids add up to the bytes of
the text. A normalizer, a prefixed space, a pre-tokenizer that drops blanks, an unknown token, or an added token that
takes the blanks around it each prevent that, and then nothing that is counted or hashed from ids may pass for the text.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import tokenizers
from tokenizers import models

from lmcore.data.control_tokens import BYTE_TOKEN

Kind = Literal["bytes", "pieces", "context"]
Speller = Callable[[int], bytes]

_TRIALS, _TRIAL_TOKENS = 300, 12
_KEEPING_SPLITTERS = frozenset({"ByteLevel", "Split", "Digits", "Punctuation", "UnicodeScripts"})
_CONTEXT_TOKENS = 32  # decoded in front of new tokens, so that the first of them is not taken for the start of a text


class Detokenizer:
    """The bytes behind the ids of one tokenizer.

    definition: its tokenizer.json. reference: the loaded library object. invisible: ids that stand for no text.
    """

    def __init__(
        self,
        definition: dict[str, Any],
        reference: tokenizers.Tokenizer,
        invisible: frozenset[int],
        vocab_size: int,
    ) -> None:
        self._definition, self._reference, self._invisible = definition, reference, invisible
        self._vocabulary = {number: token for token, number in reference.get_vocab(with_added_tokens=True).items()}
        self._added = {number: str(token.content) for number, token in reference.get_added_tokens_decoder().items()}
        self._size = vocab_size
        self.is_bytes = is_byte_level(definition)

    @functools.cached_property
    def kind(self) -> Kind:
        """How the text of a sequence follows from its ids; see the top of the file."""
        return "bytes" if self.is_bytes else "context" if self._pieces is None else "pieces"

    @functools.cached_property
    def table(self) -> tuple[bytes, ...]:
        """The bytes of each id inside a text, b"" for ids that stand for none. For "context" what the library makes of
        the id alone."""
        if self.is_bytes:
            return self._byte_table()
        if self._pieces is not None:
            return self._pieces
        return self._fill(lambda ids: [text.encode() for text in self._decode([[number] for number in ids])])

    @functools.cached_property
    def lossless(self) -> bool:
        """Whether the bytes of a text's ids, joined, are the text, for every text."""
        steps = [*_steps(self._definition.get("pre_tokenizer"))]
        changes = (
            not self.is_bytes
            or any(True for _ in _steps(self._definition.get("normalizer")))
            or not isinstance(self._reference.model, models.BPE)
            or any(step.get("type") not in _KEEPING_SPLITTERS for step in steps)
            or any(step.get("behavior") == "Removed" for step in steps)
            or any(step["type"] == "ByteLevel" and step.get("add_prefix_space", True) for step in steps)
            or any(t.get("lstrip") or t.get("rstrip") for t in self._definition.get("added_tokens") or ())
        )
        if changes:
            return False
        # A byte without an id would be lost; an added token that is spelled like a piece has two meanings.
        single = {raw for raw in self.table if len(raw) == 1}
        added = ((number, text) for number, text in self._added.items() if number not in self._invisible)
        return len(single) == 256 and all(self.table[number] == text.encode() for number, text in added)

    def speller(self, context: Sequence[int] = ()) -> Speller:
        """A function that takes the ids of a continuation one after the other and gives the bytes that each adds to
        the text of `context`; bytes of an unfinished character may come late."""
        table = self.table
        if self.kind == "context":
            return self._by_decoding(context)
        begins = not any(0 <= number < len(table) and table[number] for number in context)
        if self.kind == "bytes" or not (begins and self._strips_first):
            return lambda number: table[number] if 0 <= number < len(table) else b""
        return _without_first_blank(table)

    # ------------------------------------------------------------------------------------ private

    def _byte_table(self) -> tuple[bytes, ...]:
        pieces = self._reference.get_vocab(with_added_tokens=False)

        def spell(number: int) -> bytes:
            if number in self._added and self._added[number] not in pieces:
                return self._added[number].encode()  # it is found in the text itself
            spelled = _spelled(self._vocabulary[number])
            return self._vocabulary[number].encode() if spelled is None else spelled

        return self._fill(lambda ids: [spell(number) for number in ids])

    def _fill(self, spell: Callable[[list[int]], list[bytes]]) -> tuple[bytes, ...]:
        visible = [number for number in self._vocabulary if number not in self._invisible]
        table = [b""] * self._size
        for number, raw in zip(visible, spell(visible), strict=True):
            table[number] = raw
        return tuple(table)

    def _decode(self, sequences: list[list[int]]) -> list[str]:
        return list(self._reference.decode_batch(sequences, skip_special_tokens=True))

    @functools.cached_property
    def _ordinary(self) -> list[int]:
        """Ids of words: something that stands for letters, at the beginning of a text too."""
        ids = sorted(set(self._vocabulary) - self._invisible - set(self._added))
        ids = [number for number in ids if not BYTE_TOKEN.fullmatch(self._vocabulary[number])]
        texts = self._decode([[number] for number in ids])
        return [number for number, text in zip(ids, texts, strict=True) if text.isascii() and text.isalpha()]

    @functools.cached_property
    def _pieces(self) -> tuple[bytes, ...] | None:
        """What each id adds behind a word; None where that is not the same everywhere."""
        if not self._ordinary:
            return None
        anchor = self._ordinary[0]
        (head,) = self._decode([[anchor]])
        byte_fallback = any(step.get("type") == "ByteFallback" for step in _steps(self._definition.get("decoder")))

        def spell(ids: list[int]) -> list[bytes]:
            result = []
            for number, text in zip(ids, self._decode([[anchor, number] for number in ids]), strict=True):
                if byte_fallback and (match := BYTE_TOKEN.fullmatch(self._vocabulary[number])):
                    result.append(bytes([int(match[1], 16)]))
                elif text.startswith(head):
                    result.append(text[len(head) :].encode())
                else:
                    raise _NotAdditive
            return result

        try:
            table = self._fill(spell)
        except _NotAdditive:
            return None
        return table if self._adds_up(table) else None

    def _adds_up(self, table: Sequence[bytes]) -> bool:
        """Whether the table gives the library's text of random sequences, and of every character in byte tokens."""
        draw, words = random.Random(0), self._ordinary
        others = [number for number, raw in enumerate(table) if raw and _is_text(raw)]
        trials = [[draw.choice(words), *draw.choices(others, k=k % _TRIAL_TOKENS)] for k in range(_TRIALS)]
        byte_ids = {table[number]: number for number, token in self._vocabulary.items() if BYTE_TOKEN.fullmatch(token)}
        if all(bytes([value]) in byte_ids for value in range(256)):
            for text in ("\u00e9\u20ac", "a\U0001f600\u00df "):
                trials.append([words[0], *(byte_ids[bytes([value])] for value in text.encode()), words[-1]])
        strips = self._strips_first_of(table)
        for ids, text in zip(trials, self._decode(trials), strict=True):
            raw = b"".join(table[number] for number in ids)
            if (raw.removeprefix(b" ") if strips else raw) != text.encode():
                return False
        return True

    @functools.cached_property
    def _strips_first(self) -> bool:
        return self._strips_first_of(self.table)

    def _strips_first_of(self, table: Sequence[bytes]) -> bool:
        alone = self._decode([[number] for number in self._ordinary])
        return any(table[number] == b" " + text.encode() for number, text in zip(self._ordinary, alone, strict=True))

    def _by_decoding(self, context: Sequence[int]) -> Speller:
        """By decoding a growing sequence. What ends in half a character waits; the beginning is forgotten in steps."""
        ids = list(context[-_CONTEXT_TOKENS:])
        shown = self._decode([ids])[0]

        def spell(number: int) -> bytes:
            nonlocal ids, shown
            ids.append(number)
            text = self._decode([ids])[0]
            whole = text.startswith(shown) and not text.endswith("\ufffd")
            new = text[len(shown) :] if whole else ""
            if len(ids) > 2 * _CONTEXT_TOKENS:
                ids = ids[-_CONTEXT_TOKENS:]
                shown = self._decode([ids])[0]
            elif whole:
                shown = text
            return new.encode()

        return spell


class _NotAdditive(Exception):
    """An id does not add characters to what stands before it."""


def _without_first_blank(table: Sequence[bytes]) -> Speller:
    begun = False

    def spell(number: int) -> bytes:
        nonlocal begun
        raw = table[number] if 0 <= number < len(table) else b""
        if begun or not raw:
            return raw
        begun = True
        return raw.removeprefix(b" ")

    return spell


def is_byte_level(definition: dict[str, Any]) -> bool:
    """Whether tokens are written in GPT-2's alphabet and their bytes simply follow each other."""
    model = definition["model"]
    if model.get("type") == "WordPiece" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return False
    parts = (definition.get(name) for name in ("normalizer", "pre_tokenizer", "decoder"))
    return any(step.get("type") == "ByteLevel" for part in parts for step in _steps(part))


def _steps(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The components of a normalizer, pre-tokenizer or decoder, sequences taken apart."""
    if part is None:
        return
    if part.get("type") != "Sequence":
        yield part
        return
    for key in ("normalizers", "pretokenizers", "decoders"):
        for item in part.get(key) or ():
            yield from _steps(item)


def _is_text(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def _spelled(token: str) -> bytes | None:
    """The bytes that a token in GPT-2's alphabet stands for; None when it holds another character."""
    values = _byte_values()
    return bytes([values[c] for c in token]) if all(c in values for c in token) else None


@functools.cache
def _byte_values() -> dict[str, int]:
    return {character: value for value, character in enumerate(byte_alphabet())}


@functools.cache
def byte_alphabet() -> str:
    """GPT-2's 256 printable stand-ins for bytes: character number b stands for the byte b."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return "".join(chr(value if value in printable else next(spare)) for value in range(256))
