"""One process of several dies or hangs: the others leave in time with one sentence, and the same command continues."""

import os
import signal
import time

import pytest
import torch
from small_runs import curve, hashes

from lmcore.training import checkpoint
from lmcore.training.parallel import _lost_rank
from lmcore.training.signals import Stop

STEPS = 120
TIMEOUT_S = 4


LONG = (
    f"train.steps={STEPS}",
    f"train.dist_timeout_s={TIMEOUT_S}",
    "train.eval.every_steps=0",
    "train.checkpoint.every_steps=50",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "victim", "within", "words"),
    [
        (signal.SIGKILL, 1, 3.0, "another process of this run has ended"),
        (signal.SIGSTOP, 0, TIMEOUT_S + 3.0, "does not answer (train.dist_timeout_s = 4)"),
    ],
)
def test_the_others_leave_and_the_same_command_continues(lab, number, victim, within, words):
    ranks = lab.start_ranks(2, "run", *LONG)
    lab.wait_for_step("run", 55, ranks)
    began = time.monotonic()
    ranks[victim].send_signal(number)
    survivor = ranks[1 - victim]
    try:
        _, said = survivor.communicate(timeout=60)
        took = time.monotonic() - began
    finally:
        ranks[victim].kill()
        ranks[victim].communicate()
    assert survivor.returncode == 74
    assert took < within + 25  # a loaded machine ends processes slowly
    assert said.count("error:") == 1
    assert words in said
    assert "Traceback" not in said
    newest = checkpoint.newest(lab.root / "run")
    assert newest is not None
    assert checkpoint.step_of(newest) >= 50

    assert lab.run("run", *LONG).step == STEPS  # continued on one rank
    lab.run("alone", *LONG)  # never disturbed
    assert hashes(lab.root / "run") == hashes(lab.root / "alone")
    assert curve(lab.root / "run") == curve(lab.root / "alone")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:2994."), "has ended"),
        (RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 4000ms for recv"), "not answer"),
        (torch.distributed.DistStoreError("wait timeout after 5000ms, keys: /a"), "not answer"),
        (torch.distributed.DistBackendError("NCCL error: remote process exited or there was a network error"), "ended"),
        (torch.distributed.DistNetworkError("something new"), "lost each other (something new)"),
    ],
)
def test_what_the_transport_says_becomes_a_sentence(error, words):
    told = _lost_rank(error, 0, 2, 5.0)
    assert told is not None
    assert words in told.message
    assert told.code == 74


def test_other_errors_are_no_lost_rank():
    assert _lost_rank(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), 0, 2, 5.0) is None


def test_the_echo_of_a_launcher_is_no_second_signal(monkeypatch):
    """torchrun passes on the signal that the terminal has sent to everybody already."""
    killed = []
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append(number))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stop = Stop(echoed=True)
    stop.receive(signal.SIGINT)
    now[0] += 0.2
    stop.receive(signal.SIGINT)
    assert stop.reason() == "signal"
    assert not killed
    now[0] += 2
    stop.receive(signal.SIGINT)
    assert killed == [signal.SIGINT]
    alone = Stop()
    alone.receive(signal.SIGINT)
    alone.receive(signal.SIGINT)
    assert killed == [signal.SIGINT] * 2
