"""Damaged inputs of every kind give documents or one sentence, at once and in little memory."""

from __future__ import annotations

import gzip
import io
import json
import random
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from lmcore.data.foreign import id_range, recognise, require_readable
from lmcore.data.readers import OnBad, check_columns, read
from lmcore.data.sources import Reading, resolve
from tests.fuzz.edges import damaged_edges
from tests.fuzz.harness import SEEDS, Target, check, temporary_root
from tests.fuzz.mutators import damaged_bytes

TEXTS = [f"document {k} " * (k % 7 + 1) for k in range(60)]
LINES = "".join(json.dumps({"text": text, "n": k}) + "\n" for k, text in enumerate(TEXTS)).encode()
IDS = np.arange(2000, dtype="<u2") % 300


def table(kind: str) -> bytes:
    made = pa.table({"id": range(60), "meta": [{"text": text} for text in TEXTS], "text": TEXTS})
    sink = io.BytesIO()
    if kind == "parquet":
        pq.write_table(made, sink, row_group_size=20, compression="zstd")
        return sink.getvalue()
    with (pa.ipc.new_file if kind == "arrow" else pa.ipc.new_stream)(sink, made.schema) as writer:
        writer.write_table(made, max_chunksize=20)
    return sink.getvalue()


def npy() -> bytes:
    sink = io.BytesIO()
    np.save(sink, IDS.reshape(-1, 100))
    return sink.getvalue()


def llmc() -> bytes:
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(IDS)
    return header.tobytes() + IDS.tobytes()


def index() -> bytes:
    lengths = np.full(20, 100)
    pointers = np.arange(20) * 200
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 20, 21)
    return (
        head + lengths.astype("<i4").tobytes() + pointers.astype("<i8").tobytes() + np.arange(21, dtype="<i8").tobytes()
    )


TEXT_FILES: dict[str, bytes] = {
    "a.jsonl": LINES,
    "a.jsonl.gz": gzip.compress(LINES),
    "a.jsonl.zst": zstandard.compress(LINES),
    "a.txt.zst": zstandard.compress("\n<|endoftext|>\n".join(TEXTS).encode()),
    "a.parquet": table("parquet"),
    "a.arrow": table("arrow"),
    "a.feather": table("stream"),
}
ID_FILES: dict[str, tuple[bytes, dict[str, bytes]]] = {
    "a.npy": (npy(), {}),
    "a.bin": (llmc(), {}),
    "m.idx": (index(), {"m.bin": IDS.tobytes()}),
    "d.ds.index": (np.arange(100, 2001, 100, dtype="<u8").tobytes(), {"d.ds": IDS.tobytes()}),
    "d.ds.metadata": (b"gpt2|2\n2000\n2K", {"d.ds": IDS.tobytes()}),
}


def read_text(path: Path, on_bad: OnBad) -> None:
    units = resolve(None, [str(path)]).units
    check_columns(units, "text")
    for batch in read(units, "text", on_bad=on_bad):
        for k in range(len(batch)):
            batch.text(k).decode()


def read_ids(path: Path) -> None:
    found = recognise(path)
    require_readable(found)
    for file in found.files:
        id_range(file)
        assert file.lengths is None or int(file.lengths.sum()) == file.n_tokens


def targets(root: Path) -> dict[str, Target]:
    found = {}
    for name in TEXT_FILES:
        file = root / name
        found[name] = Target(
            file, either, tuple(lambda f=file, b=bad: read_text(f, b) for bad in ("stop", "skip", "repair"))
        )
    for name in ID_FILES:
        folder = root / name.replace(".", "-")
        found[name] = Target(folder / name, either, (lambda folder=folder: read_ids(folder),))
    return found


def either(raw: bytes, rng: random.Random) -> bytes:
    return damaged_bytes(raw, rng) if rng.random() < 0.5 else damaged_edges(raw, rng)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = temporary_root(tmp_path_factory.mktemp("fuzz"), "foreign-files")
    for name, raw in TEXT_FILES.items():
        (root / name).write_bytes(raw)
    for name, (raw, beside) in ID_FILES.items():
        folder = root / name.replace(".", "-")
        folder.mkdir()
        for other, content in {name: raw, **beside}.items():
            (folder / other).write_bytes(content)
    try:
        yield root
    finally:
        shutil.rmtree(root, ignore_errors=True)


KINDS = list(targets(Path("nowhere")))


@pytest.mark.parametrize("name", KINDS)
def test_damaged_files_are_read_or_refused(name: str, place: Path) -> None:
    check(name, targets(place)[name], range(SEEDS))


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", KINDS)
def test_many_damaged_files_are_read_or_refused(name: str, place: Path) -> None:
    check(name, targets(place)[name], range(SEEDS, 11 * SEEDS))


def test_every_file_is_sound_before_it_is_damaged(place: Path) -> None:
    for name in TEXT_FILES:
        units = resolve(None, [str(place / name)], reading=Reading()).units
        found = [batch.text(k).decode() for batch in read(units, "text") for k in range(len(batch))]
        assert found == (["\n<|endoftext|>\n".join(TEXTS)] if "txt" in name else TEXTS)
    for name in ID_FILES:
        (file,) = recognise(place / name.replace(".", "-")).files
        np.testing.assert_array_equal(file.array(), IDS)
