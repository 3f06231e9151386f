"""The model on a CUDA device: float64 laws against the CPU, precision in fp32 and bf16, the compiled loss."""

import copy

import pytest
import torch
from test_laws import LENGTH, VOCAB, make, run
from test_mamba import the_package_may_refuse

from lmcore.model.attention import Attention
from lmcore.model.config import ModelConfig
from lmcore.model.feedforward import SwiGLU
from lmcore.model.kernels import flash_attention, has_norm_rotate
from lmcore.model.loss import IGNORE, head_cross_entropy, softmax_gradient, softmax_gradient_
from lmcore.model.mamba import PACKAGES
from lmcore.model.rotary import Positions

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore"),  # what the compiler warns of inside torch would end it
]
KINDS = {
    "attention": {"pattern": "A"},
    "gated attention": {"pattern": "A", "gate": "elementwise"},
    "window": {"pattern": "W"},
    "Mamba": {"pattern": "M"},
    "resonance": {"pattern": "F"},
    "routed Mamba": {"pattern": "R"},
    "experts": {"pattern": "A", "ffn": "e"},
    "depth": {"pattern": "A", "depth": "m"},
    "hybrid with heads ahead": {"pattern": "MAWF", "num_layers": 4, "mtp": {"depths": 1}},
}


def tokens_of(rows=3, length=LENGTH):
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kind", KINDS)
def test_float64_equals_the_cpu_and_decodes_alike(kind):
    model = make(**KINDS[kind])
    twin = copy.deepcopy(model).cuda()
    tokens = tokens_of()
    with torch.no_grad():
        expected = model(tokens)
        found = twin(tokens.cuda())
        torch.testing.assert_close(found.cpu(), expected, atol=1e-10, rtol=1e-10)
        for cuts in ((9, 10, 12, 13, 21, LENGTH), range(1, LENGTH + 1)):
            torch.testing.assert_close(run(twin, tokens.cuda(), cuts)[0], found, atol=1e-10, rtol=1e-10)
    model.train(), twin.train()
    tokens = tokens_of(length=LENGTH + 1)
    model.loss(tokens[:, :-1], tokens[:, 1:]).objective().backward()
    there = tokens.cuda()
    twin.loss(there[:, :-1], there[:, 1:]).objective().backward()
    for (name, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(other.grad.cpu(), one.grad, atol=1e-9, rtol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "close"), [(None, 1e-5), (torch.bfloat16, 0.3)])
def test_a_gradient_in_low_precision_points_where_the_true_one_does(kind, dtype, close):
    exact = make(**KINDS[kind]).train()
    model = copy.deepcopy(exact).float().cuda()
    model.compute_dtype = dtype
    if exact.routers or "m" in exact.config.depth:
        close = max(close, 0.5 if dtype else 1e-3)  # a token near the border goes to another expert
    tokens = tokens_of(length=LENGTH + 1)
    exact.loss(tokens[:, :-1], tokens[:, 1:]).objective().backward()
    there = tokens.cuda()
    model.loss(there[:, :-1], there[:, 1:]).objective().backward()
    pairs = list(zip(exact.parameters(), model.parameters(), strict=True))
    error = sum(float((b.grad.cpu().double() - a.grad).square().sum()) for a, b in pairs)
    size = sum(float(a.grad.square().sum()) for a, _ in pairs)
    assert (error / size) ** 0.5 < close


def assert_close_with_gradients(outputs, inputs, modules, close):
    """Outputs, and gradients of inputs and parameters: each a pair of ours on the device and the exact one."""
    found, expected = outputs
    upstream = torch.randn(expected.shape).to(found.dtype)
    expected.backward(upstream.double())
    found.backward(upstream.cuda())
    pairs = [outputs, [t.grad for t in inputs]]
    pairs += [(p.grad, q.grad) for p, q in zip(*(m.parameters() for m in modules), strict=True)]
    for ours, theirs in pairs:
        assert (ours.detach().cpu().double() - theirs).norm() < close * theirs.norm()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("gate", ["none", "headwise", "elementwise"])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_kernel_for_qk_norm_and_rotation_equals_float64(dtype, close, gate, compiled):
    """A whole attention layer, with fewer heads for keys than for queries and tokens that fill no block."""
    torch.manual_seed(0)
    options = {"num_heads": 4, "num_kv_heads": 2, "num_layers": 1, "gate": gate}
    exact = Attention(ModelConfig(vocab_size=97, d_model=64, head_dim=32, context_length=77, **options)).double()
    with torch.no_grad():
        for p in exact.parameters():
            p.copy_(0.2 * torch.randn_like(p) + (p.ndim == 1))
    layer = copy.deepcopy(exact).float().cuda()
    x = torch.randn(3, 77, 64).to(dtype)
    index = torch.stack([torch.arange(77) + 5 * row for row in range(3)])  # each row at places of its own
    inputs = [x.double().requires_grad_(), x.cuda().requires_grad_()]
    turns = [Positions.make(index.to(i.device), head_dim=32, theta=1e4, dtype=i.dtype, ragged=False) for i in inputs]
    assert not has_norm_rotate(inputs[0], 32)
    assert has_norm_rotate(inputs[1], 32)
    run = torch.compile(layer.forward, dynamic=False) if compiled else layer.forward
    expected, found = exact(inputs[0], turns[0])[0], run(inputs[1], turns[1])[0]
    assert_close_with_gradients((found, expected), inputs[::-1], (layer, exact), close)


@pytest.mark.parametrize(("steps", "size", "kv"), [(77, 64, 2), (512, 64, 4), (300, 128, 1)])
def test_flash_attention_4_equals_float64_and_has_the_same_bits_again(steps, size, kv):
    pytest.importorskip("flash_attn.cute")
    torch.manual_seed(0)
    inputs = [torch.randn(2, heads, steps, size).bfloat16() for heads in (4, kv, kv)]
    upstream = torch.randn(2, 4, steps, size).bfloat16()
    exact = [t.double().requires_grad_() for t in inputs]
    y = torch.nn.functional.scaled_dot_product_attention(*exact, is_causal=True, enable_gqa=True)
    y.backward(upstream.double())
    runs = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            ours = [t.cuda().requires_grad_() for t in inputs]
            found = flash_attention(*ours)
            found.backward(upstream.cuda())
            runs.append([found.detach(), *(t.grad for t in ours)])
    finally:
        torch.use_deterministic_algorithms(False)
    for once, again, truth in zip(*runs, [y.detach(), *(t.grad for t in exact)], strict=True):
        assert torch.equal(once, again)
        assert (once.cpu().double() - truth).norm() < 1e-2 * truth.norm()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_the_kernels_of_the_feed_forward_equal_float64(dtype, close, compiled):
    torch.manual_seed(0)
    exact = SwiGLU(64, 1100, residual_scale=1.0).double()
    with torch.no_grad():
        for p in exact.parameters():
            p.copy_(0.2 * torch.randn_like(p))
    layer = copy.deepcopy(exact).float().cuda()
    x = torch.randn(3, 7, 64).to(dtype)
    inputs = [x.double().requires_grad_(), x.cuda().requires_grad_()]
    run = torch.compile(layer.forward, dynamic=False) if compiled else layer.forward
    expected, found = exact(inputs[0]), run(inputs[1])
    assert_close_with_gradients((found, expected), inputs[::-1], (layer, exact), close)


@pytest.mark.parametrize("vocab", [1000, 50_257])
def test_the_kernel_of_the_loss_writes_every_gradient_and_lets_no_bad_number_pass(vocab):
    torch.manual_seed(0)
    z = 3 * torch.randn(64, -(-vocab // 128) * 128, dtype=torch.bfloat16)
    targets = torch.randint(0, vocab, (64,))
    targets[5] = IGNORE
    losses, gradient = softmax_gradient(z.double(), targets, vocab, True)
    found, written = softmax_gradient_(z.cuda(), targets.cuda(), vocab, True)
    assert (found.cpu() - losses).abs().max() < 1e-5
    assert (written.cpu().double() - gradient).abs().max() < 2**-8
    assert (written.cpu().double() - gradient).norm() < 2e-3 * gradient.norm()
    assert not written[5].any()
    for bad in (float("nan"), float("inf")):
        broken = z.cuda()
        broken[7, vocab - 1] = bad
        assert not softmax_gradient_(broken, targets.cuda(), vocab, False)[0].isfinite().all()


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_the_fused_loss_equals_float64(dtype, close):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1000, 64, generator=generator).to(dtype)
    weight = 0.2 * torch.randn(1024, 64, generator=generator)
    targets = torch.randint(0, 1000, (1000,), generator=generator)
    targets[::7] = IGNORE
    exact = [hidden.double().requires_grad_(), weight.to(dtype).double().requires_grad_()]
    truth, count = head_cross_entropy(*exact, targets, 1000, chunk=0)
    (truth / count).backward()
    found = [hidden.cuda().requires_grad_(), weight.cuda().requires_grad_()]
    loss, same = head_cross_entropy(*found, targets.cuda(), 1000, chunk=384, fused=True)
    assert same == count
    (loss / same).backward()
    assert abs(loss.item() - truth.item()) / truth.item() < close
    for ours, theirs in zip(found, exact, strict=True):
        assert (ours.grad.cpu().double() - theirs.grad).norm() < close * theirs.grad.norm()
    assert found[1].grad[1000:].abs().max() == 0


def test_mamba_kernels_of_fla_train_as_the_scan_does():
    """With the package `fla`: a whole model, forward and backward, against the scan written in torch."""
    pytest.importorskip(PACKAGES["fla"][0])
    options = {"pattern": "M", "d_model": 128, "context_length": 256, "mamba": {"d_state": 64, "head_dim": 64}}
    exact = make(**options).float().train()
    tokens = tokens_of(2, 257).cuda()
    gradients = []
    for kernels in ("torch", "fla"):
        model = copy.deepcopy(exact).cuda()
        for block in model.blocks:
            block.mixer.kernels = kernels
        loss = model.loss(tokens[:, :-1], tokens[:, 1:]).objective()
        with the_package_may_refuse():
            loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    error = sum(float((a - b).square().sum()) for a, b in zip(*gradients, strict=True))
    size = sum(float(a.square().sum()) for a in gradients[0])
    assert (error / size) ** 0.5 < 1e-2
