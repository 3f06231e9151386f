"""Every way of making views, and every command that reads one; and what becomes of a run whose views are made anew."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_sets import TinySet, random_documents

from lmcore.data.manifest import read_manifest
from lmcore.data.split import document_hashes

Lm = Callable[..., Any]
LINKS = [("--link", "symlink"), ("--link", "hardlink"), ("--link", "copy"), ("--link", "none"), ("--materialize",)]
TINY = """
model: {d_model: 16, num_layers: 1, num_heads: 2, d_ff: 32, context_length: 32}
train:
  {steps: 2, batch_tokens: 128, dtype: fp32, compile: false, threads: 1, device: cpu, eval: {tokens: 256}}
"""


@pytest.fixture
def here(tmp_path: Path, make_set: Callable[..., TinySet], monkeypatch: pytest.MonkeyPatch) -> TinySet:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(TINY)
    return make_set("set", documents=random_documents(7, 60, 700))


def train(lm: Lm, run: str = "runs/a") -> Any:
    return lm("train", run, "--preset", "tiny.yaml", "--data", "set", "-q")


@pytest.mark.parametrize(
    ("way", "by"),
    [(way, "document") for way in LINKS] + [(way, "rows") for way in LINKS if way[-1] not in ("hardlink", "copy")],
    ids=lambda value: value if isinstance(value, str) else value[-1].removeprefix("--"),
)
def test_every_command_reads_every_view(lm: Lm, here: TinySet, way: tuple[str, ...], by: str) -> None:
    made = lm("split", "set", "--val-fraction", "0.2", "--by", by, *way, "--json")
    assert made.code == 0, made.err
    views = {Path(view["path"]).name: view for view in json.loads(made.out)["views"]}
    cut = by == "rows"
    assert json.loads(made.out)["leakage"] == ("documents" if cut else "none")
    n_docs = sum(view["n_docs"] for view in views.values())
    if cut and way == ("--materialize",):
        assert n_docs > 60  # of a document that was cut each piece is one
    else:
        assert n_docs == 60
    for place in ("set", "set/val", "set/train"):
        done = lm("validate", place, "--deep", "--json")
        codes = {finding["code"] for finding in json.loads(done.out)["findings"]}
        assert not {code for code in codes if code in ("V060", "V061", "V062", "V063")}, done.out
        assert done.code == 0, done.out
        assert ("V064" in codes) is cut
        looked = lm("inspect", place, "--token", "0", "--json")
        assert looked.code == 0, looked.err
    assert train(lm).code == 0
    assert lm("inspect", "runs/a", "--step", "1", "--json").code == 0
    assert lm("info", "runs/a").code == 0
    assert lm("plan", "tiny.yaml", "--data", "set").code == 0
    sides = [document_hashes(p, read_manifest(p)) for p in (here.path / "train", here.path / "val")]
    scored = lm("eval", "runs/a", "--json", "-q")
    if cut:
        assert scored.code == 65
        assert f"of its {len(sides[1])} documents are in the training data" in scored.err
        scored = lm("eval", "runs/a", "--json", "-q", "--allow-overlap")
    assert scored.code == 0, scored.err
    for seen in ("set", "set/train"):
        refused = lm("eval", "runs/a", "--data", seen)
        assert refused.code == 65
        assert "in the training data" in refused.err


@pytest.mark.parametrize("way", LINKS[::4], ids=lambda way: way[-1].removeprefix("--"))
def test_a_run_is_not_scored_on_what_it_may_have_seen(lm: Lm, here: TinySet, way: tuple[str, ...]) -> None:
    assert lm("split", "set", "--val-fraction", "0.2", *way).code == 0
    assert train(lm).code == 0
    first = lm("eval", "runs/a", "--json", "-q")
    assert first.code == 0, first.err
    assert lm("split", "set", "--val-fraction", "0.3", *way, "--replace").code == 0
    for data in ((), ("--data", "set"), ("--data", "set/train"), ("--data", "set/val")):
        refused = lm("eval", "runs/a", *data)
        assert (refused.code, refused.out) == (65, "")
        assert "whose views are other ones now than in the training" in refused.err
    assert lm("eval", "runs/a", "--allow-overlap").code == 0
    resumed = lm("train", "--resume", "runs/a", "--override", "train.steps=4")
    assert resumed.code == 65
    assert "no longer there" in resumed.err
    assert lm("split", "set", "--val-fraction", "0.2", *way, "--replace").code == 0  # as it was
    again = lm("eval", "runs/a", "--json", "-q")
    assert (again.code, again.out) == (0, first.out)
