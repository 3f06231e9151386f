"""`lm tokenize` reads files and standard input by what they hold, and says so."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import corpora
import numpy as np
import pytest

from lmcore.data.sources import resolve

BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    ("raw", "code", "said"),
    [
        (b'\n\n{"text": "eins"}\n{"text": "zwei"}', 0, ["eins", "zwei"]),
        (BOM + b'\r\n{"text": "eins"}\r\n', 0, ["eins"]),
        (b'{"body": "eins"}\n{"text": "zwei"}\n', 65, "no 'text' here; it has body"),
        (b'{"content": "eins"}\n', 65, "no 'text' here; it has content"),
        (b'{"text": "eins"\n{"text": "zwei"}\n', 65, ":1: not valid JSON"),
        (b'{"text": "eins"}\r{"text": "zwei"}\r', 65, "a carriage return inside of it"),
        (b'"eins"\n"zw\\nei"\n', 65, "an object is expected, not a str"),
        (b'[{"text": "eins"}, {"text": "zwei"}]', 2, "this is one JSON array"),
        (b'{\n  "text": "eins"\n}\n', 2, "a JSON object over several lines"),
        (b'{"text": "' + b"x" * 200_000 + b'"}\n', 0, ["x" * 200_000]),
        ('{"text": "eins"}\n'.encode("utf-16"), 65, "UTF-16 text"),
        ('{"text": "eins"}\n'.encode("utf-16-le"), 65, "UTF-16 text without a byte-order mark"),
        (gzip.compress(b'{"text": "eins"}\n'), 0, ["eins"]),
        (b"id,text\n1,eins\n2,zwei\n", 2, "a table of comma-separated values"),
        (b"eins {zwei}\n", 0, ["eins {zwei}\n"]),
        (b"{eins}\n\nzwei\n", 0, ["{eins}\n\nzwei\n"]),
        (b"42\n", 0, ["42\n"]),
    ],
)
def test_standard_input_is_what_it_holds(
    lm: Callable[..., Any], tmp_path: Path, raw: bytes, code: int, said: str | list[str]
) -> None:
    out = tmp_path / "set"
    done = lm("tokenize", "-", "--tokenizer", "byte", "--out", out, stdin=raw)
    assert done.code == code, done.err
    if isinstance(said, str):
        assert said in done.err
        assert not (out / "manifest.json").exists()
        return
    assert _texts(out) == said
    assert "standard input: " in done.err


def test_the_format_of_standard_input_can_be_said(lm: Callable[..., Any], tmp_path: Path) -> None:
    raw = '{"body": "eins"}\n'
    done = lm("tokenize", "-", "--tokenizer", "byte", "--out", tmp_path / "a", "--format", "text", stdin=raw)
    assert (done.code, _texts(tmp_path / "a")) == (0, [raw])
    again = lm("tokenize", "-", "--tokenizer", "byte", "--out", tmp_path / "a", stdin=raw)
    assert again.code == 2, "the format is part of the request"
    assert "--format: text in the set, auto now" in again.err


def _texts(directory: Path) -> list[str]:
    stream = corpora.stream_of(directory)
    return [
        bytes(part[part < 256].astype(np.uint8)).decode()
        for part in np.split(stream, np.flatnonzero(stream == 256) + 1)[:-1]
    ]


def test_old_plans_ask_for_what_they_asked_for(lm: Callable[..., Any], tmp_path: Path) -> None:
    """A plan of before has neither format nor separator; the same command still continues it."""
    (tmp_path / "a.txt").write_text("hello")
    lm("tokenize", tmp_path / "a.txt", "--tokenizer", "byte", "--out", tmp_path / "set")
    plan = json.loads((tmp_path / "set/plan.json").read_text())
    assert "separators" not in plan["units"][0]
    for key in ("format", "separator"):
        del plan["request"][key]
    (tmp_path / "set/plan.json").write_text(json.dumps(plan))
    done = lm("tokenize", tmp_path / "a.txt", "--tokenizer", "byte", "--out", tmp_path / "set")
    assert (done.code, "finished already" in done.out) == (0, True), done.err
    assert resolve(None, [str(tmp_path / "a.txt")]).units[0].to_json() == plan["units"][0]
