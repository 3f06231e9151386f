"""Checkpoints: what verifies, what is passed over, what is kept, and the classical pair."""

import io
import os
import shutil

import pytest
import torch
from torch import nn

from lmcore.errors import LmError
from lmcore.training import checkpoint
from lmcore.training.checkpoint import Snapshot, load_checkpoint, newest, prune, save, save_checkpoint, verify


def snapshot(step, value=1.0):
    return Snapshot(
        step=step,
        model={"w": torch.full((40,), value), "b": torch.tensor(step)},
        optimizer={"w.exp_avg": torch.full((40,), value / 2)},
        state={"step": step},
        config=b"model: {}\n",
        tokenizer=b"{}",
    )


def names(folder):
    return sorted(os.listdir(folder))


def test_a_checkpoint_verifies_and_holds_what_was_saved(tmp_path):
    path = save(tmp_path, snapshot(5))
    assert path.name == "step-00000005"
    record = verify(path)
    assert record["step"] == 5
    assert set(record["files"]) == set(names(path)) - {"COMMIT.json"}
    assert torch.equal(checkpoint.tensors.read_tensors(path / checkpoint.MODEL)["w"], torch.ones(40))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "COMMIT.json"])
def test_every_flipped_byte_is_found(tmp_path, name):
    path = save(tmp_path / "checkpoints", snapshot(3))
    raw = bytearray((path / name).read_bytes())
    for at in range(len(raw)):
        raw[at] ^= 1
        (path / name).write_bytes(raw)
        raw[at] ^= 1
        if name == "COMMIT.json" and raw[at : at + 1].isspace():
            continue  # white space may become other white space
        with pytest.raises(LmError) as caught:
            verify(path)
        assert caught.value.code == 65


def test_missing_extra_and_truncated_files_are_named(tmp_path):
    path = save(tmp_path, snapshot(3))
    (path / "stale.safetensors").write_bytes(b"x")
    with pytest.raises(LmError, match=r"stale\.safetensors does not belong here"):
        verify(path)
    (path / "stale.safetensors").unlink()
    with open(path / "model.safetensors", "ab") as file:
        file.truncate(100)
    with pytest.raises(LmError, match=r"model.safetensors: 100 bytes, COMMIT.json says"):
        verify(path)
    (path / "model.safetensors").unlink()
    with pytest.raises(LmError, match=r"model\.safetensors is missing"):
        verify(path)


def test_a_renamed_checkpoint_is_not_another_step(tmp_path):
    os.rename(save(tmp_path, snapshot(3)), tmp_path / "step-00000009")
    with pytest.raises(LmError, match="step 3 under another name"):
        verify(tmp_path / "step-00000009")


def test_a_linked_file_is_refused(tmp_path):
    path = save(tmp_path / "c", snapshot(3))
    os.rename(path / "model.safetensors", tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", path / "model.safetensors")
    with pytest.raises(LmError):
        verify(path)


def test_the_newest_that_verifies_wins_and_the_skipped_are_named(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path / "checkpoints", snapshot(step))
    broken = tmp_path / "checkpoints" / "step-00000003" / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-1])
    (tmp_path / "checkpoints" / "step-00000007").mkdir()
    said = []
    assert newest(tmp_path, skipped=said.append).name == "step-00000002"
    assert len(said) == 2
    assert "step-00000007" in said[0]
    assert "model.safetensors" in said[1]


def test_a_damaged_checkpoint_is_replaced_and_a_sound_one_kept(tmp_path):
    path = save(tmp_path, snapshot(3, 1.0))
    inode = path.stat().st_ino
    assert save(tmp_path, snapshot(3, 1.0)) == path
    assert path.stat().st_ino == inode
    (path / "state.json").write_bytes(b"{}")
    save(tmp_path, snapshot(3, 1.0))
    assert verify(path)["step"] == 3
    assert names(tmp_path) == ["step-00000003"]


def test_prune_counts_only_what_verifies(tmp_path):
    for step in range(1, 7):
        save(tmp_path, snapshot(step))
    (tmp_path / "step-00000006" / "state.json").write_bytes(b"torn")
    assert prune(tmp_path, keep=2, keep_every=2) == [1, 3]
    assert names(tmp_path) == [f"step-{n:08d}" for n in (2, 4, 5, 6)]


def test_prune_keeps_the_only_good_one(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, snapshot(step))
    for step in (2, 3):
        shutil.rmtree(tmp_path / f"step-0000000{step}")
        (tmp_path / f"step-0000000{step}").mkdir()
    assert prune(tmp_path, keep=1) == []
    assert newest_step(tmp_path) == 1


def newest_step(folder):
    return next(checkpoint.step_of(p) for p in checkpoint.steps_on_disk(folder) if checkpoint.is_sound(p))


def test_resolve_says_what_is_wrong(tmp_path):
    with pytest.raises(LmError, match="no such run"):
        checkpoint.resolve(tmp_path / "nothing")
    (tmp_path / "plain").mkdir()
    with pytest.raises(LmError, match="neither a run directory nor a checkpoint"):
        checkpoint.resolve(tmp_path / "plain")
    (tmp_path / "plain" / ".metadata").write_bytes(b"\x80\x04")
    with pytest.raises(LmError, match="pickle"):
        checkpoint.resolve(tmp_path / "plain")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(LmError, match="no checkpoint of this run is complete"):
        checkpoint.resolve(tmp_path / "run")


# ---------------------------------------------------------------------------------------- classical


def toy(optimizer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 11))
    return model, optimizer(model.parameters())


def train(model, optimizer, steps):
    losses = []
    for step in range(steps):
        torch.manual_seed(step)
        x = torch.randint(0, 11, (4, 6))
        loss = nn.functional.cross_entropy(model(x).flatten(0, 1), x.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


OPTIMIZERS = [
    lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.8, 0.9)),
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["path", "file object"])
def test_the_classical_pair_continues_exactly(tmp_path, optimizer, kind):
    model, opt = toy(optimizer)
    train(model, opt, 5)
    out = tmp_path / "ckpt.safetensors" if kind == "path" else io.BytesIO()
    save_checkpoint(model, opt, 5, out)
    expected = train(model, opt, 5)
    if kind != "path":
        out.seek(0)
    again, opt2 = toy(optimizer)
    assert load_checkpoint(out, again, opt2) == 5
    assert train(again, opt2, 5) == expected


def test_the_classical_file_holds_no_pickle_and_refuses_another_model(tmp_path):
    model, opt = toy(OPTIMIZERS[0])
    train(model, opt, 1)
    save_checkpoint(model, opt, 1, tmp_path / "c")
    from safetensors.torch import load_file

    assert "model.0.weight" in load_file(tmp_path / "c")
    other = nn.Sequential(nn.Embedding(12, 8), nn.Linear(8, 11))
    with pytest.raises(LmError, match="shape"):
        load_checkpoint(tmp_path / "c", other, torch.optim.AdamW(other.parameters()))
    with pytest.raises(LmError, match="missing"):
        load_checkpoint(tmp_path / "c", nn.Linear(2, 2), torch.optim.AdamW(nn.Linear(2, 2).parameters()))
