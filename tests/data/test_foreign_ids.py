"""Headerless ids are read in the one way that is plausible or asked about; what lies beside them and what is empty is
said."""

from __future__ import annotations

import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcore.data.adopt import adopt
from lmcore.data.foreign import recognise
from lmcore.data.manifest import read_manifest
from lmcore.data.stream import TokenStream
from lmcore.data.tokenizer import Tokenizer
from lmcore.data.validate import validate
from lmcore.errors import Exit, LmError


def ids_of(path: Path) -> np.ndarray:
    stream = TokenStream.open(path)
    return np.asarray(stream.read(0, len(stream)))


def zipf(rng: np.random.Generator, count: int, vocabulary: int) -> np.ndarray:
    """Ids as texts have them: small ones often, all of a vocabulary now and then."""
    return np.minimum(vocabulary * rng.random(count) ** 4, vocabulary - 1).astype(np.int64)


@settings(max_examples=150, derandomize=True, deadline=None)
@given(
    dtype=st.sampled_from(["<u2", "<u4", "<i4", "<i8", "<u2", ">u2", ">u4", "u1"]),
    vocabulary=st.sampled_from([1, 2, 4, 20, 65, 256, 257, 1000, 32_000, 50_257, 65_536, 128_256, 262_144]),
    count=st.sampled_from([1, 2, 3, 8, 63, 64, 130, 999, 4096, 20_000]),
    likely=st.booleans(),
    seed=st.integers(0, 3),
)
def test_a_guess_is_right_or_is_asked(
    tmp_path_factory: pytest.TempPathFactory, dtype: str, vocabulary: int, count: int, likely: bool, seed: int
) -> None:
    kind = np.dtype(dtype)
    if vocabulary > 256 ** min(kind.itemsize, 3):
        return
    rng = np.random.default_rng(seed)
    ids = zipf(rng, count, vocabulary) if likely else rng.integers(0, vocabulary, count)
    path = tmp_path_factory.mktemp("raw") / "ids.bin"
    ids.astype(kind).tofile(path)
    found = recognise(path)
    if found.faults:
        assert found.faults[0].code in ("V205", "V207")
        if found.faults[0].code == "V207":
            assert "--width" in found.faults[0].message
    elif kind.byteorder == ">" or kind.itemsize == 1:
        # Bytes in another order look like other ids; they are seen where there is something to see.
        assert count < 2048 or vocabulary > 256 or not likely
    else:
        np.testing.assert_array_equal(found.files[0].array(), ids)
        assert f"of {kind.itemsize} bytes each" in found.remarks[0]
    if kind.byteorder != ">":
        np.testing.assert_array_equal(recognise(path, kind.itemsize).files[0].array(), ids)


@pytest.mark.parametrize("vocabulary", [65, 257, 1000, 32_000, 50_257])
@pytest.mark.parametrize("dtype", ["<u2", "<u4", "<i8"])
def test_usual_data_need_no_width(tmp_path: Path, vocabulary: int, dtype: str) -> None:
    ids = zipf(np.random.default_rng(1), 50_000, vocabulary)
    ids.astype(dtype).tofile(tmp_path / "train.bin")
    found = recognise(tmp_path)
    assert not found.faults
    np.testing.assert_array_equal(found.files[0].array(), ids)


def test_large_vocabularies_of_four_bytes_need_no_width(tmp_path: Path) -> None:
    ids = zipf(np.random.default_rng(1), 50_000, 128_256)
    ids.astype("<u4").tofile(tmp_path / "train.bin")
    np.testing.assert_array_equal(recognise(tmp_path).files[0].array(), ids)


@pytest.mark.parametrize("dtype", [">u2", ">u4", ">i4"])
def test_big_endian_ids_are_not_read_as_others(tmp_path: Path, dtype: str) -> None:
    zipf(np.random.default_rng(1), 50_000, 50_257).astype(dtype).tofile(tmp_path / "train.bin")
    (fault,) = recognise(tmp_path).faults
    assert (fault.code, "big-endian" in fault.message) == ("V207", True)


def test_a_question_says_both_readings_and_a_command_that_answers(tmp_path: Path) -> None:
    ids = np.array([0, 1, 3, 0, 2, 0, 0, 1], "<u2")
    ids.tofile(tmp_path / "ids.bin")
    with pytest.raises(LmError) as caught:
        adopt(tmp_path / "ids.bin", tmp_path / "set")
    assert caught.value.code == Exit.DATA
    assert "8 ids of 2 bytes up to 3, or 4 ids of 4 bytes up to 65,536" in caught.value.message
    assert f"lm import {tmp_path / 'ids.bin'} --out shards/NAME --width 2" in caught.value.hint
    assert {f.code for f in validate(tmp_path / "ids.bin").findings} == {"V207"}
    adopt(tmp_path / "ids.bin", tmp_path / "set", width=2)
    np.testing.assert_array_equal(ids_of(tmp_path / "set"), ids)


def test_files_of_one_folder_have_one_width(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    train, val = zipf(np.random.default_rng(1), 5000, 1000), np.array([5, 0, 7, 0])
    train.astype("<u2").tofile(tmp_path / "data/train.bin")
    val.astype("<u2").tofile(tmp_path / "data/val.bin")
    adopt(tmp_path / "data", tmp_path / "set")
    np.testing.assert_array_equal(ids_of(tmp_path / "set/train"), train)
    np.testing.assert_array_equal(ids_of(tmp_path / "set/val"), val)


@pytest.mark.parametrize("first", [128, 640, 0x0380, 0x8080])
def test_an_id_that_begins_like_a_pickle_is_an_id(tmp_path: Path, first: int) -> None:
    ids = np.array([first, *range(1000, 1300)], "<u2")
    ids.tofile(tmp_path / "ids.bin")
    np.testing.assert_array_equal(recognise(tmp_path / "ids.bin").files[0].array(), ids)


def test_what_lies_beside_ids_is_named_and_not_opened(tmp_path: Path) -> None:
    source = tmp_path / "chars"
    source.mkdir()
    rng = np.random.default_rng(0)
    train, val = rng.integers(0, 65, 5000), rng.integers(0, 65, 600)
    train.astype("<u2").tofile(source / "train.bin")
    val.astype("<u2").tofile(source / "val.bin")
    (source / "meta.pkl").write_bytes(pickle.dumps(Trap(source / "sprung")))
    (source / "input.txt").write_text("the text")
    (source / "deep").mkdir()
    before = sorted(os.listdir(source))
    assert validate(source).ok
    reports = adopt(source, tmp_path / "set")
    assert sorted(os.listdir(source)) == before
    np.testing.assert_array_equal(ids_of(tmp_path / "set/train"), train)
    np.testing.assert_array_equal(ids_of(tmp_path / "set/val"), val)
    said = " ".join(reports[0].warnings)
    for part in (
        "meta.pkl: a pickle is never opened, so the vocabulary in it is not read",
        "left out: deep/, input.txt",
    ):
        assert part in said


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_a_stray_file_that_joins_train_and_val_is_named(tmp_path: Path) -> None:
    for name in ("train", "val", "extra"):
        zipf(np.random.default_rng(1), 500, 1000).astype("<u2").tofile(tmp_path / f"{name}.bin")
    found = recognise(tmp_path)
    assert list(found.groups()) == [""]
    assert "extra.bin is named for none of them" in " ".join(found.remarks)


# ---------------------------------------------------------------------------------------- documents without tokens


def documents_of(lengths: list[int]) -> list[np.ndarray]:
    rng = np.random.default_rng(len(lengths))
    return [rng.integers(0, 256, length).astype("<u2") for length in lengths]


def megatron(folder: Path, documents: list[np.ndarray]) -> None:
    lengths = np.array([len(d) for d in documents], np.int64)
    np.concatenate([*documents, np.zeros(0, "<u2")]).tofile(folder / "a.bin")
    pointers = np.concatenate([[0], np.cumsum(lengths)])[:-1] * 2
    (folder / "a.idx").write_bytes(
        b"MMIDIDX\0\0"
        + struct.pack("<QBQQ", 1, 8, len(lengths), len(lengths) + 1)
        + lengths.astype("<i4").tobytes()
        + pointers.astype("<i8").tobytes()
        + np.arange(len(lengths) + 1, dtype="<i8").tobytes()
    )


def datatrove(folder: Path, documents: list[np.ndarray]) -> None:
    ends = np.cumsum([len(d) for d in documents])
    np.concatenate([*documents, np.zeros(0, "<u2")]).tofile(folder / "a.ds")
    ends.astype("<u8").tofile(folder / "a.ds.index")
    (folder / "a.ds.metadata").write_text(f"gpt2|2\n{ends[-1] if len(ends) else 0}")


@pytest.mark.parametrize("write", [megatron, datatrove])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("lengths", [[0, 3, 4], [3, 4, 0], [3, 0, 0, 4], [0, 0, 5, 0, 0, 2, 0], [7]])
def test_empty_documents_are_none_wherever_they_stand(
    tmp_path: Path, write: object, known: bool, lengths: list[int]
) -> None:
    documents = documents_of(lengths)
    (tmp_path / "in").mkdir()
    write(tmp_path / "in", documents)  # type: ignore[operator]
    full = [d for d in documents if len(d)]
    seen = validate(tmp_path / "in")
    assert (seen.ok, seen.sets[0].n_docs) == (True, len(full)), seen.findings
    (report,) = adopt(tmp_path / "in", tmp_path / "set", tokenizer=Tokenizer.byte() if known else None)
    expected = np.concatenate([np.append(d, 256) if known else d for d in full])
    np.testing.assert_array_equal(ids_of(tmp_path / "set"), expected)
    assert (report.n_docs, read_manifest(tmp_path / "set").n_docs) == (len(full), len(full))
    assert validate(tmp_path / "set").ok
    empty = len(documents) - len(full)
    assert any(f"{empty:,} documents hold no token" in w for w in report.warnings) == bool(empty)
    index = np.load(tmp_path / "set/shard-00000.docs.npy")
    assert index["row"].tolist() == [k for k, length in enumerate(lengths) if length]


@pytest.mark.parametrize("write", [megatron, datatrove])
def test_a_file_without_tokens_is_left_out_or_refused(tmp_path: Path, write: object) -> None:
    for name, lengths in (("empty", [0, 0]), ("none", [])):
        folder = tmp_path / name
        folder.mkdir()
        write(folder, documents_of(lengths))  # type: ignore[operator]
        assert not validate(folder).ok
        with pytest.raises(LmError) as caught:
            adopt(folder, tmp_path / "set")
        assert caught.value.code == Exit.DATA
        for file in list(folder.iterdir()):
            file.rename(file.with_name(file.name.replace("a.", "z.", 1)))
        write(folder, documents_of([4]))  # type: ignore[operator]
        (report,) = adopt(folder, tmp_path / f"set-{name}")
        assert (report.n_tokens, report.n_docs) == (4, 1)
        assert any("1 files hold no token" in w for w in report.warnings)


@pytest.mark.parametrize("said", ["gpt2|3\n", "gpt2\n", "", "gpt2|two\n"])
def test_a_size_that_metadata_do_not_say_is_not_made_up(tmp_path: Path, said: str) -> None:
    datatrove(tmp_path, documents_of([5, 6]))
    (tmp_path / "a.ds.metadata").write_text(said)
    with pytest.raises(LmError, match="does not say the size of an id"):
        adopt(tmp_path, tmp_path / "set")
    (tmp_path / "a.ds.metadata").unlink()  # the index says it, too
    adopt(tmp_path, tmp_path / "set")
    assert len(ids_of(tmp_path / "set")) == 11
