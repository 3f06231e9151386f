"""Columns of Arrow tables: which of them hold text, and their values as arrays of UTF-8.

Text is a string or bytes, in any of Arrow's layouts (32 or 64 bits of offset, views, fixed size), perhaps behind a
dictionary, runs or an extension type. A column inside of a struct has a dotted name: `meta.body`. A null, also of a
whole column or of a struct around it, is a record without text. Everything else is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lmcore.errors import LmError


def check_schema(where: str, schema: pa.Schema, column: str) -> None:
    """Refuse (2) a schema without a text column of this name."""
    kind = find(schema, column)
    if kind is None:
        texts = [name for name, found in walk(schema) if is_text(found)]
        hint = f"Use: --text-column {texts[0]}" if texts else "None of them holds text."
        raise LmError(f"{where}: no column '{column}'; it has {listed(schema.names)}.", hint=hint)
    if not (is_text(kind) or is_bytes(kind) or pa.types.is_null(kind)):
        more = " (token ids? lm import makes a set of those)" if holds_ids(kind) else ""
        raise LmError(f"{where}: the column '{column}' holds {kind}, not text{more}.")


def listed(names: Iterable[str]) -> str:
    """Names for a sentence: the first ones, none of them endless."""
    names = list(names)
    more = f" and {len(names) - 12:,} more" if len(names) > 12 else ""
    return (", ".join(name if len(name) <= 60 else name[:57] + "..." for name in names[:12]) or "nothing") + more


def find(schema: pa.Schema, column: str) -> pa.DataType | None:
    """Type of a column: one of this very name, or the struct field that a dotted name leads to."""
    path = path_of(schema, column)
    if path is None:
        return None
    kind = schema.field(path[0]).type
    for name in path[1:]:
        kind = kind.field(name).type
    return kind


def path_of(schema: pa.Schema, column: str) -> list[str] | None:
    """['meta', 'body'] for 'meta.body'; names that hold dots themselves come first. None: there is no such column."""
    fields = {field.name: field.type for field in schema}
    if column in fields:
        if schema.names.count(column) > 1:
            raise LmError(f"the column '{column}' is there {schema.names.count(column)} times.")
        return [column]
    parts = column.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        head = ".".join(parts[:cut])
        if head in fields and pa.types.is_struct(fields[head]):
            rest = path_of(pa.schema(list(fields[head])), ".".join(parts[cut:]))
            if rest is not None:
                return [head, *rest]
    return None


def walk(schema: pa.Schema, above: str = "") -> Iterator[tuple[str, pa.DataType]]:
    """(dotted name, type) of every column, those inside of structs included."""
    for field in schema:
        yield above + field.name, field.type
        if pa.types.is_struct(field.type):
            yield from walk(pa.schema(list(field.type)), f"{above}{field.name}.")


def _bare(kind: pa.DataType) -> pa.DataType:
    """What a dictionary, runs or an extension holds."""
    while True:
        if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
            kind = kind.value_type
        elif isinstance(kind, pa.BaseExtensionType):
            kind = kind.storage_type
        else:
            return kind


def is_text(kind: pa.DataType) -> bool:
    """Whether a type is text, under whatever encoding."""
    kind = _bare(kind)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def is_bytes(kind: pa.DataType) -> bool:
    """Whether a type is bytes, which may be text."""
    kind, types = _bare(kind), pa.types
    return bool(
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_binary_view(kind)
        or types.is_fixed_size_binary(kind)
    )


def holds_ids(kind: pa.DataType) -> bool:
    """Whether a type is a list of whole numbers, in any of Arrow's layouts."""
    types = pa.types
    tests = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view, types.is_large_list_view)
    return any(test(kind) for test in tests) and bool(types.is_integer(_bare(kind.value_type)))


def texts(batch: pa.RecordBatch, column: str) -> Any:
    """The text column of a batch as a string, large_string, binary or large_binary array; nulls stay nulls."""
    array, there = _at(batch, column)
    array = plain(array)
    return array if there is None else pc.if_else(there, array, pa.scalar(None, array.type))


def values(batch: pa.RecordBatch, column: str) -> Any:
    """A column of a batch as it is."""
    return _at(batch, column)[0]


def _at(batch: pa.RecordBatch, column: str) -> tuple[Any, Any]:
    """(the array that a dotted name leads to, where the structs around it are there or None for everywhere)."""
    path = path_of(batch.schema, column)
    assert path is not None
    array = batch.column(batch.schema.get_field_index(path[0]))
    there = None
    for name in path[1:]:
        if array.null_count:
            there = array.is_valid() if there is None else pc.and_(there, array.is_valid())
        array = pc.struct_field(array, [array.type.get_field_index(name)])
    return array, there


def plain(array: Any) -> Any:
    """An array of text of any kind as one with offsets of 32 or 64 bits and no encoding around it."""
    kind = array.type
    if isinstance(kind, pa.BaseExtensionType):
        return plain(array.storage)
    if pa.types.is_dictionary(kind):
        return plain(array.dictionary).take(array.indices)
    if pa.types.is_run_end_encoded(kind):
        ends = np.asarray(array.run_ends, np.int64)
        runs = np.searchsorted(ends, np.arange(array.offset, array.offset + len(array)), "right")
        return plain(array.values).take(pa.array(runs))
    if pa.types.is_null(kind):
        return array.cast(pa.large_string())
    if kind in (pa.string(), pa.large_string(), pa.binary(), pa.large_binary()):
        return array
    return array.cast(pa.large_string() if is_text(kind) else pa.large_binary())
