"""Damaged inputs of every kind give documents or one sentence, at once and in little memory."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from damage import damaged
from tiny_sets import TinySet, write_manifest

from lmcore.data.foreign import id_range, recognise
from lmcore.data.provenance import Locator
from lmcore.data.readers import check_columns, read
from lmcore.data.sources import Reading, resolve
from lmcore.data.split import split_set
from lmcore.data.stream import TokenStream
from lmcore.errors import LmError

SEEDS = int(os.environ.get("LMSHARDS_FUZZ", "1")) * 300
LONGEST_S = 5.0
MOST_BYTES = 500 << 20

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


def read_text(path: Path) -> None:
    for on_bad in ("stop", "skip", "repair"):
        try:
            units = resolve(None, [str(path)]).units
            check_columns(units, "text")
            for batch in read(units, "text", on_bad=on_bad):
                for k in range(len(batch)):
                    batch.text(k).decode()
        except LmError as error:
            _require_a_sentence(error)


def read_ids(path: Path) -> None:
    try:
        for file in recognise(path).files:
            id_range(file)
            assert file.lengths is None or int(file.lengths.sum()) == file.n_tokens
    except LmError as error:
        _require_a_sentence(error)


def _require_a_sentence(error: LmError) -> None:
    assert len(error.message) < 3000


def feed(file: Path, sound: bytes, read_it: Callable[[], None], seeds: int) -> list[str]:
    failures = []
    for seed in range(seeds):
        raw = damaged(sound, seed)
        file.write_bytes(raw)
        began = time.monotonic()
        try:
            read_it()
        except BaseException as error:
            failures.append(f"seed {seed}: {type(error).__name__}: {error!s:.200}")
        if time.monotonic() - began > LONGEST_S:
            failures.append(f"seed {seed}: {time.monotonic() - began:.1f} s")
        if len(failures) > 4:
            break
    return failures


@pytest.mark.parametrize("name", TEXT_FILES)
def test_damaged_text_is_read_or_refused(tmp_path: Path, name: str) -> None:
    failures = feed(tmp_path / name, TEXT_FILES[name], lambda: read_text(tmp_path / name), SEEDS)
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("name", ID_FILES)
def test_damaged_ids_are_read_or_refused(tmp_path: Path, name: str) -> None:
    sound, beside = ID_FILES[name]
    for other, raw in beside.items():
        (tmp_path / other).write_bytes(raw)
    failures = feed(tmp_path / name, sound, lambda: read_ids(tmp_path), SEEDS)
    assert not failures, "\n".join(failures)


def test_a_damaged_index_whose_hash_fits_is_refused_or_means_what_it_says(make_set: Callable[..., TinySet]) -> None:
    """Whoever rewrites an index can rewrite its hash: what is built on it must not rest on the hash alone."""
    tiny = make_set()
    sound = {path: path.read_bytes() for path in sorted(tiny.path.glob("*.docs.npy"))}
    failures = []
    for seed in range(SEEDS // 3):
        manifest = tiny.manifest
        for number, (path, raw) in enumerate(sound.items()):
            begin = 10 + int.from_bytes(raw[8:10], "little")
            header, records = raw[:begin], damaged(raw[begin:], 1000 * number + seed)
            records = records[: len(raw) - begin].ljust(len(raw) - begin, b"\0")
            path.write_bytes(header + records)
            manifest["shards"][number]["docs_sha256"] = hashlib.sha256(header + records).hexdigest()
        write_manifest(tiny.path, manifest)
        try:
            locator = Locator(TokenStream.open(tiny.path))
            origin = locator.at(len(tiny.stream) // 2)
            assert origin.start <= len(tiny.stream) // 2 < origin.stop
            locator.by_source("nothing", 3)
            split_set(tiny.path, {"val": 0.2})
        except LmError as error:
            _require_a_sentence(error)
        except BaseException as error:
            failures.append(f"seed {seed}: {type(error).__name__}: {error!s:.200}")
        for view in ("train", "val"):
            shutil.rmtree(tiny.path / view, ignore_errors=True)
    assert not failures, "\n".join(failures[:5])


def test_damage_takes_little_memory(tmp_path: Path) -> None:
    """In a process of its own, whose peak is that of these files alone."""
    program = (
        "import sys, resource; sys.path[:0] = sys.argv[2:]; from pathlib import Path; import test_damaged_inputs as t\n"
        "place = Path(sys.argv[1])\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for name in ('a.parquet', 'a.arrow', 'a.feather', 'a.jsonl.zst'):\n"
        "    failed = t.feed(place / name, t.TEXT_FILES[name], lambda: t.read_text(place / name), 60)\n"
        "    assert not failed, failed\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)\n"
    )
    here = Path(__file__).parent
    command = [sys.executable, "-c", program, str(tmp_path), *map(str, (here, here.parent, here.parents[1]))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < MOST_BYTES


def test_every_file_is_sound_before_it_is_damaged(tmp_path: Path) -> None:
    for name, raw in TEXT_FILES.items():
        (tmp_path / name).write_bytes(raw)
        units = resolve(None, [str(tmp_path / name)], reading=Reading()).units
        found = [batch.text(k).decode() for batch in read(units, "text") for k in range(len(batch))]
        assert found == (["\n<|endoftext|>\n".join(TEXTS)] if "txt" in name else TEXTS)
    for name, (raw, beside) in ID_FILES.items():
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        for other, content in {name: raw, **beside}.items():
            (folder / other).write_bytes(content)
        (file,) = recognise(folder).files
        np.testing.assert_array_equal(file.array(), IDS)
