"""Cross-entropy: stable, equal to torch's, and the same in chunks; padding rows get nothing."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from lmcore.model.loss import IGNORE, Losses, Term, cross_entropy, head_cross_entropy, head_cross_entropy_each


def problem(dtype=torch.float64, tokens=37, width=12, rows=128, vocab=101):
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, dtype=dtype).requires_grad_()
    weight = torch.randn(rows, width, dtype=dtype).requires_grad_()
    targets = torch.randint(0, vocab, (tokens,))
    targets[::5] = IGNORE
    return hidden, weight, targets, vocab


def test_cross_entropy_equals_torch_and_its_gradient():
    torch.manual_seed(0)
    logits = torch.randn(3, 5, 11, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 11, (3, 5))
    targets[0, :3] = IGNORE
    ours, theirs = cross_entropy(logits, targets), F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert abs(ours - theirs) < 1e-14
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)), atol=1e-14, rtol=0)


def test_cross_entropy_survives_enormous_logits_and_low_precision():
    logits = torch.tensor([[1e4, 0.0, -1e4]])
    assert cross_entropy(logits, torch.tensor([0])) == 0
    assert cross_entropy(logits, torch.tensor([2])) == 2e4
    half = torch.full((1, 1000), 3e38, dtype=torch.bfloat16)
    assert cross_entropy(half, torch.tensor([7])).item() == pytest.approx(math.log(1000))
    assert cross_entropy(logits, torch.tensor([IGNORE])) == 0


@pytest.mark.parametrize("chunk", [1, 8, 37, 64])
@pytest.mark.parametrize("fused", [False, True])
def test_chunks_change_nothing(chunk, fused):
    """fused: the operations that a compiler gets, here without it."""
    hidden, weight, targets, vocab = problem()
    whole, count = head_cross_entropy(hidden, weight, targets, vocab, chunk=0)
    parts, parts_count = head_cross_entropy(hidden, weight, targets, vocab, chunk=chunk, fused=fused)
    assert count == parts_count == (targets != IGNORE).sum()
    assert abs(whole - parts) < 1e-11
    reference = F.cross_entropy((hidden @ weight.T)[:, :vocab], targets, reduction="sum")
    assert abs(whole - reference) < 1e-11
    for grads in zip(*(torch.autograd.grad(loss * 0.3, (hidden, weight)) for loss in (whole, parts)), strict=True):
        torch.testing.assert_close(*grads, atol=1e-12, rtol=0)


def test_chunked_gradient_is_the_numerical_one():
    hidden, weight, targets, vocab = problem(tokens=4, width=3, rows=8, vocab=7)
    assert torch.autograd.gradcheck(
        lambda h, w: head_cross_entropy(h, w, targets, vocab, chunk=3)[0] * 0.7, (hidden, weight)
    )


@pytest.mark.parametrize(("chunk", "fused"), [(0, False), (8, False), (8, True)])
def test_padding_rows_have_no_probability_and_no_gradient(chunk, fused):
    hidden, weight, targets, vocab = problem()
    with torch.no_grad():
        weight[vocab:] = 100.0  # would win every softmax
    loss, count = head_cross_entropy(hidden, weight, targets, vocab, chunk=chunk, fused=fused)
    assert abs(loss - F.cross_entropy(hidden @ weight[:vocab].T, targets, reduction="sum")) < 1e-10
    (loss / count).backward()
    assert weight.grad[vocab:].abs().max() == 0


def test_bf16_loss_is_summed_in_fp32_and_close_to_the_truth():
    hidden, weight, targets, vocab = problem(torch.float32, tokens=512, width=64, rows=512, vocab=500)
    with torch.no_grad():
        weight.mul_(0.1)
    truth, count = head_cross_entropy(hidden.double(), weight.double(), targets, vocab, chunk=0)
    for chunk in (0, 128):
        loss, _ = head_cross_entropy(hidden.bfloat16(), weight, targets, vocab, chunk=chunk)
        assert loss.dtype == torch.float32
        assert abs(loss - truth) / count < 1e-3


def test_without_gradients_nothing_is_kept():
    hidden, weight, targets, vocab = problem()
    with torch.no_grad():
        loss, _ = head_cross_entropy(hidden, weight, targets, vocab, chunk=8)
    assert loss.grad_fn is None
    assert torch.isfinite(loss)


def test_objective_divides_by_global_counts():
    losses = Losses({"main": Term(torch.tensor(6.0), 3), "extra": Term(torch.tensor(8.0), torch.tensor(2), 0.5)})
    assert losses.objective() == 6 / 3 + 0.5 * 8 / 2
    assert losses.objective({"main": 6, "extra": 8}) == 1 + 0.5
    assert set(losses.aux) == {"extra"}


@pytest.mark.parametrize("chunk", [0, 3, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_of_each_token_beside_the_sum(chunk, dtype):
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(4, 5, 16, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(40, 16, generator=generator).requires_grad_()
    targets = torch.randint(33, (4, 5), generator=generator)
    targets[1, 2] = IGNORE
    total, count, each = head_cross_entropy_each(hidden, weight, targets, 33, chunk=chunk)
    assert each.shape == (4, 5)
    assert not each.requires_grad
    logits = (hidden.float() @ weight.to(dtype).float().T)[..., :33]
    truth = torch.nn.functional.cross_entropy(logits.mT, targets, ignore_index=IGNORE, reduction="none")
    torch.testing.assert_close(each, truth.detach(), rtol=2e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-5)
    assert each[1, 2] == 0
    torch.testing.assert_close(each.sum(), total.detach().float(), rtol=1e-6, atol=0)
    total.backward()
    gradients = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    plain, same = head_cross_entropy(hidden, weight, targets, 33, chunk=chunk)
    plain.backward()
    assert torch.equal(count, same)
    assert torch.equal(hidden.grad, gradients[0])
    assert torch.equal(weight.grad, gradients[1])
