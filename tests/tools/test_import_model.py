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


def test_an_export_is_used_as_it_is(lm: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    run, data = model.parent / "runs" / "tiny", model.parent / "set"
    before = {file.name: file.stat().st_mtime_ns for file in model.iterdir()}
    texts = [lm("generate", "-c", path, "-p", "one", "-m", 8, "-q").out for path in (run, model)]
    assert texts[0] == texts[1]
    evaluations = [lm("eval", path, "--data", data / "val", "--json", "-q").out for path in (run, model)]
    losses = [json.loads(out)["evaluations"][0]["loss"] for out in evaluations]
    assert losses[0] == losses[1]
    seen = lm("eval", model, "--data", data / "train", "-q")  # the export tells what it was trained on
    assert (seen.code, "documents" in seen.err) == (65, True), seen.err
    assert "lm eval RUN --data PATH" in lm("eval", model, "-q").err
    assert {file.name: file.stat().st_mtime_ns for file in model.iterdir()} == before


def test_a_folder_that_transformers_wrote_is_used_as_it_is(lm: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    other = transformers.AutoModelForCausalLM.from_pretrained(model, local_files_only=True)
    other.save_pretrained(tmp_path / "theirs")
    refused = lm("generate", "-c", tmp_path / "theirs", "-p", "one", "-m", 8, "-q")
    assert (refused.code, "tokenizer" in refused.err) == (2, True)
    transformers.AutoTokenizer.from_pretrained(model, local_files_only=True).save_pretrained(tmp_path / "theirs")
    texts = [lm("generate", "-c", path, "-p", "one", "-m", 8, "-q").out for path in (model, tmp_path / "theirs")]
    assert texts[0] == texts[1] != ""


def test_what_is_no_model_is_said_to_be_none(lm: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for path, told in [
        (model / "model.safetensors", "lm export RUN --out DIR"),
        (tmp_path / "text", "neither a run directory nor a checkpoint"),
        (tmp_path / "nowhere", "no such run or checkpoint"),
    ]:
        for command in (["generate", "-p", "one", "-c"], ["eval"]):
            done = lm(*command, path)
            assert (done.code, told in done.err) == (2, True), done.err
