"""Memory of a pass on fake tensors: laws that need no measuring; measured peaks are in tests/training."""

import pytest
import torch

from lmcore.model.config import ModelConfig
from lmcore.model.memory import trace_pass

CONFIG = ModelConfig(vocab_size=512, d_model=128, num_heads=4, num_layers=4, context_length=256)


def with_(**changes):
    return ModelConfig(**(CONFIG.model_dump() | changes))


def test_memory_is_linear_in_the_rows():
    one, two, four = (trace_pass(CONFIG, rows=rows) for rows in (1, 2, 4))
    assert four.kept - two.kept == pytest.approx(2 * (two.kept - one.kept), rel=0.01)
    assert one.peak > one.kept > 0


def test_what_attention_and_a_dense_layer_keep_is_what_their_equations_need():
    """Per token and layer in fp32, by hand: inputs of the products and norms, outputs of attention and SiLU:
    x twice, normed twice, qkv 3d, rotated 2d, out d, w13 2f, silu f, product f and more: between 15 and 35 d."""
    deeper = with_(num_layers=8)
    per_layer = (trace_pass(deeper, rows=1).kept - trace_pass(CONFIG, rows=1).kept) / 4
    assert 15 < per_layer / (256 * 128 * 4) < 35


def test_computing_in_16_bits_keeps_less_and_recomputing_keeps_little():
    wide = trace_pass(CONFIG, rows=4)
    narrow = trace_pass(CONFIG, rows=4, dtype=torch.bfloat16)
    assert 0.4 < narrow.kept / wide.kept < 0.9
    every, second = (trace_pass(CONFIG, rows=4, checkpoint_every=n) for n in (1, 2))
    assert every.kept < 0.2 * wide.kept
    assert every.kept < second.kept < wide.kept
    assert every.peak < 0.5 * wide.peak


@pytest.mark.parametrize(
    "changes",
    [
        {"pattern": "AW", "window": 64},
        {"pattern": "MRF"},
        {"ffn": "de", "moe": {"num_experts": 4}},
        {"ffn": "e", "moe": {"num_experts": 4, "d_expert": 30}},  # a size that runs in a loop
        {"depth": "-m"},
        {"mtp": {"depths": 2}},
        {"tie_embeddings": False, "gate": "headwise"},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_mechanism_can_be_examined(changes, dtype):
    config = with_(**{"pattern": "A", **changes, "num_layers": 4})
    found = trace_pass(config, rows=2, dtype=dtype)
    assert 0 < found.kept <= found.peak < 1 << 30


def test_experts_need_what_a_dense_layer_of_their_work_needs_and_their_weights_gradient():
    dense, experts = (
        trace_pass(with_(ffn=ffn, d_ff=256, moe={"num_experts": 4, "top_k": 2, "d_expert": 128}), rows=8)
        for ffn in ("d", "e")
    )
    assert 1.0 < experts.kept / dense.kept < 1.7  # besides, each token's input is there twice, sorted by expert


def test_a_large_model_is_examined_without_its_memory():
    config = ModelConfig(vocab_size=50257, d_model=4096, num_heads=32, num_layers=4, context_length=2048)
    found = trace_pass(config, rows=8, dtype=torch.bfloat16, device_type="cuda")
    assert found.peak > 4 << 30  # more than this test could hold


def test_the_loss_goes_by_the_limits_of_the_device():
    config = with_(vocab_size=50257)
    assert trace_pass(config, rows=8, device_type="cuda").peak > trace_pass(config, rows=8, device_type="cpu").peak
