"""`lm plot`: curves of real log lines, in the terminal and in a picture."""

import json
import math
from xml.etree import ElementTree

import pytest


@pytest.fixture
def runs(tmp_path):
    for name, floor in (("a", 2.0), ("b", 3.0)):
        run = tmp_path / name
        (run / "checkpoints").mkdir(parents=True)
        lines = []
        for step in range(1, 201):
            loss = floor + 7 * math.exp(-step / 40)
            lines.append(
                {"step": step, "kind": "train", "tokens": step * 1000, "loss": loss, "lr": 0.01,
                 "time": {"step_s": 0.5, "tokens_per_s": 2000.0}}
            )  # fmt: skip
            if step % 50 == 0:
                lines.append({"step": step, "kind": "val", "loss": loss + 0.1, "bits_per_byte": loss / 3})
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"torn')
    return tmp_path


def test_the_terminal_shows_a_falling_curve_per_run(lm, runs):
    text = lm("plot", runs / "a", runs / "b").out
    rows = [line.split("|")[1] for line in text.splitlines() if "|" in line]
    heights = {mark: [n for n, row in enumerate(rows) if mark in row] for mark in "ab"}
    assert heights["a"][-1] > heights["b"][-1]  # a ends lower on the page
    assert rows[heights["a"][0]].index("a") < rows[heights["a"][-1]].rindex("a")
    assert "step 200" in text


def test_json(lm, runs):
    document = json.loads(lm("plot", runs / "a", "--json").out)[str(runs / "a")]
    assert document["steps"] == 200
    assert document["tokens_per_s"] == 2000
    assert document["best_validation"] == pytest.approx(min(document["validation"], 99))


@pytest.mark.parametrize("by", ["step", "tokens", "time"])
def test_pictures(lm, runs, by):
    pytest.importorskip("matplotlib")
    assert lm("plot", runs / "a", runs / "b", "--out", runs / "x.svg", "--by", by).code == 0
    assert ElementTree.parse(runs / "x.svg").getroot().tag.endswith("svg")
    assert lm("plot", runs / "a", "--out", runs / "x.png", "--by", by).code == 0
    assert (runs / "x.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("nowhere",), "no steps to draw"), (("--by", "moon"), "choose step"), (("a", "--out", "x.pdf"), "must end in")],
)
def test_mistakes_are_sentences(lm, runs, monkeypatch, arguments, words):
    monkeypatch.chdir(runs)
    (runs / "runs").mkdir()
    done = lm("plot", *arguments)
    assert done.code == 2
    assert words in done.err


def test_smoothing_has_no_bias_at_the_beginning():
    from lmcore.tools.plot import smoothed

    assert smoothed([5.0] * 10, 0.9) == pytest.approx([5.0] * 10)
    assert smoothed([1.0, 2.0], 0.0) == [1.0, 2.0]
