"""What is not finite never reaches the weights; a spike is judged robustly, and a rollback leaves its data out."""

import math
import random

import pytest
import torch
from small_runs import Crash, Watch, crash, curve, hashes

from lmcore.errors import LmError
from lmcore.training import device as machine
from lmcore.training import loop, rundir, step
from lmcore.training.config import GuardConfig
from lmcore.training.guards import Guard, LossScale
from lmcore.training.tensors import read_tensors


def plant(monkeypatch, at, what, value):
    """At the given steps spoil the loss or one gradient, as broken hardware or bad data would."""
    original = step.Stepper.gradients

    def spoiled(self, batch, stop=False):
        if batch.step in at and what == "loss":
            forward = self.forward
            self.forward = lambda *a: tuple((x * value if i < 2 else x) for i, x in enumerate(forward(*a)))
            try:
                return original(self, batch, stop)
            finally:
                self.forward = forward
        handle = None
        if batch.step in at:

            def spoil(parameter):
                parameter.grad.view(-1)[0] = value

            handle = self._parameters[-1].register_post_accumulate_grad_hook(spoil)
        try:
            return original(self, batch, stop)
        finally:
            if handle is not None:
                handle.remove()

    monkeypatch.setattr(step.Stepper, "gradients", spoiled)


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e38])
def test_a_bad_step_changes_no_bit_and_the_next_one_works(lab, monkeypatch, what, value):
    lab.run("before", "train.steps=6", "train.checkpoint.every_steps=3", "train.guard.on_spike=off")
    plant(monkeypatch, {3}, what, value)
    watch = Watch({4: crash})
    if value == 1e38 and what == "loss":
        value = math.inf  # overflows in fp32
    with pytest.raises(Crash):
        lab.run(
            "run",
            "train.steps=6",
            "train.checkpoint.every_steps=1",
            "train.checkpoint.keep=9",
            "train.guard.on_spike=off",
            watch=watch,
        )
    log = [line for line in curve(lab.root / "run") if line["kind"] == "train"]
    assert log[-1]["step"] == 4
    if log[-1].get("skipped"):
        assert any("the update is left out" in text for text in watch.said)
        result = lab.run(
            "run",
            "train.steps=6",
            "train.checkpoint.every_steps=1",
            "train.guard.on_spike=off",
            "train.checkpoint.keep=9",
        )
        assert result.step == 6
        folder = lab.root / "run" / "checkpoints"
        for name in ("model.safetensors", "optimizer.safetensors"):
            before = (folder / "step-00000003" / name).read_bytes()
            assert before == (lab.root / "before" / "checkpoints" / "step-00000003" / name).read_bytes()
            for path in folder.glob(f"step-*/{name}"):
                assert all(t.isfinite().all() for t in read_tensors(path).values() if t.is_floating_point())
    else:
        assert value == 1e38  # a single huge gradient whose norm is still finite is not an error


def test_the_update_of_a_bad_step_is_not_run(lab, monkeypatch):
    """Step 4 is bad, so the weights after it are those after step 3."""
    plant(monkeypatch, {3}, "gradient", math.nan)
    settings = ("train.steps=5", "train.checkpoint.every_steps=1", "train.checkpoint.keep=9")
    lab.run("run", *settings)
    folder = lab.root / "run" / "checkpoints"
    third, fourth, fifth = (read_tensors(folder / f"step-0000000{n}" / "model.safetensors") for n in (3, 4, 5))
    assert all(torch.equal(third[name], fourth[name]) for name in third)
    assert not all(torch.equal(fourth[name], fifth[name]) for name in third)
    third, fourth = (read_tensors(folder / f"step-0000000{n}" / "optimizer.safetensors") for n in (3, 4))
    assert all(torch.equal(third[name], fourth[name]) for name in third)


def test_three_in_a_row_end_the_run_with_70(lab, monkeypatch):
    plant(monkeypatch, {5, 6, 7, 8}, "gradient", math.nan)
    with pytest.raises(LmError) as caught:
        lab.run("run")
    assert caught.value.code == 70
    assert "step 8" in caught.value.message
    assert [e["event"] for e in rundir.RunDirectory(lab.root / "run").events()] == ["start", *["bad step"] * 3]


def test_ten_in_a_thousand_end_the_run():
    guard = Guard(GuardConfig())
    verdicts = [guard.judge(n, math.nan if n % 50 == 0 else 3.0, 1.0) for n in range(600)]
    assert verdicts.count("bad") == 9
    assert verdicts.index("diverged") == 450


def test_bad_steps_are_forgotten_after_a_thousand():
    guard = Guard(GuardConfig())
    assert "diverged" not in [guard.judge(n, math.nan if n % 150 == 0 else 3.0, 1.0) for n in range(5000)]


def test_a_spike_is_seen_and_noise_is_not():
    draw = random.Random(0)
    guard = Guard(GuardConfig())
    for n in range(2000):
        assert guard.judge(n, 3.0 + draw.gauss(0, 0.05), 1.0) == "ok"
    assert guard.judge(2000, 3.6, 1.0) == "spike"
    again = Guard(GuardConfig())
    again.load(guard.state())
    assert again.judge(2001, 3.6, 1.0) == guard.judge(2001, 3.6, 1.0) == "spike"


def test_a_falling_loss_is_no_spike():
    guard = Guard(GuardConfig())
    assert all(guard.judge(n, 9.0 * math.exp(-n / 300) + 2, 1.0) == "ok" for n in range(2000))


ROLLBACK = (
    "train.steps=40",
    "train.eval.every_steps=0",
    "train.checkpoint.every_steps=5",
    "train.checkpoint.keep=9",
    "train.guard.on_spike=rollback",
    "train.guard.spike_window=16",
    "train.guard.rollback_steps=6",
    "train.guard.skip_steps=3",
)


def test_a_rollback_goes_back_leaves_data_out_and_survives_a_kill(lab, monkeypatch):
    seen = []
    original = step.Stepper.gradients

    def watched(self, batch, stop=False):
        numbers = original(self, batch, stop)
        if seen[-1:] != [(batch.step, batch.first_sample)]:  # a spike is computed twice
            seen.append((batch.step, batch.first_sample))
        if batch.first_sample == 30 * 8:  # the spike is in the data
            object.__setattr__(numbers, "loss", 50.0)
        return numbers

    monkeypatch.setattr(step.Stepper, "gradients", watched)
    lab.run("whole", *ROLLBACK)
    assert seen[30] == (30, 240)
    assert seen[31] == (20, (30 + 3) * 8)  # back at step 20, past the spike's data
    assert seen[-1][0] == 39
    lines = [line["step"] for line in curve(lab.root / "whole") if line["kind"] == "train"]
    assert lines == list(range(1, 41))
    kinds = [e["event"] for e in rundir.RunDirectory(lab.root / "whole").events()]
    assert kinds == ["start", "spike", "rollback", "finish"]

    with pytest.raises(Crash):
        lab.run("broken", *ROLLBACK, watch=Watch({24: lambda: seen[-1][1] > 260 and crash()}))
    lab.run("broken", *ROLLBACK)
    assert hashes(lab.root / "broken") == hashes(lab.root / "whole")
    assert curve(lab.root / "broken") == curve(lab.root / "whole")


def test_spike_skip_and_stop(lab, monkeypatch):
    original = step.Stepper.gradients

    def spiked(self, batch, stop=False):
        numbers = original(self, batch, stop)
        if batch.step == 20:
            object.__setattr__(numbers, "loss", 50.0)
        return numbers

    monkeypatch.setattr(step.Stepper, "gradients", spiked)
    settings = ("train.steps=22", "train.guard.spike_window=16")
    watch = Watch()
    lab.run("skip", *settings, "train.guard.on_spike=skip", watch=watch)
    assert next(line for line in curve(lab.root / "skip") if line["step"] == 21)["skipped"]
    with pytest.raises(LmError) as caught:
        lab.run("stop", *settings, "train.guard.on_spike=stop")
    assert caught.value.code == 70
    watch = Watch()
    lab.run("warn", *settings, watch=watch)
    assert any("is a spike" in text for text in watch.said)


def test_the_loss_scale_is_a_power_of_two_that_adapts():
    scale = LossScale(True)
    assert scale.update(False)
    assert scale.scale == 2.0**15
    for _ in range(LossScale.GROWTH_STEPS):
        assert not scale.update(True)
    assert scale.scale == 2.0**16
    again = LossScale(True)
    again.load(scale.state())
    assert again.scale == scale.scale
    scale.scale = 1.0
    assert not scale.update(False)  # nothing left to halve: the step itself is bad


@pytest.fixture
def fp16_anywhere(monkeypatch):
    """fp16 is refused on a CPU because it is slow there; its arithmetic is right."""
    monkeypatch.setattr(machine, "resolve_dtype", lambda name, device: (machine.DTYPES[name], "as train.dtype says"))
    monkeypatch.setattr(loop, "measure_peak", lambda *_: 1e9)  # minutes in fp16


def test_an_overflow_halves_the_scale_skips_the_update_and_resumes_to_the_same_bits(lab, monkeypatch, fp16_anywhere):
    """A scale that is too large overflows for some steps; killed while it falls and after, the bits are the same."""
    monkeypatch.setattr(LossScale, "START", 2.0**22)
    settings = ("train.dtype=fp16", "train.steps=10", "train.checkpoint.every_steps=1", "train.checkpoint.keep=20")
    watch = Watch()
    lab.run("whole", *settings, watch=watch)
    lines = [line for line in curve(lab.root / "whole") if line["kind"] == "train"]
    overflows = [line["step"] for line in lines if line.get("skipped")]
    assert 0 < len(overflows) < 10
    assert sum("overflow" in text for text in watch.said) == len(overflows)
    assert [line["loss_scale"] for line in lines if line.get("skipped")] == [
        2.0 ** (21 - n) for n in range(len(overflows))
    ]
    folder = lab.root / "whole" / "checkpoints"
    weights = [read_tensors(folder / f"step-{n:08d}" / "model.safetensors") for n in range(1, 11)]
    for number in range(2, 11):
        same = all(torch.equal(weights[number - 1][k], weights[number - 2][k]) for k in weights[0])
        assert same == (number in overflows)
    assert lines[-1]["loss"] < lines[0]["loss"]

    for last in (overflows[0], overflows[-1] + 2):
        with pytest.raises(Crash):
            lab.run("broken", *settings, watch=Watch({last: crash}))
    lab.run("broken", *settings)
    assert hashes(lab.root / "broken") == hashes(lab.root / "whole")
    assert curve(lab.root / "broken") == curve(lab.root / "whole")


def test_a_scaled_run_takes_the_course_of_an_unscaled_one(lab, monkeypatch, fp16_anywhere):
    """A power of two is taken out exactly: the first loss and norm do not depend on it."""
    for name, start in (("a", 2.0**4), ("b", 2.0**10)):
        monkeypatch.setattr(LossScale, "START", start)
        lab.run(name, "train.dtype=fp16", "train.steps=2")
    a, b = (curve(lab.root / name)[0] for name in ("a", "b"))
    assert a["loss"] == b["loss"]
    assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-2)  # what underflows with the small scale


def test_a_loss_that_is_not_finite_is_not_blamed_on_the_scale(lab, monkeypatch, fp16_anywhere):
    plant(monkeypatch, {2, 3, 4}, "loss", math.nan)
    with pytest.raises(LmError, match="diverged") as caught:
        lab.run("run", "train.dtype=fp16", "train.guard.on_spike=off")
    assert caught.value.code == 70
    assert {line["loss_scale"] for line in curve(lab.root / "run") if line["kind"] == "train"} == {LossScale.START}
