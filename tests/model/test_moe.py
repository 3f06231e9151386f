"""Mixture of experts: identities, balance, the selection bias, capacity, gradients, an oracle from outside."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from test_model import copy_decoder, hugging_face

from lmcore.model.config import ModelConfig
from lmcore.model.model import LanguageModel
from lmcore.model.moe import MoE, load_metrics
from lmcore.model.routing import Router, grouped_linear


def make(d=16, **moe):
    torch.manual_seed(0)
    options = {"num_experts": 4, "top_k": 2, "d_expert": 12, **moe}
    config = ModelConfig(vocab_size=9, d_model=d, num_layers=1, num_heads=2, moe=options, ffn="e")
    layer = MoE(config, residual_scale=1.0).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


def expert(layer, e, x):
    a, b = (x @ layer.w13.weight[e].T).chunk(2, -1)
    return (F.silu(a) * b) @ layer.w2.weight[e].T


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_equals_a_loop_over_tokens(score):
    layer = make(score=score, route_scale=1.7, num_shared=2)
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    y, stats = layer(x)
    counts = [0] * 4
    for row in range(3):
        for t in range(5):
            logits = layer.router.weight @ x[row, t]
            scores = logits.softmax(0) if score == "softmax" else logits.sigmoid()
            ids = sorted(range(4), key=lambda e, s=scores: -s[e])[:2]
            total = sum(scores[e] for e in ids)
            expected = sum(1.7 * scores[e] / total * expert(layer, e, x[row, t]) for e in ids)
            torch.testing.assert_close(y[row, t], expected + layer.shared(x[row, t]), atol=1e-13, rtol=0)
            for e in ids:
                counts[e] += 1
    assert stats.counts.tolist() == counts


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("top_k", [2, 3, 8])
def test_identical_experts_with_normalised_weights_are_dense(score, top_k):
    layer = make(num_experts=8, top_k=top_k, score=score)
    with torch.no_grad():
        layer.w13.weight.copy_(layer.w13.weight[:1].expand_as(layer.w13.weight))
        layer.w2.weight.copy_(layer.w2.weight[:1].expand_as(layer.w2.weight))
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    torch.testing.assert_close(layer(x)[0], expert(layer, 0, x), atol=1e-13, rtol=0)


def test_the_bias_selects_and_never_weighs():
    layer = make(top_k=1)
    layer.router.bias[2] = 1e9
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    y, stats = layer(x)
    p = (x @ layer.router.weight.T).softmax(-1)[..., 2:3]
    torch.testing.assert_close(y, p * expert(layer, 2, x), atol=1e-13, rtol=0)
    assert stats.counts.tolist() == [0, 0, 18, 0]


def test_permuted_tokens_give_permuted_outputs():
    layer, x = make(), torch.randn(18, 16, dtype=torch.float64)
    order = torch.randperm(18)
    torch.testing.assert_close(layer(x[order])[0], layer(x)[0][order], atol=1e-14, rtol=0)


def test_balance_is_one_when_uniform_and_the_number_of_experts_when_collapsed():
    router = Router(8, 4, 1, weights={"balance": 1.0}).double()
    x = torch.rand(1000, 8, dtype=torch.float64) + 0.1

    def balance():
        _, _, stats = router(x)
        total, tokens, _ = router.terms(stats, stats.counts)["balance"]
        assert tokens == 1000
        return (total / tokens).item()

    torch.nn.init.zeros_(router.weight)
    assert balance() == pytest.approx(1, abs=1e-9)
    torch.nn.init.zeros_(router.weight)
    with torch.no_grad():
        router.weight[0] = 1e3
    assert balance() == pytest.approx(4, abs=1e-9)


def test_z_loss_is_the_squared_logsumexp():
    layer, x = make(), torch.randn(7, 16, dtype=torch.float64)
    _, stats = layer(x)
    expected = sum(math.log(sum(math.exp(z) for z in row)) ** 2 for row in (x @ layer.router.weight.T).tolist())
    assert stats.z.item() == pytest.approx(expected, abs=1e-10)


def test_top_1_router_learns_through_its_probability():
    layer = make(top_k=1)
    layer(torch.randn(9, 16, dtype=torch.float64))[0].square().sum().backward()
    assert layer.router.weight.grad.abs().max() > 1e-6


def model_with_experts(**moe):
    config = ModelConfig(
        vocab_size=61, d_model=16, num_layers=2, num_heads=2, ffn="e", moe={"num_experts": 4, "d_expert": 8, **moe}
    )
    return LanguageModel(config).double().train()


def test_balance_counts_the_step_so_far_and_the_bias_moves_once_per_step():
    model = model_with_experts(balance_weight=0.5)
    tokens = torch.randint(0, 61, (4, 17), generator=torch.Generator().manual_seed(0))
    whole = model.loss(tokens[:, :-1], tokens[:, 1:])
    loads = [router.step_load.clone() for router in model.routers]
    model.after_step()
    for router, load in zip(model.routers, loads, strict=True):
        assert router.step_load.sum() == 0
        expected = 1e-3 * (load.double().mean() - load.double()).sign()
        torch.testing.assert_close(router.bias, expected - expected.mean())
        torch.nn.init.zeros_(router.bias)
    # In two micro-batches the second sees the loads of both.
    halves = [model.loss(half[:, :-1], half[:, 1:]) for half in tokens.split(2)]
    for router, load in zip(model.routers, loads, strict=True):
        assert torch.equal(router.step_load, load)
    assert sum(h.main.sum for h in halves).item() == pytest.approx(whole.main.sum.item(), abs=1e-9)
    model.begin_accumulation()
    assert all(router.seen_load.sum() == 0 < router.step_load.sum() for router in model.routers)
    # Another device's load enters through the two hooks.
    model.after_step()
    for router in model.routers:
        torch.nn.init.zeros_(router.bias)
    model.sum_over_ranks = lambda load: load.mul_(2)
    doubled = model.loss(tokens[:, :-1], tokens[:, 1:])
    assert doubled.terms["balance"].sum.item() == pytest.approx(whole.terms["balance"].sum.item(), abs=1e-9)
    seen = []
    model.after_step(all_reduce=lambda load: seen.append(load.clone()))
    assert len(seen) == 1
    assert torch.equal(seen[0], torch.cat(loads))


def test_bias_evens_out_a_skewed_router():
    model = model_with_experts(bias_rate=0.01, top_k=1)
    tokens = torch.randint(0, 61, (4, 33), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for router in model.routers:
            router.bias[2] = 0.3  # almost everyone goes there
        peaks = []
        for _ in range(60):
            model.loss(tokens[:, :-1], tokens[:, 1:])
            peaks.append(model.after_step()["router/max_load"].max().item())
    assert peaks[0] > 3
    assert sum(peaks[-20:]) / 20 < 1.8


def test_recomputed_blocks_count_once():
    loads = []
    for every in (0, 1):
        model = model_with_experts()
        model.checkpoint_every = every
        tokens = torch.randint(0, 61, (2, 17), generator=torch.Generator().manual_seed(0))
        model.loss(tokens[:, :-1], tokens[:, 1:]).objective().backward()
        loads.append([router.step_load.tolist() for router in model.routers])
    assert loads[0] == loads[1]


def test_the_bias_is_saved_and_the_running_counts_are_not():
    names = model_with_experts().state_dict()
    assert "blocks.0.ffn.router.bias" in names
    assert not [name for name in names if "load" in name]


def test_capacity_drops_the_last_tokens_of_a_full_expert_while_training_only():
    layer = make(top_k=1, capacity_factor=0.5)
    layer.router.bias[1] = 1e9  # all 16 tokens want expert 1, which serves ceil(0.5 * 16 / 4) = 2
    x = torch.randn(16, 16, dtype=torch.float64)
    whole, _ = layer.eval()(x)
    limited, _ = layer.train()(x)
    torch.testing.assert_close(limited[:2], whole[:2])
    assert limited[2:].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_product_equals_the_loop_and_its_gradients(dtype):
    torch.manual_seed(0)
    counts = torch.tensor([5, 0, 11, 8])
    x, weight = torch.randn(24, 16), torch.randn(4, 8, 16) * 0.2
    exact = [t.double().requires_grad_() for t in (x, weight)]
    fast = [x.to(dtype).requires_grad_(), weight.clone().requires_grad_()]
    truth, result = (grouped_linear(*pair, counts) for pair in (exact, fast))
    assert result.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(result.double(), truth, atol=tolerance, rtol=tolerance)
    upstream = torch.randn_like(truth)
    truth.backward(upstream)
    result.backward(upstream.to(dtype))
    for one, other in zip(fast, exact, strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, atol=5 * tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [[0, 1, 0, 0], [0, 0, 0, 2], [0, 0, 0, 0], [1, 1, 1, 0]])
def test_few_or_no_tokens(counts, dtype):
    x, weight = torch.randn(sum(counts), 16).to(dtype), torch.randn(4, 8, 16).to(dtype)
    expected = [x[row] @ weight[e].T for row, e in enumerate(e for e, n in enumerate(counts) for _ in range(n))]
    result = grouped_linear(x, weight, torch.tensor(counts))
    assert result.shape == (sum(counts), 8)
    for ours, theirs in zip(result, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=0.05, rtol=0.05)


def test_utilisation_of_even_and_collapsed_loads():
    metrics = load_metrics([torch.tensor([5, 5, 5, 5]), torch.tensor([0, 20, 0, 0])])
    assert metrics["entropy"].tolist() == pytest.approx([1, 0])
    assert metrics["cv"].tolist() == pytest.approx([0, 3**0.5])
    assert metrics["max_load"].tolist() == [1, 4]
    assert metrics["dead"].tolist() == [0, 0.75]


@pytest.mark.parametrize("norm", [True, False])
def test_logits_equal_qwen3_moe(norm):
    theirs = hugging_face(
        "Qwen3Moe",
        head_dim=16,
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        norm_topk_prob=norm,
        decoder_sparse_step=1,
        tie_word_embeddings=False,
        experts_implementation="eager",
    )
    ours = LanguageModel(
        ModelConfig(
            vocab_size=97,
            d_model=32,
            num_layers=3,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            rope_theta=20_000.0,
            tie_embeddings=False,
            ffn="e",
            moe={"num_experts": 6, "top_k": 2, "d_expert": 24, "route_norm": norm},
        )
    ).double()
    copy_decoder(theirs, ours)
    with torch.no_grad():
        for block, layer in zip(ours.blocks, theirs.model.layers, strict=True):
            block.ffn.router.weight.copy_(layer.mlp.gate.weight)
            block.ffn.w13.weight.copy_(layer.mlp.experts.gate_up_proj)
            block.ffn.w2.weight.copy_(layer.mlp.experts.down_proj)
        tokens = torch.randint(0, 97, (2, 40))
        torch.testing.assert_close(ours.eval()(tokens), theirs(tokens).logits, atol=5e-5, rtol=0)
