"""The optimizer of a model: groups by role, AdamW against torch's, state that comes back bit for bit, purity."""

import copy
from dataclasses import dataclass

import pytest
import torch

from lmcore.errors import Exit, LmError
from lmcore.model.parameters import Role
from lmcore.optim.config import OptimConfig
from lmcore.optim.groups import parameter_groups
from lmcore.optim.muon import Muon
from lmcore.optim.optimizer import build_optimizer

STEPS = 50


@dataclass
class Row:
    name: str
    parameter: torch.nn.Parameter
    role: str
    splits: tuple[int, ...] = ()
    decay: bool = True


def table(seed=0, tied=True):
    generator = torch.Generator().manual_seed(seed)

    def row(name, shape, role, splits=(), decay=True):
        return Row(name, torch.nn.Parameter(0.1 * torch.randn(shape, generator=generator)), role, splits, decay)

    return [
        row("embedding.weight", (128, 48), "tied" if tied else "embedding"),
        *([] if tied else [row("head.weight", (128, 48), "head")]),
        row("layers.0.qkv.weight", (96, 48), "matrix", (48, 24, 24)),
        row("layers.0.out.weight", (48, 48), "matrix"),
        row("layers.0.experts.up", (3, 64, 48), "expert", (32, 32)),
        row("layers.0.router.weight", (3, 48), "router"),
        row("layers.0.norm.weight", (48,), "norm", (), False),
        row("layers.0.bias", (48,), "scalar", (), False),
    ]


def fill(rows, step):
    for number, row in enumerate(rows):
        generator = torch.Generator().manual_seed(1000 * step + number)
        row.parameter.grad = torch.randn(row.parameter.shape, generator=generator)


def run(rows, optimizer, steps):
    for step in steps:
        fill(rows, step)
        optimizer.step(step)
        optimizer.zero_grad()


def bits(rows):
    return [row.parameter.detach().clone() for row in rows]


# ------------------------------------------------------------------------------------ groups


def test_parameters_are_grouped_by_role():
    rows = table(tied=False)
    groups = {group.name: group for group in parameter_groups(rows, OptimConfig())}
    assert {name: (g.kind, [r.name.split(".")[-2 if "weight" in r.name else -1] for r in g.rows]) for name, g in
            groups.items()} == {
        "matrices": ("muon", ["qkv", "out", "up"]),
        "embedding": ("adamw", ["embedding"]),
        "head": ("adamw", ["head"]),
        "scalars": ("adamw", ["router"]),
        "scalars (no decay)": ("adamw", ["norm", "bias"]),
    }  # fmt: skip
    assert groups["scalars (no decay)"].weight_decay == 0 < groups["scalars"].weight_decay
    assert groups["embedding"].lr == pytest.approx(0.3 * (48 / 768) ** -0.5)
    assert parameter_groups(table(), OptimConfig())[1].lr == pytest.approx(0.008 * 4)  # tied: the head's lr


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_every_parameter_is_in_exactly_one_group(kind):
    rows = table(tied=False)
    optimizer = build_optimizer(rows, OptimConfig(optimizer=kind), total_steps=STEPS)
    assert sorted(r.name for g in optimizer.groups for r in g.rows) == sorted(r.name for r in rows)
    assert sum(int(str(line["parameters"])) for line in optimizer.table()) == sum(r.parameter.numel() for r in rows)
    before = bits(rows)
    run(rows, optimizer, [0])
    assert not any(torch.equal(row.parameter, old) for row, old in zip(rows, before, strict=True))


def test_every_role_of_a_model_has_a_rule():
    rows = [Row(role.value, torch.nn.Parameter(torch.zeros(1, 8, 8) if role == "expert" else torch.zeros(8, 8)), role)
            for role in Role]  # fmt: skip
    kinds = {r.name: g.kind for g in parameter_groups(rows, OptimConfig()) for r in g.rows}
    assert {name for name, kind in kinds.items() if kind == "muon"} == {"matrix", "expert"}
    assert set(kinds) == {role.value for role in Role}
    with pytest.raises(AssertionError, match="no rule for parameters of the role 'experts'"):
        parameter_groups([Row("x", torch.nn.Parameter(torch.zeros(8, 8)), "experts")], OptimConfig())


def test_frozen_parameters_are_left_out():
    rows = table()
    rows[0].parameter.requires_grad_(False)
    names = {r.name for g in parameter_groups(rows, OptimConfig()) for r in g.rows}
    assert names == {r.name for r in rows[1:]}


def test_fingerprint_tells_divisions_and_rules_apart_but_not_learning_rates():
    def fingerprint(rows, **options):
        return build_optimizer(rows, OptimConfig(**options), total_steps=STEPS).fingerprint()

    first = fingerprint(table())
    assert first == fingerprint(table(seed=1)) == fingerprint(table(), lr=0.5, weight_decay=0.7)
    assert first != fingerprint(table(), optimizer="adamw")
    assert first != fingerprint(table(tied=False))
    other = table()
    other[1].splits = ()
    assert first != fingerprint(other)


def test_a_matrix_that_cannot_be_divided_is_named():
    rows = table()
    rows[1].splits = (48, 48, 24)
    with pytest.raises(LmError, match=r"layers\.0\.qkv\.weight: the splits"):
        build_optimizer(rows, OptimConfig(), total_steps=STEPS)


# ------------------------------------------------------------------------------------ the update


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_adamw_equals_torch(schedule):
    config = OptimConfig(optimizer="adamw", lr=3e-3, schedule=schedule, warmup_steps=5, betas=(0.9, 0.99))
    rows, twins = table(), table()
    optimizer = build_optimizer(rows, config, total_steps=STEPS)
    oracle = torch.optim.AdamW(
        [{"params": [t.parameter], "weight_decay": 0.1 if t.decay else 0.0} for t in twins], betas=(0.9, 0.99)
    )
    for step in range(STEPS):
        for group in oracle.param_groups:
            group["lr"] = optimizer.lr(step)
        fill(rows, step)
        fill(twins, step)
        optimizer.step(step)
        oracle.step()
    for row, twin in zip(rows, twins, strict=True):
        torch.testing.assert_close(row.parameter, twin.parameter, rtol=0, atol=1e-6)


def test_muon_group_equals_the_muon_class():
    config = OptimConfig(lr=0.03, schedule="constant", warmup_steps=0, momentum_warmup_steps=0, normuon=True)
    rows, twins = table(), table()
    optimizer = build_optimizer(rows, config, total_steps=STEPS)
    oracle = Muon(
        [{"params": [t.parameter], "splits": t.splits} for t in twins if t.role in ("matrix", "expert")],
        lr=0.03,
        weight_decay=0.1,
        cautious=True,
        normuon=True,
    )
    run(rows, optimizer, range(3))
    run(twins, oracle_steps(oracle), range(3))
    for row, twin in zip(rows, twins, strict=True):
        assert torch.equal(row.parameter, twin.parameter) == (row.role in ("matrix", "expert"))


def oracle_steps(oracle):
    class Steps:
        step = staticmethod(lambda _: oracle.step())
        zero_grad = staticmethod(lambda: oracle.zero_grad())

    return Steps


def test_parameters_without_gradient_keep_their_bits_and_state():
    rows = table()
    optimizer = build_optimizer(rows, OptimConfig(), total_steps=STEPS)
    run(rows, optimizer, range(2))
    before = bits(rows), copy.deepcopy(optimizer.state_tensors())
    optimizer.step(2)  # no gradients at all
    assert all(torch.equal(a, b) for a, b in zip(bits(rows), before[0], strict=True))
    assert all(torch.equal(v, before[1][k]) for k, v in optimizer.state_tensors().items())


def test_gradient_norms_per_group_add_up():
    rows = table()
    optimizer = build_optimizer(rows, OptimConfig(), total_steps=STEPS)
    fill(rows, 0)
    norms = optimizer.gradient_norms()
    assert set(norms) == {g.name for g in optimizer.groups}
    total = sum(float(norm) ** 2 for norm in norms.values()) ** 0.5
    assert total == pytest.approx(float(torch.cat([r.parameter.grad.flatten() for r in rows]).norm()), rel=1e-5)


# ------------------------------------------------------------------------------------ state


@pytest.mark.parametrize(
    "options",
    [{"optimizer": "muon"}, {"optimizer": "muon", "normuon": True}, {"optimizer": "adamw"}],
    ids=str,
)
def test_interrupted_at_every_step_equals_uninterrupted(options):
    config = OptimConfig(**options)
    whole = table()
    run(whole, build_optimizer(whole, config, total_steps=STEPS), range(6))
    rows = table()
    saved = None
    for step in range(6):
        optimizer = build_optimizer(rows, config, total_steps=STEPS)  # a new process knows nothing
        if saved is not None:
            optimizer.load_state_tensors(saved)
        run(rows, optimizer, [step])
        saved = {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}
    assert all(torch.equal(a, b) for a, b in zip(bits(rows), bits(whole), strict=True))


def test_state_is_unstacked_and_keyed_by_parameter():
    rows = table()
    state = build_optimizer(rows, OptimConfig(normuon=True), total_steps=STEPS).state_tensors()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert shapes["layers.0.experts.up.momentum"] == (3, 64, 48)
    assert shapes["layers.0.experts.up.second_moment"] == (3, 96)  # two halves of (32, 48): 48 columns each
    assert shapes["layers.0.qkv.weight.second_moment"] == (48 + 48 + 48,)
    assert shapes["layers.0.norm.weight.exp_avg_sq"] == (48,)
    assert len(state) == 2 * len(rows)


def test_hyperparameters_come_from_the_config_not_from_the_state():
    """Resuming with another decay must apply it: nothing of the old settings hides in the saved tensors."""
    rows = table()
    optimizer = build_optimizer(rows, OptimConfig(weight_decay=0.1), total_steps=STEPS)
    run(rows, optimizer, [0])
    saved = optimizer.state_tensors()
    other = build_optimizer(rows, OptimConfig(weight_decay=0.9, lr=0.123), total_steps=STEPS)
    other.load_state_tensors(saved)
    values = other.hyperparameters(20)["matrices"]
    assert values["weight_decay"] == 0.9
    assert values["lr"] == other.lr(20) == pytest.approx(0.123 * other.lr(20) / 0.123)
    assert all(isinstance(tensor, torch.Tensor) for tensor in saved.values())


def test_a_foreign_state_is_refused_by_name():
    rows = table()
    optimizer = build_optimizer(rows, OptimConfig(), total_steps=STEPS)
    state = {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}
    missing = {k: v for k, v in state.items() if k != "layers.0.bias.exp_avg"}
    with pytest.raises(LmError, match=r"lacks layers\.0\.bias\.exp_avg") as caught:
        optimizer.load_state_tensors(missing)
    assert caught.value.code == Exit.DATA
    with pytest.raises(LmError, match=r"has ghost\.momentum"):
        optimizer.load_state_tensors({**state, "ghost.momentum": torch.zeros(1)})
    with pytest.raises(LmError, match=r"layers\.0\.bias\.exp_avg is .*\(7,\).*expected"):
        optimizer.load_state_tensors({**state, "layers.0.bias.exp_avg": torch.zeros(7)})


# ------------------------------------------------------------------------------------ settings


def test_defaults_depend_on_the_optimizer_and_none_means_choose():
    muon, adamw = OptimConfig().resolved(1000), OptimConfig(optimizer="adamw").resolved(1000)
    assert (muon.lr, muon.clip, muon.betas, muon.adam_weight_decay) == (0.02, 0.0, (0.8, 0.95), 0.001)
    assert (adamw.lr, adamw.clip, adamw.betas, adamw.adam_weight_decay) == (1e-3, 1.0, (0.9, 0.95), 0.1)
    assert adamw.embedding_lr == adamw.head_lr == adamw.scalar_lr == adamw.lr
    assert OptimConfig(scale="match_rms_adamw").resolved(1000).lr == 2e-3
    assert (
        OptimConfig(lr=0.5, weight_decay=0.0, clip=3.0).resolved(1000).model_dump().items()
        >= {
            "lr": 0.5,
            "weight_decay": 0.0,
            "clip": 3.0,
        }.items()
    )
    assert muon.resolved(99) == muon  # resolved once is resolved


@pytest.mark.parametrize(
    "bad",
    [{"lr": 0}, {"lr": -1}, {"betas": (0.9, 1.0)}, {"momentum": 1.0}, {"schedule": "step"}, {"final_fraction": 2}],
)
def test_impossible_settings_are_refused(bad):
    from lmcore.config import build

    with pytest.raises(LmError, match=next(iter(bad))):
        build(OptimConfig, bad)
