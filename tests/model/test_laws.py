"""The laws that every model obeys, whatever its configuration, in float64.

causality          no output before t changes when a token at t does
split law          any chunking with a carried state equals one pass; so does token-by-token decoding
batch invariance   a row's result does not depend on the rows beside it, nor on padding
rollback           a restored snapshot, or a kept prefix, equals never having read the rest
surgery            selected and joined rows continue as they would have alone
training           every parameter gets a gradient; the counts of all terms are known ahead

They are checked for every kind of layer, for random hybrids (hypothesis), and, in the slow suite, for the whole
product of options of a layer.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmcore.model import attention
from lmcore.model.config import DEPTHS, FEED_FORWARDS, MIXERS, ModelConfig
from lmcore.model.depth import DepthRouted
from lmcore.model.model import LanguageModel

GATE = 1e-12
VOCAB, ROWS, LENGTH = 61, 3, 24


@pytest.fixture(autouse=True)
def _small_ring():
    """Windows must wrap around within these short sequences."""
    before, attention.MARGIN = attention.MARGIN, 4
    yield
    attention.MARGIN = before


def make(**changes):
    """A small model whose weights are large enough that no mistake hides in tiny activations."""
    options = {
        "vocab_size": VOCAB,
        "d_model": 16,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "d_ff": 24,
        "context_length": LENGTH,
        "window": 5,
        "norm_eps": 1e-5,
        "mamba": {"d_state": 4, "head_dim": 8, "chunk_size": 7, "num_experts": 3},
        "resonance": {"num_resonators": 3},
        "moe": {"num_experts": 4, "d_expert": 8, "balance_weight": 0.01},
    }
    for key, value in changes.items():
        options[key] = {**options[key], **value} if isinstance(value, dict) and key in options else value
    model = LanguageModel(ModelConfig(**options)).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if "predictor" in name:
                parameter.copy_(noise)  # routes some tokens and skips others
            elif "norm" in name or name.endswith(".D"):
                parameter.copy_(1 + 0.3 * noise)
            elif parameter.ndim >= 2 and not name.endswith(("log_angle", "log_decay", "magnitude")):
                parameter.copy_(0.3 * noise)
        for router in model.routers:
            router.bias.copy_(0.05 * torch.randn(router.bias.shape, generator=generator, dtype=torch.float64))
    return model


def run(model, tokens, cuts, state=None):
    """Logits of `tokens` read in chunks that end at `cuts`."""
    state = state or model.init_state(tokens.shape[0], LENGTH + 8)
    parts, start = [], 0
    for stop in cuts:
        parts.append(model(tokens[:, start:stop], state=state))
        start = stop
    return torch.cat(parts, 1), state


@torch.no_grad()
def check_decoding(model):
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, VOCAB, (ROWS, LENGTH), generator=generator)
    full = model(tokens)

    def close(one, other):
        worst = (one - other).abs().max().item()
        assert worst <= GATE * max(1.0, full.abs().max().item()), worst

    # causality
    changed = tokens.clone()
    changed[:, 15:] = (changed[:, 15:] + 7) % VOCAB
    close(model(changed)[:, :15], full[:, :15])
    # split law, one prefill, token by token
    for cuts in ((9, 10, 12, 13, 21, LENGTH), (LENGTH,), range(1, LENGTH + 1)):
        close(run(model, tokens, cuts)[0], full)
    # batch invariance: alone, and in a padded batch whose rows then go on together
    close(model(tokens[1:2]), full[1:2])
    lengths = torch.tensor([11, 4, 7])
    index = torch.arange(11).expand(ROWS, -1)
    index = torch.where(index < lengths[:, None], index, -1)
    state = model.init_state(ROWS, LENGTH + 8)
    padded = model(tokens[:, :11], index, state)
    follow = torch.stack([tokens[row, n : n + 6] for row, n in enumerate(lengths)])
    first = model(follow[:, :3], state=state)
    index = torch.where(torch.tensor([[True], [False], [True]]), lengths[:, None] + 3, -1)  # row 1 waits for a step
    waited = model(follow[:, 3:4], index, state)
    for row, n in enumerate(lengths.tolist()):
        close(padded[row, :n], full[row, :n])
        close(first[row], full[row, n : n + 3])
        if row != 1:
            close(waited[row], full[row, n + 3 : n + 4])
    # surgery on a ragged state: rows 2 and 1, the latter joined from elsewhere
    alone = run(model, tokens[1:2], (7,))[1]
    joined = type(state).concatenate([state.select(torch.tensor([2])), alone])
    further = model(torch.stack([tokens[2, 11:14], tokens[1, 7:10]]), state=joined)
    close(further[0], full[2, 11:14])
    close(further[1], full[1, 7:10])
    # rollback: whole, and of all but a prefix that differs by row
    _, state = run(model, tokens[:, :10], (10,))
    snapshot = state.snapshot()
    wrong = (tokens[:, 10:14] + 3) % VOCAB
    model(wrong, state=state)
    state.restore(snapshot)
    close(model(tokens[:, 10:13], state=state), full[:, 10:13])
    _, state = run(model, tokens[:, :10], (10,))
    snapshot = state.snapshot()
    keep = torch.tensor([2, 0, 3])
    draft = torch.where(torch.arange(4) < keep[:, None], tokens[:, 10:14], wrong)
    model(draft, state=state)
    model.keep_prefix(state, snapshot, draft, keep)
    follow = torch.stack([tokens[row, 10 + n : 13 + n] for row, n in enumerate(keep.tolist())])
    further = model(follow, state=state)
    for row, n in enumerate(keep.tolist()):
        close(further[row], full[row, 10 + n : 13 + n])


def check_training(model):
    tokens = torch.randint(0, VOCAB, (2, LENGTH + 1), generator=torch.Generator().manual_seed(3))
    routed = any(isinstance(block, DepthRouted) for block in model.blocks)
    with torch.no_grad():
        evaluated = model(tokens)
        model.train()
        if not routed:  # depth routing chooses differently while training
            assert torch.equal(model(tokens), evaluated)
    losses = model.loss(tokens[:, :-1], tokens[:, 1:])
    assert {name: int(term.count) for name, term in losses.terms.items()} == model.term_counts(2, LENGTH)
    losses.objective().backward()
    table = model.parameter_table()
    assert sum(info.parameter.numel() for info in table) == sum(p.numel() for p in model.parameters())
    for info in table:
        assert info.parameter.grad is not None, info.name
        assert torch.isfinite(info.parameter.grad).all(), info.name
    model.after_step()


def check(**changes):
    model = make(**changes)
    check_decoding(model)
    check_training(model)


@pytest.mark.parametrize("depth", list(DEPTHS))
@pytest.mark.parametrize("ffn", list(FEED_FORWARDS))
@pytest.mark.parametrize("mixer", list(MIXERS))
def test_every_kind_of_layer(mixer, ffn, depth):
    check(pattern=mixer, ffn=ffn, depth=depth)


OPTIONS = {
    "gate": ["none", "headwise", "elementwise"],
    "qk_norm": [True, False],
    "num_kv_heads": [1, 2, 4],
    "tie_embeddings": [True, False],
    "window": [1, 5, 40],
    "moe": [
        {"score": score, "top_k": k, "num_shared": shared, "route_norm": norm}
        for score, k, shared, norm in itertools.product(["softmax", "sigmoid"], [1, 2, 4], [0, 1], [False, True])
        if not (norm and k == 1)
    ],
    "mamba": [
        {"num_groups": groups, "top_k": k, "chunk_size": chunk, "expand": expand}
        for groups, k, chunk, expand in itertools.product([1, 2], [1, 2], [1, 7, 32], [1, 2])
    ],
    "resonance": [{"num_kernels": kernels, "conv_width": width} for kernels in (1, 4, 16) for width in (2, 4)],
    "mod": [{"capacity": c} for c in (0.1, 0.5, 1.0)],
    "mtp": [{"depths": depths, "kind": kind} for depths in (0, 1, 3) for kind in ("sequential", "parallel")],
}


@settings(max_examples=30, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.fixed_dictionaries(
        {
            "pattern": st.text(MIXERS, min_size=1, max_size=3),
            "ffn": st.text(FEED_FORWARDS, min_size=1, max_size=3),
            "depth": st.text(DEPTHS, min_size=1, max_size=3),
            **{name: st.sampled_from(choices) for name, choices in OPTIONS.items()},
        }
    )
)
def test_random_hybrids(changes):
    check(num_layers=3, **changes)


def layer_product(mixer, ffn, depth):
    """Every combination of the options of one kind of layer. What concerns the whole model rotates along with it."""
    names = {"A": ["gate", "qk_norm", "num_kv_heads"], "W": ["gate", "qk_norm", "num_kv_heads", "window"]}.get(
        mixer, ["mamba"] if mixer in "MR" else ["resonance"]
    )
    choices = [OPTIONS[name] for name in names]
    if mixer == "M":  # top_k belongs to routed Mamba
        choices = [[option for option in choices[0] if option["top_k"] == 1]]
    if ffn == "e":
        names, choices = [*names, "moe"], [*choices, OPTIONS["moe"]]
    for number, choice in enumerate(itertools.product(*choices)):
        around = {"tie_embeddings": number % 2 == 0, "mtp": OPTIONS["mtp"][number % 7 % 6]}
        if depth == "m":
            around["mod"] = OPTIONS["mod"][number % 3]
        yield {"pattern": mixer, "ffn": ffn, "depth": depth, **around, **dict(zip(names, choice, strict=True))}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("depth", list(DEPTHS))
@pytest.mark.parametrize("ffn", list(FEED_FORWARDS))
@pytest.mark.parametrize("mixer", list(MIXERS))
def test_the_whole_product_of_layer_options(mixer, ffn, depth):
    """One test per kind of layer, so that the workers of pytest-xdist share the whole."""
    for number, changes in enumerate(layer_product(mixer, ffn, depth)):
        try:
            check(num_layers=1, **changes)
        except AssertionError as error:
            raise AssertionError(f"case {number}: {changes}: {error}") from error


def test_the_product_has_the_size_that_the_documentation_says():
    kinds = itertools.product(MIXERS, FEED_FORWARDS, DEPTHS)
    assert sum(len(list(layer_product(*kind))) for kind in kinds) == 5016
