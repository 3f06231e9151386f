"""How many bytes of text stand behind tokens: the divisor of bits per byte.

Where the bytes of the ids add up to the text (`Tokenizer.lossless`), each token has its own. Elsewhere the document
index knows the bytes of every document, and its tokens share them equally: exact for whole documents, near for the two
that a window cuts. Without either the number is unknown, and bits per byte with it: a tokenizer that lower-cases,
normalizes or adds blanks gives ids whose bytes are not those of the text.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lmcore.data.provenance import Locator, StreamDocuments
from lmcore.data.stream import TokenStream
from lmcore.data.tokenizer import Tokenizer
from lmcore.errors import LmError

Tokens = npt.NDArray[Any]
Places = npt.NDArray[np.int64]


class TextBytes(Protocol):
    """Bytes of text behind the tokens of one stream. Make one with `text_bytes`."""

    def count(self, tokens: Tokens, positions: Places) -> npt.NDArray[np.float64]:
        """Bytes behind tokens (any shape) at these positions of the stream (same shape)."""
        ...


def text_bytes(stream: TokenStream, tokenizer: Tokenizer | None) -> TextBytes | None:
    """The counter of a stream; None where the bytes cannot be known."""
    if tokenizer is None:
        return None
    if tokenizer.lossless:
        return _ByToken(np.array([len(raw) for raw in tokenizer.token_bytes()], np.float64))
    if stream.manifest is None or stream.manifest.source.get("document_hash") == "tokens":
        return None
    try:
        documents = Locator(stream).documents
    except LmError:  # no index
        return None
    return _ByDocument(documents) if documents.whole.all() else None


class _ByToken:
    """Each id has its own bytes. of_id: (vocabulary,)."""

    def __init__(self, of_id: npt.NDArray[np.float64]) -> None:
        self._of_id = np.append(of_id, 0.0)  # models may have more ids than the tokenizer

    def count(self, tokens: Tokens, positions: Places) -> npt.NDArray[np.float64]:
        return self._of_id[np.minimum(tokens, len(self._of_id) - 1)]


class _ByDocument:
    """The tokens of a document share the bytes of its text. Its EOS has none, unless there is nothing else."""

    def __init__(self, documents: StreamDocuments) -> None:
        tokens = np.maximum(documents.lengths - 1, 1)
        self._starts, self._eos = documents.starts, documents.starts + documents.lengths - 1
        self._share = documents.sizes / tokens
        self._of_eos = np.where(documents.lengths == 1, self._share, 0.0)

    def count(self, tokens: Tokens, positions: Places) -> npt.NDArray[np.float64]:
        document = np.searchsorted(self._starts, positions, "right") - 1
        return np.where(positions == self._eos[document], self._of_eos[document], self._share[document])
