"""An export is scored by lm-evaluation-harness with the commands of docs/recipes.md, and as `lm eval` scores it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lmcore.inference.export import export_model
from lmcore.inference.tasks import log_likelihoods
from lmcore.training.checkpoint import load_model
from tests.inference.tiny import documents, make_run, make_set

RECIPES = Path(__file__).parents[2] / "docs" / "recipes.md"
MORE = [
    {"question": "one two", "choices": ["three", "caf\u00e9 \u20ac", "two two two"], "answer": 2},
    {"question": "very " * 40 + "long", "choices": ["return x", "y" * 20], "answer": 0},
    {"question": "", "choices": ["one", "two"], "answer": 1},
]


def block(language: str) -> str:
    """The last block of a language in the section."""
    section = RECIPES.read_text(encoding="utf-8").partition("## Evaluate elsewhere\n")[2].partition("\n## ")[0]
    found: list[str] = re.findall(rf"```{language}\n(.*?)```", section, flags=re.DOTALL)
    return found[-1]


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None or importlib.util.find_spec("accelerate") is None,
    reason='NOT TESTED: lm-evaluation-harness is not installed; pip install "lmshards[eval]" "lm_eval[hf]"',
)
def test_the_documented_command_gives_our_log_likelihoods(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", make_set(tmp_path / "set", documents()))
    export_model(run, tmp_path / "exported", kind="hf")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "quiz.yaml").write_text(block("yaml"))
    lines = block("json") + "".join(json.dumps(entry) + "\n" for entry in MORE)
    (tmp_path / "tasks" / "quiz.jsonl").write_text(lines)

    exports, command = block("sh").strip().splitlines()
    program, *arguments = shlex.split(command)
    assert program == "lm_eval"
    variables = dict(pair.split("=") for pair in exports.removeprefix("export ").split())
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", *arguments],
        cwd=tmp_path,
        env=os.environ | variables | {"HF_HOME": str(tmp_path / "hf"), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr

    (samples,) = (tmp_path / "results").rglob("samples_quiz_*.jsonl")
    found = {}
    for line in samples.read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        for index, ((value, greedy),) in enumerate(sample["resps"]):
            found[sample["doc_id"], index] = (float(value), str(greedy) == "True")
    requests = {
        (doc_id, index): (entry["question"], f" {choice}")
        for doc_id, entry in enumerate(map(json.loads, lines.splitlines()))
        for index, choice in enumerate(entry["choices"])
    }
    assert found.keys() == requests.keys()
    loaded = load_model(run)
    for key, (total, greedy) in zip(requests, log_likelihoods(loaded, list(requests.values())), strict=True):
        assert found[key][0] == pytest.approx(total, abs=1e-3, rel=1e-5), requests[key]
        assert found[key][1] == greedy
