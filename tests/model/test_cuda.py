"""The model on a CUDA device: float64 laws against the CPU, precision in fp32 and bf16, the compiled loss."""

import copy

import pytest
import torch
from test_laws import LENGTH, VOCAB, make, run

from lmcore.model.loss import IGNORE, head_cross_entropy
from lmcore.model.mamba import PACKAGES

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


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_the_compiled_loss_equals_float64(dtype, close):
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
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    error = sum(float((a - b).square().sum()) for a, b in zip(*gradients, strict=True))
    size = sum(float(a.square().sum()) for a in gradients[0])
    assert (error / size) ** 0.5 < 1e-2
