"""Comparisons: equal budgets, complete results, continued instead of repeated; states that are filled, not read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lmcore.errors import LmError
from lmcore.model import attention
from lmcore.model.config import ModelConfig
from lmcore.model.model import LanguageModel
from lmcore.training.compare import Budget, _apart, _contest, _steps, compare, decode_speed, filled_state

PRESET = """# a preset for tests
model: {d_model: 16, num_layers: 1, num_heads: 2, context_length: 16, pattern: %s, mamba: {head_dim: 16}}
optim: {optimizer: adamw, lr: 1e-3}
train: {steps: 3, batch_tokens: 32, eval: {every_steps: 0, tokens: 64}, checkpoint: {every_steps: 0}}
"""


def write(folder, name, pattern):
    path = folder / f"{name}.yaml"
    path.write_text(PRESET % pattern)
    return str(path)


FREE = {"train": {"compile": False, "dtype": "fp32", "checkpoint": {"background": False, "space_check": False}}}


def typed(lab):
    return {**FREE, "data": {"train": str(lab.data)}}


@pytest.mark.parametrize("pattern", ["A", "W", "M", "F"])
@pytest.mark.parametrize("length", [3, 20, 40])
def test_a_filled_state_has_the_shape_of_one_that_read_as_much(pattern, length, monkeypatch):
    monkeypatch.setattr(attention, "MARGIN", 4)
    config = ModelConfig(
        vocab_size=9, d_model=16, num_layers=1, num_heads=2, pattern=pattern, window=6, mamba={"head_dim": 8}
    )
    model = LanguageModel(config)
    filled, read = filled_state(model, length, room=8), model.init_state(1, length + 8)
    with torch.no_grad():
        model(torch.zeros(1, length, dtype=torch.long), state=read)
    assert filled.length == read.length
    one, other = filled.layers[0], read.layers[0]
    if pattern in "AW":
        assert one.used == other.used
        assert (one.positions is None) == (other.positions is None)
        if one.positions is not None:
            assert torch.equal(one.positions, other.positions)
            assert torch.equal(one.lengths, other.lengths)
    assert decode_speed(model, length, seconds=0) > 0


def test_one_budget_only():
    with pytest.raises(LmError, match="one budget"):
        Budget(tokens=1, minutes=1)
    with pytest.raises(LmError, match="positive"):
        Budget(flops=0)


@pytest.mark.parametrize("pattern", ["A", "M"])
def test_a_contestant_is_trained_within_its_budget_and_measured(pattern, lab, tmp_path):
    preset = write(tmp_path, "one", pattern)
    found = _contest(preset, tmp_path / "out", typed(lab), Budget(tokens=160), (8, 64))
    assert found.name == "one"
    assert found.tokens == 160
    assert (tmp_path / "out" / "one" / "checkpoints").is_dir()
    assert found.parameters == found.active > 0
    assert found.loss is not None
    assert 0 < found.loss < 20
    assert found.tokens_per_s > 0
    assert set(found.decode) == {8, 64}
    again = _contest(preset, tmp_path / "out", typed(lab), Budget(tokens=160), ())
    assert (again.loss, again.tokens, again.seconds) == (found.loss, found.tokens, found.seconds)  # not trained again


def test_equal_operations_give_cheaper_models_more_tokens(lab, tmp_path):
    cheap, dear = write(tmp_path, "cheap", "F"), write(tmp_path, "dear", "A")
    settings = typed(lab)
    steps = {}
    for name, path in (("cheap", cheap), ("dear", dear)):
        raw = {
            "model": {"d_model": 16 if name == "cheap" else 64, "num_layers": 1, "num_heads": 2, "context_length": 16}
        }
        raw["train"] = {"steps": 3, "batch_tokens": 32}
        steps[name] = _steps(path, raw, tmp_path / name, settings, Budget(flops=1e9))
    assert steps["cheap"] > 1.5 * steps["dear"] > 0
    assert _steps(dear, {}, tmp_path / "x", settings, Budget()) is None


def test_minutes_are_turned_into_steps_by_a_short_measurement(lab, tmp_path):
    preset = write(tmp_path, "timed", "A")
    found = _contest(preset, tmp_path / "out", typed(lab), Budget(minutes=0.005), ())
    assert found.tokens >= 32
    assert not list((tmp_path / "out").glob(".probe*"))


@pytest.mark.slow
def test_work_apart_returns_raises_or_is_said_to_have_ended():
    assert _apart(divmod, 7, 2) == (3, 1)
    with pytest.raises(LmError, match="seven") as caught:
        _apart(raise_error, "seven")
    assert caught.value.hint == "eight"
    with pytest.raises(ZeroDivisionError) as divided:
        _apart(divmod, 7, 0)
    assert "Traceback" in divided.value.__notes__[0]
    with pytest.raises(LmError, match=r"without a result \(exit code 9\)"):
        _apart(os._exit, 9)


def raise_error(message):
    raise LmError(message, hint="eight")


@pytest.mark.slow
def test_work_apart_ends_when_its_parent_is_killed(tmp_path):
    """Training would go on for hours, and a finished worker would wait for ever."""
    note = tmp_path / "pid"
    script = (
        "import sys\n"
        "from lmcore.training.compare import _apart\n"
        "if __name__ == '__main__':\n"
        "    code = 'import os, time; open(%r, \"w\").write(str(os.getpid())); time.sleep(60)' % sys.argv[1]\n"
        "    _apart(exec, code)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, str(note)])
    while not (note.is_file() and note.read_text()):
        assert parent.poll() is None
        time.sleep(0.1)
    worker = int(note.read_text())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 50
    while os.path.exists(f"/proc/{worker}/stat") and " Z " not in Path(f"/proc/{worker}/stat").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.slow
def test_comparison_through_processes_of_their_own(lab, tmp_path):
    presets = [write(tmp_path, "first", "A"), write(tmp_path, "second", "F")]
    found = compare(presets, tmp_path / "out", data=str(lab.data), settings=FREE, decode_lengths=(16,))
    assert [c.name for c in found] == ["first", "second"]
    saved = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [c["name"] for c in saved["contestants"]] == ["first", "second"]
    with pytest.raises(LmError, match="named twice"):
        compare([presets[0], presets[0]], tmp_path / "out")
