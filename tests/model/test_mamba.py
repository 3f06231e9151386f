"""Mamba-2: chunks equal the recurrence, routed with one expert equals plain, and transformers agrees."""

from __future__ import annotations

import contextlib
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from test_model import randomise

from lmcore.errors import LmError
from lmcore.model.config import ModelConfig
from lmcore.model.mamba import PACKAGES, Mamba, chunked_scan, kernel_scan, step
from lmcore.model.model import LanguageModel
from lmcore.model.rotary import Positions


def scan_problem(dtype=torch.float64, steps=203, groups=2):
    torch.manual_seed(0)
    x = torch.randn(2, steps, 4, 8, dtype=dtype)
    a = -F.softplus(torch.randn(2, steps, 4, dtype=dtype))
    b, c = (torch.randn(2, steps, groups, 16, dtype=dtype) for _ in range(2))
    return x, a, b, c, torch.randn(2, 4, 8, 16, dtype=dtype)


def recurrence(x, a, b, c, h):
    """The definition, one step at a time."""
    b, c = (t.repeat_interleave(x.shape[2] // t.shape[2], 2) for t in (b, c))
    ys = []
    for t in range(x.shape[1]):
        h = a[:, t].exp()[..., None, None] * h + x[:, t, :, :, None] * b[:, t, :, None]
        ys.append((h * c[:, t, :, None]).sum(-1))
    return torch.stack(ys, 1), h


@pytest.mark.parametrize("chunk", [1, 16, 64, 256])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_chunks_equal_the_recurrence_from_any_state(chunk, groups):
    problem = scan_problem(groups=groups)
    y, h = chunked_scan(*problem[:4], chunk, problem[4])
    expected, last = recurrence(*problem)
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(h, last, atol=1e-12, rtol=0)
    middle = chunked_scan(*(t[:, :77] for t in problem[:4]), chunk, problem[4])[1]
    end = chunked_scan(*(t[:, 77:] for t in problem[:4]), chunk, middle)[1]
    torch.testing.assert_close(end, last, atol=1e-12, rtol=0)
    one = step(*(t[:, :1] for t in problem[:4]), problem[4])
    torch.testing.assert_close(one[0], expected[:, :1], atol=1e-12, rtol=0)


def test_gradients_equal_those_of_the_recurrence():
    problem = scan_problem(steps=37)
    gradients = []
    for function in (lambda *p: chunked_scan(*p[:4], 16, p[4]), recurrence):
        inputs = [t.clone().requires_grad_() for t in problem]
        y, h = function(*inputs)
        (y.square().sum() + h.sum()).backward()
        gradients.append([t.grad for t in inputs])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)


def test_gradients_equal_finite_differences():
    torch.manual_seed(0)
    x = torch.randn(1, 7, 2, 2, dtype=torch.float64)
    a = -F.softplus(torch.randn(1, 7, 2, dtype=torch.float64))
    b, c = (torch.randn(1, 7, 1, 3, dtype=torch.float64) for _ in range(2))
    inputs = [t.requires_grad_() for t in (x, a, b, c, torch.randn(1, 2, 2, 3, dtype=torch.float64))]
    assert torch.autograd.gradcheck(lambda *p: chunked_scan(*p[:4], 3, p[4]), inputs)


def test_fp32_stays_close_and_strong_decay_has_finite_gradients():
    problem = scan_problem()
    y, _ = chunked_scan(*(t.float() for t in problem[:4]), 64, problem[4].float())
    torch.testing.assert_close(y.double(), recurrence(*problem)[0], atol=1e-4, rtol=1e-4)
    x, _, b, c, _ = scan_problem(steps=256)
    a = torch.full((2, 256, 4), -50.0, dtype=torch.float64, requires_grad=True)
    chunked_scan(x, a, b, c, 256)[0].sum().backward()
    assert torch.isfinite(a.grad).all()


def small(**changes):
    options = {"d_state": 8, "head_dim": 8, "chunk_size": 8, "num_experts": 1, **changes}
    return ModelConfig(vocab_size=97, d_model=32, num_layers=3, num_heads=4, pattern="M", ffn="-", mamba=options)


def where(steps):
    return Positions.make(torch.arange(steps)[None], head_dim=8, theta=1e4, dtype=torch.float64, ragged=False)


@pytest.mark.parametrize("options", [{}, {"num_groups": 2}, {"expand": 1}, {"chunk_size": 1, "conv_width": 2}])
def test_routed_with_one_expert_is_plain(options):
    plain, routed = Mamba(small(**options)).double(), Mamba(small(**options), routed=True).double()
    randomise(plain)
    with torch.no_grad():
        inner = plain.inner
        for name, parameter in plain.named_parameters():
            if name in dict(routed.named_parameters()) and name != "in_proj.weight":
                routed.get_parameter(name).copy_(parameter)
        routed.expert_in.weight.copy_(plain.in_proj.weight[None, : 2 * inner])
        routed.in_proj.weight.copy_(plain.in_proj.weight[2 * inner :])
        routed.expert_out.weight.copy_(plain.out.weight[None])
        routed.router.weight.normal_()
    x = torch.randn(2, 21, 32, dtype=torch.float64)
    torch.testing.assert_close(routed(x, where(21))[0], plain(x, where(21))[0], atol=1e-13, rtol=0)


def test_initial_memories_are_between_ten_and_a_thousand_steps():
    mixer = Mamba(ModelConfig(vocab_size=9, d_model=512, num_layers=1, num_heads=8, pattern="M"))
    mixer.reset(torch.Generator().manual_seed(0), 0.02)
    mixer.conv.reset(torch.Generator().manual_seed(0), 0.02)
    dt = F.softplus(mixer.dt_bias)
    assert 1e-3 * 0.99 <= dt.min() <= dt.max() <= 1e-1 * 1.01
    assert 1 <= mixer.A_log.exp().min() <= mixer.A_log.exp().max() <= 16


@pytest.mark.parametrize("kernels", ["mamba-ssm", "fla"])
def test_missing_kernels_are_a_sentence(kernels, monkeypatch):
    package = {"mamba-ssm": "mamba_ssm", "fla": "fla"}[kernels]
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    x, a, b, c, _ = scan_problem(torch.float32, steps=4)
    with pytest.raises(LmError, match=f"kernels is {kernels}, but {package}.* cannot be imported") as caught:
        kernel_scan(kernels, x, -a, -torch.ones(4), b, c, 64, None)
    assert "model.mamba.kernels=torch" in caught.value.hint


def mamba_chunk_scan_combined(
    x,
    dt,
    A,
    B,
    C,
    chunk_size,
    D=None,
    z=None,
    dt_bias=None,
    initial_states=None,
    seq_idx=None,
    cu_seqlens=None,
    dt_softplus=False,
    dt_limit=(0.0, float("inf")),
    return_final_states=False,
):
    """The contract of mamba-ssm 2: x (B, T, H, P), dt (B, T, H), A (H,), B, C (B, T, G, N), states (B, H, P, N)."""
    assert chunk_size >= 16
    assert chunk_size & (chunk_size - 1) == 0
    assert A.shape == (x.shape[2],)
    assert return_final_states
    state = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[3]) if initial_states is None else initial_states
    return recurrence(x * dt[..., None], dt * A, B, C, state)


def chunk_simple_gla(q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False):
    """The contract of fla 0.6: q and k (B, T, H, K), v (B, T, H, V), g (B, T, H), states (B, H, K, V)."""
    assert q.shape == k.shape
    assert output_final_state
    size, heads = k.shape[3], k.shape[2]
    assert heads == v.shape[2]
    state = v.new_zeros(v.shape[0], heads, size, v.shape[3]) if initial_state is None else initial_state
    assert state.shape == (v.shape[0], heads, size, v.shape[3])
    ys = []
    for t in range(q.shape[1]):
        state = g[:, t].exp()[..., None, None] * state + k[:, t, :, :, None] * v[:, t, :, None]
        ys.append((size**-0.5 if scale is None else scale) * (q[:, t, :, :, None] * state).sum(2))
    return torch.stack(ys, 1), state


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("function", [mamba_chunk_scan_combined, chunk_simple_gla])
def test_kernels_are_called_as_their_packages_document(function, started, monkeypatch):
    """Stand-ins written from the signatures of the packages: layouts, scale and states must fit ours."""
    kernels, module = {v[1]: (k, v[0]) for k, v in PACKAGES.items()}[function.__name__]
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{function.__name__: function}))
    x, a, b, c, h = scan_problem(steps=21)
    dt, rate, h = -a, -torch.rand(4, dtype=torch.float64), h if started else None
    expected = chunked_scan(x * dt[..., None], dt * rate, b, c, 8, h)
    for ours, theirs in zip(kernel_scan(kernels, x, dt, rate, b, c, 50, h), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


@contextlib.contextmanager
def the_package_may_refuse():
    """fla refuses versions of Triton whose code it knows to be wrong on the GPU at hand."""
    try:
        yield
    except RuntimeError as error:
        if "incorrect results" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device and the package of the kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kernels", ["mamba-ssm", "fla"])
def test_kernels_equal_the_scan_in_torch(kernels, groups, dtype):
    pytest.importorskip(PACKAGES[kernels][0])
    torch.manual_seed(0)
    x, b, c = (torch.randn(2, 300, n, 64, device="cuda", dtype=dtype) * 0.3 for n in (4, groups, groups))
    dt, a = torch.rand(2, 300, 4, device="cuda") * 0.1, -torch.rand(4, device="cuda") * 16
    inputs = [t.requires_grad_() for t in (x, dt, b, c)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    y, last = kernel_scan(kernels, inputs[0], inputs[1], a, *inputs[2:], 64, None)
    truth, end = chunked_scan(exact[0] * exact[1][..., None], exact[1] * a.double(), *exact[2:], 64)
    gate = {"atol": 2e-2, "rtol": 2e-2} if dtype == torch.bfloat16 else {"atol": 2e-3, "rtol": 2e-3}
    torch.testing.assert_close(y.double(), truth, **gate)
    torch.testing.assert_close(last.double(), end, **gate)
    more = kernel_scan(
        kernels, *(t.detach() for t in inputs[:2]), a, *(t.detach() for t in inputs[2:]), 64, last.detach()
    )
    again = chunked_scan(exact[0] * exact[1][..., None], exact[1] * a.double(), *exact[2:], 64, end)
    torch.testing.assert_close(more[0].double(), again[0], **gate)
    with the_package_may_refuse():
        y.float().square().sum().backward()
    truth.square().sum().backward()
    for ours, theirs in zip(inputs, exact, strict=True):
        scale = theirs.grad.abs().max()
        assert (ours.grad.double() - theirs.grad).abs().max() < 5 * gate["atol"] * scale


@pytest.mark.parametrize("groups", [1, 2])
def test_logits_equal_transformers(groups):
    config = transformers.Mamba2Config(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=3,
        expand=2,
        head_dim=8,
        num_heads=8,
        n_groups=groups,
        state_size=8,
        conv_kernel=4,
        chunk_size=8,
        use_bias=False,
        use_conv_bias=True,
        layer_norm_epsilon=1e-5,
        residual_in_fp32=False,
        tie_word_embeddings=False,
    )
    theirs = transformers.Mamba2ForCausalLM(config).double().eval()
    randomise(theirs)
    ours = LanguageModel(small(num_groups=groups).model_copy(update={"tie_embeddings": False})).double()
    with torch.no_grad():
        ours.embedding.weight[:97] = theirs.backbone.embeddings.weight
        ours.head.weight[:97] = theirs.lm_head.weight
        ours.norm.weight.copy_(theirs.backbone.norm_f.weight)
        for block, layer in zip(ours.blocks, theirs.backbone.layers, strict=True):
            block.mixer_norm.weight.copy_(layer.norm.weight)
            mixer, other = block.mixer, layer.mixer
            mixer.in_proj.weight.copy_(other.in_proj.weight)
            mixer.out.weight.copy_(other.out_proj.weight)
            mixer.conv.weight.copy_(other.conv1d.weight[:, 0])
            mixer.conv.bias.copy_(other.conv1d.bias)
            mixer.norm.weight.copy_(other.norm.weight)
            other.A_log.abs_()
            for name in ("A_log", "dt_bias", "D"):
                getattr(mixer, name).copy_(getattr(other, name))
        tokens = torch.randint(0, 97, (2, 40))
        expected = theirs(tokens).logits.double()
        torch.testing.assert_close(ours(tokens), expected, atol=1e-4, rtol=1e-4)  # their scan is fp32
        state = ours.init_state(2, 40)
        parts = [ours(chunk, state=state) for chunk in tokens.split([25, 1, 14], 1)]
        torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-4, rtol=1e-4)
