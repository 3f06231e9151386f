"""`lm generate` through its entry point."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.inference.tiny import documents, make_run, make_set


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("generate")
    return make_run(root / "runs" / "tiny", make_set(root / "set", documents()))


def test_text_goes_to_stdout_and_talk_to_stderr(lm: Callable[..., Any], run: Path) -> None:
    done = lm("generate", "-c", run, "-p", "one two", "-m", 10, "--device", "cpu")
    assert done.code == 0
    assert done.out.startswith("one two")
    assert done.out.endswith("\n")
    assert "step-00000003" in done.err
    again = lm("generate", "-c", run, "-p", "one two", "-m", 10, "--device", "cpu", "--quiet", "--no-echo")
    assert again.err == ""
    assert "one two" + again.out == done.out
    other = lm("generate", "-c", run, "-p", "one two", "-m", 10, "--device", "cpu", "--seed", 1)
    assert other.out != done.out


def test_json(lm: Callable[..., Any], run: Path) -> None:
    done = lm("generate", "-c", run, "-p", "a", "-p", "b", "-n", 2, "-m", 5, "--json", "--logprobs", 2, "-q")
    document = json.loads(done.out)
    assert done.err == ""
    assert [(t["prompt"], t["sample"]) for t in document["texts"]] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    assert document["sampling"]["max_tokens"] == 5
    for text in document["texts"]:
        assert len(text["tokens"]) == len(text["logprobs"]) <= 5
        assert text["finish"] in ("eos", "length")
        assert all(entry["logprob"] <= 0 and len(entry["top"]) == 2 for entry in text["logprobs"])


def test_several_texts_have_headings_in_order(lm: Callable[..., Any], run: Path) -> None:
    done = lm("generate", "-c", run, "-p", "a", "-p", "b", "-n", 2, "-m", 3)
    headings = [line for line in done.out.splitlines() if line.startswith("--- ")]
    assert headings == [f"--- prompt {p}, sample {s}" for p in (1, 2) for s in (1, 2)]


def test_prompts_from_files_and_stdin(lm: Callable[..., Any], run: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("caf\u00e9\n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('"two"\n\n{"prompt": "one"}\n', encoding="utf-8")
    options = ("generate", "-c", run, "-m", 2, "--json", "-q")
    done = lm(*options, "-p", "x", "-f", tmp_path / "a.txt", "-f", tmp_path / "b.jsonl", "-f", "-", stdin="in\n")
    assert [text["prompt"] for text in json.loads(done.out)["texts"]] == ["x", "caf\u00e9", "two", "one", "in"]
    assert json.loads(lm(*options, stdin="def f").out)["texts"][0]["prompt"] == "def f"


def test_the_newest_run_is_the_default(lm: Callable[..., Any], run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parent.parent)
    done = lm("generate", "-p", "a", "-m", 2, "--json", "-q")
    assert json.loads(done.out)["checkpoint"] == "runs/tiny/checkpoints/step-00000003"


def test_interactive_loop(lm: Callable[..., Any], run: Path) -> None:
    done = lm("generate", "-c", run, "-i", "-m", 3, "-q", stdin="one\ntwo\n")
    assert done.code == 0
    assert [line[:3] for line in done.out.splitlines() if line.startswith(("one", "two"))] == ["one", "two"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["-c", "nowhere", "-p", "x"], 2, "no such run or checkpoint"),
        (["--runs", "nowhere", "-p", "x"], 2, "no trained model here"),
        (["-c", "RUN", "-p", "x", "--temperature", "-1"], 2, "temperature"),
        (["-c", "RUN", "-p", "x", "--top-p", "0"], 2, "top_p"),
        (["-c", "RUN", "-f", "missing.txt"], 2, "missing.txt: no such file"),
        (["-c", "RUN", "-f", "BAD"], 65, "not valid JSON"),
        (["-c", "RUN", "-p", "x" * 40, "--overflow", "stop"], 2, "context of 32"),
        (["-c", "RUN", "-p", "x", "--device", "tpu"], 2, "tpu"),
    ],
)
def test_errors_are_sentences(
    lm: Callable[..., Any], run: Path, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    (tmp_path / "bad.jsonl").write_text("{", encoding="utf-8")
    named = {"RUN": str(run), "BAD": str(tmp_path / "bad.jsonl")}
    done = lm("generate", *(named.get(argument, argument) for argument in arguments), stdin="")
    assert (done.code, done.out) == (code, "")
    assert message in done.err.replace("\n", " ")
    assert "Traceback" not in done.err


def test_help_has_examples(lm: Callable[..., Any]) -> None:
    done = lm("generate", "--help")
    assert done.code == 0
    for word in ("Prompt", "Sampling", "Model and speed", "Output", "lm generate --prompt"):
        assert word in done.out


def _on_terminal(run: Path, *arguments: str, interrupt: bool = False) -> tuple[int, bytes]:
    """Run with a terminal as stdout; returns (exit status, everything that reached the terminal)."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "lmcore", "generate", "-c", str(run), "-q", *arguments],
        stdout=theirs,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        env=environment,
    )
    os.close(theirs)
    seen, deadline = b"", time.monotonic() + 60
    while time.monotonic() < deadline:
        ready, _, _ = select.select([ours], [], [], 0.2)
        if ready:
            try:
                piece = os.read(ours, 65536)
            except OSError:
                break
            if not piece:
                break
            seen += piece
            if interrupt and len(seen) > 50:
                process.send_signal(signal.SIGINT)
                interrupt = False
    assert process.stderr is not None
    process.stderr.close()
    os.close(ours)
    return process.wait(30), seen


def test_control_characters_never_reach_a_terminal(run: Path) -> None:
    """The random byte model writes all kinds of bytes; piped they are data, on a terminal they are escaped."""
    status, seen = _on_terminal(run, "-p", "a\x1b[31mb\x07", "-m", "200", "-t", "3")
    assert status == 0
    text = seen.decode("utf-8")  # no character is cut
    assert all(c.isprintable() or c in "\r\n\t" for c in text)
    assert "a\\x1b[31mb\\x07" in text


def test_ctrl_c_leaves_with_130(run: Path) -> None:
    status, seen = _on_terminal(run, "-p", "a", "-m", "1000000", interrupt=True)
    assert status in (130, -signal.SIGINT)
    assert seen


def test_a_closed_pipe_is_no_error(run: Path) -> None:
    done = subprocess.run(
        f"{sys.executable} -m lmcore generate -c {run} -p abc -m 2000 -q | head -c 1; echo ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.stdout == "a0\n"
    assert done.stderr == ""


PROMPTS = b'\xef\xbb\xbf\n{"prompt": "a\xe2\x80\xa8b"}\r\n\n\xef\xbb\xbf"c"\n'


@pytest.mark.parametrize("name", ["p.jsonl", "p.NDJSON", "p.jsonl.gz", "p", "p.prompts", "-"])
def test_prompts_are_lines_wherever_they_stand(tmp_path, monkeypatch, name):
    """A mark of the editor, blank lines and U+2028 are no prompts and cut none."""
    import gzip
    import io
    import sys

    from lmcore.tools.generate import _prompts

    monkeypatch.chdir(tmp_path)
    if name == "-":
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(PROMPTS)))
    else:
        (tmp_path / name).write_bytes(gzip.compress(PROMPTS) if name.endswith("gz") else PROMPTS)
    assert _prompts(["first"], [name]) == ["first", "a\u2028b", "c"]


@pytest.mark.parametrize("name", ["p.txt", "p.md"])
def test_a_prompt_that_is_json_is_text_where_its_name_says_so(tmp_path, name):
    from lmcore.tools.generate import _prompts

    (tmp_path / name).write_bytes(b'\xef\xbb\xbf{"a": 1}\n')
    assert _prompts([], [str(tmp_path / name)]) == ['{"a": 1}']
