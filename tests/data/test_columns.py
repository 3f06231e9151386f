"""Every Arrow type that holds text is read as Arrow itself reads it; every other one is refused by name."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcore.data.adopt import adopt
from lmcore.data.foreign import recognise
from lmcore.data.readers import Place, check_columns, read, read_document
from lmcore.data.sources import Reading, resolve
from lmcore.data.stream import TokenStream
from lmcore.data.tokenizer import Tokenizer
from lmcore.errors import LmError

PLAIN = [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view()]
WRAPS = ["plain", "dictionary", "small dictionary", "runs", "extension", "fixed"]


def column(values: list[str | None], kind: pa.DataType, wrap: str) -> pa.Array:
    """The values as an array of a type, behind a dictionary, runs or an extension."""
    raw = [v.encode() if v is not None and "binary" in str(kind) else v for v in values]
    if wrap == "fixed":
        width = max((len(v.encode()) for v in values if v is not None), default=1) or 1
        return pa.array([None if v is None else v.encode().ljust(width) for v in values], pa.binary(width))
    if "dictionary" in wrap:
        unique: list[Any] = list(dict.fromkeys(raw))  # a null may stand in the dictionary, too
        indices = [unique.index(v) if v is not None or n % 2 else None for n, v in enumerate(raw)]
        small = pa.int8() if wrap == "small dictionary" else pa.int64()
        return pa.DictionaryArray.from_arrays(pa.array(indices, small), pa.array(unique, kind))
    if wrap == "runs":
        ends, runs = [], []
        for n, v in enumerate(raw, 1):
            if runs and runs[-1] == v:
                ends[-1] = n
            else:
                ends.append(n)
                runs.append(v)
        return pa.RunEndEncodedArray.from_arrays(pa.array(ends, pa.int32()), pa.array(runs, kind))
    if wrap == "extension":
        return pa.ExtensionArray.from_storage(pa.json_(pa.string()), pa.array(values, pa.string()))
    return pa.array(raw, kind)


def write(path: Path, table: pa.Table, batch: int) -> None:
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=batch)
        return
    make = pa.ipc.new_file if path.suffix == ".arrow" else pa.ipc.new_stream
    with make(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=batch)


def rows(path: Path, name: str) -> list[tuple[int, str]]:
    units = resolve(None, [str(path)]).units
    check_columns(units, name)
    batches = read(units, name, on_bad="skip")
    return [(int(b.rows[k]), b.text(k).decode()) for b in batches for k in range(len(b))]


@settings(max_examples=120, derandomize=True, deadline=None)
@given(
    values=st.lists(st.none() | st.sampled_from(["", "eins", "zw\u00f6i", "\U0001f600" * 3, "x" * 40]), max_size=9),
    kind=st.sampled_from(PLAIN),
    wrap=st.sampled_from(WRAPS),
    depth=st.integers(0, 2),
    holes=st.lists(st.booleans(), min_size=9, max_size=9),
    batch=st.integers(1, 9),
    container=st.sampled_from(["parquet", "arrow", "stream"]),
    sliced=st.booleans(),
)
def test_text_of_every_type_is_what_arrow_says(
    tmp_path_factory: pytest.TempPathFactory,
    values: list[str | None],
    kind: pa.DataType,
    wrap: str,
    depth: int,
    holes: list[bool],
    batch: int,
    container: str,
    sliced: bool,
) -> None:
    array, name = column(values, kind, wrap), "text"
    for level in range(depth):
        mask = pa.array(holes[: len(array)], pa.bool_())
        other = pa.array(range(len(array)), pa.int32())
        array = pa.StructArray.from_arrays([other, array], names=["other", name.split(".")[0]], mask=mask)
        name = f"level{level}.{name}"
    table = pa.table({"id": pa.array(range(len(array))), name.split(".")[0]: array})
    if sliced:
        table = table.slice(1)
    path = tmp_path_factory.mktemp("columns") / f"a.{container}"
    try:
        write(path, table, batch)
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid, OSError):
        return  # there is no such file
    tables = [table]
    if container == "parquet":
        file = pq.ParquetFile(path)
        tables = [file.read_row_group(k) for k in range(file.num_row_groups)]
    expected = []
    values = [value for part in tables for value in part.column(name.split(".")[0]).to_pylist()]
    for row, value in enumerate(values):
        for part in name.split(".")[1:]:
            value = None if value is None else value[part]
        if value is not None:
            expected.append((row, value.decode() if isinstance(value, bytes) else value))
    assert rows(path, name) == expected
    for row, text in expected[:2]:
        assert read_document(resolve(None, [str(path)]).units, name, 0, row) == text.encode()


OTHERS = {
    "int64": pa.array([1]),
    "double": pa.array([1.0]),
    "bool": pa.array([True]),
    "list<item: int32>": pa.array([[1]], pa.list_(pa.int32())),
    "list<item: string>": pa.array([["a"]]),
    "struct<a: string>": pa.array([{"a": "x"}]),
    "timestamp[us]": pa.array([0], pa.timestamp("us")),
    "dictionary<values=int64": pa.array([1]).dictionary_encode(),
}


@pytest.mark.parametrize("container", ["parquet", "arrow", "stream"])
@pytest.mark.parametrize("kind", OTHERS)
def test_other_types_are_refused_by_name(tmp_path: Path, kind: str, container: str) -> None:
    path = tmp_path / f"a.{container}"
    write(path, pa.table({"meta": OTHERS[kind], "body": ["x"]}), 9)
    with pytest.raises(LmError) as caught:
        rows(path, "meta")
    assert f"a.{container}: the column 'meta' holds " in caught.value.message
    if container != "parquet" or not kind.startswith(("list", "dictionary")):  # parquet has names of its own
        assert kind in caught.value.message
    with pytest.raises(LmError, match=r"no column 'meta\.x'; it has meta, body\.") as caught:
        rows(path, "meta.x")
    assert caught.value.hint.startswith("Use: --text-column ")


@pytest.mark.parametrize("container", ["parquet", "arrow"])
def test_a_column_of_nothing_gives_no_document(tmp_path: Path, container: str) -> None:
    path = tmp_path / f"a.{container}"
    write(path, pa.table({"text": pa.nulls(3)}), 2)
    assert rows(path, "text") == []
    with pytest.raises(LmError, match="row 0: 'text' is null"):
        list(read(resolve(None, [str(path)]).units, "text"))


def test_a_name_with_a_dot_comes_before_a_struct(tmp_path: Path) -> None:
    table = pa.table({"a": [{"b": "inner"}], "a.b": ["outer"], "c.d": [{"e.f": "deep"}]})
    for container in ("parquet", "arrow"):
        write(tmp_path / f"a.{container}", table, 9)
        assert rows(tmp_path / f"a.{container}", "a.b") == [(0, "outer")]
        assert rows(tmp_path / f"a.{container}", "c.d.e.f") == [(0, "deep")]


def test_reading_arrow_starts_at_every_batch(tmp_path: Path) -> None:
    texts = [f"text {k}" for k in range(50)]
    for container in ("arrow", "stream"):
        path = tmp_path / f"a.{container}"
        write(path, pa.table({"text": texts}), 7)
        units = resolve(None, [str(path)], reading=Reading()).units
        for piece, base in {(b.piece, b.base) for b in read(units, "text")}:
            found = [
                b.text(k).decode() for b in read(units, "text", start=Place(0, piece, base)) for k in range(len(b))
            ]
            assert found == texts[base:]
        assert read_document(units, "text", 0, 43) == b"text 43"


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    write(path, pa.table({"text": pa.array([b"ok", b"\xff"], pa.binary())}), 9)
    with pytest.raises(LmError, match=r"a\.arrow: row 1: not UTF-8 text"):
        list(read(resolve(None, [str(path)]).units, "text"))
    assert rows(path, "text") == [(0, "ok")]


# ---------------------------------------------------------------------------------------- columns of ids

INTEGERS = [getattr(pa, name)() for name in ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")]
LISTS = ["list", "large_list", "list_view", "large_list_view", "fixed", "dictionary"]


def ids_column(rows_: list[list[int] | None], kind: pa.DataType, layout: str) -> pa.Array:
    if layout == "fixed":
        return pa.array([r if r is None else [*r, 1, 1, 1][:3] for r in rows_], pa.list_(kind, 3))
    if layout == "dictionary":
        flat = pa.array([i for r in rows_ for i in r or ()], kind).dictionary_encode()
        offsets = [0]
        for r in rows_:
            offsets.append(offsets[-1] + len(r or ()))
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), flat)
    return pa.array(rows_, {"list": pa.list_, "large_list": pa.large_list, "list_view": pa.list_view}.get(
        layout, pa.large_list_view
    )(kind))  # fmt: skip


@settings(max_examples=80, derandomize=True, deadline=None)
@given(
    rows_=st.lists(st.none() | st.lists(st.integers(0, 127), max_size=5), min_size=1, max_size=8),
    kind=st.sampled_from(INTEGERS),
    layout=st.sampled_from(LISTS),
    container=st.sampled_from(["parquet", "arrow", "stream"]),
    batch=st.integers(1, 9),
    sliced=st.booleans(),
)
def test_ids_of_every_type_are_what_arrow_says(
    tmp_path_factory: pytest.TempPathFactory,
    rows_: list[list[int] | None],
    kind: pa.DataType,
    layout: str,
    container: str,
    batch: int,
    sliced: bool,
) -> None:
    array = ids_column(rows_, kind, layout)
    table = pa.table({"attention_mask": array, "input_ids": array}).slice(int(sliced))
    path = tmp_path_factory.mktemp("ids") / f"a.{container}"
    try:
        write(path, table, batch)
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
        return  # there is no such file
    expected = [row for row in table.column("input_ids").to_pylist() if row]
    found = recognise(path)
    if not expected:
        assert [fault.code for fault in found.faults] == ["V205"]
        return
    (file,) = found.files
    assert file.array().tolist() == [number for row in expected for number in row]
    assert file.lengths is not None
    assert file.lengths.tolist() == [len(row) for row in expected]
    assert file.empty == len(table) - len(expected)


BAD_IDS = {
    "nulls in them": pa.array([[1, None]]),
    "no token ids": pa.array([[1, -100]]),
    "not lists of ids": pa.array([1.5]),
}


@pytest.mark.parametrize("message", BAD_IDS)
def test_what_are_no_ids_is_said(tmp_path: Path, message: str) -> None:
    write(tmp_path / "a.parquet", pa.table({"input_ids": BAD_IDS[message]}), 9)
    with pytest.raises(LmError, match=message):
        adopt(tmp_path / "a.parquet", tmp_path / "set", column="input_ids")


def test_a_table_of_ids_becomes_a_set(tmp_path: Path) -> None:
    documents = [[*f"document {k}".encode()] for k in range(20)]
    write(tmp_path / "a.parquet", pa.table({"first": documents, "second": documents}), 7)
    with pytest.raises(LmError, match=r"several columns of ids \(first, second\)"):
        adopt(tmp_path / "a.parquet", tmp_path / "set")
    (report,) = adopt(tmp_path / "a.parquet", tmp_path / "set", column="second", tokenizer=Tokenizer.byte())
    assert report.n_docs == 20
    stream = TokenStream.open(tmp_path / "set")
    assert stream.read(0, len(stream)).tolist() == [i for d in documents for i in [*d, 256]]
    write(tmp_path / "b.arrow", pa.table({"text": ["eins"]}), 7)
    with pytest.raises(LmError, match=r"text, not token ids; make tokens of it: lm tokenize .*b\.arrow"):
        adopt(tmp_path / "b.arrow", tmp_path / "set2")


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("a.bin", b"PK\x03\x04" + bytes(200)),
        ("a.bin", gzip.compress(bytes(range(256)) * 8)),
        ("a.data", b"%PDF-1.7" + bytes(200)),
        ("a.npy", b"SQLite format 3\0" + bytes(200)),
    ],
)
def test_other_files_are_not_read_as_headerless_ids_whatever_their_width(tmp_path: Path, name: str, raw: bytes) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(LmError, match="not token ids"):
        adopt(tmp_path / name, tmp_path / "set", width=2)


@pytest.mark.parametrize(
    "raw", [b'{"text": "eins"}\n', b"eins, zwei und drei\n", b"<html>\n<p>eins\n", b"id,text\n1,eins\n"]
)
def test_text_is_not_read_as_headerless_ids(tmp_path: Path, raw: bytes) -> None:
    for name in ("a", "a.bin", "a.csv"):
        (tmp_path / name).write_bytes(raw + b" " * (len(raw) % 2))
        with pytest.raises(LmError, match="text, not token ids"):
            adopt(tmp_path / name, tmp_path / "set")
