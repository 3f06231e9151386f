"""What a user names becomes the files that are meant: by content, through links, nothing twice, nothing lost unsaid."""

from __future__ import annotations

import glob
import gzip
import io
import json
import os
import shutil
from pathlib import Path

import corpora
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from lmcore.data.readers import read
from lmcore.data.sources import Reading, Unit, local_unit, resolve
from lmcore.errors import LmError

LINES = b'{"text": "eins"}\n{"text": "zwei"}\n'
TABLE = pa.table({"text": ["eins", "zwei"]})


def parquet() -> bytes:
    sink = io.BytesIO()
    pq.write_table(TABLE, sink)
    return sink.getvalue()


def arrow_file() -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, TABLE.schema) as writer:
        writer.write_table(TABLE)
    return sink.getvalue()


def arrow_stream() -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, TABLE.schema) as writer:
        writer.write_table(TABLE)
    return sink.getvalue()


def texts(*paths: object, reading: Reading = Reading()) -> list[str]:
    units = resolve(None, [str(path) for path in paths], reading=reading).units
    return [batch.text(k).decode() for batch in read(units, reading.column) for k in range(len(batch))]


RECORDS: dict[str, bytes] = {
    "a.jsonl": LINES,
    "a.JSONL": LINES,
    "a.ndjson": LINES,
    "a.json": LINES,
    "a.json.gz": gzip.compress(LINES),
    "a.jsonl.zst": zstandard.compress(LINES),
    "a.JSONL.GZ": gzip.compress(LINES),
    "a": LINES,
    "part-0001": gzip.compress(LINES),
    "part.0001": LINES,
    "a.dat": LINES,
    "compressed.jsonl": gzip.compress(LINES),
    "unpacked.jsonl.gz": LINES,
    "wrong.gz": zstandard.compress(LINES),
    "b.parquet": parquet(),
    "b.PARQUET": parquet(),
    "b": parquet(),
    "b.arrow": arrow_file(),
    "b.feather": arrow_stream(),
    "blob": arrow_stream(),
    "named-as-text.txt": parquet(),
    "named-as-lines.jsonl": parquet(),
}


@pytest.mark.parametrize("name", RECORDS)
def test_records_are_read_under_any_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(RECORDS[name])
    assert texts(tmp_path / name) == ["eins", "zwei"]


@pytest.mark.parametrize("name", ["a.txt", "a.TXT", "a.md", "a", "a.001", "b.txt.gz", "packed.txt"])
def test_text_is_read_as_it_is(tmp_path: Path, name: str) -> None:
    raw = b"eins, zwei\n{drei}\n"
    (tmp_path / name).write_bytes(gzip.compress(raw) if name[0] in "bp" else raw)
    assert texts(tmp_path / name) == [raw.decode()]


REFUSED: dict[str, tuple[bytes, str]] = {
    "a.csv": (b"id,text\n1,eins\n", "a table of comma-separated values"),
    "b.csv": (b"id,body\n1,eins\n", "a .csv file"),
    "table": (b"id\ttext\n1\teins\n", "a table of tab-separated values"),
    "a.warc": (b"WARC/1.0\r\nWARC-Type: response\r\n", "a WARC web archive"),
    "a.warc.gz": (gzip.compress(b"WARC/1.0\r\nWARC-Type: response\r\n"), "a WARC web archive"),
    "renamed.txt": (b"WARC/1.0\r\nWARC-Type: response\r\n", "a WARC web archive"),
    "a.pdf": (b"%PDF-1.7\n%\xe2\xe3\n", "a PDF document"),
    "pdf.txt": (b"%PDF-1.4\nplain\n", "a PDF document"),
    "a.html": (b"<!DOCTYPE html>\n<p>eins", "an HTML page"),
    "page": (b"  <html><p>eins", "an HTML page"),
    "a.xml": (b"<?xml version='1.0'?><a/>", "an XML document"),
    "a.docx": (b"PK\x03\x04rest", "a zip archive"),
    "a.jsonl.xz": (b"\xfd7zXZ\0rest", "xz data"),
    "pointer.parquet": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "readable parquet"),
    "pointer.jsonl": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
    "array.json": (b'[{"text": "eins"},\n {"text": "zwei"}]', "one JSON array"),
    "array.jsonl": (b'[{"text": "eins"}, {"text": "zwei"}]', "one JSON array"),
    "object.json": (b'{\n "text": "eins"\n}\n', "a JSON object over several lines"),
    "lines.txt": (LINES, "named as text, but it holds JSON lines"),
    "utf16.txt": ("eins".encode("utf-16"), "UTF-16 text"),
    "utf16.jsonl": (LINES.decode().encode("utf-16-be"), "UTF-16 text"),
    "a.tex": (b"\\section{eins}\n", "the kind of this file is not known"),
    "binary": (bytes(range(256)) * 4, "the kind of this file is not known"),
    "a.txt.gz": (b"\x8b\x1f not gzip \xff", "broken gzip data"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_train_on_markup_is_refused_by_name(tmp_path: Path, name: str) -> None:
    raw, message = REFUSED[name]
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(LmError, match=message) as caught:
        texts(tmp_path / name)
    assert name in caught.value.message
    assert "ename it" not in caught.value.hint


@pytest.mark.parametrize("name", ["a.csv", "a.html", "array.json", "lines.txt", "a.tex", "a.xml"])
def test_the_format_settles_it(tmp_path: Path, name: str) -> None:
    raw, _ = REFUSED[name]
    (tmp_path / name).write_bytes(raw)
    assert texts(tmp_path / name, reading=Reading("text")) == [raw.decode()]
    (tmp_path / "lines.tex").write_bytes(LINES)
    assert texts(tmp_path / "lines.tex", reading=Reading("jsonl")) == ["eins", "zwei"]


# ---------------------------------------------------------------------------------------- folders


def test_a_folder_names_what_it_leaves_out(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.csv", "c.CSV", "d.pdf", "LICENSE", "README.md", ".hidden"):
        (tmp_path / name).write_bytes(LINES if name == "a.jsonl" else b"no")
    source = resolve(None, [str(tmp_path)])
    assert [Path(unit.path).name for unit in source.units] == ["a.jsonl"]
    said = " ".join(source.notes)
    for part in ("1 text files beside", "2 .csv", "1 .pdf", "1 without an ending", "1 hidden"):
        assert part in said
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "d.pdf").write_bytes(b"%PDF-")
    with pytest.raises(LmError, match=r"no text here \(1 \.pdf; known are"):
        resolve(None, [str(tmp_path / "e")])


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.arrow", "a"])
def test_records_that_no_name_tells_are_found_before_a_readme(tmp_path: Path, name: str) -> None:
    raw = {"a.json.gz": gzip.compress(LINES), "a.arrow": arrow_stream()}.get(name, LINES)
    (tmp_path / name).write_bytes(raw)
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "dataset_info.json").write_text('{\n "text": "a description"\n}')
    (tmp_path / "state.json").write_text('{"_fingerprint": "x"}\n')
    assert texts(tmp_path) == ["eins", "zwei"]


def test_known_names_keep_a_folder_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "b.json").write_bytes(LINES)
    source = resolve(None, [str(tmp_path)])
    assert [Path(unit.path).name for unit in source.units] == ["a.jsonl"]
    assert "1 .json" in " ".join(source.notes)
    assert len(resolve(None, [str(tmp_path)], reading=Reading("jsonl")).units) == 2


def test_a_format_takes_what_fits_it_or_is_named_so(tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_bytes(b'{"text"')
    (tmp_path / "lines.dat").write_bytes(LINES)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "page.html").write_bytes(b"<html>")
    for form, names in (
        ("jsonl", ["broken.jsonl", "lines.dat"]),
        ("text", ["broken.jsonl", "latin.txt", "lines.dat", "page.html"]),
    ):
        units = resolve(None, [str(tmp_path)], reading=Reading(form)).units  # type: ignore[arg-type]
        assert [Path(unit.path).name for unit in units] == names


# ---------------------------------------------------------------------------------------- links


def link(target: Path, at: Path) -> None:
    at.symlink_to(target, target_is_directory=target.is_dir())


def test_linked_folders_and_files_are_read_once(tmp_path: Path) -> None:
    corpus, store = tmp_path / "corpus", tmp_path / "store"
    for folder, name in ((corpus, "a"), (corpus / "z", "z"), (store, "b"), (store / "deep", "c")):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.txt").write_text(name)
    link(store, corpus / "linked")
    link(corpus / "z", corpus / "again")  # a folder that is there already
    link(corpus, corpus / "z" / "cycle")
    link(tmp_path, corpus / "up")
    link(Path("/"), corpus / "root")
    link(corpus / "a.txt", corpus / "copy-of-a.txt")
    source = resolve(None, [str(corpus)])
    names = [str(Path(unit.path).relative_to(corpus)) for unit in source.units]
    assert names == ["a.txt", "linked/b.txt", "linked/deep/c.txt", "z/z.txt"]
    said = " ".join(source.notes)
    assert "lead to 4 folders that are read already" in said
    assert "1 files a second time" in said
    assert "copy-of-a.txt" in said
    pattern = resolve(None, [str(corpus / "**" / "*.txt")])
    assert [unit.path for unit in pattern.units] == [unit.path for unit in source.units]
    both = resolve(None, [str(corpus), str(store), str(corpus / "linked" / "b.txt")])
    assert len(both.units) == 4


@pytest.mark.parametrize("how", ["folder", "glob", "deep glob", "name"])
def test_a_link_that_leads_nowhere_is_an_error(tmp_path: Path, how: str) -> None:
    (tmp_path / "p0.jsonl").write_bytes(LINES)
    link(tmp_path / "missing", tmp_path / "p1.jsonl")
    path = {"folder": ".", "glob": "*.jsonl", "deep glob": "**/*.jsonl", "name": "p1.jsonl"}[how]
    with pytest.raises(LmError, match=r"p1\.jsonl: a link to .*missing, which is not there") as caught:
        resolve(None, [str(tmp_path / path)])
    assert caught.value.code == 65


def test_other_links_that_lead_nowhere_are_named(tmp_path: Path) -> None:
    (tmp_path / "p0.jsonl").write_bytes(LINES)
    link(tmp_path / "missing", tmp_path / "blob")
    assert "1 links that lead nowhere" in " ".join(resolve(None, [str(tmp_path)]).notes)


def test_a_pipe_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(LmError, match="not a regular file"):
        resolve(None, [str(tmp_path / "a.txt")])
    (tmp_path / "b.txt").write_text("b")
    source = resolve(None, [str(tmp_path)])
    assert len(source.units) == 1
    assert "1 pipes or devices" in " ".join(source.notes)


def test_folders_that_a_pattern_matches_are_searched(tmp_path: Path) -> None:
    for name in ("x/a.txt", "x/deep/b.txt", "c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert sorted(texts(tmp_path / "*")) == ["c.txt", "x/a.txt", "x/deep/b.txt"]


@pytest.mark.parametrize(
    "pattern", ["**", "**/*", "**/*.txt", "x/**", "**/deep/*", "x/**/*.md", "**/[ab].txt", "?/**/c*", "**/x*/**/*.txt"]
)
def test_patterns_match_what_the_standard_library_matches(tmp_path: Path, pattern: str) -> None:
    for name in ("a.txt", "x/a.txt", "x/deep/b.txt", "x/deep/c.md", "xx/d/e.txt", "xx/deep/f.txt", "x/.no.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    found = glob.glob(str(tmp_path / pattern), recursive=True)
    expected = sorted(os.path.relpath(p, tmp_path) for p in found if os.path.isfile(p))
    assert sorted(texts(tmp_path / pattern)) == expected


# ---------------------------------------------------------------------------------------- one input, many spellings


@pytest.mark.parametrize("again", ["txt/", "./txt", "txt/.", "txt//", "../{here}/txt", "{tmp}/txt"])
def test_every_spelling_of_a_folder_is_the_same_input(
    tmp_path: Path, again: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmcore.data.plan import TokenizeConfig
    from lmcore.data.tokenization import tokenize

    monkeypatch.chdir(tmp_path)
    (tmp_path / "txt").mkdir()
    (tmp_path / "txt" / "a.txt").write_text("hello")
    corpora.tokenizer(tmp_path)
    first = tokenize(TokenizeConfig(paths=("txt",), tokenizer="small"), tmp_path / "set")
    spelled = again.format(here=tmp_path.name, tmp=tmp_path)
    config = TokenizeConfig(paths=(spelled,), tokenizer="./small/tokenizer.json")
    second = tokenize(config, tmp_path / "set")
    assert (second.already_finished, second.dataset_id) == (True, first.dataset_id)
    shutil.copytree(tmp_path / "txt", tmp_path / "other")
    with pytest.raises(LmError, match="begun with other options"):
        tokenize(TokenizeConfig(paths=("other",), tokenizer="small"), tmp_path / "set")


@pytest.mark.parametrize(
    "change",
    [
        {"path": 3},
        {"path": ""},
        {"path": "a\0b"},
        {"format": "exe"},
        {"size": "9"},
        {"size": True},
        {"size": 1.5},
        {"size": -2},
        {"size": 1 << 80},
        {"compression": "rar"},
        {"fingerprint": None},
        {"path_hex": "zz"},
        {"path_hex": 7},
        {"separators": "ab"},
        {"separators": [3]},
        {"separators": ["x"]},
    ],
)
def test_a_unit_of_a_plan_is_checked_whole(tmp_path: Path, change: dict[str, object]) -> None:
    (tmp_path / "a.txt").write_text("hello")
    sound = local_unit(tmp_path / "a.txt").to_json()
    assert Unit.from_json(json.loads(json.dumps(sound))) == local_unit(tmp_path / "a.txt")
    with pytest.raises(ValueError, match=r"unit|non-hexadecimal"):
        Unit.from_json(sound | change)
