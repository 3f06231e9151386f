"""`lm import-model` through its entry point."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmcore.inference.export import export_model
from tests.inference.tiny import documents, make_run, make_set


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("import-command")
    run = make_run(root / "runs" / "tiny", make_set(root / "set", documents()))
    return export_model(run, root / "model").out


def test_imported_models_generate_and_evaluate(lm: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    done = lm("import-model", model, "--out", tmp_path / "run", "-q")
    assert done.code == 0
    assert f"lm generate --checkpoint {tmp_path / 'run'}" in done.out
    assert lm("generate", "-c", tmp_path / "run", "-p", "one", "-m", 3).out.startswith("one")
    evaluated = lm("eval", tmp_path / "run", "--data", model.parent / "set" / "val", "--json", "-q")
    original = lm("eval", model.parent / "runs" / "tiny", "--json", "-q")
    losses = [json.loads(o.out)["evaluations"][0]["loss"] for o in (evaluated, original)]
    assert losses[0] == losses[1]


def test_json_and_errors(lm: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    done = lm("import-model", model, "-o", tmp_path / "run", "--json", "-q")
    assert json.loads(done.out)["config"]["d_model"] == 32
    assert "was done before" in lm("import-model", model, "-o", tmp_path / "run").err
    assert lm("import-model", "./nowhere", "-o", tmp_path / "x").code == 2
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text(json.dumps(config | {"attention_bias": True}))
    refused = lm("import-model", tmp_path / "bad", "-o", tmp_path / "x")
    assert (refused.code, "attention_bias" in refused.err) == (2, True)
