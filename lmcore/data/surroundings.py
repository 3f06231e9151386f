"""What stands in front of a document in training, so that a text is given to the model in the same way later.

`lm tokenize` ends each document with EOS and puts nothing in front of it. Data made elsewhere may begin every document
with BOS, and a model that was trained elsewhere saw what its own tokenizer puts in front. That a vocabulary has a BOS
says nothing: a model that never read it takes it for noise.
"""

from __future__ import annotations

import itertools

import numpy as np

from lmcore.data.stream import TokenStream
from lmcore.data.tokenizer import Tokenizer

_LOOKED_AT = 1 << 20  # tokens
_SHARE = 0.99


def opening_of_data(stream: TokenStream, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids that every document of the stream begins with: (BOS,) or nothing. Decided by the tokens themselves."""
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    if bos is None or bos == eos:
        return ()
    tokens = stream.read(0, min(len(stream), _LOOKED_AT))
    first = np.append(0, np.flatnonzero(tokens[:-1] == eos) + 1)  # places where a document begins
    return (bos,) if np.mean(tokens[first] == bos) >= _SHARE else ()


def opening_of_tokenizer(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids that the tokenizer's own post-processor puts in front of a text, as a model of its home program saw them."""
    encoding = tokenizer.reference.encode("a", add_special_tokens=True)
    marked = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
    return tuple(number for number, _ in itertools.takewhile(lambda pair: pair[1] == 1, marked))
