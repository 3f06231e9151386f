"""Headers are NumPy's own, and listed files are opened safely."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from tiny_sets import TinySet, npy_bytes

from lmcore.data import shard
from lmcore.data.manifest import read_manifest
from lmcore.errors import Exit, LmError


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
@pytest.mark.parametrize("shape", [(1, 2048), (32_768, 2048), (1, 32_768), (999_999, 16)])
def test_token_headers_are_those_of_numpy(tmp_path: Path, dtype: str, shape: tuple[int, int]) -> None:
    file = tmp_path / "x.npy"
    if shape[0] * shape[1] < 1 << 17:
        np.save(file, np.zeros(shape, dtype))
        raw = file.read_bytes()[: shard.HEADER_BYTES]
        assert raw == shard.npy_header(np.dtype(dtype), shape)
    assert len(shard.npy_header(np.dtype(dtype), shape)) == shard.HEADER_BYTES


@pytest.mark.parametrize("count", [0, 1, 12_345])
def test_numpy_reads_what_is_written(tmp_path: Path, count: int) -> None:
    for array in (np.arange(count, dtype="<u2").reshape(-1, 1), np.zeros(count, shard.DOCUMENT)):
        chunks, size = shard.npy_chunks(array)
        (tmp_path / "x.npy").write_bytes(b"".join(chunks))
        assert (tmp_path / "x.npy").stat().st_size == size
        np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), array)


def test_dtype_is_the_smallest_that_holds_every_id() -> None:
    assert shard.token_dtype(65_535) == np.dtype("<u2")
    assert shard.token_dtype(65_536) == np.dtype("<u4")


def test_documents_are_verified(tiny_set: TinySet) -> None:
    manifest = read_manifest(tiny_set.path)
    directory = shard.open_directory(tiny_set.path)
    try:
        index = shard.read_documents(directory, manifest.shards[0])
        np.testing.assert_array_equal(index, np.load(tiny_set.path / "shard-00000.docs.npy"))
        file = tiny_set.path / "shard-00000.docs.npy"
        raw = bytearray(file.read_bytes())
        raw[300] ^= 1
        file.write_bytes(raw)
        with pytest.raises(LmError, match=r"shard-00000\.docs\.npy: the content") as caught:
            shard.read_documents(directory, manifest.shards[0])
        assert caught.value.code == Exit.DATA
    finally:
        os.close(directory)


def test_a_rewritten_file_is_hashed_again(tmp_path: Path) -> None:
    """Same name, same size, perhaps the same inode: what was proven about the old content proves nothing."""
    good, bad = npy_bytes(np.zeros(100, "<u2")), npy_bytes(np.ones(100, "<u2"))
    (tmp_path / "a.npy").write_bytes(good)
    directory = shard.open_directory(tmp_path)
    try:
        file = shard.ShardFile(directory, "a.npy", len(good))
        sha256 = file.sha256()
        file.verify(sha256)
        del file
        (tmp_path / "a.npy").unlink()
        (tmp_path / "a.npy").write_bytes(bad)
        with pytest.raises(LmError, match="the content"):
            shard.ShardFile(directory, "a.npy", len(bad)).verify(sha256)
    finally:
        os.close(directory)


def test_a_foreign_hash_is_not_shown(tmp_path: Path) -> None:
    """A message about what a link leads to must not give away the content."""
    (tmp_path / "secret").write_bytes(b"s" * 50)
    (tmp_path / "a.npy").symlink_to("secret")
    directory = shard.open_directory(tmp_path)
    try:
        file = shard.ShardFile(directory, "a.npy", 50)
        with pytest.raises(LmError) as caught:
            file.verify("0" * 64)
        assert file.sha256() not in str(caught.value)
        assert "a link to secret" in str(caught.value)
    finally:
        os.close(directory)
