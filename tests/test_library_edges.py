"""What people hand to the library by mistake: a sentence that names it, and nothing is changed before it is refused."""

from __future__ import annotations

import copy
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lmcore import LanguageModel, ModelConfig, Muon, Tokenizer, load_checkpoint, save_checkpoint
from lmcore.errors import LmError
from lmcore.training.device import resolve_device


def tiny(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(6, 4).to(dtype)


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1, seed: int = 1) -> None:
    torch.manual_seed(seed)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()


OPTIMIZERS: dict[str, Any] = {
    "muon": lambda model: Muon([model.weight], lr=0.02),
    "normuon": lambda model: Muon([model.weight], lr=0.02, normuon=True),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9),
}


@pytest.mark.parametrize("way", ["checkpoint", "state_dict"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_has_one_dtype_and_a_continued_run_the_same_bits(name: str, dtype: torch.dtype, way: str) -> None:
    model = tiny(dtype)
    optimizer = OPTIMIZERS[name](model)
    trained(model, optimizer)
    other = tiny(dtype, seed=5)
    again = OPTIMIZERS[name](other)
    if way == "checkpoint":
        file = io.BytesIO()
        save_checkpoint(model, optimizer, 7, file)
        file.seek(0)
        assert load_checkpoint(file, other, again) == 7
    else:
        other.load_state_dict(model.state_dict())
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    kinds = [
        [(key, value.dtype) for state in each.state.values() for key, value in state.items() if torch.is_tensor(value)]
        for each in (optimizer, again)
    ]
    assert kinds[0] == kinds[1]
    for one, two in ((model, optimizer), (other, again)):
        trained(one, two, steps=3, seed=2)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def saved(**changes: Any) -> bytes:
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    trained(model, optimizer)
    file = io.BytesIO()
    save_checkpoint(model, optimizer, 3, file)
    return file.getvalue()


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
    return [
        [p.clone() for p in model.parameters()],
        json.dumps(optimizer.state_dict(), default=lambda value: value.tolist()),
    ]


@pytest.mark.parametrize("made", ["another optimizer", "another shape", "more groups"])
def test_a_refused_checkpoint_changes_nothing(made: str) -> None:
    raw = saved()
    model = tiny(seed=4)
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    if made == "another optimizer":
        optimizer = Muon([model.weight])  # type: ignore[list-item]
    if made == "more groups":
        optimizer = torch.optim.AdamW([{"params": [model.weight]}, {"params": [model.bias]}], lr=0.5)
    if made == "another shape":
        model = nn.Linear(5, 4)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    before = snapshot(model, optimizer)
    with pytest.raises(LmError):
        load_checkpoint(io.BytesIO(raw), model, optimizer)
    after = snapshot(model, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    assert before[1] == after[1]


def test_a_damaged_checkpoint_is_said_and_changes_nothing() -> None:
    """Any byte of the header, cut anywhere, doubled."""
    raw = saved()
    header = 8 + int.from_bytes(raw[:8], "little")
    generator = np.random.default_rng(0)
    model = tiny(seed=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    before = snapshot(model, optimizer)
    refused = 0
    for _ in range(400):
        damaged = bytearray(raw)
        kind = generator.integers(4)
        at = int(generator.integers(header))
        if kind == 0:
            damaged[at] ^= 1 << int(generator.integers(8))
        elif kind == 1:
            damaged = damaged[: int(generator.integers(len(raw)))]
        elif kind == 2:
            damaged[at:at] = damaged[at : at + 20]
        else:
            damaged[at] = int(generator.integers(256))
        try:
            load_checkpoint(io.BytesIO(bytes(damaged)), model, optimizer)
        except LmError:
            refused += 1
            after = snapshot(model, optimizer)
            assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
            assert before[1] == after[1]
        else:
            model = tiny(seed=4)
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    assert refused > 200


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": "lmshards-checkpoint/1"}, "not a checkpoint made by save_checkpoint"),
        ({"optimizer": "{"}, "is damaged"),
        ({"optimizer": '{"mapping": [["state", {"value": 3}]]}'}, "is damaged"),
        ({"optimizer": "[" * 5000}, "is damaged"),
        ({"optimizer": '{"tensor": "none"}'}, "is damaged"),
        ({"iteration": "many"}, "is not a number"),
        ({"iteration": "9" * 5000}, "is not a number"),
    ],
)
def test_what_is_in_a_checkpoint_is_checked_whole(metadata: dict[str, str], message: str) -> None:
    from lmcore.training.tensors import read_header, tensor_chunks

    raw = saved()
    _, found = read_header(io.BytesIO(raw), len(raw), "x")
    contents = {f"model.{name}": tensor.detach() for name, tensor in tiny().named_parameters()}
    chunks, _ = tensor_chunks(
        contents, (found | metadata) if len(metadata) == 1 and "format" not in metadata else metadata
    )
    model = tiny()
    with pytest.raises(LmError, match=message):
        load_checkpoint(io.BytesIO(b"".join(map(bytes, chunks))), model, torch.optim.AdamW(model.parameters()))


def test_files_opened_for_text_and_values_that_no_checkpoint_holds_are_named(tmp_path: Path) -> None:
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=np.float32(1e-2))  # type: ignore[arg-type]
    file = io.BytesIO()
    save_checkpoint(model, optimizer, 1, file)  # a rate that NumPy computed is a number
    with open(tmp_path / "text", "w") as text, pytest.raises(LmError, match="opened for text"):
        save_checkpoint(model, optimizer, 1, text)  # type: ignore[arg-type]
    (tmp_path / "checkpoint").write_bytes(file.getvalue())
    with open(tmp_path / "checkpoint", encoding="latin-1") as text, pytest.raises(LmError, match="opened for text"):
        load_checkpoint(text, model, optimizer)  # type: ignore[arg-type]
    optimizer.param_groups[0]["what"] = object()
    with pytest.raises(LmError, match=r"param_groups.0.what is a object"):
        save_checkpoint(model, optimizer, 1, io.BytesIO())
    model.register_buffer("rotation", torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(LmError, match=r"model\.rotation has the type complex64"):
        save_checkpoint(model, torch.optim.AdamW(tiny().parameters()), 1, io.BytesIO())


def test_ids_beyond_the_vocabulary_are_refused_also_where_padding_rows_are() -> None:
    model = LanguageModel(ModelConfig(vocab_size=67, d_model=32, num_layers=1, num_heads=2, context_length=16))
    assert model.embedding.weight.shape[0] > 67
    model(torch.tensor([[0, 66]]))
    for wrong in (67, 100, 10**6, -1):
        with pytest.raises(LmError, match=rf"the id {wrong:,} is given to a model with ids 0 to 66"):
            model(torch.tensor([[0, wrong]]))


def test_settings_in_python_are_refused_by_name() -> None:
    for values, message in (
        ({"d_model": -1}, "d_model"),
        ({"d_modl": 64}, r"d_modl is not a setting. Did you mean d_model\?"),
        ({"moe": {"num_experts": 0}}, "moe.num_experts"),
    ):
        with pytest.raises(LmError, match=message):
            ModelConfig(**values)  # type: ignore[arg-type]


def test_one_text_is_no_corpus() -> None:
    for one in ("a text that is one string", b"bytes"):
        with pytest.raises(LmError, match="many texts"):
            Tokenizer.train(one, 400)  # type: ignore[arg-type]


def test_a_device_that_is_absent_is_named() -> None:
    for name in ("cuda:77", "xpu", "meta", "nothing"):
        with pytest.raises(LmError, match=name):
            resolve_device(name)
        if name != "nothing":
            with pytest.raises(LmError, match=name):
                resolve_device(torch.device(name))


def test_an_open_stream_says_nothing_at_the_interpreter_s_exit(tmp_path: Path) -> None:
    from tests.inference.tiny import documents, make_set

    path = make_set(tmp_path / "set", documents())
    code = (
        "import sys, lmcore; s = lmcore.TokenStream.open(sys.argv[1]); s.read(0, 100); "
        "sys.modules['keep'] = s; import builtins; builtins.kept = s"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
