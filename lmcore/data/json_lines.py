"""JSON lines, read alike wherever they stand: files, standard input, prompts, tasks.

A line ends at \\n and nowhere else: a carriage return, U+2028 or \\v inside of it is part of it. Blank lines are no
records but are counted, so that numbers are those of an editor. A byte-order mark is dropped at the start of every
line, because joining files puts one in the middle. What is not UTF-8, or not one JSON value per line, is named.

Values are those of the standard library's `json`; only numbers of thousands of digits, which it refuses for the time
that they take, become floats.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

BOM = b"\xef\xbb\xbf"
_LONGEST_INT = 4000


class BadLine(ValueError):
    """A line that is no JSON value. is_text: False when its bytes are not UTF-8."""

    def __init__(self, message: str, *, is_text: bool = True) -> None:
        super().__init__(message)
        self.is_text = is_text


def lines_of(block: bytes) -> list[bytes]:
    """Lines of a block, without their \\n."""
    lines = block.split(b"\n")  # not splitlines: a line may hold \r, \v or U+2028
    return lines[:-1] if lines[-1] == b"" else lines


def is_blank(line: bytes) -> bool:
    """Whether a line holds nothing: white space, or the mark that begins an empty file."""
    return not line.replace(BOM, b"").strip()


def parse_line(line: bytes, *, errors: str = "strict") -> Any:
    """The value of a line that is not blank. errors: what to do with bytes that are no UTF-8. Raises BadLine, and
    RecursionError when it is nested too deeply for the standard library."""
    try:
        text = line.decode("utf-8", errors).lstrip("\ufeff")
    except UnicodeDecodeError as error:
        kind = "UTF-16 text, not UTF-8" if line[:2] in (b"\xff\xfe", b"\xfe\xff") else "not UTF-8 text"
        raise BadLine(f"{kind} (byte {error.start:,} of the line)", is_text=False) from None
    try:
        return json.loads(text, parse_int=_int)
    except ValueError as error:
        why = str(error)
        if "\0" in text:
            why = "it holds NUL bytes: UTF-16, or a file that was not written to its end"
        elif "\r" in text.strip():
            why = "a carriage return inside of it; lines end in \\n"
        raise BadLine(f"not valid JSON ({why})") from None


def _int(digits: str) -> int | float:
    return int(digits) if len(digits) < _LONGEST_INT else float(digits)


def records(blocks: Iterable[bytes]) -> Iterator[tuple[int, Any]]:
    """(number of the line from 1, value) of every line of blocks that hold whole lines. Raises BadLine whose message
    begins with the number."""
    number = 0
    for block in blocks:
        for line in lines_of(block):
            number += 1
            if is_blank(line):
                continue
            try:
                yield number, parse_line(line)
            except RecursionError:
                raise BadLine(f"{number}: not valid JSON (nested too deeply)") from None
            except BadLine as error:
                raise BadLine(f"{number}: {error}", is_text=error.is_text) from None
