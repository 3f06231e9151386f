"""Optimizer state divided over ranks: the same bits as one rank, and a state that moves between numbers of ranks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from lmcore.optim.config import OptimConfig
from lmcore.optim.groups import parameter_groups
from lmcore.optim.optimizer import build_optimizer
from lmcore.optim.sharding import Ranks, divide

KINDS = ("muon", "adamw", "adamw8bit")


class Row:
    def __init__(self, name, shape, role, splits=()):
        generator = torch.Generator().manual_seed(len(name))
        self.name, self.role, self.splits, self.decay = name, role, splits, role != "norm"
        self.parameter = torch.nn.Parameter(0.1 * torch.randn(shape, generator=generator))


def table():
    """With what is awkward: experts and rows that no number of ranks divides, tiny tensors, one 0-D."""
    return [
        Row("embedding", (1301, 64), "tied"),
        Row("attention", (128, 64), "matrix", (64, 32, 32)),
        Row("out", (64, 64), "matrix"),
        Row("experts", (5, 96, 64), "expert", (48, 48)),
        Row("narrow", (2, 700), "router"),
        Row("norm", (64,), "norm"),
        Row("temperature", (), "scalar"),
    ]


def fill(rows, step):
    for number, row in enumerate(rows):
        generator = torch.Generator().manual_seed(100 * step + number)
        row.parameter.grad = torch.randn(row.parameter.shape, generator=generator)


def work(ranks, start, stop, folder, source=None):
    """Steps start .. stop-1 with each kind of optimizer, from the state in `source` if given; saves into `folder`."""
    for kind in KINDS:
        rows = table()
        config = OptimConfig(optimizer=kind, normuon=kind == "muon")
        optimizer = build_optimizer(rows, config, total_steps=20, ranks=ranks)
        if source is not None:
            weights = load_file(source / f"{kind}-rank-0.safetensors")
            for row in rows:
                row.parameter.data.copy_(weights[row.name])
            optimizer.load_state_tensors(load_file(source / f"{kind}-optimizer.safetensors"))
        for step in range(start, stop):
            fill(rows, step)
            optimizer.step(step)
        state = optimizer.state_tensors()
        assert bool(state) == (ranks.rank == 0)
        save_file({r.name: r.parameter.detach() for r in rows}, folder / f"{kind}-rank-{ranks.rank}.safetensors")
        if ranks.rank == 0:
            save_file(state, folder / f"{kind}-optimizer.safetensors")
        own = sum(t.numel() * t.element_size() for states in optimizer._states.values() for s in states if s
                  for t in s.values())  # fmt: skip
        assert own == optimizer.state_bytes() if ranks.size == 1 else own < 0.75 * optimizer.state_bytes()


def launch(size, start, stop, folder, source):
    folder.mkdir()
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    arguments = [str(value) for value in (size, start, stop, folder, source)]
    command = [sys.executable, "-c", "import sys, test_sharding; test_sharding.rank_main(*sys.argv[1:])"]
    processes = [
        subprocess.Popen([*command, str(rank), *arguments], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(size)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    return folder


def rank_main(rank, size, start, stop, folder, source):
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=int(rank), world_size=int(size))
    work(Ranks(int(rank), int(size)), int(start), int(stop), Path(folder), Path(source) if source != "None" else None)
    dist.destroy_process_group()


@pytest.mark.parametrize("sizes", [(2, 1), pytest.param((3, 2), marks=pytest.mark.slow)], ids=str)
def test_any_number_of_ranks_gives_the_same_bits(sizes, tmp_path):
    """One rank for six steps; others for three steps, then yet others from their saved state."""

    def by(size, start, stop, name, source=None):
        if size > 1:
            return launch(size, start, stop, tmp_path / name, source)
        (tmp_path / name).mkdir()
        work(Ranks(), start, stop, tmp_path / name, source)
        return tmp_path / name

    alone = by(1, 0, 6, "alone")
    first = by(sizes[0], 0, 3, "first")
    second = by(sizes[1], 3, 6, "second", first)
    for kind in KINDS:
        for name in (f"{kind}-rank-0.safetensors", f"{kind}-optimizer.safetensors"):
            assert (second / name).read_bytes() == (alone / name).read_bytes(), name
            assert (first / name).read_bytes() != (alone / name).read_bytes()
        ranks = [(first / f"{kind}-rank-{rank}.safetensors").read_bytes() for rank in range(sizes[0])]
        assert all(other == ranks[0] for other in ranks)


@pytest.mark.parametrize("kind", ["muon", "adamw"])
@pytest.mark.parametrize("size", [1, 2, 3, 8, 64])
def test_pieces_cover_everything_once_and_are_balanced(kind, size):
    rows = [Row(f"w{i}", (64 + 8 * (i % 3), 64), "matrix") for i in range(32)] + table()
    pieces = divide(parameter_groups(rows, OptimConfig(optimizer=kind)), size)
    loads = [0] * size
    for row in rows:
        mine = pieces[row.name]
        length = row.parameter.shape[0] if row.parameter.ndim else 1
        assert [p.start for p in mine] == [0, *(p.stop for p in mine[:-1])]
        assert mine[-1].stop == length
        for piece in mine:
            if piece.owner is not None:
                loads[piece.owner] += row.parameter.numel() * (piece.stop - piece.start) // length
    if size in (2, 3):
        assert max(loads) < 1.25 * sum(loads) / size
    if size == 1:
        assert all(piece.owner is None for mine in pieces.values() for piece in mine)
