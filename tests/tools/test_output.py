"""What commands print reaches any terminal and any pipe: in every locale, closed early, closed from the start, full."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LM = f"{shlex.quote(sys.executable)} -m lmcore"
TINY = (
    "model: {d_model: 16, num_layers: 1, num_heads: 2, d_ff: 32, context_length: 32}\n"
    "train: {steps: 2, batch_tokens: 128, dtype: fp32, compile: false, threads: 1, device: cpu, eval: {tokens: 64}}\n"
)
LOCALES = {
    "ascii streams": {"PYTHONIOENCODING": "ascii"},
    "latin-1 streams": {"PYTHONIOENCODING": "latin-1"},
    "the C locale": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}
NAMES = {"accents": "größe ☃".encode(), "no UTF-8": b"caf\xe9 \xff"}


def run(here: Path, line: bytes | str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    raw = line if isinstance(line, bytes) else line.encode()
    return subprocess.run(
        ["/bin/bash", "-c", b"set -o pipefail; " + raw.replace(b"lm ", LM.encode() + b" ")],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        cwd=here,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
        check=False,
    )


@pytest.fixture(scope="module", params=NAMES)
def here(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A folder with texts and a preset, of names that few locales have."""
    place, name = tmp_path_factory.mktemp("output"), NAMES[request.param]
    os.mkdir(os.path.join(os.fsencode(place), name))
    with open(os.path.join(os.fsencode(place), name, name + b".txt"), "wb") as file:
        file.write("some größe words ☃ \U0001f600 ".encode() * 400)
    for number in range(20):
        (place / os.fsdecode(name) / f"{number}.txt").write_text(f"{number} more words, größe " * 60, encoding="utf-8")
    (place / "tiny.yaml").write_text(TINY)
    return place, name


def commands(name: bytes) -> list[bytes]:
    q = b"'" + name + b" made'"
    return [
        b"lm tokenize '" + name + b"' --tokenizer byte --out " + q + b"/set",
        b"lm tokenize '" + name + b"' --tokenizer byte --out " + q + b"/set --json",
        b"lm validate " + q + b"/set",
        b"lm validate " + q + b"/set --json",
        b"lm split " + q + b"/set --val-fraction 0.3",
        b"lm split " + q + b"/set --val-fraction 0.3 --json",
        b"lm inspect " + q + b"/set --full-text",
        b"lm inspect " + q + b"/set --json",
        b"lm train " + q + b"/run -p tiny.yaml -d " + q + b"/set",
        b"lm train " + q + b"/run -p tiny.yaml -d " + q + b"/set --json",
        b"lm eval " + q + b"/run",
        b"lm eval " + q + b"/run --json",
        b"lm generate -c " + q + "/run -p 'größe ☃' -m 20".encode(),
        b"lm generate -c " + q + "/run -p 'größe ☃' -m 20 --json".encode(),
        b"lm plan tiny.yaml -d " + q + b"/set",
        b"lm info " + q + b"/run",
        b"lm info " + q + b"/run --json",
        b"lm plot " + q + b"/run",
        b"lm export " + q + b"/run --format safetensors --out " + q + b"/x.safetensors --force",
        b"lm train --help",
        b"lm --help",
    ]


@pytest.mark.slow
@pytest.mark.timeout(1200)  # some sixty processes
@pytest.mark.parametrize("locale", LOCALES)
def test_every_command_speaks_in_every_locale(here: tuple[Path, bytes], locale: str) -> None:
    place, name = here
    for command in commands(name):
        done = run(place, command, **LOCALES[locale])
        assert done.returncode == 0, (command, done.stderr)
        assert b"Traceback" not in done.stderr
        assert b"bug of lmshards" not in done.stderr
        if b"--json" in command:
            json.loads(done.stdout)
    for command in (b"lm validate '" + name + b"x'", b"lm train r -p '" + name + b".yaml'", b"lm eval '" + name + b"'"):
        done = run(place, command, **LOCALES[locale])
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith(b"error: ")


@pytest.mark.slow
@pytest.mark.timeout(1200)  # some sixty processes
@pytest.mark.parametrize("end", ["| head -c 1 >/dev/null", "| true", ">&-", "2>&-", ">&- 2>&-", "2>&1 | true", "<&-"])
def test_every_command_survives_whoever_leaves(here: tuple[Path, bytes], end: str) -> None:
    place, name = here
    run(place, b"; ".join(commands(name)[::2]))
    for command in commands(name):
        done = run(place, command + b" " + end.encode())
        assert done.returncode == 0, (command, done.stderr)
        assert b"Traceback" not in done.stderr
        assert b"Exception ignored" not in done.stderr
        assert b"bug of" not in done.stderr


def test_a_set_and_its_report_in_an_ascii_world(here: tuple[Path, bytes]) -> None:
    place, name = here
    for command in commands(name)[:4]:
        done = run(place, command, PYTHONIOENCODING="ascii")
        assert done.returncode == 0, (command, done.stderr)
    found = json.loads(done.stdout)["sets"][0]["path"]
    assert found.encode(errors="surrogateescape") == name + b" made/set"


def test_a_full_disk_under_stdout_is_said(tmp_path: Path) -> None:
    done = run(tmp_path, "lm info nothing --json >/dev/full")
    assert done.returncode == 2  # what was said went to stderr
    done = run(tmp_path, "lm train --list-presets >/dev/full")
    assert done.returncode == 74
    assert done.stderr.count(b"\n") <= 2
    assert b"Traceback" not in done.stderr


def test_a_pipe_that_closes_early_keeps_the_exit_code(tmp_path: Path) -> None:
    assert run(tmp_path, "lm train --list-presets | head -1").returncode == 0
    assert run(tmp_path, "lm --help | true").returncode == 0
    assert run(tmp_path, "lm validate nothing | true").returncode == 2
