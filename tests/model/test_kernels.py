"""The kernels for CUDA devices without one: their arithmetic in Triton's interpreter, their code from its compiler.

On a device tests/model/test_cuda.py runs them for real.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="`pip install triton` (Linux, a gigabyte) tests the kernels without a GPU")


def test_their_arithmetic_equals_float64_in_the_interpreter():
    tests = Path(__file__).with_name("interpreted_kernels.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)]
    process = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"})
    assert process.returncode == 0, process.stdout + process.stderr
    assert "13 passed" in process.stdout


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lmcore.model import triton_kernels as t

def code(kernel, types, constants, warps):
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(n),): v for n, v in constants.items()})
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm["ptx"]
    assert "atom" not in ptx and ".local" not in ptx, "additions in any order, or registers that spill"

for z in ("*bf16", "*fp32"):
    softmax = {"vocab_size": 50257, "width": 50304, "ignore": -100, "gradients": True, "block": t.SOFTMAX_BLOCK}
    code(t._softmax_gradient, {"z_rows": z, "targets": "*i64", "losses": "*fp32"}, softmax, t.SOFTMAX_WARPS)
    gate = {"x": z, "g": z, "out": z, "product": z, "width": "i32"}
    code(t._swiglu, gate, {"block": t.GATE_BLOCK}, t.GATE_WARPS)
    code(t._swiglu_back, gate, {"block": t.GATE_BLOCK}, t.GATE_WARPS)
    for size in (64, 128):
        heads = {"query_heads": 12, "kv_heads": 4, "half": size // 2, "block": t.ROTATE_TOKENS}
        types = dict.fromkeys("x cos sin q k gq gk gv out".split(), z) | {"gains": "*fp32", "gain_parts": "*fp32"}
        types |= {"eps": "fp32"} | dict.fromkeys("tokens steps width angle_stride".split(), "i32")
        types |= {f"g{n}_{d}": "i32" for n in "qkv" for d in "bht"}
        code(t._norm_rotate, types, heads, t.ROTATE_WARPS)
        code(t._norm_rotate_back, types, heads, t.ROTATE_WARPS)
"""


def test_the_kernels_compile_for_a_hopper_gpu_without_atomic_additions():
    """The interpreter does not check types; the compiler needs no GPU for it."""
    process = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
