"""Text that holds many documents: the marks that stand between them, found, said, and split at when asked.

    auto   lines that hold one of the usual marks alone: the EOS of the tokenizer, <|endoftext|>, <|end_of_text|>, </s>,
           <eos>, <EOS>, [EOS], <|eos|>, <|eod|>, or a form feed. Blank lines alone never divide.
    TEXT   this text wherever it stands; \\n, \\t, \\r, \\f, \\xNN, \\uNNNN and \\\\ are escapes

A mark that stands alone on its line takes the line with it: the ends of the line before it and of its own. What lies
between two marks is a document as it is. Without the option a text file stays one document, whatever it holds, so that
a book about tokenizers is not cut and a set keeps its bytes; what was seen is said.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from lmcore.data.documents import check_size
from lmcore.data.json_lines import BOM

AUTO = "auto"
USUAL = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<EOS>", "[EOS]", "<|eos|>", "<|eod|>", "\f")
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "0": "\0", "\\": "\\"}
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|.|$)", re.DOTALL)
_LINE_END = 2  # a mark may end at \r\n


def parse(value: str) -> str:
    """The text that `--separator VALUE` means; "auto" as it is. Raises ValueError for what means none."""
    if value == AUTO:
        return AUTO

    def meant(match: re.Match[str]) -> str:
        body = match[1]
        if body[:1] in ("x", "u") and len(body) > 1:
            return chr(int(body[1:], 16))
        if body not in _ESCAPES:
            raise ValueError(f"separator: {match[0]!r} is no escape; write a backslash as \\\\")
        return _ESCAPES[body]

    text = _ESCAPE.sub(meant, value)
    if not text:
        raise ValueError("separator: an empty text divides nothing")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("separator: half of a surrogate pair is no text") from None
    return text


def marks(separator: str | None, eos: str) -> tuple[str, ...]:
    """What a unit of text is split at, as plans keep it: a leading "=" says that the mark must have its line for
    itself. separator: the option as it was given. eos: the text of the tokenizer's EOS."""
    if separator is None:
        return ()
    if separator == AUTO:
        return tuple("=" + mark for mark in dict.fromkeys((eos, *USUAL)))
    return ("+" + parse(separator),)


@dataclass(frozen=True)
class Mark:
    """A separator in bytes."""

    text: bytes
    own_line: bool
    """Only where it stands alone on its line."""

    @classmethod
    def of(cls, kept: str) -> Mark:
        return cls(kept[1:].encode(), kept[:1] == "=")


def spans(text: bytes | bytearray, wanted: Sequence[Mark], start: int, stop: int) -> list[tuple[int, int]]:
    """[begin, end) of the separators that begin in [start, stop), in order and disjoint."""
    found: list[tuple[int, int]] = []
    for mark in wanted:
        at = text.find(mark.text, start)
        while 0 <= at < stop:
            begin, end = at, at + len(mark.text)
            fits = not mark.own_line
            if b"\n" not in mark.text and (at == 0 or text[at - 1] == 10):
                behind = (
                    0 if end == len(text) else 1 if text[end] == 10 else 2 if text[end : end + 2] == b"\r\n" else -1
                )
                if behind >= 0:
                    fits, end = True, end + behind
                    begin -= 0 if at == 0 else 2 if text[at - 2 : at] == b"\r\n" and at > 1 else 1
            if fits:
                found.append((begin, end))
            at = text.find(mark.text, max(end, at + 1) if fits else at + 1)
    found.sort()
    disjoint: list[tuple[int, int]] = []
    for begin, end in found:
        last = disjoint[-1][1] if disjoint else 0
        if end > last:
            disjoint.append((max(begin, last), end))
    return disjoint


def split(chunks: Iterable[bytes], kept: Sequence[str], name: str) -> Iterator[bytes]:
    """The stretches between separators, empty ones included, of text that comes in chunks of any size. name: of the
    file, for the error about a document that is too long."""
    wanted = [Mark.of(mark) for mark in kept]
    reach = max(len(mark.text) for mark in wanted) + _LINE_END
    held, begin, searched = bytearray(), 0, 0
    for chunk in _without_mark(chunks):
        held += chunk
        stop = len(held) - reach  # what begins before it is seen whole, with the end of its line
        if stop <= searched:
            continue
        documents, begin, searched = _cut(held, wanted, begin, searched, stop)
        yield from documents
        check_size(name, len(held) - begin)
        keep = max(0, min(begin, searched) - _LINE_END)  # a mark is recognised by what stands before it
        del held[:keep]
        begin, searched = begin - keep, searched - keep
    documents, begin, _ = _cut(held, wanted, begin, searched, len(held))
    yield from documents
    yield bytes(held[begin:])


def _without_mark(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The chunks without the byte-order mark that may begin them."""
    head: bytes | None = b""
    for chunk in chunks:
        if head is None:
            yield chunk
            continue
        head += chunk
        if len(head) >= len(BOM):
            yield head.removeprefix(BOM)
            head = None
    if head:
        yield head.removeprefix(BOM)


def _cut(held: bytearray, wanted: Sequence[Mark], begin: int, searched: int, stop: int) -> tuple[list[bytes], int, int]:
    """(documents that end before `stop`, begin of the next one, where to search on)."""
    documents = []
    for first, end in spans(held, wanted, searched, stop):
        documents.append(bytes(held[begin : max(first, begin)]))
        begin = end
    return documents, begin, max(stop, begin, searched)


# ---------------------------------------------------------------------------------------- what was seen


@dataclass(frozen=True)
class Seen:
    """Marks in a stretch of text."""

    mark: str
    lines: int
    """How often it has a line for itself."""
    anywhere: int


def look(text: bytes, eos: str) -> list[Seen]:
    """The usual marks in a text, the likeliest first. A form feed counts only as a line of its own."""
    found = []
    for mark in dict.fromkeys((eos, *USUAL)):
        raw = mark.encode()
        anywhere = text.count(raw)
        if not anywhere:
            continue
        lines = len(spans(text, [Mark(raw, own_line=True)], 0, len(text)))
        if lines or (raw.startswith(b"<|") and raw.endswith(b"|>")) or mark == eos:
            found.append(Seen(mark, lines, anywhere))
    return sorted(found, key=lambda seen: (-seen.lines, -seen.anywhere))


def option(separator: str) -> str:
    """A separator as it is typed: control characters escaped, quoted for a shell where needed."""
    named = {value: "\\" + key for key, value in _ESCAPES.items()}
    return shlex.quote("".join(named.get(c, c) for c in separator))
