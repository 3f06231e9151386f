"""The planner: parameters equal to the model's, operations to torch's counter, caches to the bytes of a state."""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lmcore.model.config import ModelConfig
from lmcore.model.model import LanguageModel
from lmcore.model.plan import Device, cache_bytes, known_device, known_device_names, measure_peak, plan_model
from lmcore.model.resonance import _powers, fft_size

BASE = {
    "vocab_size": 250,
    "d_model": 64,
    "num_heads": 4,
    "num_kv_heads": 2,
    "num_layers": 4,
    "context_length": 128,
    "d_ff": 96,
    "window": 32,
    "moe": {"num_experts": 8, "d_expert": 32},
    "mamba": {"d_state": 16, "head_dim": 16, "chunk_size": 32, "num_experts": 4},
    "resonance": {"num_resonators": 8},
}
CASES = {
    "attention": {},
    "full heads": {"num_kv_heads": 4},
    "wide heads": {"head_dim": 32},
    "headwise gate": {"gate": "headwise"},
    "elementwise gate": {"gate": "elementwise"},
    "no qk-norm": {"qk_norm": False},
    "untied": {"tie_embeddings": False},
    "window": {"pattern": "AW"},
    "wide window": {"pattern": "W", "window": 500},
    "no feed-forward": {"pattern": "AM", "ffn": "d-"},
    "mamba": {"pattern": "M"},
    "mamba groups": {"pattern": "M", "mamba": {**BASE["mamba"], "num_groups": 2, "expand": 4}},
    "ragged chunks": {"pattern": "M", "context_length": 100},
    "routed mamba": {"pattern": "R"},
    "routed mamba top-2": {"pattern": "R", "mamba": {**BASE["mamba"], "top_k": 2}},
    "resonance": {"pattern": "F"},
    "experts": {"ffn": "e"},
    "shared expert": {"ffn": "e", "moe": {**BASE["moe"], "num_shared": 2, "top_k": 3}},
    "depth": {"depth": "-m"},
    "depth and experts": {"depth": "m", "ffn": "e", "mod": {"capacity": 0.3}},
    "two ahead": {"mtp": {"depths": 2}},
    "two ahead in parallel": {"mtp": {"depths": 2, "kind": "parallel"}},
    "everything": {"pattern": "AMRF", "ffn": "de", "depth": "-m", "mtp": {"depths": 1}, "gate": "headwise"},
}
MODELS = pytest.mark.parametrize("name", CASES)


def config_of(name):
    return ModelConfig(**{**BASE, **CASES[name]})


@MODELS
def test_parameters_equal_the_model(name):
    config = config_of(name)
    with torch.device("meta"):
        model = LanguageModel(config)
    plan = plan_model(config)
    assert plan.parameters == sum(p.numel() for p in model.parameters())
    inactive = sum(
        p.numel() // p.shape[0] * (p.shape[0] - (config.moe.top_k if "ffn" in n else config.mamba.top_k))
        for n, p in model.named_parameters()
        if p.ndim == 3
    )
    assert plan.active == plan.parameters - inactive
    assert plan.embedding == model.embedding.weight.numel()
    not_scaled = 0 if config.tie_embeddings else plan.embedding
    assert plan.scaling_parameters == plan.parameters - not_scaled


def counted(config, length):
    """Operations that FlopCounterMode sees in a training forward pass of one row."""
    torch.manual_seed(0)
    model = LanguageModel(config).double().train()  # float64: experts by a loop of matrix products, which it can see
    tokens = torch.randint(0, config.vocab_size, (1, length))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model.loss(tokens, tokens)
    return counter.get_total_flops()


def unseen(config, length):
    """What the formulas have and the counter has not, minus the reverse: per row, by kind of layer.

    The counter sees the full square of attention scores instead of the causal half, no convolution that is written as
    sums, no FFT; it sees the kernel of a resonance layer, which a batch shares.
    """
    heads = config.num_heads * config.head_dim

    def of(mixer, t):
        if mixer == "A" or (mixer == "W" and config.window >= t):
            return 4 * t * t * heads - 2 * t * (t + 1) * heads
        if mixer == "W":
            w, blocks = config.window, math.ceil(t / config.window)
            seen = sum(min(i, w) for i in range(1, t + 1))
            return 4 * heads * (w * w + (blocks - 1) * w * 2 * w) - 4 * heads * seen
        if mixer in "MR":
            channels = config.mamba_inner + 2 * config.mamba.num_groups * config.mamba.d_state
            return -2 * config.mamba.conv_width * channels * t
        points = fft_size(2 * t - 1)
        r = config.resonance
        high, low = _powers(torch.ones(1, 1), torch.ones(1, 1), t)
        kernel = 2 * r.num_kernels * high.shape[1] * low.shape[1] * 2 * r.num_resonators
        transforms = config.d_model * (5 * points * math.log2(points) + 3 * points)
        return kernel - transforms - 2 * config.d_model * r.conv_width * t

    total = 0
    for kind in config.layers:
        total += of(kind.mixer, math.ceil(config.mod.capacity * length) if kind.depth == "m" else length)
    for depth in range(1, config.mtp.depths + 1):
        total += of(config.mtp_layer.mixer, length - depth if config.mtp.kind == "sequential" else length)
    return total


@MODELS
def test_operations_equal_the_counter(name):
    config = config_of(name)
    length = config.context_length
    plan = plan_model(config)
    want = plan.train_flops / 3 * length + unseen(config, length)
    assert counted(config, length) == pytest.approx(want, rel=1e-9)


def test_backward_costs_twice_the_forward():
    config = config_of("attention")
    model = LanguageModel(config)
    tokens = torch.randint(0, 250, (1, 128))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss = model.loss(tokens, tokens).objective()
        forward = counter.get_total_flops()
        loss.backward()
    # Exactly twice: there is no gradient of the token ids, but the embedding lookup is no product either.
    assert counter.get_total_flops() == 3 * forward


def test_palm_style_is_six_per_matrix_parameter_plus_attention():
    config = ModelConfig(vocab_size=50257, d_model=768, num_layers=12, num_heads=12, context_length=1024, d_ff=3072)
    plan = plan_model(config)
    matrices = plan.parameters - sum(p.parameters for p in plan.parts if p.name == "norms") - 12 * 2 * 64
    assert plan.palm_flops == 6 * matrices + 12 * 12 * 768 * 1024
    assert plan.palm_flops > plan.train_flops  # no causal discount
    assert plan_model(config, length=2048).parameters == plan.parameters


def test_training_only_heads_cost_nothing_in_evaluation():
    with_heads, without = plan_model(config_of("two ahead")), plan_model(config_of("attention"))
    assert with_heads.forward_flops == without.forward_flops
    assert with_heads.train_flops > 1.4 * without.train_flops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [50, 300])
@MODELS
def test_caches_are_exact(name, length, dtype):
    config = config_of(name)
    state = LanguageModel(config).init_state(1, length, dtype=dtype)
    held = 0
    for layer in state.layers:
        for value in vars(layer).values():
            held += value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0
    assert cache_bytes(config, length, dtype.itemsize) == held


# ------------------------------------------------------------------------------------ devices


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA B200", 2250),
        ("NVIDIA GeForce RTX 4090", 165),
        ("h200", 989),
    ],
)
def test_peaks_of_known_devices(name, teraflops):
    device = known_device(name)
    assert isinstance(device, Device)
    assert device.peak_flops == teraflops * 1e12


@pytest.mark.parametrize("name", ["NVIDIA L400", "Tesla V100", "", "cpu", "NVIDIA GeForce RTX 4090D"])
def test_an_unknown_device_is_not_guessed(name):
    assert known_device(name) is None


def test_every_listed_name_finds_itself():
    for name in known_device_names():
        found = known_device(name)
        assert found is not None
        assert found.name == name


def test_measured_peak_is_plausible():
    peak = measure_peak(torch.device("cpu"), torch.float32, seconds=0.05)
    assert 1e9 < peak < 1e14
