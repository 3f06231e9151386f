"""The stream is the concatenation of the segments, however it is read; what is not as listed is refused by name."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_sets import TinySet, npy_bytes, write_manifest

from lmcore.data.stream import TokenStream
from lmcore.errors import Exit, LmError


def test_reads_the_whole_set_without_the_pad(tiny_set: TinySet) -> None:
    stream = TokenStream.open(tiny_set.path)
    assert stream.n_tokens == len(stream) == len(tiny_set.stream)
    assert stream.dtype == np.uint16
    np.testing.assert_array_equal(stream.read(0, len(stream)), tiny_set.stream)


@pytest.mark.parametrize("length", [1, 7, 2048, 4097, 9000])
def test_windows_cross_rows_and_shards(tiny_set: TinySet, length: int) -> None:
    stream = TokenStream.open(tiny_set.path)
    starts = np.random.default_rng(length).integers(0, len(stream) - length + 1, 200)
    starts[:2] = 0, len(stream) - length
    expected = np.stack([tiny_set.stream[s : s + length] for s in starts])
    np.testing.assert_array_equal(stream.windows(starts, length), expected)


def test_windows_on_the_ring(tiny_set: TinySet) -> None:
    stream, n = TokenStream.open(tiny_set.path), len(tiny_set.stream)
    starts = np.array([n - 1, 0, n - 50, n - 101, n - 100])
    expected = tiny_set.stream[(starts[:, None] + np.arange(101)) % n]
    np.testing.assert_array_equal(stream.windows(starts, 101, wrap=True), expected)
    np.testing.assert_array_equal(stream.windows([5], n, wrap=True)[0], np.roll(tiny_set.stream, -5))


def test_segments_select_and_order_tokens(tiny_set: TinySet) -> None:
    """A view of 400 short pieces, against NumPy slices of the shards."""
    manifest = tiny_set.manifest
    generator = np.random.default_rng(1)
    segments, pieces = [], []
    flats = [np.load(tiny_set.path / f"{s['name']}.npy").reshape(-1) for s in manifest["shards"]]
    for _ in range(400):
        shard = int(generator.integers(len(flats)))
        start = int(generator.integers(manifest["shards"][shard]["n_tokens"] - 30))
        stop = start + int(generator.integers(1, 30))
        segments.append([shard, start, stop])
        pieces.append(flats[shard][start:stop])
    expected = np.concatenate(pieces)
    write_manifest(tiny_set.path, manifest | {"kind": "view", "segments": segments, "n_tokens": len(expected)})
    stream = TokenStream.open(tiny_set.path)
    np.testing.assert_array_equal(stream.read(0, len(stream)), expected)
    starts = generator.integers(0, len(expected) - 100, 300)
    np.testing.assert_array_equal(stream.windows(starts, 100), np.stack([expected[s : s + 100] for s in starts]))
    for position in (0, 17, len(expected) - 1):
        shard, offset = stream.locate(position)
        assert flats[shard][offset] == expected[position]


def test_wide_ids(make_set: Callable[..., TinySet]) -> None:
    wide = make_set(dtype="<u4")
    stream = TokenStream.open(wide.path)
    assert stream.dtype == np.uint32
    np.testing.assert_array_equal(stream.read(3, 5000), wide.stream[3:5000])


def test_out_is_filled_and_checked(tiny_set: TinySet) -> None:
    stream = TokenStream.open(tiny_set.path)
    out = np.empty((2, 10), np.uint16)
    assert stream.windows([0, 9], 10, out) is out
    np.testing.assert_array_equal(out[1], tiny_set.stream[9:19])
    with pytest.raises(ValueError, match="C-contiguous"):
        stream.windows([0, 9], 10, np.empty((2, 10), np.int64))


@pytest.mark.parametrize(("starts", "length"), [([-1], 5), ([0], 10**9), ([1 << 40], 5), ([0], -1)])
def test_windows_outside_are_refused(tiny_set: TinySet, starts: list[int], length: int) -> None:
    with pytest.raises(LmError, match="leaves the stream"):
        TokenStream.open(tiny_set.path).windows(starts, length)


@pytest.mark.parametrize("dtype", ["<u2", "<u4", "<i8", ">u2", "<i4", "|u1"])
def test_arrays_of_any_integer_type(dtype: str) -> None:
    array = np.arange(200).astype(dtype)
    stream = TokenStream.from_array(array.reshape(10, 20))
    assert (stream.n_tokens, stream.max_id, stream.manifest) == (200, 199, None)
    np.testing.assert_array_equal(stream.windows([3, 190], 10), [np.arange(3, 13), np.arange(190, 200)])


def test_memmap_and_identity_of_arrays(tmp_path: Path) -> None:
    array = np.arange(5000, dtype=np.uint16)
    array.tofile(tmp_path / "a.bin")
    stream = TokenStream.from_array(np.memmap(tmp_path / "a.bin", np.uint16, "r"))
    assert stream.dataset_id == TokenStream.from_array(array).dataset_id
    assert stream.dataset_id != TokenStream.from_array(array.astype(np.uint32)).dataset_id
    with pytest.raises(LmError, match="integers"):
        TokenStream.from_array(np.zeros(3))
    with pytest.raises(LmError, match="no token"):
        TokenStream.from_array(np.zeros(0, np.uint16))


def test_vocabulary_is_compared_and_the_shard_named(tiny_set: TinySet) -> None:
    stream = TokenStream.open(tiny_set.path)
    assert stream.max_id == 256
    stream.require_vocabulary(257)
    with pytest.raises(LmError, match=r"shard-00000\.npy: holds the token id 256") as caught:
        stream.require_vocabulary(256)
    assert caught.value.code == Exit.DATA


def test_every_length_of_a_cut_or_extended_shard_is_refused(tiny_set: TinySet) -> None:
    file = tiny_set.path / "shard-00001.npy"
    good = file.read_bytes()
    for size in [*range(0, 140), *range(len(good) - 140, len(good)), len(good) + 1, len(good) + 128]:
        file.write_bytes(good[:size].ljust(size, b"x"))
        with pytest.raises(LmError, match=r"shard-00001\.npy: .* bytes, the manifest says"):
            TokenStream.open(tiny_set.path, verify="size")


@pytest.mark.parametrize("byte", [0, 6, 8, 20, 60, 127])
def test_a_foreign_header_is_refused_unparsed(tiny_set: TinySet, byte: int) -> None:
    file = tiny_set.path / "shard-00000.npy"
    raw = bytearray(file.read_bytes())
    raw[byte] ^= 1
    file.write_bytes(raw)
    with pytest.raises(LmError, match="header"):
        TokenStream.open(tiny_set.path, verify="size")


def test_verification_levels(tiny_set: TinySet) -> None:
    file = tiny_set.path / "shard-00001.npy"
    raw = bytearray(file.read_bytes())
    raw[200] ^= 1
    file.write_bytes(raw)
    with pytest.raises(LmError, match=r"shard-00001\.npy: the content"):
        TokenStream.open(tiny_set.path, verify="full")
    TokenStream.open(tiny_set.path, verify="size").read(0, 10_000)
    stream = TokenStream.open(tiny_set.path)
    stream.read(0, 4096)  # the damaged shard is not touched yet
    with pytest.raises(LmError, match=r"shard-00001\.npy: the content") as caught:
        stream.read(4096, 4100)
    assert caught.value.code == Exit.DATA


def test_a_shard_cut_while_in_use_is_an_error_and_not_a_signal(tiny_set: TinySet) -> None:
    stream = TokenStream.open(tiny_set.path, verify="size")
    os.truncate(tiny_set.path / "shard-00000.npy", 1000)
    with pytest.raises(LmError, match="cut while in use"):
        stream.read(0, 2048)


def _linked(tiny: TinySet) -> Path:
    """A view directory whose first shard is still missing."""
    view = tiny.path / "view"
    view.mkdir()
    write_manifest(view, tiny.manifest | {"kind": "view", "split": {"view": "view"}})
    for shard in tiny.manifest["shards"][1:]:
        (view / f"{shard['name']}.npy").symlink_to(f"../{shard['name']}.npy")
    return view


HOSTILE: dict[str, Callable[[TinySet, Path], object]] = {
    "other content": lambda t, link: link.symlink_to("../canary"),
    "another shard": lambda t, link: link.symlink_to("../shard-00001.npy"),
    "dangling": lambda t, link: link.symlink_to("../gone.npy"),
    "loop": lambda t, link: link.symlink_to(link.name),
    "directory": lambda t, link: link.symlink_to(".."),
    "device": lambda t, link: link.symlink_to("/dev/zero"),
    "fifo": lambda t, link: (os.mkfifo(t.path / "fifo"), link.symlink_to("../fifo")),
    "plain directory": lambda t, link: link.mkdir(),
    "copy of other content": lambda t, link: link.write_bytes((t.path / "canary").read_bytes()),
}


@pytest.mark.parametrize("attack", HOSTILE)
@pytest.mark.parametrize("verify", ["first-use", "size", "full"])
def test_hostile_links_are_refused(tiny_set: TinySet, attack: str, verify: str) -> None:
    canary = tiny_set.path / "canary"
    raw = (tiny_set.path / "shard-00000.npy").read_bytes()
    canary.write_bytes(raw[:128] + raw[128:][::-1])
    before = canary.read_bytes()
    view = _linked(tiny_set)
    HOSTILE[attack](tiny_set, view / "shard-00000.npy")
    if attack == "copy of other content" and verify == "size":
        return  # plain files are trusted by size there, as documented
    with pytest.raises(LmError, match=r"shard-00000\.npy") as caught:
        TokenStream.open(view, verify=verify).read(0, 10)  # type: ignore[arg-type]
    assert caught.value.code == Exit.DATA
    assert canary.read_bytes() == before


@pytest.mark.parametrize("how", ["link", "copy", "link to a copy elsewhere", "nothing, found in the set"])
def test_content_is_what_a_link_is_trusted_for(tiny_set: TinySet, tmp_path: Path, how: str) -> None:
    view = _linked(tiny_set)
    first, elsewhere = view / "shard-00000.npy", tmp_path / "elsewhere"
    raw = (tiny_set.path / "shard-00000.npy").read_bytes()
    if how == "link":
        first.symlink_to("../shard-00000.npy")
    elif how == "copy":
        first.write_bytes(raw)
    elif how == "link to a copy elsewhere":
        elsewhere.write_bytes(raw)
        first.symlink_to(elsewhere)
    stream = TokenStream.open(view, verify="size")
    np.testing.assert_array_equal(stream.read(0, len(stream)), tiny_set.stream)


@pytest.mark.parametrize(
    "name", ["../shard-00000", "/etc/passwd", "..", ".", "", ".hidden", "a/b", "a\0b", "x\n", "a" * 201, "shard-\uff10"]
)
def test_hostile_names_are_refused(tiny_set: TinySet, name: str) -> None:
    manifest = tiny_set.manifest
    manifest["shards"][0]["name"] = name
    write_manifest(tiny_set.path, manifest)
    with pytest.raises(LmError, match="plain file name") as caught:
        TokenStream.open(tiny_set.path)
    assert caught.value.code == Exit.DATA


def _read_in_child(stream: TokenStream, queue: object) -> None:
    queue.put(stream.read(10, 9000).tobytes())  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_usable_in_other_processes(tiny_set: TinySet, method: str) -> None:
    context = multiprocessing.get_context(method)
    stream = TokenStream.open(tiny_set.path)
    stream.read(0, 5)
    queue = context.SimpleQueue()
    child = context.Process(target=_read_in_child, args=(stream, queue))
    child.start()
    assert queue.get() == tiny_set.stream[10:9000].tobytes()
    child.join()


def test_pickled_arrays_and_sets_are_equal(tiny_set: TinySet) -> None:
    for stream in (TokenStream.open(tiny_set.path), TokenStream.from_array(tiny_set.stream)):
        again = pickle.loads(pickle.dumps(stream))
        assert again.dataset_id == stream.dataset_id
        np.testing.assert_array_equal(again.read(0, len(stream)), tiny_set.stream)


def test_threads_share_a_stream(tiny_set: TinySet, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer kept descriptors than shards, so that they are closed and opened under the readers."""
    monkeypatch.setattr("lmcore.data.stream._MAX_OPEN", 2)
    stream, wrong = TokenStream.open(tiny_set.path), []

    def work(seed: int) -> None:
        generator = np.random.default_rng(seed)
        for _ in range(60):
            starts = generator.integers(0, len(stream) - 300, 8)
            expected = np.stack([tiny_set.stream[s : s + 300] for s in starts])
            if not np.array_equal(stream.windows(starts, 300), expected):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors in /proc")
def test_descriptors_are_closed(tiny_set: TinySet) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = count()
    for _ in range(20):
        TokenStream.open(tiny_set.path).read(0, 100)
    assert count() == before


def test_a_set_opened_before_it_was_replaced_is_still_read(tiny_set: TinySet) -> None:
    stream = TokenStream.open(tiny_set.path)
    for file in tiny_set.path.glob("*.npy"):
        data = file.read_bytes()
        file.unlink()
        file.write_bytes(npy_bytes(np.zeros((1, 8), np.uint16)) if len(data) > 0 else data)
    np.testing.assert_array_equal(stream.read(0, len(stream)), tiny_set.stream)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda p: None, "no such shard set"),
        (lambda p: p.mkdir(), "not a shard set"),
        (lambda p: (p.mkdir(), (p / "plan.json").write_text("{}")), "not finished"),
        (lambda p: (p.mkdir(), (p / "manifest.json").write_text("{")), "not valid JSON"),
        (lambda p: (p.mkdir(), (p / "manifest.json").write_text('{"format": "lmshards/9"}')), "lmshards/9"),
    ],
)
def test_what_is_no_set_is_said(tmp_path: Path, make: Callable[[Path], object], sentence: str) -> None:
    make(tmp_path / "x")
    with pytest.raises(LmError, match=sentence):
        TokenStream.open(tmp_path / "x")
