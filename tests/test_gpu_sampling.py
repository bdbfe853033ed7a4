"""Sampling of a whole batch on the device: what is drawn, by whom, how often; through a fake FlashInfer on the CPU."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fake_flashinfer
from radixkv import SamplingParams
from radixkv.engine.gpu_sampling import MIN_TEMPERATURE, DeviceSampler, RowSampling, SamplingKernels
from radixkv.engine.sampling import filtered_probabilities
from radixkv.kernels import flashinfer_paged

HAS_FLASHINFER = torch.cuda.is_available() and importlib.util.find_spec("flashinfer") is not None
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not HAS_FLASHINFER, reason="needs CUDA and flashinfer")]
NUM_DRAWS = 3000


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=ON_GPU)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "cpu":
        monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer)
    return request.param


@pytest.fixture
def sampler(device: str) -> DeviceSampler:
    return DeviceSampler(flashinfer_paged, torch.device(device), seed=7)


def row(seeded: int | None = None, **params: Any) -> RowSampling:
    sampling = SamplingParams(seed=seeded, **params)
    generator = None if sampling.is_greedy else torch.Generator().manual_seed(seeded or 0)
    return RowSampling(sampling, generator)


def random_logits(num_rows: int, vocab_size: int, device: str) -> Tensor:
    return (3 * torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(3))).to(device)


def test_greedy_rows_take_the_likeliest(sampler: DeviceSampler, device: str) -> None:
    logits = random_logits(4, 50, device)
    ids, finite = sampler.start(logits, [row(), row(temperature=0.7, top_k=1), row(), row()]).read()
    assert ids == logits.argmax(-1).tolist()
    assert finite == [True] * 4


FILTERS: list[dict[str, Any]] = [
    {},
    {"top_k": 3},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"top_k": 5, "top_p": 0.7},
    {"top_k": 5, "min_p": 0.2},
    {"top_p": 0.9, "min_p": 0.05},
    {"top_k": 8, "top_p": 0.9, "min_p": 0.05},
]


def check_draws(drawn: list[int], logits: Tensor, params: SamplingParams) -> None:
    """Only what the filters keep is drawn, about as often as it should."""
    ids, probabilities = filtered_probabilities(logits.cpu(), params)
    expected = dict(zip(ids.tolist(), probabilities.tolist(), strict=True))
    counts = Counter(drawn)
    assert set(counts) <= set(expected), params
    for token_id, probability in expected.items():
        deviation = 5 * math.sqrt(probability * (1 - probability) / len(drawn)) + 1 / len(drawn)
        assert abs(counts[token_id] / len(drawn) - probability) <= deviation, (params, token_id)


@pytest.mark.parametrize(
    ("options", "temperature"),
    [
        pytest.param(options, temperature, marks=[] if number % 2 == place else [pytest.mark.stress])
        for number, options in enumerate(FILTERS)
        for place, temperature in enumerate((0.5, 1.5))
    ],
)
def test_draws_follow_the_filtered_distribution(
    sampler: DeviceSampler, device: str, options: dict[str, Any], temperature: float
) -> None:
    logits = random_logits(1, 12, device)
    sampled = row(temperature=temperature, **options)
    ids, _ = sampler.start(logits.expand(NUM_DRAWS, -1).contiguous(), [sampled] * NUM_DRAWS).read()
    check_draws(ids, logits[0], sampled.params)


def test_rows_that_ask_for_different_things(sampler: DeviceSampler, device: str) -> None:
    """All filters in one batch, with greedy rows between."""
    logits = random_logits(1, 12, device)
    kinds = [row(), *(row(temperature=0.9, **options) for options in FILTERS)]
    rows = kinds * (NUM_DRAWS // 3)
    ids, _ = sampler.start(logits.expand(len(rows), -1).contiguous(), rows).read()
    assert set(ids[:: len(kinds)]) == {int(logits.argmax())}
    for place, kind in enumerate(kinds[1:], 1):
        check_draws(ids[place :: len(kinds)], logits[0], kind.params)


def test_rows_with_a_seed_are_left_to_the_sampler(sampler: DeviceSampler, device: str) -> None:
    logits = random_logits(3, 40, device)
    rows = [row(temperature=1.0), row(seeded=11, temperature=1.0, top_p=0.9), row()]
    assert [sampler.draws(one) for one in rows] == [True, False, False]
    state = rows[1].generator.get_state()
    ids, _ = sampler.start(logits, rows).read()
    assert ids[1:] == logits[1:].argmax(-1).tolist()
    assert torch.equal(rows[1].generator.get_state(), state)


def test_without_kernels_nothing_is_drawn() -> None:
    sampler = DeviceSampler(None, torch.device("cpu"), seed=0)
    logits = random_logits(2, 40, "cpu")
    assert not sampler.draws(row(temperature=1.0))
    pending = sampler.start(logits, [row(temperature=1.0), row()])
    assert pending.ids.tolist() == pending.read()[0] == logits.argmax(-1).tolist()


def test_a_tiny_temperature_is_for_the_sampler() -> None:
    assert not row(temperature=MIN_TEMPERATURE / 2).is_drawn_on_device
    assert row(temperature=MIN_TEMPERATURE).is_drawn_on_device
    assert not row(seeded=0, temperature=1.0).is_drawn_on_device
    assert not row().is_drawn_on_device


@pytest.mark.parametrize("temperature", [1e-300, 1e-5, MIN_TEMPERATURE])
def test_a_temperature_near_zero_is_greedy(sampler: DeviceSampler, device: str, temperature: float) -> None:
    logits = torch.tensor([[0.0, 5.0, 4.9]], device=device)
    assert sampler.start(logits, [row(temperature=temperature)]).read()[0] == [1]


def test_rows_that_cannot_be_sampled_from_are_told(sampler: DeviceSampler, device: str) -> None:
    values = [[0.0, math.nan, 1.0], [0.0, 9.0, -math.inf], [-math.inf] * 3, [math.inf, 0.0, 0.0], [0.0, 0.0, 50.0]]
    for rows in ([row(temperature=0.5)] * 5, [row(seeded=1, temperature=0.5)] * 5, [row()] * 5):
        ids, finite = sampler.start(torch.tensor(values, device=device), rows).read()
        assert finite == [False, True, False, False, True]
        assert ids[4] == 2
        assert ids[1] in (0, 1)


def test_the_same_seed_draws_the_same(device: str) -> None:
    logits = random_logits(64, 100, device)
    rows = [row(temperature=1.0)] * 64
    first, second, other = (
        DeviceSampler(flashinfer_paged, torch.device(device), seed).start(logits, rows).read()[0] for seed in (1, 1, 2)
    )
    assert first == second
    assert first != other


class CountingKernels:
    """Counts the calls, and what they ask."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def softmax(self, logits: Tensor, temperatures: Tensor) -> Tensor:
        return (logits / temperatures[:, None]).softmax(-1)

    def draw(self, probabilities: Tensor, **asked: Any) -> Tensor:
        self.asked.append(asked)
        return probabilities.argmax(-1).int()


def test_one_call_a_batch_and_only_the_filters_that_somebody_asks() -> None:
    kernels = CountingKernels()
    typed: SamplingKernels = kernels
    sampler = DeviceSampler(typed, torch.device("cpu"), seed=0)
    logits = random_logits(3, 9, "cpu")
    sampler.start(logits, [row(temperature=1.0), row(), row(temperature=2.0)]).read()
    sampler.start(logits, [row(temperature=1.0, top_k=4)] * 3).read()
    sampler.start(logits, [row(temperature=1.0, top_k=4), row(temperature=1.0, top_p=0.5), row(temperature=1.0)]).read()
    sampler.start(logits, [row()] * 3).read()
    sampler.start(logits, [row(temperature=1.0, top_k=100)] * 3).read()
    filters = [{name: asked[name] for name in ("top_k", "top_p", "min_p")} for asked in kernels.asked]
    assert filters[0] == {"top_k": None, "top_p": None, "min_p": None}
    assert filters[1] == {"top_k": 4, "top_p": None, "min_p": None}, "one for all is a plain number, which is faster"
    assert filters[2]["top_k"].tolist() == [4, 9, 9]
    assert filters[2]["top_k"].dtype == torch.int32
    assert filters[2]["top_p"].tolist() == [1.0, 0.5, 1.0]
    assert filters[3] == {"top_k": None, "top_p": None, "min_p": None}, "more than there are"
    assert len(kernels.asked) == 4
