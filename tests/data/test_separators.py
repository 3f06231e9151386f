"""Text that holds many documents is divided at its marks, the same by every way, or is said to hold them."""

from __future__ import annotations

import gzip
import json
import random
import re
from pathlib import Path
from typing import Any

import corpora
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcore.data import documents, readers, separators
from lmcore.data.forecast import forecast
from lmcore.data.plan import TokenizeConfig, read_plan
from lmcore.data.provenance import Locator
from lmcore.data.readers import Place, read, read_document
from lmcore.data.stream import TokenStream
from lmcore.data.streaming import TextStream
from lmcore.data.tokenization import tokenize
from lmcore.errors import LmError

STORIES = [f"Once upon a time there were {k} stories.\nThe end of no. {k}: \u00e4\U0001f600." for k in range(40)]


def divided(text: bytes, mark: bytes, own_line: bool) -> list[bytes]:
    """The definition, by regular expressions."""
    if b"\n" in mark:
        return text.split(mark)
    line = rb"(?:\A|(?<=\n))" + re.escape(mark) + rb"(?:\r?\n|\Z)"
    found, last = [], 0
    for match in re.finditer(line if own_line else line + b"|" + re.escape(mark), text):
        begin = match.start()
        alone = text[begin - 1 : begin] == b"\n" and re.match(rb"\r?\n|\Z", text[begin + len(mark) :])
        if begin and alone:
            begin -= 2 if text[begin - 2 : begin] == b"\r\n" else 1
        found.append(text[last : max(begin, last)])
        last = match.end()
    return [*found, text[last:]]


@settings(max_examples=400, derandomize=True, deadline=None)
@given(
    parts=st.lists(st.sampled_from(["M", "M", "\n", "\r\n", "a", "b\u00e4", "<|", "\r", "\n\n"]), max_size=14),
    mark=st.sampled_from(["<|endoftext|>", "</s>", "\f", "\n\n", "ab", "aa", "a\nb"]),
    own_line=st.booleans(),
    size=st.integers(1, 7),
)
def test_a_text_is_divided_alike_in_pieces_of_any_size(parts: list[str], mark: str, own_line: bool, size: int) -> None:
    own_line = own_line and "\n" not in mark
    text = "".join(mark if part == "M" else part for part in parts).encode()
    chunks = [text[k : k + size] for k in range(0, len(text), size)]
    kept = ("=" if own_line else "+") + mark
    assert list(separators.split(chunks, [kept], "x")) == divided(text, mark.encode(), own_line)


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        ("auto", "auto"),
        (r"\n\n", "\n\n"),
        (r"\x61uto", "auto"),
        (r"a\\n", "a\\n"),
        (r"\u00e4\f", "\u00e4\f"),
        ("|", "|"),
    ],
)
def test_escapes_of_a_separator(value: str, meant: str) -> None:
    assert separators.parse(value) == meant


@pytest.mark.parametrize("value", ["", r"\d", "\\", r"\ud800"])
def test_a_separator_that_means_nothing_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match="separator"):
        TokenizeConfig(paths=("x",), separator=value)


# ---------------------------------------------------------------------------------------- by every way


def texts_of(directory: Path) -> list[str]:
    stream = corpora.stream_of(directory)
    parts = np.split(stream, np.flatnonzero(stream == 256) + 1)[:-1]
    return [bytes(part[part < 256].astype(np.uint8)).decode() for part in parts]


def config(path: Path, separator: str | None = "auto", **options: Any) -> TokenizeConfig:
    return TokenizeConfig(paths=(str(path),), **{"tokenizer": "byte", "separator": separator, **options})


def corpus(folder: Path, mark: str = "\n<|endoftext|>\n", end: str = "\n<|endoftext|>\n") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a.txt").write_text(mark.join(STORIES[:25]) + end)
    (folder / "b.txt.gz").write_bytes(gzip.compress((mark.join(STORIES[25:]) + end).encode()))
    (folder / "c.py").write_text("x = '''\n<|endoftext|>\n'''\n")
    return folder


@pytest.mark.parametrize(
    ("mark", "end", "separator"),
    [
        ("\n<|endoftext|>\n", "\n<|endoftext|>\n", "auto"),
        ("\n</s>\n", "", "auto"),
        ("\r\n<|end_of_text|>\r\n", "\n", "auto"),
        ("\n\f\n", "", "auto"),
        ("<|endoftext|>", "<|endoftext|>", "<|endoftext|>"),
        ("\n<|endoftext|>\n", "", "<|endoftext|>"),
        ("\n\n\n", "", r"\n\n\n"),
        ("\n====\n", "", "===="),
    ],
)
@pytest.mark.parametrize("block", [60, 8 << 20])
@pytest.mark.parametrize("whole", [0, 1 << 20])
def test_every_mark_divides_files_of_every_size(
    tmp_path: Path, mark: str, end: str, separator: str, block: int, whole: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "BLOCK_BYTES", block)
    monkeypatch.setattr(readers, "_GROUP_BYTES", whole)  # above it a file is read in pieces
    folder = corpus(tmp_path / "in", mark, end)
    tokenize(config(folder, separator), tmp_path / "set")
    made = texts_of(tmp_path / "set")
    end = "\n" if end == "\n" else ""
    assert made[:-1] == [*STORIES[:24], STORIES[24] + end, *STORIES[25:-1], STORIES[-1] + end]
    assert made[-1].startswith("x = ")
    plan = read_plan(tmp_path / "set")
    assert [bool(unit.separators) for unit in plan.units] == [True, True, False]
    for row in (0, 7, 24):
        assert read_document(plan.units, "text", 0, row) == (STORIES[row] + (end if row == 24 else "")).encode()
    pieces = {(b.unit, b.piece, b.base) for b in read(plan.units, "text")}
    for unit, piece, base in pieces:
        rest = [
            b.text(k).decode() for b in read(plan.units, "text", start=Place(unit, piece, base)) for k in range(len(b))
        ]
        assert rest == made[len(made) - len(rest) :]


def test_a_view_leads_back_to_the_story(tmp_path: Path) -> None:
    folder = corpus(tmp_path / "in")
    tokenize(config(folder), tmp_path / "set")
    locator = Locator(TokenStream.open(tmp_path / "set"))
    (place,) = locator.by_text(STORIES[7].encode())
    assert (place.row, Path(place.source).name) == (7, "a.txt")
    assert locator.source_text(place) == STORIES[7].encode()


def test_streams_parts_and_the_trained_vocabulary_see_the_same_documents(tmp_path: Path) -> None:
    folder = corpus(tmp_path / "in")
    lines = corpora.write_jsonl(tmp_path / "lines.jsonl", [*STORIES, (folder / "c.py").read_text()])
    options = {"tokenizer": "train:400"}
    divided = tokenize(config(folder, **options), tmp_path / "set")
    plain = tokenize(config(lines, None, **options), tmp_path / "plain")
    assert (tmp_path / "set/tokenizer.json").read_bytes() == (tmp_path / "plain/tokenizer.json").read_bytes()
    np.testing.assert_array_equal(corpora.stream_of(tmp_path / "set"), corpora.stream_of(tmp_path / "plain"))
    assert divided.n_docs == plain.n_docs == 41
    where = str(tmp_path / "set/tokenizer.json")
    streams = [
        TextStream.open(config(path, separator, tokenizer=where), tmp_path / name, context_length=64, window=8)
        for path, separator, name in ((folder, "auto", "s"), (lines, None, "t"))
    ]
    for stream in streams:
        with stream:
            stream.batch(0, 1)
    np.testing.assert_array_equal(streams[0].batch(0, 8), streams[1].batch(0, 8))
    for stream in streams:
        stream.close()
    parts = [texts_of(_part(folder, tmp_path, number)) for number in (1, 2, 3)]
    assert [text for part in parts for text in part] == [*STORIES, (folder / "c.py").read_text()]


def _part(folder: Path, home: Path, number: int) -> Path:
    tokenize(config(folder, part=number, parts=3), home / f"part-{number}")
    return home / f"part-{number}"


def test_the_separator_belongs_to_the_request(tmp_path: Path) -> None:
    folder = corpus(tmp_path / "in")
    tokenize(config(folder), tmp_path / "set")
    assert tokenize(config(folder), tmp_path / "set").already_finished
    with pytest.raises(LmError, match="--separator: auto in the set, not given now"):
        tokenize(config(folder, None), tmp_path / "set")


def test_empty_stretches_are_no_documents_and_have_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("<|endoftext|>\n<|endoftext|>\neins\n<|endoftext|>\n\n<|endoftext|>\nzwei")
    raw = (tmp_path / "a.txt").read_bytes()
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + raw)  # an editor's mark hides no separator
    report = tokenize(config(tmp_path / "a.txt"), tmp_path / "set")
    assert texts_of(tmp_path / "set") == ["eins", "zwei"]
    assert report.dropped == {}
    assert [row for _, row, _, _ in corpora.documents_of(tmp_path / "set")] == [2, 4]


def test_the_limit_of_a_document_holds_for_each_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MAX_DOCUMENT_BYTES", 1000)
    monkeypatch.setattr(readers, "_GROUP_BYTES", 0)
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(STORIES))
    with pytest.raises(LmError, match=r"one document of .* bytes") as caught:
        tokenize(config(tmp_path / "a.txt", None), tmp_path / "whole")
    assert "--separator" in caught.value.hint
    assert tokenize(config(tmp_path / "a.txt"), tmp_path / "set").n_docs == 40


def test_a_bad_story_is_named_by_its_number(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"eins\n</s>\nzw\xffei\n</s>\ndrei")
    with pytest.raises(LmError, match=r"a\.txt: document 2: not UTF-8 text"):
        tokenize(config(tmp_path / "a.txt"), tmp_path / "set")
    report = tokenize(config(tmp_path / "a.txt", on_bad_doc="skip"), tmp_path / "skip")
    assert (report.n_docs, report.dropped) == (2, {"bad_utf8": 1})


# ---------------------------------------------------------------------------------------- what is said


class Notes:
    def __init__(self) -> None:
        self.said: list[str] = []

    def start(self, task: str, total: float | None, unit: str) -> None: ...

    def advance(self, amount: float) -> None: ...

    def finish(self) -> None: ...

    def note(self, message: str) -> None:
        self.said.append(message)

    warn = note


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("\n<|endoftext|>\n".join(STORIES), "39 lines that are <|endoftext|>"),
        ("\n</s>\n".join(STORIES), "39 lines that are </s>"),
        ("\n\f\n".join(STORIES), r"39 lines that are \f"),
        ("<|endoftext|>".join(STORIES), "39 times <|endoftext|>"),
        ("\n\n\n".join(STORIES), ""),
        ("<p>a</s>b</p>" * 10 + "\f\x0c", ""),
    ],
)
def test_marks_that_are_seen_are_said_and_leave_the_text_alone(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    notes = Notes()
    report = tokenize(config(tmp_path / "a.txt", None), tmp_path / "set", progress=notes)
    assert (report.n_docs, texts_of(tmp_path / "set")) == (1, [text])
    told = forecast(config(tmp_path / "a.txt", None), tmp_path / "set", workers=1)
    stream = Notes()
    TextStream.open(config(tmp_path / "a.txt", None), tmp_path / "run", context_length=8, window=2, progress=stream)
    for messages in (notes.said, list(told.notes), stream.said):
        marked = [message for message in messages if "--separator" in message]
        assert len(marked) == bool(said), messages
        if said:
            assert said in marked[0]
            assert str(tmp_path / "a.txt") in marked[0]


def test_a_separator_without_a_text_file_is_said(tmp_path: Path) -> None:
    notes = Notes()
    lines = corpora.write_jsonl(tmp_path / "a.jsonl", STORIES)
    assert tokenize(config(lines), tmp_path / "set", progress=notes).n_docs == 40
    assert "--separator auto divides files of text, and there are none." in notes.said


def test_a_separator_that_is_nowhere_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("eins\n\nzwei")
    notes = Notes()
    tokenize(config(tmp_path / "a.txt"), tmp_path / "set", progress=notes)
    assert any("no separator was seen" in message for message in notes.said)


def test_the_end_of_text_of_the_tokenizer_is_a_mark(tmp_path: Path) -> None:
    made = json.loads(corpora.tokenizer(tmp_path).read_text())
    text = json.dumps(made).replace("<|endoftext|>", "<END>")
    (tmp_path / "own").mkdir()
    (tmp_path / "own/tokenizer.json").write_text(text)
    (tmp_path / "own/tokenizer_config.json").write_text('{"eos_token": "<END>"}')
    (tmp_path / "a.txt").write_text("\n<END>\n".join(STORIES))
    assert tokenize(config(tmp_path / "a.txt", tokenizer=str(tmp_path / "own")), tmp_path / "set").n_docs == 40


def test_many_small_chunks_cost_little_memory() -> None:
    """A document is held once, whatever the file's size; no part of the text is kept."""
    text = b"x" * 5000 + b"\n<|endoftext|>\n"
    rng = random.Random(3)
    raw = text * 2000
    cuts = sorted(rng.randrange(len(raw)) for _ in range(500))
    chunks = (raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True))
    found = list(separators.split(chunks, ["=<|endoftext|>"], "x"))
    assert found == [b"x" * 5000] * 2000 + [b""]
