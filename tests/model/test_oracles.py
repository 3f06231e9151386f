"""Mechanisms that other people built too: tiny random models of transformers against ours, logits by logits.

Llama and Qwen3 are in test_model.py, Qwen3-MoE in test_moe.py, Mamba-2 in test_mamba.py. Here: Mistral's sliding
window, the gated attention of Qwen3-Next, the sigmoid router with a selection bias and shared experts of GLM-4.5, and
the hybrid of Mamba-2, attention, experts and a shared expert of Granite-4. Theirs round norms and rotations to fp32.
"""

from __future__ import annotations

import pytest
import torch
from test_model import copy_decoder, hugging_face, small

GATE = {"atol": 1e-4, "rtol": 1e-4}


def assert_same(ours, theirs):
    """One pass and a split one."""
    ours.eval()
    tokens = torch.randint(0, 97, (2, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(tokens).logits.double()
        torch.testing.assert_close(ours(tokens), expected, **GATE)
        state = ours.init_state(2, 50)
        parts = [ours(chunk, state=state) for chunk in tokens.split([20, 1, 29], 1)]
        torch.testing.assert_close(torch.cat(parts, 1), expected, **GATE)


def test_sliding_window_of_mistral():
    theirs = hugging_face("Mistral", sliding_window=7, tie_word_embeddings=False)
    ours = small(pattern="W", window=7, qk_norm=False, rope_theta=20_000.0, tie_embeddings=False).double()
    copy_decoder(theirs, ours)
    assert_same(ours, theirs)
    unlike = small(pattern="W", window=8, qk_norm=False, rope_theta=20_000.0, tie_embeddings=False).double()
    copy_decoder(theirs, unlike)
    with pytest.raises(AssertionError):
        assert_same(unlike, theirs)


def test_gated_attention_of_qwen3_next():
    """Its query rows alternate with gate rows head by head, and its norms store the gain minus one."""
    theirs = hugging_face(
        "Qwen3Next",
        head_dim=16,
        layer_types=["full_attention"] * 3,
        mlp_only_layers=[0, 1, 2],
        partial_rotary_factor=1.0,
        tie_word_embeddings=False,
    )
    ours = small(head_dim=16, gate="elementwise", rope_theta=20_000.0, tie_embeddings=False).double()
    copy_decoder(theirs, ours)
    with torch.no_grad():
        for block, layer in zip(ours.blocks, theirs.model.layers, strict=True):
            attention = layer.self_attn
            query, gate = attention.q_proj.weight.view(4, 2, 16, 32).transpose(0, 1).flatten(1, 2)
            block.mixer.qkv.weight.copy_(torch.cat([query, attention.k_proj.weight, attention.v_proj.weight, gate]))
        for name, parameter in ours.named_parameters():
            if "norm" in name:
                parameter.add_(1)
    assert_same(ours, theirs)


def test_sigmoid_router_with_bias_and_shared_experts_of_glm():
    theirs = hugging_face(
        "Glm4Moe",
        head_dim=16,
        use_qk_norm=True,
        partial_rotary_factor=1.0,
        n_routed_experts=6,
        num_experts_per_tok=2,
        n_shared_experts=2,
        moe_intermediate_size=24,
        first_k_dense_replace=0,
        routed_scaling_factor=1.7,
        num_mtp_layers=0,
        tie_word_embeddings=False,
        experts_implementation="eager",
    )
    moe = {"num_experts": 6, "top_k": 2, "d_expert": 24, "num_shared": 2, "score": "sigmoid", "route_scale": 1.7}
    ours = small(head_dim=16, rope_theta=20_000.0, tie_embeddings=False, ffn="e", moe=moe).double()
    copy_decoder(theirs, ours)
    with torch.no_grad():
        for block, layer in zip(ours.blocks, theirs.model.layers, strict=True):
            layer.mlp.gate.e_score_correction_bias.copy_(torch.randn(6) * 0.3)
            copy_experts(block.ffn, layer.mlp.gate.weight, layer.mlp.experts)
            block.ffn.router.bias.copy_(layer.mlp.gate.e_score_correction_bias)
            shared = layer.mlp.shared_experts
            block.ffn.shared.w13.weight.copy_(torch.cat([shared.gate_proj.weight, shared.up_proj.weight]))
            block.ffn.shared.w2.weight.copy_(shared.down_proj.weight)
    assert_same(ours, theirs)


@pytest.mark.parametrize("experts", [0, 5])
def test_hybrid_of_granite(experts):
    """Mamba-2 and attention layers in turn; dense, or experts beside a shared one."""
    theirs = hugging_face(
        "GraniteMoeHybrid",
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        position_embedding_type="rope",
        attention_multiplier=8**-0.5,
        num_local_experts=experts,
        num_experts_per_tok=2,
        shared_intermediate_size=48,
        mamba_n_heads=8,
        mamba_n_groups=2,
        mamba_d_state=8,
        mamba_chunk_size=16,
        tie_word_embeddings=True,
        experts_implementation="eager",
    )
    moe = {"num_experts": max(experts, 2), "top_k": 2, "d_expert": 48, "num_shared": 1}
    ours = small(
        pattern="MA",
        qk_norm=False,
        rope_theta=20_000.0,
        ffn="e" if experts else "d",
        moe=moe,
        mamba={"d_state": 8, "head_dim": 8, "num_groups": 2, "chunk_size": 16},
    ).double()
    with torch.no_grad():
        ours.embedding.weight[:97] = theirs.model.embed_tokens.weight
        ours.norm.weight.copy_(theirs.model.norm.weight)
        for block, layer in zip(ours.blocks, theirs.model.layers, strict=True):
            block.mixer_norm.weight.copy_(layer.input_layernorm.weight)
            block.ffn_norm.weight.copy_(layer.post_attention_layernorm.weight)
            if layer.mamba is None:
                at = layer.self_attn
                block.mixer.qkv.weight.copy_(torch.cat([at.q_proj.weight, at.k_proj.weight, at.v_proj.weight]))
                block.mixer.out.weight.copy_(at.o_proj.weight)
            else:
                copy_mamba(block.mixer, layer.mamba)
            dense = block.ffn.shared if experts else block.ffn
            dense.w13.weight.copy_(layer.shared_mlp.input_linear.weight)
            dense.w2.weight.copy_(layer.shared_mlp.output_linear.weight)
            if experts:
                copy_experts(block.ffn, layer.block_sparse_moe.router.weight, layer.block_sparse_moe.experts)
    assert_same(ours, theirs)


def copy_experts(moe, router, experts):
    moe.router.weight.copy_(router)
    moe.w13.weight.copy_(experts.gate_up_proj)
    moe.w2.weight.copy_(experts.down_proj)


def copy_mamba(mixer, other):
    other.A_log.abs_()
    mixer.in_proj.weight.copy_(other.in_proj.weight)
    mixer.out.weight.copy_(other.out_proj.weight)
    mixer.conv.weight.copy_(other.conv1d.weight[:, 0])
    mixer.conv.bias.copy_(other.conv1d.bias)
    mixer.norm.weight.copy_(other.norm.weight)
    for name in ("A_log", "dt_bias", "D"):
        getattr(mixer, name).copy_(getattr(other, name))
