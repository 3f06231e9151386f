"""A clock that lies and a memory that is full: artefacts do not know the time, and a run continues."""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from small_runs import TINY, curve, hashes

from lmcore.config import dump_yaml, merge

CLOCKS = ("time", "seconds", "created_by", "self_sha256")
"""Names in JSON that hold what a clock said, or the hash of a file that does."""
ROOT = Path(__file__).parents[2]

CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>
/* The clock on the wall jumps by ten years, forwards and backwards, whenever it is read. */
static long jump(void) { static int n; return (__sync_fetch_and_add(&n, 1) % 2 ? 1L : -1L) * 315360000L; }
int clock_gettime(clockid_t id, struct timespec *t) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int status = real(id, t);
    if (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE) t->tv_sec += jump();
    return status;
}
int gettimeofday(struct timeval *t, void *zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    t->tv_sec = now.tv_sec; t->tv_usec = now.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}
"""


def lm(*arguments, cwd=None, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "lmcore", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
    )


def finished(process):
    _, said = process.communicate(timeout=200)
    assert process.returncode == 0, said


def tree(root):
    """Every file by its relative name; what is a time or a duration for people is left out of JSON."""

    def timeless(value):
        if isinstance(value, dict):
            return {k: timeless(v) for k, v in value.items() if k not in CLOCKS}
        return [timeless(v) for v in value] if isinstance(value, list) else value

    found = {}
    for path in sorted(root.rglob("*")):
        if not path.is_file() or path.name == ".lock":
            continue
        raw = path.read_bytes()
        if path.suffix == ".jsonl":
            raw = [timeless(json.loads(line)) for line in raw.splitlines()]
        elif path.name == "manifest.json":
            raw = timeless(json.loads(raw))
        found[str(path.relative_to(root))] = raw
    return found


@pytest.mark.slow
def test_a_clock_that_jumps_ten_years_changes_no_byte(tmp_path):
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs Linux and a C compiler")
    (tmp_path / "clock.c").write_text(CLOCK)
    library = tmp_path / "clock.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, tmp_path / "clock.c", "-ldl"], check=True)
    jumping = {"LD_PRELOAD": str(library)}
    code = "import time; a, b = time.time(), time.time(); print(abs(a - b) > 6e8, abs(time.monotonic()) < 6e8)"
    shown = subprocess.run([sys.executable, "-c", code], env={**os.environ, **jumping}, capture_output=True, check=True)
    assert shown.stdout.split() == [b"True", b"True"]

    (tmp_path / "text").mkdir()
    for number in range(20):
        (tmp_path / "text" / f"{number}.txt").write_text(f"Line {number} of a small corpus.\n" * 40)
    trees = []
    for name, environment in (("steady", {}), ("jumping", jumping)):
        root = tmp_path / name / "work"
        root.mkdir(parents=True)
        data = root / "data"
        (tmp_path / name / "tiny.yaml").write_text(dump_yaml(merge(TINY, {"data": {"train": "data"}})))
        for arguments in (
            ("tokenize", tmp_path / "text", "--out", data, "--tokenizer", "byte", "--seq-len", 2048, "--workers", 2),
            ("split", data, "--val-fraction", "0.2"),
        ):
            finished(lm(*arguments, **environment))
        finished(lm("train", "run", "--preset", "../tiny.yaml", cwd=root, **environment))
        trees.append(tree(root))
    assert sorted(trees[0]) == sorted(trees[1])
    assert [name for name in trees[0] if trees[0][name] != trees[1][name]] == []


HELD = """
import subprocess, sys
held = b"1" * (1 << 30)
sys.exit(subprocess.run([sys.executable, "-c", sys.argv[1]]).returncode)
"""
OWN_PEAK = "import torch; from lmcore.training.device import peak_memory; print(peak_memory(torch.device('cpu')))"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak is not handed down")
def test_the_peak_of_memory_is_not_that_of_the_process_that_started_the_run():
    """Linux hands ru_maxrss down to what a process starts."""
    done = subprocess.run(
        [sys.executable, "-c", HELD, OWN_PEAK],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert 50 << 20 < int(done.stdout) < 1 << 30


LOADER = """
import sys
import torch
import numpy as np
from lmcore.data.sampler import Sampler
from lmcore.data.stream import TokenStream
from lmcore.training.batches import Loader, Shape
from lmcore.training.device import peak_memory
stream = TokenStream.open(sys.argv[1], verify="first-use")
peaks = []
samples = Sampler(stream, context_length=1024, seed=1)
with Loader(samples, Shape(8, 1, 8), vocab_size=257, step=0, sample=0, steps=1200) as loader:
    for batch in loader:
        if batch.step in (20, 1199):
            peaks.append(peak_memory(torch.device('cpu')))
print(peaks[1] - peaks[0])
"""


def test_the_loader_reads_many_times_more_than_it_holds(tmp_path, make_set):
    """The 16 MB of a set and more pass through; the resident set grows by less than a third of that."""
    made = make_set("big", documents=[np.random.default_rng(0).bytes(8_000_000)], rows=64)
    done = subprocess.run(
        [sys.executable, "-c", LOADER, str(made.path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 5 << 20


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="needs Linux")
def test_a_run_whose_memory_runs_out_is_continued(lab):
    """The address space is frozen while a run is under way: it lives with what it has, or leaves with a sentence."""
    settings = {"train": {"steps": 120, "checkpoint": {"background": True, "every_steps": 10}}}
    config = lab.preset(settings)
    log = lab.root / "run" / "metrics.jsonl"
    process = lm("train", lab.root / "run", "--preset", config)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (log.is_file() and log.read_bytes().count(b"\n") >= 25):
        time.sleep(0.01)
    resource.prlimit(process.pid, resource.RLIMIT_AS, (1 << 20, resource.RLIM_INFINITY))
    _, said = process.communicate(timeout=120)
    assert "Traceback" not in said
    assert "bug of lmshards" not in said
    assert process.returncode in (0, 2, 74), said
    settings = ("train.steps=120", "train.checkpoint.every_steps=10")
    assert lab.run("run", *settings).step == 120
    lab.run("alone", *settings)
    assert hashes(lab.root / "run") == hashes(lab.root / "alone")
    assert curve(lab.root / "run") == curve(lab.root / "alone")
