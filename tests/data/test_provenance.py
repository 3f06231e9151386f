"""Every token leads to its document, and every document to its tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_sets import TinySet, blake8, random_documents, write_set

from lmcore.data.provenance import Locator, content_hash
from lmcore.data.split import split_set
from lmcore.data.stream import TokenStream
from lmcore.errors import LmError


def document_of_each_token(tiny: TinySet) -> np.ndarray:
    return np.repeat(np.arange(len(tiny.ids)), [len(i) for i in tiny.ids])


@settings(derandomize=True, max_examples=25, deadline=None)
@given(texts=st.lists(st.binary(max_size=5000), min_size=1, max_size=12), rows=st.integers(1, 2))
def test_every_token_of_a_set(tmp_path_factory: pytest.TempPathFactory, texts: list[bytes], rows: int) -> None:
    tiny = write_set(tmp_path_factory.mktemp("p") / "set", texts, rows=rows)
    locator = Locator(TokenStream.open(tiny.path))
    owner = document_of_each_token(tiny)
    starts = np.cumsum([0, *(len(i) for i in tiny.ids)])
    for position in sorted({0, len(owner) - 1, *range(0, len(owner), 97)}):
        origin = locator.at(position)
        assert (origin.row, origin.unit) == (owner[position], 0)
        assert (origin.start, origin.stop) == (starts[owner[position]], starts[owner[position] + 1])
        assert origin.token_in_document == position - origin.start
        assert int(origin.hash, 16) == blake8(texts[origin.row])
        assert tiny.stream[position] == np.load(tiny.path / f"{origin.shard}.npy").reshape(-1)[origin.offset]
    assert bool(locator.documents.whole.all())
    np.testing.assert_array_equal(locator.documents.lengths, [len(i) for i in tiny.ids])


@pytest.mark.parametrize("by", ["document", "shard", "rows"])
def test_every_token_of_a_view(make_set: Callable[..., TinySet], by: str) -> None:
    texts = random_documents(3, 60, 800)
    texts[10] = b"x" * 9000
    tiny = make_set(documents=texts, rows=1)
    split_set(tiny.path, {"val": 0.3}, by=by)  # type: ignore[arg-type]
    for view in ("train", "val"):
        stream = TokenStream.open(tiny.path / view)
        locator = Locator(stream)
        tokens = stream.read(0, len(stream))
        for position in range(0, len(stream), 53):
            origin = locator.at(position)
            text = texts[origin.row]
            inside = bytes(t for t in tokens[origin.start : origin.stop].tolist() if t < 256)
            assert inside in text
            assert (inside == text) or by == "rows" or len(text) > 2048
            if by == "document":
                assert inside == text


def test_windows_and_the_way_back(tiny_set: TinySet) -> None:
    locator = Locator(TokenStream.open(tiny_set.path))
    starts = np.cumsum([0, *(len(i) for i in tiny_set.ids)])
    found = locator.in_window(int(starts[5]) + 1, int(starts[9] - starts[5]))
    assert [o.row for o in found] == [5, 6, 7, 8, 9]
    n = len(tiny_set.stream)
    assert [o.row for o in locator.in_window(n - 1, 2)] == [59, 0]  # on the ring
    for k in (0, 17, 59):
        text = tiny_set.documents[k]
        assert [o.start for o in locator.by_text(text)] == [starts[k]]
        assert [o.start for o in locator.by_hash(f"{content_hash(text):016x}")] == [starts[k]]
    assert locator.by_text(b"never written") == []
    with pytest.raises(LmError, match="content hash"):
        locator.by_hash("xyz")
    with pytest.raises(LmError, match="the stream has tokens"):
        locator.at(n)


def test_duplicates_are_all_found(make_set: Callable[..., TinySet]) -> None:
    texts = random_documents(3, 10, 800)
    tiny = make_set(documents=[*texts, texts[4], *texts])
    assert [o.row for o in Locator(TokenStream.open(tiny.path)).by_text(texts[4])] == [4, 10, 15]


def test_what_cannot_be_traced_is_said(tiny_set: TinySet) -> None:
    with pytest.raises(LmError, match="array has no documents"):
        Locator(TokenStream.from_array(tiny_set.stream))


def test_tokenized_files_are_traced_to_their_source(tmp_path: Path) -> None:
    """The real tokenizer and reader: three files, JSON lines among them."""
    from lmcore.data.plan import TokenizeConfig
    from lmcore.data.tokenization import tokenize

    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.txt").write_text("The first text.")
    (corpus / "b.jsonl").write_text('{"text": "line one"}\n{"text": "line two"}\n')
    (corpus / "c.md").write_text("# Title\n\nzwei Worte\n" * 200)
    tokenize(TokenizeConfig(paths=(str(corpus),), tokenizer="byte"), tmp_path / "set")
    locator = Locator(TokenStream.open(tmp_path / "set"))
    (found,) = locator.by_source("b.jsonl", 1)
    assert found.source.endswith("corpus/b.jsonl")
    assert locator.source_text(found) == b"line two"
    assert locator.by_text(b"line two") == [found]
    assert locator.stream.read(found.start, found.stop - 1).astype(np.uint8).tobytes() == b"line two"
