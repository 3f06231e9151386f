"""ModelConfig: what it derives, what it refuses."""

from __future__ import annotations

import pytest

from lmcore.config import build
from lmcore.errors import LmError
from lmcore.model.config import LayerKind, ModelConfig


def make(**changes):
    return build(ModelConfig, {"vocab_size": 97, "d_model": 64, "num_layers": 4, "num_heads": 4, **changes})


def test_zeros_and_auto_become_numbers_and_a_saved_config_is_complete():
    config = make(d_model=768, num_heads=12, rope_theta="auto", vocab_size=50257)
    assert (config.d_ff, config.head_dim, config.num_kv_heads) == (2048, 64, 12)
    assert config.padded_vocab == 50304
    assert config.rope_theta == 41_000.0
    assert config.moe.d_expert == 1024
    assert config.moe.route_norm is True
    assert build(ModelConfig, config.model_dump(mode="json")) == config


def test_patterns_are_tiled():
    config = make(pattern="AAM", ffn="de", depth="-m", mamba={"head_dim": 16})
    assert config.layers == (
        LayerKind("A", "d", "-"),
        LayerKind("A", "e", "m"),
        LayerKind("M", "d", "-"),
        LayerKind("A", "e", "m"),
    )
    assert config.mtp_layer == LayerKind("A", "e", "-")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"d_model": 63}, "d_model 63 is not a multiple of num_heads 4"),
        ({"num_kv_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"d_model": 12}, "head_dim 3 is odd"),
        ({"pattern": "AX"}, "pattern 'AX' may hold the letters A, W, M, R, F only"),
        ({"pattern": "AAAAA"}, "has 5 letters for 4 layers"),
        ({"pattern": "W"}, "needs window"),
        ({"pattern": "M", "mamba": {"head_dim": 48}}, "not a multiple of mamba.head_dim 48"),
        ({"pattern": "F", "resonance": {"num_kernels": 5}}, "not a multiple of resonance.num_kernels 5"),
        ({"ffn": "e", "moe": {"top_k": 9}}, "moe.top_k 9 exceeds moe.num_experts 8"),
        ({"ffn": "e", "moe": {"top_k": 1, "route_norm": True}}, "gives the router no gradient"),
        ({"pattern": "R", "mamba": {"top_k": 9, "head_dim": 16}}, "mamba.top_k 9 exceeds"),
        ({"n_layer": 3}, "n_layer is not a setting"),
        ({"moe": {"num_expert": 3}}, "Did you mean moe.num_experts?"),
    ],
)
def test_what_cannot_be_built_is_refused_with_its_numbers(changes, sentence):
    with pytest.raises(LmError) as caught:
        make(**changes)
    assert sentence in caught.value.message
