"""Several ranks give the bits of one: reduction lanes, sharded optimizer state, save on one and resume on four."""

import itertools
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_runs import Crash, Watch, crash, curve, hashes

from lmcore.training.lanes import LaneSum, choose_lanes
from lmcore.training.parallel import World

ROOT = Path(__file__).parents[2]


def tree(values):
    """The definition: pairs of neighbours are added until one is left."""
    while len(values) > 1:
        values = [a + b for a, b in zip(values[::2], values[1::2], strict=True)]
    return values[0]


@pytest.mark.parametrize("lanes", [1, 2, 4, 8, 16])
def test_lanes_are_summed_as_a_binary_tree(lanes):
    generator = torch.Generator().manual_seed(lanes)
    shapes = [(7, 3), (5,), ()]
    parameters = [torch.nn.Parameter(torch.zeros(s)) for s in shapes]
    total = LaneSum(parameters, World(), exact=True)
    for _ in range(2):  # a second step must not see the first
        gradients = [[torch.randn(s, generator=generator) * 10 ** (lane % 5) for s in shapes] for lane in range(lanes)]
        scalars = [torch.randn(3, dtype=torch.float64, generator=generator) for _ in range(lanes)]
        total.begin()
        for lane in range(lanes):
            for p, g in zip(parameters, gradients[lane], strict=True):
                p.grad = g.clone()
            total.end_lane(scalars[lane])
        assert torch.equal(total.finish(), tree(scalars))
        for index, p in enumerate(parameters):
            assert torch.equal(p.grad, tree([g[index] for g in gradients]))


EXCHANGE = """
import torch
from lmcore.training import lanes, parallel

SHAPES = [(300, 7), (5,), (), (64, 64), (2048,), (3, 5, 7)]

def gradients(rank):
    made = torch.Generator().manual_seed(rank)
    drawn = [torch.randn(shape, generator=made) * 10 ** (rank % 3) for shape in SHAPES]
    return drawn[:-1] + [drawn[-1].transpose(0, 2)]  # a gradient need not be contiguous

with parallel.joined(torch.device("cpu")) as world:
    everyone = [gradients(rank) for rank in range(world.size)]
    for exact in (True, False):
        for lanes.BUCKET_BYTES in (64, 100, 8192, 16384, 1 << 30):
            parameters = [torch.nn.Parameter(torch.zeros_like(g)) for g in everyone[0]]
            total = lanes.LaneSum(parameters, world, exact=exact)
            total.begin()
            for parameter, gradient in zip(parameters, gradients(world.rank)):
                parameter.grad = gradient
            total.end_lane(torch.tensor([world.rank + 1.0], dtype=torch.float64))
            scalars = total.finish()
            assert scalars.item() == world.size * (world.size + 1) / 2
            for index, parameter in enumerate(parameters):
                first, second, third, fourth = (each[index] for each in everyone)
                expected = (first + second) + (third + fourth)
                off = (parameter.grad - expected).abs().max().item()
                assert off <= (0 if exact else 1e-4), (exact, lanes.BUCKET_BYTES, index, off)  # of sums up to 400
    print("the same sums")
"""


def test_ranks_exchange_the_same_sums_in_buckets_of_any_size(tmp_path):
    """Exact: the pairs of neighbours are added, bit for bit; fast: within rounding."""
    script = tmp_path / "exchange.py"
    script.write_text(EXCHANGE)
    assert launched(4, str(script)).stdout.count("the same sums") == 4


def test_choose_lanes():
    assert choose_lanes(64, 1) == 4
    assert choose_lanes(12, 1) == 4
    assert choose_lanes(7, 1) == 1
    assert choose_lanes(64, 16) == 16
    assert choose_lanes(64, 1, 2) == 2


def torchrun(lab, ranks, name, *settings, arguments=()):
    typed = list(itertools.chain.from_iterable(("--set", s) for s in settings))
    return launched(
        ranks, "-m", "lmcore", "train", str(lab.root / name), "--preset", str(lab.preset()), *typed, *arguments
    )


def launched(ranks, *command):
    """What ended well, started by torchrun when there are several ranks."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(key, None)
    launcher = (
        [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={_port()}"]
        if ranks > 1
        else [sys.executable]
    )
    done = subprocess.run(
        [*launcher, *command], capture_output=True, text=True, timeout=240, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def _port():
    return random.SystemRandom().randrange(20_000, 60_000)


SETTINGS = ("model.dropout=0.1", "train.micro_batch=1", "train.steps=8", "train.checkpoint.every_steps=0")


@pytest.mark.slow
def test_two_ranks_give_the_bits_of_one(lab):
    lab.run("one", *SETTINGS)
    done = torchrun(lab, 2, "two", *SETTINGS)
    assert hashes(lab.root / "two") == hashes(lab.root / "one")
    assert done.stdout.count("trained 8 steps") == 1
    ones, twos = (curve(lab.root / n) for n in ("one", "two"))
    assert [line["loss"] for line in twos if line["kind"] == "train"] == [
        line["loss"] for line in ones if line["kind"] == "train"
    ]
    assert twos[-1]["bits_per_byte"] == pytest.approx(ones[-1]["bits_per_byte"], rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        (),
        ("optim.optimizer=adamw", "train.dtype=bf16"),
        ("model.ffn=e", "model.moe.num_experts=4", "model.moe.balance_weight=0.01"),
    ],
)
def test_saved_on_one_resumed_on_four_then_two(lab, more):
    settings = (*SETTINGS, *more)
    lab.run("whole", *settings)
    whole = hashes(lab.root / "whole")
    with pytest.raises(Crash):
        lab.run("moved", *settings, "train.checkpoint.every_steps=3", watch=Watch({4: crash}))
    with pytest.raises(Crash):  # ends after step 6, still on one rank: the next ranks continue from 6
        lab.run("moved", *settings, "train.checkpoint.every_steps=3", watch=Watch({7: crash}))
    torchrun(lab, 4, "moved", *settings)
    assert hashes(lab.root / "moved") == whole
    torchrun(lab, 4, "four", *settings)
    assert hashes(lab.root / "four") == whole


@pytest.mark.slow
def test_the_fast_reduction_agrees_within_rounding(lab):
    # AdamW: Muon's orthogonalisation magnifies rounding in directions whose gradient is near zero (to 2e-5 here).
    settings = (*SETTINGS[1:], "optim.optimizer=adamw")
    lab.run("one", *settings)
    torchrun(lab, 2, "two", *settings, "train.reduce=fast")
    ones, twos = ([line["loss"] for line in curve(lab.root / n) if line["kind"] == "train"] for n in ("one", "two"))
    assert twos == pytest.approx(ones, rel=5e-6)


@pytest.mark.slow
def test_a_batch_that_cannot_be_divided_is_refused(lab):
    with pytest.raises(AssertionError, match="cannot be divided"):
        torchrun(lab, 3, "three", *SETTINGS)
