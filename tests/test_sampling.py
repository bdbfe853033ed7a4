"""SamplingParams, the filters against a dull oracle, and the sampler's draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from radixkv import SamplingParams
from radixkv.engine.sampling import Sampler, filtered_probabilities
from radixkv.errors import InvalidSamplingParamsError


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", -1),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", 0),
        ("top_k", 2.0),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("seed", -1),
        ("seed", 2**63),
        ("temperature", 10**400),
        ("stop", None),
        ("stop", 5),
        ("stop_token_ids", None),
        ("stop_token_ids", 5),
        ("stop", [""]),
        ("stop", ["a", 5]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", ["a"]),
        ("stop_token_ids", "12"),
        ("logprobs", -1),
        ("logprobs", 101),
        ("prompt_logprobs", 101),
        ("n", 0),
        ("n", 129),
        ("min_tokens", -1),
        ("min_tokens", 129),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0),
        ("logit_bias", {1: 101}),
        ("logit_bias", {-1: 1}),
        ("logit_bias", {"1": 1}),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", [1]),
        ("logits_transform", 5),
    ],
)
def test_errors_name_the_field(field: str, value: object) -> None:
    with pytest.raises(InvalidSamplingParamsError, match=f"^{field} "):
        SamplingParams(**{field: value})


def test_a_single_stop_string_is_one_stop() -> None:
    assert SamplingParams(stop="abc").stops == ("abc",)
    assert SamplingParams(stop=["a", "b"]).stops == ("a", "b")


def dull_filter(logits: list[float], params: SamplingParams) -> dict[int, float]:
    """Temperature, top_k, top_p, min_p, one after the other, over a plain list."""
    exponentials = [math.exp((x - max(logits)) / params.temperature) for x in logits]
    kept = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if params.top_k is not None:
        kept = kept[: params.top_k]
    total = sum(exponentials[i] for i in kept)
    nucleus, mass = [], 0.0
    for i in kept:
        if nucleus and mass >= params.top_p:
            break
        nucleus.append(i)
        mass += exponentials[i] / total
    kept = [i for i in nucleus if exponentials[i] >= params.min_p * exponentials[nucleus[0]]]
    total = sum(exponentials[i] for i in kept)
    return {i: exponentials[i] / total for i in kept}


@settings(deadline=None, derandomize=True, max_examples=150)
@given(
    logits=st.lists(st.integers(-60, 60), min_size=1, max_size=20),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.none() | st.integers(1, 25),
    top_p=st.sampled_from([0.05, 0.503, 0.907, 1.0]),
    min_p=st.sampled_from([0.0, 0.0301, 0.3001, 1.0]),
)
def test_filters_agree_with_a_dull_oracle(
    logits: list[int], temperature: float, top_k: int | None, top_p: float, min_p: float
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    values = [x / 7 for x in logits]
    ids, probabilities = filtered_probabilities(torch.tensor(values, dtype=torch.float64), params)
    expected = dull_filter(values, params)
    assert ids.tolist() == list(expected)
    assert probabilities.tolist() == pytest.approx(list(expected.values()), rel=1e-4)


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([0.0, math.log(3.0), -1e9])
    generator = torch.Generator().manual_seed(1)
    params = SamplingParams(temperature=1.0)
    drawn = [Sampler().draw(logits, params, generator) for _ in range(2000)]
    assert drawn.count(1) / 2000 == pytest.approx(0.75, abs=0.03)
    assert drawn.count(2) == 0


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-5])
def test_a_temperature_near_zero_is_greedy(temperature: float) -> None:
    params = SamplingParams(temperature=temperature)
    generator = torch.Generator().manual_seed(1)
    assert Sampler().draw(torch.tensor([0.0, 5.0, 4.9]), params, generator) == 1


def test_rows_that_cannot_be_sampled_from_are_told() -> None:
    rows = [[0.0, 5.0, 1.0], [0.0, math.nan, 1.0], [-math.inf, -math.inf, 0.0], [math.inf, 0.0, 0.0], [-math.inf] * 3]
    token_ids, finite = Sampler().likeliest(torch.tensor(rows))
    assert (token_ids[0], token_ids[2]) == (1, 2)
    assert finite == [True, False, True, False, False]


def test_logprobs_are_of_the_models_own_distribution() -> None:
    entry = Sampler().logprobs(torch.tensor([0.0, math.log(3.0)]), token_id=0, num_top=5)
    assert entry.logprob == pytest.approx(math.log(0.25))
    assert [token_id for token_id, _ in entry.top] == [1, 0]


def test_numbers_of_numpy_are_numbers() -> None:
    params = SamplingParams(temperature=np.float32(0.5), top_k=np.int64(4), seed=np.int32(3))
    assert (params.temperature, params.top_k, params.seed) == (0.5, 4, 3)
    assert {type(value) for value in (params.temperature, params.top_k, params.seed)} == {float, int}


@pytest.mark.parametrize(
    ("name", "value"), [("ignore_eos", "no"), ("ignore_eos", 1), ("temperature", True), ("max_tokens", np.bool_(True))]
)
def test_what_is_no_number_and_no_truth_value_is_refused(name: str, value: object) -> None:
    with pytest.raises(InvalidSamplingParamsError, match=f"{name} must be"):
        SamplingParams(**{name: value})
