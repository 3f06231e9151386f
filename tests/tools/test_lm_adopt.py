"""`lm import` as a user meets it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tiny_sets import random_documents

Lm = Callable[..., Any]


def foreign(folder: Path) -> Path:
    folder.mkdir()
    ids = np.concatenate([np.array([*t, 256], np.uint16) for t in random_documents(1, 40, 700)])
    ids[:8000].tofile(folder / "train.bin")
    ids[8000:].tofile(folder / "val.bin")
    return folder


def test_import_then_everything_works(lm: Lm, tmp_path: Path) -> None:
    source = foreign(tmp_path / "source")
    seen = lm("validate", source)
    assert seen.code == 0
    assert "warning V201" in seen.out
    outcome = lm("import", source, "--out", tmp_path / "set", "--tokenizer", "byte")
    assert outcome.code == 0, outcome.err
    assert "Next: lm validate" in outcome.out
    for part in ("train", "val"):
        assert lm("validate", tmp_path / "set" / part).code == 0
    assert lm("split", tmp_path / "set" / "train", "--val-fraction", "0.2").code == 0


def test_json_and_errors(lm: Lm, tmp_path: Path) -> None:
    source = foreign(tmp_path / "source")
    document = json.loads(lm("import", source / "train.bin", "--out", tmp_path / "a", "--json").out)
    assert document[0]["n_tokens"] == 8000
    assert document[0]["warnings"]
    again = lm("import", source / "train.bin", "--out", tmp_path / "a")
    assert again.code == 0
    assert "was done before" in again.err
    assert lm("import", tmp_path / "nothing", "--out", tmp_path / "b").code == 2
    (tmp_path / "x.npy").write_bytes(b"abc")
    assert lm("import", tmp_path / "x.npy", "--out", tmp_path / "b").code == 65
    assert lm("import", source, "--out", tmp_path / "b", "--width", "3").code == 2
