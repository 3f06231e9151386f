"""The fast encoder against the library that defines the ids, and what happens when it lies."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import corpora
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcore.data import encoder as module
from lmcore.data.documents import Documents, join
from lmcore.data.encoder import (
    TORTURE,
    BytesEncoder,
    EncodingStage,
    GigatokenEncoder,
    Record,
    ReferenceEncoder,
    append_eos,
    content_hashes,
    cut_at_words,
    open_encoder,
)
from lmcore.data.tokenizer import Tokenizer
from lmcore.errors import LmError

gigatoken = pytest.importorskip("gigatoken", reason="no wheel for this platform")
SMALL = Tokenizer.train(corpora.texts(50, seed=9), 400)
FAST = GigatokenEncoder(SMALL)


def batch_of(texts: list[str]) -> Documents:
    data, offsets = join([text.encode() for text in texts])
    count = len(texts)
    return Documents(data, offsets, np.zeros(count, np.uint32), np.arange(count), 0, 0, 0, count)


def ids_of(encode: Any, texts: list[str]) -> list[list[int]]:
    ids, offsets = encode(*join([text.encode() for text in texts]))
    return [ids[a:b].tolist() for a, b in itertools.pairwise(offsets)]


def test_torture_list_gives_the_library_s_ids() -> None:
    expected = [list(SMALL.reference.encode(text, add_special_tokens=False).ids) for text in TORTURE]
    assert ids_of(FAST, list(TORTURE)) == expected
    assert ids_of(ReferenceEncoder(SMALL), list(TORTURE)) == expected


@settings(max_examples=300, derandomize=True, deadline=None)
@given(texts=st.lists(st.text(alphabet=st.characters(codec="utf-8"), max_size=60), max_size=6))
def test_any_text_gives_the_library_s_ids(texts: list[str]) -> None:
    expected = [list(SMALL.reference.encode(text, add_special_tokens=False).ids) for text in texts]
    assert ids_of(FAST, texts) == expected


def test_a_slice_of_a_larger_buffer_is_encoded_as_such() -> None:
    data, offsets = join([text.encode() for text in ("one two", "three", "four five")])
    ids, cuts = FAST(data, offsets[1:])
    assert ids[cuts[0] : cuts[1]].tolist() == SMALL.encode("three")
    ids, cuts = BytesEncoder()(data, offsets[1:])
    assert bytes(ids[cuts[1] : cuts[2]].tolist()) == b"four five"


def test_cutting_long_documents_changes_no_id() -> None:
    text = " ".join(corpora.texts(60, seed=3)) + " \u65e5\u672c\u8a9e" * 50
    pieces = cut_at_words(text.encode(), 100)
    assert len(pieces) > 20
    assert b"".join(pieces) == text.encode()
    assert [n for piece in pieces for n in SMALL.encode(piece.decode())] == SMALL.encode(text)
    assert cut_at_words(b"a" * 1000, 100) == [b"a" * 1000]


def test_long_document_through_the_reference_equals_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(corpora.texts(60, seed=4))
    monkeypatch.setattr(module, "_CHUNK_BYTES", 1000)
    assert ids_of(ReferenceEncoder(SMALL), [text, "short"]) == [SMALL.encode(text), SMALL.encode("short")]


def test_stage_appends_eos_and_hashes_the_text() -> None:
    texts = ["one", "two three", "one"]
    encoded = open_encoder(SMALL, "auto", batch_of(texts))(batch_of(texts))
    assert encoded.ids.dtype == np.uint16
    expected = [[*SMALL.encode(text), SMALL.eos_id] for text in texts]
    assert [encoded.ids[a:b].tolist() for a, b in itertools.pairwise(encoded.offsets)] == expected
    assert encoded.hashes.tolist() == [corpora.reference_hash(text) for text in texts]
    assert encoded.sizes.tolist() == [3, 9, 3]


def test_threads_encode_side_by_side_and_get_the_same_ids() -> None:
    encoder = GigatokenEncoder(SMALL, copies=2)
    batches = [corpora.texts(5, seed=seed) for seed in range(40)]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda batch: ids_of(encoder, batch), batches))
    assert found == [ids_of(FAST, batch) for batch in batches]
    first, second = encoder._take(), encoder._take()
    assert first is not second
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(encoder._take)  # both copies are in use: no third one
        assert not wait([waiting], timeout=0.05).done
        encoder._idle.put(first)
        assert waiting.result(timeout=10) is first


def test_append_eos_and_hashes_on_nothing() -> None:
    for dtype in (np.dtype("<u2"), np.dtype("<u4")):
        assert append_eos(np.zeros(0, np.uint32), np.zeros(1, np.int64), 7, dtype).tolist() == []
        assert append_eos(np.zeros(0, np.uint32), np.zeros(3, np.int64), 7, dtype).tolist() == [7, 7]
        ids = np.array([70_000, 2, 3], np.uint32) if dtype.itemsize == 4 else np.array([65_535, 2, 3], np.uint32)
        eos = append_eos(ids, np.array([0, 1, 1, 3]), 7, dtype)
        assert eos.tolist() == [int(ids[0]), 7, 7, 2, 3, 7]
    assert content_hashes(np.zeros(0, np.uint8), np.zeros(1, np.int64)).tolist() == []


def test_byte_tokenizer_needs_no_encoder() -> None:
    stage = open_encoder(Tokenizer.byte(), "auto", None)
    assert stage.record.name == "bytes"
    assert stage(batch_of(["h\u00e9"])).ids.tolist() == [*"h\u00e9".encode(), 256]


class Liar:
    """A fast encoder that is wrong about one word."""

    name = "gigatoken"

    def __init__(self, tokenizer: Tokenizer, word: bytes = b"river", copies: int = 1) -> None:
        self._right, self._word = ReferenceEncoder(tokenizer), word

    def __call__(self, data: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64]) -> tuple[Any, Any]:
        ids, cuts = self._right(data, offsets)
        if self._word in data.tobytes():
            ids = ids.copy()
            ids[-1] ^= 1
        return ids, cuts


def test_a_mismatch_at_the_start_falls_back_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GigatokenEncoder", Liar)
    stage = open_encoder(SMALL, "auto", batch_of(["the river"]))
    assert stage.record.name == "tokenizers"
    assert "the river" in stage.record.fallback
    with pytest.raises(LmError, match="cannot be used"):
        open_encoder(SMALL, "gigatoken", batch_of(["the river"]))


def test_a_mismatch_during_the_run_is_found_by_the_audit(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = EncodingStage(SMALL, Liar(SMALL), Record("gigatoken", "0"))
    monkeypatch.setattr(module, "AUDIT_EVERY", 1)
    stage(batch_of(["no water"]))
    assert stage.record.audited_documents == 1
    with pytest.raises(LmError, match="disagree on the document in row 0 of unit 0"):
        stage(batch_of(["the river"]))


def test_audit_takes_a_fixed_share_by_content() -> None:
    stage = EncodingStage(SMALL, FAST, Record("gigatoken", "0"))
    texts = [f"document {k}" for k in range(20_000)]
    stage(batch_of(texts))
    expected = sum(corpora.reference_hash(text) % module.AUDIT_EVERY == 0 for text in texts)
    assert stage.record.audited_documents == expected > 0


def test_tokenizer_that_the_fast_encoder_cannot_load_falls_back(tmp_path: Path) -> None:
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    bare = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    bare.train_from_iterator(["a b c ab bc"], trainers.WordPieceTrainer(special_tokens=["[UNK]", "[SEP]"]))
    bare.save(str(tmp_path / "tokenizer.json"))
    stage = open_encoder(Tokenizer.from_file(tmp_path), "auto", None)
    assert stage.record.name == "tokenizers"
    assert stage.record.fallback
