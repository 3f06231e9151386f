"""Attention: grouping, gates, windows, and where attention sinks."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from test_laws import make as make_model

from lmcore.model import attention
from lmcore.model.attention import Attention
from lmcore.model.config import ModelConfig
from lmcore.model.rotary import Positions


def make(window=0, **changes):
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=9, d_model=32, num_layers=1, num_heads=4, **{"num_kv_heads": 2, **changes})
    mixer = Attention(config, window=window).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.4)
    return mixer


def where(steps, **changes):
    options = {"head_dim": 8, "theta": 1e4, "dtype": torch.float64, "ragged": False, **changes}
    return Positions.make(torch.arange(steps)[None], **options)


def by_definition(mixer, x, window=None):
    """One query, one head at a time."""
    q, k, v, _ = mixer.project(x, where(x.shape[1]))
    out = torch.zeros_like(q)
    for b in range(x.shape[0]):
        for h in range(4):
            g = h // (4 // mixer.kv_heads)
            for m in range(x.shape[1]):
                first = 0 if window is None else max(0, m - window + 1)
                scores = k[b, g, first : m + 1] @ q[b, h, m] / math.sqrt(8)
                out[b, h, m] = scores.softmax(0) @ v[b, g, first : m + 1]
    return mixer.out(out.transpose(1, 2).flatten(-2))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_equals_the_definition(kv_heads):
    mixer = make(num_kv_heads=kv_heads)
    x = torch.randn(2, 11, 32, dtype=torch.float64)
    torch.testing.assert_close(mixer(x, where(11))[0], by_definition(mixer, x), atol=1e-13, rtol=0)


@pytest.mark.parametrize("window", [1, 3, 4, 11, 30])
def test_windows_equal_the_definition_in_blocks_and_in_a_ring(window, monkeypatch):
    monkeypatch.setattr(attention, "MARGIN", 3)
    mixer = make(window=window)
    x = torch.randn(2, 30, 32, dtype=torch.float64)
    expected = by_definition(mixer, x, window)
    torch.testing.assert_close(mixer(x, where(30))[0], expected, atol=1e-13, rtol=0)
    for cuts in ([0, 7, 8, 10, 30], list(range(31))):
        state, parts = mixer.init_state(2, 30, torch.float64, x.device), []
        assert state.slots == min(30, window + 3)
        for start, stop in itertools.pairwise(cuts):
            at = Positions.make(torch.arange(start, stop)[None], head_dim=8, theta=1e4, dtype=x.dtype, ragged=False)
            y, state, _ = mixer(x[:, start:stop], at, state)
            parts.append(y)
        torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-13, rtol=0)


def test_gates():
    elementwise, headwise, none = (make(gate=gate) for gate in ("elementwise", "headwise", "none"))
    rows = sum(none.sizes)
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    with torch.no_grad():
        for mixer in (headwise, none):
            mixer.qkv.weight[:rows] = elementwise.qkv.weight[:rows]
            for name in ("out", "q_norm", "k_norm"):
                getattr(mixer, name).load_state_dict(getattr(elementwise, name).state_dict())
        elementwise.qkv.weight[rows:] = headwise.qkv.weight[rows:].repeat_interleave(8, 0)
        torch.testing.assert_close(elementwise(x, where(9))[0], headwise(x, where(9))[0], atol=1e-13, rtol=0)
        elementwise.qkv.weight[rows:] = 0
        torch.testing.assert_close(elementwise(x, where(9))[0], 0.5 * none(x, where(9))[0], atol=1e-13, rtol=0)


def test_one_query_on_a_cpu_equals_the_fused_kernel():
    mixer = make()
    q, k, v = (torch.randn(3, heads, n, 8, dtype=torch.float64) for heads, n in ((4, 1), (2, 13), (2, 13)))
    mask = torch.rand(3, 1, 1, 13) > 0.3
    mask[..., 0] = True
    for chosen in (None, mask):
        torch.testing.assert_close(
            mixer._attend(q, k, v, chosen), mixer._sdpa(q, k, v, mask=chosen), atol=1e-13, rtol=0
        )


def test_sinks_of_uniform_and_of_concentrated_attention():
    model = make_model(pattern="AM", num_layers=2, qk_norm=False)
    tokens = torch.randint(0, 61, (2, 30))
    mixer = model.blocks[0].mixer
    with torch.no_grad():
        mixer.qkv.weight[:24] = 0  # all scores equal: a query at m gives 1 / (m + 1) to the first token
    sinks = model.attention_sinks(tokens)
    assert sinks.shape == (1,)
    assert sinks.item() == pytest.approx(sum(1 / (m + 1) for m in range(1, 30)) / 29, abs=1e-12)


@pytest.mark.parametrize("length", [100, 128, 300])
def test_blocks_of_products_equal_the_fused_kernel(length):
    """What a compiler for a CPU gets, here without one; in float64, with gradients."""
    mixer = Attention(ModelConfig(vocab_size=16, d_model=16, num_heads=2, num_layers=1, context_length=512))
    generator = torch.Generator().manual_seed(0)
    q, k, v, g = (torch.randn(2, 2, length, 8, generator=generator, dtype=torch.float64) for _ in range(4))
    found = []
    for form in (mixer._in_products, lambda q, k, v: mixer._sdpa(q, k, v, causal=True)):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        y = form(*inputs)
        found.append([y, *torch.autograd.grad(y, inputs, g)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
