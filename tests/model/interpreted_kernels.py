"""The kernels for CUDA devices in Triton's interpreter. It must be chosen before Triton is imported, so test_kernels.py
runs this file in a process of its own."""

import copy

import pytest
import torch

from lmcore.model import kernels, triton_kernels
from lmcore.model.attention import Attention
from lmcore.model.config import ModelConfig
from lmcore.model.feedforward import SwiGLU
from lmcore.model.loss import IGNORE, softmax_gradient
from lmcore.model.rotary import Positions

pytestmark = pytest.mark.filterwarnings("ignore")  # NumPy, in which the interpreter computes, warns of every NaN


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks that small shapes do not fill."""
    for name, size in (("SOFTMAX_BLOCK", 256), ("ROTATE_TOKENS", 16), ("GATE_BLOCK", 32)):
        monkeypatch.setattr(triton_kernels, name, size)


for operator in (kernels._forward, kernels._backward, kernels._gate, kernels._gate_back):
    operator.register_kernel("cpu", operator._init_fn)


def randomise(module):
    torch.manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.2 * torch.randn_like(p) + (p.ndim == 1))
    return module


def assert_equal(found, expected, inputs, modules, upstream, close=3e-6):
    """Outputs, and gradients of inputs and parameters, of a module in fp32 against its twin in float64."""
    found.backward(upstream.float())
    expected.backward(upstream)
    pairs = [(found, expected), [t.grad for t in inputs]]
    pairs += [(p.grad, q.grad) for p, q in zip(*(m.parameters() for m in modules), strict=True)]
    for ours, theirs in pairs:
        assert (ours.detach().double() - theirs).norm() < close * theirs.norm()


@pytest.mark.parametrize("gate", ["none", "headwise", "elementwise"])
@pytest.mark.parametrize("rows", [1, 3], ids=["shared positions", "positions of each row"])
def test_attention_with_its_kernels_equals_float64(monkeypatch, gate, rows):
    options = {"num_heads": 4, "num_kv_heads": 2, "num_layers": 1, "gate": gate}
    layer = randomise(Attention(ModelConfig(vocab_size=97, d_model=24, head_dim=16, context_length=37, **options)))
    exact = copy.deepcopy(layer).double()
    x = torch.randn(3, 37, 24, requires_grad=True)
    wide = x.detach().double().requires_grad_()
    index = torch.arange(37) + 5 * torch.arange(rows)[:, None]
    turns = [
        Positions.make(index, head_dim=16, theta=1e4, dtype=d, ragged=False) for d in (torch.float32, torch.float64)
    ]
    monkeypatch.setattr(kernels, "DEVICES", {"cpu"})
    assert kernels.has_norm_rotate(x, 16)
    assert not kernels.has_norm_rotate(wide, 16)
    found, expected = layer(x, turns[0])[0], exact(wide, turns[1])[0]
    assert_equal(found, expected, (x, wide), (layer, exact), torch.randn(expected.shape, dtype=torch.float64))


def test_the_feed_forward_with_its_kernels_equals_float64(monkeypatch):
    layer = randomise(SwiGLU(24, 70, residual_scale=1.0))
    exact = copy.deepcopy(layer).double()
    x = torch.randn(3, 5, 24, requires_grad=True)
    wide = x.detach().double().requires_grad_()
    monkeypatch.setattr(kernels, "DEVICES", {"cpu"})
    found, expected = layer(x), exact(wide)
    assert_equal(found, expected, (x, wide), (layer, exact), torch.randn(expected.shape, dtype=torch.float64))


@pytest.mark.parametrize("vocab", [200, 256, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_of_the_loss_equals_float64_and_lets_no_bad_number_pass(vocab, dtype):
    torch.manual_seed(0)
    z = (3 * torch.randn(9, -(-vocab // 128) * 128)).to(dtype)
    targets = torch.randint(0, vocab, (9,))
    targets[5] = IGNORE
    losses, gradient = softmax_gradient(z.double(), targets, vocab, True)
    written = z.clone()
    found = triton_kernels.softmax_gradient_(written, targets, vocab, True)
    assert (found - losses).abs().max() < 3e-6
    assert (written.double() - gradient).abs().max() < (1e-6 if dtype == torch.float32 else 2**-8)
    assert not written[5].any()
    assert not written[:, vocab:].any()
    left = z.clone()
    torch.testing.assert_close(triton_kernels.softmax_gradient_(left, targets, vocab, False), found, atol=0, rtol=0)
    assert torch.equal(left, z)  # without gradients the logits stay
    for bad in (float("nan"), float("inf")):
        broken = z.clone()
        broken[7, vocab - 1] = bad
        assert not triton_kernels.softmax_gradient_(broken, targets, vocab, False)[7].isfinite()
