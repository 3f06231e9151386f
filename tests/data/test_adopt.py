"""Foreign token data is recognised, judged, and adopted without changing a token."""

from __future__ import annotations

import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_sets import TinySet, random_documents

from lmcore.data.adopt import adopt
from lmcore.data.manifest import read_manifest
from lmcore.data.provenance import Locator
from lmcore.data.split import split_set
from lmcore.data.stream import TokenStream
from lmcore.data.tokenizer import Tokenizer
from lmcore.data.validate import validate
from lmcore.errors import Exit, LmError

TEXTS = random_documents(1, 50, 900)
IDS = np.concatenate([np.array([*t, 256], np.uint16) for t in TEXTS])
LENGTHS = np.array([len(t) + 1 for t in TEXTS])


def nanogpt(d: Path) -> None:
    IDS.tofile(d / "data.bin")


def wide(d: Path) -> None:
    IDS.astype("<u4").tofile(d / "data.bin")


def raw_npy(d: Path) -> None:
    IDS.tofile(d / "part-0-00000.npy")


def llmc(d: Path, magic: int = 20240520, dtype: str = "<u2") -> None:
    header = np.zeros(256, "<i4")
    header[:3] = magic, 1, len(IDS)
    (d / "data.bin").write_bytes(header.tobytes() + IDS.astype(dtype).tobytes())


def llmc_wide(d: Path) -> None:
    llmc(d, 20240801, "<u4")


def megatron(d: Path, ids: np.ndarray = IDS, lengths: np.ndarray = LENGTHS, code: int = 8, dtype: str = "<u2") -> None:
    ids.astype(dtype).tofile(d / "corpus_text_document.bin")
    pointers = np.concatenate([[0], np.cumsum(lengths)[:-1]]) * np.dtype(dtype).itemsize
    (d / "corpus_text_document.idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, code, len(lengths), len(lengths) + 1)
        + lengths.astype("<i4").tobytes()
        + pointers.astype("<i8").tobytes()
        + np.arange(len(lengths) + 1, dtype="<i8").tobytes()
    )


def megatron_int32(d: Path) -> None:
    megatron(d, code=4, dtype="<i4")


def datatrove(d: Path) -> None:
    half = len(TEXTS) // 2
    for number, (a, b) in enumerate([(0, half), (half, len(TEXTS))]):
        ends = np.cumsum(LENGTHS[a:b])
        start = LENGTHS[:a].sum()
        name = f"{number:05d}_tokens.ds"
        IDS[start : start + ends[-1]].tofile(d / name)
        ends.astype("<u8").tofile(d / f"{name}.index")
        (d / f"{name}.metadata").write_text(f"gpt2|2\n{ends[-1]}\n20K")


def flat_npy(d: Path) -> None:
    np.save(d / "tokens.npy", IDS)


def int64_npy(d: Path) -> None:
    np.save(d / "tokens.npy", IDS.astype(np.int64))


def tensor(d: Path) -> None:
    import torch

    torch.save(torch.from_numpy(IDS.astype(np.int64)), d / "tokens.pt")


FORMATS: dict[str, tuple[Callable[[Path], None], str]] = {
    f.__name__: (f, kind)
    for f, kind in [
        (nanogpt, "raw"),
        (wide, "raw"),
        (raw_npy, "raw"),
        (llmc, "llm.c"),
        (llmc_wide, "llm.c"),
        (megatron, "megatron"),
        (megatron_int32, "megatron"),
        (datatrove, "ds"),
        (flat_npy, "npy"),
        (int64_npy, "npy"),
        (tensor, "pt"),
    ]
}


@pytest.mark.parametrize(
    ("name", "known"),
    # A .pt file costs an import of torch in a child each time; its other forms are in test_tensor_file.py.
    [(name, known) for name in FORMATS for known in (True, False) if known or name != "tensor"],
)
def test_adopted_tokens_are_the_foreign_tokens(tmp_path: Path, name: str, known: bool) -> None:
    write, kind = FORMATS[name]
    source, out = tmp_path / "source", tmp_path / "set"
    source.mkdir()
    write(source)
    before = {p.name: p.read_bytes() for p in source.iterdir()}
    seen = validate(source)
    assert seen.ok
    assert seen.sets[0].kind == f"foreign: {kind}"
    assert seen.sets[0].n_tokens == len(IDS)
    assert {"V201"} <= {f.code for f in seen.findings} <= {"V201", "V202", "V104"}
    assert ("V202" in {f.code for f in seen.findings}) == (name == "raw_npy")

    (report,) = adopt(source, out, tokenizer=Tokenizer.byte() if known else None)
    stream = TokenStream.open(out)
    np.testing.assert_array_equal(stream.read(0, len(stream)), IDS)
    checked = validate(out)
    assert checked.ok, checked.findings
    assert before == {p.name: p.read_bytes() for p in source.iterdir()}
    manifest = read_manifest(out)
    if known:
        assert report.n_docs == len(TEXTS)
        assert manifest.n_bytes == sum(map(len, TEXTS))
        origin = Locator(stream).at(int(LENGTHS[:7].sum()) + 3)
        assert (origin.row if name != "datatrove" else 7, origin.token_in_document) == (7, 3)
        assert source.name in origin.source
        assert Locator(stream).by_text(TEXTS[31])[0].start == LENGTHS[:31].sum()
        assert split_set(out, {"val": 0.3}).leakage == "none"
        assert validate(out, "deep").sets[0].statistics.decoded_documents == len(TEXTS)  # type: ignore[union-attr]
    else:
        assert manifest.tokenizer is None
        documents = name in ("megatron", "megatron_int32", "datatrove")
        assert report.n_docs == (len(TEXTS) if documents else 0)
        assert any("tokenizer is unknown" in w for w in report.warnings)
        assert split_set(out, {"val": 0.3}).leakage == ("none" if documents else "unverifiable")


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_rows_that_are_shards_already_are_linked(tmp_path: Path, dtype: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    rows = IDS[: len(IDS) // 64 * 64].reshape(-1, 64).astype(dtype)
    for number, start in enumerate(range(0, len(rows), 100)):
        np.save(source / f"shard_{number}.npy", rows[start : start + 100])
    seen = validate(source)
    assert any("linked, no byte copied" in f.message for f in seen.findings)
    (report,) = adopt(source, tmp_path / "set", tokenizer=Tokenizer.byte())
    assert (report.linked, report.converted) == (len(list(source.iterdir())), 0)
    for file in (tmp_path / "set").glob("shard-0000[0-9].npy"):
        assert file.is_symlink()
    stream = TokenStream.open(tmp_path / "set")
    np.testing.assert_array_equal(stream.read(0, len(stream)), rows.reshape(-1))
    assert read_manifest(tmp_path / "set").seq_len == 64
    assert validate(tmp_path / "set").ok  # the last document has no EOS, and the set says so
    split_set(tmp_path / "set", {"val": 0.3})
    os.rename(source, tmp_path / "elsewhere")
    assert {f.code for f in validate(tmp_path / "set").findings} >= {"V010"}
    (copied,) = adopt(tmp_path / "elsewhere", tmp_path / "copy", copy=True)
    assert copied.linked == 0
    assert not any(p.is_symlink() for p in (tmp_path / "copy").iterdir())


def test_files_are_taken_in_natural_order(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for number in (2, 10, 1):
        np.full((3, 16), number, np.uint16).tofile(source / f"part-{number}.bin")
    adopt(source, tmp_path / "set", width=2)
    stream = TokenStream.open(tmp_path / "set")
    assert stream.read(0, len(stream))[::48].tolist() == [1, 2, 10]


def test_train_and_val_files_become_two_sets(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    IDS[:9000].tofile(source / "train.bin")
    IDS[9000:].tofile(source / "val.bin")
    reports = adopt(source, tmp_path / "set", tokenizer=Tokenizer.byte())
    assert [r.path.name for r in reports] == ["train", "val"]
    assert [r.n_tokens for r in reports] == [9000, len(IDS) - 9000]


def test_documents_without_eos_get_one(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    bare = np.concatenate([np.array([*t], np.uint16) for t in TEXTS])
    megatron(source, bare, LENGTHS - 1)
    (report,) = adopt(source, tmp_path / "set", tokenizer=Tokenizer.byte())
    stream = TokenStream.open(tmp_path / "set")
    np.testing.assert_array_equal(stream.read(0, len(stream)), IDS)
    assert any("EOS" in w for w in report.warnings)
    assert validate(tmp_path / "set", "deep").ok


class Payload:
    """Unpickling this writes a file: a canary."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (open, (str(self.path), "w"))


def damaged_idx(d: Path) -> None:
    megatron(d)
    file = d / "corpus_text_document.idx"
    file.write_bytes(file.read_bytes()[:60])


def idx_points_outside(d: Path) -> None:
    megatron(d, IDS[:100])


def wrong_index(d: Path) -> None:
    datatrove(d)
    np.array([5, 4], "<u8").tofile(d / "00000_tokens.ds.index")


def short_llmc(d: Path) -> None:
    llmc(d)
    os.truncate(d / "data.bin", 3000)


def cut_npy(d: Path) -> None:
    flat_npy(d)
    os.truncate(d / "tokens.npy", 1001)


def object_npy(d: Path) -> None:
    np.save(d / "tokens.npy", np.array([Payload(d / "canary")], object), allow_pickle=True)


def plain_pickle(d: Path) -> None:
    (d / "tokens.pkl").write_bytes(pickle.dumps(Payload(d / "canary")))


def disguised_pickle(d: Path) -> None:
    (d / "tokens.npy").write_bytes(pickle.dumps(Payload(d / "canary"), protocol=4))


def huge_npy(d: Path) -> None:
    header = b"{'descr': '<u2', 'fortran_order': False, 'shape': (10000000000000,), }".ljust(117) + b"\n"
    (d / "tokens.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)


def code_in_header(d: Path) -> None:
    header = (
        b"{'descr': __import__('os').system('touch canary'), 'fortran_order': False, 'shape': (1,)}".ljust(117) + b"\n"
    )
    (d / "tokens.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)


FAULTY: dict[str, tuple[Callable[[Path], object], str]] = {
    "floats": (lambda d: np.save(d / "x.npy", np.ones(9)), "V204"),
    "big-endian": (lambda d: np.save(d / "x.npy", IDS.astype(">u2")), "V204"),
    "Fortran order": (lambda d: np.save(d / "x.npy", np.asfortranarray(IDS[:64].reshape(8, 8))), "V204"),
    "three dimensions": (lambda d: np.save(d / "x.npy", IDS[:64].reshape(4, 4, 4)), "V204"),
    "negative": (lambda d: np.save(d / "x.npy", np.arange(-1, 50)), "V204"),
    "empty file": (lambda d: (d / "x.bin").write_bytes(b""), "V205"),
    "odd size": (lambda d: (d / "x.bin").write_bytes(b"abc"), "V205"),
    "cut array": (cut_npy, "V205"),
    "a header of 20 TB": (huge_npy, "V205"),
    "code in a header": (code_in_header, "V205"),
    "cut llm.c": (short_llmc, "V205"),
    "cut idx": (damaged_idx, "V205"),
    "idx points outside": (idx_points_outside, "V205"),
    "wrong ds index": (wrong_index, "V205"),
    "object array": (object_npy, "V206"),
    "a pickle": (plain_pickle, "V206"),
    "a pickle named npy": (disguised_pickle, "V206"),
    "nothing": (lambda d: (d / "readme.txt").write_text("hello"), "V200"),
}


@pytest.mark.parametrize("name", FAULTY)
def test_faulty_foreign_data_is_named_and_not_adopted(tmp_path: Path, name: str) -> None:
    write, code = FAULTY[name]
    source = tmp_path / "source"
    source.mkdir()
    write(source)
    (source / "canary").unlink(missing_ok=True)  # made while pickling, if at all
    report = validate(source)
    assert not report.ok
    assert code in {f.code for f in report.findings}
    with pytest.raises(LmError) as caught:
        adopt(source, tmp_path / "set")
    assert caught.value.code == Exit.DATA
    assert not (source / "canary").exists()
    assert not Path("canary").exists()
    assert not (tmp_path / "set").exists()


def test_files_of_different_form_are_an_error(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    np.save(source / "a.npy", np.zeros((4, 32), np.uint16))
    np.save(source / "b.npy", np.zeros((4, 64), np.uint16))
    assert "V203" in {f.code for f in validate(source).findings}


def test_the_wrong_tokenizer_or_width_is_seen(tmp_path: Path) -> None:
    (IDS.astype("<u2") + 1000).astype("<u2").tofile(tmp_path / "data.bin")
    with pytest.raises(LmError, match="the tokenizer byte has 257"):
        adopt(tmp_path / "data.bin", tmp_path / "set", tokenizer=Tokenizer.byte())
    with pytest.raises(LmError, match="1, 2, 4 or 8"):
        adopt(tmp_path / "data.bin", tmp_path / "set", width=3)


def test_refusals(tmp_path: Path, tiny_set: TinySet) -> None:
    with pytest.raises(LmError, match="no such file"):
        adopt(tmp_path / "nothing", tmp_path / "set2")
    with pytest.raises(LmError, match="a shard set already"):
        adopt(tiny_set.path, tmp_path / "set2")
    nanogpt(tmp_path)
    with pytest.raises(LmError) as caught:
        adopt(tmp_path / "data.bin", tiny_set.path)
    assert caught.value.code == Exit.CANNOT_CREATE
    assert validate(tiny_set.path).ok
