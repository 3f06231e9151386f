"""The machine: which device, which arithmetic, how reproducible, and a fingerprint of it all.

Bits of a training run depend on more than the configuration: the version of torch, the CPU's instruction set, the
number of threads and the device. `fingerprint` records them in every checkpoint; a run that is continued where they
are equal gives the same bits as one that was never interrupted, and one where they differ is told so.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import torch

from lmcore.errors import LmError
from lmcore.heap import peak_resident_bytes
from lmcore.model import kernels

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def resolve_device(name: str | torch.device = "auto") -> torch.device:
    """ "auto" -> cuda, mps or cpu, in that order. LmError (2) for a device that is not there."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    name = str(name)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise LmError(f"{name!r} is not a device.", hint="Use cpu, cuda, cuda:0, mps or auto.") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise LmError(f"{name}: this machine has {count} CUDA devices.", hint="Use --device cpu or auto.")
        return torch.device("cuda", device.index or 0)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise LmError("mps: not available on this machine.", hint="Use --device cpu or auto.")
    if device.type not in ("cpu", "mps"):
        raise LmError(f"{name!r} is not a device that this program knows.", hint="Use cpu, cuda, mps or auto.")
    return device


def resolve_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """(compute dtype, the reason in a few words). "auto" takes bf16 where the device is fast at it, else fp32."""
    if name != "auto":
        dtype = DTYPES[name]
        if dtype is torch.float16 and device.type == "cpu":
            raise LmError(
                "fp16 on a CPU is many times slower than fp32.", hint="Use --dtype auto, which takes the fastest."
            )
        return dtype, "as train.dtype says"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= (8, 0):
            return torch.bfloat16, f"the GPU computes bf16 natively (sm_{capability[0]}{capability[1]})"
        return torch.float32, f"the GPU has no fast bf16 (sm_{capability[0]}{capability[1]})"
    if device.type == "cpu":
        why = cpu_bf16()
        return (torch.bfloat16, f"the CPU has {why}") if why else (torch.float32, "the CPU has no fast bf16")
    return torch.float32, f"the default on {device.type}"


def cpu_bf16() -> str:
    """The instruction set that makes bf16 fast on this CPU, "" if there is none."""
    for name, probe in (("AMX", "_is_amx_tile_supported"), ("AVX-512 BF16", "_is_avx512_bf16_supported")):
        if getattr(torch.cpu, probe, lambda: False)():
            return name
    return ""


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def fingerprint(device: torch.device) -> dict[str, Any]:
    """What the bits of a run depend on beside its configuration."""
    return {
        "torch": torch.__version__,
        "device": device_name(device) if device.type == "cuda" else device.type,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    } | _kernel_versions(device)


def _kernel_versions(device: torch.device) -> dict[str, str]:
    found = {}
    if device.type in kernels.DEVICES:
        import triton

        found["triton"] = triton.__version__
    if kernels.FLASH_ATTENTION:
        found["flash_attention"] = version("flash-attn-4")
    return found


@contextlib.contextmanager
def numerics(*, deterministic: bool, tf32: bool, threads: int | None) -> Iterator[None]:
    """Set torch's process-wide switches for a run and put them back afterwards.

    LmError (2) when an operation has no deterministic form on this device, or a package refuses to compute on it.
    """
    before = (
        torch.get_deterministic_debug_mode(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        torch.get_float32_matmul_precision(),
        torch.get_num_threads(),
    )
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # As use_deterministic_algorithms(True), which loads the compiler to tell it; compile_step does that.
        torch.set_deterministic_debug_mode("error")
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    except RuntimeError as error:
        if "incorrect results" in str(error):  # fla, of versions of Triton whose code it knows to be wrong
            raise LmError(str(error), hint="Without its kernels: --set model.mamba.kernels=torch") from error
        if "does not have a deterministic implementation" not in str(error):
            raise
        raise LmError(
            f"not reproducible on this device: {str(error).partition(',')[0]}.",
            hint="Without the promise of equal bits after an interruption it runs: --set train.deterministic=false",
        ) from error
    finally:
        torch.set_deterministic_debug_mode(before[0])
        if compiler := sys.modules.get("torch._inductor.config"):
            compiler.deterministic = before[0] > 0  # type: ignore[attr-defined]
        torch.utils.deterministic.fill_uninitialized_memory = before[1]  # type: ignore[attr-defined]
        torch.set_float32_matmul_precision(before[2])
        torch.set_num_threads(before[3])


@contextlib.contextmanager
def flash_attention(which: str, device: torch.device, head_dim: int) -> Iterator[None]:
    """Whose kernels attention has on a CUDA device meanwhile: those of "torch", or "fa4", FlashAttention-4.

    LmError (2) when the package is not there or does not know this device or heads of this size.
    """
    if which == "torch" or device.type != "cuda":
        yield
        return
    try:
        x = torch.zeros(1, 1, 128, head_dim, dtype=torch.bfloat16, device=device, requires_grad=True)
        kernels.flash_attention(x, x, x).sum().backward()
    except Exception as error:  # it compiles on first use, and may fail in any of its parts
        reason = str(error).strip().partition("\n")[0]
        raise LmError(
            f"train.flash_attention=fa4 does not work here: {type(error).__name__}: {reason}",
            hint="It needs flash-attn-4 and a Hopper or Blackwell GPU. train.flash_attention=torch works everywhere.",
        ) from error
    kernels.FLASH_ATTENTION = True
    try:
        yield
    finally:
        kernels.FLASH_ATTENTION = False


def peak_memory(device: torch.device) -> int:
    """Largest memory so far in bytes: of the device, or the resident set of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_bytes()
