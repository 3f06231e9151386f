"""Sources and readers: every format gives the same documents, whatever the sizes of blocks, and says what is broken."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import corpora
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcore.data import documents, readers
from lmcore.data.documents import Documents, Drop, filter_lengths
from lmcore.data.pipeline import map_in_order, read_ahead
from lmcore.data.readers import Place, read, read_document
from lmcore.data.sources import Unit, resolve
from lmcore.errors import Exit, LmError

TEXTS = corpora.texts(200)


def collect(batches: Iterator[Documents]) -> tuple[list[tuple[int, int, str]], list[tuple[int, int, Drop]]]:
    found: list[tuple[int, int, str]] = []
    drops: list[tuple[int, int, Drop]] = []
    for batch in batches:
        found += [(int(batch.units[k]), int(batch.rows[k]), batch.text(k).decode()) for k in range(len(batch))]
        drops += batch.drops
    return found, drops


def read_paths(*paths: object, **options: object) -> tuple[list[tuple[int, int, str]], list[tuple[int, int, Drop]]]:
    units = resolve(None, [str(path) for path in paths]).units
    return collect(read(units, "text", **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "jsonl.gz", "jsonl.zst"])
@pytest.mark.parametrize("block", [100, 5_000, 8 << 20])
def test_every_format_gives_every_record_in_order(
    tmp_path: Path, kind: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "BLOCK_BYTES", block)
    monkeypatch.setattr(readers, "BATCH_BYTES", block)
    for number, part in enumerate((TEXTS[:120], TEXTS[120:])):
        path = tmp_path / f"part-{number}.{kind}"
        if kind == "parquet":
            corpora.write_parquet(path, part)
            continue
        raw = corpora.write_jsonl(tmp_path / "plain", part).read_bytes()
        (tmp_path / "plain").unlink()
        path.write_bytes(
            gzip.compress(raw) if kind.endswith("gz") else zstandard.compress(raw) if kind.endswith("zst") else raw
        )
    found, drops = read_paths(tmp_path, threads=3)
    assert [text for _, _, text in found] == TEXTS
    assert [(unit, row) for unit, row, _ in found] == [(0, k) for k in range(120)] + [(1, k) for k in range(80)]
    assert drops == []


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "jsonl.gz"])
def test_reading_can_start_at_every_piece(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "BLOCK_BYTES", 3_000)
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        corpora.write_parquet(path, TEXTS, group=17)
    else:
        raw = corpora.write_jsonl(tmp_path / "plain", TEXTS).read_bytes()
        path.write_bytes(gzip.compress(raw) if kind.endswith("gz") else raw)
    units = resolve(None, [str(path)]).units
    pieces = {(batch.piece, batch.base) for batch in read(units, "text")}
    assert len(pieces) > 5
    for piece, base in pieces:
        found, _ = collect(read(units, "text", start=Place(0, piece, base)))
        assert [(row, text) for _, row, text in found] == list(enumerate(TEXTS))[base:]


@settings(max_examples=150, derandomize=True, deadline=None)
@given(
    values=st.lists(
        st.one_of(
            st.text(max_size=20),
            st.text(alphabet=st.characters(codec="utf-8"), max_size=20),
        ),
        max_size=8,
    ),
    extra=st.dictionaries(st.text(max_size=5), st.one_of(st.none(), st.integers(), st.floats(), st.text(max_size=5))),
    ascii_only=st.booleans(),
)
def test_arrow_and_the_line_parser_agree(values: list[str], extra: dict[str, object], ascii_only: bool) -> None:
    extra.pop("text", None)
    lines = [json.dumps({**extra, "text": v, "z": [1, {"text": "no"}]}, ensure_ascii=ascii_only) for v in values]
    try:
        block = "".join(line + "\n" for line in lines).encode()
    except UnicodeEncodeError:
        return  # a lone surrogate cannot be written unescaped
    expected = [line_text(line) for line in lines]
    fast = readers._parse_by_arrow(block, "text") if block else None
    if fast is not None:
        assert [value.encode() for value in fast.to_pylist()] == expected
    unit = Unit("x", "jsonl", len(block))
    batches = list(readers._parse_block(unit, 0, 0, block, "text", "stop")) if block else []
    assert [batch.text(k) for batch in batches for k in range(len(batch))] == expected


def line_text(line: str) -> bytes:
    value = json.loads(line)["text"]
    return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").encode()


def test_fast_json_path_is_taken_for_ordinary_lines(tmp_path: Path) -> None:
    block = corpora.write_jsonl(tmp_path / "a.jsonl", TEXTS).read_bytes()
    assert readers._parse_by_arrow(block, "text") is not None
    assert readers._parse_by_arrow(block.rstrip(b"\n"), "text") is not None


BROKEN = {
    b'{"text": "a"': "not valid JSON",
    b'{"text": "a"}{"text": "b"}': "not valid JSON",
    b'{"text": 3}': "'text' is 3, not text",
    b'{"text": null}': "'text' is null, not text",
    b'{"content": "a", "id": 1}': "no 'text' here; it has content, id (--text-column content?)",
    b"[1]": "an object is expected, not a list",
    b'"a"': "an object is expected, not a str",
    b'{"text": "\xff"}': "not UTF-8 text",
    b"[" * 100_000: "nested too deeply",
}


@pytest.mark.parametrize("line", BROKEN, ids=[str(k) for k in range(len(BROKEN))])
@pytest.mark.parametrize("block", [30, 8 << 20])
def test_broken_line_is_named_or_counted(
    tmp_path: Path, line: bytes, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "BLOCK_BYTES", block)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n\n{"text": "three"}\n' + line + b'\n{"text": "five"}\n')
    with pytest.raises(LmError) as caught:
        read_paths(path)
    assert caught.value.code == Exit.DATA
    assert caught.value.message.startswith(f"{path}:4: ")
    assert BROKEN[line] in caught.value.message
    found, drops = read_paths(path, on_bad="skip")
    assert [(row, text) for _, row, text in found] == [(0, "one"), (2, "three"), (4, "five")]
    assert [(unit, row) for unit, row, _ in drops] == [(0, 3)]


def test_truncated_last_line_is_an_error_and_a_missing_newline_is_not(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n{"text": "two"}')
    assert [text for *_, text in read_paths(path)[0]] == ["one", "two"]
    path.write_bytes(b'{"text": "one"}\n{"text": "tw')
    with pytest.raises(LmError, match=r"a\.jsonl:2: not valid JSON"):
        read_paths(path)


def test_repair_replaces_broken_bytes_and_joins_surrogates(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a\xffb"}\n{"text": "\\ud83d\\ude00 \\ud800"}\n')
    assert [text for *_, text in read_paths(path, on_bad="repair")[0]] == ["a\ufffdb", "\U0001f600 \ufffd"]


def test_nul_bom_and_line_separators_stay(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    text = "a\x00b\u2028c\x0bd\re\ufefff"
    path.write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
    assert read_paths(path)[0] == [(0, 0, text)]
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfhello\r\n")
    assert read_paths(tmp_path / "b.txt")[0] == [(0, 0, "hello\r\n")]


def test_text_files_are_documents_in_the_order_of_their_paths(tmp_path: Path) -> None:
    for name, content in {"b/z.md": "3", "a.txt": "1", "b/a.py": "2", ".hidden.txt": "no", "b/x.bin": "no"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"4") + gzip.compress(b"5"))
    found, _ = read_paths(tmp_path)
    assert [text for *_, text in found] == ["1", "2", "3", "45"]
    assert [unit for unit, *_ in found] == [0, 1, 2, 3]


def test_text_beside_records_is_left_out_and_said(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("about")
    corpora.write_jsonl(tmp_path / "data" / "a.jsonl", ["x"])
    source = resolve(None, [str(tmp_path)])
    assert [Path(unit.path).name for unit in source.units] == ["a.jsonl"]
    assert any("1 text files" in note for note in source.notes)


def test_python_files_are_decoded_as_they_say(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(b"# -*- coding: latin-1 -*-\nx = '\xe9'\n")
    (tmp_path / "b.py").write_bytes(b"x = '\xe9'\n")
    found, drops = read_paths(tmp_path)
    assert [text for *_, text in found] == ["# -*- coding: latin-1 -*-\nx = '\u00e9'\n"]
    assert drops == [(1, 0, Drop.BAD_UTF8)]


def test_text_that_is_no_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"caf\xe9")
    with pytest.raises(LmError, match=r"a\.txt: not UTF-8 text \(byte 3\)"):
        read_paths(path)
    assert read_paths(path, on_bad="skip") == ([], [(0, 0, Drop.BAD_UTF8)])
    assert read_paths(path, on_bad="repair")[0] == [(0, 0, "caf\ufffd")]


def test_odd_file_names(tmp_path: Path) -> None:
    names = [b"new\nline.txt", b"caf\xe9.txt", "\u65e5\u672c.txt".encode(), b" space .txt", b"-dash.txt", b"[x].txt"]
    for number, name in enumerate(names):
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(str(number).encode())
    units = resolve(None, [str(tmp_path)]).units
    assert len(units) == len(names)
    again = [Unit.from_json(json.loads(json.dumps(unit.to_json()))) for unit in units]
    assert list(units) == again
    assert sorted(text for *_, text in collect(read(again, "text"))[0]) == [str(k) for k in range(len(names))]
    for unit in units:
        unit.to_json()["path"].encode()  # can be shown


PARQUET_TYPES = [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.dictionary(pa.int32(), pa.string())]


@pytest.mark.parametrize("kind", PARQUET_TYPES, ids=str)
def test_text_columns_of_every_kind(tmp_path: Path, kind: pa.DataType) -> None:
    values = TEXTS[:30]
    array = pa.array(values, pa.string())
    array = array.dictionary_encode() if pa.types.is_dictionary(kind) else array.cast(kind)
    pq.write_table(pa.table({"text": array}), tmp_path / "a.parquet", row_group_size=7)
    assert [text for *_, text in read_paths(tmp_path)[0]] == values


def test_parquet_nulls_and_broken_bytes(tmp_path: Path) -> None:
    path = corpora.write_parquet(tmp_path / "a.parquet", ["a", None, "c"], group=2)
    with pytest.raises(LmError, match=r"a\.parquet: row 1: 'text' is null"):
        read_paths(path)
    found, drops = read_paths(path, on_bad="skip")
    assert (found, drops) == ([(0, 0, "a"), (0, 2, "c")], [(0, 1, Drop.NO_TEXT)])
    pq.write_table(pa.table({"text": pa.array([b"ok", b"ok", b"\xff"], pa.binary())}), path, row_group_size=2)
    with pytest.raises(LmError, match=r"a\.parquet: row 2: not UTF-8"):
        read_paths(path)


@pytest.mark.parametrize("damage", [0, 1, 2])
def test_parquet_that_is_none(tmp_path: Path, damage: int) -> None:
    path = corpora.write_parquet(tmp_path / "a.parquet", TEXTS[:20])
    raw = path.read_bytes()
    path.write_bytes([b"", raw[:-10], b"PAR1" + b"\0" * 60 + b"PAR1"][damage])
    with pytest.raises(LmError, match=r"a\.parquet: not a readable parquet file") as caught:
        read_paths(path)
    assert caught.value.code == Exit.DATA


def test_missing_column_names_what_is_there(tmp_path: Path) -> None:
    path = corpora.write_parquet(tmp_path / "a.parquet", ["a"], column="content")
    with pytest.raises(LmError, match=r"no column 'text'; it has content, id") as caught:
        readers.check_columns(resolve(None, [str(path)]).units, "text")
    assert (caught.value.code, caught.value.hint) == (Exit.USAGE, "Use: --text-column content")
    with pytest.raises(LmError, match="'id' holds int64, not text"):
        readers.check_columns(resolve(None, [str(path)]).units, "id")


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_bombs_are_refused_and_truncation_is_seen(tmp_path: Path, kind: str) -> None:
    pack = gzip.compress if kind == "gz" else zstandard.compress
    bomb = tmp_path / f"bomb.txt.{kind}"
    bomb.write_bytes(pack(b"\0" * (100 << 20)))
    with pytest.raises(LmError, match="decompression bomb"):
        read_paths(bomb)
    cut = tmp_path / f"cut.jsonl.{kind}"
    raw = pack(b'{"text": "%d"}\n' % 5 + os.urandom(5000).hex().encode())
    cut.write_bytes(raw[:-20])
    with pytest.raises(LmError, match=r"broken (gzip|zstd) data") as caught:
        read_paths(cut)
    assert caught.value.code == Exit.DATA


def test_document_that_cannot_be_held_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MAX_DOCUMENT_BYTES", 1000)
    monkeypatch.setattr(readers, "BLOCK_BYTES", 500)
    (tmp_path / "a.txt").write_text("x" * 1001)
    corpora.write_jsonl(tmp_path / "b.jsonl", ["y" * 2000])
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"z" * 1001))
    for name in ("a.txt", "b.jsonl", "c.txt.gz"):
        with pytest.raises(LmError, match="the limit is 1,000"):
            read_paths(tmp_path / name)


def test_changed_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    units = resolve(None, [str(path)]).units
    path.write_text("three")
    with pytest.raises(LmError, match="3 when the plan was made"):
        collect(read(units, "text"))


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_document_is_found_again(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "BLOCK_BYTES", 3_000)
    path = tmp_path / f"a.{kind}"
    (corpora.write_parquet if kind == "parquet" else corpora.write_jsonl)(path, TEXTS)
    units = resolve(None, [str(path)]).units
    for row in (0, 57, 199):
        assert read_document(units, "text", 0, row) == TEXTS[row].encode()
    assert read_document(units, "text", 0, 200) is None


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["nowhere.txt"], "no such file"),
        (["*.nothing"], "no file matches"),
        (["a.csv"], "this is a .csv file, which is not read here"),
        (["."], "no text here"),
    ],
)
def test_sources_that_do_not_exist(
    tmp_path: Path, paths: Sequence[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv").write_text("a,b")
    with pytest.raises(LmError, match=message):
        resolve(None, paths)


def test_stdlib_is_the_interpreter_s_own() -> None:
    source = resolve("stdlib", [])
    names = [Path(unit.path).name for unit in source.units]
    assert "argparse.py" in names
    assert "test_argparse.py" not in names
    assert source.description["kind"] == "stdlib"


def test_filter_counts_characters_not_bytes() -> None:
    builder = documents.DocumentsBuilder(3)
    for row, text in enumerate(["", "\u65e5\u672c", "abc", "abcdefgh"]):
        builder.add(row, text.encode())
    kept = filter_lengths(builder.build(), 3, 5)
    assert [kept.text(k) for k in range(len(kept))] == [b"abc"]
    assert kept.rows.tolist() == [2]
    assert kept.drops == ((3, 0, Drop.EMPTY), (3, 1, Drop.SHORT), (3, 3, Drop.LONG))


def test_read_ahead_keeps_the_order_and_delivers_errors_in_their_turn() -> None:
    def task(number: int) -> Iterator[int]:
        yield from range(number * 10, number * 10 + 5)
        if number == 3:
            raise ValueError("three")

    stream = read_ahead([lambda n=n: task(n) for n in range(6)], threads=4)  # type: ignore[misc]
    got: list[int] = []
    with pytest.raises(ValueError, match="three"):
        got.extend(stream)
    assert got == [n * 10 + k for n in range(4) for k in range(5)]


def test_map_in_order_is_bounded() -> None:
    begun: list[int] = []

    def items() -> Iterator[int]:
        for number in range(100):
            begun.append(number)
            yield number

    results = map_in_order(lambda number: number * number, items(), threads=3, weight=lambda _: 10, limit=50)
    for number in range(10):
        assert next(results) == number * number
        assert len(begun) <= number + 8
    results.close()
