"""Multi-token prediction: alignment, and drafting that never changes what is generated."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_laws import VOCAB, make

from lmcore.errors import LmError
from lmcore.model.config import MIXERS
from lmcore.model.mtp import Drafter, accept_drafts


def outputs(model, tokens):
    """Logits of every depth over a sequence, as in training."""
    hidden = model.trunk(tokens)
    result = []
    for depth in range(1, len(model.mtp) + 1):
        if model.config.mtp.kind == "sequential":
            hidden = model.mtp_hidden(depth, hidden[:, :-1], tokens[:, depth:])
            result.append(model.logits(hidden))
        else:
            result.append(model.logits(model.mtp_hidden(depth, hidden, tokens)))
    return result


@pytest.mark.parametrize("pattern", list(MIXERS))
def test_head_k_sees_k_tokens_ahead_and_no_further(pattern):
    model = make(pattern=pattern, ffn="e", mtp={"depths": 3, "kind": "sequential"})
    tokens = torch.randint(0, VOCAB, (2, 20), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 10:] = (changed[:, 10:] + 3) % VOCAB
    with torch.no_grad():
        for k, (before, after) in enumerate(zip(outputs(model, tokens), outputs(model, changed), strict=True), 1):
            difference = (before - after).abs().amax((0, 2))
            assert difference[: 10 - k].max() < 1e-12
            assert difference[10 - k] > 1e-6  # position 10 - k reads token 10


def test_independent_heads_see_no_further_than_the_trunk():
    model = make(pattern="AMF", num_layers=3, mtp={"depths": 3, "kind": "parallel"})
    tokens = torch.randint(0, VOCAB, (2, 20), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 10:] = (changed[:, 10:] + 3) % VOCAB
    with torch.no_grad():
        for before, after in zip(outputs(model, tokens), outputs(model, changed), strict=True):
            difference = (before - after).abs().amax((0, 2))
            assert difference[:10].max() < 1e-12
            assert difference[10] > 1e-6


@pytest.mark.parametrize("kind", ["sequential", "parallel"])
def test_each_depth_is_scored_against_its_own_target(kind):
    model = make(mtp={"depths": 2, "kind": kind, "weight": 0.4}).train()
    tokens = torch.randint(0, VOCAB, (2, 21), generator=torch.Generator().manual_seed(0))
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[0, 5] = -100
    losses = model.loss(inputs, targets)
    with torch.no_grad():
        for k, logits in enumerate(outputs(model, inputs), 1):
            log_probs = logits.log_softmax(-1)
            total, count = 0.0, 0
            for row in range(2):
                for i in range(20 - k):
                    if targets[row, i + k] != -100:
                        total -= log_probs[row, i, targets[row, i + k]].item()
                        count += 1
            term = losses.terms[f"mtp_{k}"]
            assert term.sum.item() == pytest.approx(total, abs=1e-9)
            assert term.count == count
            assert term.weight == 0.2


def test_short_sequences_are_refused():
    model = make(mtp={"depths": 3}).train()
    with pytest.raises(LmError, match="3 tokens are too short for 3 heads"):
        model.loss(torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long))


def greedy(model, prompt, n):
    state = model.init_state(1, 64)
    out, token = [], prompt
    for _ in range(n):
        token = model(token, state=state)[:, -1:].argmax(-1)
        out.append(token.item())
    return out


def speculative(model, prompt, n):
    def pick(logits):
        return logits.argmax(-1)

    state, drafter = model.init_state(1, 64), Drafter(model, 1, 64)
    hidden = model.trunk(prompt, state=state)
    token = pick(model.logits(hidden[:, -1]))
    drafter.commit(hidden, torch.cat([prompt[:, 1:], token[:, None]], 1))
    out, accepted = [token.item()], 0
    while len(out) < n:
        drafts = drafter.propose(pick)
        chunk = torch.cat([token[:, None], drafts], 1)
        snapshot = state.snapshot()
        hidden = model.trunk(chunk, state=state)
        choice = pick(model.logits(hidden))
        same = (choice[0, :-1] == drafts[0]).long().cumprod(0).sum().item()
        model.keep_prefix(state, snapshot, chunk, torch.tensor([1 + same]))
        following = choice[:, : 1 + same]
        drafter.commit(hidden[:, : 1 + same], following)
        token = following[:, -1]
        out += following[0].tolist()
        accepted += same
    return out[:n], accepted


KINDS = [(kind, depths) for kind in ("sequential", "parallel") for depths in (1, 2, 4)]


@pytest.mark.parametrize(("kind", "depths"), KINDS)
@pytest.mark.parametrize(
    "changes",
    [{}, {"pattern": "AW"}, {"pattern": "MF"}, {"pattern": "FR"}, {"pattern": "AR", "depth": "m", "ffn": "e"}],
)
def test_speculative_greedy_is_greedy(kind, depths, changes):
    model = make(mtp={"depths": depths, "kind": kind}, **changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("out.weight", "w2.weight", "expert_out.weight")):
                parameter.mul_(0.2)  # the last token decides nearly alone, so that some drafts are right
            if name.endswith("project.weight"):
                parameter[:, :16] *= 0.2
                parameter[:, 16:] = torch.eye(16)
        accepted = 0
        for seed in range(3):
            prompt = torch.randint(0, VOCAB, (1, 9), generator=torch.Generator().manual_seed(seed))
            text, agreed = speculative(model, prompt, 24)
            assert text == greedy(model, prompt, 24)
            accepted += agreed
    assert accepted > 0


def test_drafter_state_equals_reading_everything_at_once():
    """Drafts after many commits of different sizes equal those of a fresh drafter that read the whole text."""
    model = make(pattern="AM", mtp={"depths": 3, "kind": "sequential"})
    tokens = torch.randint(0, VOCAB, (1, 25), generator=torch.Generator().manual_seed(0))
    seen = []
    with torch.no_grad():
        hidden = model.trunk(tokens[:, :-1])
        for cuts in ([24], [5, 6, 9, 13, 14, 24], list(range(4, 25))):
            drafter, start = Drafter(model, 1, 64), 0
            for stop in cuts:
                drafter.commit(hidden[:, start:stop], tokens[:, start + 1 : stop + 1])
                start = stop
            logits = []
            drafter.propose(lambda z, kept=logits: kept.append(z) or z.argmax(-1))
            seen.append(torch.cat(logits))
    torch.testing.assert_close(seen[1], seen[0], atol=1e-11, rtol=0)
    torch.testing.assert_close(seen[2], seen[0], atol=1e-11, rtol=0)


@settings(max_examples=6, derandomize=True, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 3))
def test_speculative_sampling_keeps_the_distribution(seed, n):
    """Chi-squared test of the first token against the target's own probabilities."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.rand(n + 1, 5, generator=generator, dtype=torch.float64).square()
    draft = torch.rand(n, 5, generator=generator, dtype=torch.float64).square()
    target, draft = target / target.sum(1, keepdim=True), draft / draft.sum(1, keepdim=True)
    trials, counts = 3000, torch.zeros(5, dtype=torch.float64)
    for _ in range(trials):
        drafts = torch.multinomial(draft, 1, generator=generator)[:, 0]
        accepted, extra = accept_drafts(target, draft, drafts, generator)
        counts[drafts[0] if accepted else extra] += 1
    statistic = ((counts - trials * target[0]).square() / (trials * target[0])).sum()
    assert statistic < 23.5  # 4 degrees of freedom: one in ten thousand
