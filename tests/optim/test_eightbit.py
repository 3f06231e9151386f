"""8-bit AdamW: precision of the code, distance from fp32 AdamW and from other implementations."""

import pytest
import torch

from lmcore.optim import eightbit
from lmcore.optim.config import OptimConfig
from lmcore.optim.optimizer import build_optimizer


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Row:
    role, splits, decay = "matrix", (), True

    def __init__(self, parameter, name="w"):
        self.parameter, self.name = torch.nn.Parameter(parameter), name


@pytest.mark.parametrize("length", [1, 255, 256, 257, 5000])
@pytest.mark.parametrize("signed", [True, False])
def test_every_number_keeps_its_relative_precision(length, signed):
    values = gaussian(length) * torch.exp(2 * gaussian(length, seed=1))
    values = values if signed else values.abs()
    codes, scales = eightbit.quantize(values, signed=signed)
    assert codes.dtype == (torch.int8 if signed else torch.uint8)
    assert len(scales) == -(-length // 256)
    back = eightbit.dequantize(codes, scales)
    kept = values.abs() > scales.repeat_interleave(256)[:length] * 2.0**-15.8
    assert kept.double().mean() > 0.97
    half_a_step = 2 ** (1 / 16) - 1
    assert torch.all((back / values - 1).abs()[kept] < half_a_step * 1.01)
    assert torch.equal(back.sign()[kept], values.sign()[kept])


def test_the_range_of_a_block():
    values = torch.tensor([1.0, 2.0**-15, -(2.0**-15), 2.0**-17, 0.0, 2.0**-31, 2.0**-40])
    signed = eightbit.dequantize(*eightbit.quantize(values, signed=True))
    assert signed.tolist() == pytest.approx([1, 2**-15, -(2**-15), 0, 0, 0, 0])
    unsigned = eightbit.dequantize(*eightbit.quantize(values.abs(), signed=False))
    assert unsigned.tolist() == pytest.approx([1, 2**-15, 2**-15, 2**-17, 0, 2**-31, 2**-31.75], rel=1e-6)


def test_zeros_and_the_largest_number_are_exact():
    values = torch.cat([torch.zeros(300), gaussian(212) * 1e-20])
    codes, scales = eightbit.quantize(values, signed=True)
    back = eightbit.dequantize(codes, scales)
    assert back[:300].abs().max() == 0
    for block, original in zip(back.split(256), values.split(256), strict=True):
        assert block.abs().max() == original.abs().max()
    assert torch.isfinite(eightbit.dequantize(*eightbit.quantize(torch.full((3,), 1e-45), signed=False))).all()


@pytest.mark.parametrize("spread", [0.0, 1.5])
def test_weights_stay_near_those_of_fp32_adamw(spread):
    """Also when the gradients inside a block differ by orders of magnitude, where coarser codes blow up."""
    shape = (96, 100)
    scale = torch.exp(spread * gaussian(*shape, seed=7))
    ways = {}
    for kind in ("adamw", "adamw8bit"):
        row = Row(torch.zeros(shape))
        config = OptimConfig(optimizer=kind, lr=1e-3, schedule="constant", warmup_steps=0, weight_decay=0.0)
        optimizer = build_optimizer([row], config, total_steps=200)
        for step in range(100):
            row.parameter.grad = (0.1 * gaussian(*shape, seed=8) + gaussian(*shape, seed=100 + step)) * scale
            optimizer.step(step)
        ways[kind] = row.parameter.detach()
    assert (ways["adamw"] - ways["adamw8bit"]).norm() / ways["adamw"].norm() < 0.06
    assert float(ways["adamw8bit"].norm() / ways["adamw"].norm()) == pytest.approx(1, abs=0.02)


def test_size_and_choice_of_tensors():
    rows = [Row(torch.zeros(128, 100), "large"), Row(torch.zeros(8, 8), "small")]
    embedding = Row(torch.zeros(128, 100), "embedding")
    embedding.role = "tied"
    optimizer = build_optimizer([*rows, embedding], OptimConfig(optimizer="adamw8bit"), total_steps=10)
    state = optimizer.state_tensors()
    assert {name: tensor.dtype for name, tensor in state.items() if not name.endswith("scale")} == {
        "large.exp_avg": torch.int8,
        "large.exp_avg_sq": torch.uint8,
        "small.exp_avg": torch.float32,
        "small.exp_avg_sq": torch.float32,
        "embedding.exp_avg": torch.float32,
        "embedding.exp_avg_sq": torch.float32,
    }
    size = sum(t.numel() * t.element_size() for name, t in state.items() if name.startswith("large"))
    assert size / 12800 == pytest.approx(2.03, abs=0.01)
    assert optimizer.state_bytes() == sum(t.numel() * t.element_size() for t in state.values())


def test_pieces_of_a_large_tensor_change_no_bit(monkeypatch):
    def run():
        row = Row(gaussian(70, 100))
        optimizer = build_optimizer([row], OptimConfig(optimizer="adamw8bit"), total_steps=10)
        for step in range(3):
            row.parameter.grad = gaussian(70, 100, seed=step)
            optimizer.step(step)
        return row.parameter.detach()

    whole = run()
    monkeypatch.setattr(eightbit, "_CHUNK", 512)
    assert torch.equal(run(), whole)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, raised while it compiles the other one
def test_against_torchao():
    """An independent implementation, when it is there: as near to fp32 AdamW as ours, or ours nearer."""
    low_bit = pytest.importorskip("torchao.optim", reason="torchao is not installed: no second opinion on 8-bit AdamW")
    shape, ways = (64, 128), {}
    for kind in ("adamw", "adamw8bit", "torchao"):
        row = Row(torch.zeros(shape))
        config = OptimConfig(optimizer=kind if kind != "torchao" else "adamw", lr=1e-3, schedule="constant",
                             warmup_steps=0, weight_decay=0.0)  # fmt: skip
        optimizer = build_optimizer([row], config, total_steps=40)
        other = low_bit.AdamW8bit([row.parameter], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
        for step in range(20):
            row.parameter.grad = gaussian(*shape, seed=step)
            other.step() if kind == "torchao" else optimizer.step(step)
        ways[kind] = row.parameter.detach()
    distance = {kind: float((way - ways["adamw"]).norm() / ways["adamw"].norm()) for kind, way in ways.items()}
    assert distance["adamw8bit"] < max(0.05, 1.5 * distance["torchao"])
