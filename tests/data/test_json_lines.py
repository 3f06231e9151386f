"""JSON lines are read alike from files, compressed files, standard input, prompts and tasks, whatever they hold."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcore.data import readers
from lmcore.data.readers import json_records, read
from lmcore.data.sources import Reading, Unit, local_unit
from lmcore.errors import Exit, LmError

BOM = b"\xef\xbb\xbf"
GOOD = [
    b'{"text": "eins"}',
    b'{"id": 1, "text": "zw\\u00f6i", "more": {"text": "no"}}',
    b'{"text": "a\xe2\x80\xa8b\xc2\x85c"}',  # U+2028 and U+0085 end no line
    b'{"text": ""}',
    b'  {"text": "\xc3\xa4\xf0\x9f\x98\x80"}\t',
    b'{"text": "\\ud83d\\ude00 \\ud800"}',
    b'{"te\\u0078t": "key", "x": NaN}',
    b'{"text": "first", "text": "last"}',
    b'{"text": "big", "n": 1e999}',
    b'{"text": "long", "n": ' + b"9" * 5000 + b"}",
    b'{"text": "deep", "n": ' + b"[" * 400 + b"]" * 400 + b"}",
    b"\xef\xbb\xbf" + b'{"text": "marked"}',
    b'{"text": "returned"}\r',
]
BLANK = [b"", b"  ", b"\r", b"\t\r", BOM, BOM + b"\r"]
BAD = [
    b'{"text": "a"',
    b'{"text": "a"}{"text": "b"}',
    b'{"text": "a"}\r{"text": "b"}',
    b'{"text": 3}',
    b'{"text": null}',
    b'{"body": "a"}',
    b'["a"]',
    b'"a"',
    b'{"text": "a\xff"}',
    b'{"text": "a", "x": "\xff"}',
    b'{"text": "a\tb"}',
    b"\0\0\0\0",
    b'{"text": "a"}\0',
    b"\xff\xfe{\0}\0",
]
Expected = list[tuple[int, str | None]]


def expected(raw: bytes) -> Expected:
    """(row, text or None where the line is bad), by the standard library alone."""
    rows: Expected = []
    for row, line in enumerate(raw.split(b"\n")):
        while line.startswith(BOM):
            line = line[3:]
        if not line.strip():
            continue
        try:
            text = json.loads(line.decode(), parse_int=float)["text"]
            assert isinstance(text, str)
            rows.append((row, text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")))
        except (ValueError, KeyError, TypeError, AssertionError):
            rows.append((row, None))
    return rows


def found(unit: Unit, **options: Any) -> list[tuple[int, str]]:
    return [
        (int(batch.rows[k]), batch.text(k).decode())
        for batch in read([unit], "text", **options)
        for k in range(len(batch))
    ]


@settings(max_examples=120, derandomize=True, deadline=None)
@given(
    good=st.lists(st.sampled_from([*GOOD, *GOOD, *BLANK]), max_size=9),
    bad=st.lists(st.sampled_from(BAD), max_size=1),
    seed=st.integers(0, 99),
    block=st.integers(1, 120) | st.just(8 << 20),
    ends=st.booleans(),
)
def test_every_way_in_reads_what_the_standard_library_reads(
    tmp_path_factory: pytest.TempPathFactory, good: list[bytes], bad: list[bytes], seed: int, block: int, ends: bool
) -> None:
    lines = [*good, *bad]
    random.Random(seed).shuffle(lines)
    lines.insert(0, GOOD[0])
    raw = b"\n".join(lines) + b"\n" * ends
    rows = expected(raw)
    texts = [(row, text) for row, text in rows if text is not None]
    first_bad = next((row for row, text in rows if text is None), None)
    folder = tmp_path_factory.mktemp("lines")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "BLOCK_BYTES", block)
        for name, packed in (("a.jsonl", raw), ("a.jsonl.gz", gzip.compress(raw)), ("A.NDJSON.ZST", _zstd(raw))):
            (folder / name).write_bytes(packed)
            unit = local_unit(folder / name, Reading("jsonl"))
            assert found(unit, on_bad="skip") == texts
            if first_bad is None:
                assert found(unit) == texts
                continue
            with pytest.raises(LmError) as caught:
                found(unit)
            assert caught.value.code == Exit.DATA
            assert f"{name}:{first_bad + 1}: " in caught.value.message
    # The whole file at once and the slow path alone: the fast one changes nothing.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "_parse_by_arrow", lambda block, column: None)
        assert found(unit, on_bad="skip") == texts


def _zstd(raw: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(raw)


def test_a_text_behind_any_depth_is_read_alone_and_among_others(tmp_path: Path) -> None:
    """The standard library has a limit of depth, Arrow has none: neighbours must not matter."""
    deep = b'{"text": "deep", "n": ' + b"[" * 5000 + b"]" * 5000 + b"}\n"
    (tmp_path / "a.jsonl").write_bytes(deep * 2)
    (tmp_path / "b.jsonl").write_bytes(deep + b"\n" + deep)
    assert found(local_unit(tmp_path / "a.jsonl")) == [(0, "deep"), (1, "deep")]
    assert found(local_unit(tmp_path / "b.jsonl")) == [(0, "deep"), (2, "deep")]


def test_a_key_inside_of_objects_has_a_dotted_name(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": {"b": "inner"}}\n{"a.b": "outer", "a": {"b": "inner"}}\n')
    batches = list(read([local_unit(tmp_path / "a.jsonl")], "a.b"))
    assert [b.text(k) for b in batches for k in range(len(b))] == [b"inner", b"outer"]


def test_records_of_a_file_have_the_numbers_of_its_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(BOM + b'\n{"a": 1}\n\n[2]\n' + BOM + b'"drei\xe2\x80\xa8"')
    assert list(json_records(tmp_path / "a.jsonl")) == [(2, {"a": 1}), (4, [2]), (5, "drei\u2028")]
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n{"a"')
    with pytest.raises(LmError, match=r"a\.jsonl:2: not valid JSON"):
        list(json_records(tmp_path / "a.jsonl"))
