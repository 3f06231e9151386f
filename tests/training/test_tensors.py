"""Our safetensors files against the safetensors library, and against broken headers."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmcore import storage
from lmcore.errors import LmError
from lmcore.training.tensors import read_tensors, tensor_chunks


def sample():
    g = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(3, 5, generator=g),
        "b": torch.randn(7, generator=g).bfloat16(),
        "half": torch.randn(2, 2, generator=g).half(),
        "double": torch.randn(3, generator=g).double(),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(5),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "flags": torch.tensor([True, False]),
        "strided": torch.arange(12.0).reshape(3, 4).T,
    }


def write(path, tensors, **kwargs):
    chunks, size = tensor_chunks(tensors, **kwargs)
    assert storage.write_file(path, chunks, size=size).bytes == size == path.stat().st_size


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert a[name].shape == b[name].shape
        assert torch.equal(a[name], b[name]), name


def test_the_library_reads_what_we_write(tmp_path):
    write(tmp_path / "x.safetensors", sample(), metadata={"k": "v"})
    same(load_file(tmp_path / "x.safetensors"), sample())


def test_we_read_what_the_library_writes(tmp_path):
    contents = {name: t.contiguous() for name, t in sample().items()}
    save_file(contents, tmp_path / "x.safetensors", metadata={"a": "b"})
    same(read_tensors(tmp_path / "x.safetensors"), contents)


def test_bytes_depend_on_the_content_only(tmp_path):
    tensors = sample()
    write(tmp_path / "a", tensors)
    write(tmp_path / "b", dict(reversed(tensors.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def header(**entries):
    raw = json.dumps(entries).encode()
    return len(raw).to_bytes(8, "little") + raw


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x00" * 4,
        (1 << 60).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (4).to_bytes(8, "little") + b"nope",
        header(a=F32),
        header(a=F32) + bytes(9),
        header(a=F32 | {"shape": [3]}) + bytes(8),
        header(a=F32 | {"shape": [-2]}) + bytes(8),
        header(a=F32 | {"shape": [True, 2]}) + bytes(8),
        header(a=F32 | {"dtype": "F99"}) + bytes(8),
        header(a=F32 | {"data_offsets": [8, 0]}) + bytes(8),
        header(a=F32, b=F32) + bytes(8),
        header(a=F32 | {"data_offsets": [8, 16]}) + bytes(16),
        header(a={"dtype": "F32"}) + bytes(8),
        header(a=7) + bytes(8),
        header(a=F32 | {"shape": [1 << 61, 8]}) + bytes(8),
    ],
)
def test_a_broken_file_is_one_sentence(tmp_path, raw):
    (tmp_path / "x").write_bytes(raw)
    with pytest.raises(LmError) as caught:
        read_tensors(tmp_path / "x")
    assert caught.value.code == 65
    assert str(tmp_path / "x") in caught.value.message


def test_links_and_other_things_are_not_followed(tmp_path):
    write(tmp_path / "x", sample())
    os.symlink(tmp_path / "x", tmp_path / "link")
    os.mkfifo(tmp_path / "fifo")
    for name in ("link", "fifo"):
        with pytest.raises(LmError):
            read_tensors(tmp_path / name)
