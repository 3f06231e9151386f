"""A processor that miscalculates: flipped bits in gradients are noticed, named, and never reach the weights."""

import pytest
import torch
from small_runs import Watch, curve, hashes

from lmcore.config import build
from lmcore.errors import LmError
from lmcore.training import rundir, step
from lmcore.training.config import TrainConfig

MANTISSA, EXPONENT = 3, 30
SETTINGS = ("train.steps=12", "train.checkpoint.every_steps=0", "train.eval.every_steps=0", "model.dropout=0.1")


def flip(monkeypatch, at, bit, times=1):
    """At step index `at`, the first `times` computations get one bit of one gradient wrong, each in another place
    unless times is None (always in the same place)."""
    original = step.Stepper.gradients
    count = 0

    def faulty(self, batch, stop=False):
        nonlocal count
        hit = batch.step == at and (times is None or count < times)
        rank = 0 if times is None else count
        count += hit

        def spoil(parameter):
            # One of the largest: of a small number the bit would be rounded away when the lanes are added.
            place = parameter.grad.view(-1).abs().argsort(descending=True)[rank]
            parameter.grad.view(torch.int32).view(-1)[place] ^= 1 << bit

        handle = self._parameters[1].register_post_accumulate_grad_hook(spoil) if hit else None
        try:
            return original(self, batch, stop)
        finally:
            if handle is not None:
                handle.remove()

    monkeypatch.setattr(step.Stepper, "gradients", faulty)


def audits(lab, name):
    return [e["verdict"] for e in rundir.RunDirectory(lab.root / name).events() if e["event"] == "audit"]


@pytest.mark.parametrize("more", [(), ("model.ffn=e", "model.moe.num_experts=4"), ("train.lanes=1",)])
def test_one_flipped_bit_is_noticed_and_undone(lab, monkeypatch, more):
    """Even the third bit of a mantissa, which no loss and no norm shows."""
    settings = (*SETTINGS, *more)
    lab.run("sound", *settings)
    flip(monkeypatch, 5, MANTISSA)
    watch = Watch()
    lab.run("audited", *settings, "train.guard.audit_every=3", watch=watch)
    assert hashes(lab.root / "audited") == hashes(lab.root / "sound")
    assert curve(lab.root / "audited") == curve(lab.root / "sound")
    assert any("HARDWARE, TRANSIENT" in text and "step 6" in text for text in watch.said)
    assert audits(lab, "audited") == ["transient"]


def test_without_audits_such_a_bit_goes_unnoticed(lab, monkeypatch):
    """What the audit is for: the planted fault is real."""
    lab.run("sound", *SETTINGS)
    flip(monkeypatch, 5, MANTISSA + 15)
    lab.run("blind", *SETTINGS)
    assert hashes(lab.root / "blind") != hashes(lab.root / "sound")


def test_a_flipped_exponent_is_looked_at_without_being_asked(lab, monkeypatch):
    lab.run("sound", *SETTINGS)
    flip(monkeypatch, 9, EXPONENT)  # makes the norm of the gradients infinite
    watch = Watch()
    lab.run("run", *SETTINGS, watch=watch)
    assert hashes(lab.root / "run") == hashes(lab.root / "sound")
    assert any("HARDWARE, TRANSIENT" in text for text in watch.said)


def test_a_fault_that_comes_every_time_is_the_data_or_the_model(lab, monkeypatch):
    flip(monkeypatch, 9, EXPONENT, times=None)
    watch = Watch()
    lab.run("run", *SETTINGS, watch=watch)
    assert audits(lab, "run") == []
    assert any("left out" in text and "the data or the model, not the hardware" in text for text in watch.said)
    assert next(line for line in curve(lab.root / "run") if line["step"] == 10)["skipped"]


def test_a_machine_that_never_agrees_with_itself_ends_the_run(lab, monkeypatch):
    flip(monkeypatch, 11, MANTISSA, times=99)
    with pytest.raises(LmError, match="each time: this machine miscalculates") as caught:
        lab.run("run", *SETTINGS, "train.guard.audit_every=4", "train.checkpoint.every_steps=10")
    assert caught.value.code == 70
    assert hashes(lab.root / "run")["step"] == "step-00000010"
    assert audits(lab, "run") == ["unreliable"]


def test_audits_change_nothing(lab):
    lab.run("plain", *SETTINGS)
    lab.run("audited", *SETTINGS, "train.guard.audit_every=1")
    assert hashes(lab.root / "audited") == hashes(lab.root / "plain")
    assert audits(lab, "audited") == []


def test_a_skipped_step_leaves_no_load_of_experts_behind(lab, monkeypatch):
    """The bias of a router moves by the tokens of a step; those of a step that was left out do not count."""
    original = step.Stepper.gradients
    loads = []

    def spoiled(self, batch, stop=False):
        loads.append(sum(int(router.step_load.sum()) for router in self.model.routers))
        numbers = original(self, batch, stop)
        if batch.step == 4:
            object.__setattr__(numbers, "loss", float("nan"))
        return numbers

    monkeypatch.setattr(step.Stepper, "gradients", spoiled)
    lab.run("run", *SETTINGS, "model.ffn=e", "model.moe.num_experts=4")
    assert loads == [0] * len(loads)


def test_audits_need_deterministic_algorithms():
    with pytest.raises(LmError, match="compares bits"):
        build(TrainConfig, {"deterministic": False, "guard": {"audit_every": 10}})
