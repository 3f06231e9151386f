"""Every Arrow type that holds text is read as Arrow itself reads it; every other one is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcore.data.readers import Place, check_columns, read, read_document
from lmcore.data.sources import Reading, resolve
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
