"""train.shard = full: every rank holds a part of the weights, and the run is that of one rank within rounding."""

import shutil

import pytest
import torch
from small_runs import curve, hashes

from lmcore.errors import LmError
from lmcore.optim.optimizer import build_optimizer
from lmcore.optim.sharding import Ranks, rows_of
from lmcore.training.checkpoint import load_model
from lmcore.training.device import cpu_bf16
from lmcore.training.resolve import resolve
from lmcore.training.tensors import read_tensors

SHORT = ("train.steps=8", "train.checkpoint.every_steps=0", "train.eval.every_steps=4")
SHARDED = "train.shard=full"
ROUNDED = cpu_bf16() != ""
"""Muon orthogonalises in bf16 where the processor has it: a last bit of a gradient can then move an update by 2^-8."""


def losses(lab, name):
    return [line["loss"] for line in curve(lab.root / name) if line["kind"] == "train"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ("model.dropout=0.1", "train.lanes=2", "train.micro_batch=2"),
        ("optim.optimizer=adamw", "model.tie_embeddings=false", "train.activation_checkpointing=full"),
        ("model.ffn=e", "model.moe.num_experts=3", "model.mtp.depths=1", "optim.normuon=true"),
        ("model.pattern=AM", "model.depth=-m", "train.dtype=bf16"),
    ],
)
def test_two_sharded_ranks_train_like_one(lab, more):
    lab.run("one", *SHORT, *more)
    lab.run_ranks(2, "two", *SHORT, *(m for m in more if "lanes" not in m), SHARDED)
    close = 2e-4 if ROUNDED and "optim.optimizer=adamw" not in more else 1e-6
    close = 2e-3 if "train.dtype=bf16" in more else close
    assert losses(lab, "two") == pytest.approx(losses(lab, "one"), rel=close)
    validations = [[line["loss"] for line in curve(lab.root / n) if line["kind"] == "val"] for n in ("one", "two")]
    assert validations[1] == pytest.approx(validations[0], rel=close)
    for name in ("model", "optimizer"):
        one, two = (
            read_tensors(lab.root / n / f"checkpoints/step-00000008/{name}.safetensors") for n in ("one", "two")
        )
        assert {k: (t.shape, t.dtype) for k, t in one.items()} == {k: (t.shape, t.dtype) for k, t in two.items()}
    model = load_model(lab.root / "two", device="cpu").model  # what eval, generate and export read
    assert model(torch.arange(8)[None]).isfinite().all()


@pytest.mark.slow
@pytest.mark.timeout(900)  # nine processes
def test_killed_on_two_ranks_and_continued_on_two_four_and_one(lab):
    settings = ("train.steps=40", "train.checkpoint.every_steps=5", "train.eval.every_steps=0")
    lab.run("one", *settings)
    lab.run_ranks(2, "whole", *settings, SHARDED)
    ranks = lab.start_ranks(2, "on two", *settings, SHARDED)
    lab.wait_for_step("on two", 12, ranks)
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.communicate()
    assert len(curve(lab.root / "on two")) < 40
    for name in ("on four", "on one"):
        shutil.copytree(lab.root / "on two", lab.root / name)
    lab.run_ranks(2, "on two", *settings, SHARDED)
    assert hashes(lab.root / "on two") == hashes(lab.root / "whole")
    assert curve(lab.root / "on two") == curve(lab.root / "whole")
    lab.run_ranks(4, "on four", *settings, SHARDED)
    lab.run("on one", *settings)
    for name in ("whole", "on four", "on one"):
        assert losses(lab, name) == pytest.approx(losses(lab, "one"), rel=2e-4 if ROUNDED else 1e-5)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("train.reduce=exact", "train.reduce = exact is not possible"),
        ("train.compile=true", "train.compile = true is not"),
    ],
)
def test_what_does_not_go_with_sharded_weights_is_refused(lab, setting, words):
    config = lab.prepare("run", SHARDED, setting).config
    with pytest.raises(LmError, match=words):
        resolve(config, torch.device("cpu"), 2)
    assert resolve(config, torch.device("cpu"), 1).train.shard == "full"  # on one rank it means nothing
    resolve(config, torch.device("cpu"), 2, recorded=frozenset({"train.reduce", "train.compile"}))  # an unsharded run


def test_what_was_decided_for_other_ranks_gives_way(lab):
    config = resolve(lab.prepare("run", SHARDED).config, torch.device("cpu"), 2)
    assert config.train.micro_batch == 4
    with pytest.raises(LmError, match="does not divide the 2 rows"):
        resolve(config, torch.device("cpu"), 4)
    again = resolve(config, torch.device("cpu"), 4, recorded=frozenset({"train.micro_batch"}))
    assert (again.train.micro_batch, again.train.lanes) == (2, 4)


def test_8_bit_blocks_are_not_cut(lab):
    from lmcore.model.model import LanguageModel

    config = lab.prepare("run", "optim.optimizer=adamw8bit", "model.d_model=64").config
    with pytest.raises(LmError, match="adamw8bit cannot be used"):
        build_optimizer(
            LanguageModel(config.model).parameter_table(), config.optim, total_steps=9, ranks=Ranks(0, 2, True)
        )


@pytest.mark.parametrize(("length", "size"), [(8, 2), (7, 2), (3, 4), (1, 4), (10, 4), (9, 4), (100, 7)])
def test_rows_are_cut_as_torch_cuts_them(length, size):
    parts = torch.arange(length).chunk(size)
    for rank in range(size):
        start, stop = rows_of(length, rank, size)
        assert list(range(start, stop)) == (parts[rank].tolist() if rank < len(parts) else [])
