"""The device that a bench runs on, and what its figures belong to."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import psutil
import torch

from errors import BenchError
from report import environment

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


def check_place(path: Path | None) -> None:
    """Raises: BenchError if a file to be written has no directory."""
    if path is not None and not path.resolve().parent.is_dir():
        raise BenchError(f"cannot write {path}: there is no directory {path.parent}")
