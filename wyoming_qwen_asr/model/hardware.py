"""What `auto` means on this machine. Each function returns its pick and the reason, for the log."""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CheckpointError

if TYPE_CHECKING:
    import torch

LARGE_MODEL_BYTES = 8 * 10**9
"""GPU memory from which the 1.7B is picked: 4.7 GB of weights, 1.8 GB of KV for 16 sessions, and room to work."""

SPINS = 3000
"""Some 30 µs (libgomp counts 100,000 for a millisecond)."""

_CPUINFO = Path("/proc/cpuinfo")
_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")
_CPUS = Path("/sys/devices/system/cpu")


def pick_device(device: str) -> tuple["torch.device", str]:
    """`auto`, `cpu`, `cuda` or `cuda:N`. Raises CheckpointError when the device asked for is not there."""
    import torch

    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", 0), f"a GPU is there ({torch.cuda.get_device_name(0)})"
        return torch.device("cpu"), "no CUDA GPU is visible"
    picked = torch.device(device)
    if picked.type == "cuda" and (picked.index or 0) >= torch.cuda.device_count():
        raise CheckpointError(f"there is no device {device!r}: {torch.cuda.device_count()} CUDA GPUs are visible")
    return picked, "as set"


def pick_model(device: str) -> tuple[str, str]:
    """The size of Qwen3-ASR for this machine."""
    if device == "cpu":
        return "0.6b", "the larger one is too slow on a CPU"
    import torch

    picked, _ = pick_device(device)
    if picked.type == "cpu":
        return "0.6b", "no CUDA GPU is visible, and the larger one is too slow on a CPU"
    memory = torch.cuda.get_device_properties(picked).total_memory
    if memory < LARGE_MODEL_BYTES:
        return "0.6b", f"the GPU has {memory / 1e9:.1f} GB, the larger one wants {LARGE_MODEL_BYTES / 1e9:.1f}"
    return "1.7b", f"the GPU has {memory / 1e9:.1f} GB"


def pick_dtype(dtype: str, device: "torch.device") -> tuple["torch.dtype", str]:
    """bfloat16 where the hardware computes in it; emulated it would be slower than what it replaces. `int8` is `auto`:
    that of the weights which int8.py does not replace. Raises CheckpointError for int8 on a GPU."""
    import torch

    if dtype == "int8" and device.type != "cpu":
        raise CheckpointError(f"int8 is for CPUs, and the device is {device}: take another dtype, or the device cpu")
    if dtype not in ("auto", "int8"):
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype], "as set"
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return torch.bfloat16, "the GPU computes in it"
        return torch.float16, "the GPU is older than bfloat16"
    if found := _bf16_flags(_CPUINFO):
        return torch.bfloat16, f"the CPU has {found}"
    return torch.float32, "the CPU has no bfloat16 arithmetic"


def _bf16_flags(cpuinfo: Path) -> str:
    """The instruction set for bfloat16 that the kernel lists: x86 AVX-512/AMX, or Arm's BF16 extension."""
    for line in _lines(cpuinfo):
        key, _, flags = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return " ".join(f for f in ("amx_bf16", "avx512_bf16", "bf16") if f in flags.split())
    return ""


def spin_briefly() -> None:
    """Have OpenMP's threads sleep soon when they wait for one another, unless the environment says something else. To
    be called before torch is imported.

    GNU's spin for milliseconds, and whoever else needs the CPU waits for that, a thread they wait for among them: with
    one other busy process on two cores a decode step took five times as long, with this twice. It is long enough for
    the pause between two operations, so that nothing is lost on an idle machine. Where there are more of these threads
    than CPUs they sleep at once, and a step takes a third longer: hence one thread for all that the network does.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))


def pick_threads(threads: int) -> tuple[int, str]:
    """As many as physical cores, for two threads of one core share its arithmetic, and within the container's quota:
    threads beyond it are stopped for most of each period."""
    if threads:
        return threads, "as set"
    cores = _physical_cores(_CPUS, os.sched_getaffinity(0))
    quota = _quota(_CPU_MAX)
    if quota is not None and quota < cores:
        return max(1, int(quota)), f"the cgroup quota is {quota:g} CPUs"
    return cores, "the physical cores"


def _physical_cores(cpus: Path, usable: Iterable[int]) -> int:
    """How many different cores the usable CPUs are on; every CPU counts where the kernel does not say."""
    cores = set()
    for cpu in usable:
        siblings = _lines(cpus / f"cpu{cpu}" / "topology" / "thread_siblings_list")
        cores.add(siblings[0] if siblings else str(cpu))
    return max(1, len(cores))


def _quota(cpu_max: Path) -> float | None:
    """CPUs' worth of time in cgroup v2's cpu.max, "QUOTA PERIOD" in microseconds; None for "max" or no such file."""
    found = re.fullmatch(r"(\d+) ([1-9]\d*)", " ".join(_lines(cpu_max)))
    return int(found[1]) / int(found[2]) if found else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
