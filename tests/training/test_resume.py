"""The promise of the trainer: whatever interrupts a run, the same command gives the bits of the undisturbed run."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_runs import Crash, Watch, crash, curve, hashes

from lmcore.errors import LmError
from lmcore.training import device as machine

CASES = {
    "muon": (),
    "adamw": ("optim.optimizer=adamw",),
    "8-bit adamw": ("optim.optimizer=adamw8bit", "model.d_model=64", "model.d_ff=128"),
    "normuon": ("optim.normuon=true",),
    "accumulation": ("train.lanes=2", "train.micro_batch=1"),
    "dropout": ("model.dropout=0.1", "train.micro_batch=1"),
    "bf16": ("train.dtype=bf16",),
    "checkpointed": ("train.activation_checkpointing=full", "model.dropout=0.1"),
    "random order": ("data.order=random",),
    "background": ("train.checkpoint.background=true",),
    "experts": ("model.ffn=e", "model.moe.num_experts=4"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_crash_changes_no_bit(lab, case):
    settings = CASES[case]
    settings = ("train.steps=7", "train.checkpoint.every_steps=2", "train.eval.every_steps=3", *settings)
    lab.run("whole", *settings)
    for step in (1, 5):  # before the first checkpoint, and between two
        with pytest.raises(Crash):
            lab.run("broken", *settings, watch=Watch({step: crash}))
    lab.run("broken", *settings)
    assert hashes(lab.root / "broken") == hashes(lab.root / "whole")
    assert curve(lab.root / "broken") == curve(lab.root / "whole")


LAYERS = {
    "mamba": ("model.pattern=M",),
    "mamba experts": ("model.pattern=M", "model.mamba.num_experts=4"),
    "resonance": ("model.pattern=R",),
    "attention and mixing": ("model.pattern=AF",),
    "window": ("model.pattern=W", "model.window=8"),
    "gate": ("model.gate=headwise",),
    "depth routing": ("model.depth=-m",),
    "a head ahead": ("model.mtp.depths=1",),
    "experts with capacity": ("model.ffn=e", "model.moe.num_experts=4", "model.moe.capacity_factor=1.0"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", [*CASES, *LAYERS])
def test_no_bit_comes_from_memory_that_was_not_written(lab, case, monkeypatch):
    """Every tensor that is made without values holds NaN: the run stays the same."""
    settings = ("train.steps=4", "train.checkpoint.every_steps=2", *(CASES | LAYERS)[case])
    lab.run("as it is", *settings)
    plain = machine.numerics

    @contextlib.contextmanager
    def filled(**switches):
        with plain(**switches):
            torch.utils.deterministic.fill_uninitialized_memory = True
            assert torch.empty(3).isnan().all()
            yield

    monkeypatch.setattr(machine, "numerics", filled)
    lab.run("filled", *settings)
    assert hashes(lab.root / "filled") == hashes(lab.root / "as it is")
    assert curve(lab.root / "filled") == curve(lab.root / "as it is")


@pytest.mark.parametrize(
    ("optimizer", "steps"),
    [("muon", 8), pytest.param("muon", 40, marks=pytest.mark.slow), pytest.param("adamw", 40, marks=pytest.mark.slow)],
)
def test_an_interruption_at_every_step(lab, optimizer, steps):
    settings = (
        f"optim.optimizer={optimizer}",
        "model.dropout=0.1",
        f"train.steps={steps}",
        "train.micro_batch=1",
        "train.lanes=4",
        "train.eval.every_steps=0",
    )
    lab.run("whole", *settings, "train.checkpoint.every_steps=0")
    for step in range(1, steps):
        with pytest.raises(Crash):
            lab.run("broken", *settings, "train.checkpoint.every_steps=1", watch=Watch({step + 1: crash}))
    result = lab.run("broken", *settings, "train.checkpoint.every_steps=1")
    assert result.step == steps
    assert hashes(lab.root / "broken") == hashes(lab.root / "whole")
    assert [line["loss"] for line in curve(lab.root / "broken")] == [line["loss"] for line in curve(lab.root / "whole")]


def test_a_planted_fault_is_seen(lab, monkeypatch):
    """The comparison above would notice a dropout stream that depends on history."""
    import lmcore.training.step as step_module

    settings = ("model.dropout=0.1",)
    count = iter(range(10**6))
    monkeypatch.setattr(step_module, "lane_seed", lambda *_: next(count))
    lab.run("whole", *settings)
    next(count)
    with pytest.raises(Crash):
        lab.run("broken", *settings, watch=Watch({6: crash}))
    lab.run("broken", *settings)
    assert hashes(lab.root / "broken") != hashes(lab.root / "whole")


# ---------------------------------------------------------------------------------------- real processes


def start(lab, name, *arguments, **keywords):
    config = lab.preset({"train": {"steps": 150}})
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(
        [sys.executable, "-m", "lmcore", "train", str(lab.root / name), "--preset", str(config), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
        **keywords,
    )


def wait_for_step(lab, name, step, process):
    log = lab.root / name / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if log.is_file() and log.read_bytes().count(b"\n") >= step:
            return
        time.sleep(0.01)
    raise AssertionError(process.communicate())


def test_sigkill_and_the_same_command_again(lab):
    whole = start(lab, "whole")
    broken = start(lab, "broken")
    wait_for_step(lab, "broken", 60, broken)
    broken.kill()
    broken.communicate()
    again = start(lab, "broken")
    assert again.communicate(timeout=120)[0].startswith("trained 150 steps")
    assert whole.communicate(timeout=120)[0].startswith("trained 150 steps")
    assert hashes(lab.root / "broken") == hashes(lab.root / "whole")
    assert curve(lab.root / "broken") == curve(lab.root / "whole")


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGTERM, -signal.SIGTERM),
        pytest.param(signal.SIGINT, -signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, 75, marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_at_the_exact_step(lab, number, status):
    process = start(lab, "run")
    wait_for_step(lab, "run", 30, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    steps = [line["step"] for line in curve(lab.root / "run") if line["kind"] == "train"]
    assert hashes(lab.root / "run")["step"] == f"step-{steps[-1]:08d}"
    assert steps == list(range(1, len(steps) + 1))
    assert f"stopped at step {steps[-1]:,} of 150" in out
    assert "lm train --resume" in out
    events = [json.loads(line) for line in (lab.root / "run" / "run.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == "stop"
    assert events[-1]["signal"] == number


@pytest.mark.slow
def test_a_second_run_in_the_directory_is_refused(lab):
    first = start(lab, "run")
    wait_for_step(lab, "run", 5, first)
    second = start(lab, "run")
    _, err = second.communicate(timeout=60)
    assert second.returncode == 75
    assert "in use by lm train" in err
    first.kill()
    first.communicate()


@pytest.mark.slow
def test_preemptions_in_a_loop_end_with_the_same_bits(lab):
    whole = start(lab, "whole")
    times = 0
    while True:
        process = start(lab, "run", *(("--resume",) if times else ()))
        if times < 3:
            wait_for_step(lab, "run", 30 * (times + 1), process)
            process.send_signal(signal.SIGUSR1)
        process.communicate(timeout=120)
        times += 1
        if process.returncode != 75:
            break
    assert process.returncode == 0
    assert times == 4
    whole.communicate(timeout=120)
    assert hashes(lab.root / "run") == hashes(lab.root / "whole")


def test_no_run_to_resume(lab):
    with pytest.raises(LmError, match="no run to resume"):
        lab.run("nothing", resume=True)
