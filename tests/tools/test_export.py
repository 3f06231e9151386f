"""`lm export` through its entry point."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.inference.tiny import documents, make_run, make_set


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("export-command")
    make_run(root / "runs" / "tiny", make_set(root / "set", documents()))
    return root


def test_for_people_and_programs(lm: Callable[..., Any], root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(root)
    done = lm("export", "--out", "a", "--check", "-q")  # the newest run is the default
    assert done.code == 0
    assert "39,136 parameters, qwen3" in done.out
    assert "the same logits" in done.out
    again = lm("export", "runs/tiny", "--out", "a", "--force", "--dtype", "bf16", "--json", "-q")
    assert json.loads(again.out)["family"] == "qwen3"
    single = lm("export", "runs/tiny", "-o", "b.safetensors", "--format", "safetensors", "--json", "-q")
    assert json.loads(single.out)["family"] is None


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--out", "set"], 73, "already exists"),
        (["--out", "x", "--family", "llama"], 2, "qk_norm: true"),
        (["--out", "x", "--family", "gpt2"], 2, "gpt2"),
        (["--out", "x", "--average", "last:9"], 2, "asks for 9"),
        (["nowhere", "--out", "x"], 2, "no such run"),
    ],
)
def test_errors_are_sentences(
    lm: Callable[..., Any],
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(root)
    done = lm("export", *options, "-q")
    assert (done.code, done.out) == (code, "")
    assert message in " ".join(done.err.split())
    assert not (root / "x").exists()


def test_help_has_examples(lm: Callable[..., Any]) -> None:
    done = lm("export", "--help")
    assert "lm export runs/nano --out models/nano --check" in " ".join(done.out.split())
