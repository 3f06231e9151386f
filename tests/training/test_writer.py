"""Saving beside the training: what is saved is the moment of the call, and a failure never stops a run."""

import resource

import pytest
import torch
from small_runs import Watch, hashes

from lmcore import storage
from lmcore.errors import LmError
from lmcore.training import checkpoint
from lmcore.training.checkpoint import Snapshot
from lmcore.training.tensors import read_tensors
from lmcore.training.writer import CheckpointWriter


def snapshot(step, tensor):
    return Snapshot(step, {"w": tensor}, {"w.m": tensor}, {"step": step}, b"", None)


def writer(path, **keywords):
    return CheckpointWriter(path, **({"keep": 2, "keep_every": None, "background": True} | keywords))


def test_a_background_save_holds_the_moment_of_the_call(tmp_path):
    tensor = torch.zeros(1_000_000)
    saver = writer(tmp_path)
    assert saver.save(snapshot(1, tensor)) is None
    tensor.fill_(7)  # the next step
    assert saver.wait() is None
    assert not read_tensors(tmp_path / "step-00000001" / "model.safetensors")["w"].any()


def test_old_checkpoints_go_only_after_newer_ones_are_verified(tmp_path):
    saver = writer(tmp_path, background=False, keep_every=3)
    for step in range(1, 8):
        saver.save(snapshot(step, torch.ones(3)))
    assert sorted(p.name for p in tmp_path.glob("step-*")) == [f"step-0000000{n}" for n in (3, 6, 7)]


def test_the_log_is_durable_before_the_checkpoint(tmp_path):
    order = []
    saver = writer(tmp_path, background=False, before_commit=lambda: order.append(list(tmp_path.glob("step-*"))))
    saver.save(snapshot(1, torch.ones(3)))
    assert order == [[]]


@pytest.fixture
def file_limit():
    import signal

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_failed_save_is_reported_and_leaves_nothing(tmp_path, file_limit):
    saver = writer(tmp_path)
    saver.save(snapshot(1, torch.ones(3)))
    assert saver.wait() is None
    file_limit(100_000)
    saver.save(snapshot(2, torch.ones(1_000_000)))
    failure = saver.wait()
    assert failure is not None
    assert failure.code == 74
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoint.is_sound(tmp_path / "step-00000001")


def test_a_save_without_memory_is_a_failed_save(tmp_path, monkeypatch):
    """The thread that writes lives on, and the next save works."""
    saver = writer(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", lambda *_, **__: bytearray(1 << 62))
        saver.save(snapshot(1, torch.ones(3)))
        failure = saver.wait()
    assert failure is not None
    assert "no memory left" in failure.message
    saver.save(snapshot(2, torch.ones(3)))
    assert saver.wait() is None
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000002"]


def test_a_bug_on_the_thread_is_not_lost(tmp_path, monkeypatch):
    saver = writer(tmp_path)
    monkeypatch.setattr(checkpoint, "save", lambda *_, **__: 1 // 0)
    saver.save(snapshot(1, torch.ones(3)))
    with pytest.raises(ZeroDivisionError):
        saver.wait()


def test_training_goes_on_when_a_periodic_save_fails(lab, file_limit):
    lab.run("whole")
    watch = Watch({4: lambda: file_limit(30_000), 5: lambda: file_limit(resource.RLIM_INFINITY)})
    lab.run("run", watch=watch)
    assert any("could not be saved, training goes on" in text for text in watch.said)
    assert hashes(lab.root / "run") == hashes(lab.root / "whole")


def test_a_failed_last_save_is_an_error(lab, file_limit):
    with pytest.raises(LmError, match="the last checkpoint could not be saved") as caught:
        lab.run("run", "train.steps=3", "train.eval.every_steps=0", watch=Watch({3: lambda: file_limit(30_000)}))
    assert caught.value.code == 74


def test_a_full_disk_is_refused_before_the_first_step(lab, monkeypatch):
    import shutil

    usage = shutil.disk_usage(lab.data)
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    watch = Watch()
    with pytest.raises(LmError, match="3 checkpoints of this model") as caught:
        lab.run("run", "train.checkpoint.space_check=true", watch=watch)
    assert caught.value.code == 74
    assert watch.steps == []
