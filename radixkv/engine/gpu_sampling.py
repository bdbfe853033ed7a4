"""Sampling on the GPU: one call for the whole batch, of which only the ids come back."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from radixkv.engine.sampling import SamplingParams
from radixkv.kernels import flashinfer_paged

MIN_TEMPERATURE = 1e-3  # below it the float32 of the kernels is coarse; `Sampler` has float64


class SamplingKernels(Protocol):
    """`radixkv.kernels.flashinfer_paged`, or what computes the same."""

    def softmax(self, logits: Tensor, temperatures: Tensor) -> Tensor:
        """Float32 probabilities of logits [rows, vocab_size], each row at its temperature (float32 [rows])."""
        ...

    def draw(
        self,
        probabilities: Tensor,
        *,
        top_k: Tensor | int | None,
        top_p: Tensor | None,
        min_p: Tensor | None,
        generator: torch.Generator,
    ) -> Tensor:
        """One id a row, int32 [rows], after top_k (int32 [rows] or one for all), top_p and min_p (float32 [rows])."""
        ...


def sampling_kernels() -> ModuleType | None:
    """FlashInfer's sampling, which has `softmax` and `draw`; None where FlashInfer is not installed."""
    try:
        flashinfer_paged.load()
    except ImportError:
        return None
    return flashinfer_paged


class RowSampling(NamedTuple):
    """How to choose a row's token: the likeliest if there is no generator."""

    params: SamplingParams
    generator: torch.Generator | None

    @property
    def is_drawn_on_device(self) -> bool:
        """Whether the kernels may draw it: nobody asked for a repeatable draw, and float32 suffices."""
        return self.generator is not None and self.params.seed is None and self.params.temperature >= MIN_TEMPERATURE


class PendingTokens:
    """Tokens that the device is choosing. The next step may take `ids` as they lie there; `read` waits for them.

    Attributes:
        ids: int64 [rows], on the device.
    """

    def __init__(self, ids: Tensor, finite: Tensor) -> None:
        self.ids = ids
        on_device = torch.stack([ids, finite.long()])
        self._copied: torch.cuda.Event | None = None
        if on_device.is_cuda:
            self._values = torch.empty(on_device.shape, dtype=torch.int64, device="cpu", pin_memory=True)
            self._values.copy_(on_device, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            self._values = on_device

    def read(self) -> tuple[list[int], list[bool]]:
        """A token for each row, and whether the row can be sampled from.

        It cannot if it holds NaN or plus infinity, or nothing above minus infinity; its token means nothing then.
        """
        if self._copied is not None:
            self._copied.synchronize()  # not the stream: the next step may be running in it
        token_ids, finite = self._values.tolist()
        return token_ids, [bool(flag) for flag in finite]


class DeviceSampler:
    """Chooses the tokens of a batch on the device where the logits are.

    Rows without a seed of their own draw from one generator, so what they draw depends on the batches they were in. The
    filters are those of `filtered_probabilities`, in its order, up to rounding and to tokens of equal probability at
    the edge of top_k. Rows with a seed are not drawn here: `Sampler` gives them the same everywhere.

    Args:
        kernels: None where there are none; nothing is drawn then.
        seed: of the generator.
    """

    def __init__(self, kernels: SamplingKernels | None, device: torch.device, seed: int) -> None:
        self._kernels = kernels
        self._generator = torch.Generator(device).manual_seed(seed)
        self._planned: tuple[tuple[int, SamplingParams], ...] = ()
        self._filters: _Filters | None = None

    def draws(self, row: RowSampling) -> bool:
        """Whether `start` draws that row; it takes the likeliest token otherwise."""
        return self._kernels is not None and row.is_drawn_on_device

    def start(self, logits: Tensor, rows: Sequence[RowSampling]) -> PendingTokens:
        """Choose a token for each row of `logits` [rows, vocab_size], without waiting for it."""
        best = logits.max(dim=-1)
        ids, finite = best.indices, torch.isfinite(best.values)
        drawn = tuple((i, row.params) for i, row in enumerate(rows) if self.draws(row))
        if drawn:
            ids = self._draw(logits, ids, finite, drawn)
        return PendingTokens(ids, finite)

    def _draw(
        self, logits: Tensor, ids: Tensor, finite: Tensor, drawn: tuple[tuple[int, SamplingParams], ...]
    ) -> Tensor:
        """`ids` with those of the `drawn` rows drawn."""
        kernels = self._kernels
        assert kernels is not None
        if self._filters is None or drawn != self._planned:  # the same from step to step, mostly
            self._planned, self._filters = drawn, _filters(drawn, logits.shape[1], logits.device)
        filters = self._filters
        if len(drawn) < len(logits):
            logits, finite = logits.index_select(0, filters.rows), finite.index_select(0, filters.rows)
        logits = logits.where(finite[:, None], 0.0)  # the kernels are not made for NaN
        probabilities = kernels.softmax(logits, filters.temperatures)
        found = kernels.draw(
            probabilities,
            top_k=filters.top_k,
            top_p=filters.top_p,
            min_p=filters.min_p,
            generator=self._generator,
        )
        return ids.index_copy(0, filters.rows, found.to(ids.dtype))


class _Filters(NamedTuple):
    """What the drawn rows ask, on the device; None where no row asks it."""

    rows: Tensor  # int64 [drawn], places in the batch
    temperatures: Tensor
    top_k: Tensor | int | None
    top_p: Tensor | None
    min_p: Tensor | None


def _filters(drawn: Sequence[tuple[int, SamplingParams]], vocab_size: int, device: torch.device) -> _Filters:
    def on_device(values: Sequence[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device="cpu").to(device, non_blocking=True)

    all_params = [params for _, params in drawn]
    top_k = [min(params.top_k or vocab_size, vocab_size) for params in all_params]
    top_p = [params.top_p for params in all_params]
    min_p = [params.min_p for params in all_params]
    one_top_k = top_k[0] if len(set(top_k)) == 1 else None
    asks_top_k = any(k < vocab_size for k in top_k)
    return _Filters(
        rows=on_device([row for row, _ in drawn], torch.int64),
        temperatures=on_device([params.temperature for params in all_params], torch.float32),
        top_k=(one_top_k or on_device(top_k, torch.int32)) if asks_top_k else None,
        top_p=on_device(top_p, torch.float32) if any(p < 1 for p in top_p) else None,
        min_p=on_device(min_p, torch.float32) if any(p > 0 for p in min_p) else None,
    )
