"""One step, seen from outside: the loss is that of the global batch however divided; limits, trackers, compile."""

import importlib
import os
import re
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from small_runs import ROOT, Crash, Watch, crash, curve, hashes

from lmcore.data.sampler import Sampler
from lmcore.data.stream import TokenStream
from lmcore.errors import LmError
from lmcore.model.model import LanguageModel
from lmcore.training import tracking
from lmcore.training.signals import Stop
from lmcore.training.step import lane_seed


def test_the_first_loss_and_gradient_are_those_of_plain_torch(lab):
    launch = lab.prepare("run", "train.steps=1", "train.micro_batch=2", "train.lanes=2")
    config = launch.config
    lab.run("run", "train.steps=1", "train.micro_batch=2", "train.lanes=2")
    line = curve(lab.root / "run")[0]
    model = LanguageModel(config.model)
    model.init_weights(config.train.seed)
    stream = TokenStream.open(lab.data / "train")
    rows = Sampler(stream, context_length=32, seed=config.train.seed).batch(0, 8).astype(np.int64)
    tokens = torch.from_numpy(rows)
    logits = model(tokens[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)


@pytest.mark.parametrize("division", [("train.micro_batch=1",), ("train.lanes=1", "train.micro_batch=4")])
def test_the_division_of_a_batch_changes_nothing_but_rounding(lab, division):
    common = ("train.steps=3", "optim.optimizer=adamw")
    lab.run("a", *common)
    lab.run("b", *common, *division)
    losses = [[line["loss"] for line in curve(lab.root / n) if line["kind"] == "train"] for n in ("a", "b")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_recomputed_activations_change_no_bit(lab):
    lab.run("a", "train.steps=4", "model.dropout=0.1")
    lab.run("b", "train.steps=4", "model.dropout=0.1", "train.activation_checkpointing=full")
    assert hashes(lab.root / "a") == hashes(lab.root / "b")


def test_clipping_bounds_the_update(lab):
    lab.run("free", "train.steps=2", "optim.optimizer=adamw", "optim.clip=0")
    lab.run("clipped", "train.steps=2", "optim.optimizer=adamw", "optim.clip=0.001")
    free, clipped = (curve(lab.root / n) for n in ("free", "clipped"))
    assert free[0]["grad_norm"] == clipped[0]["grad_norm"]  # before clipping
    assert hashes(lab.root / "free") != hashes(lab.root / "clipped")


def test_the_time_limit_saves_and_says_so(lab):
    stop = Stop(max_minutes=1e-9)
    assert stop.reason() == "time"
    result = lab.run("run", "train.max_minutes=0.000001")
    assert (result.reason, result.step) == ("time", 1)
    lab.run("whole")
    lab.run("run", "train.max_minutes=5")
    assert hashes(lab.root / "run") == hashes(lab.root / "whole")


def test_a_time_limit_shorter_than_the_start_still_gets_a_run_done(lab):
    settings = ("train.steps=2", "train.eval.every_steps=0")
    ends = [lab.run("run", "train.max_minutes=0.000001", *settings) for _ in range(4)]
    assert [(end.reason, end.step) for end in ends] == [
        ("time", 1), ("time", 2), ("finished", 2), ("nothing to do", 2)
    ]  # fmt: skip
    assert ends[2].validation == lab.run("whole", *settings).validation != {}
    assert hashes(lab.root / "run") == hashes(lab.root / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_in_a_validation_ends_it_and_saves(lab, number, monkeypatch):
    from lmcore.training import loop

    original = loop.validate

    def during(*args, **keywords):
        signal.raise_signal(number)
        return original(*args, **keywords)

    monkeypatch.setattr(loop, "validate", during)
    settings = ("train.steps=4", "train.eval.every_steps=2")
    result = lab.run("run", *settings)
    assert (result.reason, result.step, result.signal) == ("signal", 2, number)
    monkeypatch.undo()
    lab.run("whole", *settings)
    lab.run("run", *settings)
    assert hashes(lab.root / "run") == hashes(lab.root / "whole")


def test_a_signal_in_the_last_validation_leaves_it_to_the_next_command(lab, monkeypatch):
    from lmcore.training import loop

    original = loop.validate

    def during(*args, **keywords):
        signal.raise_signal(signal.SIGTERM)
        return original(*args, **keywords)

    settings = ("train.steps=4", "train.eval.every_steps=0")
    whole = lab.run("whole", *settings)
    monkeypatch.setattr(loop, "validate", during)
    cut = lab.run("run", *settings)
    assert (cut.reason, cut.step, cut.validation) == ("signal", 4, {})
    monkeypatch.undo()
    result = lab.run("run", *settings)
    assert (result.reason, result.step, result.validation) == ("finished", 4, whole.validation)
    assert hashes(lab.root / "run") == hashes(lab.root / "whole")
    assert curve(lab.root / "run") == curve(lab.root / "whole")
    again = lab.run("run", *settings)
    assert (again.reason, again.validation) == ("nothing to do", whole.validation)


def test_handlers_are_put_back(lab):
    before = signal.getsignal(signal.SIGINT)
    lab.run("run", "train.steps=1")
    assert signal.getsignal(signal.SIGINT) is before
    assert not any(t.name in ("loader", "checkpoint") for t in threading.enumerate())


def test_lane_seeds_differ_in_every_part():
    seeds = {lane_seed(seed, step, lane) for seed in range(8) for step in range(64) for lane in range(8)}
    assert len(seeds) == 8 * 64 * 8
    assert all(0 <= s < 2**63 for s in seeds)


def test_fp16_on_a_cpu_is_refused(lab):
    with pytest.raises(LmError, match="fp16 on a CPU"):
        lab.run("run", "train.dtype=fp16")


def test_trackers_never_stop_a_run(lab, monkeypatch):
    class Broken:
        def __init__(self, *_):
            self.calls = 0

        def log(self, values, step):
            assert values["train/loss"] > 0
            raise RuntimeError("no connection")

        def close(self):
            raise RuntimeError("never reached")

    monkeypatch.setattr(tracking, "_TensorBoard", Broken)
    watch = Watch()
    assert lab.run("run", "train.log.tensorboard=true", watch=watch).reason == "finished"
    assert sum("tensorboard failed" in text for text in watch.said) == 1


def test_a_missing_tracker_is_a_warning(lab):
    pytest.importorskip("torch")
    watch = Watch()
    try:
        import wandb  # noqa: F401
    except ImportError:
        assert lab.run("run", "train.steps=2", "train.log.wandb=x", watch=watch).reason == "finished"
        assert any("wandb is not used" in text and "pip install" in text for text in watch.said)


def test_a_compiler_that_fails_is_said_and_the_run_goes_on(lab, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", broken)
    watch = Watch()
    lab.run("run", "train.compile=true", watch=watch)
    assert any("goes on without compiling" in text and "no C++ compiler" in text for text in watch.said)


def planted(fault, good_calls=0):
    """A compiler whose steps have a fault, after some that are right."""

    def compile_(forward, **_):
        calls = iter(range(10**9))

        def wrong(inputs, targets):
            found = forward(inputs, targets)
            return found if next(calls) < good_calls else fault(*found)

        return wrong

    return compile_


class _Bent(torch.autograd.Function):
    """The same value, another gradient."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 1.3


FAULTS = {
    "NaN": lambda objective, sums, metrics: (objective * float("nan"), sums * float("nan"), metrics),
    "a gradient of another size": lambda objective, sums, metrics: (_Bent.apply(objective), sums, metrics),
    "a gradient of another sign": lambda objective, sums, metrics: (-objective, sums, metrics),
    "another loss": lambda objective, sums, metrics: (objective, sums * 1.05, metrics),
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_compiled_step_that_is_wrong_never_trains(lab, monkeypatch, fault, dtype):
    lab.run("eager", "train.compile=false", "train.steps=2", f"train.dtype={dtype}")
    monkeypatch.setattr(torch, "compile", planted(FAULTS[fault]))
    watch = Watch()
    lab.run("run", "train.compile=true", "train.steps=2", f"train.dtype={dtype}", watch=watch)
    assert sum("goes on without compiling: the compiled step gives the" in text for text in watch.said) == 1
    assert hashes(lab.root / "run") == hashes(lab.root / "eager")


def test_a_compiled_step_that_goes_wrong_later_is_told_from_data_and_hardware(lab, monkeypatch):
    """From the third step on; a run that is stopped behind it goes on without the compiler, to the same bits."""
    one_pass = ("train.lanes=1", "train.micro_batch=8")
    monkeypatch.setattr(torch, "compile", planted(FAULTS["NaN"], good_calls=1 + 2))  # the comparison and two steps
    watch = Watch()
    lab.run("whole", "train.compile=true", *one_pass, watch=watch)
    assert sum("goes on without compiling: step 3, samples" in text for text in watch.said) == 1
    assert not any("not the hardware" in text or "HARDWARE" in text for text in watch.said)
    monkeypatch.setattr(torch, "compile", planted(FAULTS["NaN"], good_calls=1 + 2))
    with pytest.raises(Crash):
        lab.run("broken", "train.compile=true", *one_pass, watch=Watch({6: crash}))
    lab.run("broken", "train.compile=true", *one_pass)
    assert hashes(lab.root / "broken") == hashes(lab.root / "whole")
    lab.run("eager", "train.compile=false", *one_pass)
    losses = [[line["loss"] for line in curve(lab.root / n) if line["kind"] == "train"] for n in ("whole", "eager")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_compiled_runs_resume_to_the_same_bits(lab, dtype):
    settings = ("train.compile=true", f"train.dtype={dtype}", "model.dropout=0.1")
    told = []
    compiler = importlib.import_module("torch._inductor.config")
    lab.run("whole", *settings, watch=Watch({2: lambda: told.append(compiler.deterministic)}))
    assert (told, compiler.deterministic) == ([True], False)
    with pytest.raises(Crash):
        lab.run("broken", *settings, watch=Watch({6: crash}))
    lab.run("broken", *settings)
    assert hashes(lab.root / "broken") == hashes(lab.root / "whole")
    lab.run("eager", "train.compile=false", *settings[1:])
    eager, compiled = (
        [line["loss"] for line in curve(lab.root / n) if line["kind"] == "train"] for n in ("eager", "whole")
    )
    assert compiled[0] == pytest.approx(eager[0], rel=0.05)


UNCOMPILED = """
import sys
from lmcore.tools.cli import main
try:
    main()
except SystemExit as ended:
    assert not ended.code, ended.code
print("LOADED", sorted({"torch._inductor", "torch._dynamo", "sympy"} & set(sys.modules)))
"""


def test_a_run_that_compiles_nothing_does_not_load_the_compiler(lab):
    """It takes more than a second and 80 MB."""
    command = [
        sys.executable,
        "-c",
        UNCOMPILED,
        "train",
        str(lab.root / "run"),
        "--preset",
        str(lab.preset()),
        "--quiet",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "LOADED []" in done.stdout


def test_out_of_memory_is_answered_with_what_the_planner_says(lab):
    def exhausted():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with pytest.raises(LmError, match=r"micro-batch of \d+ x 32 tokens \(CUDA out of memory") as caught:
        lab.run("run", watch=Watch({2: exhausted}))
    assert re.search(r"The plan says [\d.,]+ .iB of the [\d.,]+ GiB", caught.value.message)
    assert "train.micro_batch=N" in caught.value.hint
