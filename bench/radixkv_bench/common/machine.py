"""The device that a bench runs on, and what its figures belong to."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

from radixkv_bench.common.errors import BenchError

DEVICES = ("cpu", "cuda")


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA if there is one. Raises: BenchError if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in DEVICES:
        raise BenchError(f"--device must be auto, {' or '.join(DEVICES)}, not {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise BenchError("--device cuda needs an NVIDIA GPU that torch can use, and there is none")
    return torch.device(name)


def describe(device: torch.device) -> dict[str, Any]:
    """The device, the versions, and how busy the machine was."""
    gpu = {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    versions = {name: value for name, value in environment().items() if name != "dtype"}
    return {
        **versions,
        **gpu,
        "device": device.type,
        "platform": platform.platform(),
        "load_average": psutil.getloadavg()[0],
    }


def environment() -> dict[str, Any]:
    """The machine and the versions that the figures belong to."""
    return {
        "dtype": "float32",
        "device": "cpu",
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _processor() -> str:
    """The processor's name, as the kernel gives it where there is /proc/cpuinfo."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
