"""Linear layers of a decoding model on the CPU, by our own kernel where few tokens come at a time."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from radixkv.kernels import numba_arguments, numba_linear, openmp
from radixkv.kernels.compiling import log_if_slow
from radixkv.kernels.numba_modes import mode_for

STEP_BYTES = 64
MAX_TOKENS = {  # more are faster in torch's dense products, as measured
    "f32": 64,
    "bf16dot": 32,
    "bf16": 4 if numba_linear.has_wide_registers() else 64,
    "f16": 64,
}
MIN_BYTES_PER_THREAD = 1 << 16  # below it waking a thread costs more than it reads
WARM_UP_TOKENS = (1, 2, 4, 8)  # one for each tile

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


class SkinnyLinear(nn.Linear):
    """An `nn.Linear` on the CPU that reads each weight once, in order, when it is given few tokens.

    Made of a plain one by `speed_up_linears`, which changes its class and nothing else.
    """

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        num_tokens = input.numel() // weight.shape[1]
        mode = linear_mode(weight)
        if mode is None or not 0 < num_tokens <= MAX_TOKENS[mode] or input.dtype != weight.dtype:
            return super().forward(input)
        if torch.is_grad_enabled() and (weight.requires_grad or input.requires_grad):
            return super().forward(input)
        return _multiply(input.contiguous(), weight, self.bias, mode, num_tokens)


def speed_up_linears(model: nn.Module) -> None:
    """Let the linear layers of `model` use our kernel where they can: those on the CPU, of plain classes and layouts.

    The kernels for them are compiled, or loaded from disk.
    """
    modes = set()
    for module in model.modules():
        if type(module) is nn.Linear and linear_mode(module.weight) is not None:
            module.__class__ = SkinnyLinear
            modes.add(linear_mode(module.weight))
    with log_if_slow("the kernels of linear layers"):
        for mode in sorted(mode for mode in modes if mode is not None):
            for num_tokens in WARM_UP_TOKENS:
                if num_tokens <= MAX_TOKENS[mode]:
                    numba_linear.linear_worker(mode, num_tokens)


def linear_mode(weight: Tensor) -> str | None:
    """How the kernel reads `weight`; None if it cannot."""
    fits = (
        weight.device.type == "cpu"
        and weight.is_contiguous()
        and weight.shape[1] * weight.element_size() % STEP_BYTES == 0
        and weight.shape[0] >= numba_linear.MIN_ROWS
    )
    if not fits:
        return None
    name = _DTYPES.get(weight.dtype)
    return None if name is None else mode_for(name)


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, mode: str, num_tokens: int) -> Tensor:
    out_features, in_features = weight.shape
    out = x.new_empty(*x.shape[:-1], out_features)
    wide_bias = None if bias is None else bias.float().contiguous()
    counter = np.zeros(1, np.int64)
    arguments = numba_arguments.LINEAR.fill(
        counter=counter.ctypes.data,
        weight=weight.data_ptr(),
        input=x.data_ptr(),
        bias=0 if wide_bias is None else wide_bias.data_ptr(),
        output=out.data_ptr(),
        num_tokens=num_tokens,
        out_features=out_features,
        row_bytes=in_features * weight.element_size(),
    )
    num_threads = min(torch.get_num_threads(), 1 + weight.nbytes // MIN_BYTES_PER_THREAD)
    openmp.run(numba_linear.linear_worker(mode, num_tokens), arguments.ctypes.data, num_threads)
    return out
