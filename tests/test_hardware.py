"""What `auto` picks, on machines made of files and of pretended GPUs."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from wyoming_qwen_asr.errors import CheckpointError
from wyoming_qwen_asr.model import hardware
from wyoming_qwen_asr.model.hardware import pick_device, pick_dtype, pick_model, pick_threads, spin_briefly

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of a machine, all of them missing: cpuinfo, cpu.max, and cpus."""
    for constant, name in (("_CPUINFO", "cpuinfo"), ("_CPU_MAX", "cpu.max"), ("_CPUS", "cpus")):
        monkeypatch.setattr(hardware, constant, tmp_path / name)
    return tmp_path


def gpus(monkeypatch: pytest.MonkeyPatch, *memory: float, capability: tuple[int, int] = (8, 0)) -> None:
    """Pretend that there are GPUs with so many GB."""
    for name, answer in {
        "is_available": lambda: bool(memory),
        "device_count": lambda: len(memory),
        "get_device_name": lambda device: f"GPU {device}",
        "get_device_properties": lambda device: SimpleNamespace(total_memory=int(memory[device.index or 0] * 1e9)),
        "get_device_capability": lambda device: capability,
    }.items():
        monkeypatch.setattr(torch.cuda, name, answer)


# --- threads -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("siblings", "usable", "cores"),
    [
        (["0", "1", "2", "3"], {0, 1, 2, 3}, 4),  # one thread per core
        (["0-1", "0-1", "2-3", "2-3"], {0, 1, 2, 3}, 2),  # two
        (["0,4", "1,5", "2,6", "3,7", "0,4", "1,5", "2,6", "3,7"], set(range(8)), 4),
        (["0,4", "1,5", "2,6", "3,7", "0,4", "1,5", "2,6", "3,7"], {0, 4, 5}, 2),  # bound to three CPUs on two cores
        (["0-1", "0-1", "2", "3"], {0, 1, 2, 3}, 3),  # large and small cores
        ([], {0, 1, 5}, 3),  # a kernel that does not say
        ([], set(), 1),
    ],
)
def test_physical_cores(
    siblings: list[str], usable: set[int], cores: int, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cpu, together in enumerate(siblings):
        file = machine / f"cpus/cpu{cpu}/topology/thread_siblings_list"
        file.parent.mkdir(parents=True)
        file.write_text(together + "\n")
    monkeypatch.setattr("os.sched_getaffinity", lambda process: usable)
    assert pick_threads(0) == (cores, "the physical cores")
    assert pick_threads(7) == (7, "as set")


@pytest.mark.parametrize(
    ("cpu_max", "threads", "reason"),
    [
        (None, 4, "the physical cores"),
        ("max 100000\n", 4, "the physical cores"),
        ("800000 100000\n", 4, "the physical cores"),
        ("400000 100000\n", 4, "the physical cores"),
        ("399999 100000\n", 3, "the cgroup quota is 3.99999 CPUs"),
        ("200000 100000\n", 2, "the cgroup quota is 2 CPUs"),
        ("75000 50000\n", 1, "the cgroup quota is 1.5 CPUs"),
        ("20000 100000\n", 1, "the cgroup quota is 0.2 CPUs"),
        *(
            (broken, 4, "the physical cores")
            for broken in ("", "\n", "200000", "x y", "200000 0", "-1 100000", "1 2 3")
        ),
    ],
)
def test_quota(cpu_max: str | None, threads: int, reason: str, machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more threads than the container may use at once."""
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1, 2, 3})
    if cpu_max is not None:
        (machine / "cpu.max").write_text(cpu_max)
    assert pick_threads(0) == (threads, reason)
    assert pick_threads(16) == (16, "as set")


def test_threads_of_this_machine() -> None:
    threads, _ = pick_threads(0)
    assert 1 <= threads <= 1024


# --- dtype ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cpuinfo", "dtype", "reason"),
    [
        (None, torch.float32, "the CPU has no bfloat16 arithmetic"),
        ("", torch.float32, "the CPU has no bfloat16 arithmetic"),
        ("flags\t\t: fpu avx2 avx512f\n", torch.float32, "the CPU has no bfloat16 arithmetic"),
        ("model name\t: bf16\nflags\t\t: fpu\n", torch.float32, "the CPU has no bfloat16 arithmetic"),
        ("flags\t\t: fpu not_avx512_bf16\n", torch.float32, "the CPU has no bfloat16 arithmetic"),
        ("processor\t: 0\nflags\t\t: fpu avx512_bf16 avx2\n", torch.bfloat16, "the CPU has avx512_bf16"),
        ("flags\t\t: avx512_bf16 amx_bf16 amx_tile\n", torch.bfloat16, "the CPU has amx_bf16 avx512_bf16"),
        ("Features\t: fp asimd i8mm bf16\n", torch.bfloat16, "the CPU has bf16"),
        ("Features\t: fp asimd\n", torch.float32, "the CPU has no bfloat16 arithmetic"),
    ],
)
def test_dtype_on_a_cpu(cpuinfo: str | None, dtype: torch.dtype, reason: str, machine: Path) -> None:
    """bfloat16 where x86 or Arm computes in it."""
    if cpuinfo is not None:
        (machine / "cpuinfo").write_text(cpuinfo)
    assert pick_dtype("auto", CPU) == (dtype, reason)


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        *(((major, minor), torch.float16) for major, minor in ((6, 1), (7, 0), (7, 5))),
        *(((major, minor), torch.bfloat16) for major, minor in ((8, 0), (8, 9), (10, 0))),
    ],
)
def test_dtype_on_a_gpu(capability: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 24, capability=capability)
    assert pick_dtype("auto", CUDA)[0] == dtype


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("device", [CPU, CUDA])
def test_dtype_as_set(dtype: str, device: torch.device, machine: Path) -> None:
    assert pick_dtype(dtype, device) == (getattr(torch, dtype), "as set")


@pytest.mark.parametrize(("flags", "dtype"), [("avx2 avx512_bf16", torch.bfloat16), ("avx2", torch.float32)])
def test_int8_leaves_the_other_weights_to_auto(flags: str, dtype: torch.dtype, machine: Path) -> None:
    (machine / "cpuinfo").write_text(f"flags\t\t: {flags}\n")
    assert pick_dtype("int8", CPU) == pick_dtype("auto", CPU)
    assert pick_dtype("int8", CPU)[0] == dtype


def test_int8_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 24)
    with pytest.raises(CheckpointError, match="int8 is for CPUs, and the device is cuda:0: take another dtype"):
        pick_dtype("int8", CUDA)


# --- device and model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("memory", "device", "picked", "model"),
    [
        ([], "auto", "cpu", "0.6b"),
        ([], "cpu", "cpu", "0.6b"),
        ([24], "cpu", "cpu", "0.6b"),
        ([24], "auto", "cuda:0", "1.7b"),
        ([24], "cuda", "cuda", "1.7b"),
        ([24], "cuda:0", "cuda:0", "1.7b"),
        ([8], "auto", "cuda:0", "1.7b"),
        ([7.9], "auto", "cuda:0", "0.6b"),
        ([4, 24], "auto", "cuda:0", "0.6b"),
        ([4, 24], "cuda:1", "cuda:1", "1.7b"),
        ([24, 4], "cuda:1", "cuda:1", "0.6b"),
    ],
)
def test_device_and_model(
    memory: list[float], device: str, picked: str, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch, *memory)
    assert pick_device(device)[0] == torch.device(picked)
    assert pick_model(device)[0] == model


@pytest.mark.parametrize(("memory", "device"), [([], "cuda"), ([], "cuda:0"), ([24], "cuda:1"), ([24, 24], "cuda:9")])
def test_a_gpu_that_is_not_there(memory: list[float], device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, *memory)
    for pick in (pick_device, pick_model):
        with pytest.raises(
            CheckpointError, match=f"there is no device '{device}': {len(memory)} CUDA GPUs are visible"
        ):
            pick(device)


def test_reasons_are_for_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 7.9, 24)
    assert pick_device("auto")[1] == "a GPU is there (GPU 0)"
    assert pick_device("cuda:1")[1] == "as set"
    assert pick_model("cuda:0")[1] == "the GPU has 7.9 GB, the larger one wants 8.0"
    assert pick_model("cuda:1")[1] == "the GPU has 24.0 GB"


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, str(hardware.SPINS)),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "passive"}, None),
    ],
)
def test_threads_spin_briefly(given: dict[str, str], found: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the environment says something else."""
    monkeypatch.setattr(os, "environ", dict(given))
    spin_briefly()
    assert os.environ == given | ({} if found is None else {"GOMP_SPINCOUNT": found})
