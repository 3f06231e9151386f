"""Token ids back to text while they arrive: characters are never cut, stop texts never show.

A character of UTF-8 may be spread over several tokens. `TextStream` holds back the bytes of an unfinished character
until the rest has come; what is still unfinished at the end of a text is dropped, since half a character is no text.
Bytes that can never become a character are shown as U+FFFD. A text that might be the beginning of a stop text is held
back too.

What each token adds comes from the tokenizer (`Tokenizer.speller`); special tokens add nothing and are invisible.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence


class TextStream:
    """Turns the tokens of one text into pieces of text that can be shown at once."""

    def __init__(self, speller: Callable[[int], bytes], stop: Sequence[str] = ()) -> None:
        """speller: the bytes that the next token adds."""
        self._speller = speller
        self._stop = tuple(text for text in stop if text)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.stopped = False
        """True once a stop text has appeared; nothing is returned after that."""

    def push(self, token: int) -> str:
        """Add one token; return the text that is now certain (often empty)."""
        if self.stopped:
            return ""
        self._held += self._decoder.decode(self._speller(token))
        found = [index for index in (self._held.find(text) for text in self._stop) if index >= 0]
        if found:
            self.stopped = True
            certain, self._held = self._held[: min(found)], ""
            return certain
        keep = _unfinished(self._held, self._stop)
        certain, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return certain

    def finish(self) -> str:
        """The end of the text: return what was held back, except an unfinished character."""
        certain, self._held = self._held, ""
        return certain


def _unfinished(text: str, stops: Sequence[str]) -> int:
    """Length of the longest ending of `text` with which one of `stops` begins (0 when there is none)."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        ending = text[-length:]
        if any(stop.startswith(ending) for stop in stops):
            return length
    return 0
