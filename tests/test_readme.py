"""Every command of the README runs as printed, in a fresh folder, in order.

The shell blocks are executed with the environment's `lm` and `make`. Training is cut to a few steps by settings that
are appended to the `lm train` lines; the slow test runs them unchanged, in a fresh clone and a fresh environment.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FEW_STEPS = " ".join(
    f"--set {setting}"
    for setting in (
        "train.steps=3",
        "train.batch_tokens=2048",
        "train.eval.tokens=4096",
        "model.num_layers=2",
        "model.d_model=64",
        "model.num_heads=2",
        "model.num_kv_heads=1",
        "model.head_dim=32",
        "model.d_ff=128",
    )
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def shell_commands() -> list[str]:
    return [line for block in blocks("sh") for line in block.splitlines() if line and not line.startswith("#")]


def environment(tmp_path: Path) -> dict[str, str]:
    """PATH with an `lm` that runs this checkout with this interpreter."""
    programs = tmp_path / "bin"
    programs.mkdir()
    script = programs / "lm"
    script.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m lmcore "$@"\n')
    script.chmod(0o755)
    return {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}


def test_the_library_examples_run(tmp_path):
    for block in blocks("python"):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", block],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == 0, done.stderr


def test_the_make_targets_of_the_readme_exist():
    for command in shell_commands():
        if command.startswith("make "):
            done = subprocess.run(["sh", "-c", f"{command} -n"], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            assert "lm " in done.stdout


def test_the_own_data_chapter_runs_as_printed(tmp_path):
    env = environment(tmp_path)
    texts = tmp_path / "my-texts"
    texts.mkdir()
    for path in sorted((ROOT / "docs").glob("*.md")) + sorted((ROOT / "lmcore").rglob("*.py")):
        shutil.copy(path, texts / f"{path.parent.name}-{path.name}")
    ran = 0
    for command in shell_commands():
        if not command.startswith("lm "):
            continue
        shown = command
        if "--val-fraction 0.01" in command:
            command = command.replace("0.01", "0.1")  # 1 % of so few documents may be none
        if "lm train" in command:
            command += f" {FEW_STEPS}"
        command = command.replace("train:8192", "train:1024")
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=250
        )
        assert done.returncode == 0, f"{shown}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        ran += 1
    assert ran >= 6


def test_the_tour_runs(tmp_path):
    """docs/tour.sh, word for word: fourteen commands from text to an exported model and back."""
    env = environment(tmp_path) | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(["bash", ROOT / "docs" / "tour.sh"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    assert "nothing left to do" in done.stdout + done.stderr or "nothing to do" in done.stdout + done.stderr
    assert "transformers computes the same logits" in done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_two_commands_from_a_fresh_clone(tmp_path):
    """A stranger's first ten minutes: clone, make data train (twice), make generate."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("VIRTUAL_ENV", "PYTHONPATH", "OMP_"))}
    for command in ("make data train", "make data train", "make eval", "make generate PROMPT='import os'"):
        done = subprocess.run(["bash", "-c", command], cwd=clone, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
    assert "import os" in done.stdout
