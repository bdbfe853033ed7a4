"""What the machine can do: bytes that it reads a second, and products of matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from radixkv_bench.common.device_timing import Call

READ_BYTES = {"cpu": 1 << 28, "cuda": 1 << 32}  # far more than caches hold
ROWS = 64
GEMM_SIZE = {"cpu": 1024, "cuda": 4096}
GEMMS = {"float32 GEMM": torch.float32, "bfloat16 GEMM": torch.bfloat16}
READS = ("norm", "sum", "matrix times vector")


@dataclass(frozen=True, slots=True)
class Speeds:
    """What probes measured: gigabytes read, and billions of floating-point operations, a second."""

    read_gb_s: float
    gemm_gflop_s: float
    gemm_bf16_gflop_s: float


class Probes:
    """Calls to be timed beside whatever is measured against the machine; nothing is written but the results.

    The read-only probe is the fastest of several reductions over one buffer: none is the fastest everywhere.
    """

    def __init__(
        self, device: torch.device, *, read_bytes: int | None = None, gemm_size: int | None = None, gemms: bool = True
    ) -> None:
        self._num_bytes = read_bytes or READ_BYTES[device.type]
        size = gemm_size or GEMM_SIZE[device.type]
        self._flops = 2 * size**3
        self._values = torch.ones(self._num_bytes // 4, device=device)
        self._matrices = {name: _square(size, dtype, device) for name, dtype in GEMMS.items()} if gemms else {}

    @property
    def calls(self) -> dict[str, Call]:
        """What is to be timed, by name."""
        values, rows = self._values, self._values.view(ROWS, -1)
        reads: tuple[Call, ...] = (
            lambda: torch.linalg.vector_norm(values),
            lambda: values.sum(),
            lambda: torch.mv(rows, rows[0]),
        )
        return {
            **dict(zip(READS, reads, strict=True)),
            **{name: lambda x=x: torch.mm(x, x) for name, x in self._matrices.items()},  # type: ignore[misc]
        }

    def read_gb_s(self, times: Mapping[str, Sequence[float]]) -> float:
        """From the seconds of each call, round by round: the fastest read of a round, the median over the rounds."""
        seconds = [min(of_round) for of_round in zip(*(times[name] for name in READS), strict=True)]
        return float(self._num_bytes / median(seconds) / 1e9)

    def speeds(self, times: Mapping[str, Sequence[float]]) -> Speeds:
        """All of it, likewise."""
        gemms = (self._flops / median(times[name]) / 1e9 for name in GEMMS)
        return Speeds(self.read_gb_s(times), *gemms)


def _square(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(size, size, generator=generator, device=device).to(dtype)
