"""The decoder: oracles from outside, what is never trained, what is declared."""

from __future__ import annotations

import math

import pytest
import torch
import transformers

from lmcore.errors import LmError
from lmcore.model.config import ModelConfig
from lmcore.model.model import LanguageModel
from lmcore.model.parameters import Role

SMALL = {
    "vocab_size": 97,
    "d_model": 32,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "d_ff": 48,
    "context_length": 64,
}


def small(**changes):
    return LanguageModel(ModelConfig(**{**SMALL, **changes}))


# ---------------------------------------------------------------------------------------- oracles


def copy_decoder(theirs, ours):
    """Load the weights of a transformers decoder of the Llama family into ours."""
    with torch.no_grad():
        ours.embedding.weight[:97] = theirs.model.embed_tokens.weight
        if ours.head is not None:
            ours.head.weight[:97] = theirs.lm_head.weight
        ours.norm.weight.copy_(theirs.model.norm.weight)
        for block, layer in zip(ours.blocks, theirs.model.layers, strict=True):
            attention = layer.self_attn
            block.mixer_norm.weight.copy_(layer.input_layernorm.weight)
            block.ffn_norm.weight.copy_(layer.post_attention_layernorm.weight)
            block.mixer.qkv.weight.copy_(
                torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
            )
            block.mixer.out.weight.copy_(attention.o_proj.weight)
            if block.mixer.q_norm is not None:
                block.mixer.q_norm.weight.copy_(attention.q_norm.weight)
                block.mixer.k_norm.weight.copy_(attention.k_norm.weight)
            if hasattr(layer.mlp, "gate_proj"):
                block.ffn.w13.weight.copy_(torch.cat([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight]))
                block.ffn.w2.weight.copy_(layer.mlp.down_proj.weight)


def randomise(model):
    """Weights large enough that a mistake cannot hide, norms away from one."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (1.0 if parameter.ndim == 1 else 0.0))


def hugging_face(kind, **extra):
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 20_000.0},
        attn_implementation="eager",
        **extra,
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config).double().eval()
    randomise(model)
    return model


@pytest.mark.parametrize(
    ("kind", "extra", "changes"),
    [
        ("Llama", {"tie_word_embeddings": False}, {"qk_norm": False, "tie_embeddings": False}),
        ("Qwen3", {"tie_word_embeddings": True, "head_dim": 16}, {"head_dim": 16}),
    ],
)
def test_logits_equal_transformers(kind, extra, changes):
    theirs = hugging_face(kind, **extra)
    ours = small(rope_theta=20_000.0, **changes).double()
    copy_decoder(theirs, ours)
    tokens = torch.randint(0, 97, (2, 50))
    with torch.no_grad():
        expected = theirs(tokens).logits
        torch.testing.assert_close(ours(tokens), expected, atol=5e-5, rtol=0)  # their norms and rotations are fp32
        state, parts = ours.init_state(2, 50), []
        for chunk in tokens.split([20, 1, 29], 1):
            parts.append(ours(chunk, state=state))
        torch.testing.assert_close(torch.cat(parts, 1), expected, atol=5e-5, rtol=0)


def test_whole_gradient_is_the_numerical_one():
    model = small(num_layers=1, d_model=8, num_heads=2, num_kv_heads=1, d_ff=8, gate="elementwise").double()
    randomise(model)
    tokens = torch.randint(0, 97, (1, 6))
    names, values = zip(*((n, p.detach().clone()) for n, p in model.named_parameters() if p.numel() < 300), strict=True)

    def loss(*parameters):
        out = torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (tokens,))
        return out.square().sum() / 100

    inputs = tuple(value.requires_grad_() for value in values)
    assert torch.autograd.gradcheck(loss, inputs, atol=1e-6, fast_mode=True)


# ---------------------------------------------------------------------------------------- loss and vocabulary


def test_a_new_model_knows_nothing_yet():
    model = small(d_model=128, vocab_size=1000)
    tokens = torch.randint(0, 1000, (2, 33))
    assert model.loss(tokens[:, :-1], tokens[:, 1:]).objective().item() == pytest.approx(math.log(1000), abs=0.1)
    assert model.term_counts(2, 32) == {"main": 64}


@pytest.mark.parametrize("tie", [True, False])
def test_padding_of_the_vocabulary_is_never_trained_nor_predicted(tie):
    model = small(tie_embeddings=tie)
    assert model.embedding.weight.shape[0] == 128
    tokens = torch.randint(0, 97, (2, 20))
    assert model(tokens).shape == (2, 20, 97)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model.loss(tokens[:, :-1], tokens[:, 1:]).objective().backward()
        optimizer.step()
    assert model.embedding.weight[97:].abs().max() == 0
    if not tie:
        assert model.head.weight.grad[97:].abs().max() == 0


def test_ignored_targets_do_not_count():
    model = small().double()
    tokens = torch.randint(0, 97, (2, 21))
    targets = tokens[:, 1:].clone()
    targets[0] = -100
    term, alone = model.loss(tokens[:, :-1], targets).main, model.loss(tokens[1:, :-1], tokens[1:, 1:]).main
    assert term.count == alone.count == 20
    assert abs(term.sum - alone.sum) < 1e-10


# ---------------------------------------------------------------------------------------- precision


def test_compute_dtype_runs_the_trunk_in_bf16_on_fp32_weights():
    model = small(d_model=64, num_heads=4)
    tokens = torch.randint(0, 97, (2, 40))
    exact = model(tokens)
    model.compute_dtype = torch.bfloat16
    assert model.trunk(tokens).dtype == torch.bfloat16
    rounded = model(tokens)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 0.05
    state = model.init_state(2, 40)
    steps = torch.cat([model(tokens[:, t : t + 1], state=state) for t in range(40)], 1)
    assert (steps - rounded).abs().max() < 0.02
    model.loss(tokens, tokens).objective().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


# ---------------------------------------------------------------------------------------- construction


def test_a_seed_gives_the_same_weights_and_residual_outputs_are_smaller():
    one, two = small(), small()
    two.init_weights(1)
    assert not torch.equal(one.blocks[0].mixer.qkv.weight, two.blocks[0].mixer.qkv.weight)
    two.init_weights(0)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    wide = small(d_model=256, num_heads=4)
    assert wide.blocks[0].mixer.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert wide.blocks[0].mixer.out.weight.std().item() == pytest.approx(0.02 / 6**0.5, rel=0.05)


def test_meta_models_are_counted_without_memory():
    with torch.device("meta"):
        model = LanguageModel(ModelConfig(vocab_size=50257, d_model=8192, num_layers=80, num_heads=64))
    assert sum(p.numel() for p in model.parameters()) > 5e10
    with pytest.raises(LmError, match="meta device"):
        model.init_weights(0)


def test_every_parameter_has_a_declared_role():
    table = {info.name: info for info in small(gate="headwise", tie_embeddings=False).parameter_table()}
    assert table["embedding.weight"].role == Role.EMBEDDING
    assert table["head.weight"].role == Role.HEAD
    assert table["blocks.1.mixer.qkv.weight"].splits == (32, 16, 16, 4)
    assert table["blocks.1.ffn.w13.weight"].splits == (48, 48)
    assert table["blocks.1.mixer.out.weight"].splits == ()
    assert table["norm.weight"].role == Role.NORM
    assert not table["norm.weight"].decay
    assert small().parameter_table()[0].role == Role.TIED


def test_a_vocabulary_is_needed():
    with pytest.raises(LmError, match="vocab_size"):
        LanguageModel(ModelConfig(vocab_size=0))


# ---------------------------------------------------------------------------------------- dropout, recomputation


def test_dropout_follows_the_default_generator_and_stops_in_eval():
    model = small(dropout=0.5)
    tokens = torch.randint(0, 97, (2, 20))
    torch.manual_seed(3)
    first = model(tokens)
    torch.manual_seed(3)
    assert torch.equal(first, model(tokens))
    assert not torch.equal(first, model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize("every", [1, 2])
def test_recomputed_blocks_give_the_same_gradients(every):
    model = small(dropout=0.2)
    tokens = torch.randint(0, 97, (2, 21))
    gradients = []
    for k in (0, every):
        model.checkpoint_every = k
        model.zero_grad()
        torch.manual_seed(5)
        model.loss(tokens[:, :-1], tokens[:, 1:]).objective().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# ---------------------------------------------------------------------------------------- state


def test_a_full_state_is_refused_with_its_size():
    model = small()
    state = model.init_state(1, 8)
    model(torch.zeros(1, 8, dtype=torch.long), state=state)
    with pytest.raises(LmError, match="room for 8 tokens; 9 are needed"):
        model(torch.zeros(1, 1, dtype=torch.long), state=state)


def test_the_training_path_compiles_without_graph_breaks():
    model = small(gate="elementwise")
    model.compute_dtype = torch.bfloat16

    def step(inputs, targets):
        term = model.loss(inputs, targets).main
        return term.sum, term.count

    tokens = torch.randint(0, 97, (2, 21))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    total, count = compiled(tokens[:, :-1], tokens[:, 1:])
    assert count == 40
    assert abs(total - step(tokens[:, :-1], tokens[:, 1:])[0]) < 0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"ffn": "e"},
        {"depth": "m"},
        {"pattern": "M"},
        {"pattern": "R"},
        {"pattern": "F"},
        {"pattern": "W", "window": 8},
        {"mtp": {"depths": 2}},
    ],
)
def test_every_mechanism_compiles_without_graph_breaks(changes):
    torch.compiler.reset()
    model = small(num_layers=1, mamba={"head_dim": 16, "d_state": 8, "chunk_size": 16}, **changes)
    model.compute_dtype = torch.bfloat16
    tokens = torch.randint(0, 97, (2, 33))
    inputs, targets, counts = tokens[:, :-1], tokens[:, 1:], model.term_counts(2, 32)

    def step(inputs, targets):
        return model.loss(inputs, targets).objective(counts)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=False)
    loss = compiled(inputs, targets)
    loss.backward()
    assert abs(loss - step(inputs, targets)) < 1e-3
